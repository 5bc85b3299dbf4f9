"""Simulated campaigns: what the intervals and the corrected tests promise, they keep."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.signal import lfilter

from qwen3bench.analysis.contrasts import contrasts, every_cell, shapley_contrasts
from qwen3bench.analysis.effects import effects
from qwen3bench.analysis.frames import BlockMatrix
from qwen3bench.analysis.significance import ALPHA, holm
from qwen3bench.analysis.stopping import half_widths
from qwen3bench.analysis.variance import clustered, replicated
from qwen3bench.campaign.replication import Replication
from qwen3bench.campaign.state import Timing
from qwen3bench.config.cli import compose

CAMPAIGNS = 2_000
PER_PROCESS = 3
CELLS = every_cell(5)
PLAN = contrasts(tuple("abcde"), CELLS).matrix
RNG = np.random.default_rng
CAUTIOUS = 0.985  # of ratios and shares, which cannot know how far processes move just their cells


def simulate(
    rng: np.random.Generator,
    processes: int,
    *,
    campaigns: int = CAMPAIGNS,
    cells: int = 32,
    noise: float = 0.01,
    process_noise: float = 0.0,
    drift: float = 0.0,
    ar: float = 0.0,
    unequal: bool = False,
    grid_order: bool = False,
) -> np.ndarray:
    """log latency (campaigns, blocks, cells) of cells that are all alike.

    `noise` per visit, `process_noise` per cell and process, `drift` per block (linear, within blocks too), `ar`
    correlation from visit to visit, `unequal`: cells differ in noise up to threefold.
    """
    blocks = processes * PER_PROCESS
    visits = PER_PROCESS * cells
    white = rng.normal(size=(campaigns, processes, visits))
    white[..., 0] /= np.sqrt(1 - ar**2)
    noise_in_time = noise * np.sqrt(1 - ar**2) * lfilter([1], [1, -ar], white, axis=-1)
    position = np.broadcast_to(np.arange(cells), (campaigns, blocks, cells))
    if not grid_order:
        position = rng.random(position.shape).argsort(axis=-1)
    y = np.take_along_axis(noise_in_time.reshape(position.shape), position, axis=-1)
    if unequal:
        y = y * rng.permutation(np.linspace(0.5, 1.5, cells))
    y = y + drift * (np.arange(blocks)[:, None] + position / cells)
    shift = rng.normal(scale=process_noise, size=(campaigns, processes, cells)) if process_noise else 0
    return y + np.repeat(np.broadcast_to(shift, (campaigns, processes, cells)), PER_PROCESS, axis=1)


def process_of(blocks: int) -> np.ndarray:
    return np.arange(blocks) // PER_PROCESS


def family_wise_error(p: np.ndarray) -> float:
    return float((holm(p) < ALPHA).any(axis=-1).mean())


CONDITIONS = {
    "independent": {},
    "drift": {"drift": 0.01},
    "ar1": {"ar": 0.8},
    "process": {"process_noise": 0.01},
    "unequal": {"unequal": True},
    "all": {"drift": 0.01, "ar": 0.6, "process_noise": 0.01, "unequal": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3, 4])
@pytest.mark.parametrize("name", CONDITIONS)
def test_intervals_cover_and_nothing_is_found_where_nothing_is(name: str, processes: int) -> None:
    y = simulate(RNG(processes), processes, campaigns=4 * CAMPAIGNS, **CONDITIONS[name])
    found = clustered(y, process_of(y.shape[1]), PLAN)
    covered = np.abs(found.estimate) <= found.half_width(0.95)
    assert 0.93 <= covered.mean() <= 0.97
    assert ((covered.mean(axis=0) > 0.93) & (covered.mean(axis=0) < 0.97)).all()
    assert family_wise_error(found.p()) <= 0.05


def speedup_contrasts(cells: int) -> np.ndarray:
    """Each cell's log ratio to the first one."""
    return np.eye(cells)[0] - np.eye(cells)[1:]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3, 4])
