from __future__ import annotations

from itertools import permutations, product

import numpy as np
import pandas as pd
import pytest

from qwen3bench.analysis.contrasts import contrasts, every_cell, shapley_contrasts
from qwen3bench.analysis.effects import effects
from qwen3bench.analysis.significance import holm
from qwen3bench.errors import UserError

# Montgomery, Design and Analysis of Experiments, example 6.2 (2^4, filtration rate), in standard order.
FILTRATION = [45, 71, 48, 65, 68, 60, 80, 65, 43, 100, 45, 104, 75, 86, 70, 96]
FILTRATION_EFFECTS = {
    "A": 21.625,
    "B": 3.125,
    "C": 9.875,
    "D": 14.625,
    "A:B": 0.125,
    "A:C": -18.125,
    "A:D": 16.625,
    "B:C": 2.375,
    "B:D": -0.375,
    "C:D": -1.125,
    "A:B:C": 1.875,
    "A:B:D": 4.125,
    "A:C:D": -1.625,
    "B:C:D": -2.625,
    "A:B:C:D": 1.375,
}


def standard_order(factors: str, values: list[float], name: str = "y") -> pd.DataFrame:
    rows = [dict(zip(factors, cell, strict=True)) for cell in every_cell(len(factors))]
    return pd.DataFrame(rows).assign(**{name: values})


def by_term(table: pd.DataFrame, column: str = "estimate") -> dict[str, float]:
    table = table[table["kind"] != "shapley"]
    return dict(zip(table["term"], table[column], strict=True))


def test_filtration_rate_gives_the_published_effects() -> None:
    table = effects(standard_order("ABCD", FILTRATION), list("ABCD"), "y", log=False)
    assert by_term(table) == FILTRATION_EFFECTS
    assert table["lo"].isna().all()
    assert (table["verdict"] == "undecided").all()
    assert table["reason"].str.contains("no replicates").all()


def test_half_fraction_of_filtration_rate_gives_the_published_effects_and_names_aliases() -> None:
    """Montgomery, example 8.1: the half I = ABCD gives A 19.00, B 1.50, C 14.00, D 16.50."""
    frame = standard_order("ABCD", FILTRATION)
    half = frame[frame[list("ABCD")].sum(axis=1) % 2 == 0]
    table = effects(half, list("ABCD"), "y", log=False)
    known = {term: e for term, e in by_term(table).items() if not np.isnan(e)}
    assert known == pytest.approx({"A": 19.0, "B": 1.5, "C": 14.0, "D": 16.5})
    reasons = by_term(table, "reason")
    assert "cannot be told from C:D" in reasons["A:B"]
    assert "cannot be told from D" in reasons["A:B:C"]
    assert "more than 2 factors taken for nil" in reasons["A"]
    assert table.loc[table["kind"] == "shapley", "estimate"].isna().all()
    assert set(table.loc[table["estimate"].isna(), "verdict"]) == {""}


@pytest.mark.parametrize(
    ("rows", "reason", "expected"),
    [
        (["000", "100", "010", "001"], "with the others off", {"A": -3.0, "B": -1.0, "C": 0.0}),
        (["000", "111", "011", "101", "110"], "with the others on", {"A": -6.0, "B": -4.0, "C": 1.0}),
    ],
)
def test_without_an_average_a_main_effect_is_that_beside_none_or_all_of_the_others(
    rows: list[str], reason: str, expected: dict[str, float]
) -> None:
    """An interaction of A and B of −4, which least squares without interactions would spread over C."""
    cells = pd.DataFrame([[int(level) for level in row] for row in rows], columns=list("ABC"))
    y = 20 - 3 * cells["A"] - cells["B"] - 4 * cells["A"] * cells["B"] + cells["A"] * cells["B"] * cells["C"]
    table = effects(cells.assign(y=y), list("ABC"), "y", log=False)
    main = table[table["kind"] == "main"].set_index("term")
    assert main["estimate"].to_dict() == pytest.approx(expected)
    assert main["reason"].str.startswith(reason).all()
    assert table.loc[table["kind"] != "main", "estimate"].isna().all()


