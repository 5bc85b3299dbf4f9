"""Estimates of contrasts and their standard errors from blocks nested in processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

Array = NDArray[np.float64]
_SPREAD, _MANY = 0.4, 24  # of the cells, and cells; an effect of a screen of nine in 64 is spread over 0.48 of them
_OWN_LEVEL = 0.10
_SURE_LEVEL = 0.008  # with two processes an effect that does not scatter stays undecided as often as this
_SHARED_DF = 0.5  # beside a single degree of freedom: Student's t falls from 12.7 to 6.2
_PROCESS_LEVEL = 0.25
_PRIOR_DF = 2
_STEPS = 30  # each may multiply the ratio by two and more
_AT_ONCE = 64  # clusters; a run of one machine has fewer
_FILLS, _FILLED = 500, 1e-12  # each leaves as much of the error as is missing of a cell in a process; of a logarithm


@dataclass(frozen=True)
class Estimates:
    """Contrasts, their standard errors and degrees of freedom, each (…, contrasts).

    Without an error estimate `se` is NaN and `df` 0; where nothing varies `se` is 0. `process_share` is the part of se²
    that differences between processes make, and that more blocks in the same ones leave as it is; 0 where no processes
    are compared, NaN where that is not told apart.
    """

    estimate: Array
    se: Array
    df: Array
    process_share: Array

    def at(self, where: slice) -> Estimates:
        """Those of some of the contrasts."""
        return Estimates(
            self.estimate[..., where], self.se[..., where], self.df[..., where], self.process_share[..., where]
        )

    def half_width(self, confidence: float) -> Array:
        """Half of each Student-t interval."""
        with np.errstate(invalid="ignore"):
            return np.where(self.se == 0, 0.0, special.stdtrit(self.df, (1 + confidence) / 2) * self.se)

    def p(self) -> Array:
        """Two-sided p of each contrast being nil; NaN where there is no error estimate or nothing varies."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(self.se > 0, 2 * special.stdtr(self.df, -np.abs(self.estimate) / self.se), np.nan)


def clustered(y: Array, process: NDArray[Any], contrasts: Array, widening: Array | float = 1.0) -> Estimates:
    """Estimates of `contrasts` (terms, cells) from blocks `y` (…, blocks, cells), clustered by process.

    `process` (blocks,) names the process of each block; with a single one the blocks are the clusters. Block
    effects (drift) leave with each block's mean. Every contrast sums to zero over the cells. A visit that is left out
    is NaN (see `completed`); each block holds more than half of the cells. Of no block estimates are NaN. `widening`
    (…): of the errors, for what was left out (see `outliers.widening`).

    The error is that of the classical analysis of variance of a randomized block design, contrast × process
    (Montgomery, chapter 4; Kalibera & Jones, Rigorous Benchmarking in Reasonable Time, 2013: replicate at the
    level where the variance lives). Two processes give one contrast a single degree of freedom and a useless
    interval, and a bootstrap over two clusters does not work at all. So variances are pooled as far as that is true:

    - A contrast with equal weights on all cells (an effect of a whole design), or about equal ones on many (of a
      screen): cells are in random order in a block, so their errors are independent of the factors, and every such
      contrast has the same variance, even where the cells' differ: signs vanish in the square. The mean square between
      clusters is pooled over the cells, with Satterthwaite's (1946) degrees of freedom for cells of unequal variance.
    - Any other (a ratio of two cells, a Shapley share) depends on how noisy just its cells are: it stands on its
      own scatter, between clusters and between the blocks of each (see `_alone`).

    A contrast of the first kind that scatters more between clusters than that (F test at 10 %: a switch whose worth
    itself depends on the process or the clock) stands on its own mean square between them and its few degrees of
    freedom (see `_shared`).
    """
    return Clustered(y, process).estimates(contrasts, widening)


