"""Pauses: a process that was stopped (SIGSTOP), a machine that was suspended. A timed value that holds one is none.

The kernel wakes a stopped process with SIGCONT, which can be counted and costs nothing until then. What a suspended
machine sleeps is the gap between Linux's CLOCK_BOOTTIME and CLOCK_MONOTONIC. A frozen control group shows in neither.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
_SUSPENDED_S = 0.1  # two clocks that are read one after the other differ by less
_stops = 0


def watch_pauses() -> None:
    """Count from now on how often this process is continued; of its main thread."""
    signal.signal(signal.SIGCONT, _count)
    signal.siginterrupt(signal.SIGCONT, False)  # what a driver waits for goes on as without


def unpaused(action: Callable[[], T]) -> tuple[T, bool]:
    """What `action` gives, taken again once where a pause struck; and whether one struck the second time too."""
    for _ in range(2):
        stops, suspended_s = _stops, _slept_s()
        result = action()
        paused = _stops != stops or _slept_s() - suspended_s > _SUSPENDED_S
        if not paused:
            break
    return result, paused


def _count(number: int, frame: object) -> None:
    global _stops
    _stops += 1


def _slept_s() -> float:
    """How long the machine has been suspended since it started, in seconds; 0 where no clock tells."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return 0.0 if clock is None else time.clock_gettime(clock) - time.clock_gettime(time.CLOCK_MONOTONIC)
