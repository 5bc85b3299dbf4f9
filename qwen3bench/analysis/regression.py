"""What the change of a ratio between two runs allows to be said: slower, not by so much, or not to be told."""

from __future__ import annotations

from enum import StrEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from qwen3bench.analysis.significance import ALPHA
from qwen3bench.analysis.variance import Estimates

CONFIDENCE = 0.98  # of a change's interval: a loss of the tolerance passes in one of a hundred gates
MOST_PROCESSES = 64  # more is no advice


class Change(StrEnum):
    """What became of a ratio from one run to the other, by the tolerance; `TOLERATED`: it lost less, if anything."""

    FASTER = "faster"
    SLOWER = "slower"
    TOLERATED = "tolerated"
    UNDECIDED = "undecided"


def change_between(a: Estimates, b: Estimates) -> Estimates:
    """b − a, of independent runs.

    Welch, The Generalization of Student's Problem when Several Different Population Variances are Involved, 1947.
    """
    of_a, of_b = a.se**2, b.se**2
    variance = of_a + of_b
    with np.errstate(divide="ignore", invalid="ignore"):
        df = variance**2 / (of_a**2 / a.df + of_b**2 / b.df)
    return Estimates(b.estimate - a.estimate, np.sqrt(variance), df, np.full_like(variance, np.nan))


def judged_changes(change: Estimates, p_holm: ArrayLike, tolerance: float, noise: ArrayLike = 0.0) -> NDArray[np.str_]:
    """The `Change` of each log ratio, above 0 where B is faster.

    A test of non-inferiority: the tolerance is the margin that an interval must stay above (Piaggio et al., JAMA 308,
    2012). `slower`: less than before (Holm's p), and a loss of the tolerance is not ruled out. `faster` mirrors it.
    No change counts that is not larger than `noise`, by which two copies of one model differ. `tolerated`: the interval
    rules out a loss of the tolerance. Else `undecided`.
    """
    half = change.half_width(CONFIDENCE)
    lo, hi = change.estimate - half, change.estimate + half
    limit = np.log1p(tolerance)  # latency longer by the tolerance
    shown = ((np.asarray(p_holm) < ALPHA) | (half == 0)) & (np.abs(change.estimate) > np.asarray(noise))
    states = [
        (shown & (hi < 0) & (lo <= -limit), Change.SLOWER),
        (shown & (lo > 0) & (hi >= limit), Change.FASTER),
        (lo > -limit, Change.TOLERATED),
    ]
    conditions, words = zip(*states, strict=True)
    return np.select(conditions, [word.value for word in words], Change.UNDECIDED.value)


def processes_that_tell(se: float, df: float, processes: int, tolerance: float) -> int | None:
    """About how many processes, in each run, make a change of the tolerance seen; None: more than `MOST_PROCESSES`.

    `se`, `df`: of one change between runs of so many `processes`. Seen is what is twice the half-width of its interval:
    it is then hardly ever taken for no change, nor no change for it. Without an error, the fewest that give one.
    """
    fewest = max(3, processes + 1)
    if not se > 0:
        return fewest
    for more in range(fewest, MOST_PROCESSES + 1):
        freedom = df * (more - 1) / max(1, processes - 1)
        half = special.stdtrit(freedom, (1 + CONFIDENCE) / 2) * se * np.sqrt(processes / more)
        if half <= np.log1p(tolerance) / 2:
            return more
    return None
