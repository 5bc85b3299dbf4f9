"""The Qwen3 decoder, assembled from Parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qwen3bench.config.model_config import ModelConfig
from qwen3bench.model.cache import KVCache
from qwen3bench.model.compiled import CompiledModel, Training, has_whole_calls, regions_of, shared_forward
from qwen3bench.model.decoder import Compile, Decoder, Forward
from qwen3bench.model.gradients import is_trained, refuse_shared, refuse_unreached, watch
from qwen3bench.model.layers import Embedding
from qwen3bench.model.parts import Parts


def rope_tables(config: ModelConfig, device: torch.device | str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's rotation angles, (context_length, d) each (arXiv:2104.09864).

    Computed in float64, so that the only rounding is the one to `dtype`.
    """
    if torch.device(device).type == "meta":  # arithmetic there makes PyTorch import its compiler, which takes seconds
        cos, sin = torch.empty(2, config.context_length, config.head_dim, device=device, dtype=dtype)
        return cos, sin
    exponents = torch.arange(0, config.head_dim, 2, device="cpu", dtype=torch.float64) / config.head_dim
    positions = torch.arange(config.context_length, device="cpu", dtype=torch.float64)
    angles = torch.outer(positions, config.rope_base**-exponents)
    return angles.cos().to(device, dtype).repeat(1, 2), angles.sin().to(device, dtype).repeat(1, 2)


class Qwen3Model(Decoder):
    """A decoder-only transformer: token ids (b, t) to logits (b, t, vocabulary).

    Raises ValueError where the tokens run past the context length. Asked for gradients, it raises `UserError` where a
    parameter would get none without a word, and where another model holds the same weights and would be trained too.
    """

    cos: Tensor
    sin: Tensor
    may_train_shared = False  # whoever lets several models train one set of weights puts it back between them

    def __init__(self, config: ModelConfig, parts: Parts) -> None:
        super().__init__()
        self.config = config
        self.parts = parts
        self.tok_emb = Embedding(config.vocab_size, config.emb_dim)
        self.trf_blocks = nn.ModuleList(parts.block(config, parts) for _ in range(config.num_layers))
        self.final_norm = parts.norm(config.emb_dim, config.rms_norm_eps)
        self.out_head = parts.head(self.tok_emb)
        self.register_buffer("cos", None, persistent=False)
        self.register_buffer("sin", None, persistent=False)
        self._reached = False  # once backward was seen to reach all that is trained
        watch(self)

    def requires_grad_(self, requires_grad: bool = True) -> Qwen3Model:
        self._reached = False
        super().requires_grad_(requires_grad)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        watch(self)

    def forward(self, tokens: Tensor, cache: KVCache | None = None, start: int = 0, logits_to_keep: int = 0) -> Tensor:
        """Logits of `tokens`, the first of which stands at position `start` after what `cache` holds.

        `logits_to_keep` > 0 computes only the last that many positions' logits.
        """
        return self.out_head(self._states([*self.trf_blocks], (), tokens, cache, start, logits_to_keep))

    def states(self, tokens: Tensor) -> Tensor:
        return self._states([*self.trf_blocks], (), tokens)

    def loss_of(self, states: Tensor, targets: Tensor) -> Tensor:
        return self.parts.loss(self.out_head, states, targets)

    def compiled(self, compile_: Compile) -> CompiledModel:
        """Its regions compiled; its blocks where these cannot be cut, and for calls that they do as one; the loss."""
        blocks = list(self.trf_blocks)
        regions = regions_of(blocks, self.final_norm)
        by_region = _calls(compile_, regions)
        by_block = _calls(compile_, blocks) if not regions or has_whole_calls(blocks[0]) else []
        states = partial(self._states, by_block, by_region)
        states_of_one = partial(self._states, by_block[:1], by_region[:1])

        @cache
        def loss() -> Forward:  # compiled where it is asked for, as inference does not
            return compile_(self.parts.loss.__call__) if self.parts.loss.compiles else self.parts.loss

        def through(states: Callable[..., Tensor], *given: Any, **named: Any) -> Tensor:
            return self.out_head(states(*given, **named))

        def loss_of(found: Tensor, targets: Tensor) -> Tensor:
            of_batch: Tensor = loss()(self.out_head, found, targets)
            return of_batch

        training = Training(states, loss_of)
        return CompiledModel(self, partial(through, states), partial(through, states_of_one), training)

    def first_block_alone(self) -> Forward:
        def run(*given: Any, **named: Any) -> Tensor:
            return self.out_head(self._states([self.trf_blocks[0]], (), *given, **named))

        return run

    def _states(
        self,
        by_block: Sequence[Forward],
        by_region: Sequence[Forward],
        tokens: Tensor,
        cache: KVCache | None = None,
        start: int = 0,
        logits_to_keep: int = 0,
    ) -> Tensor:
        """The normed last states, of which logits are made.

        Through the regions, where there are any and the blocks do not do this call as one.
        """
        trained = torch.is_grad_enabled() and not torch.compiler.is_compiling() and is_trained(self)
        if trained and not self.may_train_shared:
            refuse_shared(self)
        states = self._through(by_block, by_region, tokens, cache, start, logits_to_keep)
        if trained and not self._reached:
            refuse_unreached(self, states, apart=[self.out_head])
            self._reached = True
        return states

    def _through(
        self,
        by_block: Sequence[Forward],
        by_region: Sequence[Forward],
        tokens: Tensor,
        cache: KVCache | None,
        start: int,
        logits_to_keep: int,
    ) -> Tensor:
        x, shared, layers = self._before_blocks(tokens, cache, start)
        first: Any = self.trf_blocks[0]
        if by_region and not (by_block and first.is_whole(x, layers[0])):
            normed = first.norm1(x)
            for region, layer in zip(self._recomputing(by_region), layers, strict=False):
                x, normed = region(x, normed, *shared, layer, start)
            return normed[:, -logits_to_keep:].contiguous()  # a product of rows far apart is slow on CUDA
        stream: Any = x
        for block, layer in zip(self._recomputing(by_block), layers, strict=False):
            stream = block(stream, *shared, layer, start)
        residual = self.parts.residual
        return residual.norm(residual.last(stream, logits_to_keep), self.final_norm)[1]

    def _recomputing(self, blocks: Sequence[Forward]) -> Iterator[Forward]:
        """The blocks, those that are to be so computed again in backward, where there is one."""
        for number, block in enumerate(blocks):
            again = torch.is_grad_enabled() and self.parts.recomputed(number)
            # Nothing is random in a block, and its generator's state could not be read while a graph is captured.
            yield partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False) if again else block

    def _before_blocks(
        self, tokens: Tensor, cache: KVCache | None, start: int
    ) -> tuple[Tensor, tuple[Any, ...], list[Any]]:
        """The embedded tokens; mask, cosine and sine, which are every block's; and each layer's keys and values."""
        end = start + tokens.shape[1]
        if end > self.config.context_length:
            raise ValueError(f"{end} tokens are more than the context of {self.config.context_length}")
        x = self.tok_emb(tokens)
        mask = self.parts.attend.mask(self.parts.mask, tokens.shape[1], start, x.device, x.dtype)
        layers = [None if cache is None else cache.layer(index) for index in range(self.config.num_layers)]
        return x, (mask, self.cos[start:end], self.sin[start:end]), layers


def _calls(compile_: Compile, modules: Sequence[nn.Module]) -> list[Forward]:
    """The compiled call of each of these modules."""
    if not modules:
        return []
    run = compile_(shared_forward(modules))
    return [partial(run, module) for module in modules]
