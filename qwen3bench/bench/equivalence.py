"""The equivalence gate: does a cell compute the baseline's function?

A tolerance in bfloat16 is nearly blind: a decode position off by one or a norm's eps of 1e-5 hide in its rounding, and
stand out of float32's by factors of 40 to 9000. So a cell is judged twice, over prompts of several odd lengths, as a prefill,
token by token and in chunks against a KV cache:

- in float32 against the baseline in float64: maximum and root-mean-square error at most 2 × those of the baseline in
  float32 (the rule of flash-attention's tests/test_flash_attn.py: at most twice the error of the plain implementation in
  the same dtype), and a relative L2 error of at most 1e-3 (the float32 column of Liger-Kernel's test tables is as wide);
- in the run's dtype against the same reference: maximum at most 2 ×, root-mean-square at most 1.25 × the baseline's
  in that dtype, and the same most likely token wherever the reference's margin is clear, i.e. more than twice the baseline's
  maximum error, in at least 99 % of those positions (transformers' tests of Qwen3 compare tokens in that way).

Errors are pooled over all prompts and positions before they are compared: the two maxima of a few rounding errors
easily lie apart by a factor of two, those of hundreds of rows do not. Nothing is nearer to the reference than the rounding
of the logits themselves, so the baseline's error counts as at least that.

The weights are random, scaled so that each layer, each norm's eps and each gain moves the logits (see `sensitised`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qwen3bench.errors import UserError
from qwen3bench.model.build import build_model
from qwen3bench.model.cache import KVCache
from qwen3bench.model.checkpoint import EMBEDDING, HEAD
from qwen3bench.model.config import ModelConfig
from qwen3bench.model.weights import load_weights

Weights = dict[str, Tensor]
Build = Callable[[ModelConfig, tuple[str, ...], Weights, torch.device, torch.dtype], Any]
Factory = Callable[[Weights, torch.dtype], Any]
NewCache = Callable[[Any, int, int], Any]

MAX_RATIO = 2.0
RMS_RATIO = {torch.float32: 2.0}
RMS_RATIO_RUN = 1.25
RELATIVE_L2 = 1e-3
TOP1_AGREEMENT = 0.99

LENGTHS = (1, 7, 37, 130)  # one row, and multiples of no tile
BATCH_SIZE = 3
_SPARE = 5  # positions of a cache that are never filled: what reads them is wrong


def cut(config: ModelConfig, device: torch.device) -> ModelConfig:
    """The shape that the gate judges: the run's, with at most 4 layers (2 on a CPU or of a wide model).

    All layers are alike, and what one does wrong shows in two. On a CPU the vocabulary is cut to 4096 rows, as no switch
    touches the head's product; on CUDA it stays.
    """
    wide = config.emb_dim > 2048
    layers = min(config.num_layers, 2 if wide or device.type == "cpu" else 4)
    vocabulary = min(config.vocab_size, 4096) if device.type == "cpu" else config.vocab_size
    context = min(config.context_length, 4 * LENGTHS[-1])
    return replace(config, num_layers=layers, vocab_size=vocabulary, context_length=context)


def sensitised(config: ModelConfig, device: torch.device, dtype: torch.dtype, seed: int) -> Weights:
    """Random float32 weights whose values `dtype` holds exactly, under which every part of the model shows.

    Query and key norms have gains around 3, so attention is peaky. The residual stream, and queries and keys before their
    norms, are as small as √(10³ eps), where a wrong eps shows; each block adds about as much to the stream as it holds;
    values, gates and logits are of order 1; no gain is 1.
    """
    weights = load_weights("random", config, device=device, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    small = math.sqrt(1e3 * config.rms_norm_eps)
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
                gain *= 3
            elif name == "model.norm.weight":
                gain /= small * math.sqrt(width)
            tensor.copy_(gain)
        else:
            part = next(part for part in deviation if name.endswith(part))
            tensor.mul_(deviation[part] / tensor.std())
        tensor.copy_(tensor.to(dtype))
    return weights


@dataclass(frozen=True)
class Case:
    """One way to compute the logits of a prompt: in one forward, or in `chunks` of tokens against a cache."""

    name: str
    prompt: int
    chunks: tuple[int, ...] = ()


def cases(lengths: Sequence[int]) -> list[Case]:
    """Prefill of each length, token-by-token decode after a short prefill, and chunks of odd sizes."""
    found = [Case(f"prefill of {n} tokens", i) for i, n in enumerate(lengths)]
    for i, n in enumerate(lengths):
        if 7 < n <= 64:
            found.append(Case(f"decode of {n} tokens", i, (5, *[1] * (n - 5))))
        if n > 7:
            first = n // 2
            found.append(Case(f"chunks of {n} tokens", i, (first, 1, 3, n - first - 4)))
    return found


class Gate:
    """Judges cells of one model shape on one device; the reference is computed once, at the first check.

    `opts` holds the options of each optimization by name. `build` makes a cell's model from weights with Hugging Face's
    names. Judged is a shallower model of the run's shapes (see `cut`).
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        seed: int = 0,
        opts: Mapping[str, Mapping[str, Any]] | None = None,
        build: Build | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.config = cut(config, self.device)
        self.dtype = dtype
        self.seed = seed
        self.opts = opts or {}
        self.build = build
        lengths = sorted({min(n, self.config.context_length) for n in LENGTHS})
        generator = torch.Generator().manual_seed(seed)
        self.prompts = [
            torch.randint(self.config.vocab_size, (BATCH_SIZE, n), generator=generator).to(self.device)
            for n in lengths
        ]
        self.cases = cases(lengths)
        self._weights: dict[torch.dtype, Weights] = {}
        self._references: list[Tensor] = []
        self._baseline: dict[torch.dtype, Errors] = {}

    @property
    def dtypes(self) -> list[torch.dtype]:
        """The dtypes in which a cell is judged: float32, then the run's."""
        return list(dict.fromkeys((torch.float32, self.dtype)))

    def check(self, cell: tuple[str, ...]) -> dict[str, Any]:
        """The verdict on a cell, as the record's `verify` line has it.

        `max_abs_error` is that of float32; `kl_mean` (in nats) and `top1_agreement` are those of the run's dtype.
        Raises torch.cuda.OutOfMemoryError, and `UserError` where the cell cannot be built at all.
        """

        def factory(weights: Weights, dtype: torch.dtype) -> Any:
            return self._build(cell, weights, dtype)

        return self.check_model(factory, _kv_cache)

    def check_model(self, factory: Factory, new_cache: NewCache | None = None) -> dict[str, Any]:
        """The verdict on any model: `factory(weights, dtype)` makes one from weights with Hugging Face's names.

        It is called as `model(tokens)` for logits (b, t, vocabulary) and, where `new_cache(model, batch_size, capacity)`
        is given, as `model(tokens, cache, start)`; without it only prefill is judged.
        """
        chosen = [case for case in self.cases if new_cache is not None or not case.chunks]
        verdict: dict[str, Any] = {"equivalent": False, "max_abs_error": None, "kl_mean": None, "top1_agreement": None}
        verdict |= {"reason": None, "checks": {"layers": self.config.num_layers, "vocabulary": self.config.vocab_size}}
        for dtype in self.dtypes:
            baseline = self._baseline_errors(dtype)
            try:
                with exact_float32():
                    errors = self._errors(factory(self._bank(dtype), dtype), dtype, chosen, new_cache)
            except torch.cuda.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError, IndexError) as error:
                verdict["reason"] = f"{_name(dtype)}: {_first_line(error)}"
                return verdict
            comparison = Comparison(errors, baseline.only([case.name for case in chosen]), dtype, dtype is self.dtype)
            verdict["checks"] |= {f"{_name(dtype)}_{name}": value for name, value in comparison.checks.items()}
            if dtype is torch.float32:
                verdict["max_abs_error"] = errors.max
            if dtype is self.dtype:
                verdict["kl_mean"] = errors.kl_mean
                verdict["top1_agreement"] = comparison.top1_agreement
            if comparison.reason:
                verdict["reason"] = f"{_name(dtype)}: {comparison.reason}"
                return verdict
        verdict["equivalent"] = True
        return verdict
