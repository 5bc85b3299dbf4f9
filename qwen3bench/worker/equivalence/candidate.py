"""What the gate judges: how a model is built from weights, and how its logits are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qwen3bench.config.choices import options_of
from qwen3bench.config.model_config import ModelConfig
from qwen3bench.model.build import filled, skeleton
from qwen3bench.model.cache import KVCache
from qwen3bench.model.checkpoint import EMBEDDING
from qwen3bench.worker.equivalence.cases import Case, Pass

Weights = dict[str, Tensor]
Build = Callable[[Weights, torch.dtype], Any]
NewCache = Callable[[Any, int, int], Any]  # of a model, for so many sequences and positions
Rope = tuple[Tensor, Tensor]  # cosine and sine, (context length, head size) each
Options = Mapping[str, Mapping[str, Any]]

# Errors that are the caller's to handle: nothing is known of a model for which memory or the device failed.
FATAL = (torch.cuda.OutOfMemoryError, torch.AcceleratorError)


@dataclass(frozen=True)
class BuiltCandidate:
    """A candidate's models on one set of weights."""

    model: Any
    new_cache: NewCache | None
    fallback: Any = None

    def logits(self, case: Case, prompts: Sequence[Tensor], rows: slice) -> Iterator[tuple[Pass, Tensor]]:
        """The logits of each pass over some rows of the prompts. Raises what the model raises."""
        return _logits(self.model, self.new_cache, case, prompts, rows)

    def fallback_logits(self, case: Case, prompts: Sequence[Tensor], rows: slice) -> Iterator[tuple[Pass, Tensor]]:
        """As `logits`, of the fallback."""
        return _logits(self.fallback, self.new_cache, case, prompts, rows)


@dataclass(frozen=True)
class Candidate:
    """A model to judge: `build(weights, dtype)` makes it from weights with Hugging Face's names.

    It is called as `model(tokens)` for logits (b, t, vocabulary), as `model(tokens, None, 0, 1)` for the last token's
    and, where `new_cache(model, batch_size, capacity)` is given, as `model(tokens, cache, start)`; without it only
    prefill is judged. It is built on several sets of weights, some with fewer rows of the vocabulary. These hold one
    matrix as embedding and head where `tied`, else two. `fallback` makes the
    model for cases that the first refuses and no workload asks for. `rope`: the rotary tables of its reference in
    float64, where the model's angles are other numbers by design.
    """

    build: Build
    new_cache: NewCache | None = None
    fallback: Build | None = None
    tied: bool = False
    rope: Rope | None = None

    def takes(self, case: Case) -> bool:
        """Whether a case is judged of it."""
        return self.new_cache is not None or not (case.capacity or any(each.last for each in case.passes))

    def built(self, weights: Weights, dtype: torch.dtype) -> BuiltCandidate:
        """Its models on these weights."""
        model = self.build(weights, dtype)
        fallback = self.fallback(weights, dtype) if self.fallback is not None else None
        return BuiltCandidate(model, self.new_cache, fallback)


def cell_candidate(cell: tuple[str, ...], whole: ModelConfig, layers: Sequence[int], opts: Options) -> Candidate:
    """A cell of ours: these layers of the whole model, each made as it is there.

    `opts` holds the options of each optimization by name. They may allow less than the default ones: FlashAttention
    and cuDNN refuse float32, and explicit masks or single keys. The fallback has the default options.
    """

    def build(opts: Options) -> Build:
        def build_layers(weights: Weights, dtype: torch.dtype) -> Any:
            model = skeleton(whole, {name: opts.get(name, {}) for name in cell})
            model.trf_blocks = nn.ModuleList(model.trf_blocks[layer] for layer in layers)
            model.config = replace(whole, num_layers=len(layers), vocab_size=len(weights[EMBEDDING]))
            return filled(model, weights)

        return build_layers

    has_options = any(opts[name] != options_of("opt", name) for name in cell if opts.get(name))
    return Candidate(build(opts), kv_cache, build({}) if has_options else None, tied="tie" in cell)


def kv_cache(model: Any, batch_size: int, capacity: int) -> KVCache:
    """A cache for `model`, whose positions hold 3 until they are filled: read too early, they show."""
    weight = model.tok_emb.weight
    cache = KVCache(model.config, batch_size, capacity, weight.device, weight.dtype)
    for stored in (cache.keys, cache.values):
        stored.fill_(3)
    return cache


def _logits(
    model: Any, new_cache: NewCache | None, case: Case, prompts: Sequence[Tensor], rows: slice
) -> Iterator[tuple[Pass, Tensor]]:
    """The logits (b, t, vocabulary) of each pass.

    As in a timed pass, forwards of one size are given one tensor, with other tokens in it: a result kept from an
    earlier one shows.
    """
    given: dict[torch.Size, Tensor] = {}
    cache = None
    for each in case.passes:
        tokens = prompts[each.prompt][rows]
        if case.capacity and cache is None and new_cache is not None:
            cache = new_cache(model, len(tokens), case.capacity)
        start, found = each.start, []
        for number, chunk in enumerate(tokens[:, start : start + sum(each.chunks)].split(list(each.chunks), dim=1)):
            chunk = given.setdefault(chunk.shape, torch.empty_like(chunk)).copy_(chunk)
            if each.last and number == 0:
                logits = model(chunk, cache, start, 1)
            elif cache is None:
                logits = model(chunk)
            else:
                logits = model(chunk, cache, start)
            found.append(logits)
            start += chunk.shape[1]
        yield each, found[0] if len(found) == 1 else torch.cat(found, dim=1)
