"""The criteria of equivalence, on numbers made by hand."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from qwen3bench.worker.equivalence.logit_errors import Errors, case_errors
from qwen3bench.worker.equivalence.verdict import ErrorComparison


def errors_of(error: float, count: int = 1000, reference: Tensor | None = None) -> Errors:
    reference = torch.linspace(-1, 1, count, dtype=torch.float64).view(1, 10, -1) if reference is None else reference
    return Errors({"a prefill": case_errors(reference + error, reference)})


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
    unclear = Errors({"a": case_errors(logits, reference)})
    assert unclear.top1_agreement(0.2) == 1.0
    logits[0, 7, 1] = 1.05
    wrong = Errors({"a": case_errors(logits, reference)})
    assert wrong.top1_agreement(0.2) == pytest.approx(49 / 50)
    assert wrong.top1_agreement(2.0) is None
    baseline = SimpleNamespace(max=0.1, rms=1.0)
    reason = ErrorComparison(replace_max(wrong, 0.1), baseline, torch.bfloat16, True).reason  # type: ignore[arg-type]
    assert reason == "the most likely token is the same in 98.0% of the clear positions (limit 99%)"


def replace_max(errors: Errors, value: float) -> Errors:
    return Errors({name: replace(case, max=value) for name, case in errors.by_case.items()})


def test_the_divergence_is_that_of_the_distributions() -> None:
    reference = torch.tensor([[[0.0, 1.0, 2.0]]], dtype=torch.float64)
    logits = torch.tensor([[[0.5, 1.0, 1.0]]], dtype=torch.float64)
    p, q = reference.softmax(-1), logits.softmax(-1)
    assert Errors({"a": case_errors(logits, reference)}).kl_mean == pytest.approx((p * (p / q).log()).sum().item())
