"""The weights that the gate judges models on: random ones under which every mistake shows, quiet and loud."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from qwen3bench.config.model_config import ModelConfig
from qwen3bench.model.checkpoint import EMBEDDING, HEAD
from qwen3bench.model.weights import load_weights

# Size of large activations: beyond what float16 holds; where that is the dtype the largest of them come near its limit.
_LOUDNESS = {torch.float16: 2.0**11}
_LOUDNESS_OTHERWISE = 2.0**20


def loudness(dtype: torch.dtype) -> float:
    """How large activations are made for models in `dtype`."""
    return _LOUDNESS.get(dtype, _LOUDNESS_OTHERWISE)


def sensitized(config: ModelConfig, device: torch.device, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Random float32 weights whose values `dtype` holds exactly, under which every part of the model shows.

    Query and key norms have gains around 3 in even layers and 0.7 in odd ones: attention is peaky in the first, where a
    wrong score shows, and flat in the second, where each key counts that is dropped. The residual stream, and queries
    and keys before their norms, are as small as √(10³ eps), where a wrong eps shows; each block adds about as much to
    the stream as it holds; values, gates and logits are of order 1; no gain is 1.
    """
    weights = load_weights("random", config, device=device, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    small = _small(config)
    width = config.emb_dim
    deviation = {
        EMBEDDING: small,
        "q_proj.weight": small / math.sqrt(width),
        "k_proj.weight": small / math.sqrt(width),
        "v_proj.weight": 1 / math.sqrt(width),
        "o_proj.weight": small / math.sqrt(config.num_heads * config.head_dim),
        "gate_proj.weight": 2 / math.sqrt(width),
        "up_proj.weight": 1 / math.sqrt(width),
        "down_proj.weight": small / math.sqrt(config.hidden_dim),
    }
    for name, tensor in weights.items():
        if name == HEAD:
            continue
        if name.endswith("norm.weight"):
            gain = torch.rand(tensor.shape, generator=generator) + 0.5
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                gain *= 0.7 if int(name.split(".")[2]) % 2 else 3
            elif name == "model.norm.weight":
                gain /= small * math.sqrt(width)
            tensor.copy_(gain)
        else:
            part = next(part for part in deviation if name.endswith(part))
            tensor.mul_(deviation[part] / tensor.std())
        tensor.copy_(tensor.to(dtype))
    return weights


def loud(weights: Mapping[str, Tensor], config: ModelConfig, size: float) -> dict[str, Tensor]:
    """Copies of sensitized weights, times powers of two: activations and logits are about as large as `size`.

    What enters and leaves attention and the feed-forward is, and so is the stream; the gated product, whose largest
    numbers are forty times the usual, and the logits are a fourth of it. Gates and ups take turns, layer by layer.
    """
    small = _small(config)
    factors = {
        "q_proj.weight": size / small,
        "k_proj.weight": size / small,
        "v_proj.weight": size,
        "o_proj.weight": 1 / small,
        "down_proj.weight": 4 / small,
        "model.norm.weight": size / 4,
    }
    found = converted(weights, next(iter(weights.values())).dtype)
    for name, tensor in found.items():
        for part, factor in factors.items():
            if name.endswith(part):
                tensor.mul_(_power_of_two(factor))
    for layer in range(config.num_layers):
        part = ("gate", "up")[layer % 2]
        found[f"model.layers.{layer}.mlp.{part}_proj.weight"].mul_(_power_of_two(size / 4))
    return found


def converted(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Copies in `dtype`, laid out as the weights are: what shares a storage still does."""
    storages: dict[int, Tensor] = {}
    for tensor in weights.values():
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            flat = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage)
            storages[storage.data_ptr()] = flat.to(dtype, copy=True)
    return {
        name: storages[tensor.untyped_storage().data_ptr()].as_strided(
            tensor.shape, tensor.stride(), tensor.storage_offset()
        )
        for name, tensor in weights.items()
    }


def _small(config: ModelConfig) -> float:
    """The size of what a wrong eps shows in."""
    return math.sqrt(1e3 * config.rms_norm_eps)


def _power_of_two(factor: float) -> float:
    return 2.0 ** round(math.log2(factor))
