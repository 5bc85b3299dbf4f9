"""Do they stack: each interaction in a sentence, and what ran in the cells of these pairs in a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qwen3bench.record.design import label
from qwen3bench.reporting.conditions import Condition
from qwen3bench.reporting.finding import Finding, Kind, Pair
from qwen3bench.reporting.lookup import LATENCY, factors, terms, usable
from qwen3bench.reporting.tables import Entry, Table, evidence_table
from qwen3bench.reporting.units import ratio
from qwen3bench.reporting.wording.page_words import HALVES_HEADINGS, pairs_left
from qwen3bench.reporting.wording.ratio_words import worth
from qwen3bench.reporting.wording.sentences import sentence

if TYPE_CHECKING:
    from qwen3bench.analysis.run import Run


@dataclass(frozen=True)
class Stack:
    """Of a condition: its interactions in sentences, how many pairs are not among them, and tables of those told.

    `halves`: what a switch is worth with the other on and off, with intervals; `ran`: what ran in their cells.
    """

    sentences: tuple[str, ...]
    note: str
    halves: Table | None
    ran: Table | None


def stack(run: Run, condition: Condition, found: Sequence[Finding]) -> Stack | None:
    """None where the cells tell of no pair."""
    told = [finding for finding in found if finding.kind == Kind.INTERACTION and finding.condition == str(condition)]
    joint = terms(run, condition, LATENCY, "interaction")
    pairs = joint[joint["term"].str.count(":") == 1] if len(joint) else joint
    if pairs.empty:
        return None
    note = pairs_left(len(pairs) - len(told), len(pairs), len(told))
    said = tuple(sentence(replace(finding, condition="", noisy=False)) for finding in told)
    return Stack(said, note, _halves(told), _ran(run, condition, told))


def _halves(told: Sequence[Finding]) -> Table | None:
    rows = []
    for finding in told:
        if isinstance(pair := finding.detail, Pair):
            halves = [Entry(worth(half), half.estimate) for half in (pair.with_it, pair.without)]
            joint = Entry(ratio(finding.estimate, finding.lo, finding.hi), finding.estimate)
            rows.append([Entry(pair.small, pair.small), Entry(pair.large, pair.large), *halves, joint])
    return Table(HALVES_HEADINGS, rows) if rows else None


def _ran(run: Run, condition: Condition, told: Sequence[Finding]) -> Table | None:
    """Attention backend and launches in the four cells of each pair, where two of them at least were measured."""
    pairs = [finding.subject.split(":") for finding in told]
    both = [label(tuple(name for name in factors(run) if name in pair)) for pair in pairs]
    names = list(dict.fromkeys(["baseline", *(name for pair in pairs for name in pair), *both]))
    good = set(usable(condition.select(run.cells))["cell"])
    lines = [
        line
        for line in run.evidence
        if (line.workload, line.runtime) == (condition.workload, condition.runtime)
        and line.cell in good
        and line.cell in names
    ]
    return evidence_table(sorted(lines, key=lambda line: names.index(line.cell))) if told and len(lines) > 1 else None
