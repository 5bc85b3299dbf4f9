"""Effects of one kind of card from several machines: machine ⊃ card ⊃ process ⊃ block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from qwen3bench.analysis.variance import Array, Estimates

# Half an interval is at least this many standard errors that the runs tell by themselves, as two machines may agree by
# chance to the last digit. It adds 1 % of coverage where two machines do not differ, and less elsewhere.
_LEAST_ERRORS = 0.7
_CERTAIN = 1e9  # degrees of freedom of an error that is known to be 0


@dataclass(frozen=True)
class Spread:
    """The standard deviation of each effect between machines, or between cards of a machine, with its interval.

    In log scale, what the runs' own errors make of it taken off; each (…, terms). NaN where nothing tells. `lo` is 0
    where no difference is shown. `p`: the F test's, of so large a spread where nothing differs.
    """

    sd: Array
    lo: Array
    hi: Array
    p: Array


@dataclass(frozen=True)
class Measured:
    """Estimates of effects, one row for what one card measured in one run: each (…, rows, terms), in log scale.

    `card` and `machine` say of each row whose it is, one name a row; cards of two machines have different names.
    """

    estimate: Array
    se: Array
    df: Array
    card: Sequence[str]
    machine: Sequence[str]


@dataclass(frozen=True)
class Nested:
    """Effects for a kind of card (`pooled`), those of each machine (…, machines, terms) by `machines`, and spreads."""

    pooled: Estimates
    machines: tuple[str, ...]
    of_machine: Estimates
    between_machines: Spread
    between_cards: Spread


def nested(measured: Measured, confidence: float = 0.95) -> Nested:
    """Effects with errors that hold for machines like these.

    A machine counts once, whatever it measured: its effect is the mean of its cards', a card's that of its runs. The
    error is that of the machines' effects about their mean: Student's t, one degree of freedom less than machines. It
    is the analysis of variance of a nested design, where the mean square of machines is the error of the mean (Searle,
    Casella & McCulloch, Variance Components, 1992, section 3.6). For machines measured alike it is exact, however much
    they differ. For others the mean square has no bias, and the interval errs on the wide side (Ibragimov & Müller,
    t-Statistic Based Correlation and Heterogeneity Robust Inference, 2010). Weights by precision would need to know
    how much machines differ, which two or three of them do not tell.
    """
    cards, to_cards = _averaging(measured.card)
    homes = dict(zip(measured.card, measured.machine, strict=True))
    machines, to_machines = _averaging([homes[card] for card in cards])
    of_card = _averaged(_Means(measured.estimate, measured.se**2, measured.df), to_cards)
    of_machine = _averaged(of_card, to_machines)
    pooled = _averaged(of_machine, np.full((1, len(machines)), 1 / len(machines)))
    df, card_df = len(machines) - 1, len(cards) - len(machines)
    square = _square(of_machine.mean - pooled.mean, df)
    card_square = _square(of_card.mean - (to_machines.T > 0).astype(float) @ of_machine.mean, card_df)
    of_one_machine = _Square(pooled.error[..., 0, :] * len(machines), pooled.df[..., 0, :])
    if card_df:
        of_one_machine = _Square(card_square * (to_machines**2).sum() / len(machines), card_df)
    usual = _averaged(of_card, np.full((1, len(cards)), 1 / len(cards)))
    of_one_card = _Square(usual.error[..., 0, :] * len(cards), usual.df[..., 0, :])
    unknown = np.full_like(square, np.nan)
    se = unknown
    if df:
        least = _LEAST_ERRORS * np.sqrt(pooled.error[..., 0, :]) / special.stdtrit(df, (1 + confidence) / 2)
        se = np.fmax(np.sqrt(square / len(machines)), least)
    return Nested(
        pooled=Estimates(pooled.mean[..., 0, :], se, np.full_like(square, df), unknown),
        machines=tuple(machines),
        of_machine=of_machine.estimates,
        between_machines=_spread(_Square(square, df), of_one_machine, confidence),
        between_cards=_spread(_Square(card_square, card_df), of_one_card, confidence),
    )


@dataclass(frozen=True)
class _Means:
    """Means of some rows (…, rows, terms), the variance of each by the runs' own errors, and its degrees of freedom."""

    mean: Array
    error: Array
    df: Array

    @property
    def estimates(self) -> Estimates:
        return Estimates(self.mean, np.sqrt(self.error), self.df, np.full_like(self.mean, np.nan))


@dataclass(frozen=True)
class _Square:
    """A mean square of each term and its degrees of freedom."""

    value: Array
    df: Array | int


def _averaging(names: Sequence[str]) -> tuple[list[str], Array]:
    """The different names in their order, and the matrix (names, rows) that averages the rows of each."""
    different = list(dict.fromkeys(names))
    mine = np.array([[name == each for name in names] for each in different], dtype=float)
    return different, mine / mine.sum(axis=1, keepdims=True)


def _averaged(rows: _Means, weights: Array) -> _Means:
    """Weighted means over rows, `weights` (means, rows); Satterthwaite's (1946) degrees of freedom."""
    parts = weights[..., None] ** 2 * rows.error[..., None, :, :]
    total = parts.sum(axis=-2)
    with np.errstate(divide="ignore", invalid="ignore"):
        df = total**2 / np.where(parts == 0, 0.0, parts**2 / rows.df[..., None, :, :]).sum(axis=-2)
    return _Means(weights @ rows.mean, total, df)


def _square(deviation: Array, df: int) -> Array:
    """The mean square over rows; NaN without degrees of freedom."""
    squares = (deviation**2).sum(axis=-2)
    return squares / df if df else np.full_like(squares, np.nan)


def _spread(between: _Square, within: _Square, confidence: float) -> Spread:
    """What of the mean square between is not made by that within, and its interval, as standard deviations.

    Tukey and Williams' interval (Searle, Casella & McCulloch, section 3.6): F quantiles of the ratio of the two.
    """
    if not np.any(between.df):
        nothing = np.full_like(between.value, np.nan)
        return Spread(nothing, nothing, nothing, nothing)
    tail = (1 - confidence) / 2
    known = np.isfinite(within.df) & (np.asarray(within.df) > 0)  # else it is 0 without error, or nothing tells it
    error = np.where(known | np.isnan(within.value), within.value, 0.0)
    df = np.where(known, within.df, _CERTAIN)
    low, high = (between.value / special.fdtri(between.df, df, p) - error for p in (1 - tail, tail))
    with np.errstate(divide="ignore", invalid="ignore"):
        p = special.fdtrc(between.df, df, between.value / error)
    sd, lo, hi = (np.sqrt(np.maximum(part, 0)) for part in (between.value - error, low, high))
    return Spread(sd, lo, hi, p)
