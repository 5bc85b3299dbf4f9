"""`qkv`: one product for queries, keys and values, over one stored weight (gpt-fast's wqkv).

Beyond the five: off until it is named. It pays where products are small, as in decoding one token.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from qwen3bench.config.model_config import ModelConfig
from qwen3bench.model.layers import GroupedQueryAttention
from qwen3bench.model.parts import Parts
from qwen3bench.model.stack import StackedLinears


class FusedProjectionAttention(GroupedQueryAttention, StackedLinears):
    """Attention whose three input projections are one product."""

    def __init__(self, config: ModelConfig, parts: Parts) -> None:
        super().__init__(config, parts)
        self.stack("W_query", "W_key", "W_value")

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        queries, keys, values = self.products(x)
        return queries, keys, values


def apply(parts: Parts) -> Parts:
    """The parts with one product for queries, keys and values."""
    return replace(parts, attention=FusedProjectionAttention)
