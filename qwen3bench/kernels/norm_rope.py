"""Head norms, rotary embedding and the write into the cache: the Triton kernel of `rope`.

A program takes some heads of some tokens: queries, keys or, where there is a cache, values, which it only copies.
"""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from qwen3bench.kernels import HAS_TRITON, matvec, multiprocessors

_NUMBERS = 4096  # of one program: enough loads in flight to fill the memory's bandwidth
_NUMBERS_A_WARP = 1024
_MOST_HEADS = 8  # of one token in one program, which read its angles once
if HAS_TRITON:
    import triton
    import triton.language as tl

    from qwen3bench.kernels.matvec import inverse_rms, let_next_kernel_start, wait_for_kernel_before

    @triton.jit
    def _two_halves(x, place, inside, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
        first = tl.load(x + place, mask=inside, other=0.0, cache_modifier=".cg")
        return first, tl.load(x + place + HALF, mask=inside, other=0.0, cache_modifier=".cg")

    @triton.jit
    def _rotated_heads(  # type: ignore[no-untyped-def]
        x, place, inside, gain, eps, cos, sin, angle, HALF: tl.constexpr, BLOCK: tl.constexpr
    ):
        """Both halves of the heads at `place` (tokens, heads, half), normed and rotated, in float32."""
        column = tl.arange(0, BLOCK)
        within = column < HALF
        gain1 = tl.load(gain + column, mask=within, other=0.0).to(tl.float32)[None, None, :]
        gain2 = tl.load(gain + HALF + column, mask=within, other=0.0).to(tl.float32)[None, None, :]
        cosine = tl.load(cos + angle, mask=within[None, :], other=0.0).to(tl.float32)[:, None, :]
        sine = tl.load(sin + angle, mask=within[None, :], other=0.0).to(tl.float32)[:, None, :]
        first, second = _two_halves(x, place, inside, HALF)
        first, second = first.to(tl.float32), second.to(tl.float32)
        squares = tl.sum(first * first + second * second, axis=2)
        scale = inverse_rms(squares / (2 * HALF), eps)[:, :, None]
        first, second = first * scale * gain1, second * scale * gain2
        return first * cosine - second * sine, second * cosine + first * sine

    @triton.jit(do_not_specialize=["tokens", "length"])  # else each remainder of them would be compiled anew
    def _norm_rope_kernel(  # type: ignore[no-untyped-def]
        query, key, value, q_gain, k_gain, cos, sin, q_out, k_out, v_out, tokens, length, q_eps, k_eps,
        q_token, k_token, v_token, q_out_token, kv_out_sequence, kv_out_head, kv_out_position,
        HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
        TOKENS: tl.constexpr, CHUNK: tl.constexpr, DEPENDENT: tl.constexpr,
    ):  # fmt: skip
        """Programs (groups of tokens, chunks of heads); `q_token` and so on are strides."""
        chunk = tl.program_id(1)
        token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
        head = tl.arange(0, CHUNK)
        column = tl.arange(0, BLOCK)
        inside = (token < tokens)[:, None, None] & (column < HALF)[None, None, :]
        position = token % length
        angle = tl.where(token < tokens, position, 0)[:, None] * (2 * HALF) + column[None, :]
        row = token[:, None, None]
        wait_for_kernel_before(DEPENDENT)
        let_next_kernel_start(DEPENDENT)
        if chunk < HEADS // CHUNK:
            of_head = (chunk * CHUNK + head)[None, :, None] * (2 * HALF) + column[None, None, :]
            q1, q2 = _rotated_heads(
                query, row * q_token + of_head, inside, q_gain, q_eps, cos, sin, angle, HALF, BLOCK
            )  # fmt: skip
            to_query = q_out + row * q_out_token + of_head
            tl.store(to_query, q1.to(q_out.dtype.element_ty), mask=inside)
            tl.store(to_query + HALF, q2.to(q_out.dtype.element_ty), mask=inside)
        else:
            kv_chunk = chunk - HEADS // CHUNK
            is_key = kv_chunk < KV_HEADS // CHUNK
            kv_head = (tl.where(is_key, kv_chunk, kv_chunk - KV_HEADS // CHUNK) * CHUNK + head)[None, :, None]
            of_kv_head = kv_head * (2 * HALF) + column[None, None, :]
            place = (token // length)[:, None, None] * kv_out_sequence + kv_head * kv_out_head
            place += position[:, None, None] * kv_out_position + column[None, None, :]
            if is_key:
                k1, k2 = _rotated_heads(
                    key, row * k_token + of_kv_head, inside, k_gain, k_eps, cos, sin, angle, HALF, BLOCK
                )  # fmt: skip
                tl.store(k_out + place, k1.to(k_out.dtype.element_ty), mask=inside)
                tl.store(k_out + place + HALF, k2.to(k_out.dtype.element_ty), mask=inside)
            else:
                v1, v2 = _two_halves(value, row * v_token + of_kv_head, inside, HALF)
                tl.store(v_out + place, v1, mask=inside)
                tl.store(v_out + place + HALF, v2, mask=inside)


def takes_heads(x: Tensor) -> bool:
    """Whether `norm_rope` can be given such heads (b, t, heads, d): on CUDA, with Triton, not in float64."""
    return HAS_TRITON and x.is_cuda and x.dtype is not torch.float64 and x.shape[-1] % 2 == 0


def norm_rope(
    heads: tuple[Tensor, Tensor, Tensor], gains: tuple[Tensor, Tensor], eps: tuple[float, float],
    angles: tuple[Tensor, Tensor], stored: tuple[Tensor, Tensor] | None, in_place: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """RMSNorm and rotary embedding of queries (b, t, h, d) and keys (b, t, g, d), in float32; one kernel.

    Returns queries and keys, shaped as they came. `heads`: these and the values. `angles`: cosine and sine of their
    positions (t, d), each pair's twice. With `stored`, the place of new keys and values (b, g, t, d) in a cache, these
    are written there, and the keys returned are those. `in_place`: queries and keys may be written over.
    """
    queries, keys, values = (_with_even_rows(x) for x in heads)
    batch, length, q_heads, dim = queries.shape
    kv_heads = keys.shape[2]
    q_out = queries if in_place else torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
    if stored is not None:
        k_out, v_out = stored[0].transpose(1, 2), stored[1].transpose(1, 2)
    else:
        k_out = keys if in_place else torch.empty(keys.shape, dtype=keys.dtype, device=keys.device)
        v_out = k_out
    tokens = batch * length
    block = triton.next_power_of_2(dim // 2)
    all_heads = q_heads + kv_heads + (kv_heads if stored is not None else 0)
    group, chunk = heads_tile(tokens, all_heads, gcd(q_heads, kv_heads), block, multiprocessors(queries.device))
    grid = (triton.cdiv(tokens, group), all_heads // chunk)
    _norm_rope_kernel[grid](
        queries, keys, values, *gains, *angles, q_out, k_out, v_out, tokens, length, *eps,
        _row(queries), _row(keys), _row(values), _row(q_out), k_out.stride(0), k_out.stride(2), k_out.stride(1),
        HEADS=q_heads, KV_HEADS=kv_heads, HALF=dim // 2, BLOCK=block, TOKENS=group, CHUNK=chunk,
        num_warps=max(1, min(8, group * chunk * 2 * block // _NUMBERS_A_WARP)),
        **matvec.early(matvec.dependent_launch_on(queries.device)),
    )  # fmt: skip
    return q_out, k_out


def heads_tile(tokens: int, heads: int, common: int, block: int, programs: int) -> tuple[int, int]:
    """Tokens and heads of a program, powers of two; fewer where there would not be so many programs otherwise.

    `common`: what the counts of query heads and key heads are both multiples of. `block` covers half a head.
    """
    chunk = min(common & -common, _MOST_HEADS)
    group = max(1, _NUMBERS // (chunk * 2 * block))
    while group * chunk > 1 and -(-tokens // group) * (heads // chunk) < programs:
        group, chunk = (group // 2, chunk) if group > 1 else (group, chunk // 2)
    return group, chunk


def _row(x: Tensor) -> int:
    """The distance from a token of x (b, t, heads, d) to the next, of another sequence too."""
    return x.stride(1) if x.shape[1] > 1 else x.stride(0)


def _with_even_rows(x: Tensor) -> Tensor:
    """The tensor (b, t, heads, d), copied unless a token's heads lie together and tokens at even distances."""
    together = x.stride(3) == 1 and (x.shape[2] == 1 or x.stride(2) == x.shape[3])
    even = x.shape[0] == 1 or x.shape[1] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
    return x if together and even else x.contiguous()
