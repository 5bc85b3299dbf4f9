"""The gradient gate passes what trains as the baseline does, and rejects every seeded mistake in a backward."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from traceback import walk_stack
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen3bench import ModelConfig
from qwen3bench.config import choices
from qwen3bench.config.choices import options_of
from qwen3bench.kernels.rms_norm_backward import programs_of
from qwen3bench.model.attention import EagerAttention
from qwen3bench.model.baseline import BASELINE_PARTS
from qwen3bench.model.build import build_model, filled
from qwen3bench.model.decoder import Decoder
from qwen3bench.model.layers import FeedForward, GroupedQueryAttention, RMSNorm
from qwen3bench.model.loss import IGNORED, CrossEntropy
from qwen3bench.model.parts import Parts
from qwen3bench.model.qwen3 import Qwen3Model
from qwen3bench.worker.equivalence.gradient_cases import SEQUENCES, judged_config, weights_in, whole
from qwen3bench.worker.equivalence.gradient_gate import GradientCandidate, GradientGate, differing
from qwen3bench.worker.equivalence.judged_weights import sensitized

CPU = torch.device("cpu")
SWITCHES = tuple(name for name in choices.choices("opt") if name != "gemv")


@pytest.fixture(scope="module")
def gate() -> GradientGate:
    return GradientGate(ModelConfig(**options_of("model", "tiny")), CPU, "fp32")


def with_parts(gate: GradientGate, tied: bool = False, **parts: Any) -> GradientCandidate:
    def build(weights: dict[str, Tensor]) -> Decoder:
        with torch.device("meta"):
            model = Qwen3Model(gate.config, replace(BASELINE_PARTS, **parts))
        return filled(model, weights)

    return GradientCandidate(build, tied)


@pytest.mark.slow
def test_the_baseline_and_all_switches_train_alike(gate: GradientGate) -> None:
    for cell in ((), SWITCHES):
        judged = gate.judge_cell(cell)
        assert judged.equivalent, judged.reason
        assert judged.checks["float64_relative"] < 1e-12
        assert judged.checks["steps_20"] < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_no_right_cell_is_rejected(seed: int) -> None:
    gate = GradientGate(ModelConfig(**options_of("model", "tiny")), CPU, "bf16", seed)
    draw = random.Random(seed)
    for _ in range(3):
        cell = tuple(name for name in SWITCHES if draw.random() < 0.5)
        judged = gate.judge_cell(cell)
        assert judged.equivalent, (cell, judged.reason)


# Seeded mistakes, each in a backward that leaves the forward as it is, or in the loss


class _Norm(torch.autograd.Function):
    """RMSNorm whose gradients a mistake may change: `spoil(of_x, of_gain, rstd)`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float, roll: int, low: bool, swap: float) -> Tensor:
        ctx.save_for_backward(x, gain)
        ctx.options = eps, roll, low, swap
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, gain = ctx.saved_tensors
        eps, roll, low, share = ctx.options
        rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps).flatten(0, -2).roll(roll, 0).view(*x.shape[:-1], 1)
        of_gain = (given * x * rstd).flatten(0, -2)
        of_gain = summed_in_bfloat16(of_gain).to(x.dtype) if low else of_gain.sum(0)
        inner = (given * gain * x).mean(-1, keepdim=True)
        return rstd * (given * gain - share * x * rstd.square() * inner), of_gain, None, None, None, None


def summed_in_bfloat16(rows: Tensor) -> Tensor:
    """Row by row, as a loop in a kernel sums."""
    total = torch.zeros_like(rows[0], dtype=torch.bfloat16)
    for row in rows:
        total = total + row.to(torch.bfloat16)
    return total


