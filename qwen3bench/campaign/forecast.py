"""What a run is going to tell, and about how long it takes: said before it measures."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from qwen3bench.analysis.contrasts import contrasts, others_of
from qwen3bench.campaign.card_costs import REPORT_S, whole_run_s
from qwen3bench.campaign.progress import duration
from qwen3bench.campaign.prompt import BLOCKS, FORWARDS
from qwen3bench.config.settings import Settings
from qwen3bench.errors import Refused
from qwen3bench.record.design import BASELINE, is_peer
from qwen3bench.record.lines import PromptLine
from qwen3bench.reporting.units import count, duration_words, listing

# Of a run on a CPU: times what building every cell took, on two cores.
_VERIFY, _LOOK, _GET_READY = 2.5, 1.0, 0.6
_COMPILE = 3.0  # more for each process that compiles
# In forwards of a short prompt on a CPU: the gate before its first verdict, of each cell, and a single token.
_GATE, _GATE_CELL, _TOKEN = 60, 3, 0.4
_TRAIN = 3  # forwards that a training step takes as long as
_START_S = 2.0  # a process that was started ahead, with a tiny model: 1.9 to 2.4 s
_LOOKS_S, _CELL_S = 2.2, 0.17  # the gate and evidence of a tiny model: two cells took 2.6 s, 32 took 7.7 s
_CELL_ON_CPU_S = 6.6  # of a cell and workload in a run of 32 cells, all passes: 7 minutes on two cores
_SPARE = 1.25  # times what a forecast says
_MAX_OVER = 100.0  # of a half-width over its target: what takes ten thousand times as long is not told apart from more
_REASONABLE_S = 3600.0  # nobody waits longer for a target
TRY_S = 600.0  # what one may wait


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


def about_design(settings: Settings) -> list[str]:
    """What the cells of a run are and tell, line by line, before a device is known."""
    cells, every = len(settings.cells), 2 ** len(settings.factors)
    lines = [f"design={settings.design}: {count(cells, 'cell')} of {every:,}, to tell {listing(told(settings))}"]
    if settings.design == "screen":
        lines += about_screen(settings)
    said = []
    on_card, on_cpu = (settings.device.startswith(("auto", kind)) for kind in ("cuda", "cpu"))
    with suppress(Refused):  # what a card cannot run is refused when it begins
        said += [f"{_minutes(whole_run_s(settings.resolved('cuda')))} on an H100 or H200"] * on_card
    if any(sizes.precision is not None for sizes in settings.workloads.values()):  # nobody measured how long that takes
        said += ["not known on a CPU before its cells are built"] * on_cpu
    elif "graph" not in settings.runtimes:
        minutes = _minutes(cells * len(settings.workloads) * _CELL_ON_CPU_S)
        said += [f"{minutes} on two CPU cores (Qwen3-0.6B in one runtime)"] * on_cpu
    return [*lines, f"expected time: {', '.join(said)}"] if said else lines


def _minutes(seconds: float) -> str:
    return count(max(1, round(seconds / 60)), "minute")


def about_screen(settings: Settings) -> list[str]:
    """How a screen was made, how much it tells beside an orthogonal design, and what it tells only together."""
    screen = settings.screen
    whole = settings.factors in screen.cells
    lines = [f"made: {screen.made}; {'the baseline and all on' if whole else 'the baseline'} among the cells"]
    if screen.efficiency is not None and screen.variance is not None:
        of_mains, of_pairs = screen.variance
        lines.append(
            f"D-efficiency {screen.efficiency:.3f}; variance of a main effect up to {of_mains:.2f} times that in an "
            f"orthogonal design, of a pair {of_pairs:.2f} times"
        )
    if screen.aliases:
        groups = [" = ".join(map(":".join, group)) for group in screen.aliases]
        lines.append(f"told only together: {'; '.join(groups)}")
    return lines


def seconds_ahead(settings: Settings, build_s: float, prompt: PromptLine | None = None) -> float:
    """About how long a run takes from here, once building every cell has taken `build_s`.

    `prompt`: how long forwards take on a CPU, where that was measured to choose the prompt's length.
    """
    measured_s = settings.time_allowed_s
    if settings.measure.max_seconds is None:  # else a CPU mostly takes what is allowed, as its intervals are wide
        measured_s /= 2
    total_s = _VERIFY * build_s + _LOOKS_S + _CELL_S * len(settings.labels) + REPORT_S
    for runtime in settings.runtimes:
        ready_s = _START_S + build_s * (_GET_READY + (_COMPILE if runtime == "compile" else 0.0))
        processes = settings.min_processes(runtime)
        if prompt is not None:  # a process is timed for as long as it took to be ready, and for its least blocks
            blocks_s = settings.blocks_per_process * _block_s(settings, prompt) / len(settings.workloads)
            processes = max(processes, int(measured_s / max(ready_s, blocks_s)))
        total_s += (_LOOK * build_s + processes * ready_s + measured_s) * len(settings.workloads)
    return total_s + (0.0 if prompt is None else _of_forwards_s(settings, prompt))


def _of_forwards_s(settings: Settings, prompt: PromptLine) -> float:
    """What the forwards of all cells take on a CPU: what building a cell tells nothing of."""
    short_s = min(prompt.forward_s.values())  # a shorter prompt that took longer was disturbed
    gate_s = (_GATE + _GATE_CELL * (len(settings.labels) + 1)) * short_s
    measure = settings.measure
    more = max(0, measure.min_blocks - BLOCKS) if measure.max_seconds is None else 0
    return gate_s + (FORWARDS + more) * len(settings.runtimes) * _block_s(settings, prompt)


def _block_s(settings: Settings, prompt: PromptLine) -> float:
    """A timed value of each cell and of the baseline's copy, in all workloads."""
    forward_s = {int(tokens): seconds for tokens, seconds in prompt.forward_s.items()}
    prefill_s = min(seconds for tokens, seconds in forward_s.items() if tokens >= prompt.prompt_tokens)
    token_s = _TOKEN * min(forward_s.values())
    each_s = {"prefill": prefill_s, "decode": token_s, "train": _TRAIN * prefill_s}
    once_s = sum(each_s.get(name, prefill_s + sizes.new_tokens * token_s) for name, sizes in settings.workloads.items())
    return (len(settings.labels) + 1) * once_s


