"""Disturbance: what other work takes from the cores while a value is timed. It only ever slows.

Linux counts in nanoseconds how long a thread was ready to run and waited for a core: the second field of
/proc/self/task/*/schedstat (Documentation/scheduler/sched-stats.rst). That is the time which other processes, or a
quota, took from a value. Elsewhere involuntary context switches stand for it (getrusage). Steal, the time of other
processes and the clock are read around a whole take, as /proc/stat counts in ticks of 10 ms.
"""

from __future__ import annotations

import contextlib
import os
import resource
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qwen3bench.record.host import usable_cpus

# Of a value. Services of an idle machine took 2 to 4 % of every third value of 0.2 s. These read 1 to 4 % more, while
# values scattered by 7 %; taking them again cost a third of a run's time.
SHARE = 0.05
OTHERS_SHARE = (
    0.25  # of all our cores' time: on a sibling thread or in a shared cache it slows a value, untouched itself
)
_SLICE_S = 1e-3  # for which a core is gone at least, once it is taken: schedulers hand out milliseconds
_TICKS = 3  # of /proc/stat; fewer are rounding
_CPUS = Path("/sys/devices/system/cpu")


@dataclass(frozen=True)
class Waits:
    """How long the threads of this process have waited for a core so far, and how often they lost one."""

    waited_s: float | None  # None: unknown
    switches: int

    def since(self, before: Waits) -> Waits:
        """What came in between."""
        known = self.waited_s is not None and before.waited_s is not None
        waited_s = max(0.0, self.waited_s - before.waited_s) if known else None  # type: ignore[operator]
        return Waits(waited_s, self.switches - before.switches)

    def disturb(self, wall_s: float) -> bool:
        """Whether they took too much of so many seconds."""
        waited_s = self.switches * _SLICE_S if self.waited_s is None else self.waited_s
        return waited_s > SHARE * wall_s


@dataclass(frozen=True)
class CoreTimes:
    """What other processes and the hypervisor have taken so far of the CPUs that this one may use; None: unknown."""

    others_s: float | None = None
    steal_s: float | None = None

    def since(self, before: CoreTimes) -> CoreTimes:
        """What came in between."""
        return CoreTimes(_gap(self.others_s, before.others_s), _gap(self.steal_s, before.steal_s))

    def disturb(self, wall_s: float, cpus: int, left: int = 0) -> bool:
        """Whether they took too much of so many seconds of so many CPUs, of which `left` are for others."""
        least_s = _TICKS / os.sysconf("SC_CLK_TCK")
        return (self.others_s or 0.0) > max(least_s, (OTHERS_SHARE * cpus + left) * wall_s) or (
            self.steal_s or 0.0
        ) > max(least_s, SHARE * wall_s)


class Watch:
    """Reads the counters of this process and of its CPUs, between timed values and never inside one."""

    def __init__(self, tasks: Path = Path("/proc/self/task"), stat: Path = Path("/proc/stat")) -> None:
        self.cpus = usable_cpus()
        self._tasks = tasks
        self._stat = stat
        self._threads: dict[str, int] = {}
        self._ticks = os.sysconf("SC_CLK_TCK")

    def find_threads(self) -> None:
        """Take in threads that were started since, and forget those that ended."""
        try:
            names = set(os.listdir(self._tasks))  # noqa: PTH208 (a third of the time that Path.iterdir takes)
        except OSError:
            return
        for name in self._threads.keys() - names:
            os.close(self._threads.pop(name))
        for name in names - self._threads.keys():
            with contextlib.suppress(OSError):
                self._threads[name] = os.open(self._tasks / name / "schedstat", os.O_RDONLY | os.O_CLOEXEC)

    def waits(self) -> Waits:
        """Of all threads that were found."""
        waited = list(self._waited_ns())
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return Waits(sum(waited) / 1e9 if waited else None, usage.ru_nivcsw)

    def core_times(self) -> CoreTimes:
        """Of the CPUs that this process may use."""
        try:
            lines = self._stat.read_text("ascii", "replace").splitlines()
        except OSError:
            return CoreTimes()
        names = {f"cpu{cpu}" for cpu in self.cpus}
        rows = [fields for line in lines if (fields := line.split()) and fields[0] in names]
        if len(rows) != len(names) or any(len(row) < 9 for row in rows):
            return CoreTimes()
        # proc(5): user nice system idle iowait irq softirq steal
        busy, steal = (sum(int(row[i]) for row in rows for i in which) for which in ((1, 2, 3, 6, 7), (8,)))
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return CoreTimes(busy / self._ticks - usage.ru_utime - usage.ru_stime, steal / self._ticks)

    def clock_mhz(self) -> int | None:
        """The CPUs' clock now, their mean; None where the system does not tell."""
        found = []
        for cpu in self.cpus:
            with contextlib.suppress(OSError, ValueError):
                found.append(int((_CPUS / f"cpu{cpu}" / "cpufreq" / "scaling_cur_freq").read_text("ascii")))
        return round(statistics.mean(found) / 1000) if found else None  # the file has kHz

    def _waited_ns(self) -> Iterator[int]:
        for name, file in list(self._threads.items()):
            try:
                yield int(os.pread(file, 80, 0).split()[1])
            except (OSError, IndexError, ValueError):  # the thread has ended
                os.close(self._threads.pop(name))


def _gap(now: float | None, before: float | None) -> float | None:
    return None if now is None or before is None else max(0.0, now - before)
