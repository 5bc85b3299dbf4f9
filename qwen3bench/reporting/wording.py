"""One finding, and the words that a verdict supports."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from qwen3bench.record.states import Verdict
from qwen3bench.reporting.units import ratio


class NoVerdict(StrEnum):
    """What is said where the analysis has no verdict: no interval, or two copies of the baseline as far apart."""

    MISSING = "missing"
    NOISE = "noise"


@dataclass(frozen=True)
class Finding:
    """One sentence of a report.

    `kind` groups it: together, recommended, switch (and what the others do, see `lookup.others_beside`), only switch,
    interaction, memory, peer, undecided, control, failure, missing. `level` is `warning` where it
    limits what the others are worth, else `plain`.
    """

    text: str
    kind: str
    level: str = "plain"


def verdict_of(lo: float, hi: float, width: float) -> Verdict | NoVerdict:
    """Verdict on a cell's speed-up from its interval: same inside 1 ± width, faster above 1, slower below."""
    if not lo <= hi:  # there is no interval
        return NoVerdict.MISSING
    if 1 - width <= lo and hi <= 1 + width:
        return Verdict.SAME
    return Verdict.FASTER if lo > 1 else Verdict.SLOWER if hi < 1 else Verdict.UNDECIDED


def worth(verdict: str, estimate: float, lo: float, hi: float, width: float) -> str:
    """What a switch or cell is worth in latency, in the words that its verdict supports."""
    interval = ratio(estimate, lo, hi)
    words: dict[str, str] = {
        Verdict.FASTER: f"{interval} faster",
        Verdict.SLOWER: f"slower, {interval}",
        Verdict.SAME: f"the same within ±{100 * width:g} %, {interval}",
        Verdict.UNDECIDED: f"undecided, {interval}",
        NoVerdict.NOISE: f"no more than the noise, {interval}",
    }
    return words.get(verdict, f"{interval} without a verdict" if interval else "not measured")
