"""What the comparison of two runs says: its verdict, what got slower, what the runs cannot tell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qwen3bench.analysis.changes import Compared
from qwen3bench.analysis.comparison import Comparison
from qwen3bench.analysis.doubts import Cause, Doubt
from qwen3bench.analysis.regression import CONFIDENCE, MOST_PROCESSES, Change
from qwen3bench.record.design import BASELINE
from qwen3bench.reporting.units import listing, percent, ratio, seconds

MAX_NAMED = 12  # of what got slower, in the verdict
NO_DIFFERENCE = "No difference."
NOT_JUDGED = "Not judged without --latency: between two runs it also holds what the machine did."
MEMORY = "Peak memory that differs, as counted. It is not judged."


def headline(comparison: Comparison) -> str:
    """Whether something got slower, in one sentence."""
    by = _share(comparison.tolerance)
    told = len(comparison.judged)
    if comparison.regressed:
        parts = (
            ("got slower", len(comparison.slower)),
            ("is no longer ok", len(comparison.failed)),
            ("is no longer measured", len(comparison.lost)),
        )
        return f"Something {' and something '.join(words for words, number in parts if number)}."
    if comparison.doubts:
        return f"These runs cannot tell whether something got slower by {by}."
    return f"Nothing got slower by {by}: all {told} that are compared are shown to have lost less."


def warned(comparison: Comparison) -> Iterator[str]:
    """What limits the worth of the comparison."""
    for warning in (*(f"A and B measure different things: {u}" for u in comparison.unlike), *comparison.warnings):
        yield f"Warning: {warning}."


def verdict_lines(comparison: Comparison) -> Iterator[str]:
    """What got slower or was lost, the first of it by name, and what the runs cannot tell."""
    lost = [f"{cell} is no longer measured." for cell in comparison.lost]
    failed = [f"{row.cell} {_became(row.b)} {_where(row)}." for row in comparison.failed.itertuples()]
    said = [*failed, *lost, *(_slower(row) for row in comparison.slower.itertuples())]
    yield from said[:MAX_NAMED]
    if len(said) > MAX_NAMED:
        yield f"{len(said) - MAX_NAMED} more."
    for doubt in comparison.doubts:
        yield from _doubted(doubt, comparison.tolerance)


def changes_words(counts: Mapping[Change, int], tolerance: float, *, shown: bool) -> str:
    """How many were compared and what became of them; how to read the table where one follows."""
    text = (
        f"{sum(counts.values())} compared: {counts[Change.SLOWER]} slower, {counts[Change.FASTER]} faster, "
        f"{counts[Change.TOLERATED]} shown to have lost less than {_share(tolerance)}, "
        f"{counts[Change.UNDECIDED]} undecided."
    )
    return f"{text} A change above 1: B is faster. Intervals hold {100 * CONFIDENCE:g} %." if shown else text


def _became(status: Any) -> str:
    return "is not measured" if status is None else f"is {status}"


def _where(row: Any) -> str:
    return f"({row.workload}, {row.runtime})"


def _slower(row: Any) -> str:
    """What got slower, by how much and where, in one sentence."""
    change = f"{ratio(row.ratio, row.lo, row.hi)} of before {_where(row)}"
    if row.kind == Compared.LATENCY:
        return f"{row.name} takes {seconds(row.b)}, and took {seconds(row.a)}: its speed is {change}."
    if row.kind == Compared.MAIN:
        return f"{row.name} is worth {ratio(row.b)} on average, and was {ratio(row.a)}: {change}."
    return f"{row.name} is {ratio(row.b)} as fast as {_over(row)}, and was {ratio(row.a)}: {change}."


def _over(row: Any) -> str:
    return f"the {BASELINE}" if row.over == BASELINE else str(row.over)


def _doubted(doubt: Doubt, tolerance: float) -> Iterator[str]:
    """What the runs cannot tell, and what would tell it."""
    where, names, by = _where(doubt), listing(list(doubt.names)), _share(tolerance)
    more = f"measure.min_processes={doubt.processes}"
    if doubt.cause == Cause.NOT_COMPARED:
        yield f"{names}: no ratio within a run is in both runs {where}."
        yield "Measure a switch or a peer beside the baseline, or judge raw latencies with --latency."
    elif doubt.cause == Cause.NO_CONTROL:
        yield f"{names}: no A/A control, so nothing shows how far two copies of one model differ {where}."
        yield "Measure again with the baseline in the run: it brings its copy along."
    elif doubt.cause == Cause.CONTROL:
        apart = " and ".join(percent(fraction) for fraction in doubt.apart)
        yield f"Two copies of the baseline are {apart} apart in A and B, together no less than {by} {where}."
        if doubt.processes is None:
            yield "Find what disturbs them: another process, too few CPUs, a clock that changes."
        else:
            yield f"Chance alone could do that. Measure both again with {more}."
    else:
        yield f"No loss is shown, and none of {by} is ruled out, for {names} {where}."
        if doubt.processes is None:
            yield f"It would take more than {MOST_PROCESSES} processes: use a quieter machine."
        else:
            yield f"Measure both again with {more}."
        if doubt.tolerance is not None:
            yield f"As they are, the runs rule out losses of --tolerance={doubt.tolerance:g}."


def _share(tolerance: float) -> str:
    return f"{100 * tolerance:g} %"
