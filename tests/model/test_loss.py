"""The loss of a training step, and blocks that backward computes again."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3bench import ModelConfig, build_model
from qwen3bench.model.baseline import BASELINE_PARTS
from qwen3bench.model.loss import IGNORED
from qwen3bench.model.qwen3 import Qwen3Model


def batch(config: ModelConfig) -> tuple[Tensor, Tensor]:
    ids = torch.randint(config.vocab_size, (3, 20))
    targets = ids[:, 1:].clone()
    targets[1, 11:] = IGNORED
    return ids[:, :-1], targets


def test_the_loss_is_the_mean_over_targets_that_count(tiny: ModelConfig, tiny_weights: dict[str, Tensor]) -> None:
    model = build_model(tiny, (), tiny_weights)
    tokens, targets = batch(tiny)
    chosen = torch.log_softmax(model(tokens), -1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    counts = targets != IGNORED
    torch.testing.assert_close(model.loss(tokens, targets), -chosen[counts].mean())


def test_the_loss_of_bfloat16_is_float32(tiny: ModelConfig, tiny_weights: dict[str, Tensor]) -> None:
    model = build_model(tiny, (), tiny_weights, dtype=torch.bfloat16)
    tokens, targets = batch(tiny)
    loss = model.loss(tokens, targets)
    assert loss.dtype is torch.float32
    expected = F.cross_entropy(model(tokens).float().flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def count(calls: Counter[int], number: int, *_: object) -> None:
    calls[number] += 1


@pytest.mark.parametrize("again", [(), (0,), (0, 1)])
def test_recomputed_blocks_run_twice_and_change_no_gradient(
    tiny: ModelConfig, tiny_weights: dict[str, Tensor], again: tuple[int, ...]
) -> None:
    parts = replace(BASELINE_PARTS, recomputed=lambda block: block in again)
    tokens, targets = batch(tiny)
    found = []
    for made in (BASELINE_PARTS, parts):
        model = build_model(tiny, (), tiny_weights).requires_grad_(True)
        model.parts = made
        calls = Counter[int]()
        for number, block in enumerate(model.trf_blocks):
            block.att.register_forward_pre_hook(partial(count, calls, number))
        with torch.enable_grad():
            model.loss(tokens, targets).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
        made_again = again if made is parts else ()
        assert calls == {number: 1 + (number in made_again) for number in range(tiny.num_layers)}
    assert all(torch.equal(found[1][name], gradient) for name, gradient in found[0].items())


def test_without_gradients_nothing_is_recomputed(tiny: ModelConfig, tiny_weights: dict[str, Tensor]) -> None:
    model: Qwen3Model = build_model(tiny, (), tiny_weights)
    model.parts = replace(model.parts, recomputed=lambda block: pytest.fail("asked for"))
    with torch.no_grad():
        model(batch(tiny)[0])
