"""The pass that times: blocks in fresh processes, until `replication` says that every workload and runtime is known."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from qwen3bench.campaign.card_costs import REPORT_S
from qwen3bench.campaign.context import RunContext
from qwen3bench.campaign.forecast import what_it_takes
from qwen3bench.campaign.live_effects import LiveEffects
from qwen3bench.campaign.monitor import disturbances, flags
from qwen3bench.campaign.replication import Replication
from qwen3bench.campaign.room import too_many
from qwen3bench.campaign.scheduler import CardLostError, Steps
from qwen3bench.campaign.state import Place, Timing, Where
from qwen3bench.campaign.worker_pool import prepare
from qwen3bench.record.card import Card
from qwen3bench.record.design import BASELINE, block_order
from qwen3bench.record.lines import BlockLine, CompileLine, SampleLine, VisitLine
from qwen3bench.record.messages import (
    CellFailure,
    Enter,
    NoAnswerError,
    Prepare,
    Request,
    Surroundings,
    TimedVisit,
    Visit,
)
from qwen3bench.record.states import BlockState, CellStatus, Purpose, StopReason
from qwen3bench.record.typed import fields_of

PAUSED = "paused (its process was stopped, or the machine suspended)"  # of a block's flags
MAX_TAKES = 3  # of a visit: of a machine that is busy half of the time seven in eight are then undisturbed
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
        self._replication = {where: Replication(context.settings, where, each) for where, each in self._timings.items()}
        self._effects = LiveEffects(context.settings, context.state)
        self._told: set[Where] = set()  # of which the first effects are
        self._spent_s = 0.0  # measured in the present process: other cards measure the same meanwhile

    @property
    def processes_needed(self) -> list[Where]:
        """The workload and runtime of each process that comes next, in turn."""
        needed = {where: each.processes_needed for where, each in self._open.items()}
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
        for where, each in self._open.items():
            if reason := each.reason_to_stop() if self._context.cells(where) else StopReason.FAILED:
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
            if (failed := self._workers.gave_up.get(place)) is not None:
                self._context.state.unanswered.add((_PASS, Place(Place.of(failed).cell, *where)))
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
        self._workers.start_ahead(len(wheres) + 1)  # the one that comes then, too, while nothing is timed
        with self._progress.part(title, sum(map(len, shares)) - len(shares)) as stage:
            for request in prepare([self._workers], [shares]):
                if isinstance(request, Prepare):
                    stage.step(request.cell)
        self._workers.await_ahead()

    # Blocks

    def _blocks(self, where: Where, setup_s: float) -> Steps[bool]:
        """Up to `blocks_per_process` blocks in the present worker, ready after `setup_s`; False where a cell failed."""
        known, timing = self._replication[where], self._timings[where]
        timing.setup_s = setup_s
        more_s = setup_s if known.has_the_least else 0.0
        timing.more_s += more_s
        self._spent_s = 0.0
        if self._context.state.forecast is not None:  # which knows how long blocks take before there is one
            self._expect()
        for blocks in itertools.count(1):
            if not (yield from self._block(where, more_s if blocks == 1 else 0.0)):
                return False
            if timing.stopped:  # by what another card told
                break
            if reason := known.reason_to_stop():
                self._stop(where, reason)
                break
            if known.is_process_done(blocks, self._spent_s, setup_s):
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
                visits=len(visits),
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
        with self._progress.part(f"timing {workload} {runtime}, block {timing.blocks + 1}", len(order)) as stage:
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
                        raise NoAnswerError(CellStatus.CRASHED, text)
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

    # What is known

    @property
    def _open(self) -> dict[Where, Replication]:
        """What is still measured."""
        return {where: each for where, each in self._replication.items() if not each.timing.stopped}

    def _say_what_it_takes(self) -> None:
        """What an answer takes where the processes that a run takes at least did not give one."""
        mine_to_end = self._settings.measure.max_seconds is None  # else somebody asked for the time
        for where, each in self._open.items():
            if lack := each.shortfall():
                self._progress.note(what_it_takes(where, lack))
                if mine_to_end and lack.takes_s > lack.left_s and self._effects.decided(where):
                    self._stop(where, StopReason.OUT_OF_REACH)

    def _stop(self, where: Where, reason: StopReason) -> None:
        self._context.writer.append(self._replication[where].stop(reason))

    def _expect(self) -> None:
        """The run is expected to end when each workload and runtime is known well enough, and what follows is done."""
        forecast, setup_s = self._context.state.forecast, max(each.setup_s for each in self._timings.values())
        left_s = (
            each.left_s(setup_s) if forecast is None else forecast.left_s(*where, each.timing.so_far)
            for where, each in self._open.items()
        )
        after_s = REPORT_S if forecast is None else forecast.after_s()
        self._progress.expect(sum(left_s) / self._context.cards() + after_s)


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
