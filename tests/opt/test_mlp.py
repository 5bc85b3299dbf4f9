"""`mlp`: one gate-up product over one stored weight, then SiLU and product in one kernel."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen3bench import ModelConfig, build_model
from qwen3bench.kernels import swiglu
from qwen3bench.model.layers import FeedForward
from qwen3bench.opt import mlp
from qwen3bench.opt.mlp import FusedFeedForward, token_feed_forward


def is_one_stored_weight(ff: FusedFeedForward) -> bool:
    """Whether fc1's and fc2's weights are the two halves of the tensor that the product reads."""
    rows = ff.stacked_weight.shape[0] // 2
    return (
        ff.fc1.weight.data_ptr() == ff.stacked_weight.data_ptr()
        and ff.fc2.weight.data_ptr() == ff.stacked_weight[rows:].data_ptr()
        and torch.equal(torch.cat((ff.fc1.weight, ff.fc2.weight)), ff.stacked_weight)
        and ff.fc1.weight.dtype is ff.stacked_weight.dtype
    )


def computes_swiglu(ff: FusedFeedForward) -> bool:
    x = torch.randn(2, 3, ff.fc1.in_features, dtype=ff.fc1.weight.dtype)
    expected = F.linear(F.silu(F.linear(x, ff.fc1.weight)) * F.linear(x, ff.fc2.weight), ff.fc3.weight)
    return torch.allclose(ff(x), expected, rtol=0, atol=2e-2 if x.dtype is torch.bfloat16 else 1e-5)


def in_float64(ff: FusedFeedForward, x: Tensor) -> Tensor:
    gate, up = (x.double() @ ff.stacked_weight.double().T).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, ff.fc3.weight.double())


def blocks(model: nn.Module) -> list[FusedFeedForward]:
    return [module for module in model.modules() if isinstance(module, FusedFeedForward)]


def test_every_feed_forward_is_fused(tiny: ModelConfig) -> None:
    assert len(blocks(build_model(tiny, ("mlp",), device="meta"))) == tiny.num_layers
    assert blocks(build_model(tiny, ("flash", "tie", "mask", "norm"), device="meta")) == []


def test_gate_and_up_are_the_banks_own_rows(tiny: ModelConfig, tiny_weights: dict[str, Tensor]) -> None:
    for layer, ff in enumerate(blocks(build_model(tiny, ("mlp",), tiny_weights))):
        assert is_one_stored_weight(ff)
        assert ff.stacked_weight.data_ptr() == tiny_weights[f"model.layers.{layer}.mlp.gate_proj.weight"].data_ptr()
        assert ff.fc2.weight.data_ptr() == tiny_weights[f"model.layers.{layer}.mlp.up_proj.weight"].data_ptr()


def test_weights_stored_apart_are_copied_into_one(tiny: ModelConfig, tiny_weights: dict[str, Tensor]) -> None:
    apart = {name: tensor.clone() for name, tensor in tiny_weights.items()}
    for layer, ff in enumerate(
        blocks(build_model(tiny, ("mlp",), apart | {"lm_head.weight": apart["model.embed_tokens.weight"]}))
    ):
        assert is_one_stored_weight(ff)
        assert ff.stacked_weight.data_ptr() != apart[f"model.layers.{layer}.mlp.gate_proj.weight"].data_ptr()
        assert torch.equal(ff.fc1.weight, apart[f"model.layers.{layer}.mlp.gate_proj.weight"])
        assert computes_swiglu(ff)


def test_nothing_is_counted_twice(tiny: ModelConfig, tiny_weights: dict[str, Tensor]) -> None:
    fused, baseline = build_model(tiny, ("mlp",), tiny_weights), build_model(tiny, (), tiny_weights)
    assert fused.num_parameters == baseline.num_parameters
    assert fused.parameter_bytes == baseline.parameter_bytes
    assert list(fused.state_dict()) == list(baseline.state_dict())


def load(model: nn.Module, other: nn.Module, assign: bool) -> nn.Module:
    model.load_state_dict(other.state_dict(), assign=assign)
    return model


CHANGES: dict[str, Callable[[nn.Module, nn.Module], nn.Module]] = {
    "to": lambda model, other: model.to(torch.bfloat16),
    "double": lambda model, other: model.double(),
    "deepcopy": lambda model, other: copy.deepcopy(model),
    "load_state_dict": lambda model, other: load(model, other, assign=False),
    "load_state_dict(assign)": lambda model, other: load(model, other, assign=True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_one_weight_survives(tiny: ModelConfig, tiny_weights: dict[str, Tensor], change: str) -> None:
    """A stale copy would go unseen: the module would show new weights and compute with the old ones."""
    own = {name: tensor.clone() for name, tensor in tiny_weights.items()}
    other = build_model(tiny, (), {name: tensor.flip(0) for name, tensor in tiny_weights.items()})
    model = CHANGES[change](build_model(tiny, ("mlp",), own), other)
    for layer, ff in enumerate(blocks(model)):
        assert is_one_stored_weight(ff)
        assert computes_swiglu(ff)
        up = tiny_weights[f"model.layers.{layer}.mlp.up_proj.weight"]
        expected = up.flip(0) if change.startswith("load") else up
        assert torch.equal(ff.fc2.weight, expected.to(ff.fc2.weight.dtype))
    assert model.num_parameters == build_model(tiny, (), device="meta").num_parameters


def test_one_gate_up_product(
    tiny: ModelConfig, tiny_weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, ...]] = []
    real = F.linear

    def spy(x: Tensor, weight: Tensor, *bias: Any) -> Tensor:
        shapes.append(tuple(weight.shape))
        return real(x, weight, *bias)

    monkeypatch.setattr(F, "linear", spy)
    x = torch.randn(1, 3, tiny.emb_dim)
    for opts, expected in (
        ((), [(tiny.hidden_dim, tiny.emb_dim)] * 2 + [(tiny.emb_dim, tiny.hidden_dim)]),
        (("mlp",), [(2 * tiny.hidden_dim, tiny.emb_dim), (tiny.emb_dim, tiny.hidden_dim)]),
    ):
        ff = build_model(tiny, opts, tiny_weights).trf_blocks[0].ff
        shapes.clear()
        ff(x)
        assert shapes == expected


@pytest.mark.parametrize("tokens", [(2, 5), (1, 1)])
def test_feed_forward_is_the_baselines(tiny: ModelConfig, tokens: tuple[int, int]) -> None:
    baseline, fused = FeedForward(tiny).double(), FusedFeedForward(tiny).double()
    fused.load_state_dict(baseline.state_dict())
    x = torch.randn(*tokens, tiny.emb_dim, dtype=torch.float64)
    torch.testing.assert_close(fused(x), baseline(x), rtol=0, atol=1e-14)


@pytest.mark.cuda
@pytest.mark.parametrize("compiled", [False, True])
def test_a_single_token_takes_two_kernels(tiny: ModelConfig, compiled: bool) -> None:
    ff = FusedFeedForward(replace(tiny, emb_dim=256, hidden_dim=512)).to("cuda", torch.bfloat16)
    forward = torch.compile(ff.forward, fullgraph=True) if compiled else ff
    with torch.inference_mode():
        x = torch.randn(1, 3, 256, device="cuda", dtype=torch.bfloat16)[:, 1:2]  # a slice, as of a longer sequence
        expected = in_float64(ff, x)
        torch.testing.assert_close(forward(x).double(), expected, rtol=0, atol=0.02)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            forward(x)
            torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert kernels == ["_swiglu_kernel", "_product_kernel"]


@pytest.mark.cuda
def test_the_compiler_is_told_what_comes_of_a_single_token() -> None:
    gate_up, down = torch.randn(2 * 24, 16, device="cuda"), torch.randn(16, 24, device="cuda")
    operation = mlp.compiled_token_feed_forward
    given = (torch.randn(1, 1, 16, device="cuda"), gate_up, down)
    torch.library.opcheck(operation, given, test_utils=("test_schema", "test_faketensor"))
    torch.testing.assert_close(operation(*given), token_feed_forward(*given))


needs_tiles = pytest.mark.skipif(
    not (torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9),
    reason="needs a Hopper card or a later one",
)


@needs_tiles
@pytest.mark.cuda
@pytest.mark.parametrize("compiled", [False, True])
def test_a_prompts_product_and_swiglu_are_one_kernel(
    tiny: ModelConfig, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swiglu, "FULL_WAVE", 0)
    ff = FusedFeedForward(replace(tiny, emb_dim=256, hidden_dim=512)).to("cuda", torch.bfloat16)
    forward = torch.compile(ff.forward, fullgraph=True) if compiled else ff
    with torch.inference_mode():
        x = torch.randn(2, 300, 256, device="cuda", dtype=torch.bfloat16)
        expected = in_float64(ff, x)
        torch.testing.assert_close(forward(x).double(), expected, rtol=0, atol=0.02)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            forward(x)
            torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert names[0] == "_swiglu_tile_kernel"
    assert not [name for name in names[1:] if "swiglu" in name or "silu" in name]