@pytest.mark.parametrize(("others", "reason"), [(0, "with the others off"), (1, "with the others on")])
def test_of_many_factors_too_a_main_effect_is_that_beside_none_or_all_of_the_others(others: int, reason: str) -> None:
    """Seven factors, each alone or all but each: no pair is told, and an average of none."""
    names = list("ABCDEFG")
    rows = [[level] * 7 for level in (0, 1)[: 1 + others]] + [[others ^ (i == j) for i in range(7)] for j in range(7)]
    cells = pd.DataFrame(rows, columns=names)
    y = 20 - 3 * cells["A"] - cells["B"] - 4 * cells["A"] * cells["B"]
    main = effects(cells.assign(y=y), names, "y", log=False).query("kind == 'main'").set_index("term")
    expected = {"A": -3.0 - 4.0 * others, "B": -1.0 - 4.0 * others}
    assert main["estimate"].to_dict() == pytest.approx(dict.fromkeys(names, 0.0) | expected)
    assert main["reason"].str.startswith(reason).all()


def test_a_main_effect_that_an_interaction_of_two_may_be_is_not_estimated() -> None:
    """The half I = ABC of a 2^3 (Montgomery, section 8.2): each main effect is an alias of an interaction of two."""
    frame = standard_order("ABC", [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 9.0])
    half = frame[frame[list("ABC")].sum(axis=1) % 2 == 1]
    table = effects(half, list("ABC"), "y", log=False)
    assert table["estimate"].isna().all()
    assert "cannot be told from B:C" in by_term(table, "reason")["A"]


def test_pilot_plant_gives_the_published_effects_and_standard_error() -> None:
    """Box, Hunter & Hunter, Statistics for Experimenters: T 23, C −5, K 1.5, …; standard error 1.4."""
    pairs = [(59, 61), (74, 70), (50, 58), (69, 67), (50, 54), (81, 85), (46, 44), (79, 81)]
    frames = [standard_order("TCK", list(values)) for values in zip(*pairs, strict=True)]
    table = effects(pd.concat(frames), list("TCK"), "y", log=False)
    expected = {"T": 23.0, "C": -5.0, "K": 1.5, "T:C": 1.5, "T:K": 10.0, "C:K": 0.0, "T:C:K": 0.5}
    assert by_term(table) == expected
    half = (table["hi"] - table["lo"])[table["kind"] != "shapley"] / 2
    np.testing.assert_allclose(half / 2.306, np.sqrt(2), rtol=1e-3)  # t(8) · 1.4
    assert (table["df"] == 8).all()


def test_chemical_process_gives_the_published_analysis_of_variance() -> None:
    """Montgomery, section 6.2: A 8.33, B −5.00, AB 1.67; P 0.0001 and 0.0024; F0 of AB 2.13."""
    cells = [(28, 25, 27), (36, 32, 32), (18, 19, 23), (31, 30, 29)]
    frames = [standard_order("AB", list(values)) for values in zip(*cells, strict=True)]
    table = effects(pd.concat(frames), list("AB"), "y", log=False)
    assert {t: round(e, 2) for t, e in by_term(table).items()} == {"A": 8.33, "B": -5.0, "A:B": 1.67}
    p = by_term(table, "p")
    assert (round(p["A"], 4), round(p["B"], 4)) == (1e-4, 0.0024)
    half = (table["hi"] - table["lo"])[0] / 2
    assert round((by_term(table)["A:B"] / (half / 2.306004)) ** 2, 2) == 2.13  # the published F0
    assert by_term(table, "p_holm") == pytest.approx({"A": 2 * p["A"], "B": p["B"], "A:B": p["A:B"]})
    assert by_term(table, "verdict") == {"A": "more", "B": "less", "A:B": "undecided"}


