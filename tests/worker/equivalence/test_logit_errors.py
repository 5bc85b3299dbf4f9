"""The criteria of equivalence, on numbers made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qwen3bench.worker.equivalence.logit_errors import CaseErrors, Errors, case_errors, expected_logits
from qwen3bench.worker.equivalence.verdict import ErrorComparison


def errors_against(logits: Tensor, reference: Tensor) -> CaseErrors:
    return case_errors(logits, expected_logits(reference))


def errors_of(error: float, count: int = 1000, reference: Tensor | None = None) -> Errors:
    reference = torch.linspace(-1, 1, count, dtype=torch.float64).view(1, 10, -1) if reference is None else reference
    return Errors({"a prefill": errors_against(reference + error, reference)})


@pytest.mark.parametrize(
    ("factor", "dtype", "accepted"),
    [
        (1.9, torch.float32, True),
        (2.1, torch.float32, False),
        (1.2, torch.bfloat16, True),
        (1.3, torch.bfloat16, False),  # the root mean square, which is the maximum here
    ],
)
def test_limits(factor: float, dtype: torch.dtype, accepted: bool) -> None:
    base = 100 * torch.finfo(dtype).eps
    compared = ErrorComparison(errors_of(factor * base), errors_of(base), dtype, is_run_dtype=True)
    assert (compared.reason is None) == accepted
    assert compared.checks["max_ratio"] == pytest.approx(factor)


def test_a_baseline_without_error_counts_as_one_that_rounds_its_logits() -> None:
    rounding = torch.finfo(torch.float32).eps / 2
    assert ErrorComparison(errors_of(rounding), errors_of(0.0), torch.float32, True).reason is None
    assert ErrorComparison(errors_of(3 * rounding), errors_of(0.0), torch.float32, True).reason is not None


def test_the_relative_error_has_a_limit_of_its_own() -> None:
    reason = ErrorComparison(errors_of(0.002), errors_of(0.002), torch.float32, True).reason
    assert reason is not None
    assert "relative L2" in reason


def test_the_top_token_counts_where_the_margin_is_clear() -> None:
    reference = torch.zeros(1, 100, 4, dtype=torch.float64)
    reference[..., 0] = 1.0  # margin 1
    reference[0, 50:, 0] = 0.01  # margin 0.01, not clear beside an error of 0.1
    logits = reference.clone()
    logits[0, 60, 1] += 0.1  # another token, where the margin is not clear
    unclear = Errors({"a": errors_against(logits, reference)})
    assert unclear.top1_agreement(0.2) == 1.0
    logits[0, 7, 1] = 1.05
    wrong = Errors({"a": errors_against(logits, reference)})
    assert wrong.top1_agreement(0.2) == pytest.approx(49 / 50)
    assert wrong.top1_agreement(2.0) is None
    loose = Errors({"a": replace(wrong.by_case["a"], max=0.1, sum_squares=1e3)})
    reason = ErrorComparison(loose, loose, torch.bfloat16, True).reason
    assert reason == "the most likely token is the same in 98.0% of the clear positions (limit 99%)"


def test_the_divergence_is_that_of_the_distributions() -> None:
    reference = torch.tensor([[[0.0, 1.0, 2.0]]], dtype=torch.float64)
    logits = torch.tensor([[[0.5, 1.0, 1.0]]], dtype=torch.float64)
    p, q = reference.softmax(-1), logits.softmax(-1)
    assert Errors({"a": errors_against(logits, reference)}).kl_mean == pytest.approx((p * (p / q).log()).sum().item())


def pooled(quiet: float, few: float, loud: float) -> Errors:
    reference = torch.linspace(-1, 1, 100_000, dtype=torch.float64).view(1, 10_000, 10)
    return Errors(
        {
            "a prefill": errors_against(reference + quiet, reference),
            "a decode": errors_against(reference[:, :1] + few, reference[:, :1]),
            "a loud prefill": errors_against(1e6 * (reference + loud), 1e6 * reference),
        }
    )


def test_a_case_of_few_positions_is_not_lost_among_many() -> None:
    baseline = pooled(0.01, 0.01, 0.01)
    wide = replace(baseline.by_case["a prefill"], max=1.0)  # whose largest error is larger than that of the few
    baseline = replace(baseline, by_case={**baseline.by_case, "a prefill": wide})
    assert ErrorComparison(pooled(0.01, 0.03, 0.01), baseline, torch.bfloat16, True, ["a loud prefill"]).reason is None
    compared = ErrorComparison(pooled(0.01, 0.05, 0.01), baseline, torch.bfloat16, True, ["a loud prefill"])
    assert compared.reason == "the root-mean-square error is 5 × the baseline's (limit 4 ×) in a decode"
    assert compared.checks["case_ratio"] == pytest.approx(5)


def test_large_logits_are_compared_by_themselves() -> None:
    baseline = pooled(0.01, 0.01, 0.01)
    compared = ErrorComparison(pooled(0.03, 0.01, 0.01), baseline, torch.bfloat16, True, ["a loud prefill"])
    assert compared.reason is not None  # among the errors of a million it would be nothing
    assert compared.reason.endswith("worst in a prefill")
    compared = ErrorComparison(pooled(0.01, 0.01, 0.03), baseline, torch.bfloat16, True, ["a loud prefill"])
    assert compared.checks["max_ratio"] == pytest.approx(3)
    assert compared.checks["max_error"] == pytest.approx(0.01)
    assert compared.reason is not None
    assert compared.reason.endswith("worst in a loud prefill")


def test_what_is_expected_at_some_positions_of_some_tokens_is_compared_there() -> None:
    reference = torch.randn(2, 9, 8, dtype=torch.float64)
    expected = expected_logits(reference[:, 3::2, ::4], range(3, 9, 2), step=4)
    part = expected.between(slice(0, 1), 4, 8)
    assert part is not None
    assert (part.positions, part.logits.shape) == ((5, 7), (1, 2, 2))
    assert torch.equal(part.logits, reference[:1, 5:8:2, ::4])
    assert torch.equal(part.top1, reference[:1, 5:8:2, ::4].argmax(-1))
    assert expected.between(slice(0, 1), 0, 3) is None
