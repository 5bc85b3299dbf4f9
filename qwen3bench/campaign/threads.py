"""How many threads measure on a CPU, where nobody says: as many as find a core that other work leaves free.

And no more than the control group has time for, as all of them are stopped once that is spent.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, replace

from qwen3bench.campaign.neighbors import Neighbors, busy_with
from qwen3bench.config.settings import Settings
from qwen3bench.record.host import Host
from qwen3bench.record.reader import Record

# Of a core, on average: a thread that shares one waits for it, and at the end of each operation all wait for that one.
# Two threads beside a process that kept one of two cores busy half of the time took 12 times as long, one as long as
# ever. Services of an idle machine take some hundredths.
SHARED = 0.25
QUIET = 0.1  # of a core: below it nobody is seen to work, so that nothing is waited for
LOOK_S = 10.0  # else: a process that works half of the time, in bursts of up to 2 s, reads below `SHARED` once in 1,000
_LOOK_AGAIN_S = 0.5
_BLOCKS = 2  # times as many, a choice: all cells of five switches then take ten minutes on two cores, one of them busy


@dataclass(frozen=True)
class FewerThreads:
    """Threads that measure in place of `usual`, and the share of all cores that others take, by their names.

    `quota`: the CPUs' worth of time that is the reason, where others are not.
    """

    threads: int
    usual: int
    shares: dict[str, float]
    quota: float | None = None


def free_threads(usual: int, cores: int, busy_cores: float) -> int:
    """How many of `usual` threads find a core of their own, where others keep `busy_cores` busy; one at least."""
    return max(1, min(usual, cores - max(0, math.ceil(busy_cores - SHARED))))


def fewer_threads(neighbors: Neighbors, usual: int) -> FewerThreads | None:
    """How many threads measure where other work or a quota takes cores; None where all of the `usual` ones do.

    Where somebody works, it looks for `LOOK_S` in all.
    """
    host = Host.here()
    cores = host.cores if host.cores is not None and usual <= host.cores else len(host.cpus)
    usual = min(usual, len(host.cpus))  # OMP_NUM_THREADS may ask for more: they share CPUs on an idle machine, too
    if usual == 1:
        return None
    while neighbors.busy_cores() >= QUIET and neighbors.looked_s < LOOK_S:
        time.sleep(min(_LOOK_AGAIN_S, max(0.0, LOOK_S - neighbors.looked_s)))
    threads = free_threads(usual, cores, neighbors.busy_cores())
    quota = math.inf if host.cpu_quota is None else host.cpu_quota
    if threads == usual > quota:
        return FewerThreads(max(1, int(quota)), usual, {}, quota)
    threads = max(1, int(min(threads, quota)))
    return FewerThreads(threads, usual, neighbors.shares()) if threads < usual else None


def threads_line(found: FewerThreads) -> str:
    """Why fewer threads measure, and what to ask for else."""
    threads = f"{found.threads} thread{'s' * (found.threads > 1)}"
    instead = f"threads={found.usual} takes all"
    why = busy_with(found.shares) if found.quota is None else f"a quota allows {found.quota:g} CPUs' worth of time"
    return f"{why}, so it measures with {threads} in place of {found.usual}. {instead}"


def with_fewer(settings: Settings, found: FewerThreads) -> Settings:
    """The settings with fewer threads: `beside_others` where these are the reason."""
    return beside_others(settings, found.threads) if found.quota is None else replace(settings, threads=found.threads)


def beside_others(settings: Settings, threads: int) -> Settings:
    """The settings with fewer threads and, where no time is set, more blocks, as other work comes and goes."""
    measure = settings.measure
    if measure.max_seconds is None:
        least = min(measure.max_blocks, _BLOCKS * measure.min_blocks)
        each = measure.blocks_per_process or _BLOCKS * settings.blocks_per_process
        measure = replace(measure, min_blocks=least, blocks_per_process=each)
    return replace(settings, threads=threads, measure=measure)


def recorded_threads(settings: Settings, done: Record) -> Settings:
    """The settings with the threads of a run that goes on, where they leave them open."""
    recorded = done.run.setting("threads")
    if settings.threads != "auto" or not isinstance(recorded, int):
        return settings
    beside = beside_others(settings, recorded)
    chosen = asdict(beside.measure) == done.run.setting("measure")  # else its command named them
    return beside if chosen else replace(settings, threads=recorded)
