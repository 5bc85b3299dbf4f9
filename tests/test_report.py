"""`python -m qwen3bench.report` from its command line."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from records import write_record

from qwen3bench.analysis.run import load_run
from qwen3bench.report import main
from qwen3bench.reporting.pages import switches

DEVICE = "a device"


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes the record of a run of the baseline and flash, 3 % apart, under a name."""

    def write(name: str, finished: bool = True, workload: str = "prefill", more: dict[str, Any] | None = None) -> Path:
        config = {"batch_size": 1, "prompt_tokens": 8, "new_tokens": 1, "analysis": {"band": 0.01, "confidence": 0.95}}
        config |= more or {}
        first = {"factors": ["flash"], "cells": ["baseline", "flash"], "workloads": [workload], "runtimes": ["eager"]}
        lines = [{"type": "run", "config": config, **first, "model": "tiny", "device": DEVICE, "dtype": "float32"}]
        where = {"workload": workload, "runtime": "eager", "attempt": 0}
        for block in range(6):
            here = {**where, "block": block, "process": block // 3}
            for position, (cell, copy) in enumerate((("baseline", 0), ("flash", 0), ("baseline", 1))):
                at = {**here, "cell": cell, "copy": copy, "position": position}
                value = (0.97 if cell == "flash" else 1.0) * (1 + 1e-4 * ((7 * block + 3 * position) % 5))
                lines.append({"type": "sample", **at, "repeat": 0, "latency_s": value, "time": 10.0 * block + position})
                lines.append({"type": "visit", **at, "samples": 1})
            lines.append({"type": "block", **here, "state": "ok", "flags": [], "time": 10.0 * block + 9})
        if finished:
            lines.append({"type": "end", "status": "finished", "time": 99.0})
        return write_record(tmp_path / name, lines)

    return write


def test_it_rebuilds_tables_and_report_from_the_record(
    make_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run("run")
    record = (run / "samples.jsonl").read_bytes()
    assert main([str(run)]) == 0
    names = {path.name for path in run.iterdir()}
    assert names >= {"cells.csv", "effects.csv", "report.md", "report.html", "plots"}
    assert (run / "samples.jsonl").read_bytes() == record
    out = capsys.readouterr().out
    assert str(run / "report.html") in out
    assert "+opt=flash  1.03" in out


def test_a_partial_run_gives_a_report_that_says_so(
    make_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run("run", finished=False)
    assert main([str(run / "samples.jsonl")]) == 0
    assert "this run has not finished" in capsys.readouterr().out
    assert "This run has not finished" in (run / "report.md").read_text("utf-8")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("copies", [0, 1], ids=["nothing-known", "effects-known"])
def test_a_record_without_a_complete_block_gives_a_report_that_says_so(
    make_run: Callable[..., Path], capsys: pytest.CaptureFixture[str], copies: int
) -> None:
    run = make_run("run")
    record = run / "samples.jsonl"
    lines = record.read_text("utf-8").splitlines(keepends=True)

    def is_damaged(line: str) -> bool:
        """Of each block the sample of one cell, by turns: the baseline's copy or flash, else the baseline or flash."""
        sample = json.loads(line)
        if sample["type"] != "sample":
            return False
        lost = ("flash", 0) if sample["block"] % 2 else ("baseline", copies)
        return (sample["cell"], sample["copy"]) == lost

    record.write_text("".join(line.replace("latency_s", "latency") if is_damaged(line) else line for line in lines))
    assert main([str(run)]) == 0
    out, err = capsys.readouterr()
    assert "the record is damaged in" in out
    said = "No speed-up is known, as no block holds every cell and the baseline's copy"
    assert said in " ".join(out.split())
    assert err == ""
    assert said in (run / "report.md").read_text("utf-8")


def test_what_a_killed_report_left_is_cleared_away(make_run: Callable[..., Path]) -> None:
    run = make_run("run")
    (run / "plots").mkdir()
    stale = run / "plots" / ".effects.svg.tmp-999999999"
    stale.write_bytes(b"half")
    assert main([str(run)]) == 0
    assert not stale.exists()


@pytest.mark.slow
def test_several_runs_give_one_page_more(
    make_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [make_run("0"), make_run("1")]
    assert main([str(run) for run in runs] + ["--out", str(tmp_path / "both")]) == 0
    assert "flash" in (tmp_path / "both" / "report.md").read_text("utf-8")
    assert f"Over all runs: {tmp_path / 'both' / 'report.html'}" in capsys.readouterr().out
    assert main([str(run) for run in runs] + ["--out", str(runs[0])]) == 1
    assert "holds a run, whose report this would replace" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 0
    assert (tmp_path / "report.html").is_file()


def test_what_is_no_run_is_one_line_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere")]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert "nowhere" in err


@pytest.mark.parametrize("arguments", [[], ["--out"], ["--nonsense", "a"]])
def test_a_mistake_is_told_in_a_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    err = capsys.readouterr().err
    assert err.startswith("qwen3bench: error: ")
    assert err.endswith("`python -m qwen3bench.report --help` shows what there is\n")


def test_a_place_for_the_page_over_runs_is_refused_for_a_single_one(
    make_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(make_run("run")), "--out", str(tmp_path / "page")]) == 1
    assert "--out is for the page over several runs" in capsys.readouterr().err
    assert not (tmp_path / "page").exists()


def test_an_interruption_is_no_traceback(
    make_run: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qwen3bench.reporting.pages.write_report", interrupted)
    assert main([str(make_run("run"))]) == 130
    assert capsys.readouterr().err == ""


def test_help_is_quick_and_needs_no_torch() -> None:
    code = "import sys; from qwen3bench.report import main; main(['--help'])"
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=True)
    assert "RUN [RUN ...]" in done.stdout
    assert "torch" not in done.stderr


# A record is data


def test_nothing_that_a_record_names_is_imported(
    make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "__init__.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (tmp_path / "evil" / "mod.py").write_text('"""Sweet words."""')
    monkeypatch.syspath_prepend(str(tmp_path))
    run = make_run("run", more={"opt": {"flash": {"_target_": "evil.mod.apply"}}})
    assert main([str(run)]) == 0
    assert not (tmp_path / "ran").exists()
    assert switches([load_run(run)]) == []  # what the catalogue's function does says nothing of another one


@pytest.mark.slow
def test_a_record_does_not_choose_where_files_go(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run("run", workload="../../escaped")
    (run / "plots" / "effects-..").mkdir(parents=True)
    assert main([str(run)]) == 0
    assert list(tmp_path.rglob("*escaped*")) == list((run / "plots").glob("*-escaped-*"))


def test_a_config_of_any_shape_is_no_traceback(make_run: Callable[..., Path]) -> None:
    odd: dict[str, Any] = {"opt": [1], "report": "x", "analysis": 3, "model": [], "weights": {"a": "${b}"}}
    run = make_run("run", more={**odd, "workload": 7})
    assert main([str(run)]) == 0
    assert "flash" in (run / "report.md").read_text("utf-8")


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 500 + b"1" + b"}" * 500, None, "endless"], ids=repr)
def test_an_environment_that_cannot_be_used_is_one_line(make_run: Callable[..., Path], content: Any) -> None:
    run = make_run("run")
    if content is None:
        os.mkfifo(run / "environment.json")
    else:
        with (run / "environment.json").open("wb") as file:
            file.truncate(10 * 2**30) if content == "endless" else file.write(content)
    os.mkfifo(run / "config.yaml")
    (warning,) = load_run(run).warnings
    assert warning.startswith("environment.json cannot be used (")
    assert load_run(run).environment["device"] == DEVICE


@pytest.mark.slow
def test_one_damaged_run_costs_its_own_page_alone(
    make_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [make_run("runs/0"), make_run("runs/3")]
    for name, content in (("runs/1", b"rust\n"), ("runs/2", b"")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "samples.jsonl").write_bytes(content)
    (tmp_path / "runs" / "4").mkdir()
    os.mkfifo(tmp_path / "runs" / "4" / "samples.jsonl")
    assert main([str(tmp_path / "runs")]) == 1
    out, err = capsys.readouterr()
    assert err.count("qwen3bench: error: ") == len(err.splitlines()) == 2  # an empty one stopped before anything
    assert "runs/1" in err.splitlines()[0]
    assert "runs/4" in err.splitlines()[1]
    assert all((run / "report.html").is_file() for run in good)
    assert f"Over all runs: {tmp_path / 'runs' / 'report.html'}" in out
    (good[0] / "report.html").unlink()
    assert main([str(tmp_path / "empty"), str(good[0])]) == 1
    assert (good[0] / "report.html").is_file()
    assert "empty: holds no record" in capsys.readouterr().err
