"""D-optimal sets of cells: of so many cells, those from which a model's terms can be told best."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3bench.record.fractions import Levels

Array = NDArray[np.floating[Any]]
Term = tuple[int, ...]  # the positions of a term's factors
_STARTS = 12  # of which the best is taken; more gain below 1 % of D-efficiency
_DECIMALS = 9  # rounded to so many, equal gains are equal on every machine, and the first cell is taken
_TINY = 1e-8  # of a column's length, what rounding leaves of one that others make up


def regressors(cells: Sequence[Levels], terms: Sequence[Term]) -> Array:
    """The mean and `terms` at `cells`, coded ±1: (cells, 1 + terms)."""
    signs = 2.0 * np.asarray(cells, dtype=float) - 1.0
    return np.stack([np.ones(len(signs)), *(signs[:, list(term)].prod(axis=1) for term in terms)], axis=1)


def mains_and_pairs(candidates: Sequence[Levels]) -> list[Term]:
    """Every main effect and pair that the candidates tell apart; of two that exclude each other there is no pair."""
    count = len(candidates[0])
    terms: list[Term] = []
    orthonormal = np.full((len(candidates), 1), len(candidates) ** -0.5)
    for term in [*((i,) for i in range(count)), *combinations(range(count), 2)]:
        column = regressors(candidates, [term])[:, 1]
        for _ in range(2):  # twice is enough to be orthogonal (Giraud et al., 2005)
            column = column - orthonormal @ (orthonormal.T @ column)
        if (length := float(np.linalg.norm(column))) > _TINY * len(candidates) ** 0.5:
            terms.append(term)
            orthonormal = np.column_stack([orthonormal, column / length])
    return terms


def d_optimal(candidates: Sequence[Levels], size: int, terms: Sequence[Term], forced: Sequence[Levels]) -> list[Levels]:
    """So many of the candidates as maximize the determinant of the information on `terms`, the forced ones among them.

    By exchange (Fedorov, Theory of Optimal Experiments, 1972) from random starts: each cell in turn gives way to the
    candidate that gains most, until none does. The same cells every time. In the candidates' order.
    """
    x = regressors(candidates, terms)
    fixed = [candidates.index(cell) for cell in forced]
    free = np.setdiff1d(np.arange(len(x)), fixed)
    best: tuple[float, list[int]] = (-np.inf, [])
    for start in range(_STARTS):
        others = np.random.default_rng(start).choice(free, size - len(fixed), replace=False)
        chosen = _exchanged(x, [*fixed, *map(int, others)], len(fixed))
        value = round(float(np.linalg.slogdet(x[chosen].T @ x[chosen])[1]), _DECIMALS)
        if value > best[0]:
            best = value, chosen
    return [candidates[i] for i in sorted(best[1])]


def efficiency(cells: Sequence[Levels], terms: Sequence[Term]) -> float:
    """D-efficiency: information as a share of an orthogonal design's of that size; 0 where a term is not told."""
    x = regressors(cells, terms)
    sign, log = np.linalg.slogdet(x.T @ x)
    return float(np.exp(log / x.shape[1]) / len(x)) if sign > 0 else 0.0


def relative_variances(cells: Sequence[Levels], terms: Sequence[Term]) -> Array:
    """Each term's variance in units of that in an orthogonal design of that size."""
    x = regressors(cells, terms)
    return np.diag(np.linalg.inv(x.T @ x))[1:] * len(x)


def _exchanged(x: Array, chosen: list[int], fixed: int) -> list[int]:
    """`chosen` rows of x, the first `fixed` kept, exchanged until none gains. Updates of rank one keep the inverse."""
    chosen = list(chosen)
    while True:
        # A little of the identity makes a singular start invertible; what it adds is gone at the end.
        inverse = np.linalg.inv(x[chosen].T @ x[chosen] + 1e-6 * np.eye(x.shape[1]))
        spread = np.einsum("ij,jk,ik->i", x, inverse, x)
        changed = False
        for place in range(fixed, len(chosen)):
            out = chosen[place]
            without, inverse_without = _moved(x, inverse, spread, out, -1)
            taken = np.round(without, _DECIMALS)
            taken[[row for row in chosen if row != out]] = -np.inf
            into = int(taken.argmax())
            if taken[into] > taken[out]:
                chosen[place] = into
                spread, inverse = _moved(x, inverse_without, without, into, 1)
                changed = True
        if not changed:
            return chosen


def _moved(x: Array, inverse: Array, spread: Array, row: int, sign: int) -> tuple[Array, Array]:
    """The variances of all candidates, and the inverse, once a row is added (+1) or taken away (−1)."""
    column = inverse @ x[row]
    scale = sign / max(1 + sign * float(x[row] @ column), _TINY)
    return spread - scale * (x @ column) ** 2, inverse - scale * np.outer(column, column)
