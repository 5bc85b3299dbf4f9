"""The design `screen`: so few of the 2^k cells that every main effect and every pair can still be told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import combinations, product

from qwen3bench.errors import UserError
from qwen3bench.record.d_optimal import Term, d_optimal, efficiency, mains_and_pairs, relative_variances
from qwen3bench.record.design import Cell
from qwen3bench.record.fractions import RESOLUTION_V, Fraction, Levels, smallest_fraction, with_baseline

WHOLE = 5  # factors, all of whose combinations are measured: 32 cells
MOST = 12  # factors: 4,096 candidates are searched in under half a minute
# Main effects and pairs take 46, 56, 67 and 79 cells at least; these leave some to test whether that is all there is.
_SIZES = {6: 32, 7: 64, 8: 64, 9: 64, 10: 80, 11: 96, 12: 112}
RESOLUTIONS = (5, 4, 3)
Pair = tuple[str, str]


@dataclass(frozen=True)
class Rules:
    """Which factors do not go together: pairs that exclude each other, and those of which one needs the other."""

    excludes: tuple[Pair, ...] = ()
    needs: tuple[Pair, ...] = ()

    def allow(self, cell: Cell) -> bool:
        """Whether a model with these factors on can be built."""
        return self.broken_by(cell) is None

    def broken_by(self, cell: Cell) -> str | None:
        """What is wrong with a cell, in words; None where nothing is."""
        for one, other in self.excludes:
            if one in cell and other in cell:
                return f"{one} and {other} exclude each other"
        for one, other in self.needs:
            if one in cell and other not in cell:
                return f"{one} needs {other}"
        return None


@dataclass(frozen=True)
class Wish:
    """What is asked of a screen: `cells` None for the usual size; `resolution` 4 or 3 for one with aliased pairs."""

    cells: int | None = None
    resolution: int = 5


@dataclass(frozen=True)
class Screen:
    """The cells of a screen, the baseline first, and how they were found.

    `terms` are those of the model: main effects and pairs. In units of an orthogonal design of as many cells,
    `efficiency` is the information (D-efficiency) and `variance` the largest of a main effect, and of a pair; None
    where terms are aliased. `aliases`: terms that no cell tells apart, together.
    """

    cells: tuple[Cell, ...]
    made: str
    terms: tuple[Cell, ...]
    efficiency: float | None = None
    variance: tuple[float, float] | None = None
    aliases: tuple[tuple[Cell, ...], ...] = field(default=())


@lru_cache(maxsize=8)
def screen(factors: Cell, rules: Rules = Rules(), wish: Wish = Wish()) -> Screen:
    """The screen of `factors`; the same every time.

    Without rules and wishes all cells of up to 5 factors, a regular fraction of resolution V of 6 to 8, and a D-optimal
    set of 9 to 12. Raises `UserError` where there is none of that size, and where the rules leave a factor untold.
    """
    if len(factors) > MOST:
        raise UserError(
            f"design=screen takes up to {MOST} switches, and these are {len(factors)}; name fewer with opt="
        )
    every = [levels[::-1] for levels in product((0, 1), repeat=len(factors))]  # the first factor changes fastest
    allowed = [levels for levels in every if rules.allow(_cell(levels, factors))]
    if wish.resolution < RESOLUTIONS[0]:
        return _aliased(factors, wish, whole=len(allowed) == len(every))
    terms = mains_and_pairs(allowed) if factors else []
    if untold := [factors[i] for i in range(len(factors)) if (i,) not in terms]:
        raise UserError(f"{', '.join(untold)}: no cell tells it by itself, as excludes and needs stand in configs/opt/")
    size = min(wish.cells or _SIZES.get(len(factors), len(allowed)), len(allowed))
    if size <= len(terms):
        raise UserError(
            f"design.cells={size} cannot tell {len(terms)} main effects and pairs; ask for {len(terms) + 1} or more, "
            "or for design.resolution=4, where pairs are told together"
        )
    if size == len(allowed):
        return _told(allowed, "all combinations", terms, factors)
    if not wish.cells and len(allowed) == len(every) and len(factors) in RESOLUTION_V:
        fraction = Fraction.of(*RESOLUTION_V[len(factors)])
        return _told(with_baseline(fraction), f"2^({_power(fraction)}) {' '.join(fraction.names)}", terms, factors)
    forced = [allowed[0], *_largest(allowed)][: size - 1]
    return _told(d_optimal(allowed, size, terms, forced), f"D-optimal of {len(allowed)}", terms, factors)


def _aliased(factors: Cell, wish: Wish, whole: bool) -> Screen:
    """A regular fraction of resolution 4 or 3, and the baseline beside it where it is not one of its cells."""
    if wish.cells:
        raise UserError(f"design.cells and design.resolution={wish.resolution} each ask for a size; give one")
    if not whole:
        raise UserError(f"design.resolution={wish.resolution} takes no switches that exclude or need each other")
    fraction = smallest_fraction(len(factors), wish.resolution)
    cells = fraction.cells
    off = (0,) * len(factors)
    every = [*((i,) for i in range(len(factors))), *combinations(range(len(factors)), 2)]
    groups: dict[int, list[Term]] = {}
    for term in every:
        mask = sum(1 << i for i in term)
        groups.setdefault(min(mask ^ word for word in (0, *fraction.words)), []).append(term)
    return Screen(
        cells=tuple(_cell(levels, factors) for levels in _in_order({*cells, off})),
        made=f"2^({_power(fraction)}) {' '.join(fraction.names)}".rstrip(),
        terms=tuple(_cell_of(term, factors) for term in every),
        aliases=tuple(tuple(_cell_of(term, factors) for term in group) for group in groups.values() if len(group) > 1),
    )


def _told(cells: Sequence[Levels], made: str, terms: Sequence[Term], factors: Cell) -> Screen:
    ordered = _in_order(cells)
    if not terms:
        return Screen(tuple(_cell(levels, factors) for levels in ordered), made, ())
    variances = relative_variances(ordered, terms)
    pairs = variances[len(factors) :]
    return Screen(
        cells=tuple(_cell(levels, factors) for levels in ordered),
        made=made,
        terms=tuple(_cell_of(term, factors) for term in terms),
        efficiency=efficiency(ordered, terms),
        variance=(float(variances[: len(factors)].max()), float(pairs.max()) if len(pairs) else 1.0),
    )


def _largest(allowed: Sequence[Levels]) -> list[Levels]:
    """The cells that allow no further factor: all on, where no two exclude each other."""
    most = [
        levels
        for levels in allowed
        if not any(other != levels and all(map(int.__le__, levels, other)) for other in allowed)
    ]
    return sorted(most, key=sum, reverse=True)


def _in_order(cells: Sequence[Levels] | set[Levels]) -> list[Levels]:
    """In standard order, in which the first factor changes fastest."""
    return sorted(set(cells), key=lambda levels: levels[::-1])


def _power(fraction: Fraction) -> str:
    return f"{fraction.factors}-{len(fraction.generators)}"


def _cell(levels: Levels, factors: Cell) -> Cell:
    return tuple(factor for factor, on in zip(factors, levels, strict=True) if on)


def _cell_of(term: Term, factors: Cell) -> Cell:
    return tuple(factors[i] for i in term)
