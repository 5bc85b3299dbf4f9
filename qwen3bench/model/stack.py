"""Several linear layers whose weights are row slices of one stored tensor, so that one product serves them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen3bench.model.gradients import asked_for
from qwen3bench.model.weights import stacked


class _Whole(torch.autograd.Function):
    """The tensor whose row slices the given weights are; it copies nothing, and neither does its backward."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, *weights: Tensor) -> Tensor:
        ctx.rows = [weight.shape[0] for weight in weights]
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        return None, *gradient.split(ctx.rows)


class StackedLinears(nn.Module):
    """A module some of whose linear layers share one stored weight.

    Checkpoints and the printed tree stay stock: the layers keep their names, and their weights are views (gpt-fast
    adapts fused layouts in a load hook likewise). Nothing is copied where the weights lie one after the other already.
    Each layer's gradient is its rows of the stored weight's, a view as well.
    """

    def stack(self, *names: str) -> None:
        """Share one stored weight among the linear layers of these names; to be called at the end of `__init__`."""
        self._stacked = names
        self.pack()
        self.register_load_state_dict_post_hook(lambda module, _: module.pack())  # assign=True replaces the weights

    def pack(self) -> None:
        """Store the weights as slices of one tensor; the parameters stay the ones that they are."""
        linears = [getattr(self, name) for name in self._stacked]
        self._rows = [linear.weight.shape[0] for linear in linears]
        self.stacked_weight = stacked(*(linear.weight for linear in linears))
        for linear, rows in zip(linears, self.stacked_weight.split(self._rows), strict=True):
            linear.weight.data = rows

    def product(self, x: Tensor) -> Tensor:
        """All layers' outputs of x (…, in), side by side: (…, sum of their widths)."""
        return F.linear(x, self._weight())

    def _weight(self) -> Tensor:
        """The stored weight; where gradients are asked for, one that hands its own on to the layers."""
        if torch.is_grad_enabled():
            weights = [getattr(self, name).weight for name in self._stacked]
            if asked_for(*weights):
                whole: Tensor = _Whole.apply(self.stacked_weight, *weights)
                return whole
        return self.stacked_weight

    def products(self, x: Tensor) -> tuple[Tensor, ...]:
        """Each layer's output of x (…, in), views on one product."""
        return self.product(x).split(self._rows, dim=-1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StackedLinears:
        super()._apply(fn, recurse)
        self.pack()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # deepcopy and unpickling copy each parameter on its own
        self.pack()
