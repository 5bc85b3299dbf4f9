from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pandas.testing import assert_frame_equal

from qwen3bench.analysis.cells import cells_table, columns
from qwen3bench.analysis.frames import used_samples
from qwen3bench.analysis.run import load_run
from qwen3bench.record.lines import SampleLine, encode
from qwen3bench.record.reader import read_record

Write = Callable[..., Path]
FACTORS = ("flash", "tie")
CONTRACT = [
    "cell",
    "flash",
    "tie",
    "model",
    "workload",
    "runtime",
    "device",
    "dtype",
    "batch_size",
    "prompt_tokens",
    "new_tokens",
    "status",
    "reason",
    "latency_s",
    "latency_lo_s",
    "latency_hi_s",
    "samples",
    "tokens_per_s",
    "ttft_s",
    "tpot_s",
    "speedup",
    "speedup_lo",
    "speedup_hi",
    "peak_allocated_bytes",
    "peak_reserved_bytes",
    "parameter_bytes",
    "num_parameters",
    "num_unique_parameters",
    "num_non_embedding_parameters",
    "equivalent",
    "max_abs_error",
    "kl_mean",
    "top1_agreement",
    "attention_backend",
    "kernel_launches",
    "mfu",
    "mbu",
]


def table(path: Path) -> pd.DataFrame:
    return cells_table(read_record(path))


def row(cells: pd.DataFrame, cell: str) -> pd.Series:
    found = cells[cells["cell"] == cell]
    assert len(found) == 1
    return found.iloc[0]


def test_columns_are_the_promised_ones_in_order(write_run: Write) -> None:
    cells = table(write_run(factors=FACTORS))
    assert list(cells)[: len(CONTRACT)] == CONTRACT
    assert columns(FACTORS) == list(cells)


def test_one_row_per_cell_workload_and_runtime(write_run: Write) -> None:
    where = {("prefill", "eager"): 0.02, ("prefill", "graph"): 0.01, ("decode", "graph"): 0.001}
    cells = table(write_run(factors=FACTORS, baseline_s=where))
    assert len(cells) == 4 * 4  # two workloads × two runtimes were planned; decode, eager was not measured
    unmeasured = cells[(cells["workload"] == "decode") & (cells["runtime"] == "eager")]
    assert unmeasured["status"].isna().all()
    assert set(unmeasured["reason"]) == {"not measured"}
    assert (
        unmeasured[["latency_s", "samples", "speedup", "tokens_per_s", "peak_allocated_bytes", "mfu"]]
        .isna()
        .all(axis=None)
    )


def test_latency_and_speedup(write_run: Write) -> None:
    cells = table(write_run(factors=FACTORS, worth={"flash": 1.25}, copy_ratio=3.0, drift_per_block=0.05))
    base, flash = row(cells, "baseline"), row(cells, "flash")
    assert base["speedup"] == 1
    assert np.isnan(base["speedup_lo"])
    assert np.isnan(base["speedup_hi"])
    assert flash["speedup_lo"] < 1.25 < flash["speedup_hi"]
    assert flash["speedup"] == pytest.approx(1.25, rel=0.03)
    assert base["latency_lo_s"] < base["latency_s"] < base["latency_hi_s"]
    assert base["samples"] == 18  # six blocks of three repeats; the copy is not among them
    assert flash[["flash", "tie"]].tolist() == [1, 0]


def test_latency_and_speedup_are_of_one_estimator(write_run: Write) -> None:
    """Two slow visits of six move a mean ratio within blocks and no median: the two would contradict each other."""
    where = {("prefill", "graph"): 0.01, ("decode", "graph"): 0.001, ("generate", "graph"): 0.1}
    record = read_record(write_run(factors=FACTORS, baseline_s=where, worth={"flash": 1.2}))
    samples = used_samples(record)
    slow = (samples["cell"] == "flash") & (samples["block"] < 2)
    times = ["latency_s", "ttft_s", "tpot_s"]
    samples.loc[slow, times] *= 3
    cells = cells_table(record, samples).set_index(["workload", "cell"]).astype({"new_tokens": float})
    assert cells.loc["prefill"].loc["flash", "speedup"] == pytest.approx(1.2 / 3 ** (1 / 3), rel=0.01)
    for workload, found in cells.groupby("workload"):
        found = found.loc[str(workload)]
        base = found.loc["baseline"]
        np.testing.assert_allclose(found["latency_s"], base["latency_s"] / found["speedup"], rtol=1e-12)
        rates = found["tokens_per_s"] / base["tokens_per_s"]
        np.testing.assert_allclose(rates, found["speedup"], rtol=1e-12)
        np.testing.assert_allclose(found["mfu"] / base["mfu"], found["speedup"], rtol=1e-12)
        assert ((found["latency_lo_s"] < found["latency_s"]) & (found["latency_s"] < found["latency_hi_s"])).all()
    generated = cells.loc["generate"]
    for time in ("ttft_s", "tpot_s"):
        ratios = generated.loc["baseline", time] / generated[time]
        np.testing.assert_allclose(ratios, generated["speedup"], rtol=1e-9)  # as they are parts of it here


