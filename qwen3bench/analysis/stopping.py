"""How well effects are known while a run measures: what its stopping rule goes by."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from qwen3bench.analysis.contrasts import contrasts, term_name
from qwen3bench.analysis.frames import BASELINE, block_matrix, factor_columns, undisturbed, with_judged_visits
from qwen3bench.analysis.variance import clustered_mean
from qwen3bench.record.lines import SampleLine

_CONFIDENCE = 0.95  # of the intervals that `measure.target` is about
_MIN_DF = 5  # of the pooled error; with fewer a variance that happens to look small ends the measuring too early


def half_widths(samples: pd.DataFrame | Sequence[SampleLine], factors: Sequence[str]) -> dict[str, float]:
    """The relative half-width of each main effect's interval; infinite where it is not known yet.

    `samples`: one workload and runtime, finished blocks alone, as a DataFrame or the record's sample lines
    (columns `cell`, `copy`, `block`, `process`, `latency_s`). Where the cells do not tell the main effects (a pair of
    cells that differ in two factors), keyed by each cell's speed-up over the baseline instead; with the
    baseline alone, by its own latency.

    While the pooled error has fewer than 5 degrees of freedom, nothing counts as known: stopping the moment a variance
    happens to look small makes intervals lie, and the fewer degrees of freedom the more often it looks small. A term
    that stands on its own variance may have fewer; its interval is wide enough to say so.
    """
    frame = samples if isinstance(samples, pd.DataFrame) else _table(samples)
    if frame.empty:
        return {}
    frame = frame.assign(copy=frame["copy"].fillna(0) if "copy" in frame else 0)
    if "left_out" not in frame:
        frame = with_judged_visits(undisturbed(frame))
    frame = frame[frame["copy"] == 0]
    matrix = block_matrix(frame)
    cells = list(matrix.log_s.columns)
    if not cells or matrix.log_s.empty:
        return {}
    if cells == [BASELINE]:
        alone = clustered_mean(matrix.log_s[BASELINE].to_numpy(), matrix.process)
        return {BASELINE: _relative(float(alone.half_width(_CONFIDENCE)), float(alone.df))}
    found = None
    codes = factor_columns(cells, factors)
    own = ~codes.isna().any(axis=1).to_numpy()
    if factors and own.any():
        order = np.lexsort(codes.to_numpy()[own].T)
        chosen = np.flatnonzero(own)[order]
        plan = contrasts(tuple(factors), tuple(tuple(int(v) for v in row) for row in codes.to_numpy()[chosen]))
        mains = plan.matrix[: len(factors)]
        if not np.isnan(mains).any():
            found = matrix.contrasts([cells[i] for i in chosen], mains)
            names = [term_name(t, factors) for t in plan.terms[: len(factors)]]
    if found is None and BASELINE in cells:
        names = [cell for cell in cells if cell != BASELINE]
        found = matrix.log_ratios(BASELINE, names)
    if found is None:  # neither the main effects nor a speed-up can be told, however long it takes
        return {}
    df = float(np.max(found.df))
    return {name: _relative(half, df) for name, half in zip(names, found.half_width(_CONFIDENCE), strict=True)}


def _table(samples: Sequence[SampleLine]) -> pd.DataFrame:
    names = ("cell", "copy", "block", "process", "latency_s", "disturbed")
    return pd.DataFrame({name: [getattr(sample, name) for sample in samples] for name in names})


def _relative(log_half_width: float, df: float) -> float:
    known = np.isfinite(log_half_width) and df >= _MIN_DF
    return float(np.expm1(log_half_width)) if known else float("inf")