def norm_with(roll: int = 0, low: bool = False, share: float = 1.0) -> type[RMSNorm]:
    class Norm(RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return _Norm.apply(x, self.weight, self.eps, roll, low, share)

    return Norm


class LostGain(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.detach(), self.eps)


class HalvedGain(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        kept = self.weight.detach()
        return F.rms_norm(x, self.weight.shape, kept + (self.weight - kept) / 2, self.eps)


def spoiled(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """The tensor, whose gradient is changed on its way back."""
    if tensor.requires_grad:
        tensor = tensor.view_as(tensor)
        tensor.register_hook(change)
    return tensor


class Attention(EagerAttention):
    """Attention whose gradients of keys and values are changed."""

    def __init__(self, **changes: Callable[[Tensor], Tensor]) -> None:
        self.changes = changes

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, mask_scores: Any) -> Tensor:
        k = spoiled(k, self.changes.get("k", lambda g: g))
        group = q.shape[1] // v.shape[1]
        v = spoiled(v.repeat_interleave(group, dim=1), self.changes.get("v", lambda g: g))
        scores = (q @ k.repeat_interleave(group, dim=1).transpose(-2, -1)) * q.shape[-1] ** -0.5
        return torch.softmax(mask_scores(scores, mask), dim=-1) @ v


def only_first_of_group(gradient: Tensor) -> Tensor:
    kept = torch.zeros_like(gradient)
    kept[:, ::2] = gradient[:, ::2]
    return kept


class SwappedHalves(FeedForward):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(_Swapped.apply(self.fc1(x), self.fc2(x)))


class _Swapped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        share = torch.sigmoid(gate)
        return given * gate * share, given * up * share * (1 + gate * (1 - share))


class _WrongWay(torch.autograd.Function):
    """A rotation whose backward turns as the forward does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return turned(given, *ctx.saved_tensors), None, None


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Turning(GroupedQueryAttention):
    """Attention with a rotation of its own."""

    rotate: Any = staticmethod(turned)

    def forward(
        self, x: Tensor, mask: Tensor | None, cos: Tensor, sin: Tensor, cache: Any = None, start: int = 0
    ) -> Tensor:
        queries, keys, values = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in self.project(x))
        queries, keys = self.rotate(self.q_norm(queries), cos, sin), self.rotate(self.k_norm(keys), cos, sin)
        context = self.attend(queries, keys, values, mask, self.mask_scores)
        return self.out_proj(context.transpose(1, 2).flatten(-2))


class TurningBack(Turning):
    rotate: Any = staticmethod(lambda x, cos, sin: _WrongWay.apply(x, cos, sin))


class OtherPositions(Turning):
    """Computed again in backward, it turns by the angles of the next positions."""

    def forward(
        self, x: Tensor, mask: Tensor | None, cos: Tensor, sin: Tensor, cache: Any = None, start: int = 0
    ) -> Tensor:
        if {"backward", "grad"} & {frame.f_code.co_name for frame, _ in walk_stack(None)}:
            cos, sin = cos.roll(-1, 0), sin.roll(-1, 0)
        return super().forward(x, mask, cos, sin)


class LossOf(CrossEntropy):
    def __init__(self, loss: Callable[[nn.Linear, Tensor, Tensor], Tensor], at_once: int | None = None) -> None:
        self.loss, self.at_once = loss, at_once

    def __call__(self, head: nn.Linear, states: Tensor, targets: Tensor) -> Tensor:
        return self.loss(head, states, targets)


def sum_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")


def shifted(head: nn.Linear, states: Tensor, targets: Tensor) -> Tensor:
    return sum_of(head(states[:, :-1]), targets[:, 1:]) / (targets[:, 1:] != IGNORED).sum()


def mean_over_all(head: nn.Linear, states: Tensor, targets: Tensor) -> Tensor:
    return sum_of(head(states), targets) / targets.numel()


def dropping(head: nn.Linear, states: Tensor, targets: Tensor) -> Tensor:
    """In chunks of 500 tokens; where there is a next one, a chunk's last token is lost."""
    states, targets = states.flatten(0, 1), targets.flatten()
    parts = []
    for first in range(0, len(targets), 500):
        last = first + 500 - (first + 500 < len(targets))
        parts.append(sum_of(head(states[None, first:last]), targets[None, first:last]))
    return sum(parts) / (targets != IGNORED).sum()  # type: ignore[return-value]


def of_the_first(head: nn.Linear, states: Tensor, targets: Tensor) -> Tensor:
    """Sums over no more of the vocabulary than a program of a kernel takes at once."""
    logits, counts = head(states).flatten(0, 1), (targets != IGNORED).flatten()
    own = logits.gather(1, targets.flatten().clamp(min=0)[:, None])[:, 0]
    return (logits[:, :8192].logsumexp(-1) - own)[counts].mean()


class _IgnoresUpstream(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, given: Tensor) -> Tensor:  # type: ignore[override]
        return torch.ones_like(given)


def ignores_upstream(head: nn.Linear, states: Tensor, targets: Tensor) -> Tensor:
    return _IgnoresUpstream.apply(CrossEntropy()(head, states, targets))


def head_with(change: Callable[[Tensor], Tensor]) -> Callable[[nn.Embedding], nn.Linear]:
    class Head(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, change(self.weight))

    def make(embedding: nn.Embedding) -> nn.Linear:
        head = Head(embedding.embedding_dim, embedding.num_embeddings, bias=False)
        head.weight = embedding.weight
        return head

    return make


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "a gain without a gradient": ({"norm": LostGain}, "no gradient would reach"),
    "half of a gain's gradient": ({"norm": HalvedGain}, "norm.weight"),
    "a gain's gradient summed in bfloat16": ({"norm": norm_with(low=True)}, "norm.weight"),
    "rstd of the wrong row": ({"norm": norm_with(roll=1)}, "float64"),
    "a norm's second term is small": ({"norm": norm_with(share=0.99)}, "float64"),
    "a factor dropped in dK": ({"attend": Attention(k=lambda g: g * 4)}, "proj|norm"),
    "group heads not summed in dV": ({"attend": Attention(v=only_first_of_group)}, "float64"),
    "labels shifted by one": ({"loss": LossOf(shifted)}, "float64"),
    "mean over padding": ({"loss": LossOf(mean_over_all)}, "float64"),
    "the upstream gradient ignored": ({"loss": LossOf(ignores_upstream)}, "float64"),
    "the head's gradient lost": ({"head": head_with(Tensor.detach)}, "embed_tokens"),
    "the head's gradient counted twice": ({"head": head_with(lambda w: 2 * w - w.detach())}, "embed_tokens"),
    "SwiGLU's halves swapped": ({"mlp": SwappedHalves}, "float64"),
    "a rotation's backward turns forward": ({"attention": TurningBack}, "float64"),
    "recomputed with other positions": ({"attention": OtherPositions, "recomputed": lambda block: True}, "float64"),
    "recomputed with other positions, where that is off": ({"attention": OtherPositions}, "recomputed blocks"),
    "a chunk's last token dropped": ({"loss": LossOf(dropping, at_once=500)}, "the loss's value"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_seeded_mistake_is_rejected(gate: GradientGate, mistake: str) -> None:
    parts, told = MISTAKES[mistake]
    judged = gate.judge(with_parts(gate, tied="head" in parts, **parts))
    assert not judged.equivalent
    assert judged.reason is not None
    assert any(word in judged.reason for word in told.split("|")), judged.reason


@pytest.mark.parametrize(("vocabulary", "right"), [(8192, True), (9000, False)])
def test_the_loss_is_judged_over_the_whole_vocabulary(vocabulary: int, right: bool) -> None:
    config = replace(ModelConfig(**options_of("model", "tiny")), num_layers=1, vocab_size=vocabulary, emb_dim=32)
    gate = GradientGate(replace(config, context_length=16), CPU, "fp32")
    judged = gate.judge(with_parts(gate, loss=LossOf(of_the_first, at_once=16)))
    assert judged.equivalent is right, judged.reason
    if right:
        assert judged.checks["loss_float32"] < 1e-5
    else:
        assert "float32: the loss's value" in (judged.reason or "")


@pytest.mark.parametrize("multiprocessors", [132, 148])  # of an H100 and a B200
@pytest.mark.parametrize("model", [name for name in choices.choices("model") if name != "tiny"])
def test_on_a_card_each_program_of_a_norms_gradient_comes_to_a_second_turn(model: str, multiprocessors: int) -> None:
    config = ModelConfig(**options_of("model", model))
    tokens = SEQUENCES * judged_config(config, torch.device("cuda")).context_length
    for rows, width in ((tokens, config.emb_dim), (tokens * config.num_kv_heads, config.head_dim)):
        programs, rows_each = programs_of(rows, 1 << (width - 1).bit_length(), multiprocessors)
        assert rows > programs * rows_each


def test_sixteen_mistakes_are_seeded() -> None:
    assert len(MISTAKES) >= 16


def test_the_same_code_without_the_mistake_passes(gate: GradientGate) -> None:
    for parts in ({"norm": norm_with()}, {"attend": Attention()}, {"attention": Turning}):
        judged = gate.judge(with_parts(gate, **parts))
        assert judged.equivalent, judged.reason


def test_a_mistake_that_the_baseline_shares_is_found() -> None:
    """Differences of an independent forward tell."""
    config = replace(ModelConfig(**options_of("model", "tiny")), num_layers=1, vocab_size=101, context_length=131)
    gate = GradientGate(config, CPU, "fp32")
    weights = weights_in(sensitized(gate.config, CPU, torch.float32, 0), torch.float64, False)
    right = whole(
        build_model(gate.config, (), weights), gate.batch, lambda: torch.autograd.profiler.record_function("")
    )
    assert differing(gate.config, weights, gate.batch, right) is None
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.k_norm.weight", "lm_head.weight"):
        wrong = right | {name: 1.001 * right[name]}
        assert name in (differing(gate.config, weights, gate.batch, wrong) or "")


def test_what_does_not_train_did_not_run(gate: GradientGate) -> None:
    class Broken(RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("no backward of this")

    judged = gate.judge(with_parts(gate, norm=Broken))
    assert (judged.equivalent, judged.ran) == (False, False)
    assert "no backward of this" in (judged.reason or "")


def test_parts_are_those_of_the_baseline() -> None:
    assert {"loss", "recomputed", "norm", "attend", "attention", "mlp", "head"} <= set(vars(BASELINE_PARTS))
    assert isinstance(BASELINE_PARTS, Parts)


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["amp", "bf16"])
@pytest.mark.parametrize("model", ["tiny", "qwen3-0.6b"])
def test_cells_train_alike_on_cuda(precision: str, model: str) -> None:
    gate = GradientGate(ModelConfig(**options_of("model", model)), torch.device("cuda"), precision)
    told = {}
    each = [(name,) for name in SWITCHES] if model == "tiny" else []
    for cell in ((), *each, SWITCHES):
        judged = gate.judge_cell(cell)
        if not judged.equivalent:
            told["+".join(cell)] = judged.reason
    assert told == {}
