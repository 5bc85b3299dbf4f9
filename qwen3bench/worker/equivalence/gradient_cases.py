"""What gradients are taken of: a model, weights and tokens under which every mistake shows; and how they are taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qwen3bench.config.model_config import ModelConfig
from qwen3bench.model.build import hf_names
from qwen3bench.model.checkpoint import EMBEDDING, HEAD
from qwen3bench.model.decoder import Decoder
from qwen3bench.model.loss import IGNORED
from qwen3bench.worker.equivalence.judged_weights import converted
from qwen3bench.worker.training import adamw

Gradients = dict[str, Tensor]  # by Hugging Face's name; of a tied model none of the head
Weights = Mapping[str, Tensor]

LAYERS = 3
VOCABULARY = 4096  # rows that are judged; a kernel sees that it is no multiple of its tile where the model's is none
SEQUENCES = 3
# Multiples of no tile. On CUDA a kernel for gradients has more rows of them than all its programs take at once.
TOKENS = {"cuda": 397, "cpu": 67}
STEP_TOKENS = 19  # of the one sequence that is trained on
UPSTREAM = 0.7  # the gradient of what is made of the loss: a backward that ignores it shows
STEPS = (1, 20)
STEP_SIZE = 1e-3  # far above rounding


@dataclass(frozen=True)
class Precision:
    """The dtype of the weights, and whether the forward runs under autocast to bfloat16."""

    name: str
    dtype: torch.dtype
    autocast: bool = False

    def context(self, device: torch.device) -> AbstractContextManager[Any]:
        """The context of a forward."""
        return torch.autocast(device.type, torch.bfloat16) if self.autocast else nullcontext()


PRECISIONS = {
    "fp64": Precision("float64", torch.float64),
    "fp32": Precision("float32", torch.float32),
    "bf16": Precision("bf16", torch.bfloat16),
    "amp": Precision("amp", torch.float32, autocast=True),
}


@dataclass(frozen=True)
class Batch:
    """Tokens and targets (b, t), some of which do not count."""

    tokens: Tensor
    targets: Tensor

    @property
    def counted(self) -> int:
        """How many targets count."""
        return int((self.targets != IGNORED).sum())

    def halves(self) -> Iterator[tuple[Batch, float]]:
        """The first sequence and the others, each with its share of what counts."""
        for rows in (slice(0, 1), slice(1, None)):
            half = Batch(self.tokens[rows], self.targets[rows])
            yield half, half.counted / self.counted


def judged_config(config: ModelConfig, device: torch.device) -> ModelConfig:
    """The shape that is judged: few layers, so many rows of the vocabulary, and a context for its tokens."""
    return replace(
        config,
        num_layers=min(config.num_layers, LAYERS),
        vocab_size=min(config.vocab_size, VOCABULARY - 1),
        context_length=min(config.context_length, TOKENS[device.type]),
    )


def judged_batch(config: ModelConfig, device: torch.device, seed: int) -> Batch:
    """Random tokens, each to tell the next; the end of one sequence and a few places do not count."""
    generator = torch.Generator().manual_seed(seed)
    length = config.context_length
    ids = torch.randint(config.vocab_size, (SEQUENCES, length + 1), generator=generator)
    targets = ids[:, 1:].clone()
    targets[1, length // 2 :] = IGNORED
    targets[2, ::5] = IGNORED
    return Batch(ids[:, :-1].contiguous().to(device), targets.to(device))


def weights_in(weights: Weights, dtype: torch.dtype, tied: bool) -> dict[str, Tensor]:
    """Copies in `dtype`; the head is the embedding where `tied`, else another matrix."""
    found = converted({name: tensor for name, tensor in weights.items() if name != HEAD}, dtype)
    found[HEAD] = found[EMBEDDING] if tied else found[EMBEDDING].flip(0)
    return found


def whole(model: Decoder, batch: Batch, context: Callable[[], AbstractContextManager[Any]]) -> Gradients:
    """The gradients of one backward pass over the batch."""
    return _taken(model, [(batch, 1.0)], context)


def accumulated(model: Decoder, batch: Batch, context: Callable[[], AbstractContextManager[Any]]) -> Gradients:
    """The gradients of two backward passes, over each half of the batch, that add up."""
    return _taken(model, list(batch.halves()), context)


def trained(model: Decoder, batch: Batch, steps: int) -> Gradients:
    """How far so many steps of AdamW move each parameter, on the beginning of one sequence."""
    names = _names(model)
    parameters = dict(model.requires_grad_(True).named_parameters())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = adamw(parameters.values())
    for group in optimizer.param_groups:
        group["lr"] = STEP_SIZE
    for _ in range(steps):
        with torch.enable_grad():
            model.loss(batch.tokens[:1, :STEP_TOKENS], batch.targets[:1, :STEP_TOKENS]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {names[name]: (p.detach() - before[name]).double() for name, p in parameters.items()}


class MissingGradient(Exception):
    """A parameter without a gradient, or with one that is not finite."""


def _taken(
    model: Decoder, parts: list[tuple[Batch, float]], context: Callable[[], AbstractContextManager[Any]]
) -> Gradients:
    names = _names(model)
    model.requires_grad_(True).zero_grad()
    for batch, share in parts:
        with torch.enable_grad():
            with context():
                loss = model.loss(batch.tokens, batch.targets)
            (loss * (UPSTREAM * share)).backward()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            raise MissingGradient(f"{names[name]} gets no gradient")
        if not bool(torch.isfinite(parameter.grad).all()):
            raise MissingGradient(f"the gradient of {names[name]} is not finite")
        found[names[name]] = parameter.grad.double()
    model.zero_grad()
    return found


def _names(model: Decoder) -> dict[str, str]:
    """Hugging Face's name of each parameter."""
    ours = {f"{module}.weight": theirs for module, theirs in hf_names(model.config).items()}
    names = {**ours, **model.checkpoint_names}
    return {name: names[name] for name, _ in model.named_parameters()}
