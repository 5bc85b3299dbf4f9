"""A comparison's page: its parts, and that nothing leaves its place."""

from __future__ import annotations

import re
from typing import Any

import pandas as pd
import pytest

from qwen3bench.analysis.comparison import Comparison
from qwen3bench.reporting.comparison_page import comparison_page

CELLS = ["cell", "workload", "runtime", "metric", "a", "b", "ratio", "lo", "hi", "p_holm", "verdict"]
EFFECTS = ["workload", "runtime", "metric", "term", "kind", *CELLS[4:]]


def table(columns: list[str], *rows: tuple[Any, ...]) -> pd.DataFrame:
    return pd.DataFrame(list(rows), columns=columns)


def compared(**parts: Any) -> Comparison:
    nothing: dict[str, Any] = {
        "config": table(["key", "a", "b"]),
        "environment": table(["key", "a", "b"]),
        "status": table(["cell", "workload", "runtime", "a", "b"]),
        "cells": table(CELLS),
        "effects": table(EFFECTS),
    }
    return Comparison(**(nothing | {name: [] for name in ("only", "lost", "unlike", "warnings")} | parts))


@pytest.mark.parametrize("kind", ["md", "html"])
def test_what_is_the_same_is_said_without_a_table(kind: str) -> None:
    text = comparison_page(compared(), "a → b", kind)
    found = re.findall(r"^(?:## |<h2>)(\w[\w ]*)", text, flags=re.M)
    assert found == ["Configuration", "Environment", "Verdict", "Cells", "Effects"]
    assert text.count("No difference.") == 2
    assert "|" not in text
    assert "<table" not in text


@pytest.mark.parametrize("kind", ["md", "html"])
def test_a_change_has_its_interval_and_what_is_unknown_a_dash(kind: str) -> None:
    latency = ("flash", "prefill", "graph", "latency_s", 0.01, 0.02, 0.5, 0.45, 0.55, 0.001, "slower")
    memory = ("tie", "prefill", "graph", "peak_allocated_bytes", 1e6, 2e6, 0.5, 0.5, 0.5, float("nan"), "more")
    same = ("mlp", "prefill", "graph", "latency_s", 0.01, 0.01, 1.0, 0.99, 1.01, 1.0, "same")
    text = comparison_page(compared(cells=table(CELLS, latency, memory, same)), "a → b", kind)
    rows = [re.findall(r"(?:<td>|\| )(.*?)(?=</td>| \|)", line) for line in text.splitlines()]
    assert ["flash", *latency[1:4], "0.01", "0.02", "×0.5000 [0.4500, 0.5500]", "0.001", "slower"] in rows
    assert ["tie", *memory[1:4], "1e+06", "2e+06", "×0.5000", "—", "more"] in rows
    assert not any("mlp" in row for row in rows)
    assert "2 changed, 1 the same, 0 undecided." in text


def test_the_verdict_names_a_dozen_and_counts_the_rest() -> None:
    rows = [(f"cell{i}", "prefill", "graph", "latency_s", 1, 2, 0.5, 0.5, 0.5, 0.0, "slower") for i in range(15)]
    text = comparison_page(compared(cells=table(CELLS, *rows)), "a → b", "md")
    verdict = text.split("## Verdict")[1].split("##")[0]
    assert verdict.count("cell") == 12
    assert "and 3 more" in verdict


def test_html_is_one_file_that_escapes_what_it_shows() -> None:
    hostile = "<script>alert(1)</script>|`x`"
    text = comparison_page(compared(config=table(["key", "a", "b"], ("note", "x", hostile))), hostile, "html")
    assert "<script" not in text
    assert text.count("&lt;script&gt;") == 3  # in the title, the heading and the cell
    assert not re.search(r"(src|href)=", text)


def test_hostile_text_stays_in_its_markdown_cell() -> None:
    text = comparison_page(compared(config=table(["key", "a", "b"], ("note", "x", "<b>|\n# y"))), "a → b", "md")
    assert "| note | x | &lt;b&gt;\\| # y |" in text
