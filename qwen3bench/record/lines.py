"""The lines of a record: one frozen dataclass for each type, checked as it is made, whether it is read or written.

On disk a line is a JSON object with its schema version `v`, its `type` and, last, the checksum of all before it. What
is None is left out: not measured.
"""

from __future__ import annotations

import zlib
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from qwen3bench.record.messages import (
    Ceilings,
    Cost,
    EagerTime,
    Evidence,
    Judgment,
    ParameterCounts,
    PeakMemory,
    Surroundings,
    Timed,
)
from qwen3bench.record.states import BlockState, CellStatus, EndStatus, Purpose, StopReason
from qwen3bench.record.typed import Count, Names, Number, Numbers, json_line, made, parsed_line, plain, typed

SCHEMA = 1
_PLACE = ("cell", "workload", "runtime")
_ATTEMPT = ("workload", "runtime", "process", "block", "attempt")
_TAIL = b',"crc":"%08x"}'
_TAIL_BYTES = len(_TAIL % 0)


class Line:
    """A line of a record; `type` is its name on disk.

    `key` names the fields that tell it from the others of its type; without any, each line counts.
    """

    __slots__ = ()
    type: ClassVar[str]
    key: ClassVar[Names] = ()


@typed
class ScreenFacts:
    """How a screen was made and how good it is, as `screen.Screen` says it; `aliases` as in `flash:tie = mlp:mask`."""

    made: str
    terms: Count
    d_efficiency: Number | None = None
    variance_main: Number | None = None
    variance_pair: Number | None = None
    aliases: Names = ()


def _facts(value: Any) -> Any:
    return made(ScreenFacts, value) if isinstance(value, dict) else value


@typed
class RunLine(Line):
    """The first line: what is measured. `config` is the resolved one; `fingerprint` what a continued run must keep.

    `design`: how a screen was made, and how good it is (`ScreenFacts`).
    `own_switches`: those from a folder of the user's own, each with what it is in a line.
    """

    type: ClassVar = "run"
    key: ClassVar = ("type",)
    created: str | None = None
    config: dict[str, Any]
    factors: Names
    cells: Names
    workloads: Names
    runtimes: Names
    model: str | None = None
    device: str | None = None
    dtype: str | None = None
    fingerprint: dict[str, Any] | None = None
    design: Annotated[ScreenFacts | None, BeforeValidator(_facts)] = None
    own_switches: dict[str, str] | None = None

    def setting(self, *path: str) -> Any:
        """What the config says there; None where it says nothing, or has no group on the way."""
        found: Any = self.config
        for name in path:
            found = found.get(name) if isinstance(found, dict) else None
        return found


@typed
class SessionLine(Line):
    """A command began or continued the run, at `time` (seconds since the epoch); its process began at `started`."""

    type: ClassVar = "session"
    command: Names = ()
    time: Number | None = None
    started: Number | None = None


@typed
class PassLine(Line):
    """A pass of the run has ended, at `time`, after so many seconds."""

    type: ClassVar = "pass"
    name: str
    time: Number | None = None
    seconds: Number | None = None


@typed
class PromptLine(Line):
    """The prompt's length was chosen here: the longest whose forward takes no more than `limit_s`.

    `forward_s`: seconds that a forward took, by its tokens.
    """

    type: ClassVar = "prompt"
    key: ClassVar = ("type",)
    prompt_tokens: Count
    limit_s: Number
    forward_s: dict[str, Number]


@typed
class ProcessLine(Line):
    """A worker process was put to work, on a machine (its name) and on a card (its UUID; None on a CPU)."""

    type: ClassVar = "process"
    process: Count
    pid: Count | None = None
    purpose: Annotated[Purpose, Field(strict=False)] | None = None
    host: str | None = None
    card: str | None = None
    time: Number | None = None


@typed
class ParametersLine(ParameterCounts, Line):
    """A cell's parameter counts."""

    type: ClassVar = "parameters"
    key: ClassVar = ("cell",)
    cell: str


@typed
class VerifyLine(Judgment, Line):
    """The equivalence gate's verdict on a cell."""

    type: ClassVar = "verify"
    key: ClassVar = ("cell",)
    cell: str


@typed
class GradientsLine(Judgment, Line):
    """The gradient gate's verdict on a cell, in the precision of a workload."""

    type: ClassVar = "gradients"
    key: ClassVar = ("cell", "workload")
    cell: str
    workload: str


@typed
class MemoryLine(PeakMemory, Line):
    """A cell's peak memory in a workload and runtime."""

    type: ClassVar = "memory"
    key: ClassVar = _PLACE
    cell: str
    workload: str
    runtime: str


