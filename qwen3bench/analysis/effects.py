"""Main effects, interactions and Shapley shares with their intervals and verdicts."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from qwen3bench.analysis.contrasts import (
    ALLOWED_FOR,
    WHOLE,
    cell_label,
    contrasts,
    every_cell,
    shapley_contrasts,
    term_name,
)
from qwen3bench.analysis.frames import counted_visits, judged_rows
from qwen3bench.analysis.least_squares import Fit, LackOfFit, lack_of_fit, with_model_error
from qwen3bench.analysis.significance import OF_BYTES, OF_TIMES, Gains, holm, verdicts
from qwen3bench.analysis.variance import Estimates, clustered, replicated
from qwen3bench.errors import UserError

_MAX_FACTORS = 12  # 4,095 terms
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

    `same`: the interval lies inside ±`band` (for `log=False` a fraction of the baseline's value);
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
    table = _by_cell(samples, _Question(factors, value, block, process, log))
    asked = _asked(factors, table.cells)
    decimals = (12 if log else 3) if exact else None  # bytes are whole; a logarithm is not
    where = np.array([row.contrast is not None for row in asked])
    found = _estimated(table, [row for row in asked if row.contrast is not None], decimals)
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
    is_time = _is_time(value)
    if log:
        with np.errstate(over="ignore"):
            frame["estimate"], frame["lo"], frame["hi"] = np.exp(-estimate), np.exp(-hi), np.exp(-lo)
        gain, gain_lo, gain_hi = (frame[c].to_numpy() - 1 for c in ("estimate", "lo", "hi"))
    else:
        frame["estimate"], frame["lo"], frame["hi"] = estimate, lo, hi
        gain, gain_lo, gain_hi = -estimate, -hi, -lo
        band *= abs(table.baseline)
    gains = Gains(gain, gain_lo, gain_hi, frame["p_holm"])
    frame["verdict"] = verdicts(gains, band, OF_TIMES if is_time else OF_BYTES)
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
    table = _by_cell(
        samples.dropna(subset=list(factors)), _Question(factors, "latency_s", "block", "process", log=True)
    )
    plan = contrasts(factors, table.cells)
    known = np.flatnonzero(~np.isnan(plan.matrix).any(axis=1))
    shares = table.estimates(plan.matrix[known], None).process_share
    return {term_name(plan.terms[i], factors): float(share) for i, share in zip(known, shares, strict=True)}


def model_shares(samples: pd.DataFrame, factors: Sequence[str]) -> dict[str, float]:
    """For each main effect and pair of a screen the share of its error's variance that interactions of three make.

    No more blocks make it smaller, but more cells. Empty of other designs.
    """
    factors = tuple(factors)
    table = _by_cell(
        samples.dropna(subset=list(factors)), _Question(factors, "latency_s", "block", "process", log=True)
    )
    plan = contrasts(factors, table.cells)
    if plan.fit is None:
        return {}
    known = np.flatnonzero(~np.isnan(plan.matrix).any(axis=1))
    whole = _estimated(table, [_Row("", "", "", plan.matrix[i]) for i in known], None).se ** 2
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
    table = _by_cell(samples, _Question(factors, "latency_s", "block", "process", log=True))
    fit = contrasts(factors, table.cells).fit
    cells = [cell for cell in every_cell(len(factors)) if any(cell)]
    if fit is None or not fit.can_predict:
        return pd.DataFrame({name: [] for name in ("cell", "speedup", "lo", "hi", "se", "df")})
    cells = [cell for cell in cells if fit.allows(cell)]
    rows = [
        _Row("", "", "", row, truth) for row, truth in zip(fit.predicting(cells), fit.of_triples(cells), strict=True)
    ]
    found = _estimated(table, rows, None)
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
    table = _by_cell(samples, _Question(factors, "latency_s", "block", "process", log=True))
    fit = contrasts(factors, table.cells).fit
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
    found = _estimated(table, [_Row("", "", "", *pair) for pair in zip(contrast, truth, strict=True)], None)
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
    table = _by_cell(samples, _Question(factors, "latency_s", "block", "process", log=True))
    fit = contrasts(factors, table.cells).fit
    if fit is None:
        return None
    return lack_of_fit(fit, table.estimates(fit.told, None), table.estimates(fit.left_over, None))


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


def _estimated(table: _Table, rows: Sequence[_Row], decimals: int | None) -> Estimates:
    """The estimates of rows that have a contrast; of a model with what it does not describe as an error."""
    matrix = np.array([row.contrast for row in rows]).reshape(len(rows), len(table.cells))
    fit = contrasts(table.factors, table.cells).fit
    if fit is None:
        return table.estimates(matrix, decimals)
    everything = table.estimates(np.vstack([matrix, fit.told, fit.left_over]), decimals)
    ends = len(rows), len(rows) + len(fit.told)
    found, terms, left = (everything.at(slice(*part)) for part in ((0, ends[0]), ends, (ends[1], None)))
    no_triples = np.zeros(fit.triples.shape[1])
    truth = np.array([no_triples if row.truth is None else row.truth for row in rows]).reshape(
        len(rows), len(no_triples)
    )
    return with_model_error(found, matrix, truth, fit, lack_of_fit(fit, terms, left))


@dataclass(frozen=True)
class _Question:
    """Of which factors' effects on which column is asked; the columns of blocks and of their processes."""

    factors: tuple[str, ...]
    value: str
    block: str | None
    process: str | None
    log: bool


