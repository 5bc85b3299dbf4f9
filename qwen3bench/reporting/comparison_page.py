"""The comparison of two runs as a page: its parts in words and rows of text, for markdown and HTML alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from qwen3bench.analysis.changes import Compared
from qwen3bench.analysis.comparison import Comparison
from qwen3bench.analysis.doubts import Cause, Doubt
from qwen3bench.analysis.regression import CONFIDENCE, MOST_PROCESSES, Change
from qwen3bench.record.design import BASELINE
from qwen3bench.reporting.templates import render
from qwen3bench.reporting.units import BYTES, SECONDS, listing, percent, ratio, seconds, unit_for

_MAX_NAMED = 12  # of what got slower, in the verdict
_INTERVAL = f"{100 * CONFIDENCE:g} %"
_WHERE = ("workload", "runtime")
_RATIOS = (Compared.SPEEDUP, Compared.PEER)
Show = Callable[[Any], str]


@dataclass(frozen=True)
class Part:
    """A heading, what is said below it, a list and a table where there are some."""

    title: str
    text: str = ""
    items: tuple[str, ...] = ()
    header: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()


def comparison_page(comparison: Comparison, title: str, kind: str) -> str:
    """The page in `kind`, md or html."""
    return render(f"compare.{kind}.jinja", {"title": title, "parts": list(_parts(comparison))})


def _parts(comparison: Comparison) -> Iterator[Part]:
    settings: dict[str, Show] = {"key": str, "a": _value, "b": _value}
    for title, table in (("Configuration", comparison.config), ("Environment", comparison.environment)):
        yield _part(title, "" if len(table) else "No difference.", table, settings)
    yield Part("Verdict", _headline(comparison), (*_warned(comparison), *_verdict(comparison)))
    if comparison.only:
        yield Part("Not in both", "; ".join(comparison.only) + ".")
    if len(comparison.status):
        yield _part("Status", "", comparison.status, _names("cell", *_WHERE) | {"a": _value, "b": _value})
    changes = comparison.changes
    effects = changes[changes["kind"].isin([Compared.MAIN, Compared.INTERACTION])]
    yield _changes("Effects", effects.rename(columns={"name": "term"}), ("term", "kind", *_WHERE), comparison)
    ratios = changes[changes["kind"].isin(_RATIOS)].rename(columns={"name": "cell"})
    yield _changes("Ratios within a run", ratios, ("cell", "over", *_WHERE), comparison)
    yield _latency(comparison)
    if len(comparison.memory):
        yield _memory(comparison.memory)


def _headline(comparison: Comparison) -> str:
    by = _share(comparison.tolerance)
    told = len(comparison.judged)
    if comparison.regressed:
        return "Something got slower, is no longer ok or is no longer measured."
    if comparison.doubts:
        return f"These runs cannot tell whether something got slower by {by}."
    return f"Nothing got slower by {by}: all {told} that are compared are shown to have lost less."


def _warned(comparison: Comparison) -> Iterator[str]:
    for warning in (*(f"A and B measure different things: {u}" for u in comparison.unlike), *comparison.warnings):
        yield f"Warning: {warning}."


def _verdict(comparison: Comparison) -> Iterator[str]:
    lost = [f"{cell} is no longer measured." for cell in comparison.lost]
    failed = [f"{row.cell} {_became(row.b)} {_where(row)}." for row in comparison.failed.itertuples()]
    said = [*failed, *lost, *(_slower(row) for row in comparison.slower.itertuples())]
    yield from said[:_MAX_NAMED]
    if len(said) > _MAX_NAMED:
        yield f"{len(said) - _MAX_NAMED} more."
    for doubt in comparison.doubts:
        yield from _doubted(doubt, comparison.tolerance)


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


def _changes(title: str, table: pd.DataFrame, names: tuple[str, ...], comparison: Comparison) -> Part:
    counts = {state: int((table["change"] == state).sum()) for state in Change}
    text = (
        f"{len(table)} compared: {counts[Change.SLOWER]} slower, {counts[Change.FASTER]} faster, "
        f"{counts[Change.TOLERATED]} shown to have lost less than {_share(comparison.tolerance)}, "
        f"{counts[Change.UNDECIDED]} undecided."
    )
    rows = table[table["change"] != Change.TOLERATED]
    if len(rows):
        text += f" A change above 1: B is faster. Intervals hold {_INTERVAL}."
    return _part(title, text, _with_change(rows), _names(*names) | {"a": ratio, "b": ratio} | _CHANGE)


def _latency(comparison: Comparison) -> Part:
    changes = comparison.changes[comparison.changes["kind"] == Compared.LATENCY]
    table = comparison.latency
    unit = unit_for([*table["a"], *table["b"]], SECONDS)
    shown = {f"{run} ({unit.symbol})": unit.text for run in ("a", "b")}
    table = table.rename(columns={"a": f"a ({unit.symbol})", "b": f"b ({unit.symbol})"})
    if not len(changes):
        text = "Not judged without --latency: between two runs it also holds what the machine did."
        return _part("Latency", text, table[table["cell"] == BASELINE], _names("cell", *_WHERE) | shown)
    told = _with_change(changes.rename(columns={"name": "cell"}))
    rows = table.merge(told[["cell", *_WHERE, *_CHANGE]], on=["cell", *_WHERE])
    part = _changes("Latency", changes, (), comparison)
    rows = rows[(rows["result"] != Change.TOLERATED) | (rows["cell"] == BASELINE)]
    return _part("Latency", part.text, rows, _names("cell", *_WHERE) | shown | _CHANGE)


def _memory(table: pd.DataFrame) -> Part:
    unit = unit_for([*table["a"], *table["b"]], BYTES)
    shown = {f"{run} ({unit.symbol})": unit.text for run in ("a", "b")}
    rows = table.rename(columns={"a": f"a ({unit.symbol})", "b": f"b ({unit.symbol})"})
    rows = rows.assign(change=[f"{b / a:.3f}×" for a, b in zip(table["a"], table["b"], strict=True)])
    text = "Peak memory that differs, as counted. It is not judged."
    return _part("Memory", text, rows, _names("cell", *_WHERE) | shown | {"change": str})


_CHANGE: dict[str, Show] = {"change": str, "p_holm": lambda p: "—" if pd.isna(p) else f"{p:.2g}", "result": str}


def _with_change(rows: pd.DataFrame) -> pd.DataFrame:
    told = [ratio(*r) or "—" for r in rows[["ratio", "lo", "hi"]].itertuples(index=False)]
    return rows.assign(result=rows["change"], change=told)


def _names(*names: str) -> dict[str, Show]:
    return dict.fromkeys(names, str)


def _part(title: str, text: str, table: pd.DataFrame, shown: Mapping[str, Show]) -> Part:
    texts = [[show(value) for value in table[name]] for name, show in shown.items()]
    return Part(title, text, (), tuple(shown), tuple(zip(*texts, strict=True)))


def _share(tolerance: float) -> str:
    return f"{100 * tolerance:g} %"


def _value(value: Any) -> str:
    return "—" if value is None else str(value)
