"""Look-ups in the tables of a run; rows come as objects with the columns as attributes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from qwen3bench.analysis.contrasts import others_of
from qwen3bench.analysis.frames import analysis_setting
from qwen3bench.record.design import is_peer
from qwen3bench.record.states import CellStatus, StopReason
from qwen3bench.reporting.conditions import Condition
from qwen3bench.reporting.units import count

if TYPE_CHECKING:
    from qwen3bench.analysis.run import Run

BASELINE = "baseline"
LATENCY, MEMORY = "latency_s", "peak_allocated_bytes"
AVERAGE, UNLIKE = "on average over the others", "beside others that differ"


def factors(run: Run) -> list[str]:
    """The run's factors in its own order."""
    return run.factors


def all_on(run: Run) -> str:
    """Label of the cell with every factor on."""
    return "+".join(factors(run)) or BASELINE


def directory(run: Run) -> Path:
    """Where a run's files are, and its report goes."""
    return run.record.path.parent


def device(run: Run) -> str:
    """Name of the device that was measured."""
    return str(run.record.run.device or "an unnamed device")


def band(run: Run) -> float:
    """Half-width around 1 inside which an effect counts as none (`analysis.band`)."""
    return analysis_setting(run.record, "band")


def level(run: Run) -> str:
    """What an interval holds (`analysis.confidence`), such as `95 %`."""
    return f"{100 * analysis_setting(run.record, 'confidence'):g} %"


def usable(cells: pd.DataFrame) -> pd.DataFrame:
    """Cells with status ok and a latency, the only ones a finding may rank; whole numbers become floats."""
    good = cells[(cells["status"] == CellStatus.OK) & cells[LATENCY].notna()]
    return good.astype({name: float for name, kind in good.dtypes.items() if str(kind) == "Int64"})


def of_peers(cells: pd.DataFrame) -> pd.Series:
    """Which rows are other implementations."""
    return cells["cell"].map(is_peer).astype(bool)


def terms(run: Run, condition: Condition, metric: str, kind: str) -> pd.DataFrame:
    """Effects of one kind that could be estimated, in the run's order of terms."""
    chosen = condition.select(run.effects)
    chosen = chosen[(chosen["metric"] == metric) & (chosen["kind"] == kind) & chosen["estimate"].notna()]
    return chosen.astype({"estimate": float, "lo": float, "hi": float})


def others_meanwhile(run: Run, reason: str) -> str:
    """What the other switches do where a main effect with this reason is told; empty where the run has no others."""
    return others_of(reason) or (AVERAGE if len(factors(run)) > 1 else "")


def others_beside(run: Run, main: pd.DataFrame) -> str:
    """The same of several main effects: averaged over, all off, all on, or unlike."""
    reasons = {*main.loc[main["estimate"].notna(), "reason"]} or {""}
    found = {others_meanwhile(run, reason) for reason in reasons}
    return found.pop() if len(found) == 1 else UNLIKE


def samples_of_usable(run: Run, condition: Condition) -> pd.DataFrame:
    """Samples of a condition's usable cells."""
    samples = condition.select(run.samples)
    return samples[samples["cell"].isin(usable(condition.select(run.cells))["cell"])]


def blocks_of(run: Run, condition: Condition) -> str:
    """Blocks and processes behind the numbers of a condition, in words."""
    samples = condition.select(run.samples)
    blocks, processes = samples["block"].nunique(), samples["process"].nunique()
    return f"{count(blocks, 'block')} in {count(processes, 'process', 'processes')}"


def ended_early(run: Run, condition: Condition) -> tuple[int, int] | None:
    """Blocks of a condition that its time limit ended before the least number of them, and that number; else None."""
    least = int((run.config.get("measure") or {}).get("min_blocks") or 0)
    where = condition.workload, condition.runtime
    for line in run.record.stops:
        here = (line.workload, line.runtime) == where and line.reason == StopReason.MAX_SECONDS
        if here and line.blocks is not None and line.blocks < least:
            return line.blocks, least
    return None


def rows(frame: pd.DataFrame) -> list[Any]:
    """All rows, in order."""
    return list(frame.itertuples())


def largest(frame: pd.DataFrame, column: str) -> Any:
    """The row whose value in a column is the largest, the first of equals; missing values do not count."""
    return rows(frame.dropna(subset=[column]).sort_values(column, ascending=False, kind="stable"))[0]


def smallest(frame: pd.DataFrame, column: str) -> Any:
    """The row whose value in a column is the smallest, the first of equals; missing values do not count."""
    return rows(frame.dropna(subset=[column]).sort_values(column, kind="stable"))[0]