def test_each_order_of_terms_is_corrected_by_itself() -> None:
    """Main effects are what is asked first: 26 interactions do not make one of five undecided."""
    rng = np.random.default_rng(10)
    frame = pd.concat([standard_order("abcde", list(rng.normal(size=32))).assign(block=b) for b in range(4)])
    table = effects(frame, list("abcde"), "y", block="block", log=False)
    order = np.where(table["kind"] == "shapley", 0, table["term"].str.count(":") + 1)
    assert [int((order == n).sum()) for n in range(6)] == [5, 5, 10, 10, 5, 1]
    for n in range(6):
        np.testing.assert_allclose(table.loc[order == n, "p_holm"], holm(table.loc[order == n, "p"]))


def test_an_exact_ratio_is_not_rounded_away() -> None:
    frame = pd.DataFrame({"a": [0, 1], "peak_allocated_bytes": [1_000_000, 999_700]})
    table = effects(frame, ["a"], "peak_allocated_bytes", exact=True)
    assert table["estimate"][0] == pytest.approx(1_000_000 / 999_700)


def test_a_rate_is_no_time() -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"a": [0, 1] * 8, "tokens_per_s": [100.0, 200.0] * 8 * (1 + 0.001 * rng.normal(size=16))})
    assert effects(frame, ["a"], "tokens_per_s")["verdict"][0] == "more"


def test_shapley_shares_are_the_mean_over_all_orders_and_sum_to_all_on() -> None:
    table = effects(standard_order("ABCD", FILTRATION), list("ABCD"), "y", log=False)
    shares = table[table["kind"] == "shapley"].set_index("term")["estimate"]
    value = dict(zip(every_cell(4), FILTRATION, strict=True))
    expected = dict.fromkeys("ABCD", 0.0)
    orders = list(permutations(range(4)))
    for order in orders:
        cell = [0, 0, 0, 0]
        for i in order:
            before = value[tuple(cell)]
            cell[i] = 1
            expected["ABCD"[i]] += (value[tuple(cell)] - before) / len(orders)
    assert shares.to_dict() == pytest.approx(expected)
    assert shares.sum() == pytest.approx(96 - 45)


