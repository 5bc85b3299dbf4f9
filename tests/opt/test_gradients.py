"""Every switch has the gradients of the baseline, for each parameter by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3bench import ModelConfig, build_model, load_weights
from qwen3bench.config import choices
from qwen3bench.kernels.swiglu import SwiGLUDown
from qwen3bench.model.build import hf_names
from qwen3bench.model.qwen3 import Qwen3Model
from qwen3bench.opt.norm import FusedRMSNorm

SWITCHES = [(name,) for name in choices.choices("opt") if name != "gemv"]  # which is for a single token
CELLS = [*SWITCHES, tuple(name for name in choices.choices("opt") if name != "gemv")]
LAYERS = 2


def trainable(config: ModelConfig, opts: tuple[str, ...], weights: Mapping[str, Tensor]) -> Qwen3Model:
    return build_model(config, opts, dict(weights)).requires_grad_(True)


def weights_of(config: ModelConfig, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random weights whose gains are not all 1, so that each gain counts."""
    weights = load_weights("random", config, device=device, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in weights.items():
        if name.endswith("norm.weight"):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        elif "layers" in name:
            tensor.mul_(4)
    return {name: tensor.to(dtype) for name, tensor in weights.items()}


def gradients(model: Qwen3Model, tokens: Tensor) -> dict[str, Tensor]:
    """By parameter; of a tied head none. The loss is no mean, so its gradient is not 1."""
    with torch.enable_grad():
        (0.7 * model.loss(tokens[:, :-1], tokens[:, 1:])).backward()
    found = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def expected(config: ModelConfig, weights: Mapping[str, Tensor], tokens: Tensor, tied: bool) -> dict[str, Tensor]:
    """The baseline's in float64; a tied matrix's is the sum of the embedding's and the head's."""
    found = gradients(trainable(config, (), {name: tensor.double() for name, tensor in weights.items()}), tokens)
    if tied:
        found["tok_emb.weight"] = found["tok_emb.weight"] + found.pop("out_head.weight")
    return found


def tokens_of(config: ModelConfig, device: str = "cpu", length: int = 38) -> Tensor:
    ids = torch.randint(config.vocab_size, (3, length), generator=torch.Generator().manual_seed(2))
    return ids.to(device)


@pytest.mark.parametrize("opts", CELLS, ids="+".join)
def test_gradients_in_float64_are_the_baselines(tiny: ModelConfig, opts: tuple[str, ...]) -> None:
    weights, tokens = weights_of(tiny, "cpu", torch.float64), tokens_of(tiny)
    found = gradients(trainable(tiny, opts, weights), tokens)
    wanted = expected(tiny, weights, tokens, "tie" in opts)
    assert set(found) == set(wanted)
    for name, gradient in wanted.items():
        assert gradient.norm() > 0, name
        assert (found[name] - gradient).norm() <= 1e-12 * gradient.norm(), name


@pytest.mark.parametrize("opts", CELLS, ids="+".join)
def test_gradients_stay_where_blocks_are_recomputed(tiny: ModelConfig, opts: tuple[str, ...]) -> None:
    weights, tokens = weights_of(tiny, "cpu", torch.float64), tokens_of(tiny)
    model = trainable(tiny, opts, weights)
    plain = gradients(model, tokens)
    model.parts = replace(model.parts, recomputed=lambda _: True)
    again = gradients(model, tokens)
    assert all(torch.equal(again[name], gradient) for name, gradient in plain.items())


def test_a_stacked_weights_gradients_are_views_of_one(tiny: ModelConfig) -> None:
    model = trainable(tiny, ("mlp", "qkv"), weights_of(tiny, "cpu", torch.float32))
    model(tokens_of(tiny)[:, :-1]).sum().backward()
    block = model.trf_blocks[0]
    for layers in ((block.ff.fc1, block.ff.fc2), (block.att.W_query, block.att.W_key, block.att.W_value)):
        assert len({layer.weight.grad.untyped_storage().data_ptr() for layer in layers}) == 1


def test_two_backward_passes_add_up(tiny: ModelConfig) -> None:
    model = trainable(tiny, CELLS[-1], weights_of(tiny, "cpu", torch.float64))
    tokens = tokens_of(tiny)
    once = gradients(model, tokens)
    for _ in range(2):
        (0.35 * model.loss(tokens[:, :-1], tokens[:, 1:])).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, once[name], rtol=1e-9, atol=1e-15)


def test_swiglu_and_down_pass_the_check_by_differences() -> None:
    gate_up = torch.randn(2, 3, 10, dtype=torch.float64, requires_grad=True)
    down = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(SwiGLUDown.apply, (gate_up, down))


