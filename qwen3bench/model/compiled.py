"""A model that runs compiled code, and what torch.compile is given of it.

That is from behind a block's first norm to behind the next block's: see `Region`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from qwen3bench.model.cache import KVCache
from qwen3bench.model.decoder import Compile, Decoder, Forward
from qwen3bench.model.layers import TransformerBlock


class Training(NamedTuple):
    """What a training step runs of a model, called as a Decoder's methods of these names are."""

    states: Forward
    loss_of: Forward


class CompiledModel(Decoder):
    """A model that runs compiled code; `original` is the same model in eager, and stays as it was."""

    def __init__(
        self, original: Decoder, run: Forward, run_first_block: Forward, training: Training | None = None
    ) -> None:
        """`run` and `run_first_block` are called as a Decoder is."""
        super().__init__()
        self.config, self.tok_emb, self.out_head = original.config, original.tok_emb, original.out_head
        self.is_peer = original.is_peer
        self._original = original
        self._run = run
        self._run_first_block = run_first_block
        self._training = training or Training(original.states, original.loss_of)

    @property
    def original(self) -> Decoder:
        return self._original

    def forward(self, tokens: Tensor, cache: KVCache | None = None, start: int = 0, logits_to_keep: int = 0) -> Tensor:
        logits: Tensor = self._run(tokens, cache, start, logits_to_keep)
        return logits

    def states(self, tokens: Tensor) -> Tensor:
        states: Tensor = self._training.states(tokens)
        return states

    def loss_of(self, states: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = self._training.loss_of(states, targets)
        return loss

    def compiled(self, compile_: Compile) -> Decoder:
        return self._original.compiled(compile_)

    def first_block_alone(self) -> Forward:
        return self._run_first_block


class Region(nn.Module):
    """A block without its first norm, and the norm that follows the block.

    A block ends with a sum and the next begins with a norm of it. Compiled block by block these take two kernels; a
    region that ends with the norm fuses them, as a compiler that is given the whole model does.
    """

    def __init__(self, block: TransformerBlock, next_norm: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.next_norm = next_norm

    def forward(
        self,
        x: Tensor,
        normed: Tensor,
        mask: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        cache: tuple[Tensor, Tensor] | None = None,
        start: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """The block's output and its norm, both (b, t, e); `normed` is x after the block's first norm."""
        stream = self.block.after_norm1(x, normed, mask, cos, sin, cache, start)
        return self.block.residual.norm(stream, self.next_norm)


def regions_of(blocks: Sequence[nn.Module], final_norm: nn.Module) -> list[Region]:
    """The regions of these blocks, in order; none where a block has a forward or a hook that a region would skip.

    Blocks of a class that says which calls are whole have regions for the others.
    """
    plain = [block for block in blocks if isinstance(block, TransformerBlock) and _is_plain(block)]
    if len(plain) < len(blocks) or (any(map(has_whole_calls, plain)) and len(set(map(type, plain))) > 1):
        return []
    following = [block.norm1 for block in plain[1:]] + [final_norm]
    return [Region(block, norm) for block, norm in zip(plain, following, strict=True)]


def has_whole_calls(block: nn.Module) -> bool:
    """Whether the block's class does some calls as one, and says which."""
    return isinstance(block, TransformerBlock) and type(block).is_whole is not TransformerBlock.is_whole


def shared_forward(modules: Sequence[nn.Module]) -> Forward:
    """The function that each of these modules runs, to be called with the module first; hooks are part of it.

    Raises ValueError where one compilation cannot serve them all.
    """
    kinds = {type(module) for module in modules}
    if len(kinds) > 1 or not all(_runs(module, type(module).forward) for module in modules):
        raise ValueError(
            "its blocks do not all run the same code, and runtime=compile compiles one for all: "
            "give them one class, and that a forward"
        )
    return _call if any(map(_has_hooks, modules)) else kinds.pop().forward


def _call(module: nn.Module, *given: Any, **named: Any) -> Any:
    return module(*given, **named)


def _is_plain(block: TransformerBlock) -> bool:
    forward = type(block).forward if has_whole_calls(block) else TransformerBlock.forward
    return not _has_hooks(block) and _runs(block, forward)


def _runs(module: nn.Module, forward: Forward) -> bool:
    """Whether `forward` is what the module runs: neither its class nor the module itself has another."""
    return getattr(module.forward, "__func__", None) is forward


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)  # PyTorch has no public way to ask