def blocked(rng: np.random.Generator, worth: dict[str, float], blocks: int = 6, noise: float = 0.001) -> pd.DataFrame:
    frames = []
    for block in range(blocks):
        frame = pd.DataFrame(every_cell(3), columns=list("abc"))
        log_s = sum(-np.log(w) * frame[list(term.split(":"))].prod(axis=1) for term, w in worth.items())
        frame["latency_s"] = np.exp(log_s + rng.normal(scale=noise, size=8) + 0.3 * block)
        frames.append(frame.assign(block=block, process=block // 3))
    return pd.concat(frames, ignore_index=True)


def test_log_effects_read_as_speed_ups_with_verdicts() -> None:
    table = effects(blocked(np.random.default_rng(0), {"a": 1.5, "c": 0.8}), list("abc"), block="block")
    main = table[table["kind"] == "main"].set_index("term")
    assert main["estimate"].to_dict() == pytest.approx({"a": 1.5, "b": 1.0, "c": 0.8}, rel=2e-3)
    assert main["verdict"].to_dict() == {"a": "faster", "b": "same", "c": "slower"}
    assert ((main["lo"] < main["estimate"]) & (main["estimate"] < main["hi"])).all()


def test_shapley_product_is_all_on_over_baseline() -> None:
    frame = blocked(np.random.default_rng(1), {"a": 1.5, "a:b": 1.1, "c": 0.8})
    table = effects(frame, list("abc"), block="block")
    log_s = np.log(frame["latency_s"]).groupby(frame[["a", "b", "c"]].sum(axis=1)).mean()
    product = table.loc[table["kind"] == "shapley", "estimate"].prod()
    assert product == pytest.approx(np.exp(log_s[0] - log_s[3]), rel=1e-12)


def test_a_visits_repeats_count_as_their_median_and_the_copy_not_at_all() -> None:
    frame = blocked(np.random.default_rng(2), {"a": 1.5})
    plain = effects(frame, list("abc"), block="block")
    repeats = [frame.assign(latency_s=frame["latency_s"] * f, copy=0) for f in (1.0, 0.9, 5.0)]
    copy = frame[frame[list("abc")].sum(axis=1) == 0].assign(latency_s=1e9, copy=1)
    pd.testing.assert_frame_equal(effects(pd.concat([*repeats, copy]), list("abc"), block="block"), plain)


def test_small_certain_differences_are_the_same() -> None:
    table = effects(blocked(np.random.default_rng(3), {"a": 1.005}, noise=1e-5), list("abc"), block="block")
    row = table.iloc[0]
    assert row["p_holm"] < 1e-6
    assert row["lo"] > 1
    assert row["verdict"] == "same"
    assert (
        effects(
            blocked(np.random.default_rng(3), {"a": 1.005}, noise=1e-5), list("abc"), block="block", band=0.001
        ).iloc[0]["verdict"]
        == "faster"
    )


def test_a_missing_cell_leaves_what_least_squares_can_tell() -> None:
    frame = blocked(np.random.default_rng(4), {"a": 1.5, "b": 1.2})
    frame = frame[~((frame["a"] == 1) & (frame["b"] == 1) & (frame["c"] == 0))]
    table = effects(frame, list("abc"), block="block").set_index(["term", "kind"])
    assert table.loc[("a", "main"), "estimate"] == pytest.approx(1.5, rel=5e-3)
    assert table.loc[("b", "main"), "estimate"] == pytest.approx(1.2, rel=5e-3)
    assert "a+b" in table.loc[("a", "main"), "reason"]
    highest = table.loc[("a:b:c", "interaction")]
    assert np.isnan([highest["estimate"], highest["lo"], highest["p_holm"]]).all()
    assert highest["verdict"] == ""
    assert "without a+b" in highest["reason"]
    shapley = table[table.index.get_level_values("kind") == "shapley"]
    assert shapley[["estimate", "lo", "hi", "p_holm"]].isna().all(axis=None)
    assert shapley["reason"].str.contains("undefined").all()


def test_two_cells_that_differ_in_two_factors_tell_neither() -> None:
    frame = blocked(np.random.default_rng(5), {"a": 1.5, "b": 1.2})
    frame = frame[(frame["c"] == 0) & (frame["a"] == frame["b"])]
    table = effects(frame, list("ab"), block="block")
    assert table["estimate"].isna().all()
    assert table["reason"][0] == "too few cells, without a, b: it cannot be told from b"


def test_of_many_factors_that_two_cells_cannot_tell_no_interactions_of_three_are_listed() -> None:
    factors = "abcdef"
    rng = np.random.default_rng(5)
    rows = [
        {"block": b, "latency_s": 1 + rng.normal() / 100, **dict.fromkeys(factors, on)}
        for b in range(6)
        for on in (0, 1)
    ]
    table = effects(pd.DataFrame(rows), list(factors), block="block")
    assert table["kind"].value_counts().to_dict() == {"interaction": 15, "main": 6, "shapley": 6}
    assert table["estimate"].isna().all()


def test_least_squares_agrees_with_a_regression() -> None:
    rng = np.random.default_rng(6)
    cells = tuple(c for c in every_cell(4) if c not in {(1, 0, 0, 0), (0, 1, 1, 0), (1, 1, 1, 1)})
    plan = contrasts(tuple("abcd"), cells)
    signs = 2 * np.array(cells) - 1
    low = [t for t in plan.terms if len(t) <= 2]
    design = np.column_stack([np.ones(len(cells)), *[signs[:, t].prod(axis=1) / 2 for t in low]])
    y = design @ rng.normal(size=design.shape[1])
    beta = np.linalg.lstsq(design, y, rcond=None)[0][1:]
    known = ~np.isnan(plan.matrix[: len(low)]).any(axis=1)
    assert known[:4].all()
    np.testing.assert_allclose(plan.matrix[: len(low)][known] @ y, beta[known], atol=1e-9)


def test_incomplete_blocks_are_left_out() -> None:
    frame = blocked(np.random.default_rng(7), {"a": 1.5}, blocks=7)
    cut = frame[~((frame["block"] == 6) & (frame["a"] == 1))]
    pd.testing.assert_frame_equal(
        effects(cut, list("abc"), block="block"), effects(frame[frame["block"] < 6], list("abc"), block="block")
    )


def test_shares_of_bytes_have_no_crumbs() -> None:
    """The weights of ten factors are no binary fractions; what saves nothing saves 0, not a millionth of a byte."""
    names = list("abcdefghij")
    frame = pd.DataFrame([dict(zip(names, levels, strict=True)) for levels in product((0, 1), repeat=10)])
    frame["peak_allocated_bytes"] = 1_927_264_768 - 311_164_928 * frame["b"] - 25_165_824 * frame["a"]
    table = effects(frame, names, "peak_allocated_bytes", log=False, exact=True)
    shares = table[table["kind"] == "shapley"].set_index("term")["estimate"]
    assert shares.to_dict() == dict.fromkeys(names, 0) | {"a": -25_165_824, "b": -311_164_928}


def test_bytes_told_with_the_others_on_are_a_fraction_of_what_is_held_there() -> None:
    cells = pd.DataFrame([(0, 0, 0), (1, 1, 1), (0, 1, 1), (1, 0, 1), (1, 1, 0)], columns=list("abc"))
    cells["peak_allocated_bytes"] = [100_000, 20_000, 20_900, 20_100, 52_000]  # 0.9 % of the baseline, 4 % of the cell
    table = effects(cells, list("abc"), "peak_allocated_bytes", log=False, exact=True)
    main = table[table["kind"] == "main"]
    assert by_term(main, "verdict") == {"a": "less", "b": "same", "c": "less"}
    assert set(main["reason"]) == {"with the others on"}


def test_counted_bytes_are_exact() -> None:
    frame = standard_order("ab", [1000, 1000, 700, 700], "peak_allocated_bytes")
    table = effects(frame, list("ab"), "peak_allocated_bytes", log=False, exact=True)
    main = table.set_index(["term", "kind"])
    assert main.loc[("b", "main"), ["estimate", "lo", "hi"]].tolist() == [-300, -300, -300]
    assert by_term(table, "verdict") == {"a": "same", "b": "less", "a:b": "same"}
    assert table["p_holm"].isna().all()
    assert not table[["estimate", "lo", "hi"]].isna().any(axis=None)


def test_values_that_never_vary_have_a_verdict_and_no_p() -> None:
    frame = standard_order("ab", [1000, 1200, 700, 900], "bytes")
    blocks = pd.concat([frame.assign(block=b) for b in range(3)])
    table = effects(blocks, list("ab"), "bytes", block="block", log=False)
    assert by_term(table, "verdict") == {"a": "more", "b": "less", "a:b": "same"}
    assert table["p_holm"].isna().all()
    assert (table["lo"] == table["hi"]).all()


def test_one_block_has_estimates_and_no_interval() -> None:
    frame = blocked(np.random.default_rng(8), {"a": 1.5}, blocks=1)
    table = effects(frame, list("abc"), block="block")
    assert table["estimate"].notna().all()
    assert table[["lo", "hi", "p_holm"]].isna().all(axis=None)
    assert (table["verdict"] == "undecided").all()
    assert table["reason"].str.contains("one block").all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: f.drop(columns="a"), "no column a"),
        (lambda f: f.drop(columns="block"), "no column block"),
        (lambda f: f.assign(a=2), "0 and 1"),
        (lambda f: f.assign(latency_s=0.0), "above zero"),
        (lambda f: f.assign(latency_s=np.inf), "finite"),
        (lambda f: f.assign(latency_s=np.nan), "no sample"),
        (lambda f: f.assign(runtime=["eager", "graph"] * 24), "several runtimes"),
        (lambda f: f[f.index % 8 == f["block"]], "no block holds every cell"),
    ],
)
def test_unusable_samples_are_refused(change: object, said: str) -> None:
    frame = blocked(np.random.default_rng(9), {"a": 1.5})
    with pytest.raises(UserError, match=said):
        effects(change(frame), list("abc"), block="block")  # type: ignore[operator]


