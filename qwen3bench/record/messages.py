"""What a campaign and a worker say to each other: one request and one reply at a time, each a line of JSON.

Request: {"op": name, …fields}. Reply: {"ok": {…fields}} or {"error": {"status", "reason", …}}. Nothing is pickled, and
nothing is shared but these messages, so a worker may live in a child process, on another card or on another machine.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Generic, TypeVar

from pydantic import BeforeValidator, Field

from qwen3bench.errors import Refused
from qwen3bench.record.states import CellStatus
from qwen3bench.record.typed import (
    Count,
    Names,
    Number,
    Seconds,
    Times,
    json_line,
    made,
    parsed_line,
    plain,
    typed,
)

# --- replies ---


@typed
class Done:
    """A request is fulfilled, and there is nothing to tell."""


@typed
class DeviceFound:
    """The device that a name means: `cpu`, `cuda`, `cuda:1`; `emulates_bfloat16`: it has no arithmetic for that."""

    device: str
    emulates_bfloat16: bool = False


@typed
class RunningCode:
    """Which qwen3bench a process runs: where its package lies, and the hash of the code that measures."""

    package: str
    code: str


@typed
class Identity:
    """The machine and its software, and what must not change when a run is continued."""

    environment: dict[str, Any]
    fingerprint: dict[str, str]


@typed
class ParameterCounts:
    """How many parameters a model stores, and their bytes (CONTRACT.md, Parameter counts)."""

    num_parameters: Count | None = None
    num_unique_parameters: Count | None = None
    num_non_embedding_parameters: Count | None = None
    parameter_bytes: Count | None = None


@typed
class Judgment:
    """The equivalence gate's verdict on a cell.

    `ran`: whether it gave logits at all. `max_abs_error` is that of float32; `kl_mean` (nats) and `top1_agreement`
    (share) are of the run's dtype. `checks`: each check's number, by name.
    """

    equivalent: bool
    ran: bool = True
    max_abs_error: Number | None = None
    kl_mean: Number | None = None
    top1_agreement: Number | None = None
    reason: str | None = None
    checks: dict[str, Number] = Field(default_factory=dict)


@typed
class PeakMemory:
    """The allocator's peaks with one cell alone resident, and its KV cache, in bytes.

    Of training also what is held at the peak: gradients, the optimizer's state, activations kept for backward.
    `graph_bytes`: what its CUDA graphs take of the card outside the allocator, so for each cell that is ready.
    """

    peak_allocated_bytes: Count | None = None
    peak_reserved_bytes: Count | None = None
    cache_bytes: Count | None = None
    gradient_bytes: Count | None = None
    optimizer_bytes: Count | None = None
    activation_bytes: Count | None = None
    graph_bytes: Count | None = None


@typed
class Evidence:
    """What really ran. `kernels`: name → launches. `eager_s`: as in `EagerTime`, which older records have here.

    `output`: a hash of the last tokens' logits, or of the loss, bit for bit, on inputs that all cells have.
    `parts_s`: about how long each part of a training step takes, launched from Python, in seconds: the quicker of two.
    """

    attention_backend: str | None = None
    kernel_launches: Count | None = None
    tied_storage: bool | None = None
    graph_breaks: Count | None = None
    recompiles: Count | None = None
    kernels: dict[str, Count] = Field(default_factory=dict)
    notes: Names = ()
    output: str | None = None
    eager_s: Seconds | None = None
    parts_s: dict[str, Seconds] | None = None


@typed
class EagerTime:
    """About how long a cell takes in eager, where that is not timed, in seconds."""

    eager_s: Seconds


@typed
class ForwardTime:
    """How long one forward takes, in seconds."""

    seconds: Seconds


@typed
class Cost:
    """The least floating-point operations and bytes moved of one timed value."""

    flops: Number | None = None
    bytes: Number | None = None


@typed
class Ceilings:
    """What the device reaches in a large copy and a large matrix product, and its vendor's figures."""

    copy_bytes_per_s: Number | None = None
    matmul_flops_per_s: Number | None = None
    dtype: str | None = None
    vendor: dict[str, Any] | None = None


@typed
class Preparation:
    """What getting a cell ready took: seconds of compilation and the compiler's options, where it is compiled."""

    compile_s: Number | None = None
    compile_options: dict[str, Any] | None = None


