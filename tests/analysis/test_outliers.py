"""Visits that other work slowed are left out, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from analysis.disturbed_campaigns import (
    BLOCKS,
    CAMPAIGNS,
    CELLS,
    ROWS,
    WORTH,
    outcome,
    process_of,
    quiet,
    spikes,
    told,
)
from analysis.test_campaigns import CONDITIONS, PLAN, simulate

from qwen3bench.analysis.contrasts import contrasts, every_cell
from qwen3bench.analysis.effects import effects
from qwen3bench.analysis.frames import block_matrix, undisturbed, with_judged_visits
from qwen3bench.analysis.outliers import judged, telling, widening
from qwen3bench.analysis.run import load_run
from qwen3bench.analysis.stopping import half_widths
from qwen3bench.analysis.variance import clustered, completed
from qwen3bench.record.lines import SampleLine
from qwen3bench.record.reader import read_record

RNG = np.random.default_rng
SPEEDUPS = np.eye(32)[0] - np.eye(32)[1:]
Write = Callable[..., Path]


@pytest.mark.slow
@pytest.mark.parametrize("where", BLOCKS)
@pytest.mark.parametrize("name", ROWS)
def test_intervals_cover_and_are_narrow_on_a_busy_machine(name: str, where: str) -> None:
    row = ROWS[name]
    got = outcome(row.disturb, BLOCKS[where])
    assert row.coverage <= got.coverage <= 0.98 - 0.01 * (row.coverage == 0.93)
    assert got.width <= row.width[list(BLOCKS).index(where)]
    assert got.false <= 0.05
    assert got.found >= got.found_by_means - 0.01


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3])
def test_speedups_cover_whatever_share_of_visits_is_slowed(share: float) -> None:
    rng = RNG(1)
    y = quiet(rng, (500, 13, 32)) + spikes(share)(rng, (500, 13, 32))
    found = told(y, process_of(13), SPEEDUPS)
    covered = np.abs(found.estimate - SPEEDUPS @ (np.array(CELLS) @ WORTH)) <= found.half_width(0.95)
    assert 0.93 <= covered.mean() <= 0.985


@pytest.mark.parametrize(("cells", "blocks"), [(32, 6), (32, 13), (3, 9)])
def test_one_of_two_hundred_quiet_campaigns_loses_a_visit(cells: int, blocks: int) -> None:
    y = RNG(2).normal(scale=0.01, size=(CAMPAIGNS, blocks, cells))
    assert (~judged(y, process_of(blocks)).counts).any(axis=(1, 2)).mean() <= 0.02


def test_slow_visits_are_left_out_and_fast_ones_are_not() -> None:
    rng = RNG(3)
    y = quiet(rng, (1, 13, 32))[0]
    y[2, 5] += 0.5
    y[7, 20] += 0.1
    y[4, 9] -= 0.5
    assert np.argwhere(~judged(y, process_of(13)).counts).tolist() == [[2, 5], [7, 20]]


def test_what_no_scatter_tells_is_not_left_out() -> None:
    """Of exact values rounding is all that is left; a tenth of a per cent is no disturbance."""
    y = np.zeros((6, 8))
    y[3, 2] = 0.0005
    assert judged(y, process_of(6)).counts.all()
    y[3, 2] = 0.002
    assert (~judged(y, process_of(6)).counts).sum() == 1


@pytest.mark.parametrize("cells", [1, 2])
def test_one_cell_or_two_tell_of_no_disturbance(cells: int) -> None:
    y = RNG(4).normal(scale=0.01, size=(9, cells))
    y[4, 0] += 1
    assert judged(y, process_of(9)).counts.all()


def test_of_two_blocks_every_visit_counts() -> None:
    """A cell with one visit left would tell nothing, so that a run of two blocks would have no answer."""
    y = np.log(1 + 0.001 * RNG(1).random((2, 4)))
    y[0, 1] += 1.0
    y[1, 2] += 1.0
    assert judged(y, np.zeros(2)).counts.all()
    assert not judged(np.vstack([y, np.zeros((4, 4))]), np.zeros(6)).counts.all()


def test_a_cell_that_is_worth_less_in_one_process_is_not_disturbed() -> None:
    """A kernel chosen otherwise: 6 % for as long as the process lives."""
    y = RNG(5).normal(scale=0.002, size=(200, 15, 32))
    process = process_of(15)
    for cell in range(6):
        y[:, process == cell % 5, cell] += 0.06
    y[:, 4, 20] += 0.06
    counts = judged(y, process).counts
    assert not counts[:, 4, 20].any()
    assert counts[..., :6].mean() >= 0.998


@pytest.mark.parametrize("blocks", [6, 9, 18])
def test_a_loud_cell_keeps_its_visits_beside_quiet_ones(blocks: int) -> None:
    y = RNG(6).normal(scale=0.01, size=(500, blocks, 32)) * np.where(np.arange(32) >= 28, 10, 1)
    counts = judged(y, process_of(blocks)).counts
    assert counts[..., :28].mean() >= 0.9995
    assert counts[..., 28:].mean() >= 0.94


def test_blocks_and_cells_of_which_too_little_is_left_tell_nothing() -> None:
    counts = np.ones((6, 4), dtype=bool)
    counts[2, :2] = False  # half of the block
    counts[3:, 3] = False
    counts[1, 3] = False
    blocks, cells = telling(counts)
    assert blocks.tolist() == [True, True, False, True, True, True]
    assert cells.tolist() == [True, True, True, False]  # of which one visit is left
    assert all(part.all() for part in telling(np.ones((1, 4), dtype=bool)))


def test_completed_visits_leave_the_estimates_of_least_squares() -> None:
    rng = RNG(7)
    y = rng.normal(size=(4, 5)) + rng.normal(size=(4, 1))
    y[rng.random(y.shape) < 0.25] = np.nan
    block, cell = np.nonzero(~np.isnan(y))
    design = np.column_stack([np.eye(4)[block], np.eye(5)[cell][:, 1:]])
    fitted = np.linalg.lstsq(design, y[block, cell], rcond=None)[0]
    filled = completed(y, np.zeros(4)).mean(axis=0)
    np.testing.assert_allclose(filled[1:] - filled[0], fitted[4:], atol=1e-9)


def test_visits_that_are_missing_widen_the_interval() -> None:
    """A process that tells nothing of a cell leaves the ratio to the others, and counts for less."""
    y = RNG(8).normal(scale=0.01, size=(4000, 9, 8))
    y[:, 3:6, 1] = np.nan
    ratio = np.eye(8)[:1] - np.eye(8)[1:2]
    found = clustered(y, process_of(9), ratio)
    assert 0.93 <= np.mean(np.abs(found.estimate) <= found.half_width(0.95)) <= 0.99
    plan = contrasts(tuple("abc"), every_cell(3)).matrix
    found = clustered(y, process_of(9), plan)
    assert 0.93 <= np.mean(np.abs(found.estimate) <= found.half_width(0.95)) <= 0.97


def frame_of(y: np.ndarray) -> pd.DataFrame:
    rows = [
        {
            "block": b,
            "process": b // 3,
            "copy": 0,
            "cell": "+".join(np.array(list("abcde"))[np.array(cell) > 0]) or "baseline",
        }
        | {"latency_s": float(np.exp(y[b, c]))}
        | dict(zip("abcde", cell, strict=True))
        for b in range(len(y))
        for c, cell in enumerate(CELLS)
    ]
    return pd.DataFrame(rows).sample(frac=1, random_state=1, ignore_index=True)


def busy_frame() -> pd.DataFrame:
    rng = RNG(9)
    return frame_of((quiet(rng, (1, 12, 32)) + spikes(0.1)(rng, (1, 12, 32)))[0])


def test_all_that_is_told_stands_on_the_same_visits() -> None:
    frame = busy_frame()
    marked = with_judged_visits(frame)
    assert 0.05 < marked["left_out"].mean() < 0.15
    table = effects(frame, list("abcde"), block="block")
    pd.testing.assert_frame_equal(table, effects(marked, list("abcde"), block="block"))
    main = table[table["kind"] == "main"]
    published = np.where(main["df"] >= 5, np.sqrt(main["hi"] / main["lo"]) - 1, np.inf)
    assert half_widths(frame, list("abcde")) == pytest.approx(dict(zip("abcde", published, strict=True)))
    assert max(published) < 0.02
    blocks = block_matrix(marked)
    assert blocks.log_s.isna().to_numpy().sum() == marked["left_out"].sum()
    all_on = float(blocks.log_ratios("baseline", ["a+b+c+d+e"]).estimate[0])
    shares = table.loc[table["kind"] == "shapley", "estimate"]
    assert np.log(shares).sum() == pytest.approx(all_on, abs=1e-9)


def test_without_blocks_and_of_what_is_no_time_all_values_count() -> None:
    frame = busy_frame()
    plain = effects(frame, list("abcde"))
    signs = 2 * frame["a"].to_numpy() - 1
    logs = np.log(frame["latency_s"].to_numpy())
    assert plain["estimate"][0] == pytest.approx(np.exp(-(logs * signs).mean() * 2))
    rates = frame.assign(tokens_per_s=1 / frame["latency_s"])
    rate = effects(rates, list("abcde"), "tokens_per_s", block="block")
    assert rate["estimate"][0] == pytest.approx(np.exp((logs * signs).mean() * 2))


def test_values_seen_disturbed_give_way_to_those_taken_again(write_run: Write) -> None:
    lines = read_record(write_run(factors=("flash",), repeats=2, blocks=6)).of(SampleLine)
    frame = pd.DataFrame([asdict(replace(line, disturbed=line.repeat == 0 or None)) for line in lines])
    assert undisturbed(frame)["repeat"].eq(1).all()
    always = frame.assign(disturbed=True)
    assert len(undisturbed(always)) == len(frame)
    assert half_widths([replace(line, disturbed=True) for line in lines], ["flash"]) == half_widths(lines, ["flash"])


def test_a_run_says_which_visits_count_and_takes_no_other(write_run: Write) -> None:
    quiet_run = load_run(write_run("quiet", blocks=12))
    assert not quiet_run.samples["left_out"].any()
    slow = [
        asdict(line) for line in read_record(quiet_run.path).of(SampleLine) if line.block == 2 and line.cell == "flash"
    ]
    extra = [{"type": "sample", **{k: v for k, v in line.items() if v is not None}, "latency_s": 0.05} for line in slow]
    run = load_run(write_run("busy", blocks=12, extra=extra))
    visit = run.samples[run.samples["left_out"]]
    assert set(zip(visit["cell"], visit["block"], strict=True)) == {("flash", 2)}
    cells, before = (each.cells.set_index("cell") for each in (run, quiet_run))
    assert cells["samples"]["flash"] == before["samples"]["flash"] - 3
    assert cells["speedup"].to_numpy() == pytest.approx(before["speedup"].to_numpy(), rel=1e-3)
    width, usual = (np.log(each["latency_hi_s"] / each["latency_lo_s"])["flash"] for each in (cells, before))
    assert width < 2 * usual


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("name", CONDITIONS)
def test_what_intervals_promise_holds_after_visits_are_left_out(name: str, processes: int) -> None:
    y = simulate(RNG(processes), processes, **CONDITIONS[name])
    for matrix, most in ((PLAN, 0.97), (SPEEDUPS, 0.985)):
        found = told(y, process_of(y.shape[1]), matrix)
        assert 0.93 <= np.mean(np.abs(found.estimate) <= found.half_width(0.95)) <= most


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3, 6])
@pytest.mark.parametrize(("loud", "louder"), [([0], 3), ([28, 29, 30, 31], 10)])
def test_speedups_of_loud_cells_cover_after_visits_are_left_out(loud: list[int], louder: float, processes: int) -> None:
    scale = np.ones(32)
    scale[loud] = louder
    y = simulate(RNG(processes), processes) * scale
    y = y + np.repeat(RNG(14).normal(scale=0.01, size=(len(y), processes, 32)), 3, axis=1)
    found = told(y, process_of(y.shape[1]), SPEEDUPS)
    covered = np.mean(np.abs(found.estimate) <= found.half_width(0.95), axis=0)
    assert covered.mean() >= 0.93
    assert covered.min() >= 0.92


@pytest.mark.slow
def test_the_error_is_that_of_what_is_left() -> None:
    """Three of eight cells lack one of three processes: their means vary half as much again."""
    plan = contrasts(tuple("abc"), every_cell(3)).matrix
    y = RNG(10).normal(scale=0.01, size=(8000, 9, 8))
    whole = clustered(y, process_of(9), plan)
    y[:, 3:6, :3] = np.nan
    found = clustered(y, process_of(9), plan)
    told_variance = np.mean(found.se**2) / np.mean(whole.se**2)
    assert told_variance == pytest.approx(np.var(found.estimate) / np.var(whole.estimate), rel=0.06)
    wider = clustered(y, process_of(9), plan, np.full(8000, 1.5))
    np.testing.assert_allclose(wider.se, 1.5 * found.se)


def test_a_limit_among_many_visits_widens_the_error() -> None:
    """Of an exponential excess of mean 0.3, 96.4 % lie inside, and the density at the limit is 0.119."""
    excess = RNG(11).exponential(0.3, size=(200, 50, 40))
    assert np.mean(widening(excess)) == pytest.approx(0.964 / (0.964 - 0.119), abs=0.02)
    assert widening(np.where(excess > 0.9, 5.0, excess) - 0.2) == pytest.approx(1)
