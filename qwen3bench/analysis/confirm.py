"""Which cells a screen predicts to be best, and whether what is then measured agrees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import special

from qwen3bench.analysis.contrasts import cell_label, contrasts, every_cell
from qwen3bench.analysis.frames import block_matrix, factor_columns
from qwen3bench.analysis.predictions import predictions
from qwen3bench.record.design import BASELINE

FEW = 3  # cells that are predicted to be fastest are measured; a block of them takes a tenth of a screen's
TELLING = 1.10  # a prediction that may be further off tells little of which cell is best
_METRIC = "peak_allocated_bytes"
_WIDEST = 300.0  # half of an interval of log speed-up: from about 700 on exp is no number, and either tells nothing


@dataclass(frozen=True)
class MeasuredSpeedup:
    """A cell's speed-up as measured in the blocks of a round, and the ends of its interval; NaN where it has none.

    `noise`: by how much two copies of the baseline differ there, in log latency, where that control fails; else 0.
    """

    speedup: float
    lo: float
    hi: float
    noise: float = 0.0


@dataclass(frozen=True)
class Prediction:
    """A cell's speed-up as the model has it. The interval holds for the best of all that may be: see `candidates`."""

    cell: str
    speedup: float
    lo: float
    hi: float

    def agrees(self, measured: MeasuredSpeedup) -> bool:
        """Whether what was measured is as far from what was predicted as both intervals allow, and no further."""
        return bool(abs(np.log(measured.speedup / self.speedup)) <= self._reach(measured))

    def is_tested_by(self, measured: MeasuredSpeedup) -> bool:
        """Whether the intervals are narrow enough for agreement to mean something."""
        return self._reach(measured) <= np.log(TELLING)

    def _reach(self, measured: MeasuredSpeedup) -> float:
        """How far both may be apart in log, by their intervals and the noise; anywhere where one has none."""
        with np.errstate(divide="ignore"):
            halves = [np.log(each.hi) / 2 - np.log(each.lo) / 2 for each in (self, measured)]
        return float(np.hypot(*np.nan_to_num(halves, nan=np.inf))) + measured.noise


def candidates(
    samples: pd.DataFrame,
    factors: Sequence[str],
    fits: Mapping[str, bool] | None = None,
    known: Mapping[str, MeasuredSpeedup] | None = None,
) -> list[Prediction]:
    """The few cells predicted to be fastest, the fastest first; none where the screen does not predict, or by a single
    block, which gives no interval.

    `samples`: of the screen, one workload and runtime. `fits`: whether a cell's memory is within the limit; one that is
    not named is. `known`: cells that were measured since, which the model is fitted to as well. The best of many that
    are close looks better than it is, so intervals are those of as many comparisons as there are cells close to it
    (Bonferroni).
    """
    table = predictions(samples, factors)
    if known and len(table):
        table = _fitted_again(table, samples, factors, known)
    table = table[table["se"].notna()]
    if fits is not None:
        table = table[[fits.get(cell, True) for cell in table["cell"]]]
    if table.empty:
        return []
    close = max(1, int((table["hi"] >= table["lo"].iloc[0]).sum()))
    best = table.head(FEW)
    half = special.stdtrit(best["df"], 1 - 0.025 / close) * best["se"]
    half = np.minimum(np.where(best["se"] > 0, half, 0.0), _WIDEST)
    log = np.log(best["speedup"])
    ends = np.exp(log - half), np.exp(log + half)
    return [
        Prediction(str(cell), float(value), float(lo), float(hi))
        for cell, value, lo, hi in zip(best["cell"], best["speedup"], *ends, strict=True)
    ]


def within_memory(cells: pd.DataFrame, factors: Sequence[str], limit_bytes: float) -> dict[str, bool]:
    """Whether each cell's peak memory, as measured or else as the same model predicts it, is within the limit.

    `cells`: columns `cell`, one for each factor, `peak_allocated_bytes`. Empty where memory is not known.
    """
    known = cells.dropna(subset=[_METRIC])
    codes = tuple(tuple(int(v) for v in row) for row in known[list(factors)].to_numpy())
    order = sorted(range(len(codes)), key=lambda i: codes[i][::-1])
    fit = contrasts(tuple(factors), tuple(codes[i] for i in order)).fit if codes else None
    measured = dict(zip(known["cell"], known[_METRIC].astype(float), strict=True))
    if fit is None or not fit.can_predict or BASELINE not in measured:
        return {cell: peak <= limit_bytes for cell, peak in measured.items()}
    every = [cell for cell in every_cell(len(factors)) if fit.allows(cell)]
    peaks = measured[BASELINE] + fit.predicting(every) @ known[_METRIC].astype(float).to_numpy()[order]
    predicted = {cell_label(cell, factors): float(peak) for cell, peak in zip(every, peaks, strict=True)}
    return {cell: measured.get(cell, peak) <= limit_bytes for cell, peak in predicted.items()}


def measured_speedups(samples: pd.DataFrame, confidence: float = 0.95) -> dict[str, MeasuredSpeedup]:
    """Each cell's speed-up over the baseline within the blocks of one workload and runtime."""
    if samples.empty:
        return {}
    matrix = block_matrix(samples.assign(copy=samples["copy"].fillna(0)))
    names = [cell for cell in samples["cell"].unique() if cell in matrix.log_s and cell != BASELINE]
    if BASELINE not in matrix.log_s or not names or matrix.log_s.empty:
        return {}
    found = matrix.log_ratios(BASELINE, names)
    half = found.half_width(confidence)
    return {
        cell: MeasuredSpeedup(*(float(np.exp(value)) for value in (log, log - h, log + h)))
        for cell, log, h in zip(names, found.estimate, half, strict=True)
    }


def _fitted_again(
    table: pd.DataFrame, samples: pd.DataFrame, factors: Sequence[str], known: Mapping[str, MeasuredSpeedup]
) -> pd.DataFrame:
    """The predictions with cells measured since among those that the model is fitted to; their errors stay."""
    logs = {cell: np.log(each.speedup) for cell, each in {**measured_speedups(samples), **known}.items()}
    logs[BASELINE] = 0.0
    codes = factor_columns(list(logs), factors).to_numpy()
    order = sorted(range(len(logs)), key=lambda i: tuple(codes[i])[::-1])
    cells = tuple(tuple(int(v) for v in codes[i]) for i in order)
    fit = contrasts(tuple(factors), cells).fit
    if fit is None or not fit.can_predict:
        return table
    values = np.array(list(logs.values()))[order]
    asked = factor_columns(table["cell"].tolist(), factors).to_numpy().astype(int)
    log = fit.predicting([tuple(row) for row in asked]) @ values
    half = np.log(table["hi"] / table["lo"]) / 2
    again = table.assign(speedup=np.exp(log), lo=np.exp(log - half), hi=np.exp(log + half))
    return again.sort_values("speedup", ascending=False, kind="stable", ignore_index=True)
