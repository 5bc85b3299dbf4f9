"""A/A campaigns: every cell is the baseline, and what is called an effect all the same is counted."""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen3bench.analysis.run import load_run
from qwen3bench.campaign.copies import CopiesOutcome, CopiesProcess, allowed, false_alarms, outcomes_of, summary
from qwen3bench.campaign.worker_process import WorkerProcess
from qwen3bench.errors import UserError
from qwen3bench.record.lines import LINES, Line
from qwen3bench.record.messages import Enter, Prepare, Request, Visit
from qwen3bench.record.typed import made
from qwen3bench.record.writer import RecordWriter

FACTORS = ("flash", "tie")


def _outcome(campaign: int, p: float) -> CopiesOutcome:
    return CopiesOutcome(campaign, campaign, "prefill", "eager", 6, 2, "flash", p, 1.01, 0.99)


def _line(kind: str, **fields: object) -> Line:
    return made(LINES[kind], fields)


def _record(directory: Path, gain: float, failed: bool = False) -> Path:
    """A run of four cells over six blocks, `flash` faster by `gain` in log latency, with noise of 0.1 %."""
    rng = np.random.default_rng(0)
    cells = ["+".join(np.compress(on, FACTORS)) or "baseline" for on in product((False, True), repeat=2)]
    where = {"workload": "prefill", "runtime": "eager"}
    visits = [(cell, 0) for cell in cells] + [("baseline", 1)]
    config = {"seed": 3, "model": {"name": "tiny"}}
    with RecordWriter(directory) as writer:
        run = {"config": config, "factors": FACTORS, "cells": cells, "device": "cpu", "dtype": "float32"}
        writer.append(_line("run", workloads=["prefill"], runtimes=["eager"], **run))
        if failed:
            writer.append(_line("failure", cell="tie", **where, status="oom", reason="no memory left"))
        for block in range(6):
            closes = {"process": block // 3, "block": block, "attempt": 0}
            for position, (cell, copy) in enumerate(visits):
                shift = 0.02 if copy else -gain * ("flash" in cell)
                latency_s = 1e-3 * float(np.exp(shift + 0.001 * rng.standard_normal()))
                sample = {"cell": cell, "copy": copy, "position": position, "repeat": 0, "latency_s": latency_s}
                writer.append(_line("sample", **where, **closes, **sample, time=1.0 * block))
            writer.append(_line("block", **where, **closes, state="ok"))
        writer.append(_line("stop", **where, reason="target", blocks=6, processes=2, measured_s=1.0))
    return directory


def test_each_cell_is_a_copy_of_the_baseline_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    visits = [("baseline", 0), ("flash", 0), ("flash+tie", 0), ("baseline", 1)]
    monkeypatch.setattr(WorkerProcess, "ask", lambda self, request, timeout_s: request)
    with CopiesProcess(tmp_path / "log", (sys.executable, "-c", "input()")) as worker:

        def heard(request: Request[object]) -> Any:
            return worker.ask(request, 30)

        prepared = [heard(Prepare(cell=cell, copy=copy)) for cell, copy in visits]
        assert [each.cell for each in prepared] == ["baseline"] * 4
        assert len({each.copy for each in prepared}) == 4
        for (cell, copy), model in reversed(list(zip(visits, prepared, strict=True))):
            visit = heard(Visit(cell=cell, copy=copy, repeats=3))
            assert visit == Visit(cell="baseline", copy=model.copy, repeats=3)
        entered = heard(Enter(workload="decode", runtime="eager", cell="flash"))
        assert entered == Enter(workload="decode", runtime="eager", cell="baseline")


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
