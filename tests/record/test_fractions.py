"""Regular fractions, against the tables of textbooks and another program."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pydoe
import pytest

from qwen3bench.record.fractions import RESOLUTION_V, Fraction, is_regular, smallest_fraction, with_baseline

# Montgomery, Design and Analysis of Experiments, table 8.14 (NIST/SEMATECH 5.3.3.4.7): A3, A4, A5, …
PUBLISHED = {
    ("F=ABCDE",): (6, (0, 0, 0, 1)),
    ("E=ABC", "F=BCD"): (4, (0, 3, 0, 0)),
    ("G=ABCDEF",): (7, (0, 0, 0, 0, 1)),
    ("F=ABCD", "G=ABDE"): (4, (0, 1, 2, 0, 0)),
    ("E=ABC", "F=BCD", "G=ACD"): (4, (0, 7, 0, 0, 0)),
    ("G=ABCD", "H=ABEF"): (5, (0, 0, 2, 1, 0, 0)),
    ("F=ABC", "G=ABD", "H=BCDE"): (4, (0, 3, 4, 0, 0, 0)),
    ("E=BCD", "F=ACD", "G=ABC", "H=ABD"): (4, (0, 14, 0, 0, 0, 1)),
    ("G=ABCD", "H=ACEF", "J=CDEF"): (4, (0, 1, 4, 2, 0, 0, 0)),
}


@pytest.mark.parametrize("generators", PUBLISHED)
def test_word_lengths_are_the_published_ones(generators: tuple[str, ...]) -> None:
    fraction = Fraction.of(*generators)
    assert (fraction.resolution, fraction.word_lengths) == PUBLISHED[generators]
    assert fraction.names == generators


@pytest.mark.parametrize("generators", PUBLISHED)
def test_cells_are_those_of_another_program(generators: tuple[str, ...]) -> None:
    fraction = Fraction.of(*generators)
    letters = " ".join("abcdef"[: fraction.basic])
    theirs = pydoe.fracfact(f"{letters} {' '.join(text.split('=')[1].lower() for text in generators)}")
    assert set(fraction.cells) == {tuple(int(level > 0) for level in row) for row in theirs}


@pytest.mark.parametrize("k", RESOLUTION_V)
def test_no_fraction_of_that_size_has_less_aberration(k: int) -> None:
    ours = Fraction.of(*RESOLUTION_V[k])
    masks = [mask for mask in range(2**ours.basic) if mask.bit_count() > 1]
    best = min(Fraction(ours.basic, chosen).word_lengths for chosen in combinations(masks, len(ours.generators)))
    assert ours.word_lengths == best
    assert ours.resolution >= 5


@pytest.mark.parametrize("k", RESOLUTION_V)
def test_both_corners_are_among_the_cells_and_every_pair_is_told(k: int) -> None:
    cells = with_baseline(Fraction.of(*RESOLUTION_V[k]))
    assert len(set(cells)) == len(cells) == 2 ** min(k - 1, 6)
    assert {(0,) * k, (1,) * k} <= set(cells)
    signs = 2.0 * np.array(cells) - 1
    pairs = [signs[:, i] * signs[:, j] for i, j in combinations(range(k), 2)]
    assert np.linalg.matrix_rank(np.column_stack([np.ones(len(cells)), signs, *pairs])) == 1 + k + k * (k - 1) // 2


@pytest.mark.parametrize(("k", "resolution", "cells"), [(6, 4, 16), (8, 4, 16), (9, 4, 32), (12, 4, 32), (7, 3, 8)])
def test_smaller_fractions_have_the_resolution_that_is_asked_for(k: int, resolution: int, cells: int) -> None:
    fraction = smallest_fraction(k, resolution)
    assert (fraction.factors, fraction.resolution, len(fraction.cells)) == (k, resolution, cells)
    assert (1,) * k in fraction.cells
    assert ((0,) * k in fraction.cells) == (resolution == 4)


def test_a_whole_design_is_its_own_fraction() -> None:
    assert smallest_fraction(3, 4).cells == list(product((0, 1), repeat=3))


def test_a_cell_more_or_other_makes_a_fraction_irregular() -> None:
    cells = Fraction.of("G=ABCDEF").cells
    assert is_regular(cells)
    assert not is_regular([*cells, (0,) * 7])
    assert not is_regular(with_baseline(Fraction.of("G=ABCDEF")))
