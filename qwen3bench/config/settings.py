"""What one run is to measure: the composed config, checked and typed. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qwen3bench.config.choices import choices, options_of
from qwen3bench.config.model_config import ModelConfig
from qwen3bench.config.section import Section
from qwen3bench.errors import UserError
from qwen3bench.record.design import DESIGNS, Cell, design_cells, label

DTYPES = ("bfloat16", "float16", "float32")
_PROMPT_TOKENS = {"cuda": 2048, "cpu": 16}  # 2048 on two CPU cores would take minutes a block
_NO_SHAPE = ("name", "context_length", "tie_word_embeddings")  # of a model, what a checkpoint's may differ in
_SHAPE = [field.name for field in fields(ModelConfig) if field.name not in _NO_SHAPE]
_DTYPE = {"cuda": "bfloat16", "cpu": "float32"}  # bfloat16 is slow on a CPU without native support


@dataclass(frozen=True)
class Sizes:
    """The sizes of one workload. `prompt_tokens` is None until the device is known."""

    batch_size: int
    prompt_tokens: int | None
    new_tokens: int


@dataclass(frozen=True)
class Measure:
    """When to stop, and how the measuring is spread over processes, blocks and repeats.

    `target` (relative 95 % half-width of a main effect), `max_seconds`, `min_processes` and `repeats` (timed values of
    a visit) are None where what is measured decides.
    """

    name: str
    target: float | None
    max_seconds: float | None
    min_blocks: int
    max_blocks: int
    min_processes: int | None
    blocks_per_process: int
    repeats: int | None
    max_attempts: int
    step_timeout_s: float


@dataclass(frozen=True)
class Settings:
    """What one run is to measure, all names and numbers checked.

    `opts`, `workloads`, `runtimes` and `peers` map a name to its options, in the order of labels and tables;
    the options of an optimization hold its `_target_`. Before `resolved`, `device`, `dtype` and a runtime may
    be `auto`.
    """

    model: ModelConfig
    opts: dict[str, dict[str, Any]]
    workloads: dict[str, Sizes]
    runtimes: dict[str, dict[str, Any]]
    peers: dict[str, dict[str, Any]]
    design: str
    measure: Measure
    batch_size: int
    prompt_tokens: int | None
    new_tokens: int
    device: str
    dtype: str
    seed: int
    weights: str
    band: float
    confidence: float
    memory_limit_gib: float | None
    dir: Path | None
    resume: Path | None

    @property
    def factors(self) -> tuple[str, ...]:
        """The optimizations of the run, in the order of labels."""
        return tuple(self.opts)

    @property
    def cells(self) -> list[Cell]:
        """The cells of the run's design, the baseline first; peers are not among them."""
        return design_cells(self.design, self.factors)

    @property
    def labels(self) -> list[str]:
        """The labels of all cells of the run, the baseline first and the peers last (`transformers:sdpa`)."""
        peers = [f"{name}:{kind}" for name, options in self.peers.items() for kind in options["attention"]]
        return [*map(label, self.cells), *peers]

    @property
    def prompt_sizes(self) -> list[tuple[int, int]]:
        """Sequences and tokens of each workload's prompt; of resolved settings."""
        return [(sizes.batch_size, sizes.prompt_tokens or 1) for sizes in self.workloads.values()]

    def resolved(self, device: str) -> Settings:
        """These settings on `device` (`cpu`, `cuda`, `cuda:1`): no `auto` and no open size is left.

        Raises `UserError` where the device cannot run them or a sequence is longer than the model's context.
        """
        kind = device.partition(":")[0]
        runtimes: dict[str, dict[str, Any]] = {}
        for name, options in self.runtimes.items():
            if name == "auto":
                name = "graph" if kind == "cuda" else "eager"
                options = options_of("runtime", name)
            if name == "graph" and kind != "cuda":
                raise UserError(f"runtime=graph replays CUDA graphs and the device is {device}; use runtime=eager")
            runtimes.setdefault(name, options)
        dtype = _DTYPE[kind] if self.dtype == "auto" else self.dtype
        context = self.model.context_length
        prompt_tokens = self.prompt_tokens or min(_PROMPT_TOKENS[kind], max(1, context - self.new_tokens))
        workloads = {
            name: replace(sizes, prompt_tokens=sizes.prompt_tokens or prompt_tokens)
            for name, sizes in self.workloads.items()
        }
        for name, sizes in workloads.items():
            tokens = (sizes.prompt_tokens or 0) + sizes.new_tokens
            if tokens > context:
                raise UserError(
                    f"workload.{name} needs {tokens} tokens and {self.model.name} has a context of {context}"
                    "; lower prompt_tokens or new_tokens"
                )
        return replace(
            self,
            device=device,
            dtype=dtype,
            prompt_tokens=prompt_tokens,
            runtimes=runtimes,
            workloads=workloads,
        )

    def target(self, runtime: str) -> float:
        """The relative 95 % half-width at which a main effect in `runtime` is known well enough."""
        if self.measure.target is not None:
            return self.measure.target
        return 0.0025 if self.device.startswith("cuda") and runtime != "eager" else 0.01

    def min_processes(self, runtime: str) -> int:
        """How many processes a workload in `runtime` takes at least.

        Two give an interval. Five where it is to be narrower than ±1 %: on an H100 about half of the processes decode
        some cells 1 % to 2 % slower, and two or three are often all of one kind. Five beside a peer too, as a ratio
        to it stands on the processes alone.
        """
        if self.measure.min_processes is not None:
            return self.measure.min_processes
        return 5 if self.peers or self.target(runtime) < 0.01 else 2

    def limit_s(self, runtime: str, blocks: int, processes: int) -> float:
        """How many seconds are allowed for measuring, and for getting processes ready beyond the least.

        Unless `measure.max_seconds` says how many, it takes as long as it takes until there are intervals.
        """
        measure = self.measure
        if measure.max_seconds is not None:
            return measure.max_seconds
        if blocks < measure.min_blocks or processes < self.min_processes(runtime):
            return math.inf
        return 60.0 if self.device.startswith("cuda") else 10.0  # a choice: a tiny model's run ends within a minute

    def to_dict(self) -> dict[str, Any]:
        """The config as plain data, for the record and config.yaml; `settings_from` takes it back."""
        return {
            "model": asdict(self.model),
            "batch_size": self.batch_size,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "device": self.device,
            "dtype": self.dtype,
            "seed": self.seed,
            "weights": self.weights,
            "opt": {name: dict(options) for name, options in self.opts.items()},
            "workload": {name: asdict(sizes) for name, sizes in self.workloads.items()},
            "runtime": {name: dict(options) for name, options in self.runtimes.items()},
            "peer": {name: dict(options) for name, options in self.peers.items()},
            "design": {"name": self.design},
            "measure": asdict(self.measure),
            "analysis": {"band": self.band, "confidence": self.confidence},
            "report": {"memory_limit_gib": self.memory_limit_gib},
            "run": {"dir": None if self.dir is None else str(self.dir)},
            "resume": None if self.resume is None else str(self.resume),
        }


