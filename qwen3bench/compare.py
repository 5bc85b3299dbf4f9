"""`python -m qwen3bench.compare A B`: what changed between two runs; a regression gate for CI."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from qwen3bench.analysis.comparison import Comparison, compare
from qwen3bench.analysis.run import load_run
from qwen3bench.config.cli import Parser, guarded
from qwen3bench.errors import UserError
from qwen3bench.record.reader import write_atomic

_MOST_NAMED = 12  # of what got slower, in the verdict
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid #8886; padding: .25rem .75rem; text-align: left; }
td { font-variant-numeric: tabular-nums; max-width: 22rem; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; overflow-wrap: anywhere; }
</style></head><body>
<h1>{{ title }}</h1>
{% for section in sections %}<h2>{{ section.title }}</h2>
{% if section.text %}<p>{{ section.text }}</p>
{% endif %}{% if section.rows %}<table>
<thead><tr>{% for name in section.header %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in section.rows %}<tr>{% for value in row %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table>
{% endif %}{% endfor %}</body></html>
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Prints what changed between two runs as markdown.

    Returns 0; 3 with `--fail-on slower` where something got slower or is no longer measured; 1 where a run cannot be
    read, or such a gate is given runs of different sizes.
    """
    return guarded(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    parser = Parser(
        prog="python -m qwen3bench.compare",
        description="What changed between two runs: settings, cells and effects. Measures nothing.",
    )
    parser.add_argument("a", metavar="RUN_A", help="directory of the run to compare with")
    parser.add_argument("b", metavar="RUN_B", help="directory of the run to judge")
    parser.add_argument("--fail-on", choices=["slower"], help="exit 3 where a cell or an effect got slower")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write the comparison as one HTML file too")
    options = parser.parse_args(argv)
    comparison = compare(load_run(options.a), load_run(options.b))
    if options.fail_on and comparison.unlike:
        raise UserError(f"{options.a} and {options.b} measure different things: {'; '.join(comparison.unlike)}")
    title = f"{options.a} → {options.b}"
    sections = _sections(comparison)
    if options.html:
        page = jinja2.Environment(autoescape=True).from_string(_PAGE)
        write_atomic(options.html, page.render(title=title, sections=sections))
    status = 3 if options.fail_on == "slower" and (comparison.slower or comparison.lost) else 0
    with suppress(BrokenPipeError):  # whoever reads has seen enough (`… | head`); the verdict stands
        print(_markdown(title, sections), flush=True)
        return status
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status


def _sections(comparison: Comparison) -> list[dict[str, Any]]:
    """The comparison in words and rows of text, for markdown and HTML alike."""
    found: list[dict[str, Any]] = []
    both = comparison.config, comparison.environment
    for title, table in zip(("Configuration", "Environment"), both, strict=True):
        text = "" if len(table) else "No difference."
        found.append({"title": title, "text": text} | _rows(table, {"key": str, "a": _value, "b": _value}))
    slower = comparison.slower
    more = f"; and {len(slower) - _MOST_NAMED} more, below" if len(slower) > _MOST_NAMED else ""
    text = f"Slower: {'; '.join(slower[:_MOST_NAMED])}{more}." if slower else "Nothing is shown to have got slower."
    warnings = [f"A and B measure different things: {unlike}" for unlike in comparison.unlike]
    if comparison.lost:
        warnings.append(f"no longer measured: {'; '.join(comparison.lost[:_MOST_NAMED])}")
    said = [f"Warning: {warning}." for warning in (*warnings, *comparison.warnings)]
    found.append({"title": "Verdict", "text": " ".join([*said, text])})
    if comparison.only:
        found.append({"title": "Not in both", "text": "; ".join(comparison.only) + "."})
    if len(comparison.status):
        shown: dict[str, Callable[[Any], str]] = dict.fromkeys(("cell", "workload", "runtime"), str)
        shown |= {"a": _value, "b": _value}
        found.append({"title": "Status"} | _rows(comparison.status, shown))
    for title, table, names in (
        ("Cells", comparison.cells, ("cell", "workload", "runtime", "metric")),
        ("Effects", comparison.effects, ("term", "kind", "workload", "runtime")),
    ):
        found.append(_changes(title, table, names))
    return found


def _changes(title: str, table: pd.DataFrame, names: tuple[str, ...]) -> dict[str, Any]:
    changed = table[~table["verdict"].isin(["same", "undecided"])]
    same, undecided = (int((table["verdict"] == v).sum()) for v in ("same", "undecided"))
    text = f"{len(changed)} changed, {same} the same, {undecided} undecided."
    if len(changed):
        text += " A ratio above 1: B is faster, or needs less."
    rows = changed.assign(change=[_interval(*r) for r in changed[["ratio", "lo", "hi"]].itertuples(index=False)])
    shown: dict[str, Callable[[Any], str]] = dict.fromkeys(names, str)
    shown |= {"a": _number, "b": _number, "change": str, "p_holm": _number, "verdict": str}
    return {"title": title, "text": text} | _rows(rows, shown)


def _rows(table: pd.DataFrame, shown: Mapping[str, Callable[[Any], str]]) -> dict[str, Any]:
    texts = [[show(v) for v in table[name]] for name, show in shown.items()]
    return {"header": list(shown), "rows": list(zip(*texts, strict=True))}


def _value(value: Any) -> str:
    return "—" if value is None else str(value)


def _number(value: float) -> str:
    return "—" if pd.isna(value) else f"{value:.4g}"


def _interval(ratio: float, lo: float, hi: float) -> str:
    return f"×{ratio:.4f}" if lo == hi else f"×{ratio:.4f} [{lo:.4f}, {hi:.4f}]"


def _markdown(title: str, sections: list[dict[str, Any]]) -> str:
    lines = [f"# {_plain(title)}"]
    for section in sections:
        lines += ["", f"## {section['title']}"]
        if section.get("text"):
            lines += ["", _plain(section["text"])]
        if section.get("rows"):
            lines += ["", _line(section["header"]), _line(["---"] * len(section["header"]))]
            lines += [_line(map(_plain, row)) for row in section["rows"]]
    return "\n".join(lines)


def _line(values: Any) -> str:
    return f"| {' | '.join(values)} |"


def _plain(text: str) -> str:
    """Text that cannot leave its table cell or become markup."""
    for mark, safe in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("`", "\\`")):
        text = text.replace(mark, safe)
    return " ".join(text.split())


if __name__ == "__main__":
    sys.exit(main())
