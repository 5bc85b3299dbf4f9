"""What keeps a gradient from being half of one: a part without backward, and weights that two models hold."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from qwen3bench.errors import UserError

_models: WeakSet[nn.Module] = WeakSet()  # that are alive


def asked_for(*tensors: Tensor) -> bool:
    """Whether gradients of one of these are asked for: where code without a backward has to give way."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def is_trained(model: nn.Module) -> bool:
    """Whether gradients of some of its parameters are asked for."""
    return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in model.parameters())


def watch(model: nn.Module) -> None:
    """Count a model among those that may hold the weights of another."""
    _models.add(model)


def refuse_shared(model: nn.Module) -> None:
    """Raise `UserError` where a parameter to train is stored where another model has one: it would be trained as well.

    For models that were made known to `watch`.
    """
    trained = _storages(p for p in model.parameters() if p.requires_grad)
    for collected in (False, True):
        others = [other for other in _models if other is not model]
        if not any(trained & _storages(other.parameters()) for other in others):
            return
        if not collected:  # they may be garbage already
            gc.collect()
    raise UserError(
        "training this model would train another one, built from the same tensors; give each its own: "
        "build_model(…, weights={name: tensor.clone() for name, tensor in weights.items()})"
    )


def refuse_unreached(model: nn.Module, output: Tensor, apart: Iterable[nn.Module]) -> None:
    """Raise `UserError` where backward from `output` would leave parameters to train without a gradient.

    A part whose forward records nothing would do that without a word. `apart` are modules that come after `output`.
    """
    reached = _leaves(output) | {id(p): p for module in apart for p in module.parameters()}
    missing = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in reached]
    if missing:
        others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise UserError(
            f"no gradient would reach {missing[0]}{others}: a part of this model has no backward\n"
            "leave out the optimization that it belongs to, or call the model under torch.no_grad()"
        )


def _leaves(output: Tensor) -> dict[int, Tensor]:
    """The tensors that backward from `output` accumulates gradients in, by id."""
    found: dict[int, Tensor] = {}
    seen: set[Any] = set()
    left = [output.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (variable := getattr(node, "variable", None)) is not None:  # it accumulates
            found[id(variable)] = variable
        left += [before for before, _ in node.next_functions]
    return found


def _storages(parameters: Iterable[Tensor]) -> set[int]:
    return {parameter.untyped_storage().data_ptr() for parameter in parameters if not parameter.is_meta}
