"""The pass that times: blocks in fresh processes, until every workload and runtime is known well enough."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from qwen3bench.analysis.stopping import Limits, half_widths, stop_reason
from qwen3bench.campaign.card_costs import REPORT_S
from qwen3bench.campaign.context import RunContext
from qwen3bench.campaign.forecast import Shortfall, processes_for, what_it_takes
from qwen3bench.campaign.live_effects import LiveEffects
from qwen3bench.campaign.monitor import disturbances, flags
from qwen3bench.campaign.room import too_many
from qwen3bench.campaign.scheduler import CardLostError, Steps
from qwen3bench.campaign.state import Place, Timing, Where
from qwen3bench.campaign.worker_pool import prepare
from qwen3bench.record.card import Card
from qwen3bench.record.design import BASELINE, block_order
from qwen3bench.record.lines import BlockLine, CompileLine, SampleLine, StopLine, VisitLine
from qwen3bench.record.messages import CellFailure, Enter, Prepare, Request, Surroundings, TimedVisit, Visit
from qwen3bench.record.states import BlockState, CellStatus, Purpose, StopReason
from qwen3bench.record.typed import fields_of

MEASURED_PER_SETUP = 1.0  # of the time that a process takes to be ready, so much again is measured in it at least
PAUSED = "paused (its process was stopped, or the machine suspended)"  # of a block's flags
MAX_TAKES = 3  # of a visit: of a machine that is busy half of the time seven in eight are then undisturbed
QUICK_S = 0.5  # of judging whether enough is known: after each block where it takes no longer
_JUDGING_SHARE = 0.05  # of the time that may go to it, else: 10^6 samples take seconds
_PASS = "time"


class Blocks:
    """Times the cells of a run, block by block. `card` is looked at after each block."""

    def __init__(self, context: RunContext, card: Card) -> None:
        self._context = context
        self._card = card
        self._settings = context.settings
        self._workers = context.workers
        self._progress = context.progress
        self._timings = context.state.timings
        self._effects = LiveEffects(context.settings, context.state)
        self._told: set[Where] = set()  # of which the first effects are
        self._spent_s = 0.0  # measured in the present process: other cards measure the same meanwhile

    @property
    def processes_needed(self) -> list[Where]:
        """The workload and runtime of each process that comes next, in turn: the least that a run takes.

        Where these were not enough, as many more as the target takes, and at most as many again: what a few processes
        tell of the scatter between them is not to be relied on further.
        """
        needed = {
            where: max(1, self._min_processes(where) - len(timing.processes), self._more_processes(where))
            for where, timing in self._timings.items()
            if not timing.stopped
        }
        turns = range(max(needed.values(), default=0))
        return [where for turn in turns for where, count in needed.items() if turn < count]

    def run(self, at_once: int) -> None:
        """Blocks in fresh processes, of which up to `at_once` get ready side by side; one at a time is timed.

        Kalibera & Jones, ISMM 2013: replicate at the level where the variance lives; what differs from one process
        to the next (addresses, clocks, the choice of kernels) is part of the noise. Nothing else is timed in a
        process, as that changes what is timed after it: `flash` alone decoded 1 % slower after a prefill (H100).
        A failure beside others ends the getting ready side by side. `compile` gets ready alone: there the compiler
        times variants of its kernels to choose among them, and each process chooses for itself.
        """
        self._workers.purpose = Purpose.TIME
        self.stop_what_is_known()
        while left := self.processes_needed:
            self._say_what_it_takes()
            while left:
                together, left = _company(left, at_once)
                together = [where for where in together if not self._timings[where].stopped]
                if len(together) > 1 and not self._time_side_by_side(together):
                    at_once = 1
                    break
                if len(together) == 1:
                    self._workers.drive(self.alone(together[0]))
                self.stop_what_is_known()

    def stop_what_is_known(self) -> None:
        """Stop what is known well enough, or cannot be measured any more."""
        for where, timing in self._timings.items():
            if timing.stopped:
                continue
            if not self._context.cells(where):
                self._stop(where, StopReason.FAILED)
            elif reason := self._reason_to_stop(where):
                self._stop(where, reason)

    def alone(self, where: Where) -> Steps[None]:
        """The steps of one process, made ready and timed with none beside it on this card."""
        if self._timings[where].stopped or not self._context.cells(where):
            return
        started = time.monotonic()
        if (yield from self._prepare(where)):
            yield from self._blocks(where, time.monotonic() - started)
            self._workers.end()

    def standing_by(self, place: int, where: Where, setup_s: float) -> Steps[bool]:
        """The steps of a process that stands by in this place of `prepare`; False where something failed."""
        if self._timings[where].stopped:
            return True
        if not self._workers.take(place):
            return False
        if not (yield from self._blocks(where, setup_s)):
            return False
        self._workers.end()
        return True

    def _time_side_by_side(self, wheres: Sequence[Where]) -> bool:
        """Processes that get ready side by side and are timed one after another; False where something failed."""
        started = time.monotonic()
        self._prepare_side_by_side(wheres)
        setup_s = (time.monotonic() - started) / len(wheres)
        whole = True
        for place, where in enumerate(wheres):  # after a failure the others are gone, and each tells so
            whole &= self._workers.drive(self.standing_by(place, where, setup_s))
        self._workers.dismiss()
        return whole

    # Getting ready

    def preparations(self, where: Where) -> list[Request[Any]]:
        """What makes a process ready: it enters the workload and runtime, then prepares every cell."""
        enter, requests = self._preparations(where)
        return [enter, *requests]

    def _preparations(self, where: Where) -> tuple[Enter, list[Prepare]]:
        workload, runtime = where
        visits = [(cell, 0) for cell in self._context.cells(where)]
        if (BASELINE, 0) in visits:
            visits.append((BASELINE, 1))
        enter = Enter(workload=workload, runtime=runtime, cell=visits[0][0])
        pace = self._timings[where].pace
        # Where a launch is so long that none is untimed, the first warms the process up, and nothing is a cell's own.
        warm = pace is None or pace.untimed
        return enter, [
            Prepare(cell=cell, copy=copy, launch=warm or place == 0) for place, (cell, copy) in enumerate(visits)
        ]

    def _prepare(self, where: Where) -> Steps[bool]:
        """Make every cell ready in the present worker; False where a cell failed and the worker is gone."""
        enter, requests = self._preparations(where)
        process = self._workers.number
        compiled = []
        with self._progress.part(f"preparing {' '.join(where)} in process {process}", len(requests)) as stage:
            with self._context.failing(_PASS, Place(enter.cell, *where)) as outcome:
                yield enter
            if outcome.failed:
                return False
            self._workers.start_ahead(1)  # while nothing is timed
            for ready, request in enumerate(requests):
                stage.step(request.cell)
                with self._context.failing(_PASS, Place(request.cell, *where)) as outcome:
                    try:
                        answer = yield request
                    except CellFailure as failure:
                        if ready and failure.status == CellStatus.OOM:
                            yield from self._alone_or_refused(where, request, ready)
                        raise
                    if answer.compile_s is not None:
                        compiled.append(
                            CompileLine(
                                cell=request.cell,
                                workload=where[0],
                                runtime=where[1],
                                process=process,
                                seconds=answer.compile_s,
                                options=answer.compile_options,
                            )
                        )
                if outcome.failed:
                    return False
        if compiled:
            self._context.writer.append(*compiled)
        self._workers.await_ahead()
        return True

    def _alone_or_refused(self, where: Where, request: Prepare, ready: int) -> Steps[None]:
        """A cell for which memory did not suffice beside so many that are ready, made ready alone in a fresh worker.

        Raises `CellFailure` where it fails there too; else `UserError`, as the cells do not fit together.
        """
        self._workers.end()
        yield Enter(workload=where[0], runtime=where[1], cell=request.cell)
        yield request
        cells = len(self._preparations(where)[1])
        why = f"do not fit this card's memory at once: it was full after {ready}"
        raise too_many(self._settings, where, cells, ready, why)

    def _prepare_side_by_side(self, wheres: Sequence[Where]) -> None:
        """Make every cell ready in a process of its own for each of `wheres`; one that fails is ended, unblamed."""
        shares = [*map(self.preparations, wheres)]
        names = ", ".join(dict.fromkeys(" ".join(where) for where in wheres))
        title = f"preparing {names} in {len(wheres)} processes at a time"
        with self._progress.part(title, sum(map(len, shares)) - len(shares)) as stage:
            for request in prepare([self._workers], [shares]):
                if isinstance(request, Prepare):
                    stage.step(request.cell)
        self._workers.start_ahead(1)
        self._workers.await_ahead()

    # Blocks

    def _blocks(self, where: Where, setup_s: float) -> Steps[bool]:
        """Up to `blocks_per_process` blocks in the present worker, ready after `setup_s`; False where a cell failed."""
        measure, timing = self._settings.measure, self._timings[where]
        timing.setup_s = setup_s
        more_s = setup_s if self._has_the_minimum(where) else 0.0
        timing.more_s += more_s
        self._spent_s = 0.0
        if self._context.state.forecast is not None:  # which knows how long blocks take before there is one
            self._expect()
        for blocks in itertools.count(1):
            if not (yield from self._block(where, more_s if blocks == 1 else 0.0)):
                return False
            if timing.stopped:  # by what another card told
                break
            if reason := self._reason_to_stop(where):
                self._stop(where, reason)
                break
            # A share of the time and of the blocks for each process, or there might never be a second one.
            share_s = self._settings.time_allowed_s / self._min_processes(where)
            # Kalibera & Jones, sec. 6: the dearer a process is to set up, the more is measured in each.
            enough = self._spent_s >= min(share_s, MEASURED_PER_SETUP * setup_s)
            if enough and blocks >= self._settings.blocks_per_process:
                break
            if blocks >= measure.max_blocks / self._min_processes(where):
                break
            if measure.max_seconds and self._spent_s >= share_s:
                break
        return True

    def _block(self, where: Where, more_s: float) -> Steps[bool]:
        """One block, measured again where it was disturbed; False where a cell failed in it.

        `more_s`: what it took to get its process ready, where a run takes fewer and this is its first block.
        Raises `CardLostError` where somebody else uses the card, and there is another.
        """
        timing = self._timings[where]
        number = timing.begin_block()
        try:
            while True:
                state = yield from self._attempt(where, number, more_s)
                if state is None:
                    timing.leave_block(number)
                    return False
                if state != BlockState.REPEAT:
                    break
        except CardLostError:
            timing.leave_block(number)
            raise
        self._expect()
        line = "" if where in self._told else self._effects.line(where)
        self._told |= {where} if line else set()
        self._progress.first_answer(line)
        self._progress.table(self._effects.lines)
        return True

    def _attempt(self, where: Where, number: int, more_s: float) -> Steps[BlockState | None]:
        """One attempt at a block and what became of it; None where a cell failed."""
        timing = self._timings[where]
        attempt = timing.attempts[number]
        timing.attempts[number] += 1
        started = time.monotonic()
        visits = yield from self._visits(where, number, attempt)
        if visits is None:
            return None
        elapsed_s = time.monotonic() - started
        timing.measured_s += elapsed_s
        self._spent_s += elapsed_s
        telemetry = self._card.sample(self._workers.pids)
        paused = [PAUSED] * any(visit.paused for visit, _ in visits)
        state = self._state_of(timing, number, [*disturbances(telemetry), *paused])
        self._context.writer.append(
            BlockLine(
                workload=where[0],
                runtime=where[1],
                process=self._workers.process,
                block=number,
                attempt=attempt,
                state=state,
                flags=(*flags(telemetry), *paused),
                time=time.time(),
                elapsed_s=elapsed_s,
                more_s=more_s,
                **fields_of(telemetry),
            )
        )
        if state != BlockState.REPEAT:
            timing.samples += [sample for _, samples in visits for sample in samples]
            timing.blocks += 1
            timing.processes.add(self._workers.process)
        elif telemetry.foreign_processes and self._context.cards() > 1:
            raise CardLostError(f"process {telemetry.foreign_processes[0]} uses it too")
        return state

    def _state_of(self, timing: Timing, number: int, disturbed: Sequence[str]) -> BlockState:
        """Whether an attempt at a block counts: a disturbed one is measured again, `max_attempts` times in all."""
        if not disturbed:
            return BlockState.OK
        timing.disturbed[number] += 1
        again = timing.disturbed[number] < self._settings.measure.max_attempts
        state = BlockState.REPEAT if again else BlockState.FLAGGED
        self._progress.note(f"block {number}, attempt {timing.attempts[number]}: {state} ({', '.join(disturbed)})")
        return state

    def _visits(self, where: Where, block: int, attempt: int) -> Steps[list[tuple[VisitLine, list[SampleLine]]] | None]:
        """All visits of one block, in its random order, with their samples; None where a cell failed."""
        workload, runtime = where
        order = block_order(self._context.cells(where), self._settings.seed, workload, runtime, block, attempt)
        taken: list[tuple[VisitLine, list[SampleLine]]] = []
        timing, spare = self._timings[where], len(order)  # takes: a block lasts at most twice as long for them
        with self._progress.part(self._block_title(where), len(order)) as stage:
            for position, (cell, copy) in enumerate(order):
                stage.step(cell)
                with self._context.failing(_PASS, Place(cell, *where)) as outcome:
                    repeats = timing.pace.repeats if timing.pace else self._settings.measure.repeats
                    inner = timing.pace.inner if timing.pace else None
                    takes = min(MAX_TAKES, 1 + spare)
                    untimed = timing.pace.untimed if timing.pace else None
                    asked = Visit(cell=cell, copy=copy, repeats=repeats, inner=inner, untimed=untimed, takes=takes)
                    answer = yield asked
                    if len(answer.samples) < (repeats or 1):
                        text = f"the worker answered {len(answer.samples)} values, not {repeats}"
                        raise CellFailure(CellStatus.CRASHED, text)
                    visit = VisitLine(
                        workload=workload,
                        runtime=runtime,
                        cell=cell,
                        copy=copy,
                        process=self._workers.process,
                        block=block,
                        attempt=attempt,
                        position=position,
                        samples=len(answer.samples),
                        **{field.name: getattr(answer, field.name) for field in fields(Surroundings)},
                    )
                    spare -= (answer.takes or 1) - 1
                    timing.see_pace(answer)
                    samples = _samples(visit, answer)
                    self._context.writer.append(*samples, visit)
                    taken.append((visit, samples))
                if outcome.failed:
                    return None
        return taken

    # Stopping

    def _min_processes(self, where: Where) -> int:
        return self._settings.min_processes(where[1])

    def _has_the_minimum(self, where: Where) -> bool:
        """Whether as many processes and blocks are measured as a run takes at least."""
        timing, measure = self._timings[where], self._settings.measure
        return len(timing.processes) >= self._min_processes(where) and timing.blocks >= measure.min_blocks

    def _more_processes(self, where: Where) -> int:
        """How many more processes the least blocks or the target take, at most as many again as there were."""
        timing, lacking = self._timings[where], self._settings.measure.min_blocks - self._timings[where].blocks
        processes = len(timing.processes)
        if timing.blocks and lacking > 0:
            return min(processes, math.ceil(lacking * processes / timing.blocks))
        if not self._has_the_minimum(where):
            return 0
        return min(processes, processes_for(self._widest(where)[1], processes))

    def _widest(self, where: Where) -> tuple[str, float]:
        """The effect that is known least, and its half-width over the target."""
        name, width = max(self._widths(where).items(), key=lambda item: item[1], default=("", math.inf))
        return name, width / self._settings.target(where[1])

    def _say_what_it_takes(self) -> None:
        """What an answer takes where the processes that a run takes at least did not give one."""
        for where, timing in self._timings.items():
            if timing.stopped or not self._has_the_minimum(where):
                continue
            name, over = self._widest(where)
            lack = Shortfall(
                term=name,
                over=over,
                target=self._settings.target(where[1]),
                more=processes_for(over, len(timing.processes)),
                measured_s=timing.measured_s / len(timing.processes),
                setup_s=timing.setup_s,
                spent_s=timing.measured_s,
                left_s=self._settings.time_allowed_s - timing.measured_s,
            )
            self._progress.note(what_it_takes(where, lack))
            mine_to_end = self._settings.measure.max_seconds is None  # else somebody asked for the time
            if mine_to_end and lack.takes_s > lack.left_s and self._effects.decided(where):
                self._stop(where, StopReason.OUT_OF_REACH)

    def _reason_to_stop(self, where: Where) -> StopReason | None:
        timing, measure = self._timings[where], self._settings.measure
        if not timing.blocks:
            return None
        limits = Limits(
            target=self._settings.target(where[1]),
            max_seconds=self._settings.limit_s(where[1], timing.blocks, len(timing.processes)),
            min_blocks=measure.min_blocks,
            min_processes=self._min_processes(where),
            max_blocks=measure.max_blocks,
        )
        return stop_reason(self._widths(where), timing.blocks, len(timing.processes), timing.measured_s, limits)

    def _widths(self, where: Where) -> dict[str, float]:
        """The half-width of each effect; of a run so large that this takes long, as it was a while ago."""
        timing, started = self._timings[where], time.monotonic()
        if started >= timing.judged_until:
            timing.widths = half_widths(timing.samples, self._settings.factors)
            took_s = time.monotonic() - started
            if took_s > QUICK_S:
                timing.judged_until = started + took_s / _JUDGING_SHARE
        return timing.widths

    def _stop(self, where: Where, reason: StopReason) -> None:
        timing = self._timings[where]
        timing.stopped = True
        self._context.writer.append(
            StopLine(
                workload=where[0],
                runtime=where[1],
                reason=reason,
                half_width=self._half_widths(timing),
                blocks=timing.blocks,
                processes=len(timing.processes),
                measured_s=timing.measured_s,
                more_s=timing.more_s,
            )
        )

    def _half_widths(self, timing: Timing) -> dict[str, float | None]:
        """As the stopping rule sees them; what is not known yet is None, as JSON has no infinity."""
        if not timing.samples:
            return {}
        widths = half_widths(timing.samples, self._settings.factors)
        return {name: width if math.isfinite(width) else None for name, width in widths.items()}

    def _block_title(self, where: Where) -> str:
        return f"timing {' '.join(where)}, block {self._timings[where].blocks + 1}"

    def _expect(self) -> None:
        """The run is expected to end when each workload and runtime is known well enough, and what follows is done."""
        forecast = self._context.state.forecast
        after_s = REPORT_S if forecast is None else forecast.after_s()
        self._progress.expect(sum(map(self._left_s, self._timings)) / self._context.cards() + after_s)

    def _left_s(self, where: Where) -> float:
        """About how long a workload and runtime still takes: halfway between the least and the most."""
        timing, measure = self._timings[where], self._settings.measure
        if timing.stopped:
            return 0.0
        if (forecast := self._context.state.forecast) is not None:
            return forecast.left_s(*where, timing.so_far)
        setup_s = timing.setup_s or max(each.setup_s for each in self._timings.values())
        a_block_s = timing.measured_s / timing.blocks if timing.blocks else 0.0
        most = self._settings.limit_s(where[1], measure.min_blocks, self._min_processes(where))
        most -= timing.measured_s
        least = max(0, measure.min_blocks - timing.blocks) * a_block_s
        if measure.max_seconds:
            least = min(least, most)
        processes = max(0, self._min_processes(where) - len(timing.processes))
        return processes * setup_s + max(0.0, least + max(least, most)) / 2


def _company(left: list[Where], at_once: int) -> tuple[list[Where], list[Where]]:
    """Which of `left` get ready together next, at most `at_once`, and the rest in turn."""
    together = [where for where in left if where[1] != "compile"][:at_once] or left[:1]
    rest = left.copy()
    for where in together:
        rest.remove(where)
    return together, rest


def _samples(visit: VisitLine, answer: TimedVisit) -> list[SampleLine]:
    """The samples of a visit, as the record has them."""
    of_visit = {"samples", *(field.name for field in fields(Surroundings))}
    where = {name: value for name, value in fields_of(visit).items() if name not in of_visit}
    return [
        SampleLine(**fields_of(value), **where, repeat=repeat, time=answer.time)
        for repeat, value in enumerate(answer.samples)
    ]