@pytest.mark.parametrize("process_noise", [0, 0.01])
@pytest.mark.parametrize("loud", [(), (0,), (-1,), (0, -1)])
def test_shares_and_speedups_cover_whichever_cells_are_noisy(
    processes: int, process_noise: float, loud: tuple[int, ...]
) -> None:
    """They stand on few cells, often on the ends of the grid: a variance pooled over all would not be theirs."""
    y = simulate(RNG(processes), processes, process_noise=process_noise)
    scale = np.ones(32)
    scale[list(loud)] = 3
    for contrasts_ in (shapley_contrasts(5), speedup_contrasts(32)):
        found = clustered(y * scale, process_of(y.shape[1]), contrasts_)
        covered = np.abs(found.estimate) <= found.half_width(0.95)
        assert 0.93 <= covered.mean() <= CAUTIOUS
        assert covered.mean(axis=0).min() >= 0.93
        if len(found.p()[0]) == 5:
            assert family_wise_error(found.p()) <= 0.05


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("name", CONDITIONS)
def test_shares_and_speedups_cover(name: str, processes: int) -> None:
    y = simulate(RNG(processes), processes, **CONDITIONS[name])
    for contrasts_ in (shapley_contrasts(5), speedup_contrasts(32)):
        found = clustered(y, process_of(y.shape[1]), contrasts_)
        assert 0.93 <= np.mean(np.abs(found.estimate) <= found.half_width(0.95)) <= CAUTIOUS


@pytest.mark.parametrize("processes", [2, 3, 6])
def test_speedups_of_quiet_cells_cover_beside_loud_ones(processes: int) -> None:
    """Four cells of 32 are ten times as noisy, and hide in a sum over the cells that processes move all of them."""
    loud = np.arange(32) >= 28
    y = simulate(RNG(5), processes) * np.where(loud, 10, 1)
    y = y + np.repeat(RNG(14).normal(scale=0.01, size=(CAMPAIGNS, processes, 32)), PER_PROCESS, axis=1)
    found = clustered(y, process_of(y.shape[1]), speedup_contrasts(32))
    covered = np.mean(np.abs(found.estimate) <= found.half_width(0.95), axis=0)
    assert 0.93 <= covered[~loud[1:]].mean() <= 0.97
    assert covered.min() >= 0.92


UNLIKE = np.exp(np.random.default_rng(6).normal(scale=0.5, size=32))


@pytest.mark.parametrize("processes", [2, 3, 6])
def test_shares_and_speedups_cover_where_processes_differ_more_for_some_cells(processes: int) -> None:
    """Within processes all scatter alike, which tells nothing of how far the process moves each of them."""
    y = simulate(RNG(processes), processes, noise=0.002) + np.repeat(
        RNG(99).normal(scale=0.01 * UNLIKE, size=(CAMPAIGNS, processes, 32)), PER_PROCESS, axis=1
    )
    for contrasts_ in (shapley_contrasts(5), speedup_contrasts(32)):
        found = clustered(y, process_of(y.shape[1]), contrasts_)
        covered = np.abs(found.estimate) <= found.half_width(0.95)
        assert 0.93 <= covered.mean() <= CAUTIOUS
        assert covered.mean(axis=0).min() >= 0.91


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3, 6])
@pytest.mark.parametrize("louder", [1, 4, 10])
def test_the_ratio_to_another_implementation_covers_however_far_processes_move_it(
    processes: int, louder: float
) -> None:
    """As transformers' choice of kernels does, up to ten times as far as ours; and it widens no interval of ours."""
    campaigns = 400
    y = simulate(RNG(processes), processes, campaigns=campaigns, cells=4, noise=0.002)
    shift = RNG(98).normal(scale=0.005, size=(campaigns, processes, 4)) * [1, 1, 1, louder]
    y = y + np.repeat(shift, PER_PROCESS, axis=1)
    names = ["baseline", "baseline (copy)", "all on", "theirs:sdpa"]
    covered = []
    for campaign in y:
        blocks = BlockMatrix(pd.DataFrame(campaign, columns=names), process_of(y.shape[1]))
        found = blocks.log_ratios("baseline", names[2:])
        half = found.half_width(0.95)
        covered.append(np.abs(found.estimate) <= half)
        alone = BlockMatrix(blocks.log_s[names[:3]], blocks.process).log_ratios("baseline", ["all on"])
        assert half[0] == alone.half_width(0.95)[0]
    of_ours, of_theirs = np.mean(covered, axis=0)
    assert of_theirs >= 0.92
    assert of_ours >= 0.89  # 400 campaigns; the test below has more


