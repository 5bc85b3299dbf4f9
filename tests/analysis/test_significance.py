from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.multitest import multipletests

from qwen3bench.analysis.significance import OF_TIMES, Gains, holm, verdicts


@pytest.mark.slow
@settings(max_examples=20, deadline=None)  # multipletests is slow
@given(st.lists(st.floats(0, 1) | st.just(float("nan")), min_size=1, max_size=40))
def test_holm_is_statsmodels_holm(p: list[float]) -> None:
    tested = [x for x in p if not np.isnan(x)]
    expected = np.array(p)
    if tested:
        expected[~np.isnan(expected)] = multipletests(tested, method="holm")[1]
    np.testing.assert_allclose(holm(p), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("gain", "lo", "hi", "p", "verdict"),
    [
        (0.10, 0.08, 0.12, 0.001, "faster"),
        (-0.10, -0.12, -0.08, 0.001, "slower"),
        (0.10, 0.08, 0.12, 0.06, "undecided"),  # Holm does not confirm it
        (0.02, -0.01, 0.05, 0.2, "undecided"),
        (0.005, 0.001, 0.009, 1e-9, "same"),  # certain, and too small to matter
        (0.0, -0.01, 0.01, 1.0, "same"),  # the band's edges belong to it
        (0.005, 0.001, 0.011, 1e-9, "faster"),
        (0.0, 0.0, 0.0, np.nan, "same"),
        (0.3, 0.3, 0.3, np.nan, "faster"),  # known without error
        (0.3, np.nan, np.nan, np.nan, "undecided"),
        (np.nan, np.nan, np.nan, np.nan, ""),
    ],
)
def test_verdict(gain: float, lo: float, hi: float, p: float, verdict: str) -> None:
    assert verdicts(Gains([gain], [lo], [hi], [p]), 0.01, OF_TIMES) == [verdict]