class Clustered:
    """Blocks that are clustered by process, got ready once for all contrasts of their cells; see `clustered`."""

    def __init__(self, y: Array, process: NDArray[Any]) -> None:
        self._blocks, self._cells = y.shape[-2:]
        _, group, size = np.unique(process, return_inverse=True, return_counts=True)
        self._single = len(size) < 2
        if self._single:
            group, size = np.arange(self._blocks), np.ones(self._blocks, dtype=int)
        self._size = size
        self._counted = _Counted(y, group)
        y = _completed(y, group, self._counted)
        self._y = y - y.mean(axis=-1, keepdims=True)
        self._mean = self._y.mean(axis=-2) if self._blocks else np.full((*y.shape[:-2], self._cells), np.nan)
        means = _of_clusters(self._y, group, size)
        self._between = (means - self._mean[..., None, :]) * np.sqrt(size)[:, None]
        self._within = self._y - means[..., group, :]

    def estimates(self, contrasts: Array, widening: Array | float = 1.0) -> Estimates:
        """Of `contrasts` (terms, cells)."""
        size, counted, clusters = self._size, self._counted, len(self._size)
        estimate = self._mean @ contrasts.T
        nothing = np.zeros_like(estimate)
        if clusters < 2 or self._cells < 2:
            return Estimates(estimate, np.full_like(estimate, np.nan), nothing, nothing)
        between = _MeanSquares(self._between, counted.between, contrasts, clusters - 1)
        within = _MeanSquares(self._within, counted.within, contrasts) if self._blocks > clusters else None
        weight = np.abs(contrasts)
        equal = np.isclose(weight, weight.max(axis=1, keepdims=True)).all(axis=1) | _spread(weight)
        if self._cells == 2:  # its own is all there is
            usual, usual_df = _own(between, within)
        else:
            (shared, shared_df), (alone, alone_df) = _shared(between, self._cells), _alone(between, within)
            usual, usual_df = np.where(equal, shared, alone), np.where(equal, shared_df, alone_df)
        norm = (contrasts**2).sum(axis=1)
        share = nothing if self._single else _process_share(usual, within, equal)
        thinner = counted.thinner @ (contrasts**2).T / norm
        se = np.sqrt(usual * norm * _inflation(size) * thinner) / self._blocks
        return Estimates(estimate, np.asarray(widening)[..., None] * se, usual_df, share)


def completed(y: Array, process: NDArray[Any]) -> Array:
    """`y` (…, blocks, cells), each visit that is left out (NaN) as its block and its cell in that process tell it.

    By least squares, so that estimates are those of what is there (Yates, The Analysis of Replicated Experiments when
    the Field Results are Incomplete, 1933; Montgomery, section 4.1). What a process does not tell of a cell, the others
    do.
    """
    _, group = np.unique(process, return_inverse=True)
    return _completed(y, group, _Counted(y, group))


def replicated(y: list[Array], contrasts: Array) -> Estimates:
    """Estimates of `contrasts` (terms, cells) over independent replicates, `y` one array per cell.

    The error is the pooled variance within cells (Montgomery, section 6.2); without replicates there is none.
    """
    count = np.array([len(values) for values in y])
    estimate = contrasts @ np.array([values.mean() for values in y])
    df = int(count.sum()) - len(y)
    nothing = np.zeros_like(estimate)
    if not df:
        return Estimates(estimate, np.full_like(estimate, np.nan), nothing, nothing)
    within = sum(float(((values - values.mean()) ** 2).sum()) for values in y) / df
    se = np.sqrt(within * (contrasts**2 / count).sum(axis=1))
    return Estimates(estimate, se, np.full_like(estimate, df), nothing)


def clustered_mean(y: Array, process: NDArray[Any]) -> Estimates:
    """The mean of `y` (blocks,), its error clustered by process; scalars.

    What it holds of drift and of the process stays in it: nothing is pooled.
    """
    _, group, size = np.unique(process, return_inverse=True, return_counts=True)
    if len(size) < 2:
        group, size = np.arange(len(y)), np.ones(len(y), dtype=int)
    mean, blocks, df = y.mean(), len(y), len(size) - 1
    if not df:
        return Estimates(mean, np.array(np.nan), np.array(0), np.array(np.nan))
    deviation = np.bincount(group, y - mean) / size
    ms = (size * deviation**2).sum() / df
    return Estimates(mean, np.sqrt(ms * _inflation(size)) / blocks, np.array(df), np.array(np.nan))


def _shared(between: _MeanSquares, cells: int) -> tuple[Array, Array]:
    """The mean square between clusters pooled over all cells, and its degrees of freedom, for each contrast.

    Its own where it scatters more than the rest. With two processes that has a single degree of freedom. The rest then
    counts for half a degree beside it (Smyth 2004), unless it is beyond doubt that the contrast scatters more.
    """
    pooled, pooled_df = (of[..., None] for of in between.pooled())
    rest = np.maximum(pooled * (cells - 1) - between.own, 0) / (cells - 2)  # the pooled one holds the contrast's own
    rest_df = np.maximum(pooled_df * (cells - 2) / (cells - 1), between.df)
    with np.errstate(divide="ignore", invalid="ignore"):
        p = special.fdtrc(between.df, rest_df, between.own / rest)
    prior_df = np.where((between.df == 1) & (p >= _SURE_LEVEL), _SHARED_DF, 0.0)
    own = (between.own * between.df + rest * prior_df) / (between.df + prior_df)
    df = np.where(p < _OWN_LEVEL, between.df + prior_df, np.maximum(pooled_df, between.df))
    return np.where(p < _OWN_LEVEL, own, pooled), df


