"""One finding, and the words that a verdict supports."""

from __future__ import annotations

from dataclasses import dataclass

from qwen3bench.reporting.units import ratio


@dataclass(frozen=True)
class Finding:
    """One sentence of a report.

    `kind` groups it: together, recommended, switch (and what the others do, see `lookup.beside`), only switch,
    interaction, memory, peer, undecided, control, failure, missing. `level` is `warning` where it
    limits what the others are worth, else `plain`.
    """

    text: str
    kind: str
    level: str = "plain"


def verdict_of(lo: float, hi: float, width: float) -> str:
    """Verdict on a cell's speed-up from its interval: same inside 1 ± width, faster above 1, slower below."""
    if not lo <= hi:  # there is no interval
        return "missing"
    if 1 - width <= lo and hi <= 1 + width:
        return "same"
    return "faster" if lo > 1 else "slower" if hi < 1 else "undecided"


def worth(verdict: str, estimate: float, lo: float, hi: float, width: float) -> str:
    """What a switch or cell is worth in latency, in the words that its verdict supports."""
    interval = ratio(estimate, lo, hi)
    words = {
        "faster": f"{interval} faster",
        "slower": f"slower, {interval}",
        "same": f"the same within ±{100 * width:g} %, {interval}",
        "undecided": f"undecided, {interval}",
        "noise": f"no more than the noise, {interval}",
    }
    return words.get(verdict, f"{interval} without a verdict" if interval else "not measured")
