"""What candidates are held against: logits in float64, and the baseline's own errors in other dtypes.

The logits are the anchor's, which shares no code with the models; the baseline in float64 must agree with them. The
weights are random, scaled so that each layer, each norm's eps and each gain moves the logits (`sensitized`); those of
another set make activations large (`loud`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qwen3bench.config.model_config import ModelConfig
from qwen3bench.model.build import build_model
from qwen3bench.model.checkpoint import EMBEDDING, HEAD
from qwen3bench.worker.equivalence.anchor import Anchor, Past, logits_of_states
from qwen3bench.worker.equivalence.candidate import FATAL, BuiltCandidate, Candidate, Weights, kv_cache
from qwen3bench.worker.equivalence.cases import LENGTHS, SPARE, Case, Pass, WeightSet, judged_cases
from qwen3bench.worker.equivalence.judged_weights import converted, loud, loudness, sensitized
from qwen3bench.worker.equivalence.kept_products import KeptProducts
from qwen3bench.worker.equivalence.logit_errors import (
    CaseErrors,
    Errors,
    ExpectedLogits,
    WrongLogitsError,
    case_errors,
    check_logits,
    dtype_name,
    expected_logits,
    joined_errors,
)
from qwen3bench.worker.workloads import WorkloadSize

SMALL_DIM = 256  # of a model for which, on a CPU, more threads than one only wait for each other
LAYERS = 3  # the first, a middle and the last
ANCHOR_LIMIT = 1e-9  # relative, of the baseline in float64; right ones reach 1e-13
# Relative, of the baseline in a dtype: what is no rounding would weaken the limits. Right ones reach a fifth of it.
BASELINE_LIMIT = {torch.float32: 1e-4, torch.bfloat16: 0.4, torch.float16: 0.05}
_ROWS = 4096  # of the vocabulary, where many positions are compared
_COMPARED = 2**24  # logits of one prompt that are compared, and of the whole vocabulary those of so many tokens:
_WHOLE_TOKENS = 16


class WrongReferenceError(Exception):
    """Why the baseline cannot be what cells are held to."""


def cut(config: ModelConfig, workloads: Iterable[WorkloadSize]) -> ModelConfig:
    """The shape that the gate judges: the run's, with at most three layers and the context that its prompts need."""
    needed = [LENGTHS[-1], *(size.prompt_tokens + size.new_tokens for size in workloads)]
    return replace(
        config,
        num_layers=min(config.num_layers, LAYERS),
        context_length=min(config.context_length, max(needed) + SPARE),
    )


@dataclass(frozen=True)
class Leniency:
    """What is allowed of a model that is compared.

    `strict`: what a workload asks for must run by itself, without the fallback. `memory`: at a workload's own size its
    sequences may run one by one, and not at all where even that needs more memory than there is. `overflow`: logits
    that are not finite are left out.
    """

    strict: bool = True
    memory: bool = False
    overflow: bool = False


STRICT = Leniency()
Expected = Mapping[int, Sequence[ExpectedLogits]]  # by prompt


