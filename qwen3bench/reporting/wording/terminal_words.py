"""What the terminal says at the end of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum

from qwen3bench.reporting.finding import BestCell
from qwen3bench.reporting.units import FIXED, count, listing, percent

UNFINISHED = "this run has not finished: what is here is what was measured until now."
PEERS_TITLE = "Other implementations against the baseline"


def more_columns(number: int) -> str:
    return f"{count(number, 'more column')} in a wider window"


def noisy_answer(condition: str, apart: float) -> str:
    """Why nothing is recommended where two copies of the baseline are a fraction `apart`."""
    return f"{condition}: noisy: {_copies_differ(apart)}, so no switch is recommended."


def noisy_baseline(apart: float) -> str:
    """What is said beside the latency of a baseline that is measured alone, whose copies are a fraction `apart`."""
    return f"noisy: {_copies_differ(apart)}"


def _copies_differ(apart: float) -> str:
    return f"two copies of the baseline differ by {percent(apart).replace(' ', FIXED)}"


def nothing_measured(condition: str) -> str:
    return f"{condition}: no cell has a usable latency from a complete block."


def gain_words(gain: str) -> str:
    """A speed-up and of what it is one."""
    return f"{gain} as fast as the baseline"


class Left(StrEnum):
    """What a terminal has no room for, one of it."""

    ANSWER = "more answer"
    WARNING = "more warning"
    ROW = "more row"
    PAIR = "more such pair"
    PEER = "other implementation"


def left(number: int, what: Left) -> str:
    """How many of what is not shown, and where it stands."""
    return f"{count(number, what)} in the report"


def failed_cells(by_status: Mapping[str, int]) -> str:
    said = ", ".join(f"{number} {status}" for status, number in by_status.items())
    return f"cells without a speed-up: {said}; the report says why."


def damaged(places: int) -> str:
    return f"the record is damaged in {count(places, 'place')}; the report says where."


def ended_early_words(places: Mapping[str, tuple[int, int]]) -> str:
    """`places`: conditions with their blocks and the least number of these."""
    said = [f"{where} ({blocks} of {count(least, 'block')})" for where, (blocks, least) in places.items()]
    return f"the time limit ended measuring before its least number of blocks: {listing(said)}."


def failed_controls(number: int) -> str:
    return f"{count(number, 'control')} failed; the report says which, and what it means."


def marks_of(band: float, *, noisy: bool, idle: bool, corrected: bool) -> str:
    """What the marks of the table mean; those of noise and of what changes nothing where there is some.

    `corrected`: whether some effect is undecided though its interval leaves out 1.
    """
    more = ", by Holm also where an interval leaves out 1" * corrected
    more += ", ~ within the noise" * noisy + ", ∅ changes nothing" * idle
    return f"(= the same within ±{100 * band:g}{FIXED}%, ? undecided{more})"


def switches_title(others: str, marks: str) -> str:
    return f"Each switch{f', {others}' if others else ''} {marks}"


def cells_title(marks: str) -> str:
    return f"Against the baseline {marks}"


def only_helps_with(small: str, large: str, places: Iterable[str]) -> str:
    return f"{small} helps only with {large} on ({listing(list(places))})."


def prediction_words(found: BestCell) -> str:
    """Whether what a screen predicts to be best was measured so."""
    if found.measured is None:
        return "the predicted best has no speed-up"
    if found.held is None:
        return "rely on this number; another cell may be faster"
    return "as predicted" if found.held else "predictions missed"
