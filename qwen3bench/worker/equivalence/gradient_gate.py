"""The gradient gate: does a cell train as the baseline does?

Judged is every parameter's gradient by itself, of a model of a few layers, over sequences of an odd length. Some
targets do not count, and the upstream gradient is not 1. The reference is the baseline in float64. How its loss changes
along each parameter is held against differences of an independent forward (`anchor`). A tied matrix's gradient is the
sum of those of embedding and head. A cell is judged

- in float64, where it may differ by 1e-9 of a gradient's size;
- in float32: of each gradient the root-mean-square error at most 2 ×, the maximum at most 3 × the baseline's own in
  float32 (flash-attention's tests: gradients within 3 × those of the plain implementation in the same dtype), the
  slope of gradient on reference within 10 × the baseline's, as a lost factor hides in a maximum;
- in the run's precision likewise.

Each of these over the whole batch, over two parts whose gradients add up, and with every block computed again. At least
allowed is the error that the baseline's gradients have in the mean: a small gradient's own may be small by luck. Then 1
and 20 steps of AdamW in float64 must end where the baseline's do.

A loss that takes so many tokens at once is judged by itself as well: over more tokens than that, and in float32 over
the whole vocabulary, of which the model judged has a part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qwen3bench.config.model_config import ModelConfig
from qwen3bench.errors import UserError
from qwen3bench.model.build import build_model
from qwen3bench.model.checkpoint import EMBEDDING, HEAD
from qwen3bench.model.decoder import Decoder
from qwen3bench.model.loss import IGNORED, CrossEntropy, Loss
from qwen3bench.model.qwen3 import Qwen3Model
from qwen3bench.record.messages import Judgment
from qwen3bench.worker.equivalence.anchor import Anchor, logits_of_states
from qwen3bench.worker.equivalence.candidate import FATAL, Options
from qwen3bench.worker.equivalence.gradient_cases import (
    PRECISIONS,
    STEPS,
    UPSTREAM,
    Batch,
    Gradients,
    MissingGradient,
    Precision,
    Weights,
    accumulated,
    judged_batch,
    judged_config,
    trained,
    weights_in,
    whole,
)
from qwen3bench.worker.equivalence.judged_weights import sensitized
from qwen3bench.worker.equivalence.reference import SMALL_DIM, exact_float32
from qwen3bench.worker.error_text import both_ends, error_text

FLOAT64_LIMIT = 1e-9  # relative; right cells reach 1e-13
INEXACT_LIMIT = 1e-3  # relative, in float32
LOSS_LIMIT = 1e-4  # relative, in float32; right ones reach 1e-6
STEPS_LIMIT = 1e-6  # relative, of the way after some steps: AdamW divides gradients by their own size
# Times the baseline's; over 20 seeds right cells of a tiny model reach 1.4, 1.5 and, as rounding has no direction, 4.9.
LIMITS = (2.0, 3.0, 10.0)  # of root mean square, maximum and slope
DIFFERENCE_LIMIT = 1e-5  # relative, of the baseline's gradients and differences of the anchor's loss
# Of a parameter's size: where differences are taken. A shorter step has a hundredth of the error of the other's curve.
_DIFFERENCES = (1e-6, 1e-7)
_NARROW = 64  # numbers of a state: a loss over the whole vocabulary is then judged in little memory
_FEW = 37  # tokens of it
_EPS = torch.finfo(torch.float32).eps

Build = Callable[[dict[str, Tensor]], Decoder]  # a model on weights with Hugging Face's names
_OF_LOSS = ("value", "gradient of the states", "gradient of the head")
_KINDS = {"rms": "root-mean-square error", "max": "maximum error", "slope": "slope's distance from 1"}
_WAYS = ("the whole batch", "two parts of the batch", "recomputed blocks")


@dataclass(frozen=True)
class GradientCandidate:
    """A model to judge, and whether its head is the embedding.

    One that is not `exact` rounds to float32 by design: of it only the size of float32's errors is judged.
    """

    build: Build
    tied: bool = False
    exact: bool = True


@dataclass(frozen=True)
class _Error:
    """One gradient's error: root mean square and maximum by the reference's root mean square, and slope minus 1."""

    rms: float
    max: float
    slope: float


class GradientGate:
    """Judges cells of one model shape on one device, in the precision of a run; the reference is computed once."""

    def __init__(
        self, config: ModelConfig, device: torch.device, precision: str, seed: int = 0, opts: Options | None = None
    ) -> None:
        self.config = judged_config(config, device)
        self._vocabulary = config.vocab_size
        self.device = device
        self.opts: Options = opts or {}
        self.precisions = [PRECISIONS[name] for name in dict.fromkeys(("fp32", precision))]
        self._run = precision
        self._weights: Weights = sensitized(self.config, device, torch.float32, seed)
        self.batch: Batch = judged_batch(self.config, device, seed)
        self._references: dict[bool, Gradients] = {}
        self._ways: dict[tuple[bool, int], Gradients] = {}
        self._baselines: dict[tuple[str, bool, str], dict[str, _Error]] = {}
        self._fault: str | None = None

    def judge_cell(self, cell: tuple[str, ...]) -> Judgment:
        """The verdict on a cell of ours."""
        opts = {name: self.opts.get(name, {}) for name in cell}
        return self.judge(
            GradientCandidate(lambda weights: build_model(self.config, opts, weights), tied="tie" in cell)
        )

    def judge(self, candidate: GradientCandidate) -> Judgment:
        """The verdict on any model. One that raises did not run. Raises `FATAL`, after which nothing is known of it."""
        threads = torch.get_num_threads()
        try:
            if self.device.type == "cpu" and self.config.emb_dim <= SMALL_DIM:
                torch.set_num_threads(1)
            with exact_float32():
                checks: dict[str, float] = {}
                for reason in self._reasons(candidate, checks):
                    return Judgment(equivalent=False, reason=reason, checks=checks)
                return Judgment(equivalent=True, checks=checks)
        except FATAL:
            raise
        except (MissingGradient, UserError) as missing:
            return Judgment(equivalent=False, reason=str(missing))
        except Exception as error:
            return Judgment(
                equivalent=False, ran=False, reason=f"it does not train: {both_ends(error_text(error), 300)}"
            )
        finally:
            torch.set_num_threads(threads)

    def _reasons(self, candidate: GradientCandidate, checks: dict[str, float]) -> Iterator[str]:
        """Why the candidate does not train as the baseline, where it does not; what is computed goes to `checks`."""
        reference = self._reference(candidate.tied)
        if self._fault:
            yield self._fault
        if not candidate.exact:
            yield from self._reasons_of_size(candidate, reference, PRECISIONS["fp32"], INEXACT_LIMIT, checks)
            return
        yield from self._reasons_of_size(candidate, reference, PRECISIONS["fp64"], FLOAT64_LIMIT, checks)
        for steps in STEPS:
            expected, moved = self._way(candidate.tied, steps), self._trained(candidate, steps)
            off = {name: float((moved[name] - way).norm() / way.norm()) for name, way in expected.items()}
            name = max(off, key=lambda each: off[each])
            checks[f"steps_{steps}"] = off[name]
            if not off[name] <= STEPS_LIMIT:
                yield f"after {steps} steps {name} is off by {off[name]:.2g} of its way (limit {STEPS_LIMIT:g})"
        yield from self._reasons_of_loss(candidate, checks)
        for precision in self.precisions:
            for way, found in self._gradients(candidate, precision):
                baseline = self._baseline(precision, candidate.tied, way)
                errors = {name: _error(found[name], reference[name]) for name in reference}
                yield from _compared(errors, baseline, f"{precision.name}, over {way}", checks)

    def _reasons_of_size(
        self,
        candidate: GradientCandidate,
        reference: Gradients,
        precision: Precision,
        limit: float,
        checks: dict[str, float],
    ) -> Iterator[str]:
        """Which gradients are off by more than so much of their size."""
        for way, found in self._gradients(candidate, precision):
            if set(found) != set(reference):
                odd = sorted(set(found) ^ set(reference))
                yield f"its trained parameters are not the baseline's: {', '.join(odd)}"
            errors = {name: _error(found[name], reference[name]) for name in reference}
            name, error = max(errors.items(), key=lambda each: each[1].rms)
            key = f"{precision.name}_relative"
            checks[key] = max(checks.get(key, 0.0), error.rms)
            if not error.rms <= limit:
                yield (
                    f"{precision.name}: the gradient of {name} is off by {error.rms:.2g} of its size "
                    f"(limit {limit:g}), over {way}"
                )

    def _gradients(self, candidate: GradientCandidate, precision: Precision) -> Iterator[tuple[str, Gradients]]:
        """The candidate's gradients, each way."""
        model = candidate.build(weights_in(self._weights, precision.dtype, candidate.tied))
        context = self._context(precision)
        plain, parts, again = _WAYS
        yield plain, whole(model, self.batch, context)
        yield parts, accumulated(model, self.batch, context)
        if isinstance(model, Qwen3Model) and not model.parts.recomputed(0):
            model.parts = replace(model.parts, recomputed=lambda _: True)
            yield again, whole(model, self.batch, context)

    def _context(self, precision: Precision) -> Callable[[], Any]:
        return lambda: precision.context(self.device)

    def _reference(self, tied: bool) -> Gradients:
        """The baseline's gradients in float64."""
        if tied not in self._references:
            weights = weights_in(self._weights, torch.float64, tied)
            found = whole(self._built(weights), self.batch, nullcontext)
            if fault := differing(self.config, weights, self.batch, found):
                self._fault = f"the baseline's gradients are wrong, so nothing can be held to them: {fault}"
            if tied:
                found[EMBEDDING] = found[EMBEDDING] + found.pop(HEAD)
            self._references[tied] = found
        return self._references[tied]

    def _way(self, tied: bool, steps: int) -> Gradients:
        """How far so many steps move the baseline's parameters; where tied, of a model with one matrix."""
        if (tied, steps) not in self._ways:
            candidate = GradientCandidate(self._built if not tied else self._built_tied, tied)
            self._ways[tied, steps] = self._trained(candidate, steps)
        return self._ways[tied, steps]

    def _trained(self, candidate: GradientCandidate, steps: int) -> Gradients:
        return trained(candidate.build(weights_in(self._weights, torch.float64, candidate.tied)), self.batch, steps)

    def _baseline(self, precision: Precision, tied: bool, way: str) -> dict[str, _Error]:
        """The baseline's own errors in a precision; those with recomputed blocks are those of the whole batch."""
        way = _WAYS[0] if way == _WAYS[2] else way
        key = precision.name, tied, way
        if key not in self._baselines:
            reference = self._reference(tied)
            model = (self._built_tied if tied else self._built)(weights_in(self._weights, precision.dtype, tied))
            take = whole if way == _WAYS[0] else accumulated
            found = take(model, self.batch, self._context(precision))
            self._baselines[key] = {name: _error(found[name], wanted) for name, wanted in reference.items()}
        return self._baselines[key]

    def _built(self, weights: dict[str, Tensor]) -> Decoder:
        return build_model(self.config, (), weights)

    def _built_tied(self, weights: dict[str, Tensor]) -> Decoder:
        """The baseline with one matrix: what a tied cell's own errors are held to."""
        model = build_model(self.config, (), weights)
        model.out_head.weight = model.tok_emb.weight
        return model

    def _reasons_of_loss(self, candidate: GradientCandidate, checks: dict[str, float]) -> Iterator[str]:
        """The loss by itself: in float64 over more tokens than it takes at once, in float32 over all the vocabulary."""
        model = candidate.build(weights_in(self._weights, torch.float64, candidate.tied))
        if not isinstance(model, Qwen3Model) or not (at_once := model.parts.loss.at_once):
            return
        loss, generator = model.parts.loss, torch.Generator().manual_seed(at_once)
        narrow = torch.randn(self._vocabulary, _NARROW, generator=generator) / math.sqrt(_NARROW)
        for head, tokens, limit in (
            (model.out_head.weight, 2 * at_once + 1, FLOAT64_LIMIT),
            (narrow.to(self.device), _FEW, LOSS_LIMIT),
        ):
            states = torch.randn(1, tokens, head.shape[1], generator=generator, dtype=torch.float64)
            targets = torch.randint(head.shape[0], (1, tokens), generator=generator)
            targets[0, ::7] = IGNORED
            states, targets = states.to(self.device, head.dtype), targets.to(self.device)
            found = _of_loss(loss, head, states, targets)
            expected = _of_loss(CrossEntropy(), head.double(), states.double(), targets)
            key = f"loss_{str(head.dtype).removeprefix('torch.')}"
            for what, here, right in zip(_OF_LOSS, found, expected, strict=True):
                error = float((here.double() - right).norm() / right.norm())
                checks[key] = max(checks.get(key, 0.0), error)
                if not error <= limit:
                    yield (
                        f"{key.removeprefix('loss_')}: the loss's {what} is off by {error:.2g} of its size "
                        f"(limit {limit:g}), over {tokens} tokens and a vocabulary of {head.shape[0]}"
                    )


