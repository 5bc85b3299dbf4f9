"""A comparison's page: its parts, and that nothing leaves its place."""

from __future__ import annotations

import re
from typing import Any

import pandas as pd
import pytest

from qwen3bench.analysis.changes import CHANGE_COLUMNS
from qwen3bench.analysis.comparison import Comparison
from qwen3bench.analysis.doubts import Cause, Doubt
from qwen3bench.reporting.comparison_page import comparison_page

PLACE = ("prefill", "graph")
NAN = float("nan")


def table(columns: list[str], *rows: tuple[Any, ...]) -> pd.DataFrame:
    return pd.DataFrame(list(rows), columns=columns)


def compared(**parts: Any) -> Comparison:
    cells = ["cell", "workload", "runtime", "a", "b"]
    nothing: dict[str, Any] = {
        "config": table(["key", "a", "b"]),
        "environment": table(["key", "a", "b"]),
        "status": table(cells),
        "changes": table(CHANGE_COLUMNS),
        "latency": table(cells),
        "memory": table([*cells, "ratio"]),
        "tolerance": 0.03,
    }
    lists = ("only", "lost", "unlike", "warnings", "doubts")
    return Comparison(**(nothing | {name: [] for name in lists} | parts))


def changed(kind: str, name: str, over: str, a: float, b: float, change: str, p: float = 0.001) -> tuple[Any, ...]:
    speed = a / b if kind == "latency" else b / a
    return (kind, name, over, *PLACE, a, b, speed, 0.98 * speed, 1.02 * speed, p, change, 0.01, 4.0)


def verdict(comparison: Comparison) -> str:
    return comparison_page(comparison, "a → b", "md").split("## Verdict")[1].split("\n##")[0]


@pytest.mark.parametrize("kind", ["md", "html"])
def test_what_is_the_same_is_said_without_a_table(kind: str) -> None:
    text = comparison_page(compared(), "a → b", kind)
    found = re.findall(r"^(?:## |<h2>)(\w[\w ]*)", text, flags=re.M)
    assert found == ["Verdict", "Configuration", "Environment", "Effects", "Ratios within a run", "Latency"]
    assert text.count("No difference.") == 2
    assert "|" not in text
    assert "<table" not in text


@pytest.mark.parametrize("kind", ["md", "html"])
def test_a_change_has_its_interval_and_what_is_unknown_a_dash(kind: str) -> None:
    changes = table(
        CHANGE_COLUMNS,
        changed("speedup", "flash", "baseline", 1.5, 1.2, "slower"),
        changed("speedup", "mlp", "baseline", 1.5, 1.5, "tolerated"),
        ("speedup", "tie", "baseline", *PLACE, 1.5, 1.2, 0.8, NAN, NAN, NAN, "undecided", NAN, 0.0),
        changed("latency", "flash", "", 0.010, 0.012, "slower", p=1e-40),
    )
    latency = table(["cell", "workload", "runtime", "a", "b"], ("flash", *PLACE, 0.010, 0.012))
    memory = table(["cell", "workload", "runtime", "a", "b", "ratio"], ("tie", *PLACE, 2.0**20, 2.0**21, 0.5))
    text = comparison_page(compared(changes=changes, latency=latency, memory=memory), "a → b", kind)
    rows = [re.findall(r"(?:<td>|\| )(.*?)(?=</td>| \|)", line) for line in text.splitlines()]
    tiny = "&lt; 1e-16"
    assert ["flash", "baseline", *PLACE, "1.500×", "1.200×", "0.80× [0.78, 0.82]", "0.001", "slower"] in rows
    assert ["tie", "baseline", *PLACE, "1.500×", "1.200×", "0.8000×", "—", "undecided"] in rows
    assert ["flash", *PLACE, "10.00", "12.00", "0.83× [0.82, 0.85]", tiny, "slower"] in rows
    assert ["tie", *PLACE, "1.000", "2.000", "2.000×"] in rows
    assert not any("mlp" in row for row in rows)
    assert "3 compared: 1 slower, 0 faster, 1 shown to have lost less than 3 %, 1 undecided." in text
    assert "a (ms)" in text
    assert "a (MiB)" in text


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (
            changed("main", "flash", "", 1.5, 1.2, "slower"),
            "flash is worth 1.200× on average, and was 1.500×: 0.80× [0.78, 0.82] of before (prefill, graph).",
        ),
        (
            changed("speedup", "flash+tie", "baseline", 1.5, 1.2, "slower"),
            "flash+tie is 1.200× as fast as the baseline, and was 1.500×: "
            "0.80× [0.78, 0.82] of before (prefill, graph).",
        ),
        (
            changed("peer", "flash", "transformers:sdpa", 1.5, 1.2, "slower"),
            "flash is 1.200× as fast as transformers:sdpa, and was 1.500×: "
            "0.80× [0.78, 0.82] of before (prefill, graph).",
        ),
        (
            changed("latency", "flash", "", 0.010, 0.0125, "slower"),
            "flash takes 12.50 ms, and took 10.00 ms: its speed is 0.80× [0.78, 0.82] of before (prefill, graph).",
        ),
    ],
    ids=["main", "speedup", "peer", "latency"],
)
def test_what_got_slower_is_one_sentence(row: tuple[Any, ...], sentence: str) -> None:
    text = verdict(compared(changes=table(CHANGE_COLUMNS, row)))
    assert "Something got slower" in text
    assert f"- {sentence}\n" in text
    assert len(sentence.split()) <= 25


