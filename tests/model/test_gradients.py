"""No gradient is lost without a word, and no model trains another."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from qwen3bench import ModelConfig, build_model
from qwen3bench.config.choices import choices
from qwen3bench.errors import UserError
from qwen3bench.model.baseline import assemble
from qwen3bench.model.build import filled
from qwen3bench.model.gradients import asked_for
from qwen3bench.model.layers import RMSNorm
from qwen3bench.model.parts import Parts
from qwen3bench.model.qwen3 import Qwen3Model
from qwen3bench.worker.bank import Bank

STACKED = [("mlp",), ("qkv",), ("mlp", "qkv")]


class ForwardOnlyNorm(RMSNorm):
    """What a kernel without backward does: right values, and nothing recorded."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach()).detach()


class FrozenGainNorm(RMSNorm):
    """Hands the gradient on and keeps none for itself."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, self.weight.shape, self.weight.detach(), self.eps)


def own(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    copies = {id(tensor): tensor.clone() for tensor in weights.values()}
    return {name: copies[id(tensor)] for name, tensor in weights.items()}


def with_norm(tiny: ModelConfig, weights: dict[str, Tensor], norm: Callable[[int, float], nn.Module]) -> Qwen3Model:
    def switch(parts: Parts) -> Parts:
        return replace(parts, norm=norm)

    with torch.device("meta"):
        model = Qwen3Model(tiny, assemble({"mine": switch}))
    return filled(model, own(weights))


def step(model: nn.Module) -> None:
    device = next(model.parameters()).device
    model(torch.arange(6, device=device)[None]).sum().backward()


# What has no backward


@pytest.mark.parametrize("norm", [ForwardOnlyNorm, FrozenGainNorm])
def test_a_part_without_backward_is_an_error_and_no_half_gradient(
    tiny: ModelConfig, tiny_weights: dict[str, Tensor], norm: type[RMSNorm]
) -> None:
    model = with_norm(tiny, tiny_weights, norm)
    model.requires_grad_(True)
    with pytest.raises(UserError, match=r"no gradient would reach \S+\.weight and \d+ others: a part of this model"):
        step(model)
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(6)[None])).all()
    model.requires_grad_(False)
    model.out_head.weight.requires_grad_(True)  # behind all of it: its gradient is whole
    step(model)
    assert model.out_head.weight.grad is not None


def test_it_is_seen_when_more_is_to_be_trained_later(tiny: ModelConfig, tiny_weights: dict[str, Tensor]) -> None:
    model = with_norm(tiny, tiny_weights, ForwardOnlyNorm)
    model.out_head.weight.requires_grad_(True)
    step(model)
    model.requires_grad_(True)
    with pytest.raises(UserError, match="no gradient would reach"):
        step(model)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("name", choices("opt"))
def test_every_switch_lets_gradients_reach_what_is_trained_alone(
    tiny: ModelConfig, tiny_weights: dict[str, Tensor], name: str, device: str
) -> None:
    """Of each layer by itself, all others frozen: then what it is given may need no gradient at all."""
    dtype, tolerance = (torch.float64, 1e-9) if device == "cpu" else (torch.float32, 2e-3)  # which our kernels take
    exact = {key: tensor.to(device, dtype) for key, tensor in own(tiny_weights).items()}
    model, whole = build_model(tiny, (name,), exact), build_model(tiny, (), own(exact))
    step(whole.requires_grad_(True))
    expected = dict(whole.named_parameters())
    for path, parameter in model.named_parameters():
        if path == "tok_emb.weight":  # `tie` makes the head of it
            continue
        parameter.requires_grad_(True)
        step(model)
        gradient, wanted = parameter.grad, expected[path].grad
        assert gradient is not None, path
        assert wanted is not None
        assert (gradient - wanted).norm() <= tolerance * wanted.norm(), path
        parameter.requires_grad_(False)


def test_gradients_are_asked_for_where_they_are_on_and_a_tensor_wants_one() -> None:
    plain, wanted = torch.ones(1), torch.ones(1, requires_grad=True)
    assert asked_for(plain, wanted)
    assert not asked_for(plain)
    with torch.no_grad():
        assert not asked_for(wanted)


# What copies and conversions keep


@pytest.mark.parametrize("opts", STACKED, ids="+".join)
@pytest.mark.parametrize("change", [lambda m: m.double(), deepcopy], ids=["double", "deepcopy"])
def test_what_is_trained_stays_so(
    tiny: ModelConfig,
    tiny_weights: dict[str, Tensor],
    opts: tuple[str, ...],
    change: Callable[[Qwen3Model], Qwen3Model],
) -> None:
    model = build_model(tiny, opts, own(tiny_weights)).requires_grad_(True)
    model.trf_blocks[0].ff.fc1.weight.requires_grad_(False)
    changed = change(model)
    frozen = [name for name, parameter in changed.named_parameters() if not parameter.requires_grad]
    assert frozen == ["trf_blocks.0.ff.fc1.weight"]
    step(changed)
    assert [name for name, p in changed.named_parameters() if p.grad is None] == frozen


@pytest.mark.parametrize("opts", STACKED, ids="+".join)
def test_an_optimizer_made_before_a_conversion_still_trains_the_model(
    tiny: ModelConfig, tiny_weights: dict[str, Tensor], opts: tuple[str, ...]
) -> None:
    model = build_model(tiny, opts, own(tiny_weights)).requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.double()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    logits = model(torch.arange(6)[None]).detach()
    step(model)
    optimizer.step()
    assert [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])] == []
    assert not torch.equal(model(torch.arange(6)[None]), logits)


# Whose weights are trained


def test_a_model_alone_trains_itself(tiny: ModelConfig, tiny_weights: dict[str, Tensor]) -> None:
    weights = own(tiny_weights)
    model = build_model(tiny, ("mlp",), weights).requires_grad_(True)
    step(model)
    copy = deepcopy(model)
    step(copy)  # which holds copies of its own
    step(model)


def test_models_on_the_same_tensors_train_none(tiny: ModelConfig, tiny_weights: dict[str, Tensor]) -> None:
    weights = own(tiny_weights)
    first, second = build_model(tiny, ("mlp",), weights), build_model(tiny, ("norm", "tie"), weights)
    for model in (first, second):
        model.requires_grad_(True)
        with pytest.raises(UserError, match="training this model would train another one"):
            step(model)
        model.requires_grad_(False)
    separate = build_model(tiny, ("norm",), own(weights)).requires_grad_(True)
    step(separate)
    del first
    second.requires_grad_(True)
    step(second)  # which is the only one now
    assert separate.tok_emb.weight.grad is not None


def test_the_workers_bank_trains_by_turns(tiny: ModelConfig) -> None:
    """Its training state puts the weights back between the cells."""
    bank = Bank(tiny, "random", torch.device("cpu"), torch.float32, 0, {})
    models = [bank.build(()), bank.build(("mlp",))]
    for model in models:
        step(model.requires_grad_(True))
