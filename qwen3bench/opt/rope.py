"""`rope`: the norms of query and key heads, the rotation and the write into the cache in one kernel.

The idea of Liger-Kernel's rotary embedding (arXiv:2410.10989), with the norms before it and the write after it. Queries
and keys are rotated where they lie.

Beyond the five: off until it is named. Beside it `norm` is left with the norms of the residual stream.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qwen3bench.kernels.norm_rope import norm_rope, takes_heads
from qwen3bench.kernels.rms_norm_backward import norm_rope_backward
from qwen3bench.model.gradients import asked_for
from qwen3bench.model.layers import RMSNorm, separate_rope
from qwen3bench.model.parts import Angles, HeadNorms, Heads, Parts


def _rotated(
    queries: Tensor, keys: Tensor, values: Tensor, gains: list[Tensor], eps: list[float], angles: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Queries and keys, rotated: see `norm_rope`."""
    q_eps, k_eps = eps
    (q_gain, k_gain), (cos, sin) = gains, angles
    return norm_rope((queries, keys, values), (q_gain, k_gain), (q_eps, k_eps), (cos, sin), None, in_place=False)


def _rotated_into_cache(
    queries: Tensor, keys: Tensor, values: Tensor, gains: list[Tensor], eps: list[float], angles: list[Tensor],
    stored_keys: Tensor, stored_values: Tensor, start: int,
) -> Tensor:  # fmt: skip
    """Queries, rotated; keys and values go into the cache."""
    end = start + queries.shape[1]
    q_eps, k_eps = eps
    (q_gain, k_gain), (cos, sin) = gains, angles
    stored = stored_keys[:, :, start:end], stored_values[:, :, start:end]
    return norm_rope((queries, keys, values), (q_gain, k_gain), (q_eps, k_eps), (cos, sin), stored, in_place=False)[0]


# To torch.compile each is one operation, faster than the two kernels that it makes of them itself (docs/log.md).
compiled_rope = torch.library.custom_op("qwen3bench::rope", _rotated, mutates_args=())
compiled_rope.register_fake(lambda q, k, *rest: (q.new_empty(q.shape), k.new_empty(k.shape)))
compiled_rope_into_cache = torch.library.custom_op(
    "qwen3bench::rope_into_cache", _rotated_into_cache, mutates_args=("stored_keys", "stored_values")
)
compiled_rope_into_cache.register_fake(lambda q, *rest: q.new_empty(q.shape))


class _NormRope(torch.autograd.Function):
    """Norms and rotation of queries and keys in one kernel, their gradients in one each. Kept is what was projected."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, q_gain: Tensor, k_gain: Tensor,
        q_eps: float, k_eps: float, cos: Tensor, sin: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.save_for_backward(queries, keys, q_gain, k_gain, cos, sin)
        ctx.eps = q_eps, k_eps
        return norm_rope((queries, keys, values), (q_gain, k_gain), ctx.eps, (cos, sin), None, in_place=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_queries: Tensor, of_keys: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, q_gain, k_gain, cos, sin = ctx.saved_tensors
        q_eps, k_eps = ctx.eps
        of_q, of_q_gain = norm_rope_backward(queries, q_gain, q_eps, (cos, sin), of_queries)
        of_k, of_k_gain = norm_rope_backward(keys, k_gain, k_eps, (cos, sin), of_keys)
        return of_q, of_k, None, of_q_gain, of_k_gain, None, None, None, None


def fused_rope(
    projected: Heads, norms: HeadNorms, angles: Angles, cache: tuple[Tensor, Tensor] | None, start: int
) -> Heads:
    """Queries (b, h, t, d), keys and values (b, g, s, d), as `parts.Rope` says, in one Triton kernel on CUDA.

    Two more kernels where gradients are asked for. The baseline's operations elsewhere, beside other norms than
    RMSNorm, and in compiled code that has gradients or is for a single token.
    """
    q_norm, k_norm = norms
    if not (isinstance(q_norm, RMSNorm) and isinstance(k_norm, RMSNorm)):
        return separate_rope(projected, norms, angles, cache, start)
    gains, eps = (q_norm.weight, k_norm.weight), (q_norm.eps, k_norm.eps)
    if not _takes(projected):
        return separate_rope(projected, norms, angles, cache, start)
    queries, keys, values = projected
    compiling = torch.compiler.is_compiling()
    if asked_for(*projected, *gains):
        if compiling or cache is not None:
            return separate_rope(projected, norms, angles, cache, start)
        queries, keys = _NormRope.apply(queries, keys, values, *gains, *eps, *angles)
        return queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
    if compiling and queries.shape[0] == queries.shape[1] == 1:  # Inductor fuses a token's with its product: faster
        return separate_rope(projected, norms, angles, cache, start)
    if cache is None:
        if compiling:
            queries, keys = compiled_rope(queries, keys, values, [*gains], [*eps], [*angles])
        else:
            queries, keys = norm_rope(projected, gains, eps, angles, None, in_place=True)
        return queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
    end = start + queries.shape[1]
    if compiling:
        queries = compiled_rope_into_cache(queries, keys, values, [*gains], [*eps], [*angles], *cache, start)
    else:
        stored = cache[0][:, :, start:end], cache[1][:, :, start:end]
        queries, _ = norm_rope(projected, gains, eps, angles, stored, in_place=True)
    return queries.transpose(1, 2), cache[0][:, :, :end], cache[1][:, :, :end]


def _takes(projected: Heads) -> bool:
    return takes_heads(projected[0]) and len({x.dtype for x in projected}) == 1


def apply(parts: Parts) -> Parts:
    """The parts with one kernel between the projections and attention."""
    return replace(parts, rope=fused_rope)