def _own(between: _MeanSquares, within: _MeanSquares | None) -> tuple[Array, Array]:
    """Each contrast's own mean square between clusters and its degrees of freedom.

    Where clusters agree by chance, that within: an interval is no narrower than if clusters did not differ.
    """
    own_df = np.full_like(between.own, between.df)
    if within is None:
        return between.own, own_df
    within_df = within.df[..., None]
    quantile_between, quantile_within = special.stdtrit(between.df, 0.975), special.stdtrit(within_df, 0.975)
    by_chance = quantile_between**2 * between.own < quantile_within**2 * within.own
    return np.where(by_chance, within.own, between.own), np.where(by_chance, within_df, own_df)


def _alone(between: _MeanSquares, within: _MeanSquares | None) -> tuple[Array, Array]:
    """Each contrast's own mean square between clusters, moderated by that within, and its degrees of freedom.

    What it scatters within clusters is a prior (Smyth, Linear Models and Empirical Bayes Methods, 2004), times as much
    as all cells scatter more between them (F test; where they do not, once). Of two ratios the larger counts: that of
    the sums over cells, and that which all cells have in common. The prior counts for two degrees of freedom and not
    for its many, as cells differ in how much more they scatter between processes.
    """
    if within is None:
        return between.own, np.full_like(between.own, between.df)
    cells = between.cells - 1
    together, unsure = _differ(between.over(within), between.df * cells, within.df * cells)
    (all_between, between_df), (all_within, within_df) = between.pooled(), within.pooled()
    with np.errstate(divide="ignore", invalid="ignore"):
        in_sum, unsure_in_sum = _differ(all_between / all_within, between_df, within_df)
    unsure = np.where(in_sum > together, unsure_in_sum, unsure)[..., None]
    ratio = np.fmax(in_sum, together)[..., None]
    prior_df = np.minimum(1 / (1 / within.df[..., None] + unsure), _PRIOR_DF)
    df = between.df + prior_df
    moderated = (between.own * between.df + ratio * within.own * prior_df) / df
    return moderated, np.broadcast_to(df, moderated.shape)


def _differ(ratio: Array, between_df: Array | int, within_df: Array | int) -> tuple[Array, Array]:
    """A ratio of mean squares where it is more than 1 (F test at 25 %), and 1 / df of it; else 1 and 0."""
    ratio = np.fmax(ratio, 1)
    differs = special.fdtrc(between_df, within_df, ratio) < _PROCESS_LEVEL
    return np.where(differs, ratio, 1), np.where(differs, 1 / between_df + 1 / within_df, 0)


def _process_share(usual: Array, within: _MeanSquares | None, equal: NDArray[np.bool_]) -> Array:
    """What of each contrast's mean square is more than that within processes, pooled over the cells where `equal`.

    All of it where no process has two blocks: then nothing tells the two apart.
    """
    if within is None:
        return np.ones_like(usual)
    of_blocks = np.where(equal, within.pooled()[0][..., None], within.own)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(usual > 0, np.clip(1 - of_blocks / usual, 0, 1), 0.0)


class _Counted:
    """How many visits and processes tell each cell of `y` (…, blocks, cells), NaN where one was left out.

    - `missing`: (…, blocks, cells); `empty`: (…, processes, cells) of which no visit is there
    - `between`, `within`: degrees of freedom, (…, cells)
    - `thinner`: by how much the variance of a cell's mean is larger for the processes without it, (…, cells)
    """

    def __init__(self, y: Array, group: NDArray[np.intp]) -> None:
        self.missing: NDArray[np.bool_] = np.isnan(y)
        size = np.bincount(group)
        visits = _of_clusters((~self.missing).astype(float), group, np.ones(len(size)))
        self.empty: NDArray[np.bool_] = visits == 0
        self.between: Array = (visits > 0).sum(axis=-2) - 1.0
        self.within: Array = (~self.missing).sum(axis=-2) - self.between - 1.0
        with np.errstate(divide="ignore", invalid="ignore"):  # of no block nothing is known
            self.thinner: Array = len(group) / (size.astype(float) @ ~self.empty)


