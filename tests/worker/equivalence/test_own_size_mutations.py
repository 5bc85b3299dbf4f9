"""Bugs that show where a workload is timed alone, on the second call, among large activations, or in shared code.

A gate of prompts of 1, 7, 37 and 130 tokens, 4096 tokens of the vocabulary and one call of a size let each pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen3bench.config.model_config import ModelConfig
from qwen3bench.model import build, layers
from qwen3bench.model.attention import EagerAttention
from qwen3bench.model.build import build_model
from qwen3bench.model.layers import FeedForward, RMSNorm, TransformerBlock
from qwen3bench.record.messages import Judgment
from qwen3bench.worker.equivalence.candidate import Candidate, kv_cache
from qwen3bench.worker.equivalence.gate import Gate
from qwen3bench.worker.workloads import WorkloadSize

pytestmark = pytest.mark.slow

TINY = ModelConfig(
    num_layers=2,
    emb_dim=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    hidden_dim=64,
    vocab_size=6000,
    context_length=4096,
)
Size = tuple[str, int, int, int] | tuple[str, int, int, int, None, None, int]
Change = Callable[[nn.Module], None]


@cache
def gate_for(*sizes: Size, dtype: torch.dtype = torch.float32) -> Gate:
    return Gate(TINY, device="cpu", dtype=dtype, workloads=[WorkloadSize(*size) for size in sizes])


def judged(gate: Gate, change: Change, opts: tuple[str, ...] = (), **parts: Any) -> Judgment:
    """The verdict on models with some parts replaced, then changed once they were built."""

    def factory(weights: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
        assemble = build.assemble
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(build, "assemble", lambda functions: replace(assemble(functions), **parts))
            model = build_model(gate.config, opts, weights)
        change(model)
        return model

    return gate.judge(Candidate(factory, kv_cache, tied="tie" in opts))


def unchanged(model: nn.Module) -> None:
    pass


def assert_rejected_by_far(verdict: Judgment, dtype: str = "float32") -> None:
    assert not verdict.equivalent
    assert verdict.reason is not None
    assert verdict.reason.startswith(f"{dtype}: ")
    # A limit that a bug passes by little would be one that rounding on another machine fails.
    assert verdict.checks.get(f"{dtype}_max_ratio", float("inf")) > 50


# At a workload's own size alone


class At(EagerAttention):
    """Attention that is wrong for queries (b, t) and keys s where `wrong` says so."""

    def __init__(self, wrong: Callable[[int, int, int], bool], change: Callable[[Tensor, Tensor], Any]) -> None:
        self.wrong, self.change = wrong, change

    def __call__(self, q, k, v, mask, mask_scores):
        if self.wrong(q.shape[0], q.shape[2], k.shape[2]):
            k, v = self.change(k, v)
            mask = None if mask is None else mask[..., -k.shape[2] :]
        return super().__call__(q, k, v, mask, mask_scores)


def other_sequence(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return k, v.roll(1, 0)


def upside_down(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return k, v.flip(2)


def without_the_first(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return k[:, :, 1:], v[:, :, 1:]


def last_1024(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return k[:, :, -1024:], v[:, :, -1024:]


OWN_SIZE: dict[str, tuple[Size, At]] = {
    "one sequence of 16 tokens": (("prefill", 1, 16, 0), At(lambda b, t, s: (b, t) == (1, 16), upside_down)),
    "another sequence's values": (("prefill", 2, 64, 0), At(lambda b, t, s: b > 1 and t % 64 == 0, other_sequence)),
    "a key dropped in decode": (
        ("decode", 4, 128, 1),
        At(lambda b, t, s: (b, t) == (4, 1) and s % 64 == 1, without_the_first),
    ),
    "a window in decode": (("decode", 1, 2048, 1), At(lambda b, t, s: t == 1 and s > 1024, last_1024)),
    "a step of generate": (("generate", 1, 8, 40), At(lambda b, t, s: t == 1 and s == 40, without_the_first)),
    "the last steps of generate": (("generate", 1, 8, 90), At(lambda b, t, s: t == 1 and s == 95, without_the_first)),
    "the last logits of a prompt": (("prefill", 2, 24, 0, None, None, 1), At(lambda b, t, s: b == 2, upside_down)),
    "the prompt of generate": (("generate", 2, 24, 3), At(lambda b, t, s: b == 2 and t == 24, upside_down)),
}


SLOW = ("a window in decode",)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in OWN_SIZE]
)
def test_a_bug_at_a_workloads_own_size_alone_is_rejected(name: str) -> None:
    size, attend = OWN_SIZE[name]
    assert_rejected_by_far(judged(gate_for(size), unchanged, attend=attend))
    assert judged(gate_for(("prefill", 1, 5, 0)), unchanged, attend=attend).equivalent


# In the vocabulary beyond what many positions are judged on


def stale_rows(model: nn.Module) -> None:
    old = model.out_head.weight.detach().clone()
    old[5003:5005] *= 0.99
    model.out_head.weight = nn.Parameter(old, requires_grad=False)


def stale_embedding(model: nn.Module) -> None:
    old = model.tok_emb.weight.detach().clone()
    old[4500:] *= 0.99
    model.tok_emb.weight = nn.Parameter(old, requires_grad=False)


@pytest.mark.parametrize("change", [stale_rows, stale_embedding])
def test_a_bug_in_any_row_of_the_vocabulary_is_rejected(change: Change) -> None:
    assert_rejected_by_far(judged(gate_for(("prefill", 1, 64, 0)), change))


# Results that are kept


def calls(change: Callable[..., Tensor]) -> Change:
    """Models whose forward is `change(forward, kept, tokens, cache, start, keep)`, `kept` a dict of theirs."""

    def changed(model: nn.Module) -> None:
        forward, kept = model.forward, {}
        model.forward = lambda tokens, cache=None, start=0, keep=0: change(forward, kept, tokens, cache, start, keep)

    return changed


def kept_by_shape(forward, kept, tokens, cache, start, keep):
    key = (*tokens.shape, start, keep, id(cache))
    if key not in kept:
        kept[key] = forward(tokens, cache, start, keep)
    return kept[key]


def kept_by_tensor(forward, kept, tokens, cache, start, keep):
    key = (tokens.data_ptr(), *tokens.shape, start, keep, id(cache))
    if key not in kept:
        kept[key] = tokens, forward(tokens, cache, start, keep)
    return kept[key][1]


def kept_from_the_second_call(forward, kept, tokens, cache, start, keep):
    key = (*tokens.shape, start, keep, id(cache))
    kept.setdefault(key, [])
    if len(kept[key]) < 2:
        kept[key].append(forward(tokens, cache, start, keep))
    return kept[key][-1]


@pytest.mark.parametrize("size", [("prefill", 1, 16, 0), ("decode", 2, 12, 1), ("generate", 2, 12, 4)])
@pytest.mark.parametrize("change", [kept_by_shape, kept_by_tensor, kept_from_the_second_call])
def test_a_result_kept_from_an_earlier_call_is_rejected(size: Size, change: Callable[..., Tensor]) -> None:
    assert_rejected_by_far(judged(gate_for(size), calls(change)))


def test_a_kept_result_is_rejected_without_a_workload_too() -> None:
    assert_rejected_by_far(judged(gate_for(), calls(kept_by_shape)))


# Large activations


class ClampedBlock(TransformerBlock):
    limit = 60_000.0

    def after_norm1(self, *given: Any, **named: Any) -> Tensor:
        return super().after_norm1(*given, **named).clamp(-self.limit, self.limit)


class ClampedFeedForward(FeedForward):
    limit = 60_000.0

    def forward(self, x: Tensor) -> Tensor:
        product = (F.silu(self.fc1(x)) * self.fc2(x)).clamp(-self.limit, self.limit)
        return self.fc3(product)


class ClampedAttention(EagerAttention):
    def __init__(self, limit: float) -> None:
        self.limit = limit

    def __call__(self, q, k, v, mask, mask_scores):
        return super().__call__(q, k, v, mask, mask_scores).clamp(-self.limit, self.limit)


class ClampedNorm(RMSNorm):
    limit = 60_000.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.clamp(-self.limit, self.limit))


def clamped(kind: type[nn.Module], limit: float) -> type[nn.Module]:
    return type(kind.__name__, (kind,), {"limit": limit})


def clamped_logits(limit: float) -> Change:
    return calls(lambda forward, kept, *given: forward(*given).clamp(-limit, limit))


@pytest.mark.parametrize("limit", [60_000.0, 10_000.0])
@pytest.mark.parametrize(
    "dtype", [torch.float32, *(pytest.param(each, marks=pytest.mark.slow) for each in (torch.bfloat16, torch.float16))]
)
def test_a_clamp_is_rejected(limit: float, dtype: torch.dtype) -> None:
    gate = gate_for(dtype=dtype)
    assert judged(gate, unchanged).equivalent
    for parts in (
        {"block": clamped(ClampedBlock, limit)},
        {"mlp": clamped(ClampedFeedForward, limit)},
        {"attend": ClampedAttention(limit)},
        {"norm": clamped(ClampedNorm, limit)},
    ):
        assert_rejected_by_far(judged(gate, unchanged, **parts))
    assert_rejected_by_far(judged(gate, clamped_logits(limit)))


class InDtype(RMSNorm):
    """The mean square in the input's own dtype, as quick code has it."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + self.eps) * self.weight