@dataclass(frozen=True)
class _Table:
    """Values by cell: `y` (blocks, cells) with each block's `process`, or without blocks each cell's replicates.

    `y` is NaN where a visit was left out; `widening`: of errors, for that.
    """

    factors: tuple[str, ...]
    cells: tuple[tuple[int, ...], ...]
    y: NDArray[np.float64] | None
    process: NDArray[Any]
    replicates: list[NDArray[np.float64]]
    widening: float = 1.0

    @property
    def baseline(self) -> float:
        scale = self._scale()
        values = self.replicates if self.y is None else self.y.T
        means = [np.nanmean(of_cell / scale) for of_cell in values]
        off = [m for cell, m in zip(self.cells, means, strict=True) if not any(cell)]
        return float(off[0] if off else np.mean(means)) * scale

    @property
    def no_error(self) -> str:
        return "no interval: one block" if self.y is not None else "no interval: no replicates"

    def _scale(self) -> float:
        """A power of two near the largest value: divided by it no square overflows, and no digit changes."""
        values = np.concatenate(self.replicates) if self.y is None else self.y
        _, exponent = np.frexp(np.nanmax(np.abs(values)))
        return float(np.ldexp(1.0, int(np.clip(exponent - 1, -1000, 1000))))

    def estimates(self, matrix: NDArray[np.float64], decimals: int | None) -> Estimates:
        """With their errors, or rounded to so many decimals and exact."""
        scale = self._scale()
        if self.y is None:
            found = replicated([values / scale for values in self.replicates], matrix)
        else:
            found = clustered(self.y / scale, self.process, matrix, self.widening)
        with np.errstate(over="ignore"):
            found = replace(found, estimate=found.estimate * scale, se=found.se * scale)
        if decimals is None:
            return found
        estimate = np.round(found.estimate, decimals) + 0.0  # no −0; weights such as 1/5 leave crumbs
        nothing = np.zeros_like(found.estimate)
        return Estimates(estimate, nothing, nothing, nothing)


