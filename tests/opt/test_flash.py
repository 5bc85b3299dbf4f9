"""`flash`: one call of PyTorch's fused attention, told no more than it needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from qwen3bench import ModelConfig, build_model
from qwen3bench.config.choices import options_of
from qwen3bench.errors import UserError
from qwen3bench.kernels import token_attention
from qwen3bench.model.attention import AdditiveMask, EagerAttention, Mask
from qwen3bench.model.baseline import BASELINE_PARTS
from qwen3bench.model.cache import KVCache
from qwen3bench.opt import flash
from qwen3bench.opt.flash import BACKENDS, FlashAttention, apply, takes_grouped
from qwen3bench.opt.mask import BooleanMask
from qwen3bench.worker.evidence import operations_of

CPU = torch.device("cpu")
Call = dict[str, Any]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """What fused attention was called with, and which of its kernels were allowed then."""
    recorded: list[Call] = []
    real = F.scaled_dot_product_attention

    def spy(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        allowed = {
            "flash": torch.backends.cuda.flash_sdp_enabled(),
            "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
            "efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
            "math": torch.backends.cuda.math_sdp_enabled(),
        }
        recorded.append(kwargs | {"query": query, "key": key, "value": value, "allowed": allowed})
        return real(query, key, value, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return recorded


def run(config: ModelConfig, weights: dict[str, Tensor], opts: Any, *chunks: int) -> Tensor:
    """Feed the model chunks of so many tokens, one after the other, through a cache: the last logits."""
    tokens = torch.randint(0, config.vocab_size, (2, sum(chunks)), generator=torch.Generator().manual_seed(0))
    model = build_model(config, opts, weights)
    cache = KVCache(config, 2, sum(chunks), "cpu", torch.float32)
    start = 0
    for length in chunks:
        logits = model(tokens[:, start : start + length], cache, start=start)
        start += length
    return logits


def test_baseline_makes_no_call(tiny: ModelConfig, tiny_weights: dict[str, Tensor], calls: list[Call]) -> None:
    run(tiny, tiny_weights, ("tie", "mlp", "mask", "norm"), 5, 1)
    assert calls == []


def test_one_call_in_each_layer_with_the_heads_as_they_are_stored(
    tiny: ModelConfig, tiny_weights: dict[str, Tensor], calls: list[Call]
) -> None:
    run(tiny, tiny_weights, ("flash",), 5)
    assert len(calls) == tiny.num_layers
    for call in calls:
        assert call["query"].shape == (2, tiny.num_heads, 5, tiny.head_dim)
        assert call["key"].shape == call["value"].shape == (2, tiny.num_kv_heads, 5, tiny.head_dim)
        assert call["enable_gqa"]


def test_prefill_with_mask_has_no_mask_tensor(
    tiny: ModelConfig, tiny_weights: dict[str, Tensor], calls: list[Call]
) -> None:
    run(tiny, tiny_weights, ("flash", "mask"), 5)
    assert [(call["attn_mask"], call["is_causal"]) for call in calls] == [(None, True)] * tiny.num_layers


def test_one_query_is_never_called_causal(
    tiny: ModelConfig, tiny_weights: dict[str, Tensor], calls: list[Call]
) -> None:
    run(tiny, tiny_weights, ("flash", "mask"), 5, 1)
    for call in calls[tiny.num_layers :]:
        assert call["key"].shape[2] == 6
        assert (call["attn_mask"], call["is_causal"]) == (None, False)


def test_a_chunk_against_a_cache_gets_a_boolean_mask(
    tiny: ModelConfig, tiny_weights: dict[str, Tensor], calls: list[Call]
) -> None:
    run(tiny, tiny_weights, ("flash", "mask"), 2, 3)
    attends = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    for call in calls[tiny.num_layers :]:
        assert not call["is_causal"]
        assert torch.equal(call["attn_mask"], attends)


def test_without_mask_the_additive_one_is_passed_on(
    tiny: ModelConfig, tiny_weights: dict[str, Tensor], calls: list[Call]
) -> None:
    run(tiny, tiny_weights, ("flash",), 3, 1)
    x = float("-inf")
    prefill = torch.tensor([[0, x, x], [0, 0, x], [0, 0, 0]])
    assert not any(call["is_causal"] for call in calls)
    assert torch.equal(calls[0]["attn_mask"], prefill)
    assert torch.equal(calls[-1]["attn_mask"], torch.zeros(1, 4))


@pytest.mark.parametrize(("queries", "start"), [(7, 0), (1, 0), (1, 6), (3, 4)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (8, 1)])
@pytest.mark.parametrize("mask", [AdditiveMask(), BooleanMask()], ids=["additive", "boolean"])
def test_context_is_the_eager_one(queries: int, start: int, heads: int, kv_heads: int, mask: Mask) -> None:
    q = torch.randn(2, heads, queries, 16, dtype=torch.float64)
    k, v = torch.randn(2, 2, kv_heads, start + queries, 16, dtype=torch.float64)
    contexts = [
        attend(q, k, v, attend.mask(mask, queries, start, CPU, torch.float64), mask.apply)
        for attend in (EagerAttention(), FlashAttention())
    ]
    torch.testing.assert_close(contexts[1], contexts[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("opts", [("flash",), ("flash", "mask")], ids="+".join)
def test_heads_are_repeated_where_no_fused_kernel_takes_grouped_ones(
    tiny: ModelConfig,
    tiny_weights: dict[str, Tensor],
    calls: list[Call],
    monkeypatch: pytest.MonkeyPatch,
    opts: tuple[str, ...],
) -> None:
    """As on a T4 or V100, which have neither FlashAttention nor cuDNN's kernel."""
    asked: list[tuple[bool, bool]] = []

    def none_takes(_device: torch.device, _dtype: torch.dtype, masked: bool, single: bool) -> bool:
        asked.append((masked, single))
        return False

    monkeypatch.setattr(flash, "takes_grouped", none_takes)
    logits, expected = (run(tiny, tiny_weights, of, 5, 1) for of in (opts, ()))
    torch.testing.assert_close(logits, expected)
    assert asked == [("mask" not in opts, False), ("mask" not in opts, True)]
    assert {call["enable_gqa"] for call in calls} == {False}
    assert {call["key"].shape[1] for call in calls} == {tiny.num_heads}


