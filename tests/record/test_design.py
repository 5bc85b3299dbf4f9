"""Designs and the order of visits."""

from __future__ import annotations

from collections import Counter

import pytest

from qwen3bench.record.design import DESIGNS, block_order, cell_of, design_cells, label, neighbours

FACTORS = ("flash", "tie", "mlp", "mask", "norm")


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("k", range(6))
def test_baseline_first_no_cell_twice_factors_in_order(design: str, k: int) -> None:
    cells = design_cells(design, FACTORS[:k])
    assert cells[0] == ()
    assert len(set(cells)) == len(cells)
    assert all(list(cell) == [factor for factor in FACTORS if factor in cell] for cell in cells)


@pytest.mark.parametrize(("design", "count"), [("pair", 2), ("full", 32), ("each", 6), ("leave_one_out", 7)])
def test_number_of_cells_of_five_factors(design: str, count: int) -> None:
    assert len(design_cells(design, FACTORS)) == count


def test_full_is_in_standard_order() -> None:
    labels = [label(cell) for cell in design_cells("full", ("a", "b", "c"))]
    assert labels == ["baseline", "a", "b", "a+b", "c", "a+c", "b+c", "a+b+c"]


def test_one_factor_left_out_of_one_is_the_baseline() -> None:
    assert design_cells("leave_one_out", ("flash",)) == [(), ("flash",)]


@pytest.mark.parametrize(("design", "expected"), [("full", []), ("each", []), ("pair", ["b+c", "a+c", "a+b"])])
def test_neighbours_lack_one_factor_and_are_not_in_the_design(design: str, expected: list[str]) -> None:
    assert [label(cell) for cell in neighbours(design_cells(design, "abc"))] == expected


def test_label_and_cell_of_are_inverse() -> None:
    cells = design_cells("full", FACTORS)
    assert [cell_of(label(cell)) for cell in cells] == cells


def test_block_holds_every_cell_once_and_the_baseline_twice() -> None:
    cells = [label(cell) for cell in design_cells("full", FACTORS)]
    visits = block_order(cells, 0, "prefill", "graph", 3, 0)
    assert sorted(visits) == sorted([*((cell, 0) for cell in cells), ("baseline", 1)])


def test_block_order_repeats_with_its_seed_and_differs_without() -> None:
    cells = [label(cell) for cell in design_cells("full", FACTORS)]
    orders = [tuple(block_order(cells, 0, "prefill", "graph", block, 0)) for block in range(20)]
    assert orders[3] == tuple(block_order(cells, 0, "prefill", "graph", 3, 0))
    others = [
        (1, "prefill", "graph", 3, 0),
        (0, "decode", "graph", 3, 0),
        (0, "prefill", "eager", 3, 0),
        (0, "prefill", "graph", 3, 1),
    ]
    assert len({*orders, *(tuple(block_order(cells, *seed)) for seed in others)}) == 24


def test_every_cell_visits_every_position_equally_often() -> None:
    cells = ["baseline", "a", "b", "a+b"]
    draws = 4000
    places = Counter((visit, place) for n in range(draws) for place, visit in enumerate(block_order(cells, n)))
    expected = draws / 5
    chi2 = sum(
        (places[visit, place] - expected) ** 2 / expected for visit in block_order(cells, 0) for place in range(5)
    )
    assert chi2 < 39.25  # chi-squared with 16 degrees of freedom, p = 0.001; the draws are seeded
