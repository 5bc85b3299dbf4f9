"""What the model fitted to a screen predicts, and how far it is from what was measured."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from qwen3bench.analysis.cell_table import Question, by_cell
from qwen3bench.analysis.contrasts import cell_label, every_cell, term_name
from qwen3bench.analysis.least_squares import LackOfFit, lack_of_fit


def model_shares(samples: pd.DataFrame, factors: Sequence[str]) -> dict[str, float]:
    """For each main effect and pair of a screen the share of its error's variance that interactions of three make.

    No more blocks make it smaller, but more cells. Empty of other designs.
    """
    factors = tuple(factors)
    table = by_cell(samples.dropna(subset=list(factors)), Question(factors))
    plan = table.plan
    if plan.fit is None:
        return {}
    known = np.flatnonzero(~np.isnan(plan.matrix).any(axis=1))
    whole = table.answers(plan.matrix[known]).se ** 2
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.nan_to_num(1 - table.estimates(plan.matrix[known], None).se ** 2 / whole)
    return {term_name(plan.terms[i], factors): float(share) for i, share in zip(known, shares, strict=True)}


def predictions(samples: pd.DataFrame, factors: Sequence[str], confidence: float = 0.95) -> pd.DataFrame:
    """Of a screen, each of the 2^k cells' speed-up over the baseline as its model predicts it, the fastest first.

    `samples`: as for `effects`, of latencies in blocks. Columns `cell` (its label), `speedup`, `lo`, `hi`; `se`, `df`
    of its logarithm. The error holds what interactions of three may do to that very cell. Empty where the model does
    not tell every term; without cells of switches that do not go together.
    """
    factors = tuple(factors)
    table = by_cell(samples, Question(factors))
    fit = table.plan.fit
    cells = [cell for cell in every_cell(len(factors)) if any(cell)]
    if fit is None or not fit.can_predict:
        return pd.DataFrame({name: [] for name in ("cell", "speedup", "lo", "hi", "se", "df")})
    cells = [cell for cell in cells if fit.allows(cell)]
    found = table.answers(fit.predicting(cells), fit.of_triples(cells))
    half = found.half_width(confidence)
    bounds = {"speedup": -found.estimate, "lo": -found.estimate - half, "hi": -found.estimate + half}
    labels = [cell_label(cell, factors) for cell in cells]
    result = pd.DataFrame({"cell": labels, **{name: np.exp(values) for name, values in bounds.items()}})
    result["se"], result["df"] = found.se, found.df
    return result.sort_values("speedup", ascending=False, kind="stable", ignore_index=True)


def predicted_steps(samples: pd.DataFrame, factors: Sequence[str], confidence: float = 0.95) -> pd.DataFrame:
    """Of a screen, what its model says that switching one factor on is worth, from each cell that is without it.

    `samples`: as for `predictions`. Columns `cell` (the label of the one without), `factor`, `estimate` (times as
    fast), `lo`, `hi`. Empty where `predictions` is; without steps to or from cells of switches that do not go together.
    """
    factors = tuple(factors)
    table = by_cell(samples, Question(factors))
    fit = table.plan.fit
    if fit is None or not fit.can_predict:
        return pd.DataFrame({name: [] for name in ("cell", "factor", "estimate", "lo", "hi")})
    allowed = [cell for cell in every_cell(len(factors)) if fit.allows(cell)]
    steps = [
        (off, on, i)
        for off in allowed
        for i in range(len(factors))
        if not off[i] and fit.allows(on := (*off[:i], 1, *off[i + 1 :]))
    ]
    offs, ons = [off for off, _, _ in steps], [on for _, on, _ in steps]
    contrast = fit.predicting(ons) - fit.predicting(offs)
    truth = fit.of_triples(ons) - fit.of_triples(offs)
    found = table.answers(contrast, truth)
    half = found.half_width(confidence)
    bounds = {"estimate": -found.estimate, "lo": -found.estimate - half, "hi": -found.estimate + half}
    return pd.DataFrame(
        {
            "cell": [cell_label(off, factors) for off in offs],
            "factor": [factors[i] for _, _, i in steps],
            **{name: np.exp(values) for name, values in bounds.items()},
        }
    )


def left_over(samples: pd.DataFrame, factors: Sequence[str]) -> LackOfFit | None:
    """How far the latencies of a screen are from its model of main effects and pairs; None of other designs."""
    factors = tuple(factors)
    table = by_cell(samples, Question(factors))
    fit = table.plan.fit
    if fit is None:
        return None
    return lack_of_fit(fit, table.estimates(fit.told, None), table.estimates(fit.left_over, None))
