"""`residual`: the residual sum and the norm after it in one kernel, over the end of a block into the next.

The idea of Liger-Kernel's and vLLM's fused sum and norm. The sum is not made where a block ends but where it is normed:
by the next block, or by the last norm.

Beyond the five: off until it is named. Beside it `norm` is left with the heads' norms and the first of the stream.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qwen3bench.kernels.add_norm import add_norm, takes_sum
from qwen3bench.model.gradients import asked_for
from qwen3bench.model.layers import RMSNorm
from qwen3bench.model.parts import Parts


class PendingSum(NamedTuple):
    """The residual stream x + change, still to be summed; (b, t, e) each."""

    x: Tensor
    change: Tensor


@dataclass(frozen=True)
class FusedResidual:
    """See `parts.Residual`. The sum is written over x, its norm over the change, so that nothing is allocated."""

    def add(self, x: Tensor, change: Tensor) -> PendingSum:
        return PendingSum(x, change)

    def norm(self, stream: Tensor | PendingSum, norm: nn.Module) -> tuple[Tensor, Tensor]:
        """One Triton kernel on CUDA.

        Separate operations elsewhere, beside another norm than RMSNorm, where a gradient is asked for, and under
        torch.compile, which fuses them itself.
        """
        if isinstance(stream, Tensor):  # what the first block is given
            return stream, norm(stream)
        x, change = stream
        takes = takes_sum(x, change) and not torch.compiler.is_compiling()
        if takes and isinstance(norm, RMSNorm) and not asked_for(x, change, norm.weight):
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