class HalfSquared(RMSNorm):
    """A scale that is right but for float16, which its square overflows."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype is torch.float16:
            return super().forward(x + 0 * x.pow(2))
        return super().forward(x)


class SmallInFloat16(FeedForward):
    """Clamped in float16 alone."""

    def forward(self, x: Tensor) -> Tensor:
        product = F.silu(self.fc1(x)) * self.fc2(x)
        return self.fc3(product.clamp(-2000, 2000) if x.dtype is torch.float16 else product)


@pytest.mark.parametrize("norm", [InDtype, HalfSquared])
def test_an_overflow_in_float16_is_rejected_where_the_baseline_has_none(norm: type[nn.Module]) -> None:
    gate = gate_for(dtype=torch.float16)
    assert len(gate.reference.baseline_errors(torch.float16, False).by_case) == len(gate.reference.cases)
    verdict = judged(gate, unchanged, norm=norm)
    assert not verdict.equivalent
    assert verdict.reason is not None
    assert verdict.reason.startswith("float16: ")


def test_a_clamp_in_float16_alone_is_rejected() -> None:
    verdict = judged(gate_for(dtype=torch.float16), unchanged, mlp=SmallInFloat16)
    assert not verdict.equivalent
    assert verdict.checks["float16_max_ratio"] > 4


# Code that the baseline and every cell share


class WrongEps:
    def forward(self: Any, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + 1e-5) * self.weight).to(x.dtype)


def wrong_attention(self: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, mask_scores: Any) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat(1, groups, 1, 1), v.repeat(1, groups, 1, 1)
    return torch.softmax(mask_scores((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5, mask), dim=-1) @ v


def interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    even, odd = x[..., ::2], x[..., 1::2]
    rotated = (even * cos[..., :half] - odd * sin[..., :half], odd * cos[..., :half] + even * sin[..., :half])
    return torch.stack(rotated, dim=-1).flatten(-2)


right_attention = EagerAttention.__call__


def wrong_at_16(self: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return right_attention(self, q, k, v.flip(2) if q.shape[2] == 16 else v, *rest)


def wrong_in_decode(self: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return right_attention(self, q, k, v.roll(1, 2) if q.shape[2] < k.shape[2] else v, *rest)


def wrong_in_float32(self: Any, q: Tensor, *rest: Any) -> Tensor:
    return right_attention(self, q * (1.001 if q.dtype is torch.float32 else 1), *rest)


SHARED: dict[str, tuple[Any, str, Any]] = {
    "eps": (RMSNorm, "forward", WrongEps.forward),
    "heads grouped in the wrong order": (EagerAttention, "__call__", wrong_attention),
    "rope halves interleaved": (layers, "apply_rope", interleaved),
    "gate and up swapped": (FeedForward, "forward", lambda self, x: self.fc3(F.silu(self.fc2(x)) * self.fc1(x))),
    "attention at 16 tokens": (EagerAttention, "__call__", wrong_at_16),
    "attention against a cache": (EagerAttention, "__call__", wrong_in_decode),
    "attention in float32": (EagerAttention, "__call__", wrong_in_float32),
}


@pytest.mark.parametrize("name", SHARED)
def test_a_bug_in_shared_code_does_not_weaken_the_limits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, wrong = SHARED[name]
    monkeypatch.setattr(owner, attribute, wrong)
    gate = Gate(TINY, device="cpu", dtype=torch.bfloat16, workloads=[WorkloadSize("prefill", 1, 16, 0)])
    for cell in ((), ("norm",)):
        verdict = gate.judge_cell(cell)
        assert not verdict.equivalent
        assert verdict.reason is not None
        assert verdict.reason.startswith("the baseline is wrong, so nothing can be held to it: in float")
