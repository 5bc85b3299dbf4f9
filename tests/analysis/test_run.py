from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from records import write_record

import qwen3bench
from qwen3bench.analysis.contrasts import cell_label, every_cell
from qwen3bench.analysis.run import EFFECT_COLUMNS, load_run, load_runs, to_csv, write_derived
from qwen3bench.errors import UserError
from qwen3bench.record.lines import SampleLine
from qwen3bench.record.reader import read_record

Write = Callable[..., Path]


def test_a_run_has_its_tables(write_run: Write) -> None:
    run = qwen3bench.load_run(write_run())
    assert len(run.cells) == 32
    assert list(run.effects) == EFFECT_COLUMNS
    assert set(run.effects["metric"]) == {"latency_s", "peak_allocated_bytes", "parameter_bytes"}
    assert (run.effects.groupby("metric").size() == 36).all()
    assert run.config["batch_size"] == 2
    assert run.environment["code"] == "0"
    assert run.finished
    assert run.factors == ["flash", "tie", "mlp", "mask", "norm"]


def test_effects_carry_their_sizes(write_run: Write) -> None:
    """Rows of several runs can be told apart."""
    generate = {"workload": {"generate": {"batch_size": 4, "prompt_tokens": None, "new_tokens": 8}}}
    times = {("prefill", "graph"): 0.01, ("generate", "graph"): 0.1}
    run = load_run(write_run(factors=("flash",), baseline_s=times, config=generate))
    assert EFFECT_COLUMNS[:6] == ["workload", "runtime", "batch_size", "prompt_tokens", "new_tokens", "metric"]
    sizes = run.effects.groupby("workload", sort=False)[["batch_size", "prompt_tokens"]].agg(["min", "max"])
    assert sizes.to_numpy().tolist() == [[2, 2, 128, 128], [4, 4, 128, 128]]
    assert run.effects.set_index("workload").loc["generate", "new_tokens"].unique().tolist() == [8]
    assert run.effects.set_index("workload").loc["prefill", "new_tokens"].isna().all()
    assert to_csv(run.effects).splitlines()[1].startswith("prefill,graph,2,128,,latency_s,flash,main,")


def test_runs_of_a_directory_come_in_the_order_of_their_numbers(write_run: Write) -> None:
    homes = [write_run(f"sweep/{n}", factors=("flash",), seed=n) for n in (10, 2, 1)]
    runs = qwen3bench.load_runs(homes[0].parent)
    assert [run.path.name for run in runs] == ["1", "2", "10"]
    assert [run.path for run in load_runs(homes[0])] == [homes[0]]
    nothing = homes[0].parents[1] / "nothing"
    nothing.mkdir()
    with pytest.raises(UserError, match="holds no record"):
        load_runs(nothing)


def test_effects_of_a_run_are_what_was_simulated(write_run: Write) -> None:
    run = load_run(write_run(worth={"flash": 1.2, "norm": 1.3, "flash:mask": 1.06}, process_noise=0.001))
    latency = run.effects[run.effects["metric"] == "latency_s"].set_index(["kind", "term"])
    truth = {"flash": 1.2 * 1.06**0.5, "tie": 1, "mlp": 1, "mask": 1.06**0.5, "norm": 1.3}
    for term, worth in truth.items():
        assert latency.loc[("main", term), "estimate"] == pytest.approx(worth, rel=2e-3)
    assert latency.loc[("interaction", "flash:mask"), "estimate"] == pytest.approx(1.06**0.5, rel=2e-3)
    assert latency.loc["main"]["verdict"].to_dict() == {
        "flash": "faster",
        "tie": "same",
        "mlp": "same",
        "mask": "faster",
        "norm": "faster",
    }
    all_on = run.cells.set_index("cell").loc["flash+tie+mlp+mask+norm", "speedup"]
    assert latency.loc["shapley"]["estimate"].prod() == pytest.approx(all_on, rel=1e-12)
    memory = run.effects[(run.effects["metric"] == "parameter_bytes") & (run.effects["kind"] == "main")]
    assert memory.set_index("term")["estimate"].to_dict() == dict.fromkeys(truth, 0) | {"tie": -512 * 64 * 2}
    assert memory.set_index("term").loc["tie", "verdict"] == "less"


def test_words_in_tables_are_plain(write_run: Write) -> None:
    """No member of an enumeration, whose repr is another."""
    failure = {"type": "failure", "cell": "flash", "status": "oom", "reason": "no room"}
    run = load_run(write_run(factors=("flash", "tie"), extra=[failure]))
    assert {type(word) for word in run.cells["status"]} == {str}
    assert {type(word) for word in run.effects["verdict"]} == {str}


def test_a_failed_cell_leaves_no_made_up_number(write_run: Write) -> None:
    failure = {"type": "failure", "cell": "flash+mask", "status": "not_equivalent", "reason": "leaks the future"}
    latency = load_run(write_run(extra=[failure])).effects.query("metric == 'latency_s'")
    shapley = latency[latency["kind"] == "shapley"]
    assert shapley["estimate"].isna().all()
    assert shapley["reason"].str.contains("undefined").all()
    assert latency.query("term == 'flash:tie:mlp:mask:norm'")["estimate"].isna().all()
    flash = latency[(latency["term"] == "flash") & (latency["kind"] == "main")].iloc[0]
    assert flash["estimate"] == pytest.approx(1.2 * 1.03**0.5, rel=2e-3)
    assert "without flash+mask" in flash["reason"]


