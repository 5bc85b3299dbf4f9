"""Screens: how many cells, which, and what they tell."""

from __future__ import annotations

import time
from itertools import combinations, product

import numpy as np
import pydoe
import pytest

from qwen3bench.errors import UserError
from qwen3bench.record.d_optimal import d_optimal, efficiency, mains_and_pairs
from qwen3bench.record.screen import Rules, Wish, screen

NAMES = tuple("abcdefghijkl")
CONTRACT = {0: 1, 1: 2, 2: 4, 3: 8, 4: 16, 5: 32, 6: 32, 7: 64, 8: 64, 9: 64, 10: 80}


def levels(cells: tuple[tuple[str, ...], ...], factors: tuple[str, ...]) -> list[tuple[int, ...]]:
    return [tuple(int(name in cell) for name in factors) for cell in cells]


@pytest.mark.parametrize("k", CONTRACT)
def test_a_screen_has_the_promised_cells_with_both_corners_and_tells_every_pair(k: int) -> None:
    factors = NAMES[:k]
    found = screen(factors)
    assert len(set(found.cells)) == len(found.cells) == CONTRACT[k]
    assert found.cells[0] == ()
    assert factors in found.cells
    assert list(found.terms) == every_name(k)
    assert np.linalg.matrix_rank(model(levels(found.cells, factors), every_term(k))) == 1 + len(found.terms)


@pytest.mark.parametrize(("k", "least", "most"), [(6, 0.999, 1.0), (7, 0.99, 1.03), (8, 0.99, 1.04), (9, 0.91, 1.4)])
def test_another_program_finds_a_screen_as_efficient_as_it_says(k: int, least: float, most: float) -> None:
    found = screen(NAMES[:k])
    assert found.efficiency is not None
    assert found.variance is not None
    assert found.efficiency >= least
    assert max(found.variance) <= most + 1e-9
    x = model(levels(found.cells, NAMES[:k]), every_term(k))
    assert found.efficiency == pytest.approx(pydoe.d_efficiency(x) / 100)
    assert max(found.variance) == pytest.approx(np.diag(np.linalg.inv(x.T @ x))[1:].max() * len(x))


def test_aliases_are_those_that_another_program_names() -> None:
    factors = NAMES[:6]
    found = screen(factors, wish=Wish(resolution=4))
    names, _ = pydoe.fracfact_aliasing(2.0 * np.array(levels(found.cells, factors)) - 1)
    theirs = {frozenset(name for name in line.split(" = ") if len(name) <= 2) for line in names}
    ours = {frozenset("".join(term) for term in group) for group in found.aliases}
    assert ours == {group for group in theirs if len(group) > 1}
    assert max(map(len, ours)) == 3


def test_a_fraction_of_resolution_three_has_the_baseline_beside_it() -> None:
    found = screen(NAMES[:7], wish=Wish(resolution=3))
    assert len(found.cells) == 9
    assert {(), NAMES[:7]} <= set(found.cells)
    assert all(any(len(term) == 1 for term in group) for group in found.aliases)


def test_switches_that_do_not_go_together_are_in_no_cell_and_no_term() -> None:
    factors = NAMES[:7]
    found = screen(factors, Rules(excludes=(("a", "b"),), needs=(("c", "d"),)))
    assert not any("a" in cell and "b" in cell for cell in found.cells)
    assert not any("c" in cell and "d" not in cell for cell in found.cells)
    assert set(every_name(7)) - set(found.terms) == {("a", "b"), ("c", "d")}
    terms = [tuple(factors.index(name) for name in term) for term in found.terms]
    x = model(levels(found.cells, factors), terms)
    assert np.linalg.matrix_rank(x) == x.shape[1]
    # All that go together are as near to all on as it gets.
    assert {tuple("acdefg"), tuple("bcdefg")} <= set(found.cells)


def test_of_five_that_do_not_all_go_together_every_allowed_cell_is_measured() -> None:
    found = screen(NAMES[:5], Rules(excludes=(("a", "b"),)))
    assert len(found.cells) == 24
    assert len(found.terms) == 14


def test_two_that_need_each_other_are_refused_as_no_cell_tells_them_apart() -> None:
    with pytest.raises(UserError, match="b: no cell tells it by itself"):
        screen(NAMES[:3], Rules(needs=(("a", "b"), ("b", "a"))))


def test_a_size_of_ones_own_is_kept_or_refused() -> None:
    assert len(screen(NAMES[:7], wish=Wish(cells=40)).cells) == 40
    with pytest.raises(UserError, match=r"ask for 29 or more, or for design\.resolution=4"):
        screen(NAMES[:7], wish=Wish(cells=28))
    with pytest.raises(UserError, match="give one"):
        screen(NAMES[:7], wish=Wish(cells=40, resolution=4))
    with pytest.raises(UserError, match="takes up to 12 switches, and these are 13"):
        screen((*NAMES, "m"))


def test_d_optimal_is_the_best_of_all_where_all_can_be_tried() -> None:
    candidates = list(product((0, 1), repeat=3))
    terms = mains_and_pairs(candidates)[:3]
    best = max(efficiency(cells, terms) for cells in combinations(candidates, 5))
    assert efficiency(d_optimal(candidates, 5, terms, []), terms) == pytest.approx(best)
    assert (0, 0, 0) in d_optimal(candidates, 5, terms, [(0, 0, 0)])


@pytest.mark.slow
def test_twelve_switches_take_under_half_a_minute() -> None:
    started = time.process_time()
    found = screen(NAMES)
    assert time.process_time() - started < 30 * 2  # on every core that the products use
    assert len(found.cells) == 112
    assert found.efficiency is not None
    assert found.efficiency > 0.9


def model(cells: list[tuple[int, ...]], terms: list[tuple[int, ...]]) -> np.ndarray:
    signs = 2.0 * np.array(cells) - 1
    return np.column_stack([np.ones(len(cells)), *(signs[:, list(term)].prod(axis=1) for term in terms)])


def every_term(k: int) -> list[tuple[int, ...]]:
    return [*((i,) for i in range(k)), *combinations(range(k), 2)]


def every_name(k: int) -> list[tuple[str, ...]]:
    return [tuple(NAMES[i] for i in term) for term in every_term(k)]
