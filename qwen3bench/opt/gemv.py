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
on CUDA; everything else takes the stock block, of whatever the other switches make of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qwen3bench.kernels import matvec
from qwen3bench.model.config import ModelConfig
from qwen3bench.model.layers import FeedForward, GroupedQueryAttention, RMSNorm, TransformerBlock
from qwen3bench.model.parts import Parts

_MOST_SPLITS = 64  # of the positions, before a program takes more of them
_MOST_POSITIONS = 128  # that a program takes: its registers hold their keys and values
if matvec.HAS_TRITON:
    import triton
    import triton.language as tl

    from qwen3bench.kernels.matvec import (
        activations,
        inverse_rms,
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

    @triton.jit
    def _half_heads(x, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
        i = tl.arange(0, HALF)
        first = tl.load(x + i, cache_modifier=".cg").to(tl.float32)
        return first, tl.load(x + HALF + i, cache_modifier=".cg").to(tl.float32)

    @triton.jit
    def _norm_rope(x, gain, cos, sin, eps, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
        first, second = _half_heads(x, HALF)
        gain1, gain2 = _half_heads(gain, HALF)
        cos1, cos2 = _half_heads(cos, HALF)
        sin1, sin2 = _half_heads(sin, HALF)
        scale = inverse_rms(tl.sum(first * first + second * second) / (2 * HALF), eps)
        first, second = first * scale * gain1, second * scale * gain2
        return first * cos1 - second * sin1, second * cos2 + first * sin2

    @triton.jit(do_not_specialize=["start"])  # else it would be compiled anew for lengths that 16 divides
    def _attention_kernel(  # type: ignore[no-untyped-def]
        qkv, q_gain, k_gain, cos, sin, keys, values, parts, tops, sums, arrivals, out, capacity, start, eps,
        HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr,
        POSITIONS: tl.constexpr, DEPENDENT: tl.constexpr,
    ):  # fmt: skip
        """Programs (splits, heads). parts (heads, SPLITS, DIM), tops and sums (heads, SPLITS): of each split."""
        let_next_kernel_start(DEPENDENT)
        split, head, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
        kv_head = head // (HEADS // KV_HEADS)
        HALF: tl.constexpr = DIM // 2
        i = tl.arange(0, HALF)
        position = split * POSITIONS + tl.arange(0, POSITIONS)
        stored = (position < start)[:, None]
        new = (position == start)[:, None]
        place = (kv_head * capacity + position)[:, None].to(tl.int64) * DIM + i[None, :]
        k1 = tl.load(keys + place, mask=stored, other=0.0)
        k2 = tl.load(keys + place + HALF, mask=stored, other=0.0)
        v1 = tl.load(values + place, mask=stored, other=0.0)
        v2 = tl.load(values + place + HALF, mask=stored, other=0.0)
        wait_for_kernel_before(DEPENDENT)

        new_k1, new_k2 = _norm_rope(qkv + (HEADS + kv_head) * DIM, k_gain, cos, sin, eps, HALF)
        new_v1, new_v2 = _half_heads(qkv + (HEADS + KV_HEADS + kv_head) * DIM, HALF)
        dtype = keys.dtype.element_ty
        new_k1, new_k2, new_v1, new_v2 = new_k1.to(dtype), new_k2.to(dtype), new_v1.to(dtype), new_v2.to(dtype)
        if (split == splits - 1) & (head % (HEADS // KV_HEADS) == 0):
            end = (kv_head * capacity + start).to(tl.int64) * DIM + i
            tl.store(keys + end, new_k1)
            tl.store(keys + end + HALF, new_k2)
            tl.store(values + end, new_v1)
            tl.store(values + end + HALF, new_v2)
        k1 = tl.where(new, new_k1[None, :], k1).to(tl.float32)
        k2 = tl.where(new, new_k2[None, :], k2).to(tl.float32)
        v1 = tl.where(new, new_v1[None, :], v1).to(tl.float32)
        v2 = tl.where(new, new_v2[None, :], v2).to(tl.float32)

        q1, q2 = _norm_rope(qkv + head * DIM, q_gain, cos, sin, eps, HALF)
        scores = tl.sum(k1 * q1[None, :] + k2 * q2[None, :], axis=1) * DIM**-0.5
        scores = tl.where(position <= start, scores, float("-inf"))
        top = tl.max(scores, axis=0)
        weights = tl.exp(scores - top)
        mine = head * SPLITS + split
        tl.store(parts + mine * DIM + i, tl.sum(weights[:, None] * v1, axis=0))
        tl.store(parts + mine * DIM + HALF + i, tl.sum(weights[:, None] * v2, axis=0))
        tl.store(tops + mine, top)
        tl.store(sums + mine, tl.sum(weights, axis=0))

        tl.debug_barrier()  # every thread has written its share before the program says that it is there
        if tl.atomic_add(arrivals + head, 1, sem="acq_rel", scope="gpu") == splits - 1:
            each = head * SPLITS + tl.arange(0, SPLITS)
            there = tl.arange(0, SPLITS) < splits
            all_tops = tl.load(tops + each, mask=there, other=float("-inf"), cache_modifier=".cg")
            all_sums = tl.load(sums + each, mask=there, other=0.0, cache_modifier=".cg")
            top = tl.max(all_tops, axis=0)
            total = tl.sum(all_sums * tl.exp(all_tops - top), axis=0)
            d = tl.arange(0, DIM)
            joined = tl.zeros((DIM,), dtype=tl.float32)
            for begin in range(0, SPLITS, CHUNK):
                some = begin + tl.arange(0, CHUNK)
                theirs = head * SPLITS + some
                their_tops = tl.load(tops + theirs, mask=some < splits, other=float("-inf"), cache_modifier=".cg")
                at = theirs[:, None] * DIM + d[None, :]
                their_parts = tl.load(parts + at, mask=(some < splits)[:, None], other=0.0, cache_modifier=".cg")
                joined += tl.sum(their_parts * tl.exp(their_tops - top)[:, None], axis=0)
            tl.store(out + head * DIM + d, (joined / total).to(out.dtype.element_ty))
            tl.store(arrivals + head, 0)


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
    context = _attend(qkv, q_norm, k_norm, cos, sin, keys, values, arrivals, start, eps, dependent)
    x = matvec.product(context, output, dependent, residual=x)
    return matvec.product(matvec.swiglu(x, gate, up, dependent, norm2, eps), down, dependent, residual=x)


# To torch.compile the block is one operation: of kernels that it launches itself none is launched early.
_compiled_token_block = torch.library.custom_op(
    "qwen3bench::token_block", token_block, mutates_args=("keys", "values", "arrivals")
)
_compiled_token_block.register_fake(lambda x, *rest: torch.empty_like(x))


class FusedTokenBlock(TransformerBlock):
    """A decoder block, (b, t, e) to (b, t, e), that takes five kernels for a single token."""

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
        x: Tensor,
        mask: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        cache: tuple[Tensor, Tensor] | None = None,
        start: int = 0,
    ) -> Tensor:
        if cache is None or not self._takes(x):
            return super().forward(x, mask, cos, sin, cache, start)
        att, ff = self.att, self.ff
        queries = [att.W_query.weight, att.W_key.weight, att.W_value.weight, att.q_norm.weight, att.k_norm.weight]
        products = [self.norm2.weight, ff.fc1.weight, ff.fc2.weight, ff.fc3.weight]
        weights: list[Any] = [self.norm1.weight, *queries, att.out_proj.weight, *products]
        block = _compiled_token_block if torch.compiler.is_compiling() else token_block
        return block(x, weights, cos, sin, *cache, self.arrivals, start, self.norm1.eps, self.dependent_launch)

    def _takes(self, x: Tensor) -> bool:
        head_dim = self.config.head_dim
        return matvec.takes(x) and head_dim & (head_dim - 1) == 0

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


def _attend(
    qkv: Tensor, q_norm: Tensor, k_norm: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor,
    arrivals: Tensor, start: int, eps: float, dependent: bool,
) -> Tensor:  # fmt: skip
    """The context of one token, (h·d)."""
    heads, dim = arrivals.shape[0], q_norm.shape[0]
    each = min(_MOST_POSITIONS, max(32, triton.next_power_of_2(triton.cdiv(start + 1, _MOST_SPLITS))))
    count = triton.cdiv(start + 1, each)
    splits = triton.next_power_of_2(count)
    parts = qkv.new_empty((heads, splits, dim), dtype=torch.float32)
    tops, sums = qkv.new_empty((2, heads, splits), dtype=torch.float32)
    out = qkv.new_empty(heads * dim)
    _attention_kernel[(count, heads)](
        qkv, q_norm, k_norm, cos, sin, keys, values, parts, tops, sums, arrivals, out, keys.shape[2], start, eps,
        HEADS=heads, KV_HEADS=keys.shape[1], DIM=dim, SPLITS=splits, CHUNK=min(splits, _MOST_SPLITS),
        POSITIONS=each, **matvec.launch(each * dim, dependent),
    )  # fmt: skip
    return out


def apply(parts: Parts, dependent_launch: bool = True) -> Parts:
    """The parts with the block of five kernels; `dependent_launch` lets a kernel start before its predecessor ends."""
    return replace(parts, block=partial(FusedTokenBlock, dependent_launch=dependent_launch))
