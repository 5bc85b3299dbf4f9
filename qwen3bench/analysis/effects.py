"""Main effects, interactions and Shapley shares with their intervals and verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from qwen3bench.analysis.cell_table import Question, by_cell, is_time
from qwen3bench.analysis.contrasts import (
    ALLOWED_FOR,
    OTHERS_ON,
    WHOLE,
    contrasts,
    every_cell,
    shapley_contrasts,
    term_name,
)
from qwen3bench.analysis.least_squares import Fit
from qwen3bench.analysis.significance import OF_BYTES, OF_TIMES, Gains, holm, verdicts
from qwen3bench.errors import UserError

COLUMNS = ["term", "kind", "estimate", "lo", "hi", "p_holm", "verdict", "reason", "p", "df"]


def effects(
    samples: pd.DataFrame,
    factors: Sequence[str],
    value: str = "latency_s",
    block: str | None = None,
    log: bool = True,
    *,
    process: str | None = "process",
    band: float = 0.01,
    confidence: float = 0.95,
    exact: bool = False,
) -> pd.DataFrame:
    """All effects, 2^k − 1 of a whole design, and the k Shapley shares of `value`, with intervals and verdicts.

    Where cells are missing of more than five factors, interactions of three and more that cannot be told have no row.

    `samples`: long form, one 0/1 column per factor; several values of one cell in one block (a visit's
    repeats) count as their median; rows of a second copy of the baseline (`copy` = 1) do not count. Returns
    one row per term: `term`, `kind` (main, interaction, shapley), `estimate`, `lo`, `hi`, `p_holm`,
    `verdict`, `reason` (why a row is empty, or what it takes for granted), `p`, `df`. Of a screen, fewer than all cells
    of more than five factors: main effects, pairs and Shapley shares of the model fitted to them; of kind `alone` and
    `last` what that model says a factor is worth beside none and beside all others; of kind `aliased` (`a:b = c:d`) the
    sum of terms that no cell tells apart. Their intervals hold what interactions of three, as far as seen, may do.

    The estimate is the textbook effect E = contrast / 2^(k−1), on − off (Montgomery, Design and Analysis of
    Experiments, chapter 6); where cells are missing, what `contrasts.contrasts` can tell, as `reason` says.
    `log=True`: of log(value), published as exp(−E), so that above 1 is faster; Shapley shares likewise, their
    product is all-on against baseline. `log=False`: E itself, in the unit of `value`.

    `block` names the column of blocks; within them the column `process`, where there is one, gives the
    clusters of the intervals (see `variance.clustered`). Blocks that lack a cell are left out. Of times, so are visits
    that other work slowed: by the column `left_out`, as a run's samples have it, else as `outliers.judged` tells it
    of these. `block=None`: independent replicates, and all of them count. `exact=True`: values without error, such as
    counted bytes; lo and hi are then the estimate, and p is empty.

    `same`: the interval lies inside ±`band` (for `log=False` a fraction of the baseline's value, or of the cell
    that lacks the factor alone where that is told with the others on);
    `faster`/`slower` (`less`/`more` where `value` is no time) with Holm's p < 0.05, over the main effects, over the
    interactions of each order, or over the shares; else `undecided`.

    Warns of rows that lack a value, a block or the level of a factor, and leaves them out. Raises `UserError` where
    columns are missing, samples of several workloads or runtimes are mixed, a logarithm is impossible, or `band` or
    `confidence` is no fraction.
    """
    factors = tuple(factors)
    if not 0 < confidence < 1:
        raise UserError(f"confidence={confidence} must lie between 0 and 1; 0.95 is 95 %")
    if not 0 <= band < 1:
        raise UserError(f"band={band} must be a fraction from 0 to below 1; 0.01 is ±1 %")
    table = by_cell(samples, Question(factors, value, block, process, log))
    asked = _asked(factors, table.cells)
    decimals = (12 if log else 3) if exact else None  # bytes are whole; a logarithm is not
    where = np.array([row.contrast is not None for row in asked])
    told = [(row.contrast, row.truth) for row in asked if row.contrast is not None]
    found = table.answers((contrast for contrast, _ in told), (truth for _, truth in told), decimals)
    frame = pd.DataFrame({name: [getattr(row, name) for row in asked] for name in ("term", "kind", "reason")})
    spread = np.full((5, len(frame)), np.nan)  # estimate, lo, hi, p, df
    half = found.half_width(confidence)
    e = found.estimate
    spread[:, where] = e, e - half, e + half, found.p(), np.where(found.df > 0, found.df, np.nan)
    estimate, lo, hi, p, df = spread
    frame["p"], frame["df"] = p, df
    of_term = frame["kind"].isin(["main", "interaction"])
    families = np.where(of_term, order_of(frame["term"]).astype(str), frame["kind"])
    frame["p_holm"] = frame["p"].groupby(families).transform(lambda of_family: holm(of_family.to_numpy()))
    if log:
        with np.errstate(over="ignore"):
            frame["estimate"], frame["lo"], frame["hi"] = np.exp(-estimate), np.exp(-hi), np.exp(-lo)
        gain, gain_lo, gain_hi = (frame[c].to_numpy() - 1 for c in ("estimate", "lo", "hi"))
        beside = np.ones(len(frame))
    else:
        frame["estimate"], frame["lo"], frame["hi"] = estimate, lo, hi
        gain, gain_lo, gain_hi = -estimate, -hi, -lo
        means, baseline = table.means, abs(table.baseline)
        without = [row.contrast if row.reason.startswith(OTHERS_ON) else None for row in asked]
        beside = np.array([baseline if each is None else abs(np.minimum(each, 0) @ means) for each in without])
    gains = Gains(gain, gain_lo, gain_hi, frame["p_holm"])
    frame["verdict"] = verdicts(gains, band * beside, OF_TIMES if is_time(value) else OF_BYTES)
    no_error = np.zeros(len(frame), dtype=bool)
    no_error[where] = np.isnan(found.se)
    too_large = where & ~no_error & ~np.isfinite(frame[["estimate", "lo", "hi"]].to_numpy()).all(axis=1)
    for rows, why in ((no_error, table.no_error), (too_large, "beyond the largest number that a float holds")):
        frame.loc[rows, "reason"] = [_join(r, why) for r in frame.loc[rows, "reason"]]
    return frame[COLUMNS]


def order_of(term: pd.Series) -> pd.Series:
    """How many factors each term has: 1 for `flash`, 2 for `flash:mask`."""
    return term.str.count(":") + 1


def process_shares(samples: pd.DataFrame, factors: Sequence[str]) -> dict[str, float]:
    """For each main effect and interaction on latency the share of its error's variance that processes make.

    Of `effects` with the column `process` within `block`; see `variance.Estimates`. Other implementations do not count.
    """
    factors = tuple(factors)
    table = by_cell(samples.dropna(subset=list(factors)), Question(factors))
    plan = table.plan
    known = np.flatnonzero(~np.isnan(plan.matrix).any(axis=1))
    shares = table.estimates(plan.matrix[known], None).process_share
    return {term_name(plan.terms[i], factors): float(share) for i, share in zip(known, shares, strict=True)}


@dataclass(frozen=True)
class _Row:
    """What one row is of, and the contrast that tells it; `truth`: what each interaction of three adds to it."""

    term: str
    kind: str
    reason: str
    contrast: NDArray[np.float64] | None
    truth: NDArray[np.float64] | None = None


def _asked(factors: tuple[str, ...], cells: tuple[tuple[int, ...], ...]) -> list[_Row]:
    """The rows of `effects`: main effects and pairs, told or not, and what else can be told."""
    k = len(factors)
    plan = contrasts(factors, cells)
    rows = [
        _Row(
            term_name(term, factors),
            "main" if len(term) == 1 else "interaction",
            reason,
            None if np.isnan(row).any() else row,
        )
        for term, row, reason in zip(plan.terms, plan.matrix, plan.reasons, strict=True)
        if k <= WHOLE or len(term) <= 2 or not np.isnan(row).any()
    ]
    if plan.aliased is not None:
        rows += [_Row(name, "aliased", "", row) for name, row in zip(plan.alias_names, plan.aliased, strict=True)]
    if len(cells) == 2**k:
        return rows + [_Row(f, "shapley", "", row) for f, row in zip(factors, shapley_contrasts(k), strict=True)]
    if plan.fit is None or not plan.fit.tells_every_term:
        reason = "undefined: cells are missing, and none is made up"
        return rows + [_Row(factor, "shapley", reason, None) for factor in factors]
    return rows + _of_model(factors, plan.fit)


def _of_model(factors: tuple[str, ...], fit: Fit) -> list[_Row]:
    """Shapley shares, and what each factor is worth beside none and beside all others, as the model has them."""
    k = len(factors)
    reason = f"of the model fitted to {len(fit.cells)} of {2**k} cells, {ALLOWED_FOR}"
    cells = every_cell(k)
    logs, triples = fit.predicting(cells), fit.of_triples(cells)
    whole = 2**k - 1
    weights = {
        "shapley": shapley_contrasts(k),
        "alone": np.array([[float(code == 1 << i) for code in range(2**k)] for i in range(k)]),
        "last": np.array(
            [[float(code == whole) - float(code == whole - (1 << i)) for code in range(2**k)] for i in range(k)]
        ),
    }
    return [
        _Row(factor, kind, reason, of_factor @ logs, of_factor @ triples)
        for kind, of_factors in weights.items()
        for factor, of_factor in zip(factors, of_factors, strict=True)
    ]


def _join(first: str, second: str) -> str:
    return f"{first}; {second}" if first else second