def test_swiglu_keeps_its_input_and_not_the_product() -> None:
    gate_up, down = torch.randn(7, 10, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        SwiGLUDown.apply(gate_up, down)
    assert kept == [(7, 10), (4, 5)]


def test_without_gradients_nothing_is_kept(tiny: ModelConfig) -> None:
    model = trainable(tiny, CELLS[-1], weights_of(tiny, "cpu", torch.float32))
    with torch.no_grad():
        assert model(tokens_of(tiny)).grad_fn is None


# A width that no tile divides, and heads of 128 as the models have.
SMALL = {"num_layers": LAYERS, "emb_dim": 192, "num_heads": 4, "num_kv_heads": 2, "head_dim": 128, "hidden_dim": 320}


@pytest.mark.cuda
@pytest.mark.parametrize("opts", CELLS, ids="+".join)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-5), (torch.bfloat16, 0.03)])
def test_gradients_on_cuda_are_the_baselines(
    tiny: ModelConfig, opts: tuple[str, ...], dtype: torch.dtype, limit: float
) -> None:
    config = ModelConfig(**{**vars(tiny), **SMALL})
    weights, tokens = weights_of(config, "cuda", dtype), tokens_of(config, "cuda", 201)
    found = gradients(trainable(config, opts, weights), tokens)
    wanted = expected(config, weights, tokens, "tie" in opts)
    assert set(found) == set(wanted)
    for name, gradient in wanted.items():
        error = (found[name].double() - gradient).norm() / gradient.norm()
        slope = (found[name].double() * gradient).sum() / gradient.square().sum()
        assert error <= limit, (name, error.item())
        assert abs(slope - 1) <= limit / 3, (name, slope.item())


@pytest.mark.cuda
@pytest.mark.parametrize("opts", CELLS, ids="+".join)
def test_gradients_under_autocast_are_the_baselines(tiny: ModelConfig, opts: tuple[str, ...]) -> None:
    config = ModelConfig(**{**vars(tiny), **SMALL})
    weights, tokens = weights_of(config, "cuda", torch.float32), tokens_of(config, "cuda", 201)
    with torch.autocast("cuda", torch.bfloat16):
        found = gradients(trainable(config, opts, weights), tokens)
    for name, gradient in expected(config, weights, tokens, "tie" in opts).items():
        assert found[name].dtype is torch.float32
        slope = (found[name] * gradient).sum() / gradient.square().sum()
        assert (found[name].double() - gradient).norm() <= 0.1 * gradient.norm(), name
        assert abs(slope - 1) <= 0.03, (name, slope.item())


@pytest.mark.cuda
@pytest.mark.parametrize("opts", CELLS, ids="+".join)
def test_a_captured_backward_writes_the_same_gradients(tiny: ModelConfig, opts: tuple[str, ...]) -> None:
    config = ModelConfig(**{**vars(tiny), **SMALL})
    model = trainable(config, opts, weights_of(config, "cuda", torch.float32))
    tokens = tokens_of(config, "cuda", 65)

    def step() -> None:
        model.zero_grad()
        with torch.enable_grad():
            model.loss(tokens[:, :-1], tokens[:, 1:]).backward()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    eager = {name: p.grad.clone() for name, p in model.named_parameters()}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    for parameter in model.parameters():
        parameter.grad.zero_()
    graph.replay()
    for name, parameter in model.named_parameters():
        assert (parameter.grad - eager[name]).norm() <= 1e-4 * eager[name].norm(), name  # SDPA's adds as it comes


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 1000, 1024), (2, 511, 16, 128), (5, 77), (1, 1, 8, 128)])
def test_the_norms_gradients_on_cuda(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    norm = FusedRMSNorm(shape[-1], eps=1e-6).to("cuda", dtype)
    norm.weight.data.uniform_(0.5, 1.5)
    wide = torch.randn(*shape[:-1], 2 * shape[-1], device="cuda", dtype=dtype)
    for x in (wide[..., : shape[-1]].contiguous(), wide[..., shape[-1] :]):  # whole rows, and rows of a wider product
        x = x.detach().requires_grad_(True)
        given = torch.randn(shape, device="cuda", dtype=dtype)
        if len(shape) == 4:  # as attention hands it back
            given = given.transpose(1, 2).contiguous().transpose(1, 2)
        with torch.enable_grad():
            of_x, of_gain = torch.autograd.grad(norm(x), (x, norm.weight), given)
            double, gain = x.detach().double().requires_grad_(True), norm.weight.detach().double().requires_grad_(True)
            wanted = torch.autograd.grad(F.rms_norm(double, gain.shape, gain, 1e-6), (double, gain), given.double())
        limit = 2e-6 if dtype is torch.float32 else 4e-3
        for found, right in zip((of_x, of_gain), wanted, strict=True):
            assert (found.double() - right).norm() <= limit * right.norm()


def test_the_names_are_all_parameters(tiny: ModelConfig) -> None:
    """What is compared above is every parameter that a checkpoint names."""
    assert {f"{name}.weight" for name in hf_names(tiny)} == set(dict(build_model(tiny).named_parameters()))
