"""Gradients of RMSNorm, of a residual sum before it and of a rotation after it: Triton kernels.

Kept for them are a norm's input and its gain: a row's scale is cheap to compute again. The gain's gradient is summed in
float32, each program's rows by itself and then these sums, so always in one order (as in Liger-Kernel's, but by more
programs: theirs leaves most of a card idle).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen3bench.kernels import HAS_TRITON, multiprocessors

_NUMBERS = 2048  # of one program at once: three arrays of them, and what is computed of these, must stay in registers
_PROGRAMS = 4  # on each multiprocessor; each writes a sum of the gain's gradient
if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _places(row, middle, inner, outer_stride, middle_stride, inner_stride):  # type: ignore[no-untyped-def]
        """Where these rows of a tensor of three dimensions and the width begin."""
        outside = row // (middle * inner) * outer_stride + row // inner % middle * middle_stride
        return outside + row % inner * inner_stride

    @triton.jit(do_not_specialize=["rows", "middle", "inner"])  # else each remainder of them would be compiled anew
    def _norm_backward_kernel(  # type: ignore[no-untyped-def]
        x, x0, x1, x2, gradient, g0, g1, g2, more, m0, m1, m2, gain, of_x, of_gain, rows, middle, inner, width, eps,
        MORE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        column = tl.arange(0, BLOCK)
        within = column < width
        gains = tl.load(gain + column, mask=within, other=0.0).to(tl.float32)
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
            given = given * gains[None, :]
            along = tl.sum(given * normed, axis=1) / width
            found = (given - normed * along[:, None]) * scale[:, None]
            if MORE:
                at = _places(row, middle, inner, m0, m1, m2)[:, None] + column[None, :]
                found += tl.load(more + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(of_x + row[:, None] * width + column[None, :], found.to(of_x.dtype.element_ty), mask=inside)
        tl.store(of_gain + tl.program_id(0) * width + column, total, mask=within)

    @triton.jit(do_not_specialize=["rows", "length"])
    def _norm_rope_backward_kernel(  # type: ignore[no-untyped-def]
        x, x0, x1, x2, gradient, g0, g1, g2, gain, cos, sin, of_x, of_gain, rows, length, eps,
        HEADS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        column = tl.arange(0, BLOCK)
        within = column < HALF
        gains1 = tl.load(gain + column, mask=within, other=0.0).to(tl.float32)[None, :]
        gains2 = tl.load(gain + HALF + column, mask=within, other=0.0).to(tl.float32)[None, :]
        total1 = tl.zeros((BLOCK,), dtype=tl.float32)
        total2 = tl.zeros((BLOCK,), dtype=tl.float32)
        for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
            row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
            inside = (row[:, None] < rows) & within[None, :]
            position = tl.where(row < rows, row // HEADS % length, 0)
            angle = position[:, None] * (2 * HALF) + column[None, :]
            cosine = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
            sine = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
            at = _places(row, length, HEADS, x0, x1, x2)[:, None] + column[None, :]
            first = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
            second = tl.load(x + at + HALF, mask=inside, other=0.0).to(tl.float32)
            at = _places(row, length, HEADS, g0, g1, g2)[:, None] + column[None, :]
            turned1 = tl.load(gradient + at, mask=inside, other=0.0).to(tl.float32)
            turned2 = tl.load(gradient + at + HALF, mask=inside, other=0.0).to(tl.float32)
            given1 = turned1 * cosine + turned2 * sine  # turned back
            given2 = turned2 * cosine - turned1 * sine
            scale = tl.rsqrt(tl.sum(first * first + second * second, axis=1) / (2 * HALF) + eps)[:, None]
            first, second = first * scale, second * scale
            total1 += tl.sum(given1 * first, axis=0)
            total2 += tl.sum(given2 * second, axis=0)
            given1, given2 = given1 * gains1, given2 * gains2
            along = (tl.sum(given1 * first + given2 * second, axis=1) / (2 * HALF))[:, None]
            element = of_x.dtype.element_ty
            at = row[:, None] * (2 * HALF) + column[None, :]
            tl.store(of_x + at, ((given1 - first * along) * scale).to(element), mask=inside)
            tl.store(of_x + at + HALF, ((given2 - second * along) * scale).to(element), mask=inside)
        start = of_gain + tl.program_id(0) * 2 * HALF
        tl.store(start + column, total1, mask=within)
        tl.store(start + HALF + column, total2, mask=within)


def norm_backward(
    x: Tensor, gain: Tensor, eps: float, gradient: Tensor, more: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The gradients of x (…, dim) and of the gain (dim), from that of their RMSNorm (…, dim).

    `more` is added to that of x: the gradient of what else x goes into. One Triton kernel, and the sum of its sums.
    """
    width = x.shape[-1]
    rows = x.numel() // width
    of_x = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    block = triton.next_power_of_2(width)
    programs, rows_each = programs_of(rows, block, multiprocessors(x.device))
    sums = torch.empty(programs, width, device=x.device, dtype=torch.float32)
    x, x_strides = _rows(x)
    gradient, gradient_strides = _rows(gradient)
    added, added_strides = _rows(gradient if more is None else more)
    middle, inner = ([1, 1, 1, *x.shape[:-1]])[-2:]
    _norm_backward_kernel[(programs,)](
        x, *x_strides, gradient, *gradient_strides, added, *added_strides, gain, of_x, sums,
        rows, middle, inner, width, eps, MORE=more is not None, ROWS=rows_each, BLOCK=block,
    )  # fmt: skip
    return of_x, sums.sum(0).to(gain.dtype)


def norm_rope_backward(
    x: Tensor, gain: Tensor, eps: float, angles: tuple[Tensor, Tensor], gradient: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of heads x (b, t, heads, d) and of the gain (d), from that of what is normed and rotated, as x.

    `angles`: cosine and sine (t, d). One Triton kernel, and the sum of its sums.
    """
    batch, length, heads, dim = x.shape
    rows = batch * length * heads
    of_x = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    block = triton.next_power_of_2(dim // 2)
    programs, rows_each = programs_of(rows, 2 * block, multiprocessors(x.device))
    sums = torch.empty(programs, dim, device=x.device, dtype=torch.float32)
    x, x_strides = _rows(x)
    gradient, gradient_strides = _rows(gradient)
    cos, sin = (table.contiguous() for table in angles)
    _norm_rope_backward_kernel[(programs,)](
        x, *x_strides, gradient, *gradient_strides, gain, cos, sin, of_x, sums, rows, length, eps,
        HEADS=heads, HALF=dim // 2, ROWS=rows_each, BLOCK=block,
    )  # fmt: skip
    return of_x, sums.sum(0).to(gain.dtype)


def programs_of(rows: int, block: int, multiprocessors: int) -> tuple[int, int]:
    """How many programs, and how many rows of `block` numbers each takes at once."""
    rows_each = max(1, _NUMBERS // block)
    return min(-(-rows // rows_each), _PROGRAMS * multiprocessors), rows_each


def _rows(x: Tensor) -> tuple[Tensor, list[int]]:
    """The tensor and the strides of its three dimensions before the last; of a copy where a row is no row in memory."""
    if x.dim() > 4:
        x = x.contiguous().flatten(0, -2)
    elif x.stride(-1) != 1:
        x = x.contiguous()
    return x, ([0, 0, 0, *x.stride()[:-1]])[-3:]