def differing(config: ModelConfig, weights: Mapping[str, Tensor], batch: Batch, gradients: Gradients) -> str | None:
    """Which gradient is not what differences of an independent forward's loss say, and by how much; None where all are.

    Along a direction that is half the gradient's own and half random, of the parameter's size.
    """
    generator = torch.Generator(batch.tokens.device).manual_seed(len(gradients))

    def loss(name: str, tensor: Tensor) -> float:
        changed = {**weights, name: tensor}
        states, _ = Anchor(config, changed).states(batch.tokens)
        logits = logits_of_states(states, changed[HEAD]).flatten(0, 1)
        counted = batch.targets.flatten() != IGNORED
        chosen = logits.log_softmax(-1)[counted].gather(1, batch.targets.flatten()[counted][:, None])
        return -float(chosen.mean())

    for name, gradient in gradients.items():
        random = torch.randn(gradient.shape, generator=generator, dtype=gradient.dtype, device=gradient.device)
        direction = gradient / gradient.norm() + random / random.norm()
        for size in _DIFFERENCES:
            step = direction * (size * weights[name].norm() / direction.norm())
            slope = (loss(name, weights[name] + step) - loss(name, weights[name] - step)) / 2
            expected = float((gradient * step).sum()) / UPSTREAM
            if abs(slope - expected) <= DIFFERENCE_LIMIT * abs(expected):
                break
        else:
            return f"along {name} the loss changes by {slope:.6g}, and the gradient says {expected:.6g}"
    return None