def test_the_memory_efficient_kernel_is_given_repeated_heads_when_it_is_forced() -> None:
    for backend in BACKENDS:
        attend = apply(BASELINE_PARTS, backend=backend).attend
        attend.mask(BooleanMask(), 4, 0, CPU, torch.float32)
        assert attend.grouped is (backend != "efficient")


def test_under_autocast_the_kernel_is_asked_for_in_the_dtype_that_attention_computes_in(
    tiny: ModelConfig, tiny_weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 no kernel takes grouped heads, and PyTorch would fall to separate operations on an A100."""
    asked: list[torch.dtype] = []
    monkeypatch.setattr(flash, "takes_grouped", lambda _device, dtype, _masked, _single: bool(asked.append(dtype)))
    model = build_model(tiny, ("flash",), tiny_weights)
    tokens = torch.zeros(1, 5, dtype=torch.long)
    model(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens)
    assert asked == [torch.float32, torch.bfloat16]


def test_on_a_cpu_grouped_heads_are_taken() -> None:
    assert takes_grouped(CPU, torch.float32, True, False)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("single", [True, False])
def test_no_switch_falls_to_separate_operations_on_the_card_at_hand(
    dtype: torch.dtype, masked: bool, single: bool
) -> None:
    """Whatever the card: a fused kernel runs, and gives what the eager one gives."""
    device = torch.device("cuda", 0)
    queries, start = (1, 63) if single else (64, 0)
    mask = AdditiveMask() if masked else BooleanMask()
    q = torch.randn(2, 4, queries, 64, device=device, dtype=dtype)
    k, v = torch.randn(2, 2, 2, 64, 64, device=device, dtype=dtype)
    expected = EagerAttention()(
        q.double(),
        k.double(),
        v.double(),
        AdditiveMask().dense(queries, start, device, torch.float64),
        AdditiveMask().apply,
    )
    for attend in (FlashAttention(), FlashAttention(BACKENDS["efficient"])):
        tensor = attend.mask(mask, queries, start, device, dtype)
        assert (tensor is not None) is masked
        ran = operations_of(lambda attend=attend, tensor=tensor: attend(q, k, v, tensor, mask.apply))
        assert not [name for name in ran if "softmax" in name or "math" in name], ran
        context = attend(q, k, v, tensor, mask.apply)
        tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
        assert (context - expected).abs().max() <= tolerance


@pytest.mark.cuda
def test_without_flashattention_and_cudnn_it_is_the_memory_efficient_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a T4: what PyTorch says of its kernels is said otherwise."""
    for name in ("can_use_flash_attention", "can_use_cudnn_attention"):
        monkeypatch.setattr(flash, name, lambda _: False)
    takes_grouped.cache_clear()
    try:
        device = torch.device("cuda", 0)
        q, k = (torch.randn(1, heads, 64, 64, device=device, dtype=torch.float16) for heads in (4, 2))
        attend = FlashAttention()
        attend.mask(BooleanMask(), 64, 0, device, torch.float16)
        assert not attend.grouped
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):  # such a card has no other
            attend(q, k, k, None, BooleanMask().apply)
    finally:
        takes_grouped.cache_clear()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_forced_backend_is_the_only_one_allowed(backend: str, calls: list[Call]) -> None:
    attend = apply(BASELINE_PARTS, backend=backend).attend
    q = torch.randn(1, 2, 4, 16)
    try:
        attend(q, q, q, None, BooleanMask().apply)
    except RuntimeError:  # this machine has no such kernel
        assert backend not in ("math", "flash")
    assert [name for name, on in calls[0]["allowed"].items() if on] == [backend]


