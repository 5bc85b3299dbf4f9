"""A ratio of latencies in words: how many times as fast, its verdict, where it holds."""

from __future__ import annotations

from qwen3bench.record.states import Verdict
from qwen3bench.reporting.finding import Effect, Finding, NoVerdict
from qwen3bench.reporting.units import ratio


def band_words(width: float) -> str:
    """The band inside which nothing is told from nothing, such as `±1 %`."""
    return f"±{100 * width:g} %"


def interval(finding: Finding | Effect) -> str:
    """How many times as fast, with its interval: `1.27× [1.26, 1.28]`."""
    return ratio(finding.estimate, finding.lo, finding.hi)


def worth(effect: Finding | Effect) -> str:
    """An effect on latency for a table of how many times as fast: `1.27× [1.26, 1.28]`, `1.00× [0.99, 1.01] same`."""
    return f"{interval(effect)} {verdict_word(effect.verdict)}".rstrip() if interval(effect) else "not measured"


def worth_said(effect: Finding | Effect) -> str:
    """The same where no heading says what the ratio is of: `0.90× as fast [0.89, 0.91]`, and a word for its verdict."""
    gain, _, ends = interval(effect).partition(" ")
    said = f"{gain} as fast {ends}".rstrip()
    return ", ".join(filter(None, (said, verdict_word(effect.verdict)))) if gain else "not measured"


def verdict_word(verdict: str) -> str:
    """What a verdict adds to a ratio: nothing where the ratio says it itself, above or below 1."""
    return _VERDICT_WORDS.get(verdict, "no verdict")


_VERDICT_WORDS: dict[str, str] = {
    Verdict.FASTER: "",
    Verdict.SLOWER: "",
    Verdict.SAME: "same",
    Verdict.UNDECIDED: "undecided",
    NoVerdict.NOISE: "within the noise",
    NoVerdict.IDLE: NoVerdict.IDLE,
}


def where_words(finding: Finding) -> str:
    """Its condition, behind what is said: ` (prefill graph)`."""
    return f" ({finding.condition})" if finding.condition else ""
