"""What a run is going to tell, and about how long it takes: said before it measures."""

from __future__ import annotations

import numpy as np

from qwen3bench.analysis.contrasts import contrasts, others_of
from qwen3bench.campaign.progress import duration
from qwen3bench.config.settings import Settings
from qwen3bench.record.design import BASELINE, is_peer
from qwen3bench.reporting.units import count, listing

# Times what building every cell took, on an H100 and on two CPU cores, to a factor of two.
_VERIFY, _LOOK, _GET_READY = 2.5, 1.0, 0.6
_COMPILE = 3.0  # more for each process that compiles
_START_S = 1.0  # a process that was started ahead
REPORT_S = 5.0  # to analyze and to draw


def announcement(settings: Settings, left_s: float) -> str:
    """How many cells are measured where, what that tells, and about how long it takes."""
    where = f"{', '.join(settings.workloads)}; {', '.join(settings.runtimes)}"
    many = count(len(settings.labels), "cell")
    return f"measuring {many} ({where}) to tell {listing(told(settings))}: about {duration(left_s)}"


def told(settings: Settings) -> list[str]:
    """What the cells of a run tell: effects and interactions, else latencies and speed-ups."""
    factors = settings.factors
    cells = tuple(tuple(int(name in cell) for name in factors) for cell in settings.cells)
    orders: list[int] = []
    others = ""
    if factors:
        plan = contrasts(factors, cells)
        known = np.flatnonzero(~np.isnan(plan.matrix).any(axis=1))
        orders = [len(plan.terms[i]) for i in known]
        others = next((f" {found}" for i in known if (found := others_of(plan.reasons[i]))), "")
    mains, pairs = orders.count(1), orders.count(2)
    higher = len(orders) - mains - pairs
    said = [count(mains, "main effect") + others] * (mains > 0)
    said += [count(pairs, "pair")] * (pairs > 0) + [count(higher, "higher interaction")] * (higher > 0)
    if not mains:
        switched = [label for label in settings.labels if label != BASELINE and not is_peer(label)]
        said = [f"the speed-up of {listing(switched)}" if switched else f"the latency of the {BASELINE}"]
    peers = sum(map(is_peer, settings.labels))
    return said + [count(peers, "other implementation")] * (peers > 0)


def seconds_ahead(settings: Settings, build_s: float) -> float:
    """About how long a run takes from here, once building every cell has taken `build_s`."""
    total_s = _VERIFY * build_s + REPORT_S
    for runtime in settings.runtimes:
        limit_s = settings.limit_s(runtime, settings.measure.min_blocks, settings.min_processes(runtime))
        ready_s = _START_S + build_s * (_GET_READY + (_COMPILE if runtime == "compile" else 0.0))
        once_s = _LOOK * build_s + settings.min_processes(runtime) * ready_s + limit_s / 2
        total_s += once_s * len(settings.workloads)
    return total_s