def with_checkpoint_shape(settings: Settings, overrides: Iterable[str]) -> Settings:
    """These settings with the model's shape from config.json where the weights are a local directory.

    Raises `UserError` where that file is missing or no Qwen3's, or `overrides` ask for a model of another shape.
    """
    directory = Path(settings.weights).expanduser()
    if settings.weights == "random" or not directory.is_dir():
        return settings
    model = ModelConfig.from_pretrained(directory)
    for override in overrides:
        group, _, name = override.lstrip("+").partition("=")[0].partition(".")
        if group == "model":
            asked, found = asdict(settings.model), asdict(model)
            differing = [key for key in ([name] if name else _SHAPE) if asked[key] != found[key]]
            if differing:
                key = differing[0]
                raise UserError(
                    f"weights={settings.weights} decides the model's shape, and its {key} is {found[key]}, not "
                    f"{asked[key]}; leave {override} out"
                )
    return replace(settings, model=model)


def settings_from(config: DictConfig | Mapping[str, Any]) -> Settings:
    """The settings that a composed config describes.

    Raises `UserError` on an unknown key, a missing value, or one of the wrong type or size; it names the key.
    """
    root = Section("", _plain(config))
    analysis, report, run = root.section("analysis"), root.section("report"), root.section("run")
    design = root.section("design")
    peers = root.named_options("peer")
    settings = Settings(
        model=_model(root.section("model")),
        batch_size=root.whole("batch_size", least=1),
        prompt_tokens=root.optional_whole("prompt_tokens"),
        new_tokens=root.whole("new_tokens", least=1),
        opts=root.named_options("opt"),
        workloads=_workloads(root),
        runtimes=root.named_options("runtime"),
        peers=peers,
        design=design.one_of("name", tuple(DESIGNS)),
        measure=_measure(root.section("measure")),
        device=_device(root),
        dtype=root.one_of("dtype", ("auto", *DTYPES)),
        seed=root.whole("seed", least=0),
        weights=root.text("weights"),
        band=analysis.number("band", below=1.0),
        confidence=analysis.number("confidence", below=1.0),
        memory_limit_gib=report.optional_number("memory_limit_gib"),
        dir=run.optional_path("dir"),
        resume=root.optional_path("resume"),
    )
    for section in (root, analysis, report, run, design):
        section.refuse_the_rest()
    for group, chosen in (("workload", settings.workloads), ("runtime", settings.runtimes)):
        if not chosen:
            raise UserError(
                f"no {group} is named, so there is nothing to measure: {group}={' | '.join(choices(group))}"
            )
    for name, options in settings.opts.items():
        if not isinstance(options.get("_target_"), str):
            raise UserError(f"opt.{name} names no function; its YAML file needs `_target_: package.module.function`")
    for name, options in settings.peers.items():
        kinds = options.get("attention")
        if set(options) != {"attention"} or not isinstance(kinds, list) or not all(isinstance(k, str) for k in kinds):
            raise UserError(f"peer.{name} needs a list of its cells and nothing else: peer.{name}.attention=[sdpa]")
        options["attention"] = list(dict.fromkeys(kinds))
    return settings


