"""What to add to the command for an answer, and how long that run takes, by what this one measured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwen3bench.record.design import is_peer
from qwen3bench.record.lines import BlockLine, ProcessLine, SessionLine
from qwen3bench.record.screen import WHOLE
from qwen3bench.record.states import BlockState, Purpose
from qwen3bench.reporting.conditions import Condition, conditions
from qwen3bench.reporting.finding import Advice

if TYPE_CHECKING:
    from qwen3bench.analysis.run import Run

_SPARE = 1.25  # time allowed over what is expected: a limit that ends the run just before is worse than none
_USUAL_MAX_BLOCKS = 200
_REASONABLE_S = 3600.0  # nobody waits longer for a verdict, unless the run itself took as long
_TRY_S = 600.0  # what one may wait
_MOST_CELLS = 2**9  # of design=full, unless it is forced


@dataclass(frozen=True)
class Spent:
    """What a condition's blocks took: how many, in how many processes, seconds measured, and those to set up each."""

    blocks: int
    processes: int
    measured_s: float
    setup_s: float
    before_s: float  # the checks, and the first process's set-up


def spent(run: Run, condition: Condition) -> Spent:
    """What the run spent on a condition; seconds are NaN where the record lacks them."""
    samples = condition.select(run.samples)
    where = condition.workload, condition.runtime
    lines = [line for line in run.record.of(BlockLine) if (line.workload, line.runtime) == where]
    known = [line.elapsed_s for line in lines if line.elapsed_s is not None and line.state != BlockState.REPEAT]
    setups = [line.more_s for line in lines if line.more_s]
    return Spent(
        blocks=int(samples["block"].nunique()),
        processes=int(samples["process"].nunique()),
        measured_s=sum(known) if known else math.nan,
        setup_s=sum(setups) / len(setups) if setups else _between(run),
        before_s=_before(run),
    )


def more_blocks(run: Run, condition: Condition, blocks: int) -> Advice:
    """To measure so many blocks of a condition; as many of them in a process as now."""
    now = spent(run, condition)
    return _advice(run, condition, now, f"measure.min_blocks={blocks}", blocks / max(1, now.blocks))


def more_processes(run: Run, condition: Condition, processes: int, times: int = 1) -> Advice:
    """To measure in so many processes, or in `times` as many as now where that is more."""
    now = spent(run, condition)
    processes = max(processes, times * now.processes)
    return _advice(run, condition, now, f"measure.min_processes={processes}", processes / max(1, now.processes))


def within_reason(run: Run, condition: Condition, advice: Advice, half_width: float) -> Advice:
    """The advice; where it takes longer than an hour, and than twice this run, what ten minutes tell instead.

    `half_width`: as a part of the estimate, of what the advice would decide. It shrinks by the root of blocks and
    processes, and not by further cells.
    """
    now = spent(run, condition)
    spent_s = now.measured_s + now.processes * now.setup_s
    if advice.seconds is None or advice.seconds <= max(_REASONABLE_S, 2 * (now.before_s + spent_s)):
        return advice
    times = (_TRY_S - now.before_s) / spent_s
    shrinks = times > 1 and any(setting.startswith("measure.") for setting in advice.settings)
    return Advice((), advice.seconds, half_width / math.sqrt(times) if shrinks else None)


def all_cells(run: Run, cells: int) -> Advice:
    """To measure every combination where the run measured so many cells; of many switches a screen of them."""
    if len(run.factors) > WHOLE:
        return Advice(("design=screen", "design.resolution=5"))
    return _of_cells(run, "design=full", 2 ** len(run.factors) / max(1, cells))


def more_cells(run: Run) -> Advice:
    """To measure every combination of a screen's switches; where these are too many, twice as many cells."""
    every, now = 2 ** len(run.factors), sum(not is_peer(cell) for cell in run.record.run.cells)
    if every <= _MOST_CELLS:
        return _of_cells(run, "design=full", every / now)
    return _of_cells(run, f"design.cells={2 * now}", 2.0)


def _of_cells(run: Run, setting: str, part: float) -> Advice:
    """The setting that measures `part` times as many cells, and how long that takes."""
    each = [spent(run, condition) for condition in conditions(run)]
    seconds = sum(now.processes * (now.measured_s / max(1, now.processes) + now.setup_s) for now in each)
    return Advice((setting,), _known(part * (seconds + (each[0].before_s if each else math.nan))))


def _advice(run: Run, condition: Condition, now: Spent, setting: str, times: float) -> Advice:
    """The setting with the time and the blocks that it needs, `times` what the run measured of the condition."""
    settings = [] if len(conditions(run)) == 1 else [f"workload={condition.workload}", f"runtime={condition.runtime}"]
    settings.append(setting)
    measured_s = times * now.measured_s
    if math.isfinite(measured_s):
        settings.append(f"measure.max_seconds={_round_up(max(measured_s * _SPARE, 10))}")
    most = (run.config.get("measure") or {}).get("max_blocks") or _USUAL_MAX_BLOCKS
    if (blocks := math.ceil(times * now.blocks)) > most:
        settings.append(f"measure.max_blocks={_round_up(blocks)}")
    return Advice(tuple(settings), _known(now.before_s + measured_s + times * now.processes * now.setup_s))


def _known(seconds: float) -> float | None:
    return seconds if math.isfinite(seconds) else None


def _round_up(value: float) -> int:
    """Up to what one would type: 40 and not 37, 120 and not 113."""
    step = 10 ** max(1, math.floor(math.log10(value)) - 1)
    return math.ceil(value / step) * step


def _times(run: Run) -> tuple[list[float], list[float], list[float]]:
    """When sessions began, timing processes were put to work, and blocks ended."""
    began = [line.time for line in run.record.of(SessionLine) if line.time is not None]
    work = [ln.time for ln in run.record.of(ProcessLine) if ln.time is not None and ln.purpose == Purpose.TIME]
    ended = [line.time for line in run.record.of(BlockLine) if line.time is not None]
    return began, work, ended


def _before(run: Run) -> float:
    """From the command to the first process that times."""
    began, work, _ = _times(run)
    return max(0.0, work[0] - began[0]) if began and work else 0.0


def _between(run: Run) -> float:
    """The mean time from one process's last block to the next one's work: what a further process takes to set up."""
    began, work, ended = _times(run)
    gaps = []
    for time in work[1:]:
        last = max((end for end in ended if end <= time), default=None)
        if last is not None and not any(last < start <= time for start in began):  # no break between sessions
            gaps.append(time - last)
    return sum(gaps) / len(gaps) if gaps else 0.0
