"""The residual sum and the RMSNorm after it: the Triton kernel of `residual`."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from qwen3bench.kernels import HAS_TRITON, matvec, multiprocessors

_NUMBERS = 4096  # of one program
_NUMBERS_A_WARP = 512
if HAS_TRITON:
    import triton
    import triton.language as tl

    from qwen3bench.kernels.matvec import inverse_rms, let_next_kernel_start, wait_for_kernel_before

    @triton.jit(do_not_specialize=["rows"])  # else each remainder of it would be compiled anew
    def _add_norm_kernel(  # type: ignore[no-untyped-def]
        x, change, gain, total, out, rows, width, x_row, change_row, total_row, out_row, eps,
        ROWS: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
    ):  # fmt: skip
        row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
        column = tl.arange(0, BLOCK)[None, :]
        inside = (row < rows) & (column < width)
        gains = tl.load(gain + column, mask=column < width, other=0.0).to(tl.float32)
        wait_for_kernel_before(DEPENDENT)
        let_next_kernel_start(DEPENDENT)
        before = tl.load(x + row * x_row + column, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
        added = tl.load(change + row * change_row + column, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
        after = (before + added).to(total.dtype.element_ty)
        tl.store(total + row * total_row + column, after, mask=inside)
        values = after.to(tl.float32)
        scale = inverse_rms(tl.sum(values * values, axis=1) / width, eps)[:, None]
        tl.store(out + row * out_row + column, (values * scale * gains).to(out.dtype.element_ty), mask=inside)


def takes_sum(x: Tensor, change: Tensor) -> bool:
    """Whether `add_norm` can be given these: on CUDA, with Triton, of one dtype that is not float64."""
    return HAS_TRITON and x.is_cuda and x.dtype is change.dtype is not torch.float64


def add_norm(x: Tensor, change: Tensor, gain: Tensor, eps: float, in_place: bool) -> tuple[Tensor, Tensor]:
    """x + change, rounded to its dtype, and the RMSNorm of that, computed in float32; (…, dim) each. One kernel.

    `in_place`: the sum may be written over x, the norm over the change. They are where both are contiguous: the norm
    always is, as a product of a few rows far apart takes cuBLAS seven times as long.
    """
    x, change = _with_even_rows(x), _with_even_rows(change)
    if in_place and x.is_contiguous() and change.is_contiguous():
        total, out = x, change
    else:
        total, out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    width = x.shape[-1]
    rows = x.numel() // width
    block = triton.next_power_of_2(width)
    rows_each = max(1, _NUMBERS // block)
    while rows_each > 1 and triton.cdiv(rows, rows_each) < multiprocessors(x.device):
        rows_each //= 2
    _add_norm_kernel[(triton.cdiv(rows, rows_each),)](
        x, change, gain, total, out, rows, width, _row(x), _row(change), _row(total), _row(out), eps,
        ROWS=rows_each, BLOCK=block, num_warps=max(1, min(16, rows_each * block // _NUMBERS_A_WARP)),
        **matvec.early(matvec.dependent_launch_on(x.device)),
    )  # fmt: skip
    return total, out


def _row(x: Tensor) -> int:
    """The distance from a row of x (…, dim) to the next."""
    *outer, width = x.shape
    return next((x.stride(i) for i in reversed(range(len(outer))) if outer[i] > 1), width)


def _with_even_rows(x: Tensor) -> Tensor:
    """The tensor (…, dim), copied unless its rows lie at even distances."""
    outer = [i for i in range(x.dim() - 1) if x.shape[i] > 1]
    even = all(x.stride(i) == x.stride(j) * x.shape[j] for i, j in pairwise(outer))
    return x if x.stride(-1) == 1 and even else x.contiguous()