@pytest.mark.parametrize(
    ("doubt", "words"),
    [
        (Doubt(Cause.NOT_COMPARED, *PLACE, ("baseline",)), "--latency"),
        (Doubt(Cause.NO_CONTROL, *PLACE, ("A",)), "A: no A/A control"),
        (Doubt(Cause.CONTROL, *PLACE, apart=(0.3, 0.02)), "30 % and 2.0 % apart"),
        (Doubt(Cause.CONTROL, *PLACE, apart=(0.03, 0.02), processes=8), "measure.min_processes=8"),
        (Doubt(Cause.WIDE, *PLACE, ("flash", "tie")), "none of 3 % is ruled out, for flash and tie (prefill, graph)"),
        (Doubt(Cause.WIDE, *PLACE, ("flash",), processes=12), "measure.min_processes=12"),
        (Doubt(Cause.WIDE, *PLACE, ("flash",), processes=12, tolerance=0.08), "--tolerance=0.08."),
    ],
    ids=lambda value: value.cause.value if isinstance(value, Doubt) else "",
)
def test_what_cannot_be_told_has_a_reason_and_what_would_tell(doubt: Doubt, words: str) -> None:
    text = verdict(compared(doubts=[doubt]))
    assert "These runs cannot tell whether something got slower by 3 %." in text
    assert words in text
    sentences = [sentence for line in re.findall(r"^- (.*)", text, re.M) for sentence in re.split(r"(?<=\.) ", line)]
    assert len(sentences) >= 2
    assert max(len(sentence.split()) for sentence in sentences) <= 25


def test_the_verdict_names_a_dozen_and_counts_the_rest() -> None:
    rows = [changed("speedup", f"cell{i}", "baseline", 1.5, 1.2, "slower") for i in range(15)]
    text = verdict(compared(changes=table(CHANGE_COLUMNS, *rows)))
    assert text.count("cell") == 12
    assert "- 3 more.\n" in text


def test_html_is_one_file_that_escapes_what_it_shows() -> None:
    hostile = "<script>alert(1)</script>|`x`"
    text = comparison_page(compared(config=table(["key", "a", "b"], ("note", "x", hostile))), hostile, "html")
    assert "<script" not in text
    assert text.count("&lt;script&gt;") == 3  # in the title, the heading and the cell
    assert not re.search(r"(src|href)=", text)


def test_hostile_text_stays_in_its_markdown_cell() -> None:
    text = comparison_page(compared(config=table(["key", "a", "b"], ("note", "x", "<b>|\n# y"))), "a → b", "md")
    assert "| note | x | &lt;b&gt;\\| # y |" in text