def _of_loss(loss: Loss, weight: Tensor, states: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """The value of a loss, and its gradients by states and head."""
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    head.weight = nn.Parameter(weight.detach().clone())
    states = states.clone().requires_grad_(True)
    with torch.enable_grad():
        value = loss(head, states, targets)
        (value * UPSTREAM).backward()
    assert states.grad is not None
    assert head.weight.grad is not None
    return value.detach(), states.grad, head.weight.grad


def _error(found: Tensor, reference: Tensor) -> _Error:
    size = float(reference.norm()) / math.sqrt(reference.numel())
    off = found - reference
    return _Error(
        rms=float(off.norm()) / math.sqrt(off.numel()) / size,
        max=float(off.abs().max()) / size,
        slope=float((found * reference).sum() / reference.square().sum()) - 1,
    )


def _compared(
    errors: Mapping[str, _Error],
    baseline: Mapping[str, _Error],
    where: str,
    checks: dict[str, float],
) -> Iterator[str]:
    """Which gradients are further off than the baseline's own by more than is allowed, in each of `_KINDS`."""
    for (kind, words), limit in zip(_KINDS.items(), LIMITS, strict=True):
        usual = math.sqrt(sum(getattr(each, kind) ** 2 for each in baseline.values()) / len(baseline))
        allowed = {name: max(abs(getattr(each, kind)), usual, _EPS) for name, each in baseline.items()}
        ratios = {name: abs(getattr(each, kind)) / allowed[name] for name, each in errors.items()}
        name = max(ratios, key=lambda each: ratios[each])
        key = f"{where.partition(',')[0]}_{kind}_ratio"
        checks[key] = max(checks.get(key, 0.0), ratios[name])
        if not ratios[name] <= limit:
            yield f"{where}: {name}: the gradient's {words} is {ratios[name]:.3g} × the baseline's (limit {limit:g} ×)"
