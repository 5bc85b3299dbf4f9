"""The parts that a Qwen3 model is assembled from. An optimization is a function from Parts to Parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from qwen3bench.config.model_config import ModelConfig
from qwen3bench.model.attention import Attend, Mask
from qwen3bench.model.loss import Loss


@dataclass(frozen=True)
class Parts:
    """What the builder puts together; `BASELINE_PARTS` are those that an optimization is given."""

    block: Callable[[ModelConfig, Parts], nn.Module]
    attention: Callable[[ModelConfig, Parts], nn.Module]
    attend: Attend
    mask: Mask
    norm: Callable[[int, float], nn.Module]
    mlp: Callable[[ModelConfig], nn.Module]
    head: Callable[[nn.Embedding], nn.Linear]
    loss: Loss
    recomputed: Callable[[int], bool]  # of a block's number: whether backward computes it again
