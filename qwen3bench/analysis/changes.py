"""The effects and the ratios within a run that two runs both tell, and how each changed."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import special

from qwen3bench.analysis.contrasts import OTHERS_OFF, others_of
from qwen3bench.analysis.frames import analysis_setting, block_matrix
from qwen3bench.analysis.regression import CONFIDENCE, change_between, judged_changes
from qwen3bench.analysis.run import Run
from qwen3bench.analysis.significance import holm
from qwen3bench.analysis.variance import Estimates
from qwen3bench.record.design import BASELINE, is_peer
from qwen3bench.record.states import CellStatus

PLACE = ["workload", "runtime"]
_KEYS = ["cell", *PLACE]
_WHAT = ["kind", "name", "over", *PLACE]
_TOLD = [*_WHAT, "value", "estimate", "se", "df"]
CHANGE_COLUMNS = [*_WHAT, "a", "b", "ratio", "lo", "hi", "p_holm", "change", "se", "df"]


class Compared(StrEnum):
    """What is compared between two runs: effects, ratios of two cells within a run, latencies."""

    MAIN = "main"
    INTERACTION = "interaction"
    SPEEDUP = "speedup"
    PEER = "peer"
    LATENCY = "latency"


def ok_cells(run: Run) -> pd.DataFrame:
    """The rows of a run's cells that are ok."""
    return run.cells[run.cells["status"] == CellStatus.OK]


def judged_table(
    a: Run, b: Run, noise: Mapping[tuple[str, str], float], tolerance: float, *, latency: bool
) -> pd.DataFrame:
    """What both runs tell, in B's order, and what became of it.

    `CHANGE_COLUMNS`: kind, name (a term or a cell), over (what a cell is compared with), workload, runtime, a, b, ratio
    (of speed: above 1, B is faster) with its interval, Holm's p, `regression.Change`, and the ratio's error and degrees
    of freedom in log scale. `noise`: by how much two copies of one model differ in both runs together, in log, by
    workload and runtime. It limits ratios; of a raw latency it tells nothing.
    """
    both = _both(a, b, latency)

    def told(run: str) -> Estimates:
        estimate, se, df = (both[f"{name}_{run}"].to_numpy(float) for name in ("estimate", "se", "df"))
        return Estimates(estimate, se, df, np.full_like(se, np.nan))

    change = change_between(told("a"), told("b"))
    half = change.half_width(CONFIDENCE)
    ends = np.exp(change.estimate - half), np.exp(change.estimate + half)
    table = both.rename(columns={"value_a": "a", "value_b": "b"})
    table = table.assign(ratio=np.exp(change.estimate), lo=ends[0], hi=ends[1], se=change.se, df=change.df)
    table["p_holm"] = change.p()
    family = table["kind"] == Compared.INTERACTION
    table["p_holm"] = table.groupby(family)["p_holm"].transform(lambda values: holm(values.to_numpy()))
    rows = table[["kind", *PLACE]].itertuples(index=False, name=None)
    limits = [0.0 if kind == Compared.LATENCY else noise[workload, runtime] for kind, workload, runtime in rows]
    table["change"] = judged_changes(change, table["p_holm"], tolerance, np.nan_to_num(limits))
    return table[CHANGE_COLUMNS]


def _both(a: Run, b: Run, latency: bool) -> pd.DataFrame:
    parts = []
    if set(a.factors) == set(b.factors):
        parts.append(_effects(b).merge(_effects(a), on=[*_WHAT, "others"], suffixes=("_b", "_a")))
    for tell in (ratios_told, _latencies)[: 1 + latency]:
        parts.append(tell(b).merge(tell(a), on=_WHAT, suffixes=("_b", "_a")))
    return pd.concat([part for part in parts if len(part)] or parts[-1:], ignore_index=True)


def _effects(run: Run) -> pd.DataFrame:
    """Main effects and interactions on latency, but those that are the speed-up of a cell."""
    table = run.effects[(run.effects["metric"] == "latency_s") & run.effects["estimate"].notna()]
    table = table[table["kind"].isin([Compared.MAIN, Compared.INTERACTION])]
    table = table.assign(others=table["reason"].map(others_of), name=table["term"], over="", value=table["estimate"])
    table = table[(table["others"] != OTHERS_OFF) & (len(run.factors) > 1)]
    lo, hi, df = (table[name].to_numpy(float) for name in ("lo", "hi", "df"))
    se = error_of(lo, hi, df, analysis_setting(run.record, "confidence"))
    return table.assign(estimate=np.log(table["value"].astype(float)), se=se, df=df)[[*_TOLD, "others"]]


def ratios_told(run: Run) -> pd.DataFrame:
    """Each cell's speed-up over the baseline, and every cell of ours over each peer."""
    rows: list[tuple[Any, ...]] = []
    for (workload, runtime), here in ok_cells(run).groupby(PLACE, sort=False):
        for part in (run.samples, *run.rounds):  # what confirms a screen was timed in blocks of its own
            samples = part[(part["workload"] == workload) & (part["runtime"] == runtime)]
            matrix = block_matrix(samples, here["cell"].tolist())
            timed = [cell for cell in here["cell"] if cell in matrix.log_s] if len(matrix.log_s) else []
            for over in timed:
                cells = [cell for cell in timed if cell != over and not is_peer(cell)]
                if not cells or not (over == BASELINE or is_peer(over)):
                    continue
                kind = Compared.PEER if is_peer(over) else Compared.SPEEDUP
                found = matrix.log_ratios(over, cells)
                told = zip(cells, np.exp(found.estimate), found.estimate, found.se, found.df, strict=True)
                rows += [(kind.value, cell, over, workload, runtime, *numbers) for cell, *numbers in told]
    return pd.DataFrame(rows, columns=_TOLD).drop_duplicates(_WHAT, ignore_index=True)


def _latencies(run: Run) -> pd.DataFrame:
    table = ok_cells(run).dropna(subset=["latency_s"])
    lo, hi = (table[f"latency_{end}_s"].to_numpy(float) for end in ("lo", "hi"))
    timed = run.samples.groupby(_KEYS)[["process", "block"]].nunique()
    clusters = timed["process"].where(timed["process"] > 1, timed["block"])  # which the intervals of cells.csv stand on
    df = table[_KEYS].join(clusters.rename("clusters"), on=_KEYS)["clusters"].to_numpy(float) - 1
    se = error_of(lo, hi, df, analysis_setting(run.record, "confidence"))
    log_speed = -np.log(table["latency_s"].astype(float))
    table = table.assign(kind=Compared.LATENCY.value, name=table["cell"], over="", value=table["latency_s"])
    return table.assign(estimate=log_speed, se=se, df=df)[_TOLD]


def error_of(
    lo: NDArray[np.float64], hi: NDArray[np.float64], df: NDArray[np.float64], confidence: float
) -> NDArray[np.float64]:
    """The standard error in log scale that an interval [lo, hi] was made from."""
    with np.errstate(divide="ignore", invalid="ignore"):
        half = (np.log(hi) - np.log(lo)) / 2
        return np.where(half == 0, 0.0, half / special.stdtrit(df, (1 + confidence) / 2))