def _checked(samples: pd.DataFrame, asked: _Question) -> pd.DataFrame:
    """The rows that count. Raises `UserError` where they cannot answer."""
    factors, value, block, log = asked.factors, asked.value, asked.block, asked.log
    if not factors or len(set(factors)) < len(factors):
        raise UserError(f"factors must be one or more different column names, not {list(factors)}")
    if len(factors) > _MAX_FACTORS:
        raise UserError(f"{len(factors)} factors have 2^{len(factors)} terms; ask for at most {_MAX_FACTORS}")
    absent = [c for c in (*factors, value, *([block] if block else [])) if c not in samples]
    if absent:
        raise UserError(f"the samples have no column {', '.join(absent)}; they have {', '.join(map(str, samples))}")
    for column in ("workload", "runtime"):
        if column in samples and samples[column].nunique() > 1:
            raise UserError(f"the samples mix several {column}s; select one before asking for effects")
    rows = samples
    if "copy" in rows:
        rows = rows[rows["copy"].fillna(0) == 0]
    needed = [*factors, value, *([block] if block else [])]
    rows, before = rows.dropna(subset=needed), rows
    if rows.empty:
        raise UserError(
            f"no sample has a {value}" if before[value].isna().all() else f"no sample has all of {', '.join(needed)}"
        )
    if len(rows) < len(before):
        lacking = ", ".join(f"{int(before[c].isna().sum())} have no {c}" for c in needed if before[c].isna().any())
        warnings.warn(f"of {len(before)} samples {lacking}; they are left out", stacklevel=4)
    if not np.isin(rows[list(factors)].to_numpy(), (0, 1)).all():
        raise UserError(f"the columns {', '.join(factors)} must hold 0 and 1 alone")
    try:
        values = rows[value].to_numpy(dtype=float)
    except (OverflowError, TypeError, ValueError) as error:
        raise UserError(f"{value} must hold numbers that a float can hold ({error})") from error
    if not np.isfinite(values).all() or (log and (values <= 0).any()):
        raise UserError(f"{value} must be finite{' and above zero to take its logarithm' if log else ''}")
    return rows


def _by_cell(samples: pd.DataFrame, asked: _Question) -> _Table:
    rows = _checked(samples, asked)
    factors, value, block, process, log = asked.factors, asked.value, asked.block, asked.process, asked.log
    code = rows[list(factors)].to_numpy(dtype=np.int64) @ (1 << np.arange(len(factors)))
    values = rows[value].to_numpy(dtype=float)
    cell = every_cell(len(factors))
    if block is None:
        values = np.log(values) if log else values
        present = np.unique(code)
        replicates = [values[code == c] for c in present]
        return _Table(factors, tuple(cell[c] for c in present), None, np.empty(0), replicates)
    keys = [pd.Series(rows[block].to_numpy(), name="block"), pd.Series(code, name="cell")]
    visits = pd.Series(values).groupby(keys).median().unstack()
    visits = visits.loc[:, visits.notna().mean() >= 0.5]  # a cell that most blocks lack is a missing cell
    visits = visits.dropna()
    if visits.empty:
        raise UserError("no block holds every cell; there is nothing to compare within a block")
    if process is not None and process in rows:
        names = rows.groupby(block)[process].first().fillna(-1)
    else:
        names = pd.Series(0, visits.index)
    table = visits.apply(np.log) if log else visits
    widened = 1.0
    if _is_time(value):
        table, widened = counted_visits(table, _judged(rows, visits, keys, names), keys)
        if table.empty:
            raise UserError("other work slowed most visits; there is nothing to compare within a block")
    cells = tuple(cell[c] for c in table.columns.to_numpy())
    return _Table(factors, cells, table.to_numpy(), names.loc[table.index].to_numpy(), [], widened)


def _judged(
    rows: pd.DataFrame, visits: pd.DataFrame, keys: list[pd.Series[Any]], names: pd.Series[Any]
) -> pd.DataFrame:
    """`left_out` and `excess` of each row, which is in the block and cell `keys`; `names`: each block's process."""
    if "left_out" in rows:
        told = rows[["left_out", "excess"]].reset_index(drop=True)
        return told.assign(left_out=told["left_out"].astype("boolean").fillna(False).astype(bool))
    if not (visits.to_numpy() > 0).all():
        return pd.DataFrame({"left_out": False, "excess": 0.0}, index=range(len(rows)))
    return judged_rows(visits.apply(np.log), names.loc[visits.index].to_numpy(), keys)


def _is_time(value: str) -> bool:
    return value.endswith("_s") and not value.endswith("_per_s")


def _join(first: str, second: str) -> str:
    return f"{first}; {second}" if first else second
