"""All findings of a run, made from the analysis; `wording` says them.

A finding claims what its verdict supports and no more: `same` only of an interval inside the band, `faster` and
`slower` only of those verdicts, everything else is undecided or missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from qwen3bench.reporting.conditions import conditions
from qwen3bench.reporting.control_findings import control_list, tally
from qwen3bench.reporting.finding import Choice, Finding, Kind, Level, NoAnswer
from qwen3bench.reporting.findings_cells import failures, idle, missing, peers, recommended
from qwen3bench.reporting.findings_effects import each_switch, joint, memory, together
from qwen3bench.reporting.findings_screen import screened
from qwen3bench.reporting.findings_undecided import undecided
from qwen3bench.reporting.wording.sentences import HEADINGS

if TYPE_CHECKING:
    from qwen3bench.analysis.run import Run


def findings(run: Run) -> list[Finding]:
    """All findings of a run; those that limit what the others are worth have the level `warning`."""
    outcome = control_list(run)
    open_effects = [finding for condition in conditions(run) for finding in undecided(run, condition)]
    answers = [finding for condition in conditions(run) for finding in recommended(run, condition)]
    found = [
        *missing(run),
        *(control for control in outcome if control.level == Level.WARNING),
        *failures(run),
        *(_advised(answer, open_effects) for answer in answers),
        *(finding for condition in conditions(run) for finding in screened(run, condition)),
        *(finding for condition in conditions(run) for finding in together(run, condition)),
        *idle(run),
        *each_switch(run),
        *joint(run),
        *memory(run),
        *peers(run),
        *open_effects,
    ]
    if (controls := tally(outcome)).held:
        found.append(Finding(Kind.CONTROL, detail=controls))
    return found


def _advised(answer: Finding, open_effects: Sequence[Finding]) -> Finding:
    """An answer that is none because nothing is shown to be faster, with what decides the open effects there."""
    choice = answer.detail
    if isinstance(choice, Choice) and choice.none == NoAnswer.NOTHING_FASTER:
        there = [finding.advice for finding in open_effects if finding.condition == answer.condition]
        return replace(answer, advice=there[0] if there else None)
    return answer


def grouped(found: Sequence[Finding]) -> list[tuple[str, list[Finding]]]:
    """Findings under their headings, in the order in which they are read."""
    groups: dict[str, list[Finding]] = {heading: [] for heading in HEADINGS.values()}
    for finding in found:
        if finding.kind in HEADINGS:
            groups[HEADINGS[finding.kind]].append(finding)
    return [(heading, group) for heading, group in groups.items() if group]
