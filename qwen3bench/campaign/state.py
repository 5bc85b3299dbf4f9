"""What a run has done so far, as its record tells: so that it continues where it was."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from qwen3bench.campaign.card_costs import CardForecast, SoFar
from qwen3bench.config.settings import Settings
from qwen3bench.record.lines import (
    BlockLine,
    CeilingLine,
    EagerLine,
    EvidenceLine,
    FailureLine,
    GradientsLine,
    MemoryLine,
    ParametersLine,
    ProcessLine,
    PromptLine,
    SampleLine,
    VerifyLine,
    VisitLine,
)
from qwen3bench.record.messages import (
    Ceilings,
    CollectEvidence,
    CountParameters,
    Evidence,
    MeasureMemory,
    Pace,
    ParameterCounts,
    PeakMemory,
    Request,
    Surroundings,
    TimeEager,
    Verify,
    VerifyGradients,
)
from qwen3bench.record.reader import Record
from qwen3bench.record.states import BlockState, CellStatus

Where = tuple[str, str]  # workload, runtime


@dataclass(frozen=True)
class Place:
    """Where a step is taken or fails: a cell, in one workload and runtime or, without these, everywhere."""

    cell: str
    workload: str | None = None
    runtime: str | None = None

    @classmethod
    def of(cls, request: Request[Any]) -> Place:
        """The place that a request names."""
        workload, runtime = (getattr(request, name, None) for name in ("workload", "runtime"))
        return cls(getattr(request, "cell", ""), workload, runtime)

    def __str__(self) -> str:
        return " ".join(filter(None, (self.cell, self.workload, self.runtime)))


@dataclass
class Timing:
    """What is known of one workload in one runtime: closed blocks and their samples; times in seconds."""

    samples: list[SampleLine] = field(default_factory=list)
    numbers: set[int] = field(default_factory=set)  # of blocks that are closed, or that a process has in hand
    blocks: int = 0  # that are closed
    attempts: Counter[int] = field(default_factory=Counter)  # at each block, whatever became of them
    disturbed: Counter[int] = field(default_factory=Counter)  # of these, ended throttled or beside other processes
    processes: set[int] = field(default_factory=set)
    measured_s: float = 0.0
    setup_s: float = 0.0  # of its last process
    more_s: float = 0.0  # spent on getting processes ready beyond the least that a run takes
    pace: Pace | None = None  # found at the first visit of all
    stopped: bool = False
    widths: dict[str, float] = field(default_factory=dict)  # of each effect's interval, when they were last worked out
    judged_until: float = 0.0  # on the monotonic clock: till when these will do

    @property
    def so_far(self) -> SoFar:
        """What a forecast goes by."""
        return SoFar(len(self.processes), self.blocks, self.measured_s, self.setup_s)

    def begin_block(self) -> int:
        """The number of a block that nobody has in hand: of one that was begun and left, or of a new one."""
        number = next(number for number in itertools.count() if number not in self.numbers)
        self.numbers.add(number)
        return number

    def leave_block(self, number: int) -> None:
        """Leave a block that is not closed to another process."""
        self.numbers.discard(number)

    def see_pace(self, visit: Surroundings) -> None:
        """Take note of the pace that a visit was taken at, so that it is found once."""
        if visit.repeats and visit.inner:
            self.pace = Pace(inner=visit.inner, repeats=visit.repeats, untimed=visit.untimed is not False)


class RunState:
    """Finished steps, failures, timings and the last process of a run; `record` is what earlier starts wrote."""

    def __init__(self, settings: Settings, record: Record | None = None) -> None:
        self.failures: dict[Place, CellStatus] = {}
        self.unanswered: set[tuple[str, Place]] = set()  # passes and places that failed once, maybe by accident
        self.steps: set[Request[Any]] = set()  # that were answered
        self.ceilings_known = False
        self.process = -1
        self.evidence: dict[Where, dict[str, Evidence]] = {}  # by cell
        self.memory: dict[Where, dict[str, PeakMemory]] = {}  # of each cell alone
        self.parameter_bytes = 0  # of the largest cell so far
        self.prompt: PromptLine | None = None  # where its length was chosen, by what forwards take
        self.forecast: CardForecast | None = None  # of a run on a GPU
        self.flops_per_s: float | None = None  # of a large 16-bit product, where that is measured
        self.timings: dict[Where, Timing] = {
            (workload, runtime): Timing() for workload in settings.workloads for runtime in settings.runtimes
        }
        if record is not None:
            self._take_up_steps(record)
            self._take_up_blocks(record)

    def runs(self, place: Place) -> bool:
        """Whether a cell is still to be run there: not after a failure, except that of the gate."""
        scopes = (Place(place.cell), Place(place.cell, place.workload), place)
        failed = {self.failures.get(scope, CellStatus.OK) for scope in scopes}
        return failed <= {CellStatus.OK, CellStatus.NOT_EQUIVALENT}

    def is_sound(self, place: Place) -> bool:
        """Whether nothing failed of a cell there, so that it may have a speed-up."""
        return not self.failures.keys() & {Place(place.cell), place}

    def is_left(self, step: Request[Any]) -> bool:
        """Whether a step is still to be taken."""
        return step not in self.steps and self.runs(Place.of(step))

    def see_memory(self, place: Place, memory: PeakMemory) -> None:
        """Take note of a cell's peak memory."""
        self.memory.setdefault((str(place.workload), str(place.runtime)), {})[place.cell] = memory

    @property
    def peak_reserved_bytes(self) -> int:
        """The largest of the memory pass, over all cells so far."""
        return self._most("peak_reserved_bytes")

    @property
    def optimizer_bytes(self) -> int:
        """The most that AdamW's moments take in a cell so far; 0 where none trains."""
        return self._most("optimizer_bytes")

    def _most(self, name: str) -> int:
        return max((getattr(each, name) or 0 for of in self.memory.values() for each in of.values()), default=0)

    def see_evidence(self, place: Place, evidence: Evidence) -> None:
        """Take note of what really ran in a cell."""
        self.evidence.setdefault((str(place.workload), str(place.runtime)), {})[place.cell] = evidence

    def see_ceilings(self, ceilings: Ceilings) -> None:
        """Take note of what the device reaches."""
        if ceilings.dtype in ("bfloat16", "float16"):
            self.flops_per_s = ceilings.matmul_flops_per_s

    def see_parameters(self, counts: ParameterCounts) -> None:
        """Take note of how large a cell is."""
        self.parameter_bytes = max(self.parameter_bytes, counts.parameter_bytes or 0)

    def _take_up_steps(self, record: Record) -> None:
        self.prompt = next(iter(record.of(PromptLine)), None)
        for line in record.of(FailureLine):
            self.failures[Place(line.cell, line.workload, line.runtime)] = line.status
        for counts in record.of(ParametersLine):
            self.steps.add(CountParameters(cell=counts.cell))
            self.see_parameters(counts)
        self.steps |= {Verify(cell=line.cell) for line in record.of(VerifyLine)}
        judged = record.of(GradientsLine)
        self.steps |= {VerifyGradients(cell=line.cell, workload=line.workload) for line in judged}
        for memory in record.of(MemoryLine):
            self.steps.add(MeasureMemory(cell=memory.cell, workload=memory.workload, runtime=memory.runtime))
            self.see_memory(Place(memory.cell, memory.workload, memory.runtime), memory)
        for seen in record.of(EvidenceLine):
            self.steps.add(CollectEvidence(cell=seen.cell, workload=seen.workload, runtime=seen.runtime))
            self.see_evidence(Place(seen.cell, seen.workload, seen.runtime), seen)
        self.steps |= {TimeEager(cell=line.cell, workload=line.workload) for line in record.of(EagerLine)}
        self.ceilings_known = bool(record.of(CeilingLine))
        for ceilings in record.of(CeilingLine):
            self.see_ceilings(ceilings)
        self.process = max((line.process for line in record.of(ProcessLine)), default=-1)

    def _take_up_blocks(self, record: Record) -> None:
        """What is closed and whole: a block of which the record lost a value is to be measured again."""
        lacking, closed = set(map(_attempt, record.lacking)), set()
        for line in record.of(BlockLine):
            timing = self.timings[line.workload, line.runtime]
            timing.measured_s += line.elapsed_s or 0.0
            if line.state == BlockState.REPEAT:
                continue
            timing.more_s += line.more_s or 0.0
            if _attempt(line) not in lacking:
                closed.add(_attempt(line))
                timing.numbers.add(line.block)
                timing.blocks = len(timing.numbers)
                timing.processes.add(line.process)
        for visit in record.of(VisitLine):
            self.timings[visit.workload, visit.runtime].see_pace(visit)
        samples = record.of(SampleLine)
        attempts: list[SampleLine | BlockLine] = [*samples, *record.of(BlockLine)]
        for begun in attempts:
            timing = self.timings[begun.workload, begun.runtime]
            if begun.block not in timing.numbers:  # begun and not closed: its next attempt is another one
                timing.attempts[begun.block] = max(timing.attempts[begun.block], begun.attempt + 1)
                timing.disturbed[begun.block] += isinstance(begun, BlockLine) and begun.state == BlockState.REPEAT
        for sample in samples:
            if _attempt(sample) in closed:
                self.timings[sample.workload, sample.runtime].samples.append(sample)
        for stop in record.stops:
            timing = self.timings[stop.workload, stop.runtime]
            timing.stopped = timing.blocks >= (stop.blocks or 0)


def _attempt(line: SampleLine | BlockLine) -> tuple[str, str, int, int, int]:
    """The attempt at a block that a line belongs to."""
    return line.workload, line.runtime, line.process, line.block, line.attempt