def test_without_a_baseline_a_latency_is_the_median_over_visits(write_run: Write) -> None:
    failure = {"type": "failure", "cell": "baseline", "status": "crashed", "reason": "signal 9"}
    record = read_record(write_run(factors=FACTORS, extra=[failure]))
    flash = row(cells_table(record), "flash")
    samples = used_samples(record)
    assert flash["latency_s"] == samples.loc[samples["cell"] == "flash", "latency_s"].median()


def test_of_one_generated_token_all_is_the_time_to_the_first(write_run: Write) -> None:
    where = {("decode", "graph"): 0.001, ("generate", "graph"): 0.1}
    cells = table(write_run(factors=("flash",), baseline_s=where, noise=0.0, config={"new_tokens": 1}))
    base = cells[cells["cell"] == "baseline"].set_index("workload")
    assert base["ttft_s"].tolist() == pytest.approx([np.nan, base.loc["generate", "latency_s"]], nan_ok=True)


def test_the_speed_up_of_one_switch_is_its_effect_with_the_same_interval(write_run: Write) -> None:
    run = load_run(write_run(factors=("flash",), process_noise=0.01, blocks=9))
    cell = run.cells[run.cells["cell"] == "flash"].iloc[0]
    effect = run.effects[(run.effects["metric"] == "latency_s") & (run.effects["kind"] == "main")].iloc[0]
    speedup = [cell[name] for name in ("speedup", "speedup_lo", "speedup_hi")]
    assert speedup == pytest.approx([effect[name] for name in ("estimate", "lo", "hi")])


def test_tokens_times_and_utilization(write_run: Write) -> None:
    where = {("prefill", "graph"): 0.01, ("decode", "graph"): 0.001, ("generate", "graph"): 0.1}
    cells = table(write_run(factors=FACTORS, baseline_s=where, noise=0.0))
    base = cells[cells["cell"] == "baseline"].set_index("workload")
    assert base.loc["prefill", "tokens_per_s"] == pytest.approx(2 * 128 / 0.01)
    assert base.loc["decode", "tokens_per_s"] == pytest.approx(2 / 0.001)
    assert base.loc["generate", "tokens_per_s"] == pytest.approx(2 * 16 / 0.1)
    assert base["ttft_s"].tolist() == pytest.approx([0.01, np.nan, 0.025], nan_ok=True)
    assert base["tpot_s"].tolist() == pytest.approx([np.nan, 0.001, 0.005], nan_ok=True)
    assert base.loc["generate", "itl_p99_s"] == pytest.approx(0.005)
    assert base.loc["prefill", "mfu"] == pytest.approx(1e10 / 0.01 / 1e14)
    assert base.loc["prefill", "mbu"] == pytest.approx(2e9 / 0.01 / 1e12)
    assert base["new_tokens"].isna().tolist() == [True, True, False]


def test_cells_that_failed_keep_their_reason_and_get_no_speedup(write_run: Write) -> None:
    where = {"workload": "prefill", "runtime": "graph", "pass": "time"}
    cells = table(
        write_run(
            factors=("flash", "tie", "mlp"),
            extra=[
                {"type": "failure", "cell": "flash", **where, "status": "oom", "reason": "out of memory"},
                {"type": "failure", "cell": "mlp", "status": "invalid", "reason": "NaN logits", "pass": "verify"},
                {"type": "verify", "cell": "tie", "equivalent": False, "reason": "max error 3.0 > 1.0"},
            ],
        )
    )
    assert {c: row(cells, c)["status"] for c in ("flash", "mlp", "tie", "flash+tie")} == {
        "flash": "oom",
        "mlp": "invalid",
        "tie": "not_equivalent",
        "flash+tie": "ok",
    }
    assert row(cells, "tie")["reason"] == "max error 3.0 > 1.0"
    assert not row(cells, "tie")["equivalent"]
    failed = cells[cells["status"] != "ok"]
    assert failed[["speedup", "speedup_lo", "speedup_hi"]].isna().all(axis=None)
    assert row(cells, "tie")["latency_s"] > 0
    assert pd.isna(row(cells, "mlp")["latency_s"])
    assert pd.isna(row(cells, "mlp")["tokens_per_s"])


