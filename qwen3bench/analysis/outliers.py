"""Which visits other work on the machine slowed, told from the blocks themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Group = NDArray[np.intp]
_FALSE = 0.005  # of quiet runs, the share that loses a visit; with 0.05 a cell thrice as noisy as the others loses many
_MAD = 1.4826  # a normal distribution's standard deviation over its median absolute deviation
_MAD_EFFICIENCY = 0.37  # of that median, beside a standard deviation (Huber, section 5.1)
_LEAST = 0.001  # in log latency: a visit slower by less is never left out; a tenth of what is called `same`
_PRIOR = 4.0  # at most so many values does the scale of all cells count for beside a cell's own
_LOUD = 1e-5  # by chance fewer cells than that lose so many visits more than the others
_QUIET_SHARE = 8  # one cell in eight may be loud without making the others look disturbed
_AGREEING = 3  # visits of a cell in a process that are slow alike; two may be by chance
_CHANCE = 0.01  # that disturbance alone makes as many groups of such visits
_ROUNDS = 30  # five or six suffice
_PASSES = 3  # over blocks and cells, in each round
_WINDOW = 0.15  # on both sides of the limit; narrower holds too few visits, wider blurs a peak
_FEWEST = 2  # visits that tell a cell of which others were left out


@dataclass(frozen=True)
class JudgedVisits:
    """Which visits count, and how slow each one is; both (…, blocks, cells).

    `excess`: the residual from block and cell over the limit from which a visit is left out.
    """

    counts: Mask
    excess: Array


def judged(y: Array, process: NDArray[Any]) -> JudgedVisits:
    """Visits `y` (…, blocks, cells; log latency, complete) that count, and those that other work slowed.

    `process` (blocks,) names each block's process. Of fewer than three cells all count: of two that are apart
    nothing tells which was slowed. Of two blocks all count, and where what is left would tell of no two cells.

    Other work only ever slows. So a visit is left out where its residual is too many robust deviations above zero, and
    never for being fast: the identifier of Hampel (Davies & Gather, The Identification of Multiple Outliers, 1993),
    one-sided and repeated. Residuals are what block and cell leave: lower medians and means of the visits that count,
    from lower medians of all on. The deviation is the median absolute one of the residuals below zero, which no slow
    visit is among, pooled over all cells. One of 200 quiet runs loses a visit: the limit is a quantile of Student's t,
    with as many degrees of freedom as such a median is worth. With 32 cells in six blocks it is 4.8 deviations.

    - A cell may be louder than the others. Its own deviation below zero counts where it is larger, drawn to the pooled
      one (Smyth, 2004); one that loses far more visits than the others keeps them all (binomial test).
    - Where most visits of a cell in a process would be left out, and at least three are slow alike, that is what the
      cell is worth there, as with a kernel chosen otherwise. They count, unless so many visits are slow that chance
      makes such groups.
    """
    y = np.asarray(y, dtype=float)
    flat = y.reshape(-1, *y.shape[-2:])
    if flat.shape[-1] < 3 or flat.shape[-2] <= _FEWEST:
        return JudgedVisits(np.ones(y.shape, dtype=bool), np.zeros(y.shape))
    fit = _Fit.first(flat)
    counts, _ = _settled(fit, fit.residual <= fit.limit(np.ones(flat.shape, dtype=bool), own=False), own=False)
    counts, excess = _settled(fit, counts | _loud(counts), own=True, spared=_loud(counts))
    _, group = np.unique(process, return_inverse=True)
    counts |= _consistent(counts, excess, group, whole=True) | _consistent(counts, excess, group, whole=False)
    for mine, beyond in zip(counts, excess, strict=True):
        blocks, cells = telling(mine)
        if not blocks.any() or cells.sum() < 2:
            mine[:], beyond[:] = True, 0.0
    return JudgedVisits(counts.reshape(y.shape), excess.reshape(y.shape))


def widening(excess: Array) -> Array:
    """By how much leaving visits out at a limit widens the error of what is left; (…).

    The limit moves with the estimate: where visits lie dense around it, those let in by a higher estimate raise it
    further. Of an M-estimator with such a limit the variance is E ψ² / (E ψ')² (Huber, section 3.2), and E ψ' is the
    share of visits inside less the limit times the density there. At most two.
    """
    density = (np.abs(excess - 1) < _WINDOW).mean(axis=(-2, -1)) / (2 * _WINDOW)
    inside = (excess <= 1).mean(axis=(-2, -1))
    with np.errstate(invalid="ignore"):
        return np.where(inside > 0, inside / np.maximum(inside - density, inside / 2), 1.0)


def telling(counts: Mask) -> tuple[Mask, Mask]:
    """Of `counts` (blocks, cells) the blocks that tell something, and the cells.

    A block of which more than half of the cells count shares one with every other such block, so that all cells can be
    compared. A cell of which visits are left out needs two others.
    """
    cells = counts.all(axis=0) | (counts.sum(axis=0) >= _FEWEST)
    blocks = 2 * counts[:, cells].sum(axis=1) > cells.sum()
    inside = counts[blocks]
    return blocks, cells & (inside.any(axis=0)) & (inside.all(axis=0) | (inside.sum(axis=0) >= _FEWEST))


@dataclass
class _Fit:
    """Blocks (…, blocks, 1) and cells (…, 1, cells) of `y`."""

    y: Array
    block: Array
    cell: Array

    @classmethod
    def first(cls, y: Array) -> _Fit:
        """By lower medians, which a third of slow visits does not move."""
        fit = cls(y, np.zeros((*y.shape[:-1], 1)), np.zeros((len(y), 1, y.shape[-1])))
        for _ in range(2):
            fit.block += _lower_median(fit.residual, -1)
            fit.cell += _lower_median(fit.residual, -2)
        return fit

    @property
    def residual(self) -> Array:
        return self.y - self.block - self.cell

    def part(self, which: Mask) -> _Fit:
        return _Fit(self.y[which], self.block[which], self.cell[which])

    def refit(self, counts: Mask) -> None:
        """Cells as means of the visits that count, blocks as lower medians, which one fast visit does not move."""
        of_cell = np.maximum(counts.sum(axis=-2, keepdims=True), 1)
        middle = (np.maximum(counts.sum(axis=-1, keepdims=True), 1) - 1) // 2
        for _ in range(_PASSES):
            ordered = np.sort(np.where(counts, self.residual, np.inf), axis=-1)
            level = np.take_along_axis(ordered, middle, axis=-1)
            self.block += np.where(np.isfinite(level), level, 0)
            self.cell += (counts * self.residual).sum(axis=-2, keepdims=True) / of_cell

    def limit(self, counts: Mask, own: bool) -> Array:
        """From which residual a visit is left out (…, 1, cells); `own`: where cells differ, each by its own."""
        residual = self.residual
        blocks, cells = residual.shape[-2:]
        below = residual < 0
        inside = counts.sum(axis=(-2, -1))
        df = np.maximum(inside - blocks - cells + 1, 1)
        size = np.where(below, -residual, np.inf).reshape(len(residual), -1)
        size.sort(axis=-1)
        number = np.maximum(below.sum(axis=(-2, -1)), 1)
        rows = np.arange(len(size))
        middle = (size[rows, (number - 1) // 2] + size[rows, number // 2]) / 2
        scale = _MAD * np.where(np.isfinite(middle), middle, 0) * np.sqrt(inside / df)
        freedom = np.maximum(_MAD_EFFICIENCY * df / 2, 1)  # half of the residuals are below zero
        deviations = -special.stdtrit(freedom, _FALSE / (blocks * cells))
        of_cell = _moderated(residual, below, scale) if own else scale[:, None]
        limit: Array = np.maximum(deviations[:, None] * of_cell, _LEAST)[:, None, :]
        return limit


def _settled(fit: _Fit, counts: Mask, own: bool, spared: Mask | bool = False) -> tuple[Mask, Array]:
    """Which visits count once leaving out and fitting again changes nothing, and their excess; `fit` is then theirs.

    `spared` (…, 1, cells) always count.
    """
    counts, excess = counts.copy(), np.zeros(counts.shape)
    spared = np.broadcast_to(spared, (len(counts), 1, counts.shape[-1]))
    going, part, now = np.arange(len(counts)), fit, counts.copy()
    for _ in range(_ROUNDS):
        part.refit(now)
        there = np.where(spared[going], 0, part.residual / part.limit(now, own))
        new = there <= 1
        counts[going], excess[going] = new, there
        fit.block[going], fit.cell[going] = part.block, part.cell
        changed = (new != now).any(axis=(-2, -1))
        if not changed.any():
            break
        going, now, part = going[changed], new[changed], part.part(changed)
    return counts, excess


def _moderated(residual: Array, below: Mask, scale: Array) -> Array:
    """Each cell's own scale (…, cells) from its residuals below zero, drawn to that of all; no smaller than it.

    The more the cells' variances differ, the less that of all counts (Smyth, Linear Models and Empirical Bayes Methods,
    2004); trigamma(x) is taken for 1/x + 1/(2x²).
    """
    number, squares = below.sum(axis=-2), (np.where(below, residual, 0) ** 2).sum(axis=-2)
    known = (number > 1) & (squares > 0)
    half = np.where(known, number, 2) / 2
    log = np.log(np.where(known, squares / (2 * half), 1)) - special.digamma(half) + np.log(half)
    cells = np.maximum(known.sum(axis=-1, keepdims=True), 2)
    mean = (log * known).sum(axis=-1, keepdims=True) / cells
    unlike = (((log - mean) ** 2 - special.polygamma(1, half)) * known).sum(axis=-1, keepdims=True) / (cells - 1)
    unlike = np.maximum(unlike, 1e-9)
    prior = np.minimum((1 + np.sqrt(1 + 2 * unlike)) / unlike, _PRIOR)
    return np.maximum(np.sqrt((prior * scale[:, None] ** 2 + squares) / (prior + number)), scale[:, None])


def _loud(counts: Mask) -> Mask:
    """Cells (…, 1, cells) that lose so many more visits than the others that it is not what slows these."""
    out = (~counts).sum(axis=-2)
    blocks, cells = counts.shape[-2:]
    others = np.sort(out, axis=-1)[:, : cells - -(-cells // _QUIET_SHARE)]
    share = (others.sum(axis=-1) + 0.5) / (others.shape[-1] * blocks + 1)
    p = special.bdtrc(out - 1.0, blocks, share[:, None])
    return ((p < _LOUD) & (out > 0))[:, None, :]


def _consistent(counts: Mask, excess: Array, group: Group, whole: bool) -> Mask:
    """Left-out visits that are as slow as most of their cell in their process, where chance makes no such groups.

    `whole`: in processes of which the cell has lost all visits, else in those of which it has lost most.
    """
    found = np.zeros_like(counts)
    share = 1 - counts.mean(axis=(-2, -1))
    by_chance, groups = np.full(len(counts), 1e-300), np.zeros(len(counts))
    for each in range(group.max() + 1):
        of = group == each
        size = int(of.sum())
        if size < _AGREEING:
            continue
        most = size // 2 + 1
        least = size if whole else most
        there, out = excess[:, of], ~counts[:, of]
        alike = there <= there.min(axis=1, keepdims=True) + 1
        same = (alike.sum(axis=1, keepdims=True) >= max(most, _AGREEING)) & (out.sum(axis=1, keepdims=True) >= least)
        found[:, of] = alike & out & same
        groups += same.sum(axis=(-2, -1))
        by_chance += counts.shape[-1] * special.bdtrc(least - 1, size, share)
    sure: Mask = special.pdtrc(groups - 1.0, by_chance) < _CHANCE
    return found & sure[:, None, None]


def _lower_median(values: Array, axis: int) -> Array:
    middle = (values.shape[axis] - 1) // 2
    return np.take(np.partition(values, middle, axis=axis), [middle], axis=axis)
