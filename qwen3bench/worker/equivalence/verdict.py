"""What a candidate's errors say of it, and the limits that they are held to; `gate` says where these come from."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

import torch

from qwen3bench.record.messages import Judgment
from qwen3bench.worker.equivalence.logit_errors import Errors, dtype_name

MAX_RATIO_LIMIT = 2.0  # as in flash-attention's tests; right cells of a tiny model reach 1.15 on a CPU
RMS_RATIO_LIMIT = 2.0  # in float32; right cells reach 1.03 there
RMS_RATIO_LIMIT_RUN = 1.25  # in the run's dtype, whose rounding hides more: the mean of many errors hardly moves
RELATIVE_L2_LIMIT = 1e-3  # in float32; right cells reach 2e-6 there
CASE_RATIO_LIMIT = 4.0  # of one case, where few positions may take part; right cells reach 1.5
MIN_TOP1_AGREEMENT = 0.99  # of the positions whose margin is clear


class ErrorComparison:
    """A cell's errors held against the baseline's in one dtype; `reason` says in words which check fails first.

    Cases in `apart` are pooled by themselves, as their logits are of another size.
    """

    def __init__(
        self, cell: Errors, baseline: Errors, dtype: torch.dtype, is_run_dtype: bool, apart: Collection[str] = ()
    ) -> None:
        self.dtype = dtype
        self.is_run_dtype = is_run_dtype
        exact = dtype is torch.float32
        rms_limit = RMS_RATIO_LIMIT if exact else RMS_RATIO_LIMIT_RUN
        self.only_fallbacks = cell.fallbacks == len(cell.by_case)
        self.errors = main = cell.only(name for name in cell.by_case if name not in apart)
        rounding = torch.finfo(dtype).eps / 2
        pools = [_Pool(main, baseline.only(main.by_case), rounding)]
        if others := cell.only(name for name in cell.by_case if name in apart).by_case:
            pools.append(_Pool(cell.only(others), baseline.only(others), rounding))
        cases = [ratio for pool in pools for ratio in pool.case_ratios()]
        worst_case, case_ratio = max(cases, key=lambda found: found[1])
        self.checks = {
            "max_error": main.max,
            "rms_error": main.rms,
            "max_ratio": max(pool.cell.max / pool.base_max for pool in pools),
            "rms_ratio": max(pool.cell.rms / pool.base_rms for pool in pools),
            "case_ratio": case_ratio,
            "relative_l2": main.rms / main.rms_reference,
        }
        self.top1_agreement = main.top1_agreement(2 * pools[0].base_max)
        reasons = [reason for pool in pools for reason in pool.reasons(rms_limit)]
        if not case_ratio <= CASE_RATIO_LIMIT:
            reasons.append(
                f"the root-mean-square error is {case_ratio:.3g} × the baseline's (limit {CASE_RATIO_LIMIT:g} ×) "
                f"in {worst_case}"
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
        if self.dtype is torch.float32 and not self.only_fallbacks:  # else it is another model's
            judgment = replace(judgment, max_abs_error=errors.max)
        if self.is_run_dtype:
            judgment = replace(judgment, kl_mean=errors.kl_mean, top1_agreement=self.top1_agreement)
        return replace(judgment, reason=f"{name}: {self.reason}") if self.reason else judgment


@dataclass(frozen=True)
class _Pool:
    """Errors of a cell and of the baseline that are compared as one."""

    cell: Errors
    baseline: Errors
    rounding: float  # of a number in the dtype, relative

    @property
    def base_max(self) -> float:
        return max(self.baseline.max, self.rounding * self.cell.largest_reference)

    @property
    def base_rms(self) -> float:
        return max(self.baseline.rms, self.rounding * self.cell.rms_reference)

    def reasons(self, rms_limit: float) -> Iterator[str]:
        """In words, which of the two limits are passed."""
        for kind, error, base, limit in (
            ("maximum", self.cell.max, self.base_max, MAX_RATIO_LIMIT),
            ("root-mean-square", self.cell.rms, self.base_rms, rms_limit),
        ):
            if not error <= limit * base:
                yield (
                    f"the {kind} error {error:.2g} is {error / base:.3g} × the baseline's {base:.2g} "
                    f"(limit {limit:g} ×), worst in {self.cell.worst_case}"
                )

    def case_ratios(self) -> Iterator[tuple[str, float]]:
        """Each case by itself: its error as a multiple of the baseline's there or in all cases, whatever is larger."""
        for name, case in self.cell.by_case.items():
            yield name, case.rms / max(self.baseline.by_case[name].rms, self.base_rms)
