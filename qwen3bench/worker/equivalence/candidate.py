"""What the gate judges: how a model is built from weights, and how its logits are asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwen3bench.config.choices import options_of
from qwen3bench.config.model_config import ModelConfig
from qwen3bench.model.build import build_model
from qwen3bench.model.cache import KVCache
from qwen3bench.worker.equivalence.cases import Case

Weights = dict[str, Tensor]
Build = Callable[[Weights, torch.dtype], Any]
NewCache = Callable[[Any, int, int], Any]  # of a model, for so many sequences and positions
Rope = tuple[Tensor, Tensor]  # cosine and sine, (context length, head size) each
Options = Mapping[str, Mapping[str, Any]]

# Errors that are the caller's to handle: nothing is known of a model for which memory or the device failed.
FATAL = (torch.cuda.OutOfMemoryError, torch.AcceleratorError)
_SPARE = 5  # positions of a cache that are never filled: what reads them is wrong


@dataclass(frozen=True)
class BuiltCandidate:
    """A candidate's models on weights of one dtype."""

    model: Any
    new_cache: NewCache | None
    fallback: Any = None

    def logits(self, case: Case, prompt: Tensor, strict: bool) -> tuple[Tensor, bool]:
        """The logits of a case, and whether they are the fallback's.

        `strict`: what a workload asks for must run by itself. Raises what the model raises.
        """
        try:
            return _logits(self.model, prompt, case, self.new_cache), False
        except FATAL:
            raise
        except Exception:
            if self.fallback is None or (strict and case.usual):
                raise
        return _logits(self.fallback, prompt, case, self.new_cache), True


@dataclass(frozen=True)
class Candidate:
    """A model to judge: `build(weights, dtype)` makes it from weights with Hugging Face's names.

    It is called as `model(tokens)` for logits (b, t, vocabulary), as `model(tokens, None, 0, 1)` for the last token's
    and, where `new_cache(model, batch_size, capacity)` is given, as `model(tokens, cache, start)`; without it only
    prefill is judged. The weights hold one matrix as embedding and head where `tied`, else two. `fallback` makes the
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
        return self.new_cache is not None or not (case.chunks or case.keep)

    def built(self, weights: Weights, dtype: torch.dtype) -> BuiltCandidate:
        """Its models on these weights."""
        model = self.build(weights, dtype)
        fallback = self.fallback(weights, dtype) if self.fallback is not None else None
        return BuiltCandidate(model, self.new_cache, fallback)


def cell_candidate(cell: tuple[str, ...], config: ModelConfig, opts: Options) -> Candidate:
    """A cell of ours, `opts` holding the options of each optimization by name.

    Options may allow less than the default ones: FlashAttention and cuDNN refuse float32, and explicit masks or single
    keys. The fallback has the default options.
    """

    def build(opts: Options) -> Build:
        return lambda weights, dtype: build_model(config, {name: opts.get(name, {}) for name in cell}, weights)

    has_options = any(opts[name] != options_of("opt", name) for name in cell if opts.get(name))
    return Candidate(build(opts), kv_cache, build({}) if has_options else None, tied="tie" in cell)


def kv_cache(model: Any, batch_size: int, capacity: int) -> KVCache:
    """A cache for `model`, whose positions hold 3 until they are filled: read too early, they show."""
    weight = model.tok_emb.weight
    cache = KVCache(model.config, batch_size, capacity, weight.device, weight.dtype)
    for stored in (cache.keys, cache.values):
        stored.fill_(3)
    return cache


@torch.inference_mode()
def _logits(model: Any, tokens: Tensor, case: Case, new_cache: NewCache | None) -> Tensor:
    """Logits (b, t, vocabulary) of all tokens or the last `keep`, in one forward or in chunks against a cache."""
    if case.keep:
        return model(tokens, None, 0, case.keep)
    if not case.chunks or new_cache is None:
        return model(tokens)
    batch_size, length = tokens.shape
    cache = new_cache(model, batch_size, length + _SPARE)
    logits, start = [], 0
    for chunk in tokens.split(list(case.chunks), dim=1):
        logits.append(model(chunk, cache, start))
        start += chunk.shape[1]
    return torch.cat(logits, dim=1)