@pytest.mark.parametrize(
    "setting", [{"confidence": 95}, {"confidence": 0}, {"band": -1}, {"band": 1}, {"band": np.nan}]
)
def test_a_percentage_is_no_fraction(setting: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(setting))):
        effects(blocked(np.random.default_rng(9), {"a": 1.5}), list("abc"), block="block", **setting)


@pytest.mark.parametrize("column", ["latency_s", "a", "block"])
def test_rows_that_lack_something_are_named(column: str) -> None:
    frame = blocked(np.random.default_rng(9), {"a": 1.5}, blocks=7)
    cut = frame.astype({column: float})
    cut.loc[frame["block"] == 6, column] = np.nan
    with pytest.warns(UserWarning, match=f"^of 56 samples 8 have no {column}; they are left out$"):
        table = effects(cut, list("abc"), block="block")
    pd.testing.assert_frame_equal(table, effects(frame[frame["block"] < 6], list("abc"), block="block"))


def test_samples_that_each_lack_something_are_refused() -> None:
    frame = blocked(np.random.default_rng(9), {"a": 1.5}).astype({"a": float})
    frame.loc[::2, "a"] = np.nan
    frame.loc[1::2, "latency_s"] = np.nan
    with pytest.raises(UserError, match="no sample has all of a, b, c, latency_s, block"):
        effects(frame, list("abc"), block="block")