def test_two_processes_that_agree_by_chance_are_no_proof_of_certainty() -> None:
    """Of two cells alone: their ratio scatters by 1.4 % from block to block and may by nothing between two means."""
    y = simulate(RNG(4), 2, cells=2)
    found = clustered(y, process_of(6), speedup_contrasts(2))
    half = found.half_width(0.95)
    assert 0.94 <= np.mean(np.abs(found.estimate) <= half) <= 0.995
    assert half.min() > 0.002


@pytest.mark.parametrize("process_noise", [0, 0.01])
@pytest.mark.parametrize("processes", [2, 3, 4])
def test_speedups_cover_where_there_are_few_cells(processes: int, process_noise: float) -> None:
    """Three cells in two processes hardly tell that processes differ; that costs two points at most."""
    y = simulate(RNG(3), processes, cells=3, process_noise=process_noise)
    found = clustered(y, process_of(y.shape[1]), speedup_contrasts(3))
    assert 0.92 <= np.mean(np.abs(found.estimate) <= found.half_width(0.95)) <= CAUTIOUS


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("processes", [2, 4])
def test_intervals_cover_with_few_factors(k: int, processes: int) -> None:
    y = simulate(RNG(k), processes, cells=2**k, process_noise=0.01, drift=0.01)
    plan = contrasts(tuple("abc"[:k]), every_cell(k)).matrix
    found = clustered(y, process_of(y.shape[1]), plan)
    most = CAUTIOUS if k == 1 else 0.97
    assert 0.93 <= np.mean(np.abs(found.estimate) <= found.half_width(0.95)) <= most


def test_intervals_cover_when_the_last_process_was_cut_short() -> None:
    y = simulate(RNG(5), 4, process_noise=0.01)[:, :10]
    found = clustered(y, process_of(10), PLAN)
    assert 0.93 <= np.mean(np.abs(found.estimate) <= found.half_width(0.95)) <= 0.97


def with_a_worth_that_varies(y: np.ndarray, processes: int, scale: float = 0.02) -> np.ndarray:
    """Campaigns in which what the first switch is worth differs between processes by 2 %."""
    worth = RNG(15).normal(scale=scale, size=(len(y), processes, 1))
    return y + np.repeat(worth, PER_PROCESS, axis=1) * np.array(CELLS)[:, 0]


