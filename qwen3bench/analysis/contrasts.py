"""Which effects a set of cells can tell, and the contrast that estimates each (two-level factorials)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from math import factorial

import numpy as np
from numpy.typing import NDArray

from qwen3bench.analysis.least_squares import Fit, Term, effect_regressors, fit_of

OTHERS_OFF, OTHERS_ON = "with the others off", "with the others on"
TAKEN_FOR_NIL = "interactions of more than {} factors taken for nil"
ALLOWED_FOR = "the interval allows for interactions of more than 2 factors"
WHOLE = 5  # factors; of more, fewer than all cells are a screen, and main effects and pairs its model
_TINY = 1e-9  # what rounding leaves of a zero, relative


@dataclass(frozen=True)
class Contrasts:
    """For each of the 2^k − 1 terms the contrast of cell means that estimates it.

    `matrix` (terms, cells) is NaN where a term cannot be estimated; `reasons` then says why, and else what an
    estimate takes for nil, or that it is of a factor `OTHERS_OFF` or `OTHERS_ON` instead of an average. `fit`: the
    model where it is of main effects and pairs alone; `aliased` (groups, cells) tells groups of aliased terms, which
    `alias_names` names.
    """

    terms: tuple[Term, ...]
    matrix: NDArray[np.float64]
    reasons: tuple[str, ...]
    fit: Fit | None = None
    aliased: NDArray[np.float64] | None = None
    alias_names: tuple[str, ...] = ()


def all_terms(k: int) -> tuple[Term, ...]:
    """The 2^k − 1 terms of k factors, main effects first."""
    return tuple(term for order in range(1, k + 1) for term in combinations(range(k), order))


def term_name(term: Term, factors: Sequence[str]) -> str:
    """`flash`, `flash:mask`."""
    return ":".join(factors[i] for i in term)


def cell_label(cell: Sequence[int], factors: Sequence[str]) -> str:
    """`baseline`, `flash+tie`."""
    return "+".join(f for f, on in zip(factors, cell, strict=True) if on) or "baseline"


def every_cell(k: int) -> tuple[tuple[int, ...], ...]:
    """All 2^k cells as 0/1 tuples, the baseline first."""
    return tuple(tuple(code >> i & 1 for i in range(k)) for code in range(2**k))


@lru_cache(maxsize=32)
def contrasts(factors: tuple[str, ...], cells: tuple[tuple[int, ...], ...]) -> Contrasts:
    """The contrasts that estimate each term from the means of `cells`.

    All 2^k cells: the orthogonal ones. Fewer that tell pairs, of more than five factors: least squares of main effects
    and pairs, and no other terms. Any others: least squares under the hierarchy principle (Box, Hunter &
    Hunter, Statistics for Experimenters, chapter 6): a term counts as estimable when it can be told from
    every term of its own and of lower order, a main effect from the interactions of two factors as well, as no
    average over the other factors is known without them; higher interactions are then taken for nil, as few
    as will do, and the reason says so. A main effect for which that fails is what its factor is worth beside
    none of the others, or else beside all of them, where these two cells are there, and the reason says which.
    """
    k = len(factors)
    if k > WHOLE and len(cells) < 2**k and _tells_pairs(fit_of(cells)):  # each alone, or all but each, tell none
        return _of_screen(factors, cells)
    terms = all_terms(k)
    if len(cells) == 2**k:
        return Contrasts(terms, effect_regressors(cells, terms).T * (4 / len(cells)), ("",) * len(terms))
    matrix = np.full((len(terms), len(cells)), np.nan)
    reasons = [""] * len(terms)
    missing = _missing(factors, cells)
    open_terms = set(range(len(terms)))
    min_order = min(2, k)
    for order in range(k, min_order - 1, -1):
        n = sum(len(term) <= order for term in terms)  # terms come sorted by order
        design = np.column_stack([np.ones(len(cells)), effect_regressors(cells, terms[:n])])
        u, s, vt = np.linalg.svd(design, full_matrices=False)
        v = vt[s > s[0] * _TINY].T
        solve = (v / s[: v.shape[1]]) @ u[:, : v.shape[1]].T
        known = v @ v.T  # the identity, where a coefficient is estimable
        for t in sorted(open_terms):
            if t >= n:
                continue
            if known[t + 1, t + 1] > 1 - _TINY:
                matrix[t] = solve[t + 1]
                open_terms.discard(t)
                if order < k:
                    reasons[t] = f"{missing}, {TAKEN_FOR_NIL.format(order)}"
            elif max(min_order, len(terms[t])) == order:
                alias = [terms[i] for i in range(n) if i != t and abs(known[t + 1, i + 1]) > _TINY]
                names = ["the mean"] * bool(abs(known[t + 1, 0]) > _TINY) + [term_name(a, factors) for a in alias]
                reasons[t] = f"too few cells, {missing}: it cannot be told from {_some(names)}"
        if not open_terms:
            break
    if open_terms & set(range(k)) and _some_go_together(fit_of(cells)):
        return _of_screen(factors, cells)
    for t in sorted(open_terms & set(range(k))):
        if len(levels := {cell[t] for cell in cells}) == 1:
            reasons[t] = f"no cell {'without' if 1 in levels else 'with'} it"
        for others, reason in ((0, OTHERS_OFF), (1, OTHERS_ON)):
            off, on = (tuple(level if i == t else others for i in range(k)) for level in (0, 1))
            if off in cells and on in cells:
                matrix[t] = 0.0
                matrix[t, [cells.index(off), cells.index(on)]] = -1.0, 1.0
                reasons[t] = reason
                break
    return Contrasts(terms, matrix, tuple(reasons))


def _of_screen(factors: tuple[str, ...], cells: tuple[tuple[int, ...], ...]) -> Contrasts:
    """The contrasts of main effects and pairs, each by itself or, where aliased, together."""
    k, fit = len(factors), fit_of(cells)
    terms: tuple[Term, ...] = (*((i,) for i in range(k)), *combinations(range(k), 2))
    matrix = np.full((len(terms), len(cells)), np.nan)
    missing = _missing(factors, cells)
    reasons = [f"too few cells, {missing}: it cannot be told"] * len(terms)
    aliased, names = [], []
    for group, row in zip(fit.groups, fit.solve[1:], strict=True):
        if np.isnan(row).any():
            continue
        if len(group) == 1:
            index = terms.index(group[0])
            matrix[index], reasons[index] = row, f"{missing}, {ALLOWED_FOR}"
            continue
        aliased.append(row)
        names.append(" = ".join(term_name(term, factors) for term in group))
        for term in group:
            others = [term_name(other, factors) for other in group if other != term]
            reasons[terms.index(term)] = f"{missing}: it cannot be told from {_some(others)}"
    for term in fit.absent:
        reasons[terms.index(term)] = f"{factors[term[0]]} and {factors[term[1]]} are not switched by themselves"
    aliases = np.array(aliased) if aliased else None
    return Contrasts(terms, matrix, tuple(reasons), fit, aliases, tuple(names))


@lru_cache(maxsize=32)
def shapley_contrasts(k: int) -> NDArray[np.float64]:
    """Each factor's exact Shapley share as a contrast of `every_cell(k)`: (factors, 2^k).

    The mean over all orders of switching on of what the factor adds; the shares sum to all-on minus baseline
    (Shapley, A Value for n-Person Games, 1953).
    """
    cells = np.array(every_cell(k))
    size = cells.sum(axis=1)
    weights = np.array([factorial(s) * factorial(k - 1 - s) / factorial(k) for s in range(k)])
    on, off = weights[np.maximum(size - 1, 0)], weights[np.minimum(size, k - 1)]
    return np.where(cells.T == 1, on, -off)


def others_of(reason: str) -> str:
    """What the other factors do where an effect with this reason is told; empty where it is an average over them."""
    return next((others for others in (OTHERS_OFF, OTHERS_ON) if reason.startswith(others)), "")


def _tells_pairs(fit: Fit) -> bool:
    """Whether some pair is told, by itself or with its aliases."""
    told = (group for group, row in zip(fit.groups, fit.solve[1:], strict=True) if not np.isnan(row).any())
    return any(len(group[-1]) > 1 for group in told)


def _some_go_together(fit: Fit) -> bool:
    """Whether all is told but pairs that never run together, and there are others: averages then mean something."""
    return bool(fit.absent) and fit.can_predict and any(len(group[0]) > 1 for group in fit.groups)


def _missing(factors: tuple[str, ...], cells: tuple[tuple[int, ...], ...]) -> str:
    have = set(cells)
    absent = [cell_label(c, factors) for c in every_cell(len(factors)) if c not in have]
    return f"without {_some(absent)}" if len(absent) <= 3 else f"without {len(absent)} cells"


def _some(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
