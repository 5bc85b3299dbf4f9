"""A timed pass: cells of one workload in one runtime, made ready and then visited in turn."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from qwen3bench.model.decoder import Decoder
from qwen3bench.record.messages import Preparation, Timed, TimedVisit
from qwen3bench.worker.clock import TimedValue, inner_repeats, time_device, time_host, visit_repeats
from qwen3bench.worker.pauses import unpaused
from qwen3bench.worker.runtimes import InvalidCell, Launch
from qwen3bench.worker.session import Session
from qwen3bench.worker.workloads import keeping_output

FAST_S = 0.05  # what is launched once more rather than trusted at once


@dataclass(frozen=True)
class PreparedCell:
    """A cell that can be timed; its launches need the model to stay alive."""

    model: Decoder
    launches: Sequence[Launch]


@dataclass(frozen=True)
class Pace:
    """How much a visit takes in, the same for all cells that are compared."""

    inner: int  # launches inside one timed value
    repeats: int  # timed values, unless the settings say how many


class TimedPass:
    """The cells of one workload in one runtime that are ready to be timed."""

    def __init__(self, session: Session, workload: str, runtime: str, cell: str) -> None:
        """`cell` fills the cache where there is one."""
        self.session = session
        self.runtime = session.runtime(runtime)
        self.workload = session.inputs(workload, session.on_bank(cell))
        self.ready: dict[tuple[str, int], PreparedCell] = {}
        self.pace: Pace | None = None  # found at the first visit, as others may get ready before

    def prepare(self, cell: str, copy: int) -> Preparation:
        """Build a cell on the bank, warm it up, capture it. Raises `InvalidCell` where its logits are not finite."""
        model = self.session.on_bank(cell)
        outputs: list[torch.Tensor] = []
        on_device_clock = self.runtime.on_device_clock
        if not on_device_clock:
            for step in self.workload.steps(model):
                logits = step()
        prepared_model = self.runtime.prepare_model(model)
        steps = self.workload.steps(prepared_model.model)
        if on_device_clock:  # a graph's logits can be read after its replay
            steps = [keeping_output(step, outputs) for step in steps]
        prepared = [self.runtime.prepare(step) for step in steps]
        launches = [step.launch for step in prepared]
        if on_device_clock:
            for launch in launches:
                launch()
            logits = outputs.pop()
        if not bool(torch.isfinite(logits).all()):
            raise InvalidCell("its logits are not finite (NaN or infinity), so its latency would mean nothing")
        self.ready[cell, copy] = PreparedCell(prepared_model.model, launches)
        self.pace = None
        compile_s = [step.compile_s for step in prepared if step.compile_s is not None]
        return Preparation(
            compile_s=sum(compile_s) if compile_s else None, compile_options=prepared_model.compile_options
        )

    def visit(self, cell: str, copy: int, repeats: int | None) -> TimedVisit:
        """An untimed launch, then `repeats` timed values (None: as the slowest cell asks), in seconds.

        Where a pause of the process or the machine struck, it is made again once. Raises `InvalidCell` where something
        was compiled meanwhile.
        """
        launches = self.ready[cell, copy].launches
        compilations = self.runtime.compilations()
        cells = [prepared.launches for prepared in self.ready.values()]
        found = self.pace
        pace, paces_paused = unpaused(lambda: found or pace_of(cells, self.session.synchronize))
        self.pace = None if paces_paused else pace
        count, inner = repeats or pace.repeats, pace.inner
        (started, values), paused = unpaused(lambda: (time.time(), self._time(launches, count, inner)))
        if self.runtime.compilations() != compilations:
            raise InvalidCell("it was compiled again while it was timed, so its latency may hold a compilation")
        return TimedVisit(
            time=started, samples=tuple(_timed(value) for value in values), paused=paused or paces_paused or None
        )

    def _time(self, launches: Sequence[Launch], repeats: int, inner: int) -> list[TimedValue]:
        if self.runtime.on_device_clock:
            return time_device(launches, repeats, inner)
        return time_host(launches, repeats, inner, self.session.synchronize)


def pace_of(cells: Sequence[Sequence[Launch]], synchronize: Callable[[], object]) -> Pace:
    """The pace for these cells' launches: values of the fastest are long enough, and the slowest fills a visit."""
    estimates_s = [_estimate_s(launches, synchronize) for launches in cells]
    inner = inner_repeats(min(estimates_s)) if all(len(launches) == 1 for launches in cells) else 1
    return Pace(inner, visit_repeats(max(estimates_s) * inner))


def _estimate_s(launches: Sequence[Launch], synchronize: Callable[[], object]) -> float:
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


def _timed(value: TimedValue) -> Timed:
    if not value.steps_s:
        return Timed(latency_s=value.latency_s)
    first, *rest = value.steps_s
    return Timed(latency_s=value.latency_s, ttft_s=first, tpot_s=sum(rest) / len(rest), itl_s=tuple(rest))
