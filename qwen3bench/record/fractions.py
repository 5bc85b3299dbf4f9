"""Regular fractions of the 2^k cells, by their generators.

Box, Hunter & Hunter, Statistics for Experimenters, chapter 6.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product

_LETTERS = "ABCDEFGHJKLMNOP"  # tables of designs leave out the I, which is the mean
Levels = tuple[int, ...]  # of a cell: 1 where a factor is on
# Of minimum aberration (Montgomery, Design and Analysis of Experiments, table 8.14): no fraction of that size confounds
# fewer short words. Of resolution V or higher, so no pair is confounded with another.
RESOLUTION_V = {6: ("F=ABCDE",), 7: ("G=ABCDEF",), 8: ("G=ABCD", "H=ABEF")}


@dataclass(frozen=True)
class Fraction:
    """A regular fraction: `basic` factors take all combinations, each other one is a product of some of them.

    `generators`: the basic factors of each product as a bit mask, in the order of factors.
    """

    basic: int
    generators: tuple[int, ...]

    @classmethod
    def of(cls, *generators: str) -> Fraction:
        """The fraction of generators such as `G=ABCD`, the first factor being A."""
        products = [sum(1 << _LETTERS.index(letter) for letter in text.split("=")[1]) for text in generators]
        return cls(_LETTERS.index(generators[0][0]), tuple(products))

    @property
    def factors(self) -> int:
        """How many factors it has."""
        return self.basic + len(self.generators)

    @property
    def words(self) -> list[int]:
        """The defining words: products of factors that are the same in every cell, as bit masks."""
        single = [mask | 1 << (self.basic + i) for i, mask in enumerate(self.generators)]
        words = [0]
        for word in single:
            words += [word ^ other for other in words]
        return words[1:]

    @property
    def word_lengths(self) -> tuple[int, ...]:
        """The word-length pattern A3, A4, …, Ak: how many defining words have so many factors."""
        lengths = [word.bit_count() for word in self.words]
        return tuple(map(lengths.count, range(3, self.factors + 1)))

    @property
    def resolution(self) -> int:
        """The length of the shortest defining word; one more than there are factors where all cells are there."""
        return min((word.bit_count() for word in self.words), default=self.factors + 1)

    @property
    def cells(self) -> list[Levels]:
        """The cells of the principal fraction, in which every word is +1: all factors on is one of them."""
        return [(*levels, *self._products(levels)) for levels in product((0, 1), repeat=self.basic)]

    @property
    def names(self) -> tuple[str, ...]:
        """The generators in letters, as in `G=ABCD`."""
        return tuple(
            f"{_LETTERS[self.basic + i]}={_letters(mask, self.basic)}" for i, mask in enumerate(self.generators)
        )

    def _products(self, levels: Levels) -> Iterator[int]:
        for mask in self.generators:
            off = sum(not level for i, level in enumerate(levels) if mask >> i & 1)
            yield int(off % 2 == 0)


def smallest_fraction(factors: int, resolution: int) -> Fraction:
    """The smallest fraction of resolution 3 or 4, of those the one of the least aberration that is listed first.

    Of resolution 4 every word is even, so that no factor on is one of its cells too: generators of an odd number of
    factors give that, and up to half as many factors as cells.
    """
    even = resolution == 4
    basic = 1
    while factors > (2 ** (basic - 1) if even else 2**basic - 1):
        basic += 1
    basic = min(basic, factors)
    products = [mask for mask in range(2**basic) if mask.bit_count() >= 2 and (mask.bit_count() % 2 == 1 or not even)]
    found = (Fraction(basic, chosen) for chosen in combinations(products, factors - basic))
    return min(found, key=lambda fraction: fraction.word_lengths)


def with_baseline(fraction: Fraction) -> list[Levels]:
    """The cells of a fraction of resolution V with no factor on among them.

    Where the fraction lacks that cell, it takes the place of the one whose loss costs the least: of a determinant
    (1 − a)(1 + a) + b² times as large, the cell with the largest |b|, the product of both cells' regressors.
    """
    cells, off = fraction.cells, (0,) * fraction.factors
    if off in cells:
        return cells
    lost = max((cell for cell in cells if not all(cell)), key=lambda cell: abs(_product_with_baseline(cell)))
    return [off if cell == lost else cell for cell in cells]


def is_regular(cells: Sequence[Levels]) -> bool:
    """Whether the cells are a regular fraction of a power of two: the sum of any three of them is one too."""
    masks = [sum(level << i for i, level in enumerate(cell)) for cell in cells]
    from_first = {mask ^ masks[0] for mask in masks} if masks else set()
    if len(masks) < 2 or len(from_first) < len(masks) or len(masks) & (len(masks) - 1):
        return False
    basis: list[int] = []
    for mask in from_first:
        for each in basis:
            mask = min(mask, mask ^ each)
        if mask:
            basis.append(mask)
    return len(from_first) == 2 ** len(basis)


def _product_with_baseline(cell: Levels) -> int:
    """Over the mean, main effects and pairs, of regressors ±1."""
    alike = len(cell) - 2 * sum(cell)
    return 1 + alike + (alike**2 - len(cell)) // 2


def _letters(mask: int, basic: int) -> str:
    return "".join(_LETTERS[i] for i in range(basic) if mask >> i & 1)
