"""Attention of a single query over the keys and values of a cache, for decoding: Triton kernels of `flash` and `gemv`.

The positions are split among programs, and the last program of a head to arrive joins what all have found
(Flash-Decoding, arXiv:2311.01282, section 2.2): a single query is too little work for one program a head.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from qwen3bench.kernels import HAS_TRITON, matvec

_MAX_SPLITS = 64  # of the positions, before a program takes more of them
_MIN_POSITIONS, _MAX_POSITIONS = 32, 128  # that a program takes: its registers hold their keys and values
_NUMBERS_A_WARP = 4096  # of the keys that a program without norms takes
if HAS_TRITON:
    import triton
    import triton.language as tl

    from qwen3bench.kernels.matvec import inverse_rms, let_next_kernel_start, wait_for_kernel_before

    @triton.jit
    def _halves(x, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
        i = tl.arange(0, HALF)
        first = tl.load(x + i, cache_modifier=".cg").to(tl.float32)
        return first, tl.load(x + HALF + i, cache_modifier=".cg").to(tl.float32)

    @triton.jit
    def _norm_rope(x, gain, cos, sin, eps, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
        first, second = _halves(x, HALF)
        gain1, gain2 = _halves(gain, HALF)
        cos1, cos2 = _halves(cos, HALF)
        sin1, sin2 = _halves(sin, HALF)
        scale = inverse_rms(tl.sum(first * first + second * second) / (2 * HALF), eps)
        first, second = first * scale * gain1, second * scale * gain2
        return first * cos1 - second * sin1, second * cos2 + first * sin2

    @triton.jit
    def _attend_and_join(  # type: ignore[no-untyped-def]
        q1, q2, k1, k2, v1, v2, attended, parts, tops, sums, arrivals, out,
        HALF: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr,
    ):  # fmt: skip
        """This program's part of the softmax of its head; of the head's programs the last one joins all parts.

        q1, q2 (HALF) and k1, k2, v1, v2 (positions, HALF) are halves of a head's numbers, attended (positions) says
        which of them count. parts (heads, SPLITS, 2·HALF), tops and sums (heads, SPLITS): of each split.
        """
        split, head, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
        DIM: tl.constexpr = 2 * HALF
        i = tl.arange(0, HALF)
        scores = tl.sum(k1 * q1[None, :] + k2 * q2[None, :], axis=1) * DIM**-0.5
        scores = tl.where(attended, scores, float("-inf"))
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
            highest = tl.max(all_tops, axis=0)
            total = tl.sum(all_sums * tl.exp(all_tops - highest), axis=0)
            d = tl.arange(0, DIM)
            joined = tl.zeros((DIM,), dtype=tl.float32)
            for begin in range(0, SPLITS, CHUNK):
                some = begin + tl.arange(0, CHUNK)
                theirs = head * SPLITS + some
                their_tops = tl.load(tops + theirs, mask=some < splits, other=float("-inf"), cache_modifier=".cg")
                at = theirs[:, None] * DIM + d[None, :]
                their_parts = tl.load(parts + at, mask=(some < splits)[:, None], other=0.0, cache_modifier=".cg")
                joined += tl.sum(their_parts * tl.exp(their_tops - highest)[:, None], axis=0)
            tl.store(out + head * DIM + d, (joined / total).to(out.dtype.element_ty))
            tl.store(arrivals + head, 0)

    @triton.jit(do_not_specialize=["length"])  # else it would be compiled anew for lengths that 16 divides
    def _split_attention_kernel(  # type: ignore[no-untyped-def]
        query, keys, values, parts, tops, sums, arrivals, out, length,
        query_head, key_head, key_position, value_head, value_position,
        GROUP: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr, POSITIONS: tl.constexpr,
        DEPENDENT: tl.constexpr,
    ):  # fmt: skip
        """Programs (splits, heads); `query_head` and so on are strides."""
        split, head = tl.program_id(0), tl.program_id(1)
        HALF: tl.constexpr = DIM // 2
        i = tl.arange(0, HALF)[None, :]
        position = split * POSITIONS + tl.arange(0, POSITIONS)
        attended = position < length
        row = position[:, None].to(tl.int64)
        key = keys + (head // GROUP) * key_head + row * key_position + i
        value = values + (head // GROUP) * value_head + row * value_position + i
        wait_for_kernel_before(DEPENDENT)
        let_next_kernel_start(DEPENDENT)
        some = attended[:, None]
        k1 = tl.load(key, mask=some, other=0.0, cache_modifier=".cg").to(tl.float32)
        k2 = tl.load(key + HALF, mask=some, other=0.0, cache_modifier=".cg").to(tl.float32)
        v1 = tl.load(value, mask=some, other=0.0, cache_modifier=".cg").to(tl.float32)
        v2 = tl.load(value + HALF, mask=some, other=0.0, cache_modifier=".cg").to(tl.float32)
        q1, q2 = _halves(query + head * query_head, HALF)
        _attend_and_join(
            q1, q2, k1, k2, v1, v2, attended, parts, tops, sums, arrivals, out, HALF, SPLITS, CHUNK
        )  # fmt: skip

    @triton.jit(do_not_specialize=["start"])
    def _token_attention_kernel(  # type: ignore[no-untyped-def]
        qkv, q_gain, k_gain, cos, sin, keys, values, parts, tops, sums, arrivals, out, capacity, start, eps,
        HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr,
        POSITIONS: tl.constexpr, DEPENDENT: tl.constexpr,
    ):  # fmt: skip
        """Programs (splits, heads)."""
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
        new_v1, new_v2 = _halves(qkv + (HEADS + KV_HEADS + kv_head) * DIM, HALF)
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
        _attend_and_join(
            q1, q2, k1, k2, v1, v2, position <= start, parts, tops, sums, arrivals, out, HALF, SPLITS, CHUNK
        )  # fmt: skip


def takes_query(q: Tensor) -> bool:
    """Whether `split_attention` can be given q (b, h, t, d): one sequence's token, on CUDA, d a power of two."""
    batch, _, queries, dim = q.shape
    single = batch == queries == 1 and dim > 1 and dim & (dim - 1) == 0
    return HAS_TRITON and q.is_cuda and single and q.dtype is not torch.float64


