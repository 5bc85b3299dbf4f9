"""The layers of Qwen3 in plain PyTorch operations: the baseline that every optimization replaces a part of.

Shapes: b sequences, t new tokens, s keys (cached and new), e = emb_dim, h query heads, g key/value heads, d = head_dim.
Source: Qwen3 Technical Report (arXiv:2505.09388); module names follow the document that this project starts from.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen3bench.config.model_config import ModelConfig
from qwen3bench.model.parts import Angles, HeadNorms, Heads, Parts


class Linear(nn.Linear):
    """nn.Linear; on `meta`, where there is nothing to fill, it spares PyTorch the seconds of finding out how."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class Embedding(nn.Embedding):
    """nn.Embedding, as `Linear` is nn.Linear."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


def separate_head(tok_emb: nn.Embedding) -> nn.Linear:
    """An output projection (e → vocabulary) with a weight of its own."""
    return Linear(tok_emb.embedding_dim, tok_emb.num_embeddings, bias=False)


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv:1910.07467) in elementary operations, computed in float32 or wider.

    Input and output (…, dim), in the input's dtype.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean_square = wide.pow(2).mean(dim=-1, keepdim=True)
        return (wide * torch.rsqrt(mean_square + self.eps) * self.weight).to(x.dtype)

    def _get_name(self) -> str:
        return "RMSNorm"


class FeedForward(nn.Module):
    """SwiGLU (arXiv:2002.05202): fc3(SiLU(fc1 x) · fc2 x), from (b, t, e) to (b, t, e)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.emb_dim, config.hidden_dim, bias=False)
        self.fc2 = Linear(config.emb_dim, config.hidden_dim, bias=False)
        self.fc3 = Linear(config.hidden_dim, config.emb_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(F.silu(self.fc1(x)) * self.fc2(x))

    def _get_name(self) -> str:
        return "FeedForward"


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (arXiv:2104.09864) of x (b, heads, t, d), its halves as pairs; cos and sin (t, d)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def separate_rope(
    projected: Heads, norms: HeadNorms, angles: Angles, cache: tuple[Tensor, Tensor] | None, start: int
) -> Heads:
    """Norms, rotation and the write into the cache, each by itself: see `Rope`."""
    queries, keys = (
        apply_rope(norm(heads).transpose(1, 2), *angles) for norm, heads in zip(norms, projected, strict=False)
    )
    values = projected[2].transpose(1, 2)
    if cache is None:
        return queries, keys, values
    end = start + queries.shape[2]
    for new, stored in ((keys, cache[0]), (values, cache[1])):
        stored[:, :, start:end] = new
    return queries, cache[0][:, :, :end], cache[1][:, :, :end]


class SeparateResidual:
    """The sum and the norm after it, each by itself: see `Residual`."""

    def add(self, x: Tensor, change: Tensor) -> Tensor:
        return x + change

    def norm(self, stream: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
        return stream, norm(stream)

    def last(self, stream: Tensor, positions: int) -> Tensor:
        return stream[:, -positions:]


class GroupedQueryAttention(nn.Module):
    """Grouped-query attention (arXiv:2305.13245) with a norm on each query and key head, (b, t, e) to (b, t, e)."""

    def __init__(self, config: ModelConfig, parts: Parts) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.W_query = Linear(config.emb_dim, config.num_heads * config.head_dim, bias=False)
        self.W_key = Linear(config.emb_dim, config.num_kv_heads * config.head_dim, bias=False)
        self.W_value = Linear(config.emb_dim, config.num_kv_heads * config.head_dim, bias=False)
        self.out_proj = Linear(config.num_heads * config.head_dim, config.emb_dim, bias=False)
        self.q_norm = parts.norm(config.head_dim, config.rms_norm_eps)
        self.k_norm = parts.norm(config.head_dim, config.rms_norm_eps)
        self.rope = parts.rope
        self.attend = parts.attend
        self.mask_scores = parts.mask.apply

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (b, t, h·d), keys and values (b, t, g·d) of x (b, t, e)."""
        return self.W_query(x), self.W_key(x), self.W_value(x)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        cache: tuple[Tensor, Tensor] | None = None,
        start: int = 0,
    ) -> Tensor:
        """`cache` holds keys and values (b, g, capacity, d), filled before `start`; the new ones are written in."""
        queries, keys, values = (y.unflatten(-1, (-1, self.head_dim)) for y in self.project(x))  # (b, t, heads, d)
        norms = self.q_norm, self.k_norm
        queries, keys, values = self.rope((queries, keys, values), norms, (cos, sin), cache, start)
        context = self.attend(queries, keys, values, mask, self.mask_scores)  # (b, h, t, d)
        return self.out_proj(context.transpose(1, 2).flatten(-2))

    def _get_name(self) -> str:
        return "GroupedQueryAttention"


class TransformerBlock(nn.Module):
    """One pre-norm decoder block, from the residual stream (b, t, e) to the stream (see `Residual`)."""

    def __init__(self, config: ModelConfig, parts: Parts) -> None:
        super().__init__()
        self.att = parts.attention(config, parts)
        self.ff = parts.mlp(config)
        self.norm1 = parts.norm(config.emb_dim, config.rms_norm_eps)
        self.norm2 = parts.norm(config.emb_dim, config.rms_norm_eps)
        self.residual = parts.residual

    def forward(
        self,
        stream: Any,
        mask: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        cache: tuple[Tensor, Tensor] | None = None,
        start: int = 0,
    ) -> Any:
        x, normed = self.residual.norm(stream, self.norm1)
        return self.after_norm1(x, normed, mask, cos, sin, cache, start)

    def after_norm1(
        self,
        x: Tensor,
        normed: Tensor,
        mask: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        cache: tuple[Tensor, Tensor] | None = None,
        start: int = 0,
    ) -> Any:
        """The rest of the block, `normed` being norm1(x): where a `Region` of compiled code begins."""
        stream = self.residual.add(x, self.att(normed, mask, cos, sin, cache, start))
        x, normed = self.residual.norm(stream, self.norm2)
        return self.residual.add(x, self.ff(normed))

    def is_whole(self, stream: Any, cache: tuple[Tensor, Tensor] | None) -> bool:
        """Whether `forward` does a call as one, so that compiled code takes the block with its first norm."""
        return False

    def _get_name(self) -> str:
        return "TransformerBlock"
