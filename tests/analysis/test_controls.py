from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from analysis.disturbed_campaigns import BLOCKS, FAULTS, ROWS, Fault, copies, spikes

from qwen3bench.analysis.controls import beyond_noise, controls, copies_differ, noise_of
from qwen3bench.analysis.run import load_run
from qwen3bench.analysis.variance import Estimates

Write = Callable[..., Path]


@pytest.mark.parametrize(
    ("runtime", "copy_ratio", "noisy"),
    [("graph", 1.0, False), ("graph", 1.02, True), ("eager", 1.01, False), ("eager", 0.95, True)],
)
def test_two_copies_of_the_baseline(write_run: Write, runtime: str, copy_ratio: float, noisy: bool) -> None:
    run = load_run(write_run(baseline_s={("prefill", runtime): 0.01}, copy_ratio=copy_ratio))
    (row,) = run.controls.aa.itertuples()
    assert row.ratio == pytest.approx(copy_ratio, abs=2e-3)
    assert row.lo < row.ratio < row.hi
    assert row.noisy is noisy
    assert run.controls.noisy is noisy


@pytest.mark.parametrize(
    ("log_ratio", "se", "differ"),
    [
        ([0.054], [0.04], [False]),  # far, and known to ±10 %
        ([0.004], [0.0001], [False]),  # shown, and within the limit
        ([0.01], [0.001], [True]),
        ([-0.01], [0.001], [True]),
        ([0.01], [0.0043], [True]),  # p = 0.04
        ([0.01, 0.0], [0.0043, 0.0043], [False, False]),  # of two conditions that is no rarity
        ([0.01, 0.0], [0.001, 0.0043], [True, False]),
        ([0.01, 0.0], [0.0, 0.0], [True, False]),  # nothing varies
        ([0.01, 0.01], [np.nan, 0.001], [False, True]),  # one block
    ],
)
def test_copies_differ_where_they_are_shown_to(log_ratio: list[float], se: list[float], differ: list[bool]) -> None:
    found = Estimates(*map(np.array, (log_ratio, se, [10.0] * len(se), [0.0] * len(se))))
    assert copies_differ(found, 0.005, 0.95).tolist() == differ


@pytest.mark.slow
@pytest.mark.parametrize("where", BLOCKS)
@pytest.mark.parametrize("name", ROWS)
def test_a_run_with_nothing_wrong_is_not_noisy(name: str, where: str) -> None:
    got = copies(ROWS[name].disturb, BLOCKS[where])
    assert got.noisy <= 0.05
    assert got.false <= 0.05
    assert got.by_the_limit > 0.3


@pytest.mark.slow
@pytest.mark.parametrize("where", BLOCKS)
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_slow_baseline_is_found_where_the_run_is_precise_and_never_praises(fault: Fault, where: str) -> None:
    got = copies(spikes(0), BLOCKS[where], fault.apart, fault.noise, fault.limit)
    if fault.noise <= fault.limit / 2:
        assert got.noisy >= got.by_the_limit - 0.02
    assert got.false <= 0.01


@pytest.mark.parametrize(
    ("copy_ratio", "estimate", "beyond"),
    [(1.0, 1.0001, True), (1.02, 1.015, False), (1.02, 1 / 1.015, False), (1.02, 1.03, True), (0.98, 2.53, True)],
)
def test_a_noisy_condition_tells_of_effects_larger_than_its_noise(
    write_run: Write, copy_ratio: float, estimate: float, beyond: bool
) -> None:
    aa = load_run(write_run(factors=("flash",), copy_ratio=copy_ratio)).controls.aa
    assert noise_of(aa) == pytest.approx(abs(math.log(copy_ratio)), abs=0.002)
    assert beyond_noise(estimate, noise_of(aa)) is beyond


