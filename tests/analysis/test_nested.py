from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from analysis.pool_coverage import KINDS, WORLDS, World, coverage, pools
from scipy import stats

from qwen3bench.analysis.nested import Measured, Nested, nested


def measured(rows: dict[str, list[float]], se: float = 0.001, machine: dict[str, str] | None = None) -> Measured:
    """Estimates of one effect: by card, those of its runs; a card's machine is its first letter."""
    card = [name for name, values in rows.items() for _ in values]
    estimate = np.array([value for values in rows.values() for value in values])[:, None]
    homes = [name[0] for name in card] if machine is None else [machine[name] for name in card]
    return Measured(estimate, np.full_like(estimate, se), np.full_like(estimate, 4.0), card, homes)


def test_machines_are_the_unit_as_in_a_nested_analysis_of_variance() -> None:
    found = nested(measured({"a1": [0.10], "a2": [0.14], "b1": [0.20], "b2": [0.20], "c1": [0.31], "c2": [0.27]}))
    means = np.array([0.12, 0.20, 0.29])
    interval = stats.t.interval(0.95, 2, means.mean(), stats.sem(means))
    half = found.pooled.half_width(0.95)[0]
    assert found.machines == ("a", "b", "c")
    assert found.pooled.estimate[0] == pytest.approx(means.mean())
    assert (found.pooled.estimate[0] - half, found.pooled.estimate[0] + half) == pytest.approx(interval)
    assert found.pooled.p()[0] == pytest.approx(stats.ttest_1samp(means, 0).pvalue)
    # Searle, Casella & McCulloch, section 3.6: (MSA − MSB) / n and MSB − error.
    card_square = (0.02**2 * 2 + 0 + 0.02**2 * 2) / 3
    assert found.between_cards.sd[0] == pytest.approx(np.sqrt(card_square - 0.001**2))
    assert found.between_machines.sd[0] == pytest.approx(np.sqrt(means.var(ddof=1) - card_square / 2))


def test_the_p_of_a_spread_is_that_of_the_f_test_and_below_a_level_as_often_as_that() -> None:
    random = np.random.default_rng(0)
    se = 0.01 * np.sqrt(random.chisquare(4, (4000, 3, 1)) / 4)
    same = Measured(random.normal(0, 0.01, (4000, 3, 1)), se, np.full_like(se, 4.0), "abc", "abc")
    p = nested(same).between_machines.p
    assert np.mean(p < 0.05) == pytest.approx(0.05, abs=0.015)
    means = np.array([0.12, 0.20, 0.29])
    one = nested(measured({"a1": [means[0]], "b1": [means[1]], "c1": [means[2]]}, se=0.05))
    assert one.between_machines.p[0] == pytest.approx(stats.f.sf(means.var(ddof=1) / 0.05**2, 2, 12))
    assert np.isnan(nested(measured({"a1": [0.1], "a2": [0.2]})).between_machines.p).all()


def test_without_errors_of_the_runs_nothing_tells_how_far_machines_differ() -> None:
    """Runs of one block each: their noise is no spread of machines. Their scatter still is the error of the mean."""
    rows = measured({"a1": [0.10], "b1": [0.20], "c1": [0.29]}, se=float("nan"))
    found = nested(rows)
    spread = found.between_machines
    assert np.isnan([spread.sd, spread.lo, spread.hi, spread.p]).all()
    assert found.pooled.se[0] == pytest.approx(stats.sem([0.10, 0.20, 0.29]))
    assert np.isfinite(nested(replace(rows, se=np.zeros_like(rows.se))).between_machines.sd).all(), "without error"


def test_a_machine_counts_once_however_much_it_measured() -> None:
    often = nested(measured({"a1": [0.1, 0.1, 0.1], "a2": [0.1], "b1": [0.3]}))
    assert often.pooled.estimate[0] == pytest.approx(0.2)
    assert often.pooled.df[0] == 1
    assert often.of_machine.estimate[:, 0] == pytest.approx([0.1, 0.3])


def test_one_machine_gives_no_interval() -> None:
    found = nested(measured({"a1": [0.10], "a2": [0.12], "a3": [0.11]}))
    assert found.pooled.estimate[0] == pytest.approx(0.11)
    assert np.isnan(found.pooled.half_width(0.95)[0])
    assert np.isnan(found.pooled.p()[0])
    assert np.isnan(found.between_machines.sd[0])
    assert found.between_cards.sd[0] == pytest.approx(np.sqrt(0.01**2 - 0.001**2))


def test_machines_that_agree_to_the_last_digit_still_have_the_errors_of_their_runs() -> None:
    found = nested(measured({"a1": [0.1], "b1": [0.1]}, se=0.002))
    own = 0.002 / np.sqrt(2)
    assert 0.5 * own < found.pooled.half_width(0.95)[0] < own
    assert found.between_machines.lo[0] == found.between_machines.sd[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("machine_sd", [0.0, 0.003, 0.02])
@pytest.mark.parametrize("machines", [2, 3, 8])
def test_intervals_of_every_kind_of_effect_hold_the_truth(machines: int, machine_sd: float) -> None:
    covered = coverage(pools(World(machine_sd, machines), 5_000))
    for kind, which in KINDS.items():
        assert 0.93 <= covered[which].min() <= covered[which].max() <= 0.97, kind


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in WORLDS if "two kinds" not in name])
def test_unequal_machines_make_intervals_wider_and_never_too_narrow(name: str) -> None:
    for machines in (2, 3, 8):
        covered = coverage(pools(replace(WORLDS[name], machines=machines, machine_sd=0.003), 3_000))
        assert covered.min() >= 0.93


def _spread(found: Nested, which: str) -> np.ndarray:
    spread = getattr(found, which)
    return np.stack([spread.sd[:, 0], spread.lo[:, 0], spread.hi[:, 0]])


@pytest.mark.slow
@pytest.mark.parametrize(("which", "sd"), [("between_machines", 0.01), ("between_cards", 0.004)])
def test_the_spread_is_what_machines_and_cards_differ_by(which: str, sd: float) -> None:
    told, lo, hi = _spread(pools(World(0.01, 6, card_sd=0.004, cards=(3,)), 2_000), which)
    assert np.sqrt((told**2).mean()) == pytest.approx(sd, rel=0.05)
    assert 0.92 <= ((lo <= sd) & (sd <= hi)).mean() <= 0.98


@pytest.mark.slow
def test_no_spread_is_shown_where_there_is_none() -> None:
    _, lo, _ = _spread(pools(World(0.0, 6), 2_000), "between_machines")
    assert (lo > 0).mean() < 0.05
