"""SwiGLU of many tokens: Triton kernels of `mlp`.

The two halves of a gate-up product lie strided in memory, so chunk-then-multiply loses what the single product wins;
`silu_mul` reads both halves of a row where they lie. `swiglu_tiles` never writes the product: one kernel computes the
same tile of gate and up and writes SwiGLU of it, the matrix product of Triton's tutorials with what CUTLASS calls an
epilogue. The tiles were chosen on an H100.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qwen3bench.kernels import HAS_TRITON

_DEPTH = 64  # of the inner dimension, what is loaded at once
_SHARED_MEMORY = 160 << 10  # bytes that the largest tile takes
FULL_WAVE = 0.9  # of the last wave


class Tile(NamedTuple):
    """What one program of `swiglu_tiles` computes: so many rows and columns of the result."""

    rows: int
    columns: int
    warps: int
    stages: int  # loads under way
    on_multiprocessor: int  # programs side by side, as shared memory allows on an H100

    def needed(self, rows: int, columns: int) -> int:
        """How many of them a result of this size needs."""
        return -(-rows // self.rows) * -(-columns // self.columns)


TILES = (Tile(128, 128, 8, 3, 1), Tile(64, 64, 4, 3, 3), Tile(64, 32, 4, 4, 3))  # the largest first
# In the largest one's place where a sum is short: a program computes while the one beside it begins or ends.
SIDE_BY_SIDE = Tile(128, 64, 4, 3, 2)
_SHORT = 1024  # numbers of a row, the width of 0.6b; with longer ones it was not measured
if HAS_TRITON:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    @triton.jit
    def _silu_mul_kernel(gate_up, out, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        gate = tl.load(gate_up + row * 2 * width + column, mask=inside).to(tl.float32)
        up = tl.load(gate_up + row * 2 * width + width + column, mask=inside).to(tl.float32)
        product = gate * tl.sigmoid(gate) * up
        tl.store(out + row * width + column, product.to(out.dtype.element_ty), mask=inside)

    @triton.jit
    def _silu_mul_backward_kernel(gate_up, gradient, out, product, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        gate = tl.load(gate_up + row * 2 * width + column, mask=inside).to(tl.float32)
        up = tl.load(gate_up + row * 2 * width + width + column, mask=inside).to(tl.float32)
        given = tl.load(gradient + row * width + column, mask=inside).to(tl.float32)
        share = tl.sigmoid(gate)
        silu = gate * share
        of_gate = given * up * share * (1 + gate * (1 - share))
        element = out.dtype.element_ty
        tl.store(out + row * 2 * width + column, of_gate.to(element), mask=inside)
        tl.store(out + row * 2 * width + width + column, (given * silu).to(element), mask=inside)
        tl.store(product + row * width + column, (silu * up).to(element), mask=inside)

    @triton.jit
    def _swiglu_tile_kernel(  # type: ignore[no-untyped-def]
        x, gate_up_weight, out, rows, width, dim, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr
    ):
        row_tiles = tl.cdiv(rows, ROWS)
        group = 8 * tl.cdiv(width, COLUMNS)  # eight tiles above each other, column by column: operands stay in cache
        tile = tl.program_id(0)
        top = tile // group * 8
        height = min(row_tiles - top, 8)
        row = (top + tile % group % height) * ROWS
        column = tile % group // height * COLUMNS
        gate = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        up = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for depth in range(0, dim, DEPTH):
            values = x.load([row, depth])
            gate = tl.dot(values, gate_up_weight.load([column, depth]).T, gate)
            up = tl.dot(values, gate_up_weight.load([width + column, depth]).T, up)
        rows_here = row + tl.arange(0, ROWS)[:, None]
        columns_here = column + tl.arange(0, COLUMNS)[None, :]
        product = gate * tl.sigmoid(gate) * up
        inside = (rows_here < rows) & (columns_here < width)
        tl.store(out + rows_here.to(tl.int64) * width + columns_here, product.to(out.dtype.element_ty), mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """SiLU of the first half times the second half: (…, 2·width) to (…, width), computed in float32.

    One Triton kernel on CUDA; plain operations elsewhere.
    """
    if not (HAS_TRITON and gate_up.is_cuda) or gate_up.dtype is torch.float64:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
    gate_up = gate_up.contiguous()
    width = gate_up.shape[-1] // 2
    out = gate_up.new_empty((*gate_up.shape[:-1], width))
    block = min(1024, triton.next_power_of_2(width))
    _silu_mul_kernel[(out.numel() // width, triton.cdiv(width, block))](gate_up, out, width, BLOCK=block)
    return out


def silu_mul_backward(gate_up: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of `silu_mul`'s input (…, 2·width) from that of its result (…, width); and the result once more.

    One Triton kernel on CUDA; plain operations elsewhere. Computed in float32.
    """
    if not (HAS_TRITON and gate_up.is_cuda) or gate_up.dtype is torch.float64:
        gate, up = gate_up.chunk(2, dim=-1)
        share = torch.sigmoid(gate)
        silu = gate * share
        of_gate = gradient * up * share * (1 + gate * (1 - share))
        return torch.cat((of_gate, gradient * silu), dim=-1), silu * up
    gate_up, gradient = gate_up.contiguous(), gradient.contiguous()
    width = gate_up.shape[-1] // 2
    out, product = torch.empty_like(gate_up), torch.empty_like(gradient)
    block = min(1024, triton.next_power_of_2(width))
    grid = (product.numel() // width, triton.cdiv(width, block))
    _silu_mul_backward_kernel[grid](gate_up, gradient, out, product, width, BLOCK=block)
    return out, product


class SwiGLUDown(torch.autograd.Function):
    """down (SiLU(gate) · up) of gate_up (…, 2·width) and down (dim, width), to (…, dim), with a gradient.

    Kept for backward are gate_up and nothing else: the product that the down projection reads is computed again beside
    the gradients (Liger-Kernel computes SiLU again likewise, but in place, which forbids recomputation and capture).
    """

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, down: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up, down)
        return F.linear(silu_mul(gate_up), down)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate_up, down = ctx.saved_tensors
        gradient = gradient.to(gate_up.dtype)
        of_gate_up, product = silu_mul_backward(gate_up, gradient @ down.to(gate_up.dtype))
        of_down = gradient.flatten(0, -2).T @ product.flatten(0, -2)
        return of_gate_up, of_down.to(down.dtype)


