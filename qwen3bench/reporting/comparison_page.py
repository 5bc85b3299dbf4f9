"""The comparison of two runs as a page: its parts in words and rows of text, for markdown and HTML alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from qwen3bench.analysis.changes import Compared
from qwen3bench.analysis.comparison import Comparison
from qwen3bench.analysis.regression import Change
from qwen3bench.record.design import BASELINE
from qwen3bench.reporting.templates import render
from qwen3bench.reporting.units import BYTES, SECONDS, listing, p_value, ratio, unit_for
from qwen3bench.reporting.wording.comparison_words import (
    MEMORY,
    NO_DIFFERENCE,
    NOT_JUDGED,
    changes_words,
    headline,
    verdict_lines,
    warned,
)

_WHERE = ("workload", "runtime")
_RATIOS = (Compared.SPEEDUP, Compared.PEER)
_MOST = 6  # of a list's entries: the cells of a screen are 64
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
    yield Part("Verdict", headline(comparison), (*warned(comparison), *verdict_lines(comparison)))
    settings: dict[str, Show] = {"key": str, "a": _value, "b": _value}
    for title, table in (("Configuration", comparison.config), ("Environment", comparison.environment)):
        yield _part(title, "" if len(table) else NO_DIFFERENCE, table, settings)
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


def _changes(title: str, table: pd.DataFrame, names: tuple[str, ...], comparison: Comparison) -> Part:
    counts = {state: int((table["change"] == state).sum()) for state in Change}
    rows = table[table["change"] != Change.TOLERATED]
    text = changes_words(counts, comparison.tolerance, shown=len(rows) > 0)
    return _part(title, text, _with_change(rows), _names(*names) | {"a": ratio, "b": ratio} | _CHANGE)


def _latency(comparison: Comparison) -> Part:
    changes = comparison.changes[comparison.changes["kind"] == Compared.LATENCY]
    table = comparison.latency
    unit = unit_for([*table["a"], *table["b"]], SECONDS)
    shown = {f"{run} ({unit.symbol})": unit.text for run in ("a", "b")}
    table = table.rename(columns={"a": f"a ({unit.symbol})", "b": f"b ({unit.symbol})"})
    if not len(changes):
        return _part("Latency", NOT_JUDGED, table[table["cell"] == BASELINE], _names("cell", *_WHERE) | shown)
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
    return _part("Memory", MEMORY, rows, _names("cell", *_WHERE) | shown | {"change": str})


_CHANGE: dict[str, Show] = {"change": str, "p_holm": lambda p: "—" if pd.isna(p) else p_value(p), "result": str}


def _with_change(rows: pd.DataFrame) -> pd.DataFrame:
    told = [ratio(*r) or "—" for r in rows[["ratio", "lo", "hi"]].itertuples(index=False)]
    return rows.assign(result=rows["change"], change=told)


def _names(*names: str) -> dict[str, Show]:
    return dict.fromkeys(names, str)


def _part(title: str, text: str, table: pd.DataFrame, shown: Mapping[str, Show]) -> Part:
    texts = [[show(value) for value in table[name]] for name, show in shown.items()]
    return Part(title, text, (), tuple(shown), tuple(zip(*texts, strict=True)))


def _value(value: Any) -> str:
    if isinstance(value, list) and len(value) > _MOST:
        return listing([*map(str, value)], _MOST)
    return "—" if value is None else str(value)
