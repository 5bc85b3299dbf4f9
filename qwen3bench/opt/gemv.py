"""`gemv`: a decoder block in five kernels, its products matrix times vector, where it is given a single token.

Decoding a token reads every weight once and computes next to nothing, so the gaps between kernels cost as much as
some of the kernels. These five are all that is between two of the residual stream's tensors:

1. the norm; queries, keys and values;
2. the norms of the heads, rotary embedding, the new key and value into the cache, attention over the positions that
   hold something, split among programs (Flash-Decoding, arXiv:2311.01282, section 2.2), the last of which joins them;
3. the output projection and the residual;
4. the norm; gate, up and SwiGLU;
5. the down projection and the residual.

With `dependent_launch` (CUDA's programmatic dependent launch, from compute capability 9.0 on) a kernel loads its
weights while the one before it still runs.

Beyond the five: off until it is named. It does the work of `flash`, `mask`, `mlp`, `norm` and `qkv` for a single token
on CUDA; everything else, and a call that asks for gradients, takes the stock block of whatever the other switches make.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qwen3bench.config.model_config import ModelConfig
from qwen3bench.kernels import HAS_TRITON, matvec
from qwen3bench.kernels.token_attention import token_attention
from qwen3bench.model.gradients import asked_for
from qwen3bench.model.layers import FeedForward, GroupedQueryAttention, RMSNorm, TransformerBlock
from qwen3bench.model.parts import Parts

if HAS_TRITON:
    import triton
    import triton.language as tl

    from qwen3bench.kernels.matvec import (
        activations,
        let_next_kernel_start,
        wait_for_kernel_before,
        weight_tile,
    )

    @triton.jit
    def _project_kernel(  # type: ignore[no-untyped-def]
        x, gain, query, key, value, out, q_rows, kv_rows, eps,
        DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, DEPENDENT: tl.constexpr,
    ):  # fmt: skip
        let_next_kernel_start(DEPENDENT)
        first = tl.program_id(0) * ROWS
        in_query, in_key = first < q_rows, first < q_rows + kv_rows
        weight = tl.where(in_query, query, tl.where(in_key, key, value))
        skipped = tl.where(in_query, 0, tl.where(in_key, q_rows, q_rows + kv_rows))
        tile = weight_tile(weight, first - skipped + tl.arange(0, ROWS), DIM, BLOCK)
        wait_for_kernel_before(DEPENDENT)
        normed = activations(x, gain, eps, DIM, BLOCK)
        product = tl.sum(tile.to(tl.float32) * normed[None, :], axis=1)
        tl.store(out + first + tl.arange(0, ROWS), product.to(out.dtype.element_ty))


def token_block(
    x: Tensor,
    weights: list[Tensor],
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    arrivals: Tensor,
    start: int,
    eps: float,
    dependent_launch: bool,
) -> Tensor:
    """The block for one token at position `start`, (1, 1, e) to (1, 1, e); its key and value go into the cache.

    `weights`: norm, query, key, value, query norm, key norm, output, norm, gate, up, down. `keys`, `values`
    (1, g, capacity, d). `arrivals` (h): zeros, before and after.
    """
    norm1, query, key, value, q_norm, k_norm, output, norm2, gate, up, down = weights
    dependent = dependent_launch and matvec.dependent_launch_on(x.device)
    qkv = _project(x, norm1, query, key, value, q_norm.shape[0], eps, dependent)
    context = token_attention(qkv, q_norm, k_norm, cos, sin, keys, values, arrivals, start, eps, dependent)
    x = matvec.product(context, output, dependent, residual=x, in_chain=True)
    activated = matvec.swiglu(x, gate, up, dependent, norm2, eps)
    return matvec.product(activated, down, dependent, residual=x, in_chain=True)


# To torch.compile the block is one operation: of Triton kernels of ours that it launches itself none is launched early.
compiled_token_block = torch.library.custom_op(
    "qwen3bench::token_block", token_block, mutates_args=("keys", "values", "arrivals")
)
compiled_token_block.register_fake(lambda x, *rest: torch.empty_like(x))


class FusedTokenBlock(TransformerBlock):
    """A decoder block that takes five kernels for a single token."""

    att: GroupedQueryAttention
    ff: FeedForward
    norm1: RMSNorm
    norm2: RMSNorm
    arrivals: Tensor  # (h), int32: how many splits of a head are done; 0 between calls

    def __init__(self, config: ModelConfig, parts: Parts, dependent_launch: bool = True) -> None:
        super().__init__(config, parts)
        self.config = config
        self.dependent_launch = dependent_launch
        self.pack()

    def pack(self) -> None:
        """Zeros for `arrivals`, where the weights are."""
        device = self.norm1.weight.device
        new = torch.empty if device.type == "meta" else torch.zeros  # to fill there, PyTorch imports its compiler
        self.arrivals = new(self.config.num_heads, dtype=torch.int32, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedTokenBlock:
        super()._apply(fn, recurse)
        self.pack()
        return self

    def forward(
        self,
        stream: Any,
        mask: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        cache: tuple[Tensor, Tensor] | None = None,
        start: int = 0,
    ) -> Any:
        if cache is None or not self.is_whole(stream, cache):
            return super().forward(stream, mask, cos, sin, cache, start)
        att, ff = self.att, self.ff
        queries = [att.W_query.weight, att.W_key.weight, att.W_value.weight, att.q_norm.weight, att.k_norm.weight]
        products = [self.norm2.weight, ff.fc1.weight, ff.fc2.weight, ff.fc3.weight]
        weights: list[Any] = [self.norm1.weight, *queries, att.out_proj.weight, *products]
        block = compiled_token_block if torch.compiler.is_compiling() else token_block
        return block(stream, weights, cos, sin, *cache, self.arrivals, start, self.norm1.eps, self.dependent_launch)

    def is_whole(self, stream: Any, cache: tuple[Tensor, Tensor] | None) -> bool:
        """Whether it is for the five kernels: a single token, of which no gradient is asked.

        A sum that is still to be made is none.
        """
        head_dim = self.config.head_dim
        token = cache is not None and isinstance(stream, Tensor) and matvec.takes_token(stream)
        differentiated = torch.is_grad_enabled() and asked_for(*self.parameters())
        return token and head_dim & (head_dim - 1) == 0 and not differentiated

    def _get_name(self) -> str:
        return "TransformerBlock"


def _project(
    x: Tensor, norm: Tensor, query: Tensor, key: Tensor, value: Tensor, head_dim: int, eps: float, dependent: bool
) -> Tensor:
    """Queries, keys and values of one token, (h + 2g)·d numbers."""
    q_rows, kv_rows = query.shape[0], key.shape[0]
    out = x.new_empty(q_rows + 2 * kv_rows)
    block, rows = matvec.tile(x.shape[-1], head_dim)
    _project_kernel[(out.numel() // rows,)](
        x, norm, query, key, value, out, q_rows, kv_rows, eps,
        DIM=x.shape[-1], BLOCK=block, ROWS=rows, **matvec.launch(block * rows, dependent),
    )  # fmt: skip
    return out


def apply(parts: Parts, dependent_launch: bool = True) -> Parts:
    """The parts with the block of five kernels; `dependent_launch` lets a kernel start before its predecessor ends."""
    return replace(parts, block=partial(FusedTokenBlock, dependent_launch=dependent_launch))
