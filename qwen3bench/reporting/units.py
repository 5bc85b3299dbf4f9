"""Numbers as people read them: the only place where seconds and bytes are scaled."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Unit:
    """A display unit: its symbol and how many base units (seconds, bytes, …) one of it holds."""

    symbol: str
    size: float

    def text(self, value: float) -> str:
        """Value with four significant digits, without the symbol; empty where there is no value."""
        return significant(value / self.size) if is_number(value) else ""


FIXED = "\N{NO-BREAK SPACE}"  # between a number and its unit, until the lines of a terminal are made
SECONDS = (Unit("s", 1.0), Unit("ms", 1e-3), Unit("µs", 1e-6))
BYTES = (Unit("GiB", 2.0**30), Unit("MiB", 2.0**20), Unit("KiB", 2.0**10), Unit("B", 1.0))


def is_number(value: object) -> bool:
    """Whether the value is a finite number: not None, not NaN, not text."""
    return isinstance(value, int | float | np.number) and math.isfinite(float(value))


def significant(value: float, digits: int = 4) -> str:
    """Value rounded to significant digits, whole numbers in full with thousands separators."""
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def unit_for(values: Iterable[object], units: tuple[Unit, ...]) -> Unit:
    """The largest unit in which the median of the values is at least 1; one unit for a column or an axis."""
    numbers = [abs(float(v)) for v in values if is_number(v)]  # type: ignore[arg-type]
    middle = float(np.median(numbers)) if numbers else units[0].size
    return next((unit for unit in units if middle >= unit.size), units[-1])


def seconds(value: float) -> str:
    """Time with its unit, for example `7.190 ms`."""
    unit = unit_for([value], SECONDS)
    return f"{unit.text(value)} {unit.symbol}"


def size(value: float) -> str:
    """Memory with its unit, for example `296.8 MiB`."""
    unit = unit_for([value], BYTES)
    return f"{unit.text(value)} {unit.symbol}"


_DIGITS = 4  # of a ratio at most: the fifth changes from one run to the next
_USELESS = 100  # times as large or small: the end of an interval that tells nothing


def ratio(value: float, lo: float = math.nan, hi: float = math.nan) -> str:
    """Ratio with its interval, for example `1.27× [1.26, 1.28]`, in decimals that the interval supports."""
    if not is_number(value):
        return ""
    if not (is_number(lo) and is_number(hi)):
        return f"{value:.{interval_decimals(value, value)}f}×"
    if not _tells(value, lo, hi):
        return f"{value:.2f}× [no useful interval]"
    decimals = interval_decimals(lo, hi)
    return f"{value:.{decimals}f}× [{lo:.{decimals}f}, {hi:.{decimals}f}]"


def _tells(value: float, lo: float, hi: float) -> bool:
    """Whether the interval of a ratio is of use: no end is a hundred times as far off, or reads as zero."""
    return lo * _USELESS >= value and hi <= value * _USELESS and round(lo, interval_decimals(lo, hi)) > 0


def times(value: float, lo: float = math.nan, hi: float = math.nan) -> str:
    """Ratio without its interval, for example `1.27×`, in decimals that the interval supports."""
    return ratio(value, lo, hi).partition(" ")[0]


def interval_decimals(lo: float, hi: float) -> int:
    """Decimals that show the first digit of an interval's half-width, at least 2 where four digits in all allow it."""
    rounded = f"{max(abs(lo), abs(hi)):.{_DIGITS - 1}e}"  # 9.9996 has two digits before the point, as it reads 10.00
    most = max(0, _DIGITS - max(0, int(rounded.partition("e")[2]) + 1)) if lo or hi else _DIGITS
    half_width = (hi - lo) / 2
    if half_width <= 0:
        return most
    return min(most, max(2, -math.floor(math.log10(half_width))))


def percent(value: float) -> str:
    """Fraction as a percentage with two significant digits, for example `0.25 %`."""
    return f"{significant(100 * value, 2)} %"


LEAST_P = 1e-16  # about the precision of a double; what is smaller says no more of the data


def p_value(p: float) -> str:
    """Probability with two significant digits, for example `0.032`; `< 1e-16` where it is smaller."""
    return f"< {LEAST_P:g}" if p < LEAST_P else f"{p:.2g}"


def duration_words(seconds_: float) -> str:
    """A length of time as one says it, for example `9 minutes`."""
    for unit, size_s, until in (("second", 1.0, 60), ("minute", 60.0, 90), ("hour", 3600.0, 36)):
        if seconds_ / size_s < until:
            return count(max(1, math.ceil(seconds_ / size_s)), unit)
    return count(math.ceil(seconds_ / 86400), "day")


def count(number: int, one: str, many: str | None = None) -> str:
    """Number with its noun, for example `1 cell`, `3 cells`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def listing(words: list[str], most: int = 6) -> str:
    """Words joined as in a sentence, the tail past `most` counted instead of named."""
    if len(words) > most:
        words = [*words[: most - 1], f"{len(words) - most + 1} more"]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""
