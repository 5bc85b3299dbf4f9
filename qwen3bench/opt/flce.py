"""`flce`: head and cross-entropy in chunks of tokens, so that the logits of a batch are never in memory together.

The idea of Liger-Kernel's fused linear cross-entropy (arXiv:2410.10989), with the chunk as an option: it adds each
chunk to the head's gradient, and theirs cuts 8,192 tokens of this vocabulary into 128. For training alone. A chunk's
gradients are computed beside its loss, so nothing is computed twice, and summed in float32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qwen3bench.errors import UserError
from qwen3bench.kernels.cross_entropy import cross_entropy_
from qwen3bench.model.loss import IGNORED
from qwen3bench.model.parts import Parts


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The mean cross-entropy of states (n, e), a head (vocabulary, e) and targets (n), with the gradients of both."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        kind = states.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
        wide = torch.promote_types(dtype, torch.float32)
        scale = 1 / (targets != IGNORED).sum().to(wide)
        head = weight.to(dtype)
        of_states = torch.empty_like(states)
        of_weight = torch.zeros(weight.shape, device=weight.device, dtype=wide)
        total = torch.zeros((), device=states.device, dtype=wide)
        with torch.autocast(kind, enabled=False):
            chunks = zip(states.split(chunk), targets.split(chunk), of_states.split(chunk), strict=True)
            for rows, wanted, found in chunks:
                rows = rows.to(dtype)
                logits = rows @ head.T
                total += cross_entropy_(logits, wanted, scale, IGNORED).sum()
                found.copy_(logits @ head)
                _add_product(of_weight, logits.T, rows)
        ctx.save_for_backward(of_states, of_weight.to(weight.dtype))
        return total * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        of_states, of_weight = ctx.saved_tensors
        return of_states * gradient, of_weight * gradient, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a · b to `total`, whatever their dtype, in that of `total`."""
    if a.dtype is total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


@dataclass(frozen=True)
class ChunkedCrossEntropy:
    """The loss in chunks of `at_once` tokens."""

    at_once: int | None
    compiles: bool = False  # it is products and a kernel of its own

    def __call__(self, head: nn.Linear, states: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = _ChunkedCrossEntropy.apply(states.flatten(0, 1), head.weight, targets.flatten(), self.at_once)
        return loss


def apply(parts: Parts, chunk_tokens: int = 2048) -> Parts:
    """The parts with head and cross-entropy in chunks of so many tokens."""
    if type(chunk_tokens) is not int or chunk_tokens < 1:
        raise UserError(f"flce.chunk_tokens={chunk_tokens!r} must be a whole number from 1 on")
    return replace(parts, loss=ChunkedCrossEntropy(chunk_tokens))
