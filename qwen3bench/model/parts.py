"""The parts that a Qwen3 model is assembled from. An optimization is a function from Parts to Parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from qwen3bench.config.model_config import ModelConfig
from qwen3bench.model.attention import Attend, Mask
from qwen3bench.model.loss import Loss

Heads = tuple[Tensor, Tensor, Tensor]  # queries, keys, values
HeadNorms = tuple[nn.Module, nn.Module]  # of queries, of keys
Angles = tuple[Tensor, Tensor]  # cosine and sine


class Rope(Protocol):
    """How queries, keys and values are made ready for attention: head norms, rotation, the write into the cache."""

    def __call__(
        self, projected: Heads, norms: HeadNorms, angles: Angles, cache: tuple[Tensor, Tensor] | None, start: int
    ) -> Heads:
        """Queries (b, h, t, d), keys and values (b, g, s, d) of what was projected, (b, t, heads, d) each.

        `norms`: of queries and keys. `angles`: cosine and sine of the positions from `start` on, (t, d) each. `cache`
        holds keys and values (b, g, capacity, d), filled before `start`; the new ones are written in. What was
        projected may be written over where no gradient is asked for.
        """


class Residual(Protocol):
    """How the residual stream, (b, t, e), is added to and then normed. The stream is a tensor, or what `add` makes."""

    def add(self, x: Tensor, change: Tensor) -> Any:
        """The stream x + change. Both may be written over when it is normed, where no gradient is asked for."""

    def norm(self, stream: Any, norm: nn.Module) -> tuple[Tensor, Tensor]:
        """The stream as a tensor, and its norm."""

    def last(self, stream: Any, positions: int) -> Any:
        """The stream at the last so many positions; 0 means all."""


@dataclass(frozen=True)
class Parts:
    """What the builder puts together; `BASELINE_PARTS` are those that an optimization is given."""

    block: Callable[[ModelConfig, Parts], nn.Module]
    attention: Callable[[ModelConfig, Parts], nn.Module]
    rope: Rope
    attend: Attend
    mask: Mask
    norm: Callable[[int, float], nn.Module]
    residual: Residual
    mlp: Callable[[ModelConfig], nn.Module]
    head: Callable[[nn.Embedding], nn.Linear]
    loss: Loss
    recomputed: Callable[[int], bool]  # of a block's number: whether backward computes it again