@typed
class EvidenceLine(Evidence, Line):
    """What really ran in a cell."""

    type: ClassVar = "evidence"
    key: ClassVar = _PLACE
    cell: str
    workload: str
    runtime: str


@typed
class EagerLine(EagerTime, Line):
    """About how long a cell's workload takes in eager."""

    type: ClassVar = "eager"
    key: ClassVar = ("cell", "workload")
    cell: str
    workload: str


@typed
class CostLine(Cost, Line):
    """The least that a cell's workload costs."""

    type: ClassVar = "cost"
    cell: str
    workload: str


@typed
class CeilingLine(Ceilings, Line):
    """What the device reaches."""

    type: ClassVar = "ceiling"


@typed
class CompileLine(Line):
    """How long a cell took to compile in a process, in seconds, and the compiler's options."""

    type: ClassVar = "compile"
    cell: str
    workload: str
    runtime: str
    process: Count | None = None
    seconds: Number | None = None
    options: dict[str, Any] | None = None


@typed
class SampleLine(Timed, Line):
    """One timed value, where it was taken, and when its visit began.

    `copy` 1 is the second copy of the baseline; `attempt` counts how often the block was begun; `position` is the
    visit's place in the block, `repeat` the value's in the visit.
    """

    type: ClassVar = "sample"
    key: ClassVar[Names] = (*_ATTEMPT, "cell", "copy", "position", "repeat")
    workload: str
    runtime: str
    cell: str
    copy: Count = 0
    process: Count = 0
    block: Count
    attempt: Count = 0
    position: Count | None = None
    repeat: Count | None = None
    time: Number | None = None


@typed
class VisitLine(Surroundings, Line):
    """A visit is complete, with so many samples, and what went on around it."""

    type: ClassVar = "visit"
    key: ClassVar[Names] = (*_ATTEMPT, "cell", "copy", "position")
    workload: str
    runtime: str
    cell: str
    copy: Count = 0
    process: Count = 0
    block: Count
    attempt: Count = 0
    position: Count | None = None
    samples: Count | None = None


@typed
class Telemetry:
    """One look at a card; None is what could not be read.

    `throttle_reasons` are NVML's names, harmless ones too; `foreign_processes` the ids of other processes on the card,
    and `foreign_sm_percent` how much of its SMs they took lately, together.
    """

    sm_clock_mhz: Count | None = None
    memory_clock_mhz: Count | None = None
    temperature_c: int | None = None
    power_w: Number | None = None
    throttle_reasons: Names | None = None
    foreign_processes: Annotated[tuple[int, ...], Field(strict=False)] | None = None
    foreign_sm_percent: Number | None = None


@typed
class BlockLine(Telemetry, Line):
    """An attempt at a block is complete, and the card's state after it.

    `visits`: how many it has. `elapsed_s`: seconds of measuring; `more_s`: of getting its process ready, where the time
    allowed covers that.
    """

    type: ClassVar = "block"
    key: ClassVar[Names] = _ATTEMPT
    workload: str
    runtime: str
    process: Count = 0
    block: Count
    attempt: Count = 0
    state: Annotated[BlockState, Field(strict=False)]
    flags: Names = ()
    visits: Count | None = None
    time: Number | None = None
    elapsed_s: Number | None = None
    more_s: Number | None = None


@typed
class FailureLine(Line):
    """A cell failed in a pass: everywhere, or in one workload and runtime."""

    type: ClassVar = "failure"
    key: ClassVar = (*_PLACE, "pass_")
    cell: str
    workload: str | None = None
    runtime: str | None = None
    status: Annotated[CellStatus, Field(strict=False)]
    reason: str | None = None
    pass_: str | None = None
    peak_allocated_bytes: Count | None = None


@typed
class StopLine(Line):
    """Measuring of a workload in a runtime ended. `half_width`: relative, of each main effect; None where unknown.

    It goes on, and ends again, where values of it are lost from the record before the run ends. The last line counts.
    """

    type: ClassVar = "stop"
    key: ClassVar[Names] = ("workload", "runtime", "blocks", "measured_s")
    workload: str
    runtime: str
    reason: Annotated[StopReason, Field(strict=False)]
    half_width: dict[str, Number | None] = Field(default_factory=dict)
    blocks: Count | None = None
    processes: Count | None = None
    measured_s: Number | None = None
    more_s: Number | None = None


