"""The clock: timed values of one cell, in seconds.

Rules and their sources. Warm up before timing and time steady state only (Georges et al., OOPSLA 2007; one untimed
launch opens each visit, unless launches are long). All cells of a process have as many values in a visit and launches
in a value: a median of three leaves out a late value that a single one holds. A value must be far above the clock's
resolution (Hoefler & Belli, SC 2015, rule 10: short work is repeated inside one value). Work on a CUDA device is
asynchronous: its own events time it (NVIDIA, CUDA C++ Best Practices Guide, 9.1.2), or the host clock around a
synchronize where the host's launches are part of what is measured.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from qwen3bench.record.messages import Pace

MIN_VALUE_S = 1e-3  # 1,000 × the resolution of a CUDA event (about 0.5 µs to 1 µs), 10,000 × the host clock's
VISIT_S = 20e-3  # what one visit's timed values fill, about: then blocks tell more than further values do
LONG_S = 0.1  # of a launch on a CPU: it has filled the caches within a few ms, so it needs none before it
AGREE = 1.2  # times: a forward on an idle CPU scatters by less, and beside other work by more
MOST_S = 5.0  # of values that do not agree; a model that is so slow gets one
MAX_REPEATS = 30  # more than these tell less than another block does


@dataclass(frozen=True)
class TimedValue:
    """One timed value: latency of all steps, and where there are several each step's own, in seconds."""

    latency_s: float
    steps_s: tuple[float, ...] = ()


def least_s(values: Iterable[TimedValue]) -> float:
    """The quickest of some values in seconds, as others only slow them; no more are timed than tell it.

    These are enough once the two quickest agree, or once they took `MOST_S`.
    """
    taken: list[float] = []
    for value in values:
        taken.append(value.latency_s)
        least = sorted(taken)[:2]
        if sum(taken) >= MOST_S or (len(least) == 2 and least[1] <= AGREE * least[0]):
            break
    return min(taken)


def inner_repeats(estimate_s: float) -> int:
    """How often work of `estimate_s` seconds is repeated inside one timed value."""
    return max(1, math.ceil(MIN_VALUE_S / max(estimate_s, 1e-9)))


def visit_repeats(value_s: float) -> int:
    """How many timed values of `value_s` seconds one visit takes; of slow work one, as more blocks tell more."""
    return max(1, min(MAX_REPEATS, int(VISIT_S / max(value_s, 1e-9))))


def time_host(
    launches: Sequence[Callable[[], object]],
    pace: Pace,
    synchronize: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[TimedValue]:
    """The timed values of one visit by a monotonic host clock around a synchronize, behind an untimed launch if asked.

    That launch is made at once and each value when it is asked for, so that the caller may look around in between. With
    several launches each is synchronized, as a program that reads each token does.
    """
    for launch in launches if pace.untimed else ():
        launch()

    def value() -> TimedValue:
        synchronize()
        marks = [clock()]
        if len(launches) == 1:
            for _ in range(pace.inner):
                launches[0]()
            synchronize()
            return TimedValue((clock() - marks[0]) / pace.inner)
        for launch in launches:
            launch()
            synchronize()
            marks.append(clock())
        return TimedValue(marks[-1] - marks[0], _differences(marks))

    return (value() for _ in range(pace.repeats))


def time_device(launches: Sequence[Callable[[], object]], repeats: int, inner: int = 1) -> list[TimedValue]:
    """`repeats` timed values by CUDA events in the stream, behind an untimed launch.

    Nothing waits for the host: the first event is recorded behind work that keeps the device busy while the host
    launches what is timed. On an idle device the first value would hold that launch, 10 to 50 µs of the host's.
    """
    for launch in launches:
        launch()
    marks: list[list[torch.cuda.Event]] = []
    for _ in range(repeats):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(launches) + 1)]
        events[0].record()
        for launch, event in zip(launches, events[1:], strict=True):
            for _ in range(inner if len(launches) == 1 else 1):
                launch()
            event.record()
        marks.append(events)
    torch.cuda.synchronize()
    if len(launches) == 1:
        return [TimedValue(start.elapsed_time(end) / 1e3 / inner) for start, end in marks]
    return [
        TimedValue(
            events[0].elapsed_time(events[-1]) / 1e3,
            tuple(a.elapsed_time(b) / 1e3 for a, b in pairwise(events)),
        )
        for events in marks
    ]


def _differences(marks: Sequence[float]) -> tuple[float, ...]:
    return tuple(b - a for a, b in pairwise(marks))
