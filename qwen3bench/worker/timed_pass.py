"""A timed pass: cells of one workload in one runtime, made ready and then visited in turn."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from qwen3bench.model.decoder import Decoder
from qwen3bench.record.messages import Pace, Preparation, Prepare, Timed, TimedVisit, Visit
from qwen3bench.worker.clock import LONG_S, TimedValue, inner_repeats, time_device, time_host, visit_repeats
from qwen3bench.worker.disturbance import CoreTimes, Waits, Watch
from qwen3bench.worker.evidence import last_tokens
from qwen3bench.worker.pauses import unpaused
from qwen3bench.worker.runtimes import InvalidCell, Launch, require_finite
from qwen3bench.worker.session import Session
from qwen3bench.worker.workloads import keeping_output

FAST_S = 0.05  # what is launched once more rather than trusted at once


@dataclass(frozen=True)
class PreparedCell:
    """A cell that can be timed; its launches need the model to stay alive. `written`: see `PreparedStep`."""

    model: Decoder
    launches: Sequence[Launch]
    written: torch.Tensor | None = None


@dataclass(frozen=True)
class Take:
    """The timed values of one attempt at a visit, when it began, and what others took of our CPUs meanwhile."""

    time: float
    values: list[Timed]
    cores: CoreTimes


class TimedPass:
    """The cells of one workload in one runtime that are ready to be timed."""

    def __init__(self, session: Session, workload: str, runtime: str, cell: str) -> None:
        """`cell` fills the cache where there is one."""
        self.session = session
        self.runtime = session.runtime(runtime)
        self.workload = session.inputs(workload, session.on_bank(cell, workload))
        self.ready: dict[tuple[str, int], PreparedCell] = {}
        self.launch_s: dict[tuple[str, int], float] = {}  # about how long a cell takes, where getting ready tells
        self.pace: Pace | None = None  # found at the first visit of a run, as others may get ready before
        self.watch = None if self.runtime.on_device_clock else Watch()

    def prepare(self, asked: Prepare) -> Preparation:
        """Build a cell on the bank, warm it up, capture it. Raises `InvalidCell` where its logits are not finite.

        In eager on a CPU it is not launched once launches are known to be long: evidence has looked at its logits.
        """
        cell, copy = asked.cell, asked.copy
        model = self.session.on_bank(cell, self.workload.size.name)
        outputs: list[torch.Tensor] = []
        on_device_clock = self.runtime.on_device_clock
        if self.runtime.name == "eager" and (self._told or not asked.launch):
            self.ready[cell, copy] = PreparedCell(model, self.workload.steps(model))
            return Preparation()
        eager_s = 0.0
        for step in self.workload.steps(model) if not on_device_clock else ():
            started = time.perf_counter()
            logits = step()
            eager_s += time.perf_counter() - started
            require_finite(logits, self.workload.output)
        prepared_model = self.runtime.prepare_model(model)
        steps = self.workload.steps(prepared_model.model)
        if on_device_clock:  # a graph's logits can be read after its replay
            steps = [keeping_output(step, outputs) for step in steps]
        prepared = []
        for step in steps:
            prepared.append(self.runtime.prepare(step))
            if on_device_clock:  # to make it ready the graph was replayed
                require_finite(outputs[0], self.workload.output)
        outputs.clear()
        launches = [each.launch for each in prepared]
        self.ready[cell, copy] = PreparedCell(prepared_model.model, launches, prepared[-1].written)
        self.pace = None
        if self.session.device.type == "cpu" and not on_device_clock:  # it got ready alone
            told = self.runtime.name == "eager" and eager_s >= FAST_S
            # The first of all is launched again: cold, or beside other work, it takes far longer than the others.
            found_s = math.inf if told and self.launch_s else seconds_of(launches, self.session.synchronize)
            self.launch_s[cell, copy] = min(eager_s, found_s) if told else found_s
        compile_s = [step.compile_s for step in prepared if step.compile_s is not None]
        return Preparation(
            compile_s=sum(compile_s) if compile_s else None, compile_options=prepared_model.compile_options
        )

    def visit(self, asked: Visit) -> TimedVisit:
        """As many timed values as are asked for, behind an untimed launch; disturbed ones are taken again at once.

        Where launches on a CPU are long (`LONG_S`), none is untimed. Before, and not timed, what the workload's steps
        change is put back as it was.

        Where a pause of the process or the machine struck, it is made again once. Raises `InvalidCell` where something
        was compiled meanwhile, and where what the last launch returned or wrote is not finite.
        """
        ready = self.ready[asked.cell, asked.copy]
        compilations = self.runtime.compilations()
        if asked.repeats and asked.inner:  # as it was found before
            self.pace = Pace(inner=asked.inner, repeats=asked.repeats, untimed=asked.untimed is not False)
        found, paces_paused = unpaused(lambda: self.pace or self._pace())
        self.pace = None if paces_paused else found
        untimed = found.untimed if asked.untimed is None else asked.untimed
        pace = Pace(inner=asked.inner or found.inner, repeats=asked.repeats or found.repeats, untimed=untimed)
        takes: list[Take] = []
        left, paused = pace.repeats, False
        while not takes or (left and len(takes) < asked.takes):
            count = left
            take, struck = unpaused(lambda: self._take(ready, replace(pace, repeats=count)))  # noqa: B023
            takes.append(take)
            paused |= struck
            left -= sum(not value.disturbed for value in take.values)
        if self.runtime.compilations() != compilations:
            raise InvalidCell("it was compiled again while it was timed, so its latency may hold a compilation")
        return TimedVisit(
            time=takes[0].time,
            samples=tuple(value for take in takes for value in take.values),
            takes=len(takes),
            repeats=pace.repeats,
            inner=None if paces_paused else pace.inner,
            untimed=None if pace.untimed else False,
            others_s=_total(take.cores.others_s for take in takes),
            steal_s=_total(take.cores.steal_s for take in takes),
            clock_mhz=None if self.watch is None else self.watch.clock_mhz(),
            paused=paused or paces_paused or None,
        )

    def _pace(self) -> Pace:
        """The pace of the cells that are ready, whose launches it times where getting ready did not tell."""
        launch_s = [
            self.launch_s.get(cell) or seconds_of(each.launches, self.session.synchronize)
            for cell, each in self.ready.items()
            if cell in self.launch_s or not self._told
        ]
        pace = pace_of(launch_s, all(len(each.launches) == 1 for each in self.ready.values()))
        return replace(pace, untimed=self._trains or self.session.device.type != "cpu" or min(launch_s) < LONG_S)

    @property
    def _told(self) -> bool:
        """Whether the launches of one cell tell the pace of all: so long that none is untimed and nothing repeated."""
        return not self._trains and min(self.launch_s.values(), default=0.0) >= LONG_S

    @property
    def _trains(self) -> bool:
        return self.workload.size.precision is not None  # where the first step of a visit finds other moments

    def _take(self, ready: PreparedCell, pace: Pace) -> Take:
        self.workload.restore()
        launches, began = ready.launches, time.time()
        if self.watch is None:
            values = time_device(launches, pace.repeats, pace.inner)
            if ready.written is not None:  # before another graph writes there
                require_finite(ready.written, self.workload.output)
            return Take(began, [_timed(value) for value in values], CoreTimes())
        self.watch.find_threads()
        cores, started = self.watch.core_times(), time.perf_counter()
        found = []
        outputs: list[object] = []
        timed = time_host([*launches[:-1], keeping_output(launches[-1], outputs)], pace, self.session.synchronize)
        before, since_s = self.watch.waits(), time.perf_counter()
        for value in timed:
            now_s, after = time.perf_counter(), self.watch.waits()
            found.append(_timed(value, after.since(before), now_s - since_s))
            before, since_s = after, time.perf_counter()
        taken = self.watch.core_times().since(cores)
        if taken.disturb(time.perf_counter() - started, len(self.watch.cpus), self.session.cores_left):
            found = [replace(value, disturbed=True) for value in found]
        for output in outputs:
            if isinstance(output, torch.Tensor):  # a replay returns nothing
                require_finite(last_tokens(output), self.workload.output)
        return Take(began, found, taken)


def pace_of(launch_s: Sequence[float], single: bool) -> Pace:
    """The pace for cells whose launches take so long: values of the fastest are long enough, the slowest fills a visit.

    `single`: each is one launch, which can be repeated inside a value.
    """
    inner = inner_repeats(min(launch_s)) if single else 1
    return Pace(inner=inner, repeats=visit_repeats(max(launch_s) * inner))


def seconds_of(launches: Sequence[Launch], synchronize: Callable[[], object]) -> float:
    """About how long all launches take, in seconds."""
    estimate_s = math.inf
    for _ in range(2):
        synchronize()
        started = time.perf_counter()
        for launch in launches:
            launch()
        synchronize()
        estimate_s = min(estimate_s, time.perf_counter() - started)
        if estimate_s >= FAST_S:  # else once more, as the first launch of a graph also uploads it
            break
    return estimate_s


def _timed(value: TimedValue, waits: Waits | None = None, wall_s: float = 0.0) -> Timed:
    """A timed value as the record has it; `waits`: what its process waited for in `wall_s` seconds around it."""
    timed = Timed(latency_s=value.latency_s)
    if value.steps_s:
        first, *rest = value.steps_s
        timed = replace(timed, ttft_s=first, tpot_s=sum(rest) / len(rest), itl_s=tuple(rest))
    if waits is None:
        return timed
    disturbed = waits.disturb(wall_s) or None
    return replace(timed, waited_s=waits.waited_s, switches=waits.switches, disturbed=disturbed)


def _total(parts: Iterable[float | None]) -> float | None:
    known = [part for part in parts if part is not None]
    return sum(known) if known else None
