"""The table of switches: rows are switches, columns are conditions, each field an effect with its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qwen3bench.record.states import Verdict
from qwen3bench.reporting.finding import Beside, Finding, Kind, NoVerdict, Pair, undecided_by_holm
from qwen3bench.reporting.lookup import AVERAGE, UNLIKE
from qwen3bench.reporting.units import is_number, ratio, times
from qwen3bench.reporting.wording.ratio_words import verdict_word
from qwen3bench.reporting.wording.sentences import only_with, only_with_note

_DARKEST = 45  # % of the color behind the largest effect, on which text can still be read
_LOOKS: dict[str, str] = {Verdict.FASTER: "gain", Verdict.SLOWER: "loss", Verdict.SAME: "same", NoVerdict.IDLE: "same"}


@dataclass(frozen=True)
class Field:
    """One effect: its ratio, interval, what its verdict adds in words, and its color with how much of it."""

    gain: str = ""
    interval: str = ""
    word: str = ""
    look: str = "open"
    shade: int = 0

    @property
    def text(self) -> str:
        """All of it in a line."""
        return " ".join(part for part in (self.gain, self.interval, self.word) if part) or "not known"


@dataclass(frozen=True)
class SwitchTable:
    """Conditions, and for each switch its fields in that order; `others`: what the other switches do, in words.

    `corrected`: whether an effect is undecided though its interval leaves out 1.
    """

    conditions: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Field, ...]], ...]
    others: str
    corrected: bool


def switch_table(found: Sequence[Finding]) -> SwitchTable | None:
    """The table of a run's findings on switches; None where it has none."""
    effects = [finding for finding in found if finding.kind == Kind.SWITCH]
    if not effects:
        return None
    where = tuple(dict.fromkeys(finding.condition for finding in effects))
    sizes = [abs(math.log(f.estimate)) for f in effects if is_number(f.estimate) and f.verdict in _LOOKS]
    largest = max([*sizes, math.log(1.1)])
    only = {
        (f.detail.small, f.condition): only_with_note(f.detail)
        for f in found
        if isinstance(f.detail, Pair) and only_with(f.detail)
    }
    by_place = {(finding.subject, finding.condition): finding for finding in effects}
    rows = []
    for name in dict.fromkeys(finding.subject for finding in effects):
        places = [(by_place.get((name, condition)), only.get((name, condition), "")) for condition in where]
        rows.append((name, tuple(_field(effect, largest, note) if effect else Field() for effect, note in places)))
    others = {f.detail.others for f in effects if isinstance(f.detail, Beside) and is_number(f.estimate)}
    said = others.pop() if len(others) == 1 else UNLIKE if others else AVERAGE
    return SwitchTable(where, tuple(rows), said, any(map(undecided_by_holm, effects)))


def _field(finding: Finding, largest: float, note: str) -> Field:
    if not is_number(finding.estimate):
        return Field(word=finding.detail.reason if isinstance(finding.detail, Beside) else "")
    look = _LOOKS.get(finding.verdict, "open")
    part = min(1.0, abs(math.log(finding.estimate)) / largest)
    shade = math.ceil(_DARKEST * math.sqrt(part)) if look in ("gain", "loss") else 0  # small ones can be told apart
    return Field(
        times(finding.estimate, finding.lo, finding.hi),
        ratio(finding.estimate, finding.lo, finding.hi).partition(" ")[2],
        ", ".join(filter(None, (verdict_word(finding.verdict), note, "noisy" if finding.noisy else ""))),
        look,
        shade,
    )
