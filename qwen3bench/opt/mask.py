"""`mask`: causality as a boolean mask in place of a float one, and beside fused attention without a tensor at all.

True means blocked, as in `masked_fill`. Beside fused attention is where it pays: FlashAttention refuses any explicit
mask.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qwen3bench.model.parts import Parts


class BooleanMask:
    """Causality as a boolean (t, s), True where a query may not attend."""

    implicit = True

    def dense(self, queries: int, start: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        return torch.ones((queries, start + queries), device=device, dtype=torch.bool).triu(diagonal=start + 1)

    def apply(self, scores: Tensor, mask: Tensor) -> Tensor:
        return scores.masked_fill(mask, float("-inf"))


def apply(parts: Parts) -> Parts:
    """The parts with a boolean mask."""
    return replace(parts, mask=BooleanMask())
