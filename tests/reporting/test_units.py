import math

import pandas as pd
import pytest

from qwen3bench.reporting.units import (
    SECONDS,
    count,
    duration_words,
    interval_decimals,
    is_number,
    listing,
    p_value,
    percent,
    ratio,
    seconds,
    significant,
    size,
    times,
    unit_for,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [(7.19e-3, "7.190 ms"), (2.5, "2.500 s"), (3.04e-5, "30.40 µs"), (1.0, "1.000 s"), (9e-9, "0.009000 µs")],
)
def test_seconds_take_the_unit_in_which_they_are_at_least_one(value: float, text: str) -> None:
    assert seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(311_164_928, "296.8 MiB"), (2**30, "1.000 GiB"), (1536, "1.500 KiB"), (0, "0 B"), (3, "3.000 B")],
)
def test_memory_is_shown_in_binary_units(value: float, text: str) -> None:
    assert size(value) == text


@pytest.mark.parametrize(
    ("p", "text"),
    [(1.0, "1"), (0.0317, "0.032"), (1e-4, "0.0001"), (3.2e-9, "3.2e-09"), (1e-114, "< 1e-16"), (0.0, "< 1e-16")],
)
def test_a_p_value_is_no_smaller_than_what_a_double_holds(p: float, text: str) -> None:
    assert p_value(p) == text


@pytest.mark.parametrize(
    ("value", "lo", "hi", "text"),
    [
        (1.2712, 1.2653, 1.2771, "1.271× [1.265, 1.277]"),
        (1.27, 1.20, 1.34, "1.27× [1.20, 1.34]"),
        (1.00003, 0.99991, 1.00015, "1.000× [1.000, 1.000]"),
        (1.5, math.nan, math.nan, "1.500×"),
        (math.nan, math.nan, math.nan, ""),
    ],
)
def test_a_ratio_shows_the_decimals_that_its_interval_supports(value: float, lo: float, hi: float, text: str) -> None:
    assert ratio(value, lo, hi) == text


def test_an_interval_without_width_keeps_four_digits() -> None:
    assert [interval_decimals(value, value) for value in (0.5, 1.0, 12.0, 123.0, 0.0)] == [4, 3, 2, 1, 4]


@pytest.mark.parametrize("value", [0.31276, 0.99964, 1.02512, 9.9996, 12.3456, 134.21])
def test_a_ratio_has_four_digits_at_most(value: float) -> None:
    said = ratio(value, value * 0.999999, value * 1.000001).partition("×")[0]
    assert len(said.lstrip("0.").replace(".", "")) <= 4
    assert times(value, value * 0.999999, value * 1.000001) == f"{said}×"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.2, "1 second"), (59, "59 seconds"), (61, "2 minutes"), (540, "9 minutes"), (5400, "2 hours"), (4e5, "5 days")],
)
def test_a_length_of_time_is_rounded_up(value: float, text: str) -> None:
    assert duration_words(value) == text


def test_a_column_takes_one_unit_by_its_median() -> None:
    assert unit_for([0.5e-3, 2e-3, 4.0, None, math.nan], SECONDS).symbol == "ms"
    assert unit_for([], SECONDS).symbol == "s"


def test_missing_values_are_no_numbers() -> None:
    assert [is_number(value) for value in (None, math.nan, pd.NA, math.inf, "1", 0, 1.5)] == [False] * 5 + [True] * 2


def test_significant_keeps_whole_numbers_whole() -> None:
    assert [significant(value) for value in (112_326.4, 0.00123456, -7.5)] == [
        "112,326",
        "0.001235",
        "-7.500",
    ]


def test_words_for_counts_lists_and_shares() -> None:
    assert (count(1, "cell"), count(2, "process", "processes")) == ("1 cell", "2 processes")
    assert listing([]) == ""
    assert listing(["a"]) == "a"
    assert listing(["a", "b", "c"]) == "a, b and c"
    assert listing(list("abcdefgh"), 3) == "a, b and 6 more"
    assert percent(0.0025) == "0.25 %"


@pytest.mark.parametrize(("lo", "hi"), [(0.0, 2.0), (1e-9, 7e21), (1.3, 200.0), (0.036, 130.0)])
def test_an_interval_that_tells_nothing_is_said_to(lo: float, hi: float) -> None:
    assert ratio(1.344, lo, hi) == "1.34× [no useful interval]"


def test_a_wide_interval_is_still_shown() -> None:
    assert ratio(1.5, 0.1, 90.0) == "1.50× [0.10, 90.00]"
