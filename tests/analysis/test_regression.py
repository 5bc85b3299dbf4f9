"""Simulated pairs of runs: how often a regression passes the gate, and how often none fails it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from qwen3bench.analysis.changes import Compared, judged_table
from qwen3bench.analysis.contrasts import contrasts, every_cell
from qwen3bench.analysis.doubts import Controlled
from qwen3bench.analysis.regression import (
    CONFIDENCE,
    MOST_PROCESSES,
    Change,
    change_between,
    judged_changes,
    processes_that_tell,
)
from qwen3bench.analysis.run import load_run
from qwen3bench.analysis.significance import holm
from qwen3bench.analysis.variance import Estimates, clustered

CELLS = every_cell(5)
COPY = len(CELLS)
MAIN = -contrasts(tuple("abcde"), CELLS).matrix[:5]  # of log latency: above 0 is faster
SPEEDUPS = np.eye(1, COPY + 1) - np.eye(COPY + 1)[1:COPY]
ONE_SWITCH = [i for i, cell in enumerate(CELLS) if cell[0]]
LONE_CELL = [7]
LOUD = [3, 9, 14, 30]
TOLERANCE = 0.03
PAIRS = 300


def log_latency(
    rng: np.random.Generator, pairs: int, processes: int, loud: Sequence[int] = (), process_noise: float = 0.0
) -> np.ndarray:
    """log latency (pairs, blocks, cells and the copy): 0.3 % noise a visit, 3 blocks a process, drift all along."""
    noise = np.full(COPY + 1, 0.003)
    noise[list(loud)] *= 10
    y = rng.normal(size=(pairs, 3 * processes, COPY + 1)) * noise
    y += 0.01 * np.arange(3 * processes)[:, None]
    return y + np.repeat(rng.normal(scale=process_noise, size=(pairs, processes, COPY + 1)), 3, axis=1)


def told(y: np.ndarray) -> Estimates:
    """Main effects and speed-ups, as a run tells them."""
    process = np.arange(y.shape[1]) // 3
    effects, ratios = clustered(y[..., :COPY], process, MAIN), clustered(y, process, SPEEDUPS)
    parts = [
        np.concatenate([getattr(found, name) for found in (effects, ratios)], axis=-1)
        for name in ("estimate", "se", "df", "process_share")
    ]
    return Estimates(*parts)


def exits(
    seed: int, processes: int, slower: Sequence[int] = (), *, pairs: int = PAIRS, drift: float = 1.0, **noise: object
) -> dict[int, float]:
    """The share of each exit status among pairs of runs, the second with some cells 3 % slower."""
    rng = np.random.default_rng(seed)
    a, b = (log_latency(rng, pairs, processes, **noise) for _ in range(2))  # type: ignore[arg-type]
    b[..., list(slower)] += np.log(1 + TOLERANCE)
    b += np.log(drift)
    change = change_between(told(a), told(b))
    apart = sum(np.abs((y[..., COPY] - y[..., 0]).mean(axis=-1)) for y in (a, b))
    found = judged_changes(change, holm(change.p()), TOLERANCE, np.asarray(apart)[:, None])
    status = np.where((found == Change.UNDECIDED).any(axis=1) | (apart >= np.log1p(TOLERANCE)), 4, 0)
    status = np.where((found == Change.SLOWER).any(axis=1), 3, status)
    return {code: float((status == code).mean()) for code in (0, 3, 4)}


@pytest.mark.parametrize("pairs", [PAIRS, pytest.param(5_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("slower", [ONE_SWITCH, LONE_CELL], ids=["switch", "cell"])
@pytest.mark.parametrize("processes", [3, 5])
def test_a_regression_of_the_tolerance_is_seldom_missed(processes: int, slower: list[int], pairs: int) -> None:
    assert exits(1, processes, slower, pairs=pairs)[3] >= 0.98
    assert exits(2, processes, slower, pairs=pairs, drift=1.3)[3] >= 0.98


@pytest.mark.parametrize("pairs", [PAIRS, pytest.param(5_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("processes", [3, 5])
def test_a_regression_is_seldom_missed_beside_loud_cells(processes: int, pairs: int) -> None:
    assert exits(3, processes, ONE_SWITCH, pairs=pairs, loud=LOUD)[3] >= 0.98
    assert exits(4, processes, LONE_CELL, pairs=pairs, loud=LOUD)[0] <= 0.02


@pytest.mark.parametrize("pairs", [PAIRS, pytest.param(5_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("processes", [3, 5])
def test_a_regression_passes_seldom_where_processes_differ(processes: int, pairs: int) -> None:
    """By as much as visits do: what is not shown is then called that, and does not pass."""
    assert exits(5, processes, ONE_SWITCH, pairs=pairs, process_noise=0.003)[3] >= 0.98
    assert exits(6, processes, LONE_CELL, pairs=pairs, process_noise=0.003)[0] <= 0.02


@pytest.mark.parametrize("pairs", [PAIRS, pytest.param(5_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("drift", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("processes", [3, 5])
def test_unchanged_pairs_seldom_fail(processes: int, drift: float, pairs: int) -> None:
    quiet = exits(7, processes, pairs=pairs, drift=drift)
    assert quiet[3] <= 0.05
    assert quiet[0] >= 0.95  # and they are told to be unchanged
    assert exits(8, processes, pairs=pairs, drift=drift, loud=LOUD)[3] <= 0.05
    assert exits(9, processes, pairs=pairs, drift=drift, process_noise=0.01)[3] <= 0.05


def test_the_table_is_the_simulated_core(write_run: Callable[..., Path]) -> None:
    runs = [load_run(write_run(name, seed=seed, blocks=9, noise=0.003)) for seed, name in enumerate("ab")]
    table = judged_table(*runs, Controlled(*runs).noise(), TOLERANCE, latency=False)
    order = [("baseline" if not any(cell) else "+".join(_on(cell))) for cell in CELLS]
    matrices = []
    for run in runs:
        visits = run.samples.groupby(["block", "cell", "copy"])["latency_s"].median().unstack(["cell", "copy"])
        columns = [*((cell, 0) for cell in order), ("baseline", 1)]
        matrices.append(np.log(visits[columns].to_numpy())[None])
    core = change_between(*map(told, matrices))
    half = core.half_width(CONFIDENCE)
    rows = table[table["kind"] != Compared.INTERACTION].set_index("name")
    expected = [*("flash", "tie", "mlp", "mask", "norm"), *order[1:]]
    main, ratios = rows[rows["kind"] == Compared.MAIN], rows[rows["kind"] == Compared.SPEEDUP]
    found = np.concatenate([main.loc[expected[:5]], ratios.loc[expected[5:]]])
    frame = {column: found[:, list(rows.columns).index(column)].astype(float) for column in ("ratio", "lo", "p_holm")}
    np.testing.assert_allclose(frame["ratio"], np.exp(core.estimate[0]), rtol=1e-9)
    np.testing.assert_allclose(frame["lo"], np.exp((core.estimate - half)[0]), rtol=1e-6)
    np.testing.assert_allclose(frame["p_holm"], holm(core.p())[0], rtol=1e-6)
    speedups = runs[1].cells.set_index("cell")["speedup"]
    np.testing.assert_allclose(ratios["b"].astype(float), speedups.loc[ratios.index].astype(float))


def _on(cell: Sequence[int]) -> list[str]:
    return [name for name, on in zip(("flash", "tie", "mlp", "mask", "norm"), cell, strict=True) if on]


@pytest.mark.parametrize(
    ("estimate", "half", "noise", "change"),
    [
        (-0.030, 0.005, 0.0, "slower"),
        (-0.100, 0.050, 0.0, "slower"),
        (-0.026, 0.005, 0.0, "slower"),  # a loss of 3 % is not ruled out
        (-0.020, 0.005, 0.0, "tolerated"),  # certain, and less than counts
        (0.000, 0.010, 0.0, "tolerated"),
        (0.100, 0.120, 0.0, "tolerated"),  # wide, and yet no loss
        (0.000, 0.040, 0.0, "undecided"),
        (-0.030, 0.031, 0.0, "undecided"),
        (-0.050, 0.005, 0.06, "undecided"),  # two copies of one model differ by more
        (0.050, 0.005, 0.0, "faster"),
        (0.020, 0.005, 0.0, "tolerated"),
        (-0.050, 0.0, 0.0, "slower"),
        (np.nan, np.nan, 0.0, "undecided"),
    ],
)
def test_a_change_is_judged_by_its_interval(estimate: float, half: float, noise: float, change: str) -> None:
    df = 1e9
    known = Estimates(*map(np.array, (estimate, half / 2.3263478740408408, df, np.nan)))
    assert str(judged_changes(known, 0.001, TOLERANCE, noise)) == change
    if half:  # without Holm's consent it is not shown
        otherwise = {"slower": "undecided", "faster": "tolerated"}.get(change, change)
        assert str(judged_changes(known, 0.06, TOLERANCE, noise)) == otherwise


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_so_many_processes_tell(processes: int) -> None:
    """Measured again with as many as it says, pairs tell no change from one of the tolerance."""
    se, df = 0.02 / np.sqrt(processes), 2.0 * processes
    more = processes_that_tell(se, df, processes, TOLERANCE)
    assert more is not None
    assert processes < more <= MOST_PROCESSES
    rng = np.random.default_rng(0)
    spread = 0.02 / np.sqrt(more)
    freedom = df * (more - 1) / (processes - 1)
    for truth, told_apart in ((0.0, Change.TOLERATED), (-np.log1p(TOLERANCE), Change.SLOWER)):
        estimate = truth + rng.normal(scale=spread, size=2_000)
        measured = spread * np.sqrt(rng.chisquare(freedom, size=2_000) / freedom)
        found = Estimates(estimate, measured, np.full(2_000, freedom), np.full(2_000, np.nan))
        assert (judged_changes(found, found.p(), TOLERANCE) == told_apart).mean() >= 0.95


def test_too_many_processes_are_no_advice() -> None:
    assert processes_that_tell(1.0, 4.0, 3, TOLERANCE) is None
    assert processes_that_tell(np.nan, 0.0, 1, TOLERANCE) == 3
