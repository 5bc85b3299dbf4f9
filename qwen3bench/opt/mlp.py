"""`mlp`: one gate-up product over one stored weight, then SiLU and product in one kernel.

The idea of Liger-Kernel's SwiGLU (arXiv:2410.10989) and of gpt-fast's stacked projections. The two halves of
the product lie strided in memory, so chunk-then-multiply loses what the single product wins; the kernel reads
both halves of a row where they lie. For a single token, where reading the weight is all the work, one kernel does
the product as well.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3bench.model.config import ModelConfig
from qwen3bench.model.layers import FeedForward
from qwen3bench.model.parts import Parts
from qwen3bench.model.stack import StackedLinears

_HAS_TRITON = find_spec("triton") is not None
if _HAS_TRITON:
    import triton
    import triton.language as tl

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
    def _swiglu_row_kernel(x, gate_up_weight, out, width, dim, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(0).to(tl.int64)
        gate_row = gate_up_weight + row * dim
        up_row = gate_row + tl.cast(width, tl.int64) * dim
        gates = tl.zeros((BLOCK,), dtype=tl.float32)
        ups = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, dim, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < dim
            values = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
            gates += values * tl.load(gate_row + column, mask=inside, other=0.0).to(tl.float32)
            ups += values * tl.load(up_row + column, mask=inside, other=0.0).to(tl.float32)
        gate, up = tl.sum(gates), tl.sum(ups)
        product = gate * tl.sigmoid(gate) * up
        tl.store(out + row, product.to(out.dtype.element_ty))


def silu_mul(gate_up: Tensor) -> Tensor:
    """SiLU of the first half times the second half: (…, 2·width) to (…, width), computed in float32.

    One Triton kernel on CUDA; plain operations elsewhere and under torch.compile, which fuses them itself.
    """
    if not (_HAS_TRITON and gate_up.is_cuda) or torch.compiler.is_compiling() or gate_up.dtype is torch.float64:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
    gate_up = gate_up.contiguous()
    width = gate_up.shape[-1] // 2
    out = gate_up.new_empty((*gate_up.shape[:-1], width))
    block = min(1024, triton.next_power_of_2(width))
    _silu_mul_kernel[(out.numel() // width, triton.cdiv(width, block))](gate_up, out, width, BLOCK=block)
    return out


def swiglu_row(x: Tensor, gate_up_weight: Tensor) -> Tensor:
    """SiLU(gate x) · up x of a single token x (…, dim), all other dimensions 1, in float32: to (…, width).

    `gate_up_weight` (2·width, dim) holds the gate's rows, then the up's. One Triton kernel; needs CUDA.
    """
    width, dim = gate_up_weight.shape[0] // 2, gate_up_weight.shape[1]
    out = x.new_empty((*x.shape[:-1], width))
    block = min(1024, triton.next_power_of_2(dim))
    _swiglu_row_kernel[(width,)](x.contiguous(), gate_up_weight, out, width, dim, BLOCK=block)
    return out


class FusedFeedForward(FeedForward, StackedLinears):
    """SwiGLU with one gate-up product; fc1 and fc2 are the two halves of one stored weight."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.stack("fc1", "fc2")

    def forward(self, x: Tensor) -> Tensor:
        if _HAS_TRITON and x.is_cuda and x.numel() == x.shape[-1] and x.dtype is not torch.float64:
            return self.fc3(swiglu_row(x, self.stacked_weight))
        return self.fc3(silu_mul(self.product(x)))


def apply(parts: Parts) -> Parts:
    """The parts with the fused feed-forward."""
    return replace(parts, mlp=FusedFeedForward)
