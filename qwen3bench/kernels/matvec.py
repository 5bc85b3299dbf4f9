"""Products of a matrix and a single token's vector, for decoding: Triton kernels that `mlp` and `gemv` share.

Reading the weight is all the work, so each program loads its rows of it at once. With `dependent` (CUDA's programmatic
dependent launch, from compute capability 9.0 on) a kernel loads them while the one before it still runs. Weights must
not be written by that one: in a model it is a norm, or one of these.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qwen3bench.kernels import HAS_TRITON

_NUMBERS = 8192  # of the weights that a program loads at once: 16 KiB in flight in bfloat16
_NUMBERS_A_WARP = 2048
if HAS_TRITON:
    import triton
    import triton.language as tl

    # What a kernel before this one may have written is read past the first-level cache (.cg): a program that was
    # launched early can lie on a multiprocessor that still holds what was there before.

    @triton.jit
    def wait_for_kernel_before(DEPENDENT: tl.constexpr):  # type: ignore[no-untyped-def]
        if DEPENDENT:
            tl.extra.cuda.gdc_wait()

    @triton.jit
    def let_next_kernel_start(DEPENDENT: tl.constexpr):  # type: ignore[no-untyped-def]
        if DEPENDENT:
            tl.extra.cuda.gdc_launch_dependents()

    @triton.jit
    def weight_tile(weight, row, DIM: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        column = tl.arange(0, BLOCK)
        start = weight + row[:, None].to(tl.int64) * DIM
        return tl.load(start + column[None, :], mask=(column < DIM)[None, :], other=0.0)

    @triton.jit
    def inverse_rms(mean_square, eps):  # type: ignore[no-untyped-def]
        return tl.rsqrt(mean_square + eps)

    @triton.jit
    def activations(x, gain, eps, DIM: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        """The vector, its RMSNorm where there is a gain."""
        column = tl.arange(0, BLOCK)
        values = tl.load(x + column, mask=column < DIM, other=0.0, cache_modifier=".cg").to(tl.float32)
        if gain is not None:
            gains = tl.load(gain + column, mask=column < DIM, other=0.0).to(tl.float32)
            values = values * inverse_rms(tl.sum(values * values) / DIM, eps) * gains
        return values

    @triton.jit
    def _swiglu_kernel(  # type: ignore[no-untyped-def]
        x, gain, gate_weight, up_weight, out, eps,
        DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, DEPENDENT: tl.constexpr,
    ):  # fmt: skip
        let_next_kernel_start(DEPENDENT)
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        gate_tile = weight_tile(gate_weight, row, DIM, BLOCK)
        up_tile = weight_tile(up_weight, row, DIM, BLOCK)
        wait_for_kernel_before(DEPENDENT)
        values = activations(x, gain, eps, DIM, BLOCK)
        gate = tl.sum(gate_tile.to(tl.float32) * values[None, :], axis=1)
        up = tl.sum(up_tile.to(tl.float32) * values[None, :], axis=1)
        tl.store(out + row, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty))

    @triton.jit
    def _product_kernel(  # type: ignore[no-untyped-def]
        x, weight, residual, out,
        DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, IN_CHAIN: tl.constexpr, DEPENDENT: tl.constexpr,
    ):  # fmt: skip
        let_next_kernel_start(DEPENDENT and IN_CHAIN)
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        tile = weight_tile(weight, row, DIM, BLOCK)
        wait_for_kernel_before(DEPENDENT)
        let_next_kernel_start(DEPENDENT and not IN_CHAIN)
        product = tl.sum(tile.to(tl.float32) * activations(x, None, 0.0, DIM, BLOCK)[None, :], axis=1)
        if residual is not None:
            product += tl.load(residual + row, cache_modifier=".cg").to(tl.float32)
        tl.store(out + row, product.to(out.dtype.element_ty))


def takes_token(x: Tensor) -> bool:
    """Whether these kernels can be given x (…, dim): a single token, on CUDA, and Triton is there."""
    return HAS_TRITON and x.is_cuda and x.numel() == x.shape[-1] and x.dtype is not torch.float64


def dependent_launch_on(device: torch.device) -> bool:
    """Whether the device can launch a kernel before the one ahead of it has ended."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


def swiglu(
    x: Tensor, gate: Tensor, up: Tensor, dependent: bool, norm: Tensor | None = None, eps: float = 0.0
) -> Tensor:
    """SiLU(gate x) · up x of a single token x (…, dim), in float32: to (…, width). One kernel.

    `gate` and `up` (width, dim). With `norm` (dim), of x after the RMSNorm with this gain.
    """
    width, dim = gate.shape
    out = x.new_empty((*x.shape[:-1], width))
    block, rows = tile(dim, width, 2)
    _swiglu_kernel[(width // rows,)](
        x.contiguous(), norm, gate, up, out, eps, DIM=dim, BLOCK=block, ROWS=rows, **launch(2 * block * rows, dependent)
    )
    return out


def product(
    x: Tensor, weight: Tensor, dependent: bool, residual: Tensor | None = None, in_chain: bool = False
) -> Tensor:
    """weight x of a single token x (…, dim), plus the residual where there is one, in float32. One kernel.

    `weight` (width, dim); the result is shaped like `residual`, or (…, width). `in_chain`: the next kernel is
    none of the compiler's, and may start at once. Those read what came two kernels earlier without waiting again, so
    they may start when this one's input is complete.
    """
    width, dim = weight.shape
    out = x.new_empty((*x.shape[:-1], width)) if residual is None else torch.empty_like(residual)
    block, rows = tile(dim, width)
    _product_kernel[(width // rows,)](
        x.contiguous(), weight, residual, out,
        DIM=dim, BLOCK=block, ROWS=rows, IN_CHAIN=in_chain, **launch(block * rows, dependent),
    )  # fmt: skip
    return out


def launch(numbers: int, dependent: bool) -> dict[str, Any]:
    """How a program that loads that many numbers is launched."""
    return {"num_warps": max(2, min(8, numbers // _NUMBERS_A_WARP)), **early(dependent)}


def early(dependent: bool) -> dict[str, Any]:
    """What launches a kernel before the one ahead of it has ended; `launch_pdl` is no option of every device's."""
    return {"DEPENDENT": dependent, **({"launch_pdl": True} if dependent else {})}


def tile(dim: int, rows: int, weights: int = 1) -> tuple[int, int]:
    """Columns, a power of two that covers `dim`, and rows, a divisor of `rows`, of a program's tile of each weight."""
    block = triton.next_power_of_2(dim)
    return block, min(rows & -rows, max(1, _NUMBERS // weights // block))