def _plain(config: DictConfig | Mapping[str, Any]) -> dict[Any, Any]:
    try:
        node = config if isinstance(config, DictConfig) else OmegaConf.create(dict(config))
        plain = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"the config cannot be resolved: {' '.join(str(error).split())}") from error
    assert isinstance(plain, dict)
    return plain


def _model(section: Section) -> ModelConfig:
    known = [field.name for field in fields(ModelConfig)]
    section.known += known
    values = {name: section.values.pop(name) for name in known if name in section.values}
    section.refuse_the_rest()
    if not isinstance(values.get("name", ""), str):
        raise section.wrong("name", "a text", values["name"])
    if not isinstance(values.get("tie_word_embeddings", False), bool):
        raise section.wrong("tie_word_embeddings", "true or false", values["tie_word_embeddings"])
    try:
        return ModelConfig(**values)
    except TypeError as error:
        missing = [name for name in known if name not in values]
        raise UserError(f"model.{', model.'.join(missing)} is missing from the config") from error


def _workloads(root: Section) -> dict[str, Sizes]:
    workloads = {}
    for name, options in root.named_options("workload").items():
        section = Section(f"workload.{name}", options)
        workloads[name] = Sizes(
            batch_size=section.whole("batch_size", least=1),
            prompt_tokens=section.optional_whole("prompt_tokens"),
            new_tokens=section.whole("new_tokens", least=1 if name == "generate" else 0),
        )
        section.refuse_the_rest()
    return workloads


def _measure(section: Section) -> Measure:
    measure = Measure(
        name=section.text("name"),
        target=section.optional_number("target", below=1.0),
        max_seconds=section.optional_number("max_seconds"),
        min_blocks=section.whole("min_blocks", least=1),
        max_blocks=section.whole("max_blocks", least=1),
        min_processes=section.optional_whole("min_processes"),
        blocks_per_process=section.whole("blocks_per_process", least=1),
        repeats=section.optional_whole("repeats"),
        max_attempts=section.whole("max_attempts", least=1),
        step_timeout_s=section.number("step_timeout_s", below=1e6),
    )
    section.refuse_the_rest()
    if measure.max_blocks < measure.min_blocks:
        raise UserError(f"measure.max_blocks={measure.max_blocks} is below min_blocks={measure.min_blocks}; raise it")
    return measure


def _device(root: Section) -> str:
    value = root.text("device")
    kind, colon, index = value.partition(":")
    if value not in ("auto", "cpu", "cuda") and not (kind == "cuda" and colon and index.isdecimal()):
        raise UserError(f"device={value!r} is unknown: use auto | cpu | cuda | cuda:0, cuda:1, …")
    return value