@typed
class Timed:
    """One timed value: latency in seconds; where tokens are generated TTFT, mean TPOT and each inter-token latency.

    On the host's clock: its threads waited `waited_s` for a core, and lost one `switches` times. `disturbed`:
    other work took so much that the value counts only where its visit has no other; None: it did not, or none looked.
    """

    latency_s: Seconds
    ttft_s: Seconds | None = None
    tpot_s: Seconds | None = None
    itl_s: Times | None = None
    waited_s: Number | None = None
    switches: Count | None = None
    disturbed: bool | None = None


def _timed(value: Any) -> Timed:
    return value if isinstance(value, Timed) else made(Timed, value)


@typed
class Pace:
    """How much each visit takes in, the same for all cells and processes: values, and launches inside one.

    `untimed`: whether one that is not timed comes before them.
    """

    inner: Count
    repeats: Count
    untimed: bool = True


@typed
class Surroundings:
    """What went on around a visit: seconds that other processes and the hypervisor took of our CPUs, and their clock.

    `takes`: how often it was taken, as other work disturbed it. `paused`: the process was stopped, or the machine
    suspended, in it. `repeats` values were asked for, each of `inner` launches; where `untimed` is false without an
    untimed one before them.
    """

    paused: bool | None = None
    takes: Count | None = None
    repeats: Count | None = None
    inner: Count | None = None
    untimed: bool | None = None
    others_s: Number | None = None
    steal_s: Number | None = None
    clock_mhz: Count | None = None


@typed
class TimedVisit(Surroundings):
    """The timed values of one visit, which began at `time` (seconds since the epoch), those of all its takes."""

    time: Number
    samples: Annotated[tuple[Annotated[Timed, BeforeValidator(_timed)], ...], Field(strict=False)]


@typed
class Failure:
    """Why a request could not be fulfilled: the cell's status, or `refused` for a mistake of the user's."""

    status: str
    reason: str | None = None
    peak_allocated_bytes: Count | None = None


# --- requests ---

R = TypeVar("R")


class Request(Generic[R]):
    """What a worker is asked for; `op` names it, `reply` is the type of its answer."""

    __slots__ = ()
    op: ClassVar[str]
    reply: ClassVar[type]


@typed
class Probe(Request[DeviceFound]):
    """Which device does this name (auto, cpu, cuda, cuda:1) mean here?"""

    op: ClassVar = "probe"
    reply: ClassVar = DeviceFound
    device: str


@typed
class Open(Request[RunningCode]):
    """Take the resolved settings, and say which code will measure them.

    `config_dir` is the folder of the user's own (--config-dir) and `import_path` where the campaign's Python looks for
    modules, for what his switches name. `own_code`: their hashes when the run began; other code is refused.
    """

    op: ClassVar = "open"
    reply: ClassVar = RunningCode
    config: dict[str, Any]
    config_dir: str | None = None
    import_path: Names = ()
    own_code: dict[str, str] = Field(default_factory=dict)


@typed
class Touch(Request[Done]):
    """Run a kernel, so that the device turns once from the processes that are ready to this one.

    Until then a process may start the kernels of a graph 0.2 to 0.4 µs later, as was seen on an H100 after cuBLAS's
    first product of one row (docs/log.md, "How soon kernels start").
    """

    op: ClassVar = "touch"
    reply: ClassVar = Done


@typed
class Identify(Request[Identity]):
    """What is the machine, and what must not change when a run is continued?"""

    op: ClassVar = "identify"
    reply: ClassVar = Identity


@typed
class Load(Request[Done]):
    """Load the weights and build these cells."""

    op: ClassVar = "load"
    reply: ClassVar = Done
    cells: Names


@typed
class TimeForward(Request[ForwardTime]):
    """How long does the baseline take for a prompt of so many tokens?"""

    op: ClassVar = "forward"
    reply: ClassVar = ForwardTime
    prompt_tokens: Count


@typed
class CountParameters(Request[ParameterCounts]):
    """Count a cell's parameters."""

    op: ClassVar = "parameters"
    reply: ClassVar = ParameterCounts
    cell: str


@typed
class Verify(Request[Judgment]):
    """Does a cell compute the baseline's function?"""

    op: ClassVar = "verify"
    reply: ClassVar = Judgment
    cell: str


@typed
class VerifyGradients(Request[Judgment]):
    """Does a cell train as the baseline does?"""

    op: ClassVar = "gradients"
    reply: ClassVar = Judgment
    cell: str
    workload: str


@typed
class MeasureMemory(Request[PeakMemory]):
    """Measure the peak memory of a cell alone."""

    op: ClassVar = "memory"
    reply: ClassVar = PeakMemory
    cell: str
    workload: str
    runtime: str