def test_tie_is_the_negative_control_of_latency(write_run: Write) -> None:
    good = load_run(write_run("good")).controls.tie_latency
    bad = load_run(write_run("bad", worth={"tie": 1.05})).controls.tie_latency
    assert good["ok"].tolist() == [True]
    assert bad["ok"].tolist() == [False]


def test_tie_is_the_positive_control_of_memory(write_run: Write) -> None:
    good = load_run(write_run("good")).controls.tie_memory
    assert len(good) == 16
    assert good["ok"].all()
    assert set(good["saved_bytes"]) == {512 * 64 * 2}
    wrong = {"type": "parameters", "cell": "tie", "parameter_bytes": 200_000}
    bad = load_run(write_run("bad", extra=[wrong])).controls.tie_memory.set_index("cell")
    assert not bad.loc["baseline", "ok"]
    assert bad.loc["flash", "ok"]


def test_drift_is_measured_over_the_time_of_a_process(write_run: Write) -> None:
    held = load_run(write_run(drift_per_block=0.01, blocks=12)).controls
    (row,) = held.drift.itertuples()
    assert row.total == pytest.approx(0.0202, abs=0.0005)  # two steps of 1 % in three blocks
    assert row.lo < row.total < row.hi < 0.022
    assert row.per_hour == pytest.approx(0.01 * 3600, rel=0.02)
    assert row.blocks == len(held.drift_series) == 12
    assert held.drift_series["relative_latency"].is_monotonic_increasing


@pytest.mark.parametrize(("blocks", "steps"), [(7, 2.0), (8, 5 / 3)])
def test_drift_is_that_of_a_process_of_mean_length(write_run: Write, blocks: int, steps: float) -> None:
    """Of three blocks, and the last of one, which has no length, or two."""
    held = load_run(write_run(drift_per_block=0.01, blocks=blocks)).controls
    (row,) = held.drift.itertuples()
    assert row.total == pytest.approx(1.01**steps - 1, abs=0.0005)


@pytest.mark.parametrize("drift", [0.0, 0.01])
@pytest.mark.parametrize("slow", [1, 2])
def test_a_slow_process_is_no_drift(write_run: Write, slow: int, drift: float) -> None:
    run = load_run(write_run(factors=["flash"], drift_per_block=drift, blocks=9))
    by_process = run.samples["process"].map({slow: 1.08}).fillna(1)
    samples = run.samples.assign(latency_s=run.samples["latency_s"] * by_process)
    (row,) = controls(run.record, samples, run.cells, run.effects).drift.itertuples()
    assert row.total == pytest.approx(2 * drift, abs=0.002)  # over three blocks, whatever lies between processes
    assert (row.lo <= 0 <= row.hi) == (not drift)


@pytest.mark.parametrize(("blocks", "known"), [(2, False), (3, False), (4, True)])
def test_drift_is_not_told_from_too_few_blocks_of_each_process(write_run: Write, blocks: int, known: bool) -> None:
    """Of two blocks a process: one slope beside one level leaves none for the error, nor do two levels and three."""
    held = load_run(write_run(drift_per_block=0.01, blocks=blocks, blocks_per_process=2)).controls
    assert held.drift[["total", "lo", "hi"]].notna().all(axis=None) == known
    assert len(held.drift_series) == blocks


def test_the_gpus_busy_share_is_graph_over_eager(write_run: Write) -> None:
    run = load_run(write_run(baseline_s={("prefill", "eager"): 0.03, ("prefill", "graph"): 0.006}))
    host = run.controls.host.set_index("cell")
    assert host.loc["baseline", "busy_share"] == pytest.approx(0.2, rel=0.01)
    assert load_run(write_run("graph alone")).controls.host.empty


def test_controls_of_an_empty_run_are_empty(write_run: Write) -> None:
    held = load_run(write_run(blocks=0, cells=["baseline"], factors=[])).controls
    assert held.aa.empty
    assert held.tie_latency.empty
    assert held.drift.empty
    assert not held.noisy