@pytest.mark.parametrize("cut", [1, 40, 300, 1200])
def test_a_record_cut_anywhere_can_be_read(write_run: Write, cut: int) -> None:
    directory = write_run(repeats=1)
    lines = (directory / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (directory / "samples.jsonl").write_bytes(b"".join(lines[:cut])[:-1] + (b"\n" if cut == 1 else b""))
    run = load_run(directory)
    assert not run.finished
    assert len(run.cells) == 32
    write_derived(run)


def test_the_tables_come_from_the_record_and_not_from_the_csv(write_run: Write) -> None:
    directory = write_run()
    first = load_run(directory)
    write_derived(first)
    (directory / "cells.csv").write_text("cell\nlies\n")
    pd.testing.assert_frame_equal(load_run(directory).cells, first.cells)


def test_derived_files_hold_the_tables_and_leave_missing_empty(write_run: Write) -> None:
    directory = write_run()
    run = load_run(directory)
    write_derived(run)
    cells = pd.read_csv(directory / "cells.csv")
    assert list(cells) == list(run.cells)
    assert cells["latency_s"].tolist() == pytest.approx(run.cells["latency_s"].tolist())
    assert cells["attention_backend"].isna().all()
    effects = pd.read_csv(directory / "effects.csv", keep_default_na=False)
    assert list(effects) == EFFECT_COLUMNS
    assert effects.loc[effects["metric"] == "parameter_bytes", "p_holm"].eq("").all()
    assert not [p.name for p in directory.iterdir() if ".tmp" in p.name]


def test_a_text_that_a_spreadsheet_would_run_is_quoted() -> None:
    hostile = ["=1+1", "+1", "-1", "@x", "\tx", "flash+tie", None]
    text = to_csv(pd.DataFrame({"reason": hostile, "number": [-1.5] * 7}))
    fields = [line.split(",") for line in text.splitlines()[1:]]
    assert [f[0] for f in fields] == ["'=1+1", "'+1", "'-1", "'@x", "'\tx", "flash+tie", ""]
    assert {f[1] for f in fields} == {"-1.5"}


def test_environment_is_read_and_a_damaged_one_is_not_missed(write_run: Write) -> None:
    directory = write_run()
    (directory / "environment.json").write_text(json.dumps({"driver": "570"}))
    assert load_run(directory).environment == {"driver": "570"}
    (directory / "environment.json").write_text("{torn")
    assert load_run(directory).environment["device"] == "Simulated"


def test_reading_a_run_needs_no_torch() -> None:
    code = "import sys; import qwen3bench.compare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_a_large_record_is_read_and_analyzed_in_little_time_and_memory(tmp_path: Path) -> None:
    """1,024 cells × 100 blocks, one value a visit; `ru_maxrss` would be the test's own peak, which a child inherits."""
    factors = list("abcdefghij")
    cells = [cell_label(c, tuple(factors)) for c in every_cell(10)]
    run = {"type": "run", "config": {}, "factors": factors, "cells": cells, "workloads": ["w"], "runtimes": ["eager"]}
    rng = np.random.default_rng(0)
    lines: list[dict[str, Any]] = [run]
    for block, noise in enumerate(rng.normal(scale=0.01, size=(100, len(cells) + 1))):
        at = {"workload": "w", "runtime": "eager", "block": block, "process": block // 10, "attempt": 0}
        for position, (cell, value) in enumerate(zip([*cells, "baseline"], np.exp(noise), strict=True)):
            here = {**at, "cell": cell, "copy": int(position == len(cells)), "position": position}
            lines.append({"type": "sample", **here, "repeat": 0, "latency_s": value, "time": 1.0 * block})
            lines.append({"type": "visit", **here, "samples": 1})
        lines.append({"type": "block", **at, "state": "ok"})
    write_record(tmp_path, lines)
    code = f"""
import time
from pathlib import Path
from qwen3bench.analysis.run import load_run, load_runs
run = load_run({str(tmp_path)!r})
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(len(run.samples), len(run.effects), time.process_time(), int(status["VmHWM"].split()[0]) / 2**20)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    samples, effects, cpu_s, gib = map(float, out)
    assert (samples, effects) == (102_500, 1023 + 10)
    assert cpu_s <= 10
    assert gib <= 1


def test_no_run_there_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no record"):
        load_run(tmp_path)


def test_the_baseline_alone_has_no_effects(write_run: Write) -> None:
    run = load_run(write_run(factors=[], cells=["baseline"]))
    assert run.effects.empty
    assert list(run.effects) == EFFECT_COLUMNS
    assert run.cells["speedup"].tolist() == [1.0]


@pytest.mark.slow
def test_a_thousand_cells_and_a_thousand_terms(write_run: Write) -> None:
    factors = [f"f{i}" for i in range(10)]
    directory = write_run(factors=factors, worth={"f3": 1.1, "f1:f7": 1.01}, blocks=6, repeats=1)
    run = load_run(directory)
    latency = run.effects[run.effects["metric"] == "latency_s"]
    assert (latency["kind"] != "shapley").sum() == 1023
    found = set(latency.loc[(latency["kind"] != "shapley") & (latency["verdict"] != "same"), "term"])
    assert found == {"f3"}
    assert latency["p_holm"].lt(0.05).groupby(latency["term"]).any()["f1:f7"]
    assert len(read_record(directory).of(SampleLine)) == 6 * 1025
