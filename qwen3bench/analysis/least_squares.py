"""Least squares of main effects and pairs over a fraction of the 2^k cells, and what such a model leaves over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy import special

from qwen3bench.analysis.variance import Estimates
from qwen3bench.record.fractions import is_regular

Array = NDArray[np.float64]
Levels = tuple[int, ...]
Term = tuple[int, ...]  # the positions of a term's factors
_TINY = 1e-9  # what rounding leaves of a zero, relative


@dataclass(frozen=True)
class Fit:
    """The model of a fraction: its mean, and groups of terms that the cells do not tell apart, most of a single term.

    `solve` (1 + groups, cells) gives its coefficients from the cells' values, NaN where they do not tell one.
    Regressors are coded ±1/2, so that a coefficient is the textbook effect. `left_over` (df, cells) is an orthonormal
    basis of what the model does not describe; `triples` (cells, triples) the regressors of interactions of three.
    `absent`: pairs that never run together, or of which one never runs without the other, without an interaction.
    """

    cells: tuple[Levels, ...]
    groups: tuple[tuple[Term, ...], ...]
    solve: Array
    left_over: Array
    triples: Array
    absent: tuple[Term, ...]

    @property
    def told(self) -> Array:
        """The contrasts of the groups that are told: (told groups, cells)."""
        of_groups = self.solve[1:]
        return of_groups[~np.isnan(of_groups).any(axis=1)]

    @property
    def can_predict(self) -> bool:
        """Whether each of its terms is told by itself, so that cells it allows can be predicted."""
        return all(len(group) == 1 for group in self.groups) and not bool(np.isnan(self.solve).any())

    @property
    def tells_every_term(self) -> bool:
        """Whether it tells every main effect and pair, so that all 2^k cells can be predicted."""
        return self.can_predict and not self.absent

    def allows(self, cell: Levels) -> bool:
        """Whether no pair that does not go together is in a cell otherwise than in the fraction's."""
        return all((cell[i], cell[j]) in {(known[i], known[j]) for known in self.cells} for i, j in self.absent)

    def predicting(self, cells: Sequence[Levels]) -> Array:
        """The contrasts (cells, fraction's cells) that predict log(cell / baseline) of each of these cells."""
        off = np.zeros((1, len(self.cells[0])))
        x = self._regressors(np.asarray(cells, dtype=float).reshape(-1, off.shape[1])) - self._regressors(off)
        return x @ np.nan_to_num(self.solve[1:])

    def of_triples(self, cells: Sequence[Levels]) -> Array:
        """What each interaction of three adds to log(cell / baseline): (cells, triples)."""
        k = len(self.cells[0])
        terms = _triples(k)
        return effect_regressors(cells, terms) - effect_regressors([(0,) * k], terms)

    def _regressors(self, cells: Array) -> Array:
        return effect_regressors(cells, [group[0] for group in self.groups])


@dataclass(frozen=True)
class LackOfFit:
    """How far the cells are from the model of main effects and pairs.

    `p`: of the F test of what is left over against the cells' error; NaN where that has none. `rms`: what is left of a
    cell's logarithm, beyond error. `df`: of it. `variance`: of an interaction of three, were all alike.
    """

    p: float
    df: int
    rms: float
    variance: float


@lru_cache(maxsize=32)
def fit_of(cells: tuple[Levels, ...]) -> Fit:
    """The model of these cells.

    Of a regular fraction with the baseline beside it (resolution 3 has no cell without a factor) the fraction alone
    counts: one cell would tell its aliased terms apart, with an error that nobody could use.
    """
    k = len(cells[0])
    used = np.ones(len(cells))
    rest = [cell for cell in cells if any(cell)]
    if len(rest) < len(cells) and not is_regular(cells) and is_regular(rest):
        used[[not any(cell) for cell in cells]] = 0
    of_used = [cell for cell, counts in zip(cells, used, strict=True) if counts]
    pairs = [*combinations(range(k), 2)]
    absent = tuple(pair for pair in pairs if len({(cell[pair[0]], cell[pair[1]]) for cell in of_used}) < 4)
    groups = _groups(of_used, [*((i,) for i in range(k)), *(pair for pair in pairs if pair not in absent)])
    x = np.column_stack([np.ones(len(of_used)), effect_regressors(of_used, [group[0] for group in groups])])
    u, s, vt = np.linalg.svd(x)
    rank = int((s > s[0] * _TINY).sum())
    known = (vt[:rank].T ** 2).sum(axis=1) > 1 - _TINY  # the identity, where a coefficient is told
    solve = np.full((x.shape[1], len(cells)), np.nan)
    there = used > 0
    solve[np.ix_(known, there)] = ((vt[:rank].T / s[:rank]) @ u[:, :rank].T)[known]
    solve[np.ix_(known, ~there)] = 0.0
    left_over = np.zeros((len(of_used) - rank, len(cells)))
    left_over[:, there] = u[:, rank:].T
    return Fit(cells, groups, solve, left_over, effect_regressors(cells, _triples(k)), absent)


