"""The comparison of two runs as a page: its parts in words and rows of text, for markdown and HTML alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from qwen3bench.analysis.comparison import Comparison
from qwen3bench.record.states import Verdict
from qwen3bench.reporting.templates import render

_MAX_NAMED = 12  # of what got slower, in the verdict
Show = Callable[[Any], str]


@dataclass(frozen=True)
class Part:
    """A heading, what is said below it, and a table where there is one."""

    title: str
    text: str = ""
    header: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()


def comparison_page(comparison: Comparison, title: str, kind: str) -> str:
    """The page in `kind`, md or html."""
    return render(f"compare.{kind}.jinja", {"title": title, "parts": list(_parts(comparison))})


def _parts(comparison: Comparison) -> Iterator[Part]:
    settings: dict[str, Show] = {"key": str, "a": _value, "b": _value}
    for title, table in (("Configuration", comparison.config), ("Environment", comparison.environment)):
        yield _part(title, "" if len(table) else "No difference.", table, settings)
    yield Part("Verdict", _verdict(comparison))
    if comparison.only:
        yield Part("Not in both", "; ".join(comparison.only) + ".")
    if len(comparison.status):
        where: dict[str, Show] = dict.fromkeys(("cell", "workload", "runtime"), str)
        yield _part("Status", "", comparison.status, where | {"a": _value, "b": _value})
    yield _changes("Cells", comparison.cells, ("cell", "workload", "runtime", "metric"))
    yield _changes("Effects", comparison.effects, ("term", "kind", "workload", "runtime"))


def _verdict(comparison: Comparison) -> str:
    slower = comparison.slower
    more = f"; and {len(slower) - _MAX_NAMED} more, below" if len(slower) > _MAX_NAMED else ""
    text = f"Slower: {'; '.join(slower[:_MAX_NAMED])}{more}." if slower else "Nothing is shown to have got slower."
    warnings = [f"A and B measure different things: {unlike}" for unlike in comparison.unlike]
    if comparison.lost:
        warnings.append(f"no longer measured: {'; '.join(comparison.lost[:_MAX_NAMED])}")
    return " ".join([*(f"Warning: {warning}." for warning in (*warnings, *comparison.warnings)), text])


def _changes(title: str, table: pd.DataFrame, names: tuple[str, ...]) -> Part:
    changed = table[~table["verdict"].isin([Verdict.SAME, Verdict.UNDECIDED])]
    same, undecided = (int((table["verdict"] == v).sum()) for v in (Verdict.SAME, Verdict.UNDECIDED))
    text = f"{len(changed)} changed, {same} the same, {undecided} undecided."
    if len(changed):
        text += " A ratio above 1: B is faster, or needs less."
    rows = changed.assign(change=[_interval(*r) for r in changed[["ratio", "lo", "hi"]].itertuples(index=False)])
    shown: dict[str, Show] = dict.fromkeys(names, str)
    return _part(
        title, text, rows, shown | {"a": _number, "b": _number, "change": str, "p_holm": _number, "verdict": str}
    )


def _part(title: str, text: str, table: pd.DataFrame, shown: Mapping[str, Show]) -> Part:
    texts = [[show(value) for value in table[name]] for name, show in shown.items()]
    return Part(title, text, tuple(shown), tuple(zip(*texts, strict=True)))


def _value(value: Any) -> str:
    return "—" if value is None else str(value)


def _number(value: float) -> str:
    return "—" if pd.isna(value) else f"{value:.4g}"


def _interval(ratio: float, lo: float, hi: float) -> str:
    return f"×{ratio:.4f}" if lo == hi else f"×{ratio:.4f} [{lo:.4f}, {hi:.4f}]"