@typed
class CollectEvidence(Request[Evidence]):
    """What really runs in a cell?"""

    op: ClassVar = "evidence"
    reply: ClassVar = Evidence
    cell: str
    workload: str
    runtime: str


@typed
class TimeEager(Request[EagerTime]):
    """About how long does a cell take in eager? Asked with nothing else at work on the device."""

    op: ClassVar = "eager"
    reply: ClassVar = EagerTime
    cell: str
    workload: str


@typed
class ComputeCost(Request[Cost]):
    """The least that a cell's workload costs."""

    op: ClassVar = "cost"
    reply: ClassVar = Cost
    cell: str
    workload: str


@typed
class MeasureCeilings(Request[Ceilings]):
    """What does the device reach?"""

    op: ClassVar = "ceilings"
    reply: ClassVar = Ceilings


@typed
class Enter(Request[Done]):
    """Begin timing cells of one workload in one runtime; `cell` fills the cache where there is one."""

    op: ClassVar = "enter"
    reply: ClassVar = Done
    workload: str
    runtime: str
    cell: str


@typed
class Prepare(Request[Preparation]):
    """Build a cell, warm it up, capture it; without a `launch` it is built alone, where nothing has to be warm."""

    op: ClassVar = "prepare"
    reply: ClassVar = Preparation
    cell: str
    copy: Count
    launch: bool = True


@typed
class Visit(Request[TimedVisit]):
    """Time a cell that is ready: `repeats` values of `inner` launches, as many as the cells ask for where None.

    Before them comes an untimed launch where `untimed`; where that is None too, as the cells ask for.
    Where other work disturbs it, it is taken again at once, up to `takes` times in all.
    """

    op: ClassVar = "visit"
    reply: ClassVar = TimedVisit
    cell: str
    copy: Count
    repeats: Count | None = None
    inner: Count | None = None
    untimed: bool | None = None
    takes: Count = 1


REQUESTS: dict[str, type[Request[Any]]] = {
    request.op: request
    for request in (
        Probe,
        Open,
        Touch,
        Identify,
        Load,
        TimeForward,
        CountParameters,
        Verify,
        VerifyGradients,
        MeasureMemory,
        CollectEvidence,
        TimeEager,
        ComputeCost,
        MeasureCeilings,
        Enter,
        Prepare,
        Visit,
    )
}
REFUSED = "refused"


class CellFailure(Exception):
    """A request that the worker could not fulfill: the cell's status and the reason. Nothing more is asked of it."""

    def __init__(self, status: CellStatus, reason: str, peak_allocated_bytes: int | None = None) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.peak_allocated_bytes = peak_allocated_bytes

    def __reduce__(self) -> tuple[Any, ...]:
        """How it is told to another process (pickle): as it was made."""
        return type(self), (self.status, self.reason, self.peak_allocated_bytes)


class NoAnswerError(CellFailure):
    """The worker was silent, died, or said what is no answer: it may have been an accident."""


def encode_request(request: Request[Any]) -> bytes:
    """A request as one line."""
    return json_line({"op": request.op, **plain(request)}) + b"\n"


def decode_request(line: bytes) -> Request[Any]:
    """The request of one line. Raises ValueError where it is none."""
    fields = parsed_line(line)
    op = fields.pop("op", None)
    if not isinstance(op, str) or op not in REQUESTS:
        raise ValueError(f"there is no request {op!r:.80}")
    return made(REQUESTS[op], fields)


def encode_reply(reply: object) -> bytes:
    """A reply, or a `Failure`, as one line. Raises ValueError for NaN and infinities, which JSON does not have."""
    return json_line({"error" if isinstance(reply, Failure) else "ok": plain(reply)}) + b"\n"


def decode_reply(line: bytes, request: Request[R]) -> R:
    """The reply to `request`.

    Raises `CellFailure` where it is an error or no reply, and `Refused` where it refuses what the user asked for.
    """
    try:
        fields = parsed_line(line)
        if isinstance(fields.get("ok"), dict):
            reply: R = made(request.reply, fields["ok"])
            return reply
        failure = made(Failure, fields["error"])
    except (ValueError, TypeError, AttributeError, KeyError) as fault:
        text = f"the worker's answer to {request.op} is no message ({fault})"
        raise NoAnswerError(CellStatus.CRASHED, text) from None
    reason = failure.reason or "no reason given"
    if failure.status == REFUSED:
        raise Refused(reason)
    failures = set(CellStatus) - {CellStatus.OK}
    status = CellStatus(failure.status) if failure.status in failures else CellStatus.CRASHED
    raise CellFailure(status, reason, failure.peak_allocated_bytes)
