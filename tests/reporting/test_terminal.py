import io
import re
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from qwen3bench.analysis.run import Run
from qwen3bench.reporting.findings import findings
from qwen3bench.reporting.terminal import terminal_summary

Lines = list[dict[str, Any]]


def printed(run: Run, **console: Any) -> str:
    out = io.StringIO()
    terminal_summary(run, findings(run), Console(file=out, **console))
    return out.getvalue()


@pytest.fixture(scope="module")
def plain(full_run: Run) -> str:
    return printed(full_run)


def test_it_fits_a_hundred_columns(plain: str) -> None:
    body, _, path = plain.rpartition("Report: ")
    assert path
    assert max(map(len, body.splitlines())) <= 100


def test_it_is_plain_where_there_is_no_terminal(plain: str) -> None:
    assert "\x1b" not in plain


def test_it_names_fastest_and_smallest_cell_and_the_report(full_run: Run, plain: str) -> None:
    assert re.search(
        r"Lowest latency: flash(\+tie)?\+mlp\+mask\+norm, 4\.5\d+ ms\. Least peak memory: flash\+tie", plain
    )
    assert plain.rstrip().endswith(str(full_run.path / "report.html"))


def test_cell_labels_stay_whole_and_the_baseline_is_always_there(plain: str) -> None:
    tables = plain.split("\nprefill 1×512 graph")[1]
    assert "flash+tie+mlp+mask+norm " in tables
    assert "\nbaseline " in tables


def test_a_narrow_terminal_is_kept_to(record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]) -> None:
    run = run_of(record_lines(factors=("flash", "tie")))
    text = re.sub(r"\x1b\[[0-9;]*m", "", printed(run, force_terminal=True, width=72))
    assert max(map(len, text.rpartition("Report: ")[0].splitlines())) <= 72


def test_without_peak_memory_the_smallest_goes_by_parameters(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    text = printed(run_of(record_lines(factors=("flash", "tie"), memory=False)))
    assert "Fewest bytes of parameters: tie, 1.110 GiB" in text


def test_warnings_come_first(record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]) -> None:
    text = printed(run_of(record_lines(factors=("flash",), copy_shift=0.02)))
    assert text.startswith("Warning: Noisy")
