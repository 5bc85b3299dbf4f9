"""The config as its YAML files lay it out, each value with its type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, TypeAdapter, with_config

from qwen3bench.config.choices import DECLARATIONS, SEVERAL, place
from qwen3bench.config.model_config import ModelConfig
from qwen3bench.config.validation import (
    AnyText,
    Count,
    CountOrZero,
    Distinct,
    Flag,
    Positive,
    Share,
    Text,
    ZeroOrOne,
    must_be,
    one_of,
    validated,
)
from qwen3bench.errors import UserError
from qwen3bench.record.design import DESIGNS
from qwen3bench.record.screen import RESOLUTIONS

PRECISIONS = ("auto", "amp", "bf16", "fp32")
_DTYPES = ("auto", "bfloat16", "float16", "float32")
_MAX_TIMEOUT_S = 1e6  # eleven days
_closed = with_config(extra="forbid")

Design = Annotated[str, one_of(*DESIGNS, "screen")]
Resolution = Annotated[int, one_of(*RESOLUTIONS)]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$"), must_be("auto, cpu, cuda, cuda:0, cuda:1, …")]
Devices = Annotated[
    CountOrZero | Text | list[CountOrZero | Text] | None,
    must_be("all, or a list of cards by their numbers or UUIDs: [0,1]"),
]
Address = Annotated[
    str, Field(pattern=r"^(local|auto|[^\s:]+:\d{1,5})$"), must_be("local, auto, or HOST:PORT of a Ray cluster")
]
Dtype = Annotated[str, one_of(*_DTYPES)]
Threads = Annotated[Literal["auto"] | Count, must_be("auto or a whole number above 0")]
Precision = Annotated[str, one_of(*PRECISIONS)]
Timeout = Annotated[Positive, Field(lt=_MAX_TIMEOUT_S), must_be(f"a number above 0 and below {_MAX_TIMEOUT_S:g}")]
Options = dict[str, dict[str, Any]]
PeerOptions = Annotated[
    dict[Literal["attention"], Annotated[list[AnyText], Distinct]],
    Field(min_length=1),
    must_be("a list of its cells and nothing else, as in attention=[sdpa]"),
]


@_closed
@dataclass(frozen=True)
class Sizes:
    """The sizes of one workload. `prompt_tokens` is None until the device is known.

    Of training also its `precision`, auto until then, and the norm that gradients are clipped to; None elsewhere.
    Of a prefill `logits_to_keep`: 1 where it computes the last token's logits alone, 0 for all.
    """

    batch_size: Count
    prompt_tokens: Count | None
    new_tokens: CountOrZero
    precision: Precision | None = None
    clip: Positive | None = None
    logits_to_keep: ZeroOrOne = 0


@_closed
@dataclass(frozen=True)
class Measure:
    """When to stop, and how the measuring is spread over processes, blocks and repeats.

    `target` (relative 95 % half-width of a main effect), `max_seconds`, `min_processes`, `blocks_per_process` and
    `repeats` (timed values of a visit) are None where what is measured decides. Raises `UserError` where
    `max_blocks` is below `min_blocks`.
    """

    name: Text
    target: Share | None
    max_seconds: Positive | None
    min_blocks: Count
    max_blocks: Count
    min_processes: Count | None
    blocks_per_process: Count | None
    repeats: Count | None
    max_attempts: Count
    step_timeout_s: Timeout

    def __post_init__(self) -> None:
        if self.max_blocks < self.min_blocks:
            raise UserError(f"measure.max_blocks={self.max_blocks} is below min_blocks={self.min_blocks}; raise it")


@_closed
@dataclass(frozen=True)
class DesignGroup:
    """The group `design`; `measured` are a screen's cells by their labels, where they are known.

    A record from before there were screens has the name alone.
    """

    name: Design
    cells: Count | None = None
    resolution: Resolution = RESOLUTIONS[0]
    force: Flag = False
    measured: list[Text] | None = None


@_closed
@dataclass(frozen=True)
class AnalysisGroup:
    """The group `analysis`."""

    band: Share
    confidence: Share


@_closed
@dataclass(frozen=True)
class ReportGroup:
    """The group `report`."""

    memory_limit_gib: Positive | None


@_closed
@dataclass(frozen=True)
class RunGroup:
    """The group `run`."""

    dir: Text | None


@_closed
@dataclass(frozen=True)
class ClusterGroup:
    """The group `cluster`: where a Ray cluster is."""

    address: Address


@_closed
@dataclass(frozen=True)
class Config:
    """The whole config, as `--cfg job --resolve` prints it."""

    model: ModelConfig
    batch_size: Count
    prompt_tokens: Count | None
    new_tokens: Count
    opt: Options
    workload: dict[str, Sizes]
    runtime: Options
    peer: dict[str, PeerOptions]
    design: DesignGroup
    measure: Measure
    device: Device
    dtype: Dtype
    seed: CountOrZero
    weights: Text
    analysis: AnalysisGroup
    report: ReportGroup
    run: RunGroup
    resume: Text | None
    devices: Devices = None  # which a record from before there were several lacks
    cluster: ClusterGroup | None = None  # likewise
    threads: Threads = "auto"  # likewise


def read_config(config: DictConfig | Mapping[str, Any]) -> Config:
    """The config, checked and typed; the choices of a group are in the order that they ask for.

    Raises `UserError` on an unknown key, a missing value, or one of the wrong type or size; it names the key.
    """
    plain = _resolved(config) if isinstance(config, DictConfig) else dict(config)  # plain data names nothing
    return validated(_adapter(), plain | {group: _in_order(plain[group]) for group in SEVERAL if group in plain})


def _resolved(config: DictConfig) -> dict[Any, Any]:
    try:
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"the config cannot be resolved: {' '.join(str(error).split())}") from error
    assert isinstance(plain, dict)
    return plain


@cache
def _adapter() -> TypeAdapter[Config]:
    return TypeAdapter(Config)  # takes 20 ms, which --help can do without


def _in_order(chosen: Any) -> Any:
    """The choices of a group by their wish `order`, without their declarations."""
    if not isinstance(chosen, dict):
        return chosen
    return {
        name: {k: v for k, v in options.items() if k not in DECLARATIONS} if isinstance(options, dict) else options
        for name, options in sorted(chosen.items(), key=lambda choice: place(choice[1]))
    }