def split_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v of a single query q (1, h, 1, d) over k and v (1, g, s, d), in float32: to (1, h, 1, d).

    One kernel. The calls on a device share counters, which the first of them makes: that one must not be captured in a
    graph, and two must not run at once, in two streams.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    _, heads, _, dim = q.shape
    positions, count, splits = _splits(k.shape[2])
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _split_attention_kernel[(count, heads)](
        q, k, v, *_scratch(q, heads, splits, dim), shared_counters(q.device, heads), out, k.shape[2],
        q.stride(1), k.stride(1), k.stride(2), v.stride(1), v.stride(2),
        GROUP=heads // k.shape[1], DIM=dim, SPLITS=splits, CHUNK=min(splits, _MAX_SPLITS), POSITIONS=positions,
        num_warps=max(1, positions * dim // _NUMBERS_A_WARP), **matvec.early(matvec.dependent_launch_on(q.device)),
    )  # fmt: skip
    return out


def token_attention(
    qkv: Tensor, q_norm: Tensor, k_norm: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor,
    arrivals: Tensor, start: int, eps: float, dependent: bool,
) -> Tensor:  # fmt: skip
    """The context (h·d) of the token at position `start`, from its queries, keys and values, (h + 2g)·d numbers.

    Norms of the heads and rotary embedding included; its key and value go into the cache, `keys` and `values`
    (1, g, capacity, d). `arrivals` (h): zeros, before and after.
    """
    heads, dim = arrivals.shape[0], q_norm.shape[0]
    out = qkv.new_empty(heads * dim)
    positions, count, splits = _splits(start + 1)
    _token_attention_kernel[(count, heads)](
        qkv, q_norm, k_norm, cos, sin, keys, values, *_scratch(qkv, heads, splits, dim), arrivals, out,
        keys.shape[2], start, eps,
        HEADS=heads, KV_HEADS=keys.shape[1], DIM=dim, SPLITS=splits, CHUNK=min(splits, _MAX_SPLITS),
        POSITIONS=positions, **matvec.launch(positions * dim, dependent),
    )  # fmt: skip
    return out


def _splits(length: int) -> tuple[int, int, int]:
    """Positions of a program, how many programs have some, and the power of two that covers these."""
    least = triton.next_power_of_2(triton.cdiv(length, _MAX_SPLITS))
    positions = min(_MAX_POSITIONS, max(_MIN_POSITIONS, least))
    count = triton.cdiv(length, positions)
    return positions, count, triton.next_power_of_2(count)


def _scratch(like: Tensor, heads: int, splits: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """What each split of each head finds: its part of the context, its highest score, its sum of weights."""
    parts = like.new_empty((heads, splits, dim), dtype=torch.float32)
    tops, sums = like.new_empty((2, heads, splits), dtype=torch.float32)
    return parts, tops, sums


def forget_counters() -> None:
    """Free the counters that calls on a device share; the next call makes them anew, and must not be captured."""
    shared_counters.cache_clear()


@cache
def shared_counters(device: torch.device, heads: int) -> Tensor:
    """How many splits of each head are done: zeros, before and after a kernel."""
    return torch.zeros(heads, dtype=torch.int32, device=device)