class Reference:
    """What is expected of one model shape on one device; computed when first asked for, and kept."""

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
        workloads: Iterable[WorkloadSize],
    ) -> None:
        workloads = list(workloads)
        self.config = cut(config, workloads)
        self.device = device
        self.dtype = dtype
        self.seed = seed
        judged = judged_cases(self.config.context_length, workloads)
        self.cases = judged.cases
        self._shapes = judged.prompts
        self.prompts: list[Tensor] = []
        generator = torch.Generator().manual_seed(seed)
        for shape in judged.prompts:
            rows = self._vocabulary(shape.weights)
            ids = torch.randint(rows, (shape.sequences, shape.tokens), generator=generator).to(device)
            if shape.after is not None:
                ids[:, : shape.judged_from] = self.prompts[shape.after]
            self.prompts.append(ids)
        self._banks: dict[torch.dtype, Weights] = {}
        self._weights: dict[tuple[WeightSet, torch.dtype, bool], Weights] = {}
        self._states: dict[tuple[WeightSet, torch.dtype], dict[int, Tensor]] = {}
        self._expected: dict[tuple[WeightSet, torch.dtype, bool], Expected] = {}
        self._baseline: dict[tuple[torch.dtype, bool], Errors] = {}
        self._fault: str | None = None
        self._checked = False
        self.products = KeptProducts() if device.type == "cpu" else None

    def weights(self, chosen: WeightSet, dtype: torch.dtype, tied: bool) -> Weights:
        """A set of the judged weights in `dtype`: the same values in each, and stored as the run stores its own.

        Where the head is not tied it is another matrix than the embedding. Those in float64 are not kept.
        """
        chosen = self._same_set(chosen)
        key = chosen, dtype, tied
        if key not in self._weights:
            bank = self._bank(dtype)
            if chosen is WeightSet.LOUD:
                layers = {name: tensor for name, tensor in bank.items() if name not in (EMBEDDING, HEAD)}
                bank = bank | loud(layers, self.config, loudness(dtype))
            embedding = bank[EMBEDDING][: self._vocabulary(chosen)]
            found = {**bank, EMBEDDING: embedding, HEAD: embedding if tied else embedding.flip(0)}
            if dtype is torch.float64:
                return found
            self._weights[key] = found
            if self.products is not None:
                self.products.share(found.values())
        return self._weights[key]

    def check_baseline(self) -> None:
        """Raise WrongReferenceError unless the baseline in float64 computes what the anchor does, in every case."""
        if not self._checked:
            self._checked = True
            with suppress(WrongReferenceError):
                self._check(self._baseline_errors(torch.float64, False), ANCHOR_LIMIT, torch.float64)
            self._banks.pop(torch.float64, None)
            if self.device.type == "cuda":  # others may judge on the same card
                torch.cuda.empty_cache()
        if self._fault:
            raise WrongReferenceError(self._fault)

    def baseline_errors(self, dtype: torch.dtype, tied: bool) -> Errors:
        """The baseline's errors in `dtype`, without what overflows there or needs more memory than there is.

        Raises WrongReferenceError where they are no rounding errors.
        """
        if (dtype, tied) not in self._baseline:
            errors = self._baseline_errors(dtype, tied)
            self._check(errors, BASELINE_LIMIT[dtype], dtype)
            self._baseline[dtype, tied] = errors
        return self._baseline[dtype, tied]

    def errors(
        self, candidate: Candidate, dtype: torch.dtype, cases: Iterable[Case], leniency: Leniency = STRICT
    ) -> Errors:
        """How far a candidate's logits are from what is expected, case by case.

        Raises WrongLogitsError, and what the model raises.
        """
        found: dict[str, CaseErrors] = {}
        fallbacks = 0
        built: BuiltCandidate | None = None
        has: WeightSet | None = None
        with self.conditions():
            for case in cases:
                needs = self._same_set(case.weights)
                if built is None or has is not needs:
                    built = None  # before the next: two of them need not fit
                    has, built = needs, candidate.built(self.weights(needs, dtype, candidate.tied), dtype)
                expected = self._expected_logits(needs, dtype, candidate)
                try:
                    with torch.inference_mode(), self.products or nullcontext():
                        errors, is_fallback = self._within_memory(built, case, expected, leniency)
                except WrongLogitsError:
                    if not leniency.overflow:
                        raise
                    continue
                if errors is not None:
                    found[case.name] = errors
                    fallbacks += is_fallback
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

    def _within_memory(
        self, built: BuiltCandidate, case: Case, expected: Expected, leniency: Leniency
    ) -> tuple[CaseErrors | None, bool]:
        """A case's errors, of its sequences one by one where all need more memory than there is and that is allowed.

        None where even one does. And whether they are the fallback's.
        """
        with suppress(torch.cuda.OutOfMemoryError) if leniency.memory and case.own else nullcontext():
            return self._case_errors(built, case, expected, slice(0, case.sequences), leniency)
        torch.cuda.empty_cache()
        sequences = len(self.prompts[case.passes[0].prompt])
        with suppress(torch.cuda.OutOfMemoryError):
            each = [self._case_errors(built, case, expected, slice(i, i + 1), leniency) for i in range(sequences)]
            return joined_errors([errors for errors, _ in each]), any(is_fallback for _, is_fallback in each)
        torch.cuda.empty_cache()
        return None, False

    def _case_errors(
        self, built: BuiltCandidate, case: Case, expected: Expected, rows: slice, leniency: Leniency
    ) -> tuple[CaseErrors, bool]:
        """The errors of a case's sequences in `rows`, and whether they are the fallback's."""

        def compared(judged: Iterable[tuple[Pass, Tensor]]) -> CaseErrors:
            return joined_errors([found for each in judged for found in self._pass_errors(*each, expected, rows)])

        try:
            return compared(built.logits(case, self.prompts, rows)), False
        except (*FATAL, WrongLogitsError):
            raise
        except Exception:
            if built.fallback is None or (leniency.strict and case.usual):
                raise
        return compared(built.fallback_logits(case, self.prompts, rows)), True

    def _pass_errors(self, made: Pass, logits: Tensor, expected: Expected, rows: slice) -> Iterator[CaseErrors]:
        sequences = len(self.prompts[made.prompt][rows])
        places = made.judged
        check_logits(logits, (sequences, len(places), self._vocabulary(self._shapes[made.prompt].weights)))
        for each in expected[made.prompt]:
            if part := each.between(rows, places.start, places.stop):
                at = [position - places.start for position in part.positions]
                whole = slice(at[0], at[-1] + 1) if len(at) == at[-1] + 1 - at[0] else at
                yield case_errors(logits[:, whole, :: part.step], part)

    def _baseline_errors(self, dtype: torch.dtype, tied: bool) -> Errors:
        baseline = Candidate(self._build_baseline, kv_cache, tied=tied)
        return self.errors(baseline, dtype, self.cases, Leniency(memory=True, overflow=dtype is torch.float16))

    def _build_baseline(self, weights: Weights, dtype: torch.dtype) -> Any:
        return build_model(replace(self.config, vocab_size=len(weights[EMBEDDING])), (), weights)

    def _check(self, errors: Errors, limit: float, dtype: torch.dtype) -> None:
        """Raise WrongReferenceError where the baseline is off by more than `limit`, relative, in some case."""
        for name, case in errors.by_case.items():
            if not case.relative <= limit:
                self._fault = (
                    f"the baseline is wrong, so nothing can be held to it: in {dtype_name(dtype)} it is off by "
                    f"{case.relative:.2g} of its logits from an independent float64 forward (limit {limit:.2g}), "
                    f"in {name}"
                )
                raise WrongReferenceError(self._fault)

    def _bank(self, dtype: torch.dtype) -> Weights:
        """All judged weights in `dtype`, the whole vocabulary among them."""
        if torch.float32 not in self._banks:
            self._banks[torch.float32] = sensitized(self.config, self.device, self.dtype, self.seed)
        if dtype not in self._banks:
            self._banks[dtype] = converted(self._banks[torch.float32], dtype)
        return self._banks[dtype]

    def _vocabulary(self, chosen: WeightSet) -> int:
        """How many tokens the models of a set know."""
        return self.config.vocab_size if chosen is WeightSet.WHOLE else min(self.config.vocab_size, _ROWS)

    def _same_set(self, chosen: WeightSet) -> WeightSet:
        """The set that holds the same weights: of a small vocabulary the cut one holds all."""
        return WeightSet.CUT if chosen is WeightSet.WHOLE and self.config.vocab_size <= _ROWS else chosen

    def _expected_logits(self, chosen: WeightSet, dtype: torch.dtype, candidate: Candidate) -> Expected:
        """By prompt of a set, what is expected of a model with the candidate's head and rotary tables in `dtype`."""
        source = dtype if chosen is WeightSet.LOUD and dtype is torch.float16 else torch.float32
        key = chosen, source, candidate.tied
        if candidate.rope is None and key in self._expected:
            return self._expected[key]
        weights = self.weights(chosen, source, candidate.tied)
        states = self._states.get((chosen, source)) if candidate.rope is None else None
        if states is None:
            states = self._computed(chosen, Anchor(self.config, weights, candidate.rope))
        expected = {index: self._views(index, found, weights[HEAD]) for index, found in states.items()}
        if candidate.rope is None:
            self._states[chosen, source] = states
            self._expected[key] = expected
        return expected

    def _computed(self, chosen: WeightSet, anchor: Anchor) -> dict[int, Tensor]:
        """By prompt of a set, the normed last states in float64 at the judged positions."""
        states: dict[int, Tensor] = {}
        pasts: dict[int, Past] = {}
        begun = {shape.after for shape in self._shapes}
        for index, shape in enumerate(self._shapes):
            if self._same_set(shape.weights) is not chosen:
                continue
            if shape.after is None:
                found, past = anchor.states(self.prompts[index])
                states[index] = found[:, shape.judged_from :].clone()
                if index in begun:
                    pasts[index] = past
            else:
                states[index], _ = anchor.states(self.prompts[index][:, shape.judged_from :], pasts[shape.after])
        return states

    def _views(self, index: int, states: Tensor, head: Tensor) -> list[ExpectedLogits]:
        """Logits of a prompt: at each judged position those of every so-manyth token, at a few those of all."""
        sequences, positions = states.shape[:2]
        first, vocabulary = self._shapes[index].judged_from, len(head)
        step = math.ceil(max(vocabulary / _ROWS, sequences * positions * vocabulary / _COMPARED))
        every = range(first, first + positions)
        views = [expected_logits(logits_of_states(states, head[::step]), every, step)]
        if step > 1:
            count = max(1, min(positions, _WHOLE_TOKENS // sequences))
            few = sorted({positions - 1 - round(i * (positions - 1) / max(1, count - 1)) for i in range(count)})
            views.append(expected_logits(logits_of_states(states[:, few], head), [first + i for i in few]))
        return views


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
