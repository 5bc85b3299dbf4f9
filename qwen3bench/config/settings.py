"""What one run is to measure: the composed config, checked and typed. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig

from qwen3bench.config.catalogue import all_options, claim_of, rules_of
from qwen3bench.config.checkpoint_source import checkpoint_shape
from qwen3bench.config.choices import choices, no_such_choice, options_of
from qwen3bench.config.claims import refuse_conflicts
from qwen3bench.config.model_config import ModelConfig
from qwen3bench.config.schema import PRECISIONS, Measure, Options, PeerOptions, Sizes, read_config
from qwen3bench.errors import Refused, UserError
from qwen3bench.record.design import Cell, cell_of, design_cells, label
from qwen3bench.record.screen import MOST, Rules, Screen, Wish, screen

_PROMPT_TOKENS = {"cuda": 2048, "cpu": 16}  # 2048 on two CPU cores would take minutes a block
_NEW_TOKENS = {"prefill": 0, "decode": 1, "train": 0}  # of the workloads that are one step
_NO_SHAPE = ("name", "context_length", "tie_word_embeddings")  # of a model, what a checkpoint's may differ in
_SHAPE = [field.name for field in fields(ModelConfig) if field.name not in _NO_SHAPE]
_MOST_CELLS = 2**9  # of a design: an hour on an H100; of more switches nobody waits for every combination
_PRECISION = {"cuda": "amp", "cpu": "fp32"}  # of training
_DTYPE = {"cuda": "bfloat16", "cpu": "float32"}  # bfloat16 is slow on a CPU without native support


@dataclass(frozen=True)
class Settings:
    """What one run is to measure, all names and numbers checked by `settings_from`.

    `opts`, `workloads`, `runtimes` and `peers` map a name to its options, in the order of labels and tables;
    the options of an optimization hold its `_target_`. Before `resolved`, `device`, `dtype` and a runtime may
    be `auto`; `threads` stays so where PyTorch decides. `devices` names the cards where there are several, `cluster` is
    a Ray cluster's address. `wish` is asked of a screen; `measured` are its cells where a record knows them. Raises
    `UserError` where nothing would be measured, on a runtime or an optimization without code, and on a design with too
    many cells or with one that cannot be built.
    """

    model: ModelConfig
    opts: Options
    workloads: dict[str, Sizes]
    runtimes: Options
    peers: dict[str, PeerOptions]
    design: str
    wish: Wish
    force: bool
    measured: tuple[str, ...] | None
    measure: Measure
    batch_size: int
    prompt_tokens: int | None
    new_tokens: int
    device: str
    devices: tuple[str, ...]
    cluster: str | None
    dtype: str
    threads: int | Literal["auto"]
    seed: int
    weights: str
    band: float
    confidence: float
    memory_limit_gib: float | None
    dir: Path | None
    resume: Path | None

    def __post_init__(self) -> None:
        for group, chosen in (("workload", self.workloads), ("runtime", self.runtimes)):
            if not chosen:
                known = " | ".join(choices(group))
                raise UserError(f"no {group} is named, so there is nothing to measure: {group}={known}")
        for name in self.runtimes:
            if name not in choices("runtime"):
                raise UserError(no_such_choice("runtime", name))
        self._check_workloads()
        for name, options in self.opts.items():
            if not isinstance(options.get("_target_"), str):
                raise UserError(
                    f"opt.{name} names no function; its YAML file needs `_target_: package.module.function`"
                )
        self._check_design()

    def _check_workloads(self) -> None:
        if "generate" in self.workloads and not self.workloads["generate"].new_tokens:
            raise UserError("workload.generate.new_tokens must be a whole number above 0, not 0")
        for name, sizes in self.workloads.items():
            if name == "train" and sizes.precision is None:
                raise UserError(f"workload.train.precision is not named: use {' | '.join(PRECISIONS)}")
            if name != "train" and (sizes.precision, sizes.clip) != (None, None):
                raise UserError(f"workload.{name}: precision and clip are for training alone")
        for name, new_tokens in _NEW_TOKENS.items():
            if name in self.workloads and self.workloads[name].new_tokens != new_tokens:
                raise UserError(f"workload.{name}.new_tokens is {new_tokens}; how many are generated is for generate")
        if kept := [name for name, sizes in self.workloads.items() if sizes.logits_to_keep and name != "prefill"]:
            raise UserError(f"workload.{kept[0]}.logits_to_keep: only a prefill can leave out logits")

    def _check_design(self) -> None:
        if self.design != "screen" and self.wish != Wish():
            raise UserError(f"design.cells and design.resolution are for design=screen, and this is {self.design}")
        count = len(self.factors)
        if self.design == "full" and 2**count > _MOST_CELLS and not self.force:
            of_how_many = f"up to {MOST} of them"
            if count <= MOST:
                of_how_many = f"these {count} in {len(self.screen.cells)} cells"
            raise UserError(
                f"design=full would measure 2^{count} = {2**count:,} cells; design=screen tells every main effect and "
                f"pair of {of_how_many}\ndesign.force=true measures them all"
            )
        for cell in self.cells:
            if why := self.rules.broken_by(cell):
                raise UserError(f"{label(cell)}: {why}; switch one off, or let design=screen leave such cells out")
        claims = [claim_of(name, options["_target_"]) for name, options in self.opts.items()]
        refuse_conflicts(claims, self.cells)

    @property
    def factors(self) -> tuple[str, ...]:
        """The optimizations of the run, in the order of labels."""
        return tuple(self.opts)

    @property
    def cells(self) -> list[Cell]:
        """The cells of the run's design, the baseline first; peers are not among them."""
        if self.design == "screen":
            return [*map(cell_of, self.measured)] if self.measured else [*self.screen.cells]
        cells = design_cells(self.design, self.factors)
        return [cell for cell in cells if self.rules.allow(cell)] if self.design == "full" else cells

    @property
    def screen(self) -> Screen:
        """The screen of the run's optimizations, whatever its design."""
        return screen(self.factors, self.rules, self.wish)

    @property
    def rules(self) -> Rules:
        """Which of the run's optimizations do not go together, as their YAML files declare."""
        return rules_of(self.factors)

    @property
    def labels(self) -> list[str]:
        """The labels of all cells of the run, the baseline first and the peers last (`transformers:sdpa`)."""
        peers = [f"{name}:{kind}" for name, options in self.peers.items() for kind in options["attention"]]
        return [*map(label, self.cells), *peers]

    def resolved(self, device: str, *, emulates_bfloat16: bool = False) -> Settings:
        """These settings on `device` (`cpu`, `cuda`, `cuda:1`): no `auto` and no open size is left.

        `emulates_bfloat16`: the card has no arithmetic for it, so that `auto` is float16, and float32 in training.

        Raises `Refused` where the device cannot run them or a sequence is longer than the model's context.
        """
        kind = device.partition(":")[0]
        runtimes: dict[str, dict[str, Any]] = {}
        for name, options in self.runtimes.items():
            if name == "auto":
                name = "graph" if kind == "cuda" else "eager"
                options = options_of("runtime", name)
            if name == "graph" and kind != "cuda":
                raise Refused(f"runtime=graph replays CUDA graphs and the device is {device}; use runtime=eager")
            runtimes.setdefault(name, options)
        dtype, precision = ("float16", "fp32") if emulates_bfloat16 else (_DTYPE[kind], _PRECISION[kind])
        dtype = dtype if self.dtype == "auto" else self.dtype
        context = self.model.context_length
        prompt_tokens = self.prompt_tokens or min(_PROMPT_TOKENS[kind], max(1, context - self.new_tokens))
        workloads = {
            name: replace(
                sizes,
                prompt_tokens=sizes.prompt_tokens or prompt_tokens,
                precision=precision if sizes.precision == "auto" else sizes.precision,
            )
            for name, sizes in self.workloads.items()
        }
        if emulates_bfloat16 and (
            dtype == "bfloat16" or any(sizes.precision in ("amp", "bf16") for sizes in workloads.values())
        ):
            raise Refused("this card has no arithmetic for bfloat16; use dtype=float16, and in training precision=fp32")
        if kind == "cpu" and any(sizes.precision == "amp" for sizes in workloads.values()):
            raise Refused("train.precision=amp is for CUDA; on a CPU use fp32, or bf16 where it has that")
        for name, sizes in workloads.items():
            tokens = (sizes.prompt_tokens or 0) + sizes.new_tokens
            if tokens > context:
                raise Refused(
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

        Three give an effect that differs between processes two degrees of freedom; two give it one. Five where the
        interval is to be narrower than ±1 %: on an H100 about half of the processes decode some cells 1 % to 2 %
        slower, and two or three are often all of one kind. Five beside a peer too, as a ratio to it stands on the
        processes alone.
        """
        if self.measure.min_processes is not None:
            return self.measure.min_processes
        return 5 if self.peers or self.target(runtime) < 0.01 else 3

    @property
    def blocks_per_process(self) -> int:
        """How many blocks a process times at least: on a CPU the least blocks of a run in its least processes."""
        if self.measure.blocks_per_process is not None:
            return self.measure.blocks_per_process
        return 3 if self.device.startswith("cuda") else 2

    @property
    def time_allowed_s(self) -> float:
        """How many seconds each workload and runtime is measured, unless its intervals take longer or less.

        Getting processes ready is no part of it.
        """
        if self.measure.max_seconds is not None:
            return self.measure.max_seconds
        if self.device.startswith("cuda"):
            return 60.0
        trains = any(sizes.precision is not None for sizes in self.workloads.values())
        return 18.0 if trains else 30.0  # a choice: a tiny model's run takes a minute, with its gradients judged too

    def to_dict(self) -> dict[str, Any]:
        """The config as plain data, for the record and config.yaml; `settings_from` takes it back."""
        return {
            "model": asdict(self.model),
            "batch_size": self.batch_size,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "device": self.device,
            "devices": [*self.devices] or None,
            "cluster": self.cluster and {"address": self.cluster},
            "dtype": self.dtype,
            **({} if self.threads == "auto" else {"threads": self.threads}),  # older records lack it
            "seed": self.seed,
            "weights": self.weights,
            "opt": {name: dict(options) for name, options in self.opts.items()},
            "workload": {name: _sizes(sizes) for name, sizes in self.workloads.items()},
            "runtime": {name: dict(options) for name, options in self.runtimes.items()},
            "peer": {name: dict(options) for name, options in self.peers.items()},
            "design": {
                "name": self.design,
                "cells": self.wish.cells,
                "resolution": self.wish.resolution,
                "force": self.force,
                "measured": [*map(label, self.cells)] if self.design == "screen" else None,
            },
            "measure": asdict(self.measure),
            "analysis": {"band": self.band, "confidence": self.confidence},
            "report": {"memory_limit_gib": self.memory_limit_gib},
            "run": {"dir": None if self.dir is None else str(self.dir)},
            "resume": None if self.resume is None else str(self.resume),
        }


def with_checkpoint_shape(settings: Settings, overrides: Iterable[str]) -> Settings:
    """These settings with the model's shape from the checkpoint's config.json, unless the weights are random.

    Raises `UserError` where there is no such checkpoint or it is no dense Qwen3's, and where `overrides` ask for a
    model of another shape.
    """
    if settings.weights == "random":
        return settings
    model = checkpoint_shape(settings.weights)
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

    Raises `UserError` on an unknown key, name or option, a missing value, or one of the wrong type or size.
    """
    read = read_config(config)
    for group, chosen in (("peer", list(read.peer)), ("opt", list(read.opt))):
        for name in chosen:
            if name not in choices(group):
                raise UserError(no_such_choice(group, name))
    all_options(read.opt)
    return Settings(
        model=read.model,
        batch_size=read.batch_size,
        prompt_tokens=read.prompt_tokens,
        new_tokens=read.new_tokens,
        opts=read.opt,
        workloads=read.workload,
        runtimes=read.runtime,
        peers=read.peer,
        design=read.design.name,
        wish=Wish(read.design.cells, read.design.resolution),
        force=read.design.force,
        measured=None if read.design.measured is None else tuple(read.design.measured),
        measure=read.measure,
        device=read.device,
        devices=_names(read.devices),
        cluster=None if read.cluster is None else read.cluster.address,
        dtype=read.dtype,
        threads=read.threads,
        seed=read.seed,
        weights=read.weights,
        band=read.analysis.band,
        confidence=read.analysis.confidence,
        memory_limit_gib=read.report.memory_limit_gib,
        dir=_path(read.run.dir),
        resume=_path(read.resume),
    )


def _sizes(sizes: Sizes) -> dict[str, Any]:
    """The sizes as plain data; what only training has is left out elsewhere, and so is that all logits are computed."""
    plain = asdict(sizes)
    left_out = () if sizes.precision is not None else ("precision", "clip")
    left_out = left_out if sizes.logits_to_keep else (*left_out, "logits_to_keep")
    return {name: value for name, value in plain.items() if name not in left_out}


def _names(asked: str | int | list[str | int] | None) -> tuple[str, ...]:
    """The cards that are named, each once; none where none is."""
    listed = asked if isinstance(asked, list) else [] if asked is None else [asked]
    return tuple(dict.fromkeys(map(str, listed)))


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text).expanduser()