def test_auto_leaves_the_choice_to_pytorch(calls: list[Call]) -> None:
    q = torch.randn(1, 2, 4, 16)
    apply(BASELINE_PARTS).attend(q, q, q, None, BooleanMask().apply)
    assert all(calls[0]["allowed"].values())


def test_the_backend_comes_from_the_options(
    tiny: ModelConfig, tiny_weights: dict[str, Tensor], calls: list[Call]
) -> None:
    run(tiny, tiny_weights, {"flash": {"backend": "math"}, "mask": {}}, 4)
    assert all(call["allowed"]["math"] and not call["allowed"]["flash"] for call in calls)


@pytest.mark.parametrize(
    ("decode", "opts", "queries", "split"),
    [
        ("split", ("flash", "mask"), 1, True),
        ("split", ("flash",), 1, False),  # a mask tensor is for PyTorch's kernels
        ("split", ("flash", "mask"), 3, False),
        ("sdpa", ("flash", "mask"), 1, False),
    ],
)
def test_a_single_query_takes_a_kernel_of_ours_where_it_is_asked_for(
    tiny: ModelConfig,
    tiny_weights: dict[str, Tensor],
    calls: list[Call],
    monkeypatch: pytest.MonkeyPatch,
    decode: str,
    opts: tuple[str, ...],
    queries: int,
    split: bool,
) -> None:
    given: list[Tensor] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        given.append(k)
        return EagerAttention()(q, k, v, torch.zeros(1, k.shape[-2]), AdditiveMask().apply)

    monkeypatch.setattr(token_attention, "takes_query", lambda q: q.shape[-2] == 1)
    monkeypatch.setattr(token_attention, "split_attention", attend)
    options = {name: {"decode": decode} if name == "flash" else {} for name in opts}
    logits, expected = (run(tiny, tiny_weights, of, 5, queries) for of in (options, ()))
    torch.testing.assert_close(logits, expected)
    assert [k.shape[2] for k in given] == [6] * tiny.num_layers * split
    assert len(calls) == tiny.num_layers * (1 if split else 2)


def test_to_the_compiler_the_kernel_is_one_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_attention, "takes_query", lambda q: True)
    called: list[Any] = []

    def backend(graph: torch.fx.GraphModule, given: list[Tensor]) -> Callable[..., Any]:
        called.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return lambda *arguments: (torch.zeros(1, 4, 1, 8),)

    attend = torch.compile(FlashAttention(split=True), backend=backend, fullgraph=True)
    k = torch.randn(1, 2, 3, 8)
    attend(torch.randn(1, 4, 1, 8), k, k, None, BooleanMask().apply)
    assert called == [torch.ops.qwen3bench.split_attention.default]


def test_where_the_kernel_is_not_for_it_it_is_pytorchs(
    tiny: ModelConfig, tiny_weights: dict[str, Tensor], calls: list[Call]
) -> None:
    run(tiny, tiny_weights, {"flash": {"decode": "split"}, "mask": {}}, 5, 1)
    assert len(calls) == 2 * tiny.num_layers


def test_pytorchs_kernel_is_the_default_and_either_keeps_the_backend() -> None:
    assert options_of("opt", "flash").items() >= {"backend": "auto", "decode": "sdpa"}.items()
    assert apply(BASELINE_PARTS).attend == FlashAttention(None, split=False)
    for decode, split in (("sdpa", False), ("split", True)):
        attend = apply(BASELINE_PARTS, backend="math", decode=decode).attend
        assert attend == FlashAttention(BACKENDS["math"], split=split)


def test_an_unknown_way_to_decode_is_named_with_those_that_exist() -> None:
    with pytest.raises(UserError, match=r"flash.decode='own' is unknown; choose sdpa or split"):
        apply(BASELINE_PARTS, decode="own")


def test_an_unknown_backend_is_named_with_those_that_exist() -> None:
    with pytest.raises(UserError, match=r"flash.backend='cudn' is unknown; .* auto, flash, cudnn, efficient, math"):
        apply(BASELINE_PARTS, backend="cudn")
