"""Screens: what least squares tell from a fraction of the cells, and what their intervals promise."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pandas as pd
import pytest

from qwen3bench.analysis.confirm import (
    MeasuredSpeedup,
    Prediction,
    candidates,
    measured_speedups,
    within_memory,
)
from qwen3bench.analysis.contrasts import contrasts, every_cell, shapley_contrasts
from qwen3bench.analysis.effects import effects
from qwen3bench.analysis.least_squares import effect_regressors, fit_of, lack_of_fit, with_model_error
from qwen3bench.analysis.predictions import left_over, predicted_steps, predictions
from qwen3bench.analysis.variance import clustered
from qwen3bench.record.screen import Rules, Wish, screen

NAMES = tuple("abcdefghijkl")
PER_PROCESS = 3
NO_RULES, NO_WISH = Rules(), Wish()
RNG = np.random.default_rng


def cells_of(k: int, rules: Rules = NO_RULES, wish: Wish = NO_WISH) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(name in cell) for name in NAMES[:k]) for cell in screen(NAMES[:k], rules, wish).cells)


def samples_of(cells: tuple[tuple[int, ...], ...], log_s: np.ndarray, noise: float, seed: int = 0) -> pd.DataFrame:
    """Of 5 processes with 3 blocks each."""
    rng = RNG(seed)
    rows = [
        {
            **dict(zip(NAMES, cell, strict=False)),
            "block": block,
            "process": block // PER_PROCESS,
            "latency_s": np.exp(value + noise * rng.normal()),
        }
        for block in range(15)
        for cell, value in zip(cells, log_s, strict=True)
    ]
    return pd.DataFrame(rows)


def planted(cells: tuple[tuple[int, ...], ...], sizes: dict[tuple[int, ...], float]) -> np.ndarray:
    """log latency of cells with these textbook effects."""
    return effect_regressors(cells, list(sizes)) @ np.array(list(sizes.values()))


EFFECTS = {(0,): -0.30, (1,): 0.05, (3,): -0.10, (0, 3): -0.08, (2, 5): 0.04}


@pytest.mark.parametrize("k", [6, 7, 8, 9])
def test_a_screen_tells_what_was_planted(k: int) -> None:
    cells = cells_of(k)
    table = effects(samples_of(cells, planted(cells, EFFECTS), 1e-3), NAMES[:k], block="block").set_index(
        ["kind", "term"]
    )
    for term, size in EFFECTS.items():
        row = table.loc["main" if len(term) == 1 else "interaction", ":".join(NAMES[i] for i in term)]
        assert row["estimate"] == pytest.approx(np.exp(-size), rel=2e-3)
        assert row["verdict"] == ("faster" if size < 0 else "slower")
    others = table.loc["interaction"].drop(["a:d", "c:f"])
    assert len(others) == k * (k - 1) // 2 - 2
    assert set(others["verdict"]) == {"same"}
    # Worth beside none, beside all others, and shared out, as the model has it: main effect and halves of its pairs.
    assert table.loc[("alone", "a"), "estimate"] == pytest.approx(np.exp(0.30 - 0.08), rel=3e-3)
    assert table.loc[("last", "a"), "estimate"] == pytest.approx(np.exp(0.30 + 0.08), rel=3e-3)
    assert table.loc[("shapley", "a"), "estimate"] == pytest.approx(np.exp(0.30), rel=3e-3)
    assert table.loc["shapley"]["reason"].str.startswith("of the model fitted to").all()


def test_shares_of_the_model_combine_to_what_it_says_of_all_on() -> None:
    cells = cells_of(9)
    samples = samples_of(cells, planted(cells, EFFECTS), 1e-3)
    table = effects(samples, NAMES[:9], block="block")
    shares = table.loc[table["kind"] == "shapley", "estimate"]
    every = predictions(samples, NAMES[:9]).set_index("cell")
    assert len(every) == 511
    assert shares.prod() == pytest.approx(every.loc["+".join(NAMES[:9]), "speedup"])
    assert every["speedup"].is_monotonic_decreasing
    assert set(every.index[0].split("+")) >= {"a", "d"}


def test_steps_of_the_model_are_ratios_of_what_it_predicts_with_intervals_of_their_own() -> None:
    cells = cells_of(9)
    samples = samples_of(cells, planted(cells, EFFECTS), 1e-3)
    every = predictions(samples, NAMES[:9]).set_index("cell")["speedup"].to_dict() | {"baseline": 1.0}
    steps = predicted_steps(samples, NAMES[:9])
    assert len(steps) == 9 * 2**8
    for row in steps.itertuples():
        on = "+".join(sorted({*row.cell.split("+"), row.factor} - {"baseline"}))
        assert row.estimate == pytest.approx(every[on] / every[row.cell])
        assert row.lo < row.estimate < row.hi
    last = effects(samples, NAMES[:9], block="block").set_index(["kind", "term"]).loc[("last", "a")]
    step = steps[(steps["factor"] == "a") & (steps["cell"] == "+".join(NAMES[1:9]))].iloc[0]
    assert tuple(step[["estimate", "lo", "hi"]]) == pytest.approx(tuple(last[["estimate", "lo", "hi"]]))


def test_memory_without_error_is_exact_where_the_model_describes_it_and_not_where_it_does_not() -> None:
    cells = cells_of(9)
    frame = pd.DataFrame(cells, columns=list(NAMES[:9]))
    additive = frame.assign(peak_bytes=1000 - 300 * frame["b"])
    table = effects(additive, NAMES[:9], "peak_bytes", log=False, exact=True).set_index(["kind", "term"])
    assert tuple(table.loc[("main", "b"), ["estimate", "lo", "hi"]]) == (-300, -300, -300)
    three = additive.assign(peak_bytes=additive["peak_bytes"] + 200 * frame["a"] * frame["c"] * frame["d"])
    table = effects(three, NAMES[:9], "peak_bytes", log=False, exact=True).set_index(["kind", "term"])
    assert table.loc[("main", "b"), "lo"] < -300 < table.loc[("main", "b"), "hi"]


def test_aliased_terms_are_told_together_and_never_as_one_of_them() -> None:
    cells = cells_of(6, wish=Wish(resolution=4))
    table = effects(samples_of(cells, planted(cells, {(0,): -0.2, (0, 1): -0.1}), 1e-3), NAMES[:6], block="block")
    pairs = table[table["kind"] == "interaction"].set_index("term")
    assert pairs["estimate"].isna().all()
    assert pairs.loc["a:b", "reason"] == "without 48 cells: it cannot be told from c:e, d:f"
    together = table[table["kind"] == "aliased"].set_index("term")
    assert together.loc["a:b = c:e = d:f", "estimate"] == pytest.approx(np.exp(0.1), rel=3e-3)
    assert len(together) == 7
    mains = table[table["kind"] == "main"].set_index("term")
    assert mains.loc["a", "estimate"] == pytest.approx(np.exp(0.2), rel=3e-3)
    assert table.loc[table["kind"] == "shapley", "estimate"].isna().all()


def test_beside_a_fraction_of_resolution_three_the_baseline_does_not_tell_aliases_apart() -> None:
    cells = cells_of(7, wish=Wish(resolution=3))
    plan = contrasts(NAMES[:7], cells)
    assert np.isnan(plan.matrix).all()
    assert len(plan.alias_names) == 7
    assert all(" = " in name for name in plan.alias_names)
    assert plan.aliased is not None
    assert (plan.aliased[:, cells.index((0,) * 7)] == 0).all()


def test_switches_that_exclude_each_other_have_effects_and_no_pair() -> None:
    for k in (4, 7):
        cells = cells_of(k, Rules(excludes=(("a", "b"),)))
        sizes = {(0,): -0.2, (2,): 0.1, (0, 2): -0.05}
        samples = samples_of(cells, planted(cells, sizes), 1e-4)
        table = effects(samples, NAMES[:k], block="block").set_index("term")
        table = table[table["kind"].isin(["main", "interaction"])]
        assert table.loc["a", "estimate"] == pytest.approx(np.exp(0.2), rel=1e-3)
        assert table.loc["a:c", "estimate"] == pytest.approx(np.exp(0.05), rel=1e-3)
        assert np.isnan(table.loc["a:b", "estimate"])
        assert table.loc["a:b", "reason"] == "a and b are not switched by themselves"
        assert not any({"a", "b"} <= set(cell.split("+")) for cell in predictions(samples, NAMES[:k])["cell"])


def test_lack_of_fit_is_seen_where_three_matter_and_only_there() -> None:
    cells = cells_of(9)
    without = left_over(samples_of(cells, planted(cells, EFFECTS), 0.005), NAMES[:9])
    assert without is not None
    assert without.p > 0.01
    assert without.rms < 0.001
    with_three = left_over(samples_of(cells, planted(cells, {**EFFECTS, (0, 1, 4): 0.02}), 0.005), NAMES[:9])
    assert with_three is not None
    assert with_three.p < 0.001
    assert 0.003 < with_three.rms < 0.01
    assert left_over(samples_of(every_cell(3), np.zeros(8), 0.005), NAMES[:3]) is None


def test_the_best_few_are_those_within_the_memory_limit() -> None:
    cells = cells_of(9)
    samples = samples_of(cells, planted(cells, EFFECTS), 1e-3).assign(copy=0)
    samples["cell"] = ["+".join(n for n in NAMES[:9] if row[n]) or "baseline" for row in samples.to_dict("records")]
    best = candidates(samples, NAMES[:9])
    assert len(best) == 3
    assert all({"a", "d"} <= set(each.cell.split("+")) and "b" not in each.cell.split("+") for each in best)
    assert all(each.lo < each.speedup < each.hi for each in best)
    # Of more than 300 bytes saved by g, those without it are too large, whether they are measured or not.
    frame = pd.DataFrame(cells, columns=list(NAMES[:9]))
    frame["cell"] = ["+".join(n for n, on in zip(NAMES, cell, strict=False) if on) or "baseline" for cell in cells]
    frame["peak_allocated_bytes"] = 1000 - 300 * frame["g"]
    fits = within_memory(frame, NAMES[:9], 900)
    assert len(fits) == 512
    assert all(fits[cell] == ("g" in cell.split("+")) for cell in fits)
    assert all("g" in each.cell.split("+") for each in candidates(samples, NAMES[:9], fits))


def test_a_prediction_agrees_as_far_as_both_intervals_allow() -> None:
    predicted = Prediction("a", 1.50, 1.47, 1.53)
    assert predicted.agrees(MeasuredSpeedup(1.52, 1.50, 1.54))
    assert not predicted.agrees(MeasuredSpeedup(1.60, 1.59, 1.61))
    assert predicted.agrees(MeasuredSpeedup(1.60, 1.40, 1.83))


def test_without_an_interval_nothing_is_predicted_and_nothing_missed() -> None:
    """One block tells no error: an interval without a width would be a certainty that nobody has."""
    cells = cells_of(9)
    samples = samples_of(cells, planted(cells, EFFECTS), 1e-3).assign(copy=0)
    samples["cell"] = ["+".join(n for n in NAMES[:9] if row[n]) or "baseline" for row in samples.to_dict("records")]
    block = samples[samples["block"] == 0]
    assert candidates(block, NAMES[:9]) == []
    assert all(np.isnan(each.lo) and np.isnan(each.hi) for each in measured_speedups(block).values())
    unknown = MeasuredSpeedup(2.0, np.nan, np.nan)
    predicted = Prediction("a", 1.50, 1.47, 1.53)
    assert predicted.agrees(unknown)
    assert not predicted.is_tested_by(unknown)


def test_two_blocks_that_tell_next_to_nothing_give_intervals_that_can_be_recorded() -> None:
    cells = cells_of(9)
    samples = samples_of(cells, planted(cells, EFFECTS), 1.0).assign(copy=0)
    samples["cell"] = ["+".join(n for n in NAMES[:9] if row[n]) or "baseline" for row in samples.to_dict("records")]
    best = candidates(samples[samples["block"] < 2], NAMES[:9])
    assert len(best) == 3
    assert max(each.hi for each in best) > 1e100
    assert all(0 < each.lo < each.speedup < each.hi < np.inf for each in best)


def test_cells_measured_since_correct_the_next_choice() -> None:
    """What is fitted again with a cell that turned out slow no longer has it first."""
    cells = cells_of(9)
    samples = samples_of(cells, planted(cells, EFFECTS), 1e-3).assign(copy=0)
    samples["cell"] = ["+".join(n for n in NAMES[:9] if row[n]) or "baseline" for row in samples.to_dict("records")]
    first = candidates(samples, NAMES[:9])[0]
    again = candidates(samples, NAMES[:9], None, {first.cell: MeasuredSpeedup(0.5, 0.49, 0.51)})
    assert first.cell not in [each.cell for each in again]


@pytest.mark.slow
@pytest.mark.parametrize(("k", "interactions"), [(6, 0), (6, 2), (8, 2), (9, 0), (9, 2), (10, 2)])
@pytest.mark.parametrize(("processes", "process_noise"), [(5, 0.01), (3, 0.003)])
def test_intervals_of_a_screen_cover_with_interactions_of_three(
    k: int, interactions: int, processes: int, process_noise: float
) -> None:
    """Two interactions of three of 2 %, wherever chance puts them, and noise of blocks and processes."""
    rng, cells = RNG(k), cells_of(k)
    fit, every = fit_of(cells), every_cell(k)
    triples, process = [*combinations(range(k), 3)], np.arange(processes * PER_PROCESS) // PER_PROCESS
    shapley = shapley_contrasts(k)
    told = len(fit.groups)
    matrix = np.vstack([fit.told, shapley @ fit.predicting(every)])
    truth = np.vstack([np.zeros((told, len(triples))), shapley @ fit.of_triples(every)])
    covered, seen = [], []
    for _ in range(300):
        sizes = np.zeros(len(triples))
        sizes[rng.choice(len(triples), interactions, replace=False)] = 0.02 * rng.choice([-1, 1], interactions)
        of_process = process_noise * rng.normal(size=(processes, len(cells)))
        y = fit.triples @ sizes + of_process[process] + 0.01 * rng.normal(size=(len(process), len(cells)))
        found = clustered(y, process, np.vstack([matrix, fit.left_over]))
        lack = lack_of_fit(fit, found.at(slice(0, told)), found.at(slice(len(matrix), None)))
        widened = with_model_error(found.at(slice(0, len(matrix))), matrix, truth, fit, lack)
        covered.append(np.abs(widened.estimate - truth @ sizes) <= widened.half_width(0.95))
        seen.append(lack.p < 0.05)
    of_terms, of_shares = np.array(covered)[:, :told], np.array(covered)[:, told:]
    assert 0.93 <= of_terms[:, :k].mean() <= 0.98
    assert 0.93 <= of_terms[:, k:].mean() <= 0.98
    # Of 8 in 64, interactions of three that are aliased with pairs are not seen, and shares hold them.
    assert of_shares.mean() >= (0.88 if (k, interactions) == (8, 2) else 0.93)
    assert np.mean(seen) <= 0.1 if not interactions else np.mean(seen) >= 0.85
