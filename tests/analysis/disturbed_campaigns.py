"""What intervals and corrected tests promise on a busy machine: simulated campaigns of 32 cells, some visits slowed.

`python tests/analysis/disturbed_campaigns.py` prints the tables of docs/how-we-measure.md; it takes a minute or two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.signal import lfilter

from qwen3bench.analysis.contrasts import contrasts, every_cell
from qwen3bench.analysis.controls import copies_differ
from qwen3bench.analysis.outliers import judged, telling, widening
from qwen3bench.analysis.significance import ALPHA, holm
from qwen3bench.analysis.variance import Estimates, clustered

Array = NDArray[np.float64]
Disturb = Callable[[np.random.Generator, tuple[int, int, int]], Array]
FACTORS = tuple("abcde")
CELLS = every_cell(len(FACTORS))
MAIN = contrasts(FACTORS, CELLS).matrix[: len(FACTORS)]
WORTH = np.array([-0.07, 0.0, 0.02, 0.0, -0.01])  # of each switch, in log latency
NIL, PLANTED = [1, 3], 4
PER_PROCESS = 3
COPY_OVER_BASELINE = np.eye(len(CELLS) + 1)[-1:] - np.eye(len(CELLS) + 1)[:1]  # the copy is the last column
GAINS = (np.eye(len(CELLS) + 1)[0] - np.eye(len(CELLS) + 1))[1:-1]  # of each cell over the baseline
BLOCKS = {"6 in 2": 6, "13 in 5": 13}
CAMPAIGNS = 2_000


def process_of(blocks: int) -> NDArray[np.intp]:
    """Three blocks in each process, as a run takes them; the last one may be cut short."""
    return np.arange(blocks) // PER_PROCESS


def quiet(rng: np.random.Generator, shape: tuple[int, int, int], noise: float = 0.01) -> Array:
    """log latency (campaigns, blocks, cells) with noise at each visit, and blocks that differ by 2 %."""
    return np.array(CELLS) @ WORTH + rng.normal(0, 0.02, (*shape[:2], 1)) + rng.normal(0, noise, shape)


def spikes(share: float) -> Disturb:
    """So large a share of visits 1.5 to 3 times as slow."""
    return lambda rng, shape: np.where(rng.random(shape) < share, np.log(rng.uniform(1.5, 3, shape)), 0)


def half_slowed(rng: np.random.Generator, shape: tuple[int, int, int]) -> Array:
    """Half of the visits slowed by an exponential of mean 3 %."""
    return np.where(rng.random(shape) < 0.5, rng.exponential(0.03, shape), 0)


def a_slow_process(rng: np.random.Generator, shape: tuple[int, int, int]) -> Array:
    """One process 5 % slower."""
    process = process_of(shape[1])
    return 0.05 * (process == rng.integers(0, process.max() + 1, shape[0])[:, None])[..., None]


def in_time(rng: np.random.Generator, shape: tuple[int, int, int], series: Array) -> Array:
    """What a series of visits (campaigns, blocks × cells) does to the cells, which come in random order in a block."""
    position = rng.random(shape).argsort(axis=-1)
    return np.take_along_axis(series.reshape(shape), position, axis=-1)


def periodic(rng: np.random.Generator, shape: tuple[int, int, int]) -> Array:
    """A wave of 2 %, and each fifth to fifteenth visit 5 % slower."""
    visits = np.arange(shape[1] * shape[2]) + rng.integers(0, 100, (shape[0], 1))
    wave = 0.02 * np.sin(2 * np.pi * visits / rng.uniform(5, 40, (shape[0], 1)))
    return in_time(rng, shape, wave + 0.05 * (visits % rng.integers(5, 16, (shape[0], 1)) == 0))


def drift(rng: np.random.Generator, shape: tuple[int, int, int]) -> Array:
    """1 % slower from each block to the next, within blocks too."""
    series = 0.01 * np.arange(shape[1] * shape[2]) / shape[2]
    return in_time(rng, shape, np.broadcast_to(series, (shape[0], len(series))))


def correlated(rng: np.random.Generator, shape: tuple[int, int, int]) -> Array:
    """More noise of 1 %, correlated by 0.8 from visit to visit."""
    white = rng.normal(scale=0.01 * np.sqrt(1 - 0.8**2), size=(shape[0], shape[1] * shape[2]))
    return in_time(rng, shape, lfilter([1], [1, -0.8], white, axis=-1))


@dataclass(frozen=True)
class Row:
    """A disturbance, the least coverage asked for, and the widest intervals beside those of means, by `BLOCKS`."""

    disturb: Disturb
    coverage: float
    width: tuple[float, float]


ROWS = {
    "none, 1 % noise": Row(spikes(0), 0.93, (1.2, 1.2)),
    "10 % of visits 1.5 to 3 × slower": Row(spikes(0.1), 0.93, (0.1, 0.08)),
    "30 % of visits": Row(spikes(0.3), 0.92, (0.2, 0.1)),
    "half of the visits slowed by an exponential of mean 3 %": Row(half_slowed, 0.92, (1.05, 1.05)),
    "a whole process 5 % slower": Row(a_slow_process, 0.93, (1.15, 1.15)),
    "a periodic disturbance": Row(periodic, 0.93, (1.15, 1.15)),
    "drift": Row(drift, 0.93, (1.15, 1.15)),
    "AR(1)": Row(correlated, 0.93, (1.15, 1.15)),
}


def told(y: Array, process: NDArray[np.intp], matrix: Array) -> Estimates:
    """Estimates of the contrasts `matrix` (terms, cells) from what counts of `y` (campaigns, blocks, cells).

    Where a cell of a campaign tells nothing any more, main effects of all five switches are those of the others, and so
    are contrasts that it is not in; else they are NaN.
    """
    found = judged(y, process)
    widened, visits = widening(found.excess), np.where(found.counts, y, np.nan)
    parts = np.full((4, len(y), len(matrix)), np.nan)
    whole = (2 * found.counts.sum(axis=2) > y.shape[2]).all(axis=1)
    whole &= (found.counts.all(axis=1) | (found.counts.sum(axis=1) >= 2)).all(axis=1)
    parts[:, whole] = _parts(clustered(visits[whole], process, matrix, widened[whole]))
    for i in np.flatnonzero(~whole):
        blocks, cells = telling(found.counts[i])
        if cells.all():
            parts[:, i] = _parts(clustered(visits[i][blocks], process[blocks], matrix, widened[i]))
            continue
        there = np.ones(len(matrix), dtype=bool)
        if matrix is MAIN:
            left = tuple(cell for cell, there in zip(CELLS, cells, strict=True) if there)
            plan = contrasts(FACTORS, left).matrix[: len(FACTORS)]
        else:
            there = ~matrix[:, ~cells].any(axis=1)
            plan = matrix[there][:, cells]
        parts[:, i, there] = _parts(clustered(visits[i][blocks][:, cells], process[blocks], plan, widened[i]))
    return Estimates(*parts)


def _parts(found: Estimates) -> Array:
    return np.stack([found.estimate, found.se, found.df, np.broadcast_to(found.process_share, found.se.shape)])


@dataclass(frozen=True)
class Outcome:
    """Shares of campaigns, and half-widths of main effects over those of means on the same data."""

    coverage: float
    width: float
    false: float
    found: float
    found_by_means: float
    left_out: float


def outcome(disturb: Disturb, blocks: int, campaigns: int = CAMPAIGNS, seed: int = 1) -> Outcome:
    """What a disturbance does to campaigns of so many blocks."""
    rng = np.random.default_rng(seed)
    shape = (campaigns, blocks, len(CELLS))
    y = quiet(rng, shape) + disturb(rng, shape)
    process = process_of(blocks)
    robust, means = told(y, process, MAIN), clustered(y, process, MAIN)
    half, p = robust.half_width(0.95), holm(robust.p())
    right = np.sign(WORTH[PLANTED])
    return Outcome(
        coverage=float((np.abs(robust.estimate - WORTH) <= half).mean()),
        width=float(half.mean() / means.half_width(0.95).mean()),
        false=float((p[:, NIL] < ALPHA).any(axis=1).mean()),
        found=_found(p, robust.estimate * right),
        found_by_means=_found(holm(means.p()), means.estimate * right),
        left_out=float(1 - judged(y, process).counts.mean()),
    )


def _found(p: Array, estimate: Array) -> float:
    return float(((p[:, PLANTED] < ALPHA) & (estimate[:, PLANTED] > 0)).mean())


@dataclass(frozen=True)
class Copies:
    """Shares of runs whose copies of the baseline are called different: by the rule, and by the limit alone.

    `false`: that recommend a cell which is worth nothing.
    """

    noisy: float
    by_the_limit: float
    false: float


def copies(
    disturb: Disturb, blocks: int, apart: Array | float = 0.0, noise: float = 0.01, limit: float = 0.005
) -> Copies:
    """What a control of two copies says in runs of 32 cells that are all alike, the first copy slower by `apart`.

    Speed-ups are over that copy. Two conditions of each run; a slower copy is in the first, which alone counts then.
    """
    rng = np.random.default_rng(1)
    shape = (2 * CAMPAIGNS, blocks, len(CELLS) + 1)
    y = rng.normal(0, 0.02, (*shape[:2], 1)) + rng.normal(0, noise, shape) + disturb(rng, shape)
    y[:CAMPAIGNS, :, 0] += np.log1p(np.broadcast_to(apart, CAMPAIGNS))[:, None]
    found = told(y, process_of(blocks), np.vstack([COPY_OVER_BASELINE, GAINS]))
    parts = (found.estimate, found.se, found.df, found.process_share)
    pairs = Estimates(*(part[:, 0].reshape(2, -1).T for part in parts))
    counted = slice(0, 1 if np.any(apart) else 2)
    noisy = copies_differ(pairs, limit, 0.95)[:, counted]
    over = np.maximum(0, -found.estimate[:, :1])  # a cell has to be faster than both copies
    gain = found.estimate[:, 1:] - found.half_width(1 - ALPHA / len(GAINS))[:, 1:] > over
    return Copies(
        noisy=float(noisy.any(axis=1).mean()),
        by_the_limit=float((np.abs(np.expm1(pairs.estimate)) > limit)[:, counted].any(axis=1).mean()),
        false=float((gain.any(axis=1).reshape(2, -1).T[:, counted] & ~noisy).any(axis=1).mean()),
    )


@dataclass(frozen=True)
class Fault:
    """A baseline that is slower than its copy by `apart`, at a noise of each visit and a limit; each a fraction."""

    apart: float
    noise: float
    limit: float


FAULTS = (
    *(Fault(0.01, noise, 0.005) for noise in (0.001, 0.002, 0.005)),
    *(Fault(0.05, noise, 0.02) for noise in (0.002, 0.01, 0.02, 0.05)),
)


def main() -> None:
    """Print the tables."""
    print("| disturbance | blocks | coverage | half-width | false | 1 % found | by means | left out |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, row in ROWS.items():
        for where, blocks in BLOCKS.items():
            got = outcome(row.disturb, blocks)
            shares = (got.false, got.found, got.found_by_means, got.left_out)
            percent = " | ".join(f"{100 * share:.1f} %" for share in shares)
            print(f"| {name} | {where} | {100 * got.coverage:.1f} % | {got.width:.3f} × | {percent} |", flush=True)
    heads = [f"{name}, {where}" for where in BLOCKS for name in ("noisy", "by the limit alone", "recommended")]
    print(f"\n| what is wrong | {' | '.join(heads)} |\n| --- |{' ---: |' * len(heads)}")
    for name, row in ROWS.items():
        _print(name, [copies(row.disturb, blocks) for blocks in BLOCKS.values()])
    for fault in FAULTS:
        apart, noise, limit = (f"{100 * each:g} %" for each in (fault.apart, fault.noise, fault.limit))
        of_each = [copies(spikes(0), blocks, fault.apart, fault.noise, fault.limit) for blocks in BLOCKS.values()]
        _print(f"a baseline {apart} slower; limit {limit}, {noise} noise", of_each)


def _print(name: str, of_each: list[Copies]) -> None:
    shares = [share for got in of_each for share in (got.noisy, got.by_the_limit, got.false)]
    print(f"| {name} | {' | '.join(f'{100 * share:.1f} %' for share in shares)} |", flush=True)


if __name__ == "__main__":
    main()
