"""`recompute`: backward computes blocks again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwen3bench import ModelConfig, build_model
from qwen3bench.errors import UserError


def kept_numbers(config: ModelConfig, weights: dict[str, Tensor], opts: dict[str, dict[str, int]]) -> int:
    """How many numbers the forward keeps for backward, in tensors that are no parameters."""
    model = build_model(config, opts, weights).requires_grad_(True)
    parameters = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    tokens = torch.randint(config.vocab_size, (2, 40))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
    del loss
    return sum(kept.values())


def test_every_block_or_every_other_is_computed_again(tiny: ModelConfig, tiny_weights: dict[str, Tensor]) -> None:
    asked = {every: build_model(tiny, {"recompute": {"every": every}}).parts.recomputed for every in (1, 2, 3)}
    assert [block for block in range(7) if asked[1](block)] == list(range(7))
    assert [block for block in range(7) if asked[2](block)] == [0, 2, 4, 6]
    assert [block for block in range(7) if asked[3](block)] == [0, 3, 6]


def test_it_keeps_less(tiny: ModelConfig, tiny_weights: dict[str, Tensor]) -> None:
    everything = kept_numbers(tiny, tiny_weights, {})
    other = kept_numbers(tiny, tiny_weights, {"recompute": {"every": 2}})
    least = kept_numbers(tiny, tiny_weights, {"recompute": {}})
    assert least < other < everything
    assert least < 0.5 * everything


def test_every_is_a_whole_number(tiny: ModelConfig) -> None:
    for every in (0, 1.5, False):
        with pytest.raises(UserError, match=r"recompute\.every=.* must be a whole number from 1 on"):
            build_model(tiny, {"recompute": {"every": every}}, device="meta")
