"""What a candidate's errors say of it, and the limits that they are held to; `gate` says where these come from."""

from __future__ import annotations

from dataclasses import replace

import torch

from qwen3bench.record.messages import Judgment
from qwen3bench.worker.equivalence.logit_errors import Errors

MAX_RATIO_LIMIT = 2.0  # as in flash-attention's tests; right cells of a tiny model reach 1.15 on a CPU
RMS_RATIO_LIMIT = 2.0  # in float32; right cells reach 1.03 there
RMS_RATIO_LIMIT_RUN = 1.25  # in the run's dtype, whose rounding hides more: the mean of many errors hardly moves
RELATIVE_L2_LIMIT = 1e-3  # in float32; right cells reach 2e-6 there
MIN_TOP1_AGREEMENT = 0.99  # of the positions whose margin is clear


class ErrorComparison:
    """A cell's errors held against the baseline's in one dtype; `reason` says in words which check fails first."""

    def __init__(self, cell: Errors, baseline: Errors, dtype: torch.dtype, is_run_dtype: bool) -> None:
        self.errors = cell
        self.dtype = dtype
        self.is_run_dtype = is_run_dtype
        rounding = torch.finfo(dtype).eps / 2
        base_max = max(baseline.max, rounding * cell.largest_reference)
        base_rms = max(baseline.rms, rounding * cell.rms_reference)
        self.checks = {
            "max_error": cell.max,
            "rms_error": cell.rms,
            "max_ratio": cell.max / base_max,
            "rms_ratio": cell.rms / base_rms,
            "relative_l2": cell.rms / cell.rms_reference,
        }
        self.top1_agreement = cell.top1_agreement(2 * base_max)
        exact = dtype is torch.float32
        rms_limit = RMS_RATIO_LIMIT if exact else RMS_RATIO_LIMIT_RUN
        reasons = []
        for kind, error, base, limit in (
            ("maximum", cell.max, base_max, MAX_RATIO_LIMIT),
            ("root-mean-square", cell.rms, base_rms, rms_limit),
        ):
            if not error <= limit * base:
                reasons.append(
                    f"the {kind} error {error:.2g} is {error / base:.3g} × the baseline's {base:.2g} "
                    f"(limit {limit:g} ×), worst in {cell.worst_case}"
                )
        if exact and not self.checks["relative_l2"] <= RELATIVE_L2_LIMIT:
            reasons.append(f"the relative L2 error {self.checks['relative_l2']:.2g} is above {RELATIVE_L2_LIMIT:g}")
        if is_run_dtype and self.top1_agreement is not None and self.top1_agreement < MIN_TOP1_AGREEMENT:
            reasons.append(
                f"the most likely token is the same in {self.top1_agreement:.1%} of the clear positions "
                f"(limit {MIN_TOP1_AGREEMENT:.0%})"
            )
        self.reason = reasons[0] if reasons else None

    def added_to(self, judgment: Judgment) -> Judgment:
        """The judgment with what this comparison says; with a reason where it fails.

        Where options refuse what no workload asks for, `…_stood_in` is the number of cases that were judged with the
        default options.
        """
        errors, name = self.errors, dtype_name(self.dtype)
        fallbacks = {f"{name}_stood_in": errors.fallbacks} if errors.fallbacks else {}
        checks = judgment.checks | fallbacks | {f"{name}_{key}": value for key, value in self.checks.items()}
        judgment = replace(judgment, checks=checks)
        if self.dtype is torch.float32 and errors.fallbacks < len(errors.by_case):  # else it is another model's
            judgment = replace(judgment, max_abs_error=errors.max)
        if self.is_run_dtype:
            judgment = replace(judgment, kl_mean=errors.kl_mean, top1_agreement=self.top1_agreement)
        return replace(judgment, reason=f"{name}: {self.reason}") if self.reason else judgment


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` of torch.float32."""
    return str(dtype).removeprefix("torch.")
