"""`norm`: each RMSNorm in one kernel, the query and key norms too.

The idea of Liger-Kernel's RMSNorm (arXiv:2410.10989). PyTorch's own fused kernel gives each row a thread block, which
leaves most threads idle on the 128 numbers of a head; this one takes several short rows at a time.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qwen3bench.kernels import HAS_TRITON, multiprocessors
from qwen3bench.kernels.rms_norm_backward import norm_backward
from qwen3bench.model.gradients import asked_for
from qwen3bench.model.layers import RMSNorm
from qwen3bench.model.parts import Parts

_NUMBERS = 4096  # of one program: enough loads in flight to fill the memory's bandwidth
if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["rows"])  # else each remainder of it would be compiled anew
    def _rms_norm_kernel(x, weight, out, rows, width, heads, stride, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        column = tl.arange(0, BLOCK)
        inside = (row[:, None] < rows) & (column[None, :] < width)
        start = row // heads * stride + row % heads * width  # the heads of one token lie together
        values = tl.load(x + start[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
        gain = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(values * values, axis=1) / width + eps)
        normed = values * scale[:, None] * gain[None, :]
        tl.store(out + row[:, None] * width + column[None, :], normed.to(out.dtype.element_ty), mask=inside)


class _RMSNorm(torch.autograd.Function):
    """The norm in one Triton kernel with a backward in another."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _forward(x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        return *norm_backward(x, weight, ctx.eps, gradient), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) · weight over the last dimension, (…, dim) to (…, dim), computed in float32.

    One Triton kernel on CUDA, another for its gradients; `torch.nn.functional.rms_norm` elsewhere and under
    torch.compile, which fuses it itself. On a CPU PyTorch makes that of elementary operations.
    """
    if not (HAS_TRITON and x.is_cuda) or torch.compiler.is_compiling() or x.dtype is torch.float64:
        return F.rms_norm(x, weight.shape, weight, eps)
    if asked_for(x, weight):
        normed: Tensor = _RMSNorm.apply(x, weight, eps)
        return normed
    return _forward(x, weight, eps)


def _forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    heads, stride = _layout(x)
    if stride is None:
        x = x.contiguous()
        heads, stride = 1, x.shape[-1]
    out = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    width = x.shape[-1]
    rows = x.numel() // width
    block = triton.next_power_of_2(width)
    fill = multiprocessors(x.device)  # with fewer rows than would fill the card, each program takes fewer
    rows_each = max(1, min(_NUMBERS // block, triton.next_power_of_2(triton.cdiv(rows, fill))))
    _rms_norm_kernel[(triton.cdiv(rows, rows_each),)](
        x, weight, out, rows, width, heads, stride, eps, ROWS=rows_each, BLOCK=block
    )
    return out


def _layout(x: Tensor) -> tuple[int, int | None]:
    """Rows that lie together, and the distance from such a group to the next: of a slice of a wider product, too.

    None as distance where the groups do not lie at equal distances, so that a copy is needed.
    """
    if x.dim() < 3 or x.is_contiguous():
        return 1, x.shape[-1] if x.is_contiguous() else None
    *outer, heads, width = range(x.dim())
    together = x.stride(width) == 1 and x.stride(heads) == x.shape[width]
    even = all(x.stride(i) == x.stride(i + 1) * x.shape[i + 1] for i in outer[:-1])
    return x.shape[heads], x.stride(outer[-1]) if together and even else None


class FusedRMSNorm(RMSNorm):
    """RMSNorm as one call; input and output (…, dim)."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def apply(parts: Parts) -> Parts:
    """The parts with fused norms."""
    return replace(parts, norm=FusedRMSNorm)