def test_a_cell_whose_gradients_are_wrong_or_not_known_to_be_right_is_not_ok(write_run: Write) -> None:
    labels = ["baseline", "flash", "tie", "flash+tie"]
    judged = [{"type": "gradients", "cell": cell, "workload": "train", "equivalent": True} for cell in labels[:2]]
    judged.append({**judged[0], "cell": "tie", "equivalent": False, "reason": "out_head.weight: 3 > 2"})
    places = {("prefill", "eager"): 0.01, ("train", "eager"): 0.03}
    cells = table(write_run(factors=("flash", "tie"), baseline_s=places, extra=judged)).set_index(["workload", "cell"])
    trained = cells.loc["train"].loc[labels]
    assert trained["status"].to_list() == ["ok", "ok", "not_equivalent", "not_equivalent"]
    assert cells.loc[("train", "tie"), "reason"] == "out_head.weight: 3 > 2"
    assert "lost" in cells.loc[("train", "flash+tie"), "reason"]
    assert trained["speedup"].notna().to_list() == [True, True, False, False]
    assert trained["equivalent"].to_list() == [True, True, False, True]
    assert (cells.loc["prefill", "status"] == "ok").all()
    assert cells.loc["prefill", "equivalent"].all()


def test_without_a_baseline_nothing_has_a_speedup(write_run: Write) -> None:
    failure = {"type": "failure", "cell": "baseline", "status": "crashed", "reason": "signal 9"}
    assert table(write_run(factors=FACTORS, extra=[failure]))["speedup"].isna().all()


def test_a_peer_has_no_factor_levels_and_a_speedup(write_run: Write) -> None:
    labels = ["baseline", "flash", "transformers:sdpa"]
    cells = table(write_run(factors=FACTORS, cells=labels))
    peer = row(cells, "transformers:sdpa")
    assert peer[["flash", "tie"]].isna().all()
    assert peer["speedup"] == pytest.approx(1.0, abs=0.01)


def test_only_the_last_closed_attempt_of_a_block_counts(write_run: Write) -> None:
    where = {"workload": "prefill", "runtime": "graph", "block": 6, "process": 2}
    samples = [
        {"type": "sample", **where, "attempt": a, "cell": c, "copy": 0, "repeat": 0, "latency_s": 9.0 + a}
        for a in (0, 1, 2)
        for c in ("baseline", "flash", "tie", "flash+tie")
    ]
    closed = [
        {"type": "block", **where, "attempt": 0, "state": "repeat"},
        {"type": "block", **where, "attempt": 1, "state": "flagged"},  # attempt 2 was never closed
    ]
    plain = table(write_run("plain", factors=FACTORS))
    repeated = table(write_run("repeated", factors=FACTORS, extra=[*samples, *closed]))
    assert row(repeated, "flash")["samples"] == row(plain, "flash")["samples"] + 1
    unclosed = table(write_run("unclosed", factors=FACTORS, extra=samples))
    pd.testing.assert_frame_equal(unclosed, plain)


def test_a_record_without_samples_still_has_its_cells(write_run: Write) -> None:
    cells = table(write_run(factors=FACTORS, blocks=0, finished=False))
    assert len(cells) == 4
    assert cells["latency_s"].isna().all()
    assert cells["status"].isna().all()
    assert (cells["parameter_bytes"] > 0).all()


def test_samples_that_stand_twice_count_once(write_run: Write) -> None:
    directory = write_run(factors=("flash",), worth={"flash": 1.5})
    before = table(directory)
    slow = [replace(line, latency_s=9 * line.latency_s) for line in read_record(directory).of(SampleLine)]
    with (directory / "samples.jsonl").open("ab") as file:
        file.write(b"".join(encode(line) for line in slow if line.cell == "flash") * 9)
    assert_frame_equal(table(directory), before)
