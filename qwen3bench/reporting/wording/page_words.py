"""What the report's pages say beside findings: leads, notes of tables, why measuring stopped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qwen3bench.record.states import StopReason, Verdict
from qwen3bench.reporting.finding import NoVerdict
from qwen3bench.reporting.units import count, listing

# What stands over tables and toggles, by the name that the templates use.
PAGE = {
    "nothing": "Nothing was measured.",
    "gain": "as fast as the baseline",
    "answer": "Turn on **{switches}**: **{gain}** as fast as the baseline ({interval}).",
    "command": "Measure it on your machine:",
    "python": "Use it in Python:",
    "effects": "How many times as fast with the switch on as with it off{others}.",
    "shading": "Effect of each switch on latency. Shaded by size, gray: the same, dashed: not decided.",
    "holm": "Undecided beside an interval without 1: verdicts are corrected for the number of effects (Holm), "
    "intervals are not.",
    "open": "If the estimates hold, these settings added to the command decide.",
    "what_if": "Every number was measured. Beside each switch stands how many times as fast the model is once it is "
    "turned on or off from here. Of twenty such intervals, about one misses the true value.",
    "what_if_screen": "What is marked as predicted comes from the fit, all else was measured. Beside each switch "
    "stands how many times as fast the model is once it is turned on or off from here.",
    "halves": "What a switch is worth with the other on and off, on average over the rest (joint effect: the root of "
    "their ratio, above 1 more together)",
    "parts": "Launched from Python one by one, each behind a synchronize: they do not add up to a step.",
    "stack": "The waterfall splits the gain of all on into Shapley shares, which multiply to it. To judge one switch, "
    "take its average above; for one combination, the row that was measured.",
    "stack_screen": "The waterfall shows the Shapley shares of the model fitted to the screen, which multiply to what "
    "it says of all on. The last bar was measured. To judge one switch, take its average above.",
    "errors": "How far each cell's logits are from the reference, the same function in float64 by code of its own. "
    "Maximum error: in float32. KL (nats) and top-1 agreement: in the run's dtype.",
    "ran": "What ran in the cells of these pairs",
    "screen": "Each switch alone (the others off), on average over the others, and last (the others on). The average "
    "ranks them. All three come from main effects and pairs, fitted to the measured cells.",
    "confirmed": "What was predicted to be fastest, beside what was measured",
    "over": "How many times as fast with the switch on, by run and condition",
    "cut": "{most} of {total} rows; all of them are in report.html and in the csv files.",
}
TRAINED = (
    " In training each visit begins from the same weights and empty moments, put back outside what is timed. All cells "
    "share them. MFU counts three forwards, causal attention once, and nothing that is recomputed."
)
GAIN_HEADING = "× as fast as the baseline"
HALVES_HEADINGS = ["switch", "beside", "with it on (× as fast)", "with it off (× as fast)", "joint effect"]
SCREEN_HEADINGS = [
    "switch",
    "on average (× as fast)",
    "turn on?",
    "alone (× as fast)",
    "last, beside all others (× as fast)",
]
CONFIRMED_HEADINGS = ["cell", "predicted (× as fast)", "measured (× as fast)", "prediction"]
# What the toggles say of a cell that was not measured.
TOGGLES = {"predicted": "predicted", "unmeasured": "not measured"}
STOPPED = {
    StopReason.TARGET: "every main effect is as tight as asked for",
    StopReason.MAX_SECONDS: "the time allowed was up",
    StopReason.OUT_OF_REACH: "each effect has an answer, and the target takes more than the time allowed",
    StopReason.MAX_BLOCKS: "the blocks allowed were used up",
    StopReason.FAILED: "measuring failed",
    StopReason.ENDED: "the run was ended before",
}


def compiled_words(by_options: Mapping[str, Sequence[str]]) -> str:
    """How cells were compiled: the options, and the cells of each where they are several."""
    each = [
        f"{said or 'its defaults'}{f' ({listing(sorted(set(cells)))})' if len(by_options) > 1 else ''}"
        for said, cells in by_options.items()
    ]
    return f"Each process compiled for itself, Inductor's options: {'; '.join(each)}."


def single_token_words(options: str) -> str:
    return f", for a single token {options}"


def worth_word(on: bool | None, verdicts: Sequence[str]) -> str:
    """Whether to turn a switch on: as the recommended cell has it (None: there is none), else by its verdicts."""
    if set(verdicts) == {NoVerdict.IDLE}:
        return NoVerdict.IDLE
    if on:
        return "on"
    if Verdict.FASTER not in verdicts and Verdict.SLOWER in verdicts:
        return "leave off: slower"
    if Verdict.FASTER not in verdicts and Verdict.SAME in verdicts:
        return "leave off: nowhere shown to be faster"
    return "not known" if on is None or Verdict.FASTER not in verdicts else "leave off in this cell"


def held_word(agrees: bool | None, *, tested: bool, in_screen: bool) -> str:
    """Whether a prediction held; `tested`: whether the intervals are narrow enough to tell."""
    if agrees is None:
        return "not measured"
    word = "missed" if not agrees else "holds" if tested else "too wide to tell"
    return word + (", measured in the screen" if in_screen else "")


def measured_again(cells: Sequence[str]) -> str:
    """Under predictions beside what was measured: of cells that the screen measured before, in other blocks."""
    return f"Measured again here, so the screen's number differs: {listing([*cells], 3)}." if cells else ""


def what_if_words(*, screen: bool) -> str:
    """What stands over the toggles."""
    return PAGE["what_if_screen" if screen else "what_if"]


def stack_words(*, screen: bool) -> str:
    """What stands over the waterfalls."""
    return PAGE["stack_screen" if screen else "stack"]


def pairs_left(left: int, pairs: int, told: int) -> str:
    """Of the interactions that no sentence tells."""
    if not told:
        return f"No interaction of {count(pairs, 'pair')} is shown."
    return f"{count(left, 'other pair')} of {pairs}: a smaller joint effect, or none shown." if left else ""


def effects_left_out(verdicts: Mapping[str, int], untold: Mapping[str, int]) -> str:
    """Of a table of effects: interactions of three and more by verdict, and how many of a kind are not told."""
    said = ", ".join(f"{number} {verdict}" for verdict, number in verdicts.items())
    parts = [f"interactions of three and more switches, {said}"] if said else []
    kinds = {"interaction": "interaction", "shapley": "Shapley share"}
    parts += [f"{count(number, kinds[kind])} that the cells do not tell" for kind, number in untold.items() if number]
    return f"Left out here: {'; '.join(parts)}." if parts else ""


def run_described(name: str, where: Sequence[str], measured: str, *, finished: bool) -> str:
    """A run in the list of a page over several."""
    state = "" if finished else ", unfinished"
    return f"{name}: {listing(list(where), 12) or 'nothing measured'}{f', {measured}' if measured else ''}{state}"