def swiglu_tiles(x: Tensor, gate_up_weight: Tensor, tile: Tile) -> Tensor:
    """SiLU(gate x) · up x of x (…, dim), in float32 until the end: to (…, width).

    `gate_up_weight` (2·width, dim) holds the gate's rows, then the up's. One Triton kernel, for what
    `multiprocessors_for_tiles` finds a place.
    """
    width, dim = gate_up_weight.shape[0] // 2, gate_up_weight.shape[1]
    flat = x.reshape(-1, dim).contiguous()
    out = x.new_empty((*x.shape[:-1], width))
    _swiglu_tile_kernel[(tile.needed(flat.shape[0], width),)](
        TensorDescriptor.from_tensor(flat, [tile.rows, _DEPTH]),
        TensorDescriptor.from_tensor(gate_up_weight, [tile.columns, _DEPTH]),
        out,
        flat.shape[0],
        width,
        dim,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=_DEPTH,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


def best_tile(rows: int, width: int, dim: int, multiprocessors: int) -> Tile | None:
    """The tile for so many rows of `dim` numbers, or None where cuBLAS and a second kernel were mostly faster.

    Chosen on an H100 (docs/log.md). A card takes tiles in waves, each multiprocessor as many as fit, and waits for the
    last wave however few are in it (NVIDIA, "Matrix Multiplication Background", wave quantization). The small tiles pay
    where one wave is all.
    """
    large = SIDE_BY_SIDE if dim <= _SHORT else TILES[0]
    for tile in (large, *TILES[1:]) if multiprocessors else ():
        tiles, wave = tile.needed(rows, width), tile.on_multiprocessor * multiprocessors
        waves = -(-tiles // wave)
        if rows >= tile.rows and tiles >= FULL_WAVE * waves * wave and (waves == 1 or tile is large):
            return tile
    return None


def multiprocessors_for_tiles(gate_up_weight: Tensor) -> int:
    """How many multiprocessors `swiglu_tiles` finds for this weight; 0 where it cannot run.

    It needs a 16-bit format, rows that begin at multiples of 16 bytes, and a card that loads tiles by itself into
    enough shared memory (the tensor memory accelerator, from compute capability 9.0 on).
    """
    if not (HAS_TRITON and gate_up_weight.is_cuda and gate_up_weight.dtype in (torch.bfloat16, torch.float16)):
        return 0
    card = torch.cuda.get_device_properties(gate_up_weight.device)
    row_bytes = gate_up_weight.shape[1] * gate_up_weight.itemsize
    aligned = row_bytes % 16 == 0 and gate_up_weight.data_ptr() % 16 == 0
    fits = card.major >= 9 and getattr(card, "shared_memory_per_block_optin", 0) >= _SHARED_MEMORY
    return card.multi_processor_count if aligned and fits else 0
