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
from qwen3bench.model.gradients import asked_for
from qwen3bench.model.layers import RMSNorm
from qwen3bench.model.parts import Parts

_NUMBERS = 4096  # of one program: enough loads in flight to fill the memory's bandwidth
_NUMBERS_BACKWARD = 2048  # three arrays of them, and what is computed of these, must stay in registers
_PROGRAMS_BACKWARD = 4  # on each multiprocessor; each writes a sum of the gain's gradient
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

    @triton.jit
    def _places(row, middle, inner, outer_stride, middle_stride, inner_stride):  # type: ignore[no-untyped-def]
        """Where these rows of a tensor of three dimensions and the width begin."""
        outside = row // (middle * inner) * outer_stride + row // inner % middle * middle_stride
        return outside + row % inner * inner_stride

    @triton.jit(do_not_specialize=["rows", "middle", "inner"])
    def _rms_norm_backward_kernel(  # type: ignore[no-untyped-def]
        x, x0, x1, x2, gradient, g0, g1, g2, weight, of_x, of_weight, rows, middle, inner, width, eps,
        ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        column = tl.arange(0, BLOCK)
        within = column < width
        gain = tl.load(weight + column, mask=within, other=0.0).to(tl.float32)
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
            row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
            inside = (row[:, None] < rows) & within[None, :]
            at = _places(row, middle, inner, x0, x1, x2)[:, None] + column[None, :]
            values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
            at = _places(row, middle, inner, g0, g1, g2)[:, None] + column[None, :]
            given = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
            scale = tl.rsqrt(tl.sum(values * values, axis=1) / width + eps)
            normed = values * scale[:, None]
            total += tl.sum(given * normed, axis=0)
            given = given * gain[None, :]
            along = tl.sum(given * normed, axis=1) / width
            found = (given - normed * along[:, None]) * scale[:, None]
            tl.store(of_x + row[:, None] * width + column[None, :], found.to(of_x.dtype.element_ty), mask=inside)
        tl.store(of_weight + tl.program_id(0) * width + column, total, mask=within)


class _RMSNorm(torch.autograd.Function):
    """The norm in one Triton kernel with a backward in another. Kept are x and the gain: a row's scale is cheap.

    The gain's gradient is summed in float32, each program's rows by itself and then these sums: always in one order.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _forward(x, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        return *_backward(x, weight, ctx.eps, gradient), None


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


def _backward(x: Tensor, weight: Tensor, eps: float, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the gain."""
    width = x.shape[-1]
    rows = x.numel() // width
    block = triton.next_power_of_2(width)
    rows_each = max(1, _NUMBERS_BACKWARD // block)
    programs = min(triton.cdiv(rows, rows_each), _PROGRAMS_BACKWARD * multiprocessors(x.device))
    of_x = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    x, x_strides = _rows(x)
    gradient, gradient_strides = _rows(gradient)
    of_weight = torch.empty(programs, width, device=x.device, dtype=torch.float32)
    middle, inner = ([1, 1, 1, *x.shape[:-1]])[-2:]
    _rms_norm_backward_kernel[(programs,)](
        x, *x_strides, gradient, *gradient_strides, weight, of_x, of_weight, rows, middle, inner, width, eps,
        ROWS=rows_each, BLOCK=block,
    )  # fmt: skip
    return of_x, of_weight.sum(0).to(weight.dtype)


def _rows(x: Tensor) -> tuple[Tensor, list[int]]:
    """The tensor and the strides of its three dimensions before the last; of a copy where a row is no row in memory."""
    if x.dim() > 4:
        x = x.contiguous().flatten(0, -2)
    elif x.stride(-1) != 1:
        x = x.contiguous()
    return x, ([0, 0, 0, *x.stride()[:-1]])[-3:]


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
