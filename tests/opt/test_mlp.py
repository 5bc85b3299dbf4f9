"""`mlp`: one gate-up product over one stored weight, then SiLU and product in one kernel."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen3bench import ModelConfig, build_model
from qwen3bench.bench.equivalence import whole_size
from qwen3bench.choices import options_of
from qwen3bench.model.layers import FeedForward
from qwen3bench.opt import mlp
from qwen3bench.opt.mlp import (
    TILES,
    FusedFeedForward,
    Tile,
    best_tile,
    multiprocessors_for_tiles,
    silu_mul,
    swiglu_row,
    swiglu_tiles,
)


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


def plain(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.double().chunk(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up


@pytest.mark.parametrize("shape", [(2, 3, 14), (1, 256), (5, 1, 2)])
def test_silu_mul(shape: tuple[int, ...]) -> None:
    for dtype, rtol in ((torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 2**-7)):
        gate_up = (4 * torch.randn(shape)).to(dtype)
        out = silu_mul(gate_up)
        assert out.shape == (*shape[:-1], shape[-1] // 2)
        assert out.dtype is dtype
        torch.testing.assert_close(out.double(), plain(gate_up), rtol=rtol, atol=0)


def test_silu_is_of_the_gate_and_not_of_the_up_half() -> None:
    assert silu_mul(torch.tensor([-30.0, 5.0])).abs() < 1e-10
    assert silu_mul(torch.tensor([5.0, -30.0])) == pytest.approx(-149.0, abs=0.1)


def test_feed_forward_is_the_baselines(tiny: ModelConfig) -> None:
    baseline, fused = FeedForward(tiny).double(), FusedFeedForward(tiny).double()
    fused.load_state_dict(baseline.state_dict())
    x = torch.randn(2, 5, tiny.emb_dim, dtype=torch.float64)
    torch.testing.assert_close(fused(x), baseline(x), rtol=0, atol=1e-14)


@pytest.mark.cuda
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-8), (torch.float16, 2**-10)])
@pytest.mark.parametrize("shape", [(1, 1, 6144), (2, 511, 51200), (3, 7, 2 * 77), (1, 2048, 6144)])
def test_silu_mul_on_cuda_is_one_kernel_and_right(shape: tuple[int, ...], dtype: torch.dtype, rtol: float) -> None:
    gate_up = 4 * torch.randn(shape, device="cuda", dtype=dtype)
    expected = plain(gate_up)
    torch.testing.assert_close(silu_mul(gate_up).double(), expected, rtol=rtol, atol=1e-7)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        silu_mul(gate_up)
        torch.cuda.synchronize()
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert [kernel.name for kernel in kernels] == ["_silu_mul_kernel"]


@pytest.mark.cuda
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize(("width", "dim"), [(3072, 1024), (77, 130), (5, 2049)])
def test_a_single_tokens_product_and_swiglu_are_one_kernel(
    width: int, dim: int, dtype: torch.dtype, tolerance: float
) -> None:
    weight = torch.randn(2 * width, dim, device="cuda", dtype=dtype) * dim**-0.5
    x = torch.randn(1, 3, dim, device="cuda", dtype=dtype)[:, 1:2]  # a slice, as of a longer sequence
    expected = plain(x.double() @ weight.double().T)
    assert (swiglu_row(x, weight).double() - expected).abs().max() <= tolerance
    assert swiglu_row(x, weight).shape == (1, 1, width)


needs_tiles = pytest.mark.skipif(
    not (torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9),
    reason="needs a Hopper card or a later one",
)


@needs_tiles
@pytest.mark.cuda
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize(("rows", "width", "dim"), [(512, 3072, 1024), (2049, 3072, 1024), (1, 77, 200), (300, 136, 8)])
def test_tiles_are_swiglu(rows: int, width: int, dim: int, dtype: torch.dtype, tolerance: float, tile: Tile) -> None:
    weight = torch.randn(2 * width, dim, device="cuda", dtype=dtype) * dim**-0.5
    x = torch.randn(2, rows, dim, device="cuda", dtype=dtype)[1:]
    assert multiprocessors_for_tiles(weight) == torch.cuda.get_device_properties().multi_processor_count
    out = swiglu_tiles(x, weight, tile)
    assert out.shape == (1, rows, width)
    assert out.dtype is dtype
    torch.testing.assert_close(out.double(), plain(x.double() @ weight.double().T), rtol=tolerance, atol=1e-3)


@needs_tiles
@pytest.mark.cuda
@pytest.mark.parametrize("compiled", [False, True])
def test_a_prompts_product_and_swiglu_are_one_kernel(
    tiny: ModelConfig, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlp, "_FULL", 0)
    ff = FusedFeedForward(replace(tiny, emb_dim=256, hidden_dim=512)).to("cuda", torch.bfloat16)
    forward = torch.compile(ff.forward, fullgraph=True) if compiled else ff
    with torch.inference_mode():
        x = torch.randn(2, 300, 256, device="cuda", dtype=torch.bfloat16)
        expected = F.linear(plain(x.double() @ ff.stacked_weight.double().T), ff.fc3.weight.double())
        torch.testing.assert_close(forward(x).double(), expected, rtol=0, atol=0.02)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            forward(x)
            torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert names[0] == "_swiglu_tile_kernel"
    assert not [name for name in names[1:] if "swiglu" in name or "silu" in name]


@pytest.mark.parametrize(
    ("tokens", "width", "expected"),
    [
        (8192, 3072, (128, 128)),
        (2048, 3072, (128, 128)),
        (1536, 3072, None),  # 288 tiles: two waves of 132, and a third with 24
        (1024, 3072, None),  # the small ones would take two waves
        (512, 3072, (64, 64)),
        (256, 3072, (64, 32)),
        (8, 12288, None),  # a tile would be empty for the most part
        (512, 12288, (128, 128)),
    ],
)
def test_tiles_where_the_last_wave_is_full(tokens: int, width: int, expected: tuple[int, int] | None) -> None:
    tile = best_tile(tokens, width, multiprocessors=132)
    assert (tile and tile[:2]) == expected


@pytest.mark.parametrize("size", [(1, 256), (1, 512), (1, 2048), (1, 8192), (8, 1024), (8, 2048)])
@pytest.mark.parametrize("model", ["qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b", "qwen3-14b", "qwen3-32b"])
def test_the_gate_judges_the_tiles_that_are_timed(model: str, size: tuple[int, int]) -> None:
    width = options_of("model", model)["hidden_dim"]
    assert best_tile(math.prod(whole_size([size])), width, 132) == best_tile(math.prod(size), width, 132)


def test_a_cpu_has_no_tiles() -> None:
    weight = torch.zeros(16, 8, dtype=torch.bfloat16)
    assert multiprocessors_for_tiles(weight) == 0
    assert best_tile(8192, 3072, multiprocessors=0) is None
