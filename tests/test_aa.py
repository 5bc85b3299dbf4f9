"""A/A campaigns: every cell is the baseline, and what is called an effect all the same is counted."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from qwen3bench.aa import CopiesProcess, Outcome, allowed, false_alarms, main, outcomes_of, summary
from qwen3bench.analysis.run import load_run
from qwen3bench.errors import UserError
from qwen3bench.record.reader import RecordWriter, read_record

ECHO = """
import json, sys
for line in sys.stdin:
    print(json.dumps({"ok": {"heard": json.loads(line)}}), flush=True)
"""
FACTORS = ("flash", "tie")
SMALL = ["campaigns=1", "opt=flash", "measure.min_processes=1", "measure.min_blocks=6", "measure.max_blocks=6"]
SMALL += ["measure.blocks_per_process=6", "measure.repeats=1", "prompt_tokens=4", "seed=7"]


def _outcome(campaign: int, p: float) -> Outcome:
    return Outcome(campaign, campaign, "prefill", "eager", 6, 2, "flash", p, 1.01, 0.99)


def _record(directory: Path, gain: float, failed: bool = False) -> Path:
    """A run of four cells over six blocks, `flash` faster by `gain` in log latency, with noise of 0.1 %."""
    rng = np.random.default_rng(0)
    cells = ["+".join(np.compress(on, FACTORS)) or "baseline" for on in product((False, True), repeat=2)]
    where = {"workload": "prefill", "runtime": "eager"}
    visits = [(cell, 0) for cell in cells] + [("baseline", 1)]
    config = {"seed": 3, "model": {"name": "tiny"}}
    with RecordWriter(directory) as writer:
        writer.append(
            {"type": "run", "config": config, "factors": list(FACTORS), "cells": cells}
            | {"workloads": ["prefill"], "runtimes": ["eager"], "device": "cpu", "dtype": "float32"}
        )
        if failed:
            writer.append({"type": "failure", "cell": "tie", **where, "status": "oom", "reason": "no memory left"})
        for block in range(6):
            closes = {"process": block // 3, "block": block, "attempt": 0}
            for position, (cell, copy) in enumerate(visits):
                shift = 0.02 if copy else -gain * ("flash" in cell)
                latency_s = 1e-3 * float(np.exp(shift + 0.001 * rng.standard_normal()))
                sample = {"cell": cell, "copy": copy, "position": position, "repeat": 0, "latency_s": latency_s}
                writer.append({"type": "sample", **where, **closes, **sample, "time": 1.0 * block})
            writer.append({"type": "block", **where, **closes, "state": "ok", "flags": []})
        writer.append({"type": "stop", **where, "reason": "target", "blocks": 6, "processes": 2, "measured_s": 1.0})
    return directory


def test_each_cell_is_a_copy_of_the_baseline_of_its_own(tmp_path: Path) -> None:
    visits = [("baseline", 0), ("flash", 0), ("flash+tie", 0), ("baseline", 1)]
    with CopiesProcess(tmp_path / "log", (sys.executable, "-c", ECHO)) as worker:

        def heard(op: str, **arguments: object) -> dict[str, object]:
            return worker.ask(op, 30, **arguments)["heard"]

        prepared = [heard("prepare", cell=cell, copy=copy) for cell, copy in visits]
        assert [each["cell"] for each in prepared] == ["baseline"] * 4
        assert len({each["copy"] for each in prepared}) == 4
        for (cell, copy), model in reversed(list(zip(visits, prepared, strict=True))):
            assert heard("prepare", cell=cell, copy=copy, repeats=3) == {**model, "repeats": 3}
        entered = heard("enter", workload="decode", runtime="eager", cell="flash")
        assert entered == {"op": "enter", "workload": "decode", "runtime": "eager", "cell": "baseline"}


def test_an_effect_that_is_there_is_reported_with_its_p(tmp_path: Path) -> None:
    (outcome,) = outcomes_of(load_run(_record(tmp_path, gain=0.05)), 4)
    assert outcome.significant
    assert (outcome.campaign, outcome.seed, outcome.term) == (4, 3, "flash")
    assert outcome.widest_effect == pytest.approx(np.exp(0.05), rel=2e-3)
    assert outcome.aa_ratio == pytest.approx(np.exp(0.02), rel=2e-3)
    assert (outcome.blocks, outcome.processes) == (6, 2)


def test_noise_alone_is_no_false_alarm(tmp_path: Path) -> None:
    (outcome,) = outcomes_of(load_run(_record(tmp_path, gain=0.0)), 1)
    assert not outcome.significant
    assert outcome.widest_effect == pytest.approx(1, abs=2e-3)


def test_the_slowest_effect_can_be_the_widest(tmp_path: Path) -> None:
    (outcome,) = outcomes_of(load_run(_record(tmp_path, gain=-0.05)), 1)
    assert outcome.widest_effect == pytest.approx(np.exp(-0.05), rel=2e-3)


def test_a_failed_cell_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tie oom: no memory left"):
        outcomes_of(load_run(_record(tmp_path, gain=0.0, failed=True)), 1)


def test_campaigns_count_once_however_many_conditions_they_have() -> None:
    outcomes = [_outcome(1, 0.01), _outcome(1, 0.02), _outcome(2, 0.05), _outcome(3, 0.049)]
    assert false_alarms(outcomes) == 2
    assert summary(outcomes).startswith("2 of 3 campaigns with any Holm-significant effect (5% family-wise")


def test_two_false_alarms_in_twenty_are_allowed() -> None:
    assert [allowed(campaigns) for campaigns in (1, 2, 3, 20, 100)] == [0, 0, 1, 2, 8]
    assert allowed(20, 4) == 6  # each of four conditions has its own 5 %


def test_campaigns_are_measured_written_and_not_measured_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], snapshot: Callable[[Path], str]
) -> None:
    arguments = [*SMALL, f"run.dir={tmp_path}"]
    status = main(arguments)
    printed = capsys.readouterr().out
    record = read_record(tmp_path / "campaign-01")
    assert record.types["sample"] == 6 * 3  # two cells and the second copy of the baseline
    assert record.run["config"]["seed"] == 7
    assert "A/A" in record.run["model"]
    assert not record.of("failure")
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


def test_help_says_what_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "campaigns=20" in capsys.readouterr().out
