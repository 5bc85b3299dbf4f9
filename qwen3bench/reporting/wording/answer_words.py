"""What an answer's card says beside its numbers: how sure it is, and what it does not tell."""

from __future__ import annotations

from collections.abc import Sequence

from qwen3bench.reporting.finding import Passed
from qwen3bench.reporting.units import count, duration_words, listing, ratio
from qwen3bench.reporting.wording.control_words import FEW_PASSES

NOTHING_HERE = "No cell has a usable latency from a complete block here."
_SCOPE = "They hold for this {device}, these versions and these sizes. Another prompt length is another experiment."
_RANDOM = "The weights are random, so nothing is said about the quality of the output."
_GRAPH = "Graph replays are device time: what Python and the launches of kernels add on the host is not in them."
_ALONE = "Peak memory is of one cell alone in its process, with no other request beside it."
_BASELINE = "The baseline writes attention out, which few people run."
_PEERS = "Nothing was measured beside transformers: add peer=transformers to the command."


def interval_words(level: str, estimate: float, lo: float, hi: float) -> str:
    """The interval of a gain that is shown by itself: `95 % interval 1.26 to 1.28`."""
    bounds = ratio(estimate, lo, hi).partition(" ")[2].strip("[]").replace(", ", " to ")
    return f"{level} interval {bounds}"


def how_sure(told: Passed, of_run: int, copies: list[tuple[float, float, float]], blocks: str) -> str:
    """How many controls of an answer passed, how far two copies of the baseline are apart, and in how many blocks.

    `of_run`: controls that the list of the whole run holds.
    """
    controls = "No control was measured" if not told.held else f"{told.passed} of {count(told.held, 'control')} passed"
    controls += f", {told.unsure} cannot tell" if told.unsure else ""
    if told.held and told.passed == told.held:
        controls = f"All {count(told.passed, 'control')} passed" if told.passed > 1 else "The control passed"
    if others := (of_run - told.held) * bool(told.held):
        controls += f"; {others:,} more {'concerns' if others == 1 else 'concern'} other answers"
    apart = "".join(f" Two copies of the baseline read {ratio(*each)}." for each in copies)
    return f"{controls}.{apart} Measured in {blocks}."


def without_graph(gain: float) -> str:
    """What is left of a gain where no graph saves the host's launches, by the few eager passes that a run takes."""
    return (
        f"That takes a CUDA graph: launched from Python it reads about {gain:.1f}×, by {FEW_PASSES} and without an "
        "interval. To measure it, add runtime=eager,graph."
    )


def cut_short(blocks: int, least: int) -> str:
    """That the time limit ended measuring with fewer blocks than it was to take at least."""
    return f"The time limit ended measuring after {count(blocks, 'block')}, before the least number of {least}."


def measured_of(switches: Sequence[str]) -> str:
    """Of which cell numbers are that stand under no recommendation; empty for the baseline, which a sentence names."""
    return f"With {listing([*switches])} on:" if switches else ""


def would_tell(seconds: float | None) -> str:
    """Before the command that would give an answer; how long it takes where that is known."""
    return f"This would tell, in about {duration_words(seconds)}:" if seconds is not None else "This would tell:"


def limits_of_answers(*, cpu: bool, random: bool, graph: bool, memory: bool, peers: bool) -> list[str]:
    """What a run's answers do not tell, by what it measured."""
    said = [
        _SCOPE.format(device="processor" if cpu else "card"),
        *[_RANDOM] * random,
        *[_GRAPH] * graph,
        *[_ALONE] * memory,
    ]
    return [*said, _BASELINE if peers else f"{_BASELINE} {_PEERS}"]
