"""The preallocated cache of keys and values that decoding reads."""

from __future__ import annotations

import torch
from torch import Tensor

from qwen3bench.config.model_config import ModelConfig


class KVCache:
    """Keys and values of every layer for `capacity` positions, allocated once: (layers, b, g, capacity, d) each."""

    def __init__(
        self, config: ModelConfig, batch_size: int, capacity: int, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        shape = (config.num_layers, batch_size, config.num_kv_heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, (b, g, capacity, d) each, as views."""
        return self.keys[index], self.values[index]

    @property
    def num_bytes(self) -> int:
        """What the cache occupies, in bytes."""
        return self.keys.nbytes + self.values.nbytes
