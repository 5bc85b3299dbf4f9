"""Verdicts on effects: what an interval and a corrected p allow to be said."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qwen3bench.record.states import Verdict

ALPHA = 0.05


@dataclass(frozen=True)
class Gains:
    """Gains with their intervals and Holm's p, each an array; NaN where there is none."""

    value: ArrayLike
    lo: ArrayLike
    hi: ArrayLike
    p_holm: ArrayLike


@dataclass(frozen=True)
class Directions:
    """What a gain above 0 is called, and one below."""

    gain: Verdict
    loss: Verdict


OF_TIMES = Directions(Verdict.FASTER, Verdict.SLOWER)
OF_BYTES = Directions(Verdict.LESS, Verdict.MORE)


def holm(p: ArrayLike) -> NDArray[np.float64]:
    """p corrected for the number of tests, along the last axis.

    Holm, A Simple Sequentially Rejective Multiple Test Procedure, 1979. NaN (no test made) stays NaN and does
    not count. (statsmodels' multipletests gives the same numbers, but collects garbage at each call: seconds
    in a report.)
    """
    p = np.asarray(p, dtype=float)
    order = np.argsort(p, axis=-1)  # NaN last
    tests = (~np.isnan(p)).sum(axis=-1, keepdims=True)
    stepped = np.take_along_axis(p, order, axis=-1) * np.maximum(tests - np.arange(p.shape[-1]), 1)
    corrected = np.empty_like(p)
    np.put_along_axis(corrected, order, np.minimum(np.maximum.accumulate(stepped, axis=-1), 1), axis=-1)
    return corrected


def verdicts(gains: Gains, band: float | NDArray[np.float64], words: Directions) -> list[str]:
    """The verdict on each gain with its interval, as a plain word: `same`, a direction of `words`, or `undecided`.

    `same` where the interval lies inside ±`band`, one for all or one for each (equivalence: Schuirmann's two
    one-sided tests, 1987), whether or not the difference is significant; a direction where the interval excludes 0
    and Holm's p is below 0.05; a value known without error (lo = hi) needs no p. Empty where there is no gain.
    """
    gain, lo, hi, p_holm = (np.asarray(a, dtype=float) for a in (gains.value, gains.lo, gains.hi, gains.p_holm))
    exact = lo == hi
    decided = (exact | (p_holm < ALPHA)) & ((lo > 0) | (hi < 0))
    # The band's edge in floating point: 1.01 − 1 is 0.010000000000000009.
    inside = (np.abs(lo) <= band * (1 + 1e-9)) & (np.abs(hi) <= band * (1 + 1e-9))
    direction = np.where(gain > 0, words.gain.value, words.loss.value)
    result = np.where(inside, Verdict.SAME.value, np.where(decided, direction, Verdict.UNDECIDED.value))
    return [str(v) for v in np.where(np.isnan(gain), "", result)]
