"""How far logits are from a reference, case by case and pooled."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class WrongLogitsError(Exception):
    """Logits that cannot be compared."""


@dataclass(frozen=True)
class CaseErrors:
    """How far the logits of one case are from the reference; of tokens (b, t), over the vocabulary v."""

    max: float
    sum_squares: float
    count: int
    kl: Tensor  # (b, t) of the reference from the cell, in nats
    same_top1: Tensor  # (b, t)
    margin: Tensor  # (b, t) of the reference: its largest logit above the second
    largest_reference: float
    sum_squares_reference: float


@torch.inference_mode()
def case_errors(logits: Tensor, reference: Tensor) -> CaseErrors:
    """The errors of logits (b, t, v) against the reference (b, t, v) in float64.

    Raises WrongLogitsError where they hold NaN or infinity, or have another shape.
    """
    if logits.shape != reference.shape:
        raise WrongLogitsError(f"logits have the shape {tuple(logits.shape)}, not {tuple(reference.shape)}")
    if not torch.isfinite(logits).all():
        raise WrongLogitsError("logits hold NaN or infinity")
    wide = logits.double()
    error = wide - reference
    top = reference.topk(2, dim=-1)
    expected = reference.log_softmax(dim=-1)
    return CaseErrors(
        max=error.abs().max().item(),
        sum_squares=error.square().sum().item(),
        count=error.numel(),
        kl=(expected.exp() * (expected - wide.log_softmax(dim=-1))).sum(dim=-1).cpu(),
        same_top1=(wide.argmax(dim=-1) == top.indices[..., 0]).cpu(),
        margin=(top.values[..., 0] - top.values[..., 1]).cpu(),
        largest_reference=reference.abs().max().item(),
        sum_squares_reference=reference.square().sum().item(),
    )


@dataclass(frozen=True)
class Errors:
    """The errors of one model, by case, and pooled over all of them."""

    by_case: Mapping[str, CaseErrors]
    fallbacks: int = 0  # cases whose errors are another model's

    def only(self, names: Sequence[str]) -> Errors:
        """The errors of these cases alone."""
        return Errors({name: self.by_case[name] for name in names})

    @property
    def max(self) -> float:
        return max(case.max for case in self.by_case.values())

    @property
    def rms(self) -> float:
        return math.sqrt(self._sum("sum_squares") / self._sum("count"))

    @property
    def rms_reference(self) -> float:
        return math.sqrt(self._sum("sum_squares_reference") / self._sum("count"))

    @property
    def largest_reference(self) -> float:
        return max(case.largest_reference for case in self.by_case.values())

    @property
    def kl_mean(self) -> float:
        return self._all("kl").mean().item()

    @property
    def worst_case(self) -> str:
        return max(self.by_case, key=lambda name: self.by_case[name].max)

    def top1_agreement(self, margin: float) -> float | None:
        """Share of the positions with a reference margin above `margin` that have the same top token."""
        clear = self._all("margin") > margin
        return self._all("same_top1")[clear].double().mean().item() if clear.any() else None

    def _sum(self, field: str) -> float:
        return sum(getattr(case, field) for case in self.by_case.values())

    def _all(self, field: str) -> Tensor:
        return torch.cat([getattr(case, field).flatten() for case in self.by_case.values()])
