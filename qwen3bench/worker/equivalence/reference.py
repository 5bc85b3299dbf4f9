"""What candidates are held against: the baseline's logits in float64, and its own errors in other dtypes.

The weights are random, scaled so that each layer, each norm's eps and each gain moves the logits (`sensitized`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qwen3bench.config.model_config import ModelConfig
from qwen3bench.model.build import build_model
from qwen3bench.model.checkpoint import EMBEDDING, HEAD
from qwen3bench.model.weights import load_weights
from qwen3bench.worker.equivalence.candidate import BuiltCandidate, Candidate, Weights, kv_cache
from qwen3bench.worker.equivalence.cases import LARGEST, WHOLE, Case, judged_prompts
from qwen3bench.worker.equivalence.logit_errors import Errors, case_errors

SMALL_DIM = 256  # of a model for which, on a CPU, more threads than one only wait for each other


def cut(config: ModelConfig, device: torch.device) -> ModelConfig:
    """The shape that the gate judges: the run's, with at most 4 layers (2 on a CPU or of a wide model).

    All layers are alike, and what one does wrong shows in two. The vocabulary is cut to 4096 rows, as no switch
    touches the head's product.
    """
    wide = config.emb_dim > 2048
    layers = min(config.num_layers, 2 if wide or device.type == "cpu" else 4)
    vocabulary = min(config.vocab_size, 4096)
    context = min(config.context_length, max(2 * LARGEST[1], WHOLE))
    return replace(config, num_layers=layers, vocab_size=vocabulary, context_length=context)


def sensitized(config: ModelConfig, device: torch.device, dtype: torch.dtype, seed: int) -> Weights:
    """Random float32 weights whose values `dtype` holds exactly, under which every part of the model shows.

    Query and key norms have gains around 3, so attention is peaky. The residual stream, and queries and keys
    before their norms, are as small as √(10³ eps), where a wrong eps shows; each block adds about as much to
    the stream as it holds; values, gates and logits are of order 1; no gain is 1.
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


class Reference:
    """The baseline of one model shape on one device; computed when first asked for, and kept.

    `sizes` are the sequences and tokens of the workloads' prompts.
    """

    def __init__(
        self, config: ModelConfig, device: torch.device, dtype: torch.dtype, seed: int, sizes: Iterable[tuple[int, int]]
    ) -> None:
        self.config = cut(config, device)
        self.device = device
        self.dtype = dtype
        self.seed = seed
        judged = judged_prompts(self.config.context_length, sizes, device)
        self.cases = judged.cases
        generator = torch.Generator().manual_seed(seed)
        vocabulary = self.config.vocab_size
        self.prompts = [torch.randint(vocabulary, shape, generator=generator).to(device) for shape in judged.shapes]
        self._weights: dict[torch.dtype, Weights] = {}
        self._logits: dict[bool, list[Tensor]] = {}  # by whether the head is tied
        self._baseline: dict[tuple[torch.dtype, bool], Errors] = {}

    def weights(self, dtype: torch.dtype, tied: bool) -> Weights:
        """The judged weights in `dtype`: the same values in each, and stored as the run stores its own.

        Where the head is not tied it is another matrix than the embedding.
        """
        if torch.float32 not in self._weights:
            self._weights[torch.float32] = sensitized(self.config, self.device, self.dtype, self.seed)
        if dtype not in self._weights:
            self._weights[dtype] = load_weights("random", self.config, device=self.device, dtype=dtype)
            for name, tensor in self._weights[dtype].items():
                tensor.copy_(self._weights[torch.float32][name])
        bank = self._weights[dtype]
        return bank if tied else {**bank, HEAD: bank[EMBEDDING].flip(0)}

    def logits(self, candidate: Candidate) -> list[Tensor]:
        """The logits of all prompts by the baseline in float64, with the candidate's head and rotary tables."""
        if candidate.rope is not None:
            return self._computed(candidate)
        if candidate.tied not in self._logits:
            self._logits[candidate.tied] = self._computed(candidate)
        return self._logits[candidate.tied]

    def baseline_errors(self, dtype: torch.dtype, tied: bool) -> Errors:
        """The baseline's errors in `dtype`."""
        expected = self.logits(Candidate(self._build_baseline, tied=tied))
        if (dtype, tied) not in self._baseline:
            with self.conditions():
                baseline = BuiltCandidate(self._build_baseline(self.weights(dtype, tied), dtype), kv_cache)
                self._baseline[dtype, tied] = self.errors(baseline, expected, self.cases)
        return self._baseline[dtype, tied]

    def errors(
        self, built: BuiltCandidate, expected: Sequence[Tensor], cases: Sequence[Case], strict: bool = True
    ) -> Errors:
        """How far a candidate's logits are from `expected`, those of each prompt, case by case.

        `strict` as in `BuiltCandidate.logits`. Raises WrongLogitsError, and what the model raises.
        """
        found, fallbacks = {}, 0
        for case in cases:
            prompt, reference = (of[case.prompt][: case.sequences] for of in (self.prompts, expected))
            logits, is_fallback = built.logits(case, prompt, strict)
            fallbacks += is_fallback
            found[case.name] = case_errors(logits, reference[:, -case.keep :])
        return Errors(found, fallbacks)

    @contextmanager
    def conditions(self) -> Iterator[None]:
        """Exact float32; and one thread for a small model on a CPU (`SMALL_DIM`)."""
        threads = torch.get_num_threads()
        with exact_float32():
            if self.device.type == "cpu" and self.config.emb_dim <= SMALL_DIM:
                torch.set_num_threads(1)
            try:
                yield
            finally:
                torch.set_num_threads(threads)

    def _build_baseline(self, weights: Weights, dtype: torch.dtype) -> Any:
        return build_model(self.config, (), weights)

    def _computed(self, candidate: Candidate) -> list[Tensor]:
        with self.conditions():
            model = self._build_baseline(self.weights(torch.float64, candidate.tied), torch.float64)
            if candidate.rope is not None:
                model.cos, model.sin = (table.to(self.device) for table in candidate.rope)
            with torch.inference_mode():
                logits = [model(prompt) for prompt in self.prompts]
        del self._weights[torch.float64]
        return logits


@contextmanager
def exact_float32() -> Iterator[None]:
    """Matrix products of float32 in float32, whatever was set: no TF32 on CUDA, no bfloat16 on a CPU."""
    cuda: Any = torch.backends.cuda.matmul
    cpu: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = cuda.fp32_precision, cpu.fp32_precision
    cuda.fp32_precision = cpu.fp32_precision = "ieee"  # by one interface: PyTorch refuses a mix with the older one
    try:
        yield
    finally:
        cuda.fp32_precision, cpu.fp32_precision = before