@dataclass(frozen=True)
class Shortfall:
    """What an answer lacks: the effect known least, how many times the target its half-width is, and what that takes.

    `more`: processes, each of `measured_s` and, before, `setup_s` to get ready. `spent_s` were measured, and `left_s`
    may still be.
    """

    term: str
    over: float
    target: float
    more: int
    measured_s: float
    setup_s: float
    spent_s: float
    left_s: float

    @property
    def takes_s(self) -> float:
        """Seconds of measuring that it takes."""
        return self.more * self.measured_s

    @property
    def in_all_s(self) -> float:
        """Seconds that it takes with getting processes ready, which the time allowed does not count."""
        return self.takes_s + self.more * self.setup_s

    @property
    def tried(self) -> float:
        """The half-width after a run of `TRY_S`, by what its processes have taken; no wider than it is."""
        processes = self.spent_s / self.measured_s
        return self.over * self.target * min(1.0, math.sqrt(processes * (self.measured_s + self.setup_s) / TRY_S))

    @property
    def would_do_s(self) -> float:
        """A time allowed that is enough, with some to spare, as a forecast from few processes is rough."""
        return 10.0 * math.ceil(_SPARE * (self.spent_s + self.takes_s) / 10)


def processes_for(over: float, processes: int) -> int:
    """How many more processes narrow an interval that is `over` times as wide as asked: it shrinks by their root."""
    if not math.isfinite(over):
        return processes
    return max(1, math.ceil(processes * (min(over, _MAX_OVER) ** 2 - 1)))


def what_it_takes(where: tuple[str, str], lack: Shortfall) -> str:
    """What a condition's answer takes, in a line."""
    at = " ".join(where)
    if not math.isfinite(lack.over):
        return f"{at}: no interval yet, so more processes are measured"
    known, asked, tried = (f"±{100 * width:.2g} %" for width in (lack.over * lack.target, lack.target, lack.tried))
    line = f"{at}: {lack.term} is known to {known}, and {asked} takes about"
    if lack.in_all_s > _REASONABLE_S and lack.takes_s > lack.left_s:
        reach = f". Ten minutes tell it to about {tried}" if tried != known else ""
        return f"{line} {duration_words(lack.in_all_s)}: more than this machine can tell in reasonable time{reach}"
    more = count(lack.more, "more process", "more processes")
    if lack.takes_s <= lack.left_s:
        return f"{line} {more} ({duration(lack.in_all_s)})"
    line = f"{line} {more} ({duration(lack.in_all_s)}, of which {duration(lack.takes_s)} are measuring)"
    return f"{line}. The time allowed for measuring ends before; measure.max_seconds={lack.would_do_s:.0f} would do"
