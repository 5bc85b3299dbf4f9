"""How far logits are from a reference, case by case and pooled."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class WrongLogitsError(Exception):
    """Logits that cannot be compared."""


@dataclass(frozen=True)
class ExpectedLogits:
    """The reference's logits (b, positions, v) in float64: at some positions, of every `step`-th token."""

    positions: tuple[int, ...]
    step: int
    logits: Tensor
    log_probabilities: Tensor
    top1: Tensor  # (b, positions)
    margin: Tensor  # (b, positions): the largest logit above the second

    def between(self, sequences: slice, start: int, end: int) -> ExpectedLogits | None:
        """Those of some sequences from position `start` to before `end`; None where there are none."""
        chosen = [i for i, position in enumerate(self.positions) if start <= position < end]
        if not chosen:
            return None
        rows = (sequences, slice(chosen[0], chosen[-1] + 1))
        found = (each[rows] for each in (self.logits, self.log_probabilities, self.top1, self.margin))
        return ExpectedLogits(tuple(self.positions[i] for i in chosen), self.step, *found)


@torch.inference_mode()
def expected_logits(logits: Tensor, positions: Iterable[int] | None = None, step: int = 1) -> ExpectedLogits:
    """The reference (b, positions, v) in float64, by default at the first positions, with what is asked of it often."""
    top = logits.topk(2, dim=-1)
    margin = top.values[..., 0] - top.values[..., 1]
    found = tuple(range(logits.shape[1]) if positions is None else positions)
    return ExpectedLogits(found, step, logits, logits.log_softmax(dim=-1), top.indices[..., 0], margin)


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

    @property
    def relative(self) -> float:
        """The error as a share of the reference (L2)."""
        return math.sqrt(self.sum_squares / self.sum_squares_reference)

    @property
    def rms(self) -> float:
        return math.sqrt(self.sum_squares / self.count)


def check_logits(logits: Tensor, shape: tuple[int, ...]) -> None:
    """Raise WrongLogitsError where they hold NaN or infinity, or have another shape."""
    if logits.shape != shape:
        raise WrongLogitsError(f"logits have the shape {tuple(logits.shape)}, not {shape}")
    low, high = torch.stack(logits.aminmax()).tolist()  # unlike isfinite, allocates nothing; NaN carries through
    if not (math.isfinite(low) and math.isfinite(high)):
        raise WrongLogitsError("logits hold NaN or infinity")


@torch.inference_mode()
def case_errors(logits: Tensor, expected: ExpectedLogits) -> CaseErrors:
    """The errors of logits (b, t, v), at the positions and of the tokens that are expected."""
    wide, reference = logits.double(), expected.logits
    error = wide - reference
    numbers = (error.abs().max(), error.square().sum(), reference.abs().max(), reference.square().sum())
    largest, squares, largest_reference, squares_reference = torch.stack(numbers).tolist()
    log_probabilities = expected.log_probabilities
    return CaseErrors(
        max=largest,
        sum_squares=squares,
        count=error.numel(),
        kl=(log_probabilities.exp() * (log_probabilities - wide.log_softmax(dim=-1))).sum(dim=-1),
        same_top1=wide.argmax(dim=-1) == expected.top1,
        margin=expected.margin,
        largest_reference=largest_reference,
        sum_squares_reference=squares_reference,
    )


def joined_errors(errors: Sequence[CaseErrors]) -> CaseErrors:
    """The errors of several calls as those of one."""
    if len(errors) == 1:
        return errors[0]
    return CaseErrors(
        max=max(each.max for each in errors),
        sum_squares=sum(each.sum_squares for each in errors),
        count=sum(each.count for each in errors),
        kl=torch.cat([each.kl.flatten() for each in errors]),
        same_top1=torch.cat([each.same_top1.flatten() for each in errors]),
        margin=torch.cat([each.margin.flatten() for each in errors]),
        largest_reference=max(each.largest_reference for each in errors),
        sum_squares_reference=sum(each.sum_squares_reference for each in errors),
    )


@dataclass(frozen=True)
class Errors:
    """The errors of one model, by case, and pooled over all of them."""

    by_case: Mapping[str, CaseErrors]
    fallbacks: int = 0  # cases whose errors are another model's

    def only(self, names: Iterable[str]) -> Errors:
        """The errors of these cases alone, of those that there are."""
        return Errors({name: self.by_case[name] for name in names if name in self.by_case}, self.fallbacks)

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


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` of torch.float32."""
    return str(dtype).removeprefix("torch.")