def test_a_switch_whose_worth_depends_on_the_process_gets_an_interval_of_its_own() -> None:
    y = with_a_worth_that_varies(simulate(RNG(6), 6), 6)
    found = clustered(y, process_of(y.shape[1]), PLAN)
    covered = np.abs(found.estimate) <= found.half_width(0.95)
    assert covered[:, 0].mean() >= 0.93
    pooled_alone = np.sqrt(np.mean(found.se[:, 1:] ** 2, axis=1)) * 2
    assert np.mean(np.abs(found.estimate[:, 0]) <= pooled_alone) < 0.6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "noise", "least"), [(2, 0.003, 0.93), (3, 0.003, 0.93), (3, 0.01, 0.93), (2, 0.01, 0.85)]
)
def test_a_switch_whose_worth_varies_is_covered_by_few_processes(processes: int, noise: float, least: float) -> None:
    """By two as far as they tell it from noise: two worths may be alike by chance."""
    y = with_a_worth_that_varies(simulate(RNG(16), processes, campaigns=20_000, noise=noise), processes)
    found = clustered(y, process_of(y.shape[1]), PLAN[:1])
    assert np.mean(np.abs(found.estimate) <= found.half_width(0.95)) >= least


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_three_percent_at_a_third_of_a_percent_of_noise_are_decided(processes: int) -> None:
    """Of two processes by moderation: with a single degree of freedom one campaign in ten would not decide it."""
    y = simulate(RNG(17), processes, campaigns=20_000, noise=0.003) - 0.03 * np.array(CELLS)[:, 0]
    found = clustered(y, process_of(y.shape[1]), PLAN)
    half = found.half_width(0.95)
    decided = (holm(found.p()[:, :5])[:, 0] < ALPHA) & (half[:, 0] < -found.estimate[:, 0])
    assert 1 - decided.mean() <= 0.01
    assert (np.delete(holm(found.p()), 0, axis=1) < ALPHA).any(axis=1).mean() <= 0.05
    far = (half[:, :5] > 5 * np.median(half)).any(axis=1).mean()
    assert far <= (0.25 if processes == 2 else 0.03)


def test_blocks_as_clusters_would_lie_where_processes_differ() -> None:
    y = simulate(RNG(8), 2, process_noise=0.02)
    naive = clustered(y, np.zeros(6), PLAN)
    assert np.mean(np.abs(naive.estimate) <= naive.half_width(0.95)) < 0.85