class _MeanSquares:
    """Mean squares of deviations (…, rows, cells) with `df` degrees of freedom (…, cells): of cells, and of contrasts.

    `own`: of contrasts. `nominal`: the degrees of freedom that count for a test, where not the mean of `df`.
    """

    def __init__(self, deviation: Array, df: Array, contrasts: Array, nominal: int | None = None) -> None:
        self.df: Array = np.asarray(df.mean(axis=-1) if nominal is None else nominal, dtype=float)
        squares = (deviation**2).sum(axis=-2)
        with np.errstate(divide="ignore", invalid="ignore"):
            usual = squares.sum(axis=-1, keepdims=True) / df.sum(axis=-1, keepdims=True)
            self._cells = np.where(df > 0, squares / df, usual)
            self.own: Array = ((deviation @ contrasts.T) ** 2).sum(axis=-2) / (df @ (contrasts**2).T)

    def pooled(self) -> tuple[Array, Array]:
        """The mean square over all cells, whose block means are off, and its degrees of freedom."""
        cells = self._cells.shape[-1]
        return self._cells.sum(axis=-1) / (cells - 1), _satterthwaite(self._cells, self.df) * (cells - 1) / cells

    @property
    def cells(self) -> int:
        return int(self._cells.shape[-1])

    def over(self, within: _MeanSquares) -> Array:
        """How many times as large the mean squares are as those `within`, every cell counting alike.

        The likeliest ratio of cells that each have a variance of their own. A few loud cells do not hide it, as they
        do in a sum.
        """
        share, ratio = (self.df / (self.df + within.df))[..., None], np.ones(self._cells.shape[:-1])
        for _ in range(_STEPS):
            scaled = self._cells / ratio[..., None]
            total = share * scaled + (1 - share) * within._cells
            with np.errstate(divide="ignore", invalid="ignore"):
                ratio = ratio * np.where(total > 0, scaled / total, 1).mean(axis=-1)
        return ratio


def _spread(weight: Array) -> NDArray[np.bool_]:
    """Whether weights (contrasts, cells) are spread over so many cells that each cell's own variance hardly matters."""
    cells = weight.shape[1]
    squares = weight**2
    alike = squares.sum(axis=1) ** 2 / (squares**2).sum(axis=1)  # how many cells of equal weight would be as spread
    return (alike >= _SPREAD * cells) & (cells >= _MANY)


def _completed(y: Array, group: NDArray[np.intp], counted: _Counted) -> Array:
    some = counted.missing.any(axis=(-2, -1))
    if not some.any():
        return y
    part, missing, empty = y[some], counted.missing[some], counted.empty[some]
    size = np.bincount(group).astype(float)[:, None]
    ones = np.ones(len(size))
    share = np.where(empty, 0, size)
    with np.errstate(invalid="ignore"):  # NaN where no process tells a cell
        share = share / share.sum(axis=-2, keepdims=True)
    part = np.where(missing, np.nanmean(part, axis=-1, keepdims=True), part)
    for _ in range(_FILLS):
        level = part.mean(axis=-1, keepdims=True)
        cell = _of_clusters(part - level, group, ones) / size
        cell = np.where(empty, (share * cell).sum(axis=-2, keepdims=True), cell)
        cell -= cell.mean(axis=-1, keepdims=True)
        fill = (level + cell[..., group, :])[missing]
        change = np.abs(fill - part[missing]).max()
        part[missing] = fill
        if not change > _FILLED:
            break
    found = y.copy()
    found[some] = part
    return found


def _of_clusters(values: Array, group: NDArray[np.intp], size: NDArray[Any]) -> Array:
    """Sums of `values` (…, blocks, cells) over the blocks of each cluster, by its `size`: (…, clusters, cells).

    Some clusters at a time: a matrix of all of them by all blocks grows with the square of a run.
    """
    parts = []
    for start in range(0, len(size), _AT_ONCE):
        numbers = np.arange(start, min(start + _AT_ONCE, len(size)))
        here = slice(None) if len(size) <= _AT_ONCE else np.flatnonzero(np.isin(group, numbers))
        parts.append(((group[here] == numbers[:, None]) / size[numbers, None]) @ values[..., here, :])
    return np.concatenate(parts, axis=-2) if parts else values[..., :0, :]


def _inflation(size: NDArray[Any]) -> float:
    """The variance of a sum over blocks, in units of the mean square between clusters of `size` blocks.

    The number of blocks, where clusters are equal. Where they are not, the mean square holds less of the variance
    between clusters than the sum does, and this makes up for it (Searle, Casella & McCulloch, Variance Components,
    1992, section 3.6).
    """
    blocks = size.sum()
    per_cluster = (blocks - (size**2).sum() / blocks) / (len(size) - 1)
    return float((size**2).sum() / per_cluster)


def _satterthwaite(cell_ms: Array, df: Array) -> Array:
    """Degrees of freedom of the sum over the last axis of mean squares with `df` each.

    Satterthwaite, An Approximate Distribution of Estimates of Variance Components, 1946; the squares of the
    mean squares are corrected for their own variance, which matters for few degrees of freedom.
    """
    squares = (cell_ms**2).sum(axis=-1) * df / (df + 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        result = (df * cell_ms.sum(axis=-1) ** 2 - 2 * squares) / squares
    return np.clip(np.where(squares > 0, result, df), df, df * cell_ms.shape[-1])
