"""`python -m qwen3bench.aa`: campaigns on copies of the baseline, their files and the exit status."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from qwen3bench.aa import main
from qwen3bench.record.lines import FailureLine
from qwen3bench.record.reader import read_record

SMALL = ["campaigns=1", "opt=flash", "measure.min_processes=1", "measure.min_blocks=6", "measure.max_blocks=6"]
SMALL += ["measure.blocks_per_process=6", "measure.repeats=1", "prompt_tokens=4", "seed=7"]


@pytest.mark.slow
def test_campaigns_are_measured_written_and_not_measured_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], snapshot: Callable[[Path], str]
) -> None:
    arguments = [*SMALL, f"run.dir={tmp_path}"]
    status = main(arguments)
    printed = capsys.readouterr().out
    record = read_record(tmp_path / "campaign-01")
    assert record.types["visit"] == 6 * 3  # two cells and the second copy of the baseline
    assert record.run.config["seed"] == 7
    assert "A/A" in (record.run.model or "")
    assert not record.of(FailureLine)
    (row,) = pd.read_csv(tmp_path / "aa.csv").to_dict("records")
    significant = row["smallest_p_holm"] < 0.05
    assert status == (3 if significant else 0)
    assert row["blocks"] == 6
    assert row["aa_ratio"] > 0
    assert f"{int(significant)} of 1 campaigns" in printed
    assert f"{int(significant)} of 1 campaigns" in (tmp_path / "aa.md").read_text()

    before = snapshot(tmp_path)
    assert main(arguments) == status
    assert snapshot(tmp_path) == before
    assert main([*arguments, "seed=8"]) == 1
    assert "the configuration changed" in capsys.readouterr().err


@pytest.fixture
def snapshot() -> Callable[[Path], str]:
    """What a directory's records and tables hold."""

    def read(directory: Path) -> str:
        files = sorted([*directory.rglob("*.jsonl"), *directory.glob("aa.*")])
        return json.dumps({str(file): file.read_text() for file in files})

    return read


@pytest.mark.parametrize("count", ["0", "x", "-1", "100000", ""])
def test_a_count_that_is_none_is_refused(count: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"campaigns={count}"]) == 1
    assert capsys.readouterr().err.startswith("qwen3bench: error: campaigns=")


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("run.dir={}", "holds other files and no campaigns; name a new directory"),
        ("run.dir={}/file", "is a file, or below one; name a directory"),
        ("resume={}", "campaigns go on with the same run.dir"),
    ],
)
def test_a_directory_of_something_else_is_refused_and_left_as_it_is(
    argument: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main([*SMALL, argument.format(tmp_path)]) == 1
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_help_says_what_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "campaigns=20" in capsys.readouterr().out
