"""Titles, notes, legends and alternative texts of plots; a title states what is seen, as far as verdicts go."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qwen3bench.record.states import Verdict
from qwen3bench.reporting.finding import Effect, NoVerdict
from qwen3bench.reporting.lookup import AVERAGE
from qwen3bench.reporting.units import count, listing, percent, ratio, seconds, size
from qwen3bench.reporting.wording.ratio_words import band_words

NO_STEADY_GAIN = "No switch is shown to be faster everywhere"
OTHERS_DIFFER = "What the other switches do differs from {place} to {place}"
NOISY_EVERYWHERE = "Noisy everywhere: two copies of the baseline differ"
NOISE_NOT_COUNTED = "; what is no more than the noise does not count in the title"
TIMES_AS_FAST = "× as fast when switched on"
JOINT_EFFECT = "joint effect (×, above 1: worth more together)"
DECIDED_MARK = "* shown to be worth more or less together; without: not shown"
HOLLOW: dict[str, str] = {
    Verdict.UNDECIDED: "undecided",
    NoVerdict.NOISE: "noise",
    NoVerdict.IDLE: NoVerdict.IDLE,
}  # what marks that are not filled say, by verdict
SHAPLEY = "Shapley share of each switch, the mean over all orders of switching on; the largest first"
SHAPLEY_OF_MODEL = f"{SHAPLEY},\nof the model fitted to the screen"
INTENSITY = "arithmetic intensity (FLOP per byte that must be moved)"
# A mark on the map over several runs, and what it says.
MAP_MARKS: dict[str, str] = {
    "*": "faster or slower",
    "=": "same within {band}",
    "?": "undecided",
    "~": "within the noise",
    "∅": "changes nothing",
    "–": "no verdict",
}


def sentence_of(parts: Sequence[tuple[str, Sequence[str]]], otherwise: str) -> str:
    """`Faster: flash and norm; undecided: mask`, or `otherwise` where no part has a name."""
    title = "; ".join(f"{words}: {listing(list(names))}" for words, names in parts if names) or otherwise
    return title[0].upper() + title[1:]


def _on_average(words: str, others: str) -> str:
    return f"{words} on average" if others == AVERAGE else words


def noisy_title(title: str, *, noisy: bool = True) -> str:
    """The title, with a warning before it where the condition is noisy."""
    return title if not noisy else f"Noisy: {title}"


def effects_title(names: Mapping[str, Sequence[str]], others: str, width: float) -> str:
    """Which switches have which verdict; `others`: what the other switches do meanwhile."""
    words: dict[str, str] = {
        Verdict.FASTER: _on_average("faster", others),
        Verdict.SLOWER: _on_average("slower", others),
        Verdict.SAME: f"same within {band_words(width)}",
        NoVerdict.IDLE: NoVerdict.IDLE,
        Verdict.UNDECIDED: "undecided",
    }
    parts = [(said, names.get(verdict, ())) for verdict, said in words.items()]
    return sentence_of(parts, "No effect on latency could be judged")


def effects_alt(effects: Iterable[Any]) -> str:
    """`effects`: rows with a term, an estimate and its interval."""
    named = [f"{row.term} {ratio(row.estimate, row.lo, row.hi)}" for row in effects]
    return f"Effects on latency with intervals: {listing(named, 12)}."


def interactions_left_out(number: int) -> str:
    """To follow a note."""
    return f"; {count(number, 'interaction')} left out: small, or of three and more without a direction"


def each_switch_beside(others: str) -> str:
    """To follow a note: what the other switches do; nothing where there are none."""
    return f"; each switch {others}" if others else ""


def effect_axis(level: str, width: float, hollow: Sequence[str] = (), *, pairs: bool = False) -> str:
    """What the axis of effects is, also of `pairs`, its bars, its `hollow` marks and its gray band."""
    what = f"{TIMES_AS_FAST}{' (pairs: joint effect)' * pairs}"
    return f"{what}, {level} interval; {hollow_words(hollow)}gray: {band_words(width)}"


def hollow_words(verdicts: Iterable[str]) -> str:
    """What hollow marks say, by the verdicts that are so drawn."""
    said = [words for verdict, words in HOLLOW.items() if verdict in set(verdicts)]
    return f"hollow: {' or '.join(said)}; " if said else ""


def interactions_alt(title: str) -> str:
    return f"Two-way interactions of latency. {title}."


def interactions_title(shown: int, pairs: int, most: Effect | None) -> str:
    """How many pairs have a direction, and the largest of these."""
    if most is None:
        return f"None of {count(pairs, 'pair')} is shown to be worth more or less together"
    much = "more" if most.estimate > 1 else "less"
    words = f"{' and '.join(most.term.split(':'))} are worth {much} together, {ratio(most.estimate, most.lo, most.hi)}"
    return f"{shown} of {count(pairs, 'pair')} interact; {words}"


def by_condition_title(
    everywhere: Sequence[str], in_places: Sequence[str], helped_by: Mapping[str, str], others: str, *, quiet: bool
) -> str:
    """Which switches are faster in all conditions, which in some alone, and which only with another one on.

    `others`: what the other switches do meanwhile.
    """
    steady = f"{_on_average('faster', others)} {'in every condition' if quiet else 'wherever it is not noisy'}"
    pairs = [f"{small} with {large}" for small, large in helped_by.items()]
    parts = [(steady, everywhere), ("faster only in places", in_places), ("only together", pairs)]
    return sentence_of(parts, NO_STEADY_GAIN)


def by_condition_alt(title: str) -> str:
    return f"Main effects by workload and runtime. {title}."


def map_title(steady: Sequence[str], fading: Sequence[str], turning: Sequence[str], others: str, *, quiet: bool) -> str:
    """Over several runs: which switches are faster everywhere, which the same in places, which change sign.

    `others`: what the other switches do meanwhile.
    """
    said = f"{_on_average('faster', others)} {'everywhere' if quiet else 'wherever it is not noisy'}"
    parts = [(said, steady), ("the same in places", fading), ("changes sign", turning)]
    return sentence_of(parts, NO_STEADY_GAIN)


def map_note(runs: int, marks: Iterable[str], width: float, shown: int, total: int) -> str:
    """How many runs, what the marks on the map say, and how many conditions have room."""
    seen = set(marks)
    said = [f"{mark} {words.format(band=band_words(width))}" for mark, words in MAP_MARKS.items() if mark in seen]
    cut = f"; the first {shown} of {total} conditions" if shown < total else ""
    return f"n = {count(runs, 'run')}; {', '.join(said)}{cut}"


def map_alt(title: str) -> str:
    return f"Effect of every switch under every condition. {title}."


def trends_note(runs: int, width: float, hollow: Iterable[str]) -> str:
    """How many runs, what bars and the gray band are, and what hollow marks say by their verdicts."""
    return f"n = {count(runs, 'run')}; bars: intervals; {hollow_words(hollow)}gray: {band_words(width)}"


def trends_title(first: int, last: int, most: str) -> str:
    return f"Effects from {first} to {last} prompt tokens{most}"


def ranked_title(number: int, fastest: tuple[str, float], slowest_s: float, baseline_s: float | None) -> str:
    """From where to where the cells reach, and where the baseline stands."""
    name, least_s = fastest
    if number == 1:
        return f"{name}: {seconds(least_s)}"
    reach = f"{count(number, 'cell')} take {seconds(least_s)} to {seconds(slowest_s)}"
    return reach if baseline_s is None else f"{reach}; the baseline takes {seconds(baseline_s)}"


def ranked_alt(title: str) -> str:
    return f"Latency of every cell, fastest on top. {title}."


def latency_axis(unit: str, level: str, samples: str) -> str:
    return f"latency ({unit}), {level} interval; n = {samples} samples per cell"


def front_title(front: int, cells: int, width: float, least_bytes: float) -> str:
    """How many cells no other one equals or beats in both latency and peak memory."""
    many = f"{count(front, 'cell')} {'lies' if front == 1 else 'lie'} on the Pareto front of {cells}"
    return f"{many}, within {band_words(width)}; the smallest peak is {size(least_bytes)}"


def front_alt(cells: int, front: Sequence[str]) -> str:
    return f"Latency against peak memory of {cells} cells; Pareto front: {listing(list(front))}."


def roofline_title(least: float, most: float) -> str:
    return f"Cells reach {percent(least)} to {percent(most)} of what the device allows"


def ceilings(device: str, products: str, copies: str) -> str:
    return f"{device}; ceilings measured: {products} in matrix products, {copies} in copies"


def roofline_alt(title: str) -> str:
    return f"Achieved arithmetic rate of each cell under the roofline. {title}."


def waterfall_title(what: str, ends: str, largest: tuple[str, str] | None) -> str:
    """From where to where all switches lead, and the largest share where it stands apart."""
    whole = f"All on: {what} {ends}"
    return f"{whole}; the largest share is that of {largest[0]}, {largest[1]}" if largest else whole


def waterfall_alt(what: str, title: str) -> str:
    return f"Waterfall of {what} from baseline to all on. {title}."


TEMPORARY = "temporary"


def parts_title(most: tuple[str, str], least: tuple[str, str], unit: str) -> str:
    """Which cell of a training step takes the most memory, and which the least."""
    return f"{most[0]} takes {most[1]} {unit} at the peak, {least[0]} {least[1]} {unit}"


def parts_alt(cells: int, title: str) -> str:
    return f"Peak memory of {count(cells, 'cell')} by what holds it. {title}."


def copies_title(estimate: float, lo: float, hi: float, *, noisy: bool) -> str:
    said = f"two copies of the baseline read {ratio(estimate, lo, hi)}"
    return noisy_title(said) if noisy else said[0].upper() + said[1:]


def processes_title(apart: float) -> str:
    return f"processes are up to {percent(apart)} apart"


def copies_axis(blocks: int, level: str) -> str:
    return f"block (n = {blocks}); gray: allowed; colored: mean, {level}"


def drift_axis(blocks: int) -> str:
    return f"time into the run (s); n = {count(blocks, 'block')}"