def effect_regressors(cells: Sequence[Levels] | Array, terms: Sequence[Term]) -> Array:
    """The regressors of `terms` at `cells` (cells, terms), coded ±1/2.

    A coefficient is then the textbook effect, contrast / 2^(k−1), for main effects and interactions alike
    (Montgomery, Design and Analysis of Experiments, chapter 6).
    """
    signs = 2.0 * np.asarray(cells, dtype=float) - 1.0
    return np.stack([signs[:, list(term)].prod(axis=1) / 2 for term in terms], axis=1) if terms else signs[:, :0]


def lack_of_fit(fit: Fit, terms: Estimates, left: Estimates) -> LackOfFit:
    """What the model leaves over, by the estimates of its terms that are told and of `fit.left_over`.

    The terms' errors, half of which are larger, give that of what is left over: all are of the same cells.
    """
    df = len(left.estimate)
    squares = float((left.estimate**2).sum())
    told = fit.told
    with np.errstate(invalid="ignore"):
        error = float(np.median(terms.se**2 / (told**2).sum(axis=1))) if len(told) else np.nan
    error_df = float(np.median(terms.df)) if len(told) else 0.0
    beyond = max(0.0, squares - df * np.nan_to_num(error))
    seen = float(((fit.left_over @ fit.triples) ** 2).sum())
    f = squares / df / error if df and error > 0 else np.nan
    p = float(special.fdtrc(df, error_df, f)) if np.isfinite(f) and error_df > 0 else np.nan
    return LackOfFit(
        p=p,
        df=df,
        rms=float(np.sqrt(beyond / len(fit.cells))),
        variance=beyond / seen if seen > _TINY else 0.0,
    )


def with_model_error(found: Estimates, matrix: Array, truth: Array, fit: Fit, lack: LackOfFit) -> Estimates:
    """The estimates of contrasts `matrix`, their errors widened by what interactions of three may do to them.

    `truth` (contrasts, triples): what each interaction of three adds to the quantity itself; what it adds to the
    contrast beyond is error. How large they are is what the model leaves over, as a variance (random effects); degrees
    of freedom are combined as Satterthwaite (1946) does.
    """
    shares = ((matrix @ fit.triples - truth) ** 2).sum(axis=1)
    of_model = lack.variance * np.where(shares > _TINY, shares, 0.0)
    of_error = np.nan_to_num(found.se**2)
    total = of_error + of_model
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = np.where(of_error > 0, of_error**2 / found.df, 0) + np.where(of_model > 0, of_model**2 / lack.df, 0)
        df = np.where(of_model > 0, total**2 / parts, found.df)
    se = np.where(np.isnan(found.se), np.nan, np.sqrt(total))
    return replace(found, se=se, df=df)


def _groups(cells: Sequence[Levels], terms: Sequence[Term]) -> tuple[tuple[Term, ...], ...]:
    """Terms whose regressors are the same at every cell, together."""
    x = effect_regressors(cells, terms)
    groups: dict[bytes, list[Term]] = {}
    for index, term in enumerate(terms):
        groups.setdefault(x[:, index].tobytes(), []).append(term)
    return tuple(map(tuple, groups.values()))


def _triples(k: int) -> list[Term]:
    return [*combinations(range(k), 3)]
