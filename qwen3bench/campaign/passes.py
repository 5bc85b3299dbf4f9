"""The passes of a run over its cells: design → check → verify → memory and evidence → time.

Each step goes to the record as it ends, so a run that stops anywhere continues where it was. A worker that fails is
replaced; its cell is recorded with a status and a reason, and the others go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from qwen3bench.analysis.effective import PARTLY_SEEN, by_switch, idle_switches
from qwen3bench.campaign.blocks import Blocks
from qwen3bench.campaign.capacity import Capacity
from qwen3bench.campaign.card_costs import CardForecast, CardPace
from qwen3bench.campaign.confirmation import Confirmation
from qwen3bench.campaign.context import Outcome, RunContext
from qwen3bench.campaign.forecast import announcement, seconds_ahead
from qwen3bench.campaign.lanes import Lane, Lanes
from qwen3bench.campaign.looks import compared, looks, shared_out
from qwen3bench.campaign.neighbors import Neighbors, busy_line, card_line
from qwen3bench.campaign.progress import Stage
from qwen3bench.campaign.scheduler import Steps
from qwen3bench.campaign.state import Place
from qwen3bench.record.design import label
from qwen3bench.record.lines import (
    CeilingLine,
    CostLine,
    EagerLine,
    EvidenceLine,
    GradientsLine,
    Line,
    MemoryLine,
    ParametersLine,
    PassLine,
    VerifyLine,
)
from qwen3bench.record.messages import (
    CellFailure,
    CollectEvidence,
    ComputeCost,
    CountParameters,
    Evidence,
    Judgment,
    Load,
    MeasureCeilings,
    MeasureMemory,
    ParameterCounts,
    PeakMemory,
    Request,
    TimeEager,
    Verify,
    VerifyGradients,
)
from qwen3bench.record.states import CellStatus, Purpose
from qwen3bench.record.typed import fields_of
from qwen3bench.reporting.wording.sentences import idle_words

# The line that records the answer to a step of a single cell.
_LINES: dict[type[Request[Any]], Callable[..., Line]] = {
    CountParameters: ParametersLine,
    Verify: VerifyLine,
    VerifyGradients: GradientsLine,
    MeasureMemory: MemoryLine,
    CollectEvidence: EvidenceLine,
    TimeEager: EagerLine,
}


class Campaign:
    """One run's passes over its cards. `card_bytes`: the memory of one, where it is known; `pace`: as far as known.

    `neighbors`: who else works here, where that is still to be said.
    """

    def __init__(
        self,
        lanes: Lanes,
        card_bytes: int | None = None,
        pace: CardPace | None = None,
        neighbors: Neighbors | None = None,
    ) -> None:
        self._lanes = lanes
        context = lanes.first.context
        self._settings = context.settings
        self._progress = context.progress
        self._state = context.state
        self._capacity = Capacity(context, card_bytes)
        self._pace = pace or CardPace()
        self._neighbors = neighbors

    @property
    def blocks(self) -> Blocks:
        """Which processes are needed."""
        return self._lanes.first.blocks

    @property
    def _context(self) -> RunContext:
        """That of the first card."""
        return self._lanes.first.context

    def check(self) -> None:
        """Build every cell once: what the user can mend is refused before anything is measured.

        Then it says what the run will measure, and about how long that takes. Raises as `run` does; its processes end
        with the pool that they are in.
        """
        started = time.monotonic()
        self._lanes.start_ahead(len(self._shares()))  # that verify, while nothing is measured
        left = [cell for cell in self._settings.labels if self._state.is_left(CountParameters(cell=cell))]
        with self._progress.stage("loading the weights, building every cell", len(left)) as stage:
            self._lanes.on_first(left, partial(_loaded, stage))
        ahead_s = self._seconds_ahead(time.monotonic() - started)
        here = self._settings.cluster is None
        gpus = [*self._lanes] if self._capacity.on_gpus else []
        timed_by_host = not self._capacity.on_gpus or "eager" in self._settings.runtimes
        for line in (
            busy_line(self._neighbors.shares(), timed_by_host) if self._neighbors else None,
            *(card_line(lane.monitor.sample(lane.workers.pids), here=here) for lane in gpus),
        ):
            if line:
                self._progress.note(line)
        self._progress.measure(announcement(self._settings, ahead_s), ahead_s)

    def run(self) -> None:
        """All passes that are not done yet, after `check`. Every process has ended when it returns or raises.

        Raises `UserError` where no worker can be started, where one refuses what the user asked for, and where the
        record cannot be written.
        """
        with ExitStack() as ends:
            for lane in self._lanes:
                ends.enter_context(lane.workers)
            self._passes()
            if self._settings.design == "screen" and self._settings.factors:
                Confirmation(self._context, self._measure).run()

    def _seconds_ahead(self, build_s: float) -> float:
        """About how long the run takes from here, once building every cell has taken `build_s`."""
        settings, state = self._settings, self._state
        if not self._capacity.on_gpus:
            return seconds_ahead(settings, build_s, state.prompt)
        pace = replace(self._pace, flops_per_s=state.flops_per_s or self._pace.flops_per_s)
        trains = any(sizes.precision is not None for sizes in settings.workloads.values())
        # What a step holds may fill the card.
        at_once = 1 if trains else self._capacity.ready_by_cores // len(self._lanes)
        state.forecast = CardForecast(settings, pace, at_once, len(self._lanes))
        return self._looking_s() + self._timing_s()

    def _looking_s(self) -> float:
        """About how long the looks at cells take that are left, as they are shared out."""
        assert self._state.forecast is not None
        shares = self._shares()
        shares = shares if len(shares) > 1 else []
        beside = {step for share in shares for step in share}
        every = [*(Verify(cell=cell) for cell in self._settings.labels), *self._gradients(), *self._looks()]
        then = [step for step in every if step not in beside and self._state.is_left(step)]
        return self._state.forecast.looking_s(shares, then)

    def _timing_s(self) -> float:
        """About how long it takes from the first process that times."""
        assert self._state.forecast is not None
        known = {where: timing.so_far for where, timing in self._state.timings.items() if not timing.stopped}
        return self._state.forecast.timing_s(known)

    @contextmanager
    def _corrected(self) -> Iterator[None]:
        """The looks at cells: what they took in place of what was said corrects the forecast of what comes."""
        forecast = self._state.forecast
        said_s, started = (0.0 if forecast is None else self._looking_s()), time.monotonic()
        yield
        if forecast is not None:
            pace = forecast.pace.after(time.monotonic() - started, said_s)
            self._state.forecast = replace(forecast, pace=pace, at_once=self._capacity.ready)
            self._progress.expect(self._timing_s())

    def _passes(self) -> None:
        for lane in self._lanes:
            lane.workers.purpose = Purpose.CHECK
        timing = min(self._capacity.ready_by_cores, len(self.blocks.processes_needed))
        self._lanes.start_ahead(len(self._shares()) - 1 + timing)  # and the first that time
        with self._pass("parameters"):
            self._take("counting parameters", (CountParameters(cell=cell) for cell in self._settings.labels))
        with self._pass("verify, memory, evidence"), self._corrected():
            self._look_side_by_side(self._shares())
            self._take(
                "verifying that every cell computes the baseline's function",
                (Verify(cell=cell) for cell in self._settings.labels),
            )
            self._take("verifying that every cell trains as the baseline does", self._gradients())
            self._look_at_each_cell()
            self._capacity.refuse_what_does_not_fit()
            self._tell_idle_switches()
        with self._pass("ceilings"):
            self._ceilings()
            self._time_eager()
            for lane in self._lanes:
                lane.workers.end()
            if self._state.forecast is not None and self._state.flops_per_s:
                pace = replace(self._state.forecast.pace, flops_per_s=self._state.flops_per_s)
                self._state.forecast = replace(self._state.forecast, pace=pace)
                self._progress.expect(self._timing_s())
        with self._pass("time"), self._progress.stage("timing", len(self.blocks.processes_needed)):
            self._lanes.time(self._capacity.ready)

    @contextmanager
    def _pass(self, name: str) -> Iterator[None]:
        """A pass, how long it took goes to the record."""
        started = time.monotonic()
        yield
        self._context.writer.append(PassLine(name=name, time=time.time(), seconds=time.monotonic() - started))

    def _measure(self, context: RunContext) -> None:
        """All passes over the cells of a context, such as those that confirm a screen, with the workers of this one."""
        Campaign(self._lanes.over(context), self._capacity.card_bytes)._passes()

    # One step for each cell

    def _shares(self) -> list[list[Request[Any]]]:
        """What is to be told of each cell, the cells shared out among as many processes as can work side by side.

        On a GPU alone, where most of the time goes to compiling kernels on the CPU; cells with the same ones together.
        Where a card may not hold so many cells at once, they are verified side by side, and looked at alone.
        """
        most = self._capacity.looking
        # Evidence of training holds times, which would be of the others' making.
        beside = [step for step in self._looks() if not self._trains(step)] if self._capacity.cells >= most else []
        steps = [*(Verify(cell=cell) for cell in self._settings.labels), *self._gradients(), *beside]
        return shared_out(filter(self._state.is_left, steps), self._settings.factors, most)

    def _gradients(self) -> list[VerifyGradients]:
        """What the gradient gate judges, where a workload trains."""
        trained = [name for name, sizes in self._settings.workloads.items() if sizes.precision is not None]
        return [VerifyGradients(cell=cell, workload=name) for name in trained for cell in self._settings.labels]

    def _trains(self, step: Request[Any]) -> bool:
        workload = Place.of(step).workload
        return workload is not None and self._settings.workloads[workload].precision is not None

    def _look_side_by_side(self, shares: list[list[Request[Any]]]) -> None:
        """The gate, memory and evidence of the cells, in several processes; what fails there is asked again alone."""
        if len(shares) < 2:
            return
        title = f"verifying every cell, measuring memory, recording what really runs, {len(shares)} at a time"
        with self._progress.stage(title, sum(map(len, shares))) as stage:
            for step, answer in self._lanes.side_by_side(shares):
                stage.step(str(Place.of(step)))
                if answer is None:
                    self._state.unanswered.add((step.op, Place.of(step)))
                elif not _told_by(answer):  # what tells of a failure may be of the others' making, too
                    self._record(step, answer)

    def _looks(self) -> list[Request[Any]]:
        """Peak memory and evidence of each cell."""
        chosen = self._context.chosen is not None  # other cells of a run that has told what its switches change
        return looks(self._settings, self._state.timings, [] if chosen else compared(self._settings))

    def _look_at_each_cell(self) -> None:
        title = (
            "measuring peak memory, recording what really runs"
            if self._capacity.on_gpus
            else "recording what really runs"
        )
        self._take(title, self._looks())

    def _time_eager(self) -> None:
        """How long eager takes beside a graph, with nothing else on the device: of the first cell and the last."""
        graphs = [workload for workload, runtime in self._state.timings if runtime == "graph"]
        if "eager" in self._settings.runtimes:  # which tells it better
            return
        ends = dict.fromkeys(label(cell) for cell in (self._settings.cells[0], self._settings.cells[-1]))
        steps = [TimeEager(cell=cell, workload=workload) for workload in graphs for cell in ends]
        left = [step for step in steps if self._state.is_left(step)]
        with self._progress.stage("timing a few passes in eager", len(left)):
            self._lanes.on_first(left, self._timed_in_eager)

    def _timed_in_eager(self, lane: Lane, step: TimeEager) -> Steps[None]:
        with lane.context.spared(f"how long {step.cell} takes in eager"):
            self._record(step, (yield step))

    def _tell_idle_switches(self) -> None:
        """Say which switches change nothing that runs, before time is spent on them."""
        if self._context.chosen is not None:  # other cells of a run that has told it
            return
        idle = {
            f"{workload} {runtime}": idle_switches(seen)
            for (workload, runtime), seen in self._state.evidence.items()
            if workload not in PARTLY_SEEN
        }
        for (name, pairs), conditions in by_switch(idle).items():
            self._progress.note(idle_words(name, ", ".join(conditions), pairs))

    def _take(self, title: str, steps: Iterable[Request[Any]]) -> None:
        """Take those of the steps that are left, those of one place on one card."""
        places: dict[Place, list[Request[Any]]] = {}
        for step in steps:
            if self._state.is_left(step):
                places.setdefault(Place.of(step), []).append(step)
        with self._progress.stage(title, sum(map(len, places.values()))) as stage:
            self._lanes.share_out(places.values(), partial(self._taken, stage))

    def _taken(self, stage: Stage, lane: Lane, steps: Sequence[Request[Any]]) -> Steps[None]:
        for step in steps:
            stage.step(str(Place.of(step)))
            outcome = Outcome(again=self._state.is_left(step))  # still, after the step before
            while outcome.again:
                with lane.context.failing(step.op, Place.of(step)) as outcome:
                    self._record(step, (yield step))

    def _record(self, step: Request[Any], answer: Any) -> None:
        """Record an answer, and the failure that it may tell of."""
        line = _LINES[type(step)](**fields_of(step), **fields_of(answer))
        if failure := _told_by(answer):
            self._context.fail(step.op, Place.of(step), failure, line)
        else:
            self._context.writer.append(line)
        self._state.steps.add(step)
        if isinstance(answer, PeakMemory):
            self._state.see_memory(Place.of(step), answer)
        if isinstance(answer, Evidence):
            self._state.see_evidence(Place.of(step), answer)
        if isinstance(answer, ParameterCounts):
            self._state.see_parameters(answer)

    def _ceilings(self) -> None:
        """What the device can reach, and the least that each cell asks of it."""
        if self._state.ceilings_known:
            return
        asked = [
            ComputeCost(cell=cell, workload=workload)
            for workload in self._settings.workloads
            for cell in self._settings.labels
            if self._state.runs(Place(cell))
        ]
        with self._progress.stage("measuring what the device can reach", 1):
            self._lanes.on_first([asked], _reached)


def _loaded(stage: Stage, lane: Lane, cell: str) -> Steps[None]:
    """Build a cell once."""
    stage.step(cell)
    outcome = Outcome(again=True)
    while outcome.again:
        with lane.context.failing(Load.op, Place(cell)) as outcome:
            yield Load(cells=(cell,))


def _reached(lane: Lane, asked: Sequence[ComputeCost]) -> Steps[None]:
    """What the cells cost, and what the device reaches."""
    with lane.context.spared("what the device can reach"):
        costs = []
        for step in asked:
            costs.append(CostLine(**fields_of(step), **fields_of((yield step))))
        ceilings = yield MeasureCeilings()
        lane.context.state.see_ceilings(ceilings)
        lane.context.writer.append(CeilingLine(**fields_of(ceilings)), *costs)


def _told_by(answer: object) -> CellFailure | None:
    """The failure that a worker's answer tells of, though it is one."""
    if isinstance(answer, Judgment) and not answer.equivalent:
        status = CellStatus.NOT_EQUIVALENT if answer.ran else CellStatus.CRASHED
        return CellFailure(status, answer.reason or "no reason given")
    if isinstance(answer, Evidence) and answer.recompiles:
        reason = f"compiled {answer.recompiles} more graphs after its warm-up, so a latency may hold a compilation"
        return CellFailure(CellStatus.INVALID, reason)
    return None
