"""What the benchmark asks of any model: one call, its weights at the two ends, and how many it has."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from qwen3bench.config.model_config import ModelConfig
from qwen3bench.model.cache import KVCache
from qwen3bench.model.loss import cross_entropy

Forward = Callable[..., Any]
Compile = Callable[[Forward], Forward]  # from a function to compiled code that does the same


class Decoder(nn.Module):
    """A decoder-only transformer: token ids (b, t) to logits (b, t, vocabulary)."""

    config: ModelConfig
    tok_emb: nn.Embedding
    out_head: nn.Linear
    is_peer = False  # and compiled with the options for peers
    checkpoint_names: Mapping[str, str] = MappingProxyType({})  # Hugging Face's, of a peer's parameters

    @abstractmethod
    def forward(self, tokens: Tensor, cache: KVCache | None = None, start: int = 0, logits_to_keep: int = 0) -> Tensor:
        """Logits of `tokens`, the first of which stands at position `start` after what `cache` holds.

        `logits_to_keep` > 0 computes only the last that many positions' logits.
        """

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy of the targets (b, t), each the token after that of `tokens` (b, t)."""
        return self.loss_of(self.states(tokens), targets)

    @abstractmethod
    def states(self, tokens: Tensor) -> Tensor:
        """The normed last states (b, t, e), of which logits are made."""

    def loss_of(self, states: Tensor, targets: Tensor) -> Tensor:
        """The loss of normed last states (b, t, e)."""
        return cross_entropy(self.out_head(states), targets)

    @abstractmethod
    def compiled(self, compile_: Compile) -> Decoder:
        """A `CompiledModel` on the same weights; this model stays as it is.

        Raises ValueError where one compilation cannot serve the whole model.
        """

    @property
    def original(self) -> Decoder:
        """The model in eager: itself, unless it runs compiled code."""
        return self

    def first_block_alone(self) -> Forward:
        """The model's call without all blocks but the first, where it has blocks of ours."""
        return self

    @property
    def num_parameters(self) -> int:
        """Parameters stored; a shared tensor counts once."""
        return sum(p.numel() for p in self.parameters())

    @property
    def num_unique_parameters(self) -> int:
        """Parameters with the embedding and the output head counted once, stored twice or not."""
        twice = self.out_head.weight is not self.tok_emb.weight
        return self.num_parameters - (self.out_head.weight.numel() if twice else 0)

    @property
    def num_non_embedding_parameters(self) -> int:
        """Parameters of the blocks and the final norm."""
        return self.num_unique_parameters - self.tok_emb.weight.numel()

    @property
    def parameter_bytes(self) -> int:
        """What the stored parameters occupy, in bytes."""
        return sum(p.nbytes for p in self.parameters())
