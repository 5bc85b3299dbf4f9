"""Scaled dot-product attention and the causal mask, in separate operations: the baseline of `flash` and `mask`.

Shapes as in `layers`: b sequences, h query heads, g key/value heads, t queries, s keys, d = head_dim. The first query
stands at position `start`, so query i may attend key j where j ≤ start + i.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

MaskScores = Callable[[Tensor, Tensor], Tensor]


class Mask(Protocol):
    """How causality is written down. `dense` makes the tensor, once a forward; `apply` puts it on the scores."""

    implicit: bool  # a fused attention kernel may be told of causality instead of being given a tensor

    def dense(self, queries: int, start: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The mask (t, s) with s = start + t."""

    def apply(self, scores: Tensor, mask: Tensor) -> Tensor:
        """The scores (b, h, t, s) with the blocked ones at −inf."""


class Attend(Protocol):
    """How queries meet keys. `mask` says what tensor it needs, once a forward; the call is made in each block."""

    def mask(self, mask: Mask, queries: int, start: int, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        """The mask that the call needs, or None where it needs none."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, mask_scores: MaskScores) -> Tensor:
        """The context (b, h, t, d) of q (b, h, t, d) over k and v (b, g, s, d)."""


class AdditiveMask:
    """Causality as numbers added to the scores: 0 where a query may attend, −inf where not."""

    implicit = False

    def dense(self, queries: int, start: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        blocked = torch.full((queries, start + queries), float("-inf"), device=device, dtype=dtype)
        return blocked.triu(diagonal=start + 1)

    def apply(self, scores: Tensor, mask: Tensor) -> Tensor:
        return scores + mask


class EagerAttention:
    """softmax(q kᵀ / √d + mask) v, each step an operation of its own, keys and values expanded to all heads."""

    def mask(self, mask: Mask, queries: int, start: int, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        return mask.dense(queries, start, device, dtype)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, mask_scores: MaskScores) -> Tensor:
        assert mask is not None
        group_size = q.shape[1] // k.shape[1]
        k = k.repeat_interleave(group_size, dim=1)
        v = v.repeat_interleave(group_size, dim=1)
        scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
        return torch.softmax(mask_scores(scores, mask), dim=-1) @ v