@pytest.mark.parametrize("size", [1e-280, 1.0, 1e200, 1e306])
def test_values_of_any_size_have_the_same_intervals(size: float) -> None:
    """Their squares are beyond a float, and no reason for an interval to be nil or missing."""
    frame = pd.concat([standard_order("ab", [10.0, 12.0, 7.0, 9.0 + 0.1 * b], "y").assign(block=b) for b in range(3)])
    table = effects(frame.assign(y=frame["y"] * size), list("ab"), "y", block="block", log=False)
    usual = effects(frame, list("ab"), "y", block="block", log=False)
    for column in ("estimate", "lo", "hi"):
        np.testing.assert_allclose(table[column] / size, usual[column], rtol=1e-9)
    np.testing.assert_allclose(table["p"], usual["p"], rtol=1e-9)
    assert table["verdict"].tolist() == usual["verdict"].tolist()
    assert (table["reason"] == "").all()


def test_what_a_float_cannot_hold_is_told_as_that() -> None:
    ends = [1.7e308, -1.7e308]
    frame = pd.concat([pd.DataFrame({"a": [0, 1], "y": ends, "block": b}) for b in range(3)])
    table = effects(frame, ["a"], "y", block="block", log=False)
    assert table["reason"].str.contains("beyond the largest number").all()
    with pytest.raises(UserError, match="y must hold numbers that a float can hold"):
        effects(frame.assign(y=10**400), ["a"], "y", block="block")


def test_shapley_contrasts_sum_to_all_on_minus_baseline() -> None:
    total = shapley_contrasts(4).sum(axis=0)
    np.testing.assert_allclose(total, [-1, *[0] * 14, 1], atol=1e-12)


def test_a_factor_that_is_on_in_no_cell_or_in_all_says_so() -> None:
    cells = ((0, 0, 1), (0, 1, 1))
    assert contrasts(("a", "b", "c"), cells).reasons[:3:2] == ("no cell with it", "no cell without it")