@typed
class ConfirmLine(Line):
    """What a screen predicts to be best in a workload and runtime, and which cells are measured to see.

    `round` 1, or 2 where the first missed. `best`: the cell predicted to be fastest. `predicted`: the cells that were
    chosen with their speed-ups, and the ends `lo` and `hi` of their intervals. `cells`: what is measured, in blocks of
    its own; none where all that was chosen is measured already.
    """

    type: ClassVar = "confirm"
    key: ClassVar = ("workload", "runtime", "round")
    workload: str
    runtime: str
    round: Count
    best: str | None = None
    predicted: Names = ()
    speedup: Numbers = ()
    lo: Numbers = ()
    hi: Numbers = ()
    cells: Names = ()


@typed
class ConfirmSampleLine(SampleLine):
    """A timed value of a round that confirms; so with the lines below."""

    type: ClassVar = "confirm_sample"
    key: ClassVar[Names] = ("round", *SampleLine.key)
    round: Count


@typed
class ConfirmVisitLine(VisitLine):
    type: ClassVar = "confirm_visit"
    key: ClassVar[Names] = ("round", *VisitLine.key)
    round: Count


@typed
class ConfirmBlockLine(BlockLine):
    type: ClassVar = "confirm_block"
    key: ClassVar[Names] = ("round", *BlockLine.key)
    round: Count


@typed
class ConfirmStopLine(StopLine):
    type: ClassVar = "confirm_stop"
    key: ClassVar[Names] = ("round", *StopLine.key)
    round: Count


@typed
class EndLine(Line):
    """A session of the run ended."""

    type: ClassVar = "end"
    status: Annotated[EndStatus, Field(strict=False)]
    time: Number | None = None


LINES: dict[str, type[Line]] = {
    line.type: line
    for line in (
        RunLine,
        SessionLine,
        PassLine,
        PromptLine,
        ProcessLine,
        ParametersLine,
        VerifyLine,
        GradientsLine,
        MemoryLine,
        EvidenceLine,
        EagerLine,
        CostLine,
        CeilingLine,
        CompileLine,
        SampleLine,
        VisitLine,
        BlockLine,
        FailureLine,
        StopLine,
        ConfirmLine,
        ConfirmSampleLine,
        ConfirmVisitLine,
        ConfirmBlockLine,
        ConfirmStopLine,
        EndLine,
    )
}


_OF_TYPE = b'{"v":%d,"type":' % SCHEMA
# In one step, three times as fast: nearly all lines of a record are of these types.
_OFTEN: dict[bytes, TypeAdapter[Line]] = {
    b'%b"%b",' % (_OF_TYPE, kind.type.encode()): TypeAdapter(kind)
    for kind in (SampleLine, VisitLine, ConfirmSampleLine, ConfirmVisitLine)
}


class OtherSchemaError(Exception):
    """A line of another schema version, which is the argument."""


class UnknownTypeError(Exception):
    """A line of a type that this version does not know, which is the argument."""


def encode(line: Line) -> bytes:
    """One line of the record, with its version, checksum and newline.

    Raises ValueError where it holds a number that is not finite.
    """
    # ASCII alone: no byte that is no UTF-8, no character that some reader takes for the end of a line.
    text = json_line({"v": SCHEMA, "type": line.type, **plain(line)})[:-1]
    return text + _TAIL % zlib.crc32(text) + b"\n"


def decode(raw: bytes) -> Line:
    """The line as it was written.

    Raises ValueError with what is wrong with it in words, `OtherSchemaError` and `UnknownTypeError`.
    """
    if not raw.endswith(b"\n"):
        raise ValueError("is torn")
    text, tail = raw[: -_TAIL_BYTES - 1], raw[-_TAIL_BYTES - 1 : -1]
    if tail != _TAIL % zlib.crc32(text):
        raise ValueError("the checksum does not match")
    often = _OFTEN.get(raw[: raw.find(b",", len(_OF_TYPE)) + 1])
    if often and raw.count(b"{") == 1 and raw.count(b"[") <= 1 and raw.isascii():
        try:
            return often.validate_json(raw)
        except ValidationError:  # what is wrong is told below
            pass
    try:
        fields = parsed_line(raw)
    except ValueError as error:
        raise ValueError(f"is no JSON object of finite numbers ({error})") from None
    version, type_ = fields.pop("v", None), fields.pop("type", None)
    if type(version) is not int or not isinstance(type_, str):
        raise ValueError("is no line of a record")
    if version != SCHEMA:
        raise OtherSchemaError(version)
    if type_ not in LINES:
        raise UnknownTypeError(type_)
    try:
        return made(LINES[type_], fields)
    except ValueError as error:
        raise ValueError(f"is no {type_} line: {error}") from None
