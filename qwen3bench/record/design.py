"""Which cells a run measures, and in which order it visits them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import product

Cell = tuple[str, ...]  # the names of the factors that are on, in the run's order

BASELINE = "baseline"


def label(cell: Cell) -> str:
    """The name of a cell: `baseline`, or the factors that are on joined by `+`."""
    return "+".join(cell) or BASELINE


def cell_of(name: str) -> Cell:
    """The cell with this label: the inverse of `label`."""
    return () if name == BASELINE else tuple(name.split("+"))


def is_peer(name: str) -> bool:
    """Whether a cell's label names another implementation (`transformers:sdpa`)."""
    return ":" in name


def design_cells(design: str, factors: Sequence[str]) -> list[Cell]:
    """The cells of a design over `factors`, the baseline first, none twice.

    `pair`: the baseline and all on. `full`: all 2^k, in standard order (the first factor changes fastest;
    Box, Hunter & Hunter, Statistics for Experimenters, ch. 5). `each`: the baseline and each factor alone.
    `leave_one_out`: the baseline, all on, and all on but each. Raises `KeyError` on a design of another name.
    """
    return list(dict.fromkeys(DESIGNS[design](tuple(factors))))


def neighbours(cells: Sequence[Cell]) -> list[Cell]:
    """The cells that lack one factor of one of `cells` and are not among them."""
    lacking = (tuple(factor for factor in cell if factor != out) for cell in cells for out in cell)
    return [cell for cell in dict.fromkeys(lacking) if cell not in cells]


def block_order(cells: Sequence[str], *seed: object) -> list[tuple[str, int]]:
    """One block's visits in random order: `(cell label, copy)`, the baseline a second time as copy 1.

    The order is a function of `cells` and the parts of `seed` (the run's seed, workload, runtime, block,
    attempt), so that a resumed run draws the orders it would have drawn.
    """
    visits = [(cell, 0) for cell in cells]
    if BASELINE in cells:
        visits.append((BASELINE, 1))
    random.Random(repr(seed)).shuffle(visits)
    return visits


def _full(factors: Cell) -> list[Cell]:
    return [
        tuple(factor for factor, on in zip(factors, reversed(levels), strict=True) if on)
        for levels in product((False, True), repeat=len(factors))
    ]


def _leave_one_out(factors: Cell) -> list[Cell]:
    return [(), factors, *(tuple(f for f in factors if f != out) for out in factors)]


DESIGNS: dict[str, Callable[[Cell], list[Cell]]] = {
    "pair": lambda factors: [(), factors],
    "full": _full,
    "each": lambda factors: [(), *((factor,) for factor in factors)],
    "leave_one_out": _leave_one_out,
}
