"""Runs Triton kernels on a CPU, in Triton's interpreter, and holds them to plain operations in float64.

Run by test_interpreted.py with TRITON_INTERPRET=1, before anything imports Triton. Shapes are odd, tensors are views,
and a card of one multiprocessor is pretended, so that programs take several turns.
"""

from __future__ import annotations

import itertools
import sys
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3bench.kernels import add_norm, matvec, norm_rope, rms_norm_backward, token_attention

LIMIT = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}  # of the largest number
EPS = 1e-6
Case = tuple[str, Tensor, Tensor]


def normed(x: Tensor, gain: Tensor) -> Tensor:
    return F.rms_norm(x.double(), gain.shape, gain.double(), EPS)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads (b, t, heads, d), turned by the angles of (t, d)."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = (table.double()[None, :, None] for table in (cos, sin))
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def angles(length: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angle = torch.randn(length, dim // 2).repeat(1, 2)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def gain_of(dim: int, dtype: torch.dtype) -> Tensor:
    return (torch.rand(dim) + 0.5).to(dtype)


def sums(dtype: torch.dtype) -> list[Case]:
    found = []
    for shape, in_place in itertools.product(((2, 7, 96), (3, 5, 1000), (2, 130, 64)), (False, True)):
        x, gain = torch.randn(shape[1], shape[0], shape[2]).to(dtype).transpose(0, 1), gain_of(shape[2], dtype)
        change = torch.randn(shape).to(dtype)
        total = x + change
        got = add_norm.add_norm(x.contiguous() if in_place else x, change, gain, EPS, in_place)
        found += [(f"sum {shape}", got[0], total.double()), (f"its norm {shape}", got[1], normed(total, gain))]
    return found


def rotations(dtype: torch.dtype) -> list[Case]:
    found = []
    shapes = ((2, 7, 4, 2, 64), (1, 9, 6, 3, 80), (4, 1, 16, 8, 128), (1, 17, 5, 5, 34))
    for (batch, length, heads, kv_heads, dim), cached in itertools.product(shapes, (False, True)):
        product = torch.randn(batch, length, (heads + 2 * kv_heads) * dim).to(dtype)
        rows = product.split((heads * dim, kv_heads * dim, kv_heads * dim), dim=-1)
        q, k, v = (part.view(batch, length, -1, dim) for part in rows)
        gains, turns = (gain_of(dim, dtype), gain_of(dim, dtype)), angles(length, dim, dtype)
        wanted = [rotated(normed(x, gain), *turns) for x, gain in zip((q, k), gains, strict=True)]
        cache = torch.zeros(2, batch, kv_heads, length + 5, dim, dtype=dtype)
        stored = (cache[0][:, :, 3 : 3 + length], cache[1][:, :, 3 : 3 + length]) if cached else None
        got = norm_rope.norm_rope((q, k, v), gains, (EPS, EPS), turns, stored, in_place=True)
        name = f"{(batch, length, heads, kv_heads, dim)}, cached: {cached}"
        found += [(f"{what} {name}", a, b) for what, a, b in zip("qk", got, wanted, strict=True)]
        if stored is not None:
            found.append((f"v {name}", stored[1].transpose(1, 2), v.double()))
            found.append((f"beside {name}", cache[:, :, :, [0, 2, -1]].sum() + 1, torch.ones((), dtype=torch.float64)))
    return found


def gradients(dtype: torch.dtype) -> list[Case]:
    found = []
    for shape in ((2, 7, 96), (1, 13, 33), (2, 5, 3, 4, 32), (2, 130, 64)):
        x, more = torch.randn(2, *shape).to(dtype)
        given = torch.randn(shape[1], shape[0], *shape[2:]).to(dtype).transpose(0, 1)
        double, gain = x.double().requires_grad_(), gain_of(shape[-1], dtype)
        wide = gain.double().requires_grad_()
        wanted = torch.autograd.grad(F.rms_norm(double, wide.shape, wide, EPS), (double, wide), given.double())
        got = rms_norm_backward.norm_backward(x, gain, EPS, given, more)
        found += [(f"dx {shape}", got[0], wanted[0] + more.double()), (f"dgain {shape}", got[1], wanted[1])]
    for batch, length, heads, dim in ((2, 70, 8, 64), (1, 9, 6, 80), (1, 17, 5, 34)):
        x = torch.randn(batch, length, heads + 3, dim).to(dtype)[:, :, 1:-2]
        given = torch.randn(batch, heads, length, dim).to(dtype).transpose(1, 2)
        turns, gain = angles(length, dim, dtype), gain_of(dim, dtype)
        double, wide = x.double().requires_grad_(), gain.double().requires_grad_()
        turned = rotated(F.rms_norm(double, wide.shape, wide, EPS), *turns)
        wanted = torch.autograd.grad(turned, (double, wide), given.double())
        got = rms_norm_backward.norm_rope_backward(x, gain, EPS, turns, given)
        found += [(f"rotated d{what} {heads, dim}", a, b) for what, a, b in zip("xg", got, wanted, strict=True)]
    return found


def tokens(dtype: torch.dtype) -> list[Case]:
    found = []
    for heads, kv_heads, positions, dim in ((4, 2, 33, 64), (6, 2, 100, 128), (2, 1, 2049, 64)):
        q = torch.randn(1, heads, 1, dim).to(dtype)
        k = torch.randn(1, kv_heads, positions + 9, dim).to(dtype)[:, :, :positions]
        v = torch.randn(1, positions, kv_heads, dim).to(dtype).transpose(1, 2)
        wanted = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), enable_gqa=True)
        found += [(f"attention {heads, positions, dim}", token_attention.split_attention(q, k, v), wanted)] * 2
    for width, dim in ((96, 64), (12, 33)):
        x, gate, up = torch.randn(1, 1, dim), torch.randn(width, dim), torch.randn(width, dim)
        x, gate, up, gain = x.to(dtype), gate.to(dtype), up.to(dtype), gain_of(dim, dtype)
        y = normed(x, gain)
        wanted = F.silu(y @ gate.double().T) * (y @ up.double().T)
        found.append((f"swiglu {width, dim}", matvec.swiglu(x, gate, up, False, gain, EPS), wanted))
        found.append((f"product {width, dim}", matvec.product(x, gate, False), x.double() @ gate.double().T))
    return found


def main() -> None:
    for module in (add_norm, norm_rope, rms_norm_backward):
        patch.object(module, "multiprocessors", lambda device: 1).start()
    patch.object(matvec, "dependent_launch_on", lambda device: False).start()
    torch.manual_seed(0)
    wrong = []
    for dtype, limit in LIMIT.items():
        for name, got, wanted in (*sums(dtype), *rotations(dtype), *gradients(dtype), *tokens(dtype)):
            error = float((got.double() - wanted).abs().max() / wanted.abs().max())
            if not error <= limit:
                wrong.append(f"{dtype} {name}: off by {error:.2g}, limit {limit:g}")
    sys.exit("\n".join(wrong) or None)


if __name__ == "__main__":
    main()
