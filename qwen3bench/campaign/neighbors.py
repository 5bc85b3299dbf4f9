"""What other processes do on this machine while a run sets up, so that it can say so before it measures."""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import psutil

from qwen3bench.record.host import usable_cpus
from qwen3bench.record.lines import Telemetry
from qwen3bench.reporting.units import listing

BUSY = 0.1  # of the cores' time: from a tenth on a visit in ten is disturbed
_NAMED = 0.01  # of it; what takes less is not named
_UNSEEN = "processes that cannot be seen from here"
_MOST = 3  # names in a line


@dataclass(frozen=True)
class _Look:
    """Processor time so far, in seconds: of each other process by its id and start, and of the CPUs that we may use.

    `busy_s` holds ours (`own_s`), of processes that have ended too, and the hypervisor's (`steal_s`).
    """

    at_s: float
    others: dict[tuple[int, float], tuple[str, float]]
    busy_s: float
    steal_s: float
    own_s: float


class Neighbors:
    """Other processes, and what they have taken of this machine since it was made."""

    def __init__(self) -> None:
        self._before = _look()

    @property
    def looked_s(self) -> float:
        """For how long it has looked."""
        return time.monotonic() - self._before.at_s

    def busy_cores(self) -> float:
        """How many of the CPUs that we may use others have kept busy, on average.

        What a hypervisor takes is no part of it, as it takes that from few threads, too.
        """
        now, before = _look(), self._before
        others_s = (now.busy_s - before.busy_s) - (now.own_s - before.own_s) - (now.steal_s - before.steal_s)
        return max(0.0, others_s) / max(1e-9, now.at_s - before.at_s)

    def shares(self) -> dict[str, float]:
        """The share of all cores' time that went to processes of each name, the largest first."""
        now, before = _look(), self._before
        capacity_s = max(1e-9, now.at_s - before.at_s) * (psutil.cpu_count() or 1)
        by_name: Counter[str] = Counter()
        for key, (name, used_s) in now.others.items():
            by_name[name] += max(0.0, used_s - before.others.get(key, (name, 0.0))[1])  # type: ignore[assignment]
        found = {name: used_s / capacity_s for name, used_s in by_name.most_common()}
        busy = (now.busy_s - before.busy_s - (now.own_s - before.own_s)) / capacity_s
        if (unseen := busy - sum(found.values())) > BUSY:  # of another container, or ended in between
            found[_UNSEEN] = unseen
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def busy_line(shares: dict[str, float], timed_by_host: bool) -> str | None:
    """That the machine is busy, with what, and what this costs; None where it is not.

    `timed_by_host`: the host's clock times some of the run, so that what takes its cores disturbs it.
    """
    total = sum(shares.values())
    if total < BUSY:
        return None
    with_what = busy_with(shares)
    longer = f"{1 / max(0.1, 1 - min(total, 1.0)):.1f} times as long here"
    if not timed_by_host:
        return f"{with_what}. Getting ready takes up to {longer}; times on the device are not affected"
    return f"{with_what}. A run takes up to {longer}, and its intervals are wider"


def busy_with(shares: dict[str, float]) -> str:
    """That the machine is busy, and with what, as far as that can be named."""
    named = [f"{name} {share:.0%}" for name, share in shares.items() if share >= _NAMED]
    what = f" ({listing(named, _MOST)} of its {psutil.cpu_count() or 1} cores)" if named else ""
    return f"this machine is busy{what}"


def card_line(telemetry: Telemetry, *, here: bool = True) -> str | None:
    """That the card is used by others, by whom and how much, and what this costs; None where it is not.

    `here`: the card is one of this machine, so that the names of its processes can be told.
    """
    if not telemetry.foreign_processes:
        return None
    names = [f"{_name_of(pid) if here else 'a process'} ({pid})" for pid in telemetry.foreign_processes]
    percent = telemetry.foreign_sm_percent
    use = "" if percent is None else f", at {percent:g} % of its SMs"
    return (
        f"the card is used by {listing(names, _MOST)} too{use}. Blocks beside others are measured up to three times, "
        "and flagged"
    )


def _look() -> _Look:
    own = set(_family())
    others: dict[tuple[int, float], tuple[str, float]] = {}
    own_s = 0.0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError), process.oneshot():
            times = process.cpu_times()
            used_s = times.user + times.system
            if process.pid in own:
                own_s += used_s + getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)
            else:
                others[process.pid, process.create_time()] = process.name(), used_s
    cpus = psutil.cpu_times(percpu=True)
    usable = [cpus[cpu] for cpu in usable_cpus() if cpu < len(cpus)]
    not_busy = ("idle", "iowait", "guest", "guest_nice")  # guests are in `user` and `nice`, too
    busy_s = sum(sum(each) - sum(getattr(each, name, 0.0) for name in not_busy) for each in usable)
    steal_s = sum(getattr(each, "steal", 0.0) for each in usable)
    return _Look(time.monotonic(), others, busy_s, steal_s, own_s)


def _family() -> Iterator[int]:
    yield os.getpid()
    with contextlib.suppress(psutil.Error):
        yield from (child.pid for child in psutil.Process().children(recursive=True))


def _name_of(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except (psutil.Error, OSError):
        return "a process"