@pytest.mark.parametrize("name", ["independent", "ar1"])
def test_one_percent_is_found_at_one_percent_noise_in_six_blocks(name: str) -> None:
    planted = 0.01 * np.array(CELLS)[:, 2]
    y = simulate(RNG(9), 2, **CONDITIONS[name]) - planted
    found = clustered(y, process_of(6), PLAN)
    p = holm(found.p())
    assert ((p[:, 2] < ALPHA) & (found.estimate[:, 2] < 0)).mean() >= 0.8
    assert (np.delete(p, 2, axis=1) < ALPHA).any(axis=1).mean() <= 0.06
    assert found.estimate[:, 2].mean() == pytest.approx(-0.01, abs=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("target", [0.002, 0.003, 0.005])
@pytest.mark.parametrize("processes", [2, 3])
def test_intervals_cover_when_their_width_ends_the_campaign(target: float, processes: int) -> None:
    limits = ("min_blocks=6", f"min_processes={processes}", f"target={target}", "max_blocks=24")
    settings = compose([f"measure.{limit}" for limit in limits])
    y = simulate(RNG(10), 24 // PER_PROCESS, process_noise=0.003, drift=0.002)
    covered = np.zeros(CAMPAIGNS)
    false = np.zeros(CAMPAIGNS, dtype=bool)
    going = np.ones(CAMPAIGNS, dtype=bool)
    for blocks in range(6, 24 + 1):
        found = clustered(y[going, :blocks], process_of(blocks), PLAN)
        half = found.half_width(0.95)
        stops = []
        for widths in np.expm1(half):
            known = dict(zip("abcde", widths[:5], strict=True))
            timing = Timing(blocks=blocks, processes={*process_of(blocks)}, widths=known, judged_until=np.inf)
            stops.append(Replication(settings, ("prefill", "graph"), timing).reason_to_stop() is not None)
        now = np.flatnonzero(going)[stops]
        covered[now] = (np.abs(found.estimate) <= half)[stops].mean(axis=1)
        false[now] = (holm(found.p()[stops]) < ALPHA).any(axis=1)
        going[now] = False
        if not going.any():
            break
    assert not going.any()
    assert 0.93 <= covered.mean() <= 0.97
    assert false.mean() <= 0.06


@pytest.mark.parametrize("contrasts", [PLAN, speedup_contrasts(32)], ids=["effects", "speed-ups"])
def test_the_share_of_processes_is_what_more_blocks_leave(contrasts: np.ndarray) -> None:
    """Process means with 1 % and three blocks with 1 % each: three of four parts of the variance of their mean."""
    y = simulate(RNG(12), 6, process_noise=0.01)
    process = process_of(y.shape[1])
    assert float(np.median(clustered(y, process, contrasts).process_share)) == pytest.approx(0.75, abs=0.05)
    quiet = simulate(RNG(12), 6)
    assert float(np.median(clustered(quiet, process, contrasts).process_share)) < 0.1
    assert not np.any(clustered(y, np.zeros_like(process), contrasts).process_share)  # one process tells nothing of it
    assert np.all(
        clustered(y, np.arange(len(process)), contrasts).process_share == 1
    )  # a block each: all may be theirs


def test_grid_order_reads_the_drift_as_effects() -> None:
    """Why there are blocks in random order: the same drift, measured cell after cell, invents effects."""
    drift = 0.01
    grid = simulate(RNG(11), 2, drift=drift, noise=0.001, grid_order=True)
    shuffled = simulate(RNG(11), 2, drift=drift, noise=0.001)
    in_order = clustered(grid, process_of(6), PLAN)
    in_random_order = clustered(shuffled, process_of(6), PLAN)
    assert np.mean(np.abs(in_order.estimate[:, :5]) <= in_order.half_width(0.95)[:, :5]) < 0.2
    assert family_wise_error(in_order.p()) == 1.0
    assert 0.93 <= np.mean(np.abs(in_random_order.estimate) <= in_random_order.half_width(0.95)) <= 0.97
    assert family_wise_error(in_random_order.p()) <= 0.06


def test_cell_after_cell_without_blocks_reads_the_drift_as_effects() -> None:
    """The usual benchmark: all repeats of a cell, then the next cell, while the machine warms up."""
    rng = RNG(12)
    repeats = 6
    y = rng.normal(scale=0.001, size=(500, 32, repeats)) + 0.05 * (np.arange(32 * repeats) / 192).reshape(32, -1)
    false = []
    for campaign in y:
        p = holm(replicated(list(campaign), PLAN).p())
        false.append((p[:5] < ALPHA).all())
    assert np.mean(false) > 0.95


def test_effects_and_half_widths_are_the_simulated_core() -> None:
    rng = RNG(13)
    y = simulate(rng, 2, campaigns=1, process_noise=0.005)[0]
    rows = [
        {"block": b, "process": b // PER_PROCESS, "cell": label, "latency_s": np.exp(y[b, c])}
        | dict(zip("abcde", cell, strict=True))
        for b in range(6)
        for c, cell in enumerate(CELLS)
        for label in ["+".join(f for f, on in zip("abcde", cell, strict=True) if on) or "baseline"]
    ]
    frame = pd.DataFrame(rows).sample(frac=1, random_state=1)
    table = effects(frame, list("abcde"), block="block")
    core = clustered(y, process_of(6), np.vstack([PLAN, shapley_contrasts(5)]))
    np.testing.assert_allclose(table["estimate"], np.exp(-core.estimate))
    np.testing.assert_allclose(table["lo"], np.exp(-core.estimate - core.half_width(0.95)))
    np.testing.assert_allclose(table["hi"], np.exp(-core.estimate + core.half_width(0.95)))
    np.testing.assert_allclose(table["p"], core.p())
    widths = half_widths(frame, list("abcde"))
    known = core.df[:5] >= 5
    expected = np.where(known, np.expm1(core.half_width(0.95)[:5]), np.inf)
    assert list(widths) == list("abcde")
    np.testing.assert_allclose(list(widths.values()), expected)
