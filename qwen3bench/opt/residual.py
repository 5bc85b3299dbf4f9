"""`residual`: the residual sum and the norm after it in one kernel, over the end of a block into the next.

The idea of Liger-Kernel's and vLLM's fused sum and norm. The sum is not made where a block ends but where it is normed:
by the next block, or by the last norm.

Beyond the five: off until it is named. Beside it `norm` is left with the heads' norms and the first of the stream.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qwen3bench.kernels.add_norm import add_norm, takes_sum
from qwen3bench.kernels.rms_norm_backward import norm_backward
from qwen3bench.model.gradients import asked_for
from qwen3bench.model.layers import RMSNorm
from qwen3bench.model.parts import Parts


class PendingSum(NamedTuple):
    """The residual stream x + change, still to be summed; (b, t, e) each."""

    x: Tensor
    change: Tensor


class _AddNorm(torch.autograd.Function):
    """The sum and its norm in one kernel, their gradients in another. Kept are the sum and the gain."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total, normed = add_norm(x, change, gain, eps, in_place=False)
        ctx.save_for_backward(total, gain)
        ctx.options = eps, change.dtype
        ctx.set_materialize_grads(False)
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_total: Tensor | None, of_normed: Tensor | None) -> tuple[Tensor | None, ...]:
        total, gain = ctx.saved_tensors
        eps, dtype = ctx.options
        if of_normed is None:
            return of_total, None if of_total is None else of_total.to(dtype), None, None
        of_sum, of_gain = norm_backward(total, gain, eps, of_normed, of_total)
        return of_sum, of_sum.to(dtype), of_gain, None


def takes_training_sum(x: Tensor, change: Tensor) -> bool:
    """Whether the kernels can be given these: as `takes_sum`, or a wider x, as autocast leaves the stream."""
    return takes_sum(x, change) or (takes_sum(x, x) and x.dtype is torch.float32 and change.is_floating_point())


@dataclass(frozen=True)
class FusedResidual:
    """See `parts.Residual`. The sum is written over x, its norm over the change, so that nothing is allocated.

    Where gradients are asked for, both are new.
    """

    def add(self, x: Tensor, change: Tensor) -> PendingSum:
        return PendingSum(x, change)

    def norm(self, stream: Tensor | PendingSum, norm: nn.Module) -> tuple[Tensor, Tensor]:
        """One Triton kernel on CUDA, and one for the gradients of both, where they are asked for.

        Separate operations elsewhere, beside another norm than RMSNorm, and under torch.compile, which fuses them
        itself.
        """
        if isinstance(stream, Tensor):  # what the first block is given
            return stream, norm(stream)
        x, change = stream
        if not torch.compiler.is_compiling() and isinstance(norm, RMSNorm):
            if asked_for(x, change, norm.weight):
                if takes_training_sum(x, change):
                    total, normed = _AddNorm.apply(x, change, norm.weight, norm.eps)
                    return total, normed
            elif takes_sum(x, change):
                return add_norm(x, change, norm.weight, norm.eps, in_place=True)
        x = x + change
        return x, norm(x)

    def last(self, stream: Tensor | PendingSum, positions: int) -> Tensor | PendingSum:
        if isinstance(stream, Tensor):
            return stream[:, -positions:]
        return PendingSum(stream.x[:, -positions:], stream.change[:, -positions:])


def apply(parts: Parts) -> Parts:
    """The parts with the residual sum and the norm after it as one."""
    return replace(parts, residual=FusedResidual())
