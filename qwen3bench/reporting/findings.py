"""Findings: sentences made from the analysis, each with its interval and the condition it holds for.

A sentence says what a verdict supports and no more: `same` is said only of an interval inside the band,
`faster` and `slower` only of those verdicts, everything else is named undecided or missing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwen3bench.analysis.contrasts import OTHERS_OFF, OTHERS_ON
from qwen3bench.reporting import control_findings
from qwen3bench.reporting.conditions import conditions
from qwen3bench.reporting.findings_cells import failures, missing, peers, recommended
from qwen3bench.reporting.findings_effects import each_switch, joint, memory, together
from qwen3bench.reporting.findings_undecided import undecided
from qwen3bench.reporting.lookup import AVERAGE, UNLIKE
from qwen3bench.reporting.units import count
from qwen3bench.reporting.wording import Finding

if TYPE_CHECKING:
    from qwen3bench.analysis.run import Run

# Kind → heading, in the order in which they are read.
_HEADINGS = {
    "together": "All together",
    "recommended": "What to switch on",
    "switch": f"Each switch, {AVERAGE}",
    **{f"switch {others}": f"Each switch, {others}" for others in (OTHERS_OFF, OTHERS_ON, UNLIKE)},
    "only switch": "The switch",
    "interaction": "Switches that interact",
    "memory": "Memory",
    "peer": "Other implementations",
    "undecided": "Undecided",
    "control": "Controls",
}


def findings(run: Run) -> list[Finding]:
    """All findings of a run; those that limit what the others are worth have the level `warning`."""
    outcome = control_findings.sentences(run)
    found = [
        *missing(run),
        *(Finding(c.text, "control", "warning") for c in outcome if c.failed),
        *failures(run),
    ]
    for of_condition in (together, recommended):
        found += [finding for condition in conditions(run) for finding in of_condition(run, condition)]
    found += [*each_switch(run), *joint(run), *memory(run), *peers(run)]
    found += [finding for condition in conditions(run) for finding in undecided(run, condition)]
    if held := [control for control in outcome if control.judged and not control.absent]:
        passed = sum(not (control.failed or control.unsure) for control in held)
        unsure = sum(control.unsure for control in held)
        reach = f"; the interval of {unsure} reaches too far to tell" if unsure else ""
        found.append(Finding(f"{passed} of {count(len(held), 'control')} show nothing wrong{reach}.", "control"))
    return found


def grouped(found: list[Finding]) -> list[tuple[str, list[Finding]]]:
    """Findings under their headings, in the order in which they are read."""
    groups = ((heading, [finding for finding in found if finding.kind == kind]) for kind, heading in _HEADINGS.items())
    return [(heading, group) for heading, group in groups if group]
