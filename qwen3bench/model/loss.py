"""The loss of a training step: cross-entropy of the next token, and which blocks keep their activations."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100  # a target that does not count (F.cross_entropy's default)


class Loss(Protocol):
    """How states become a loss. `compiles`: whether `torch.compile` takes it, or it is kernels of its own already.

    `at_once`: how many tokens go through the head together; None where all do.
    """

    @property
    def compiles(self) -> bool: ...
    @property
    def at_once(self) -> int | None: ...

    def __call__(self, head: nn.Linear, states: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy, in float32 or wider, of normed states (b, t, e) against targets (b, t)."""


class CrossEntropy:
    """The logits of the whole batch, then their cross-entropy, computed in float32 or wider."""

    compiles: bool = True
    at_once: int | None = None

    def __call__(self, head: nn.Linear, states: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(head(states), targets)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean over targets (b, t) that count, of logits (b, t, vocabulary)."""
    wide = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, targets.flatten(), ignore_index=IGNORED)


def keep_activations(block: int) -> bool:
    """Whether the block of this number is computed again in backward: none is."""
    return False
