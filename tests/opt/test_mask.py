"""`mask`: causality as a boolean."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwen3bench import ModelConfig, build_model
from qwen3bench.model.attention import AdditiveMask
from qwen3bench.opt.mask import BooleanMask

CPU = torch.device("cpu")


def test_true_is_blocked() -> None:
    mask = BooleanMask().dense(3, 0, CPU, torch.float32)
    assert mask.dtype is torch.bool
    assert mask.tolist() == [[False, True, True], [False, False, True], [False, False, False]]


def test_queries_after_a_cache_see_all_of_it() -> None:
    mask = BooleanMask().dense(2, 3, CPU, torch.float32)
    assert mask.tolist() == [[False, False, False, False, True], [False, False, False, False, False]]
    assert BooleanMask().dense(1, 3, CPU, torch.float32).tolist() == [[False] * 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_baselines_is_zero_or_minus_infinity(dtype: torch.dtype) -> None:
    mask = AdditiveMask().dense(2, 1, CPU, dtype)
    assert mask.dtype is dtype
    assert mask.tolist() == [[0, 0, float("-inf")], [0, 0, 0]]


@pytest.mark.parametrize(("queries", "start"), [(1, 0), (5, 0), (1, 4), (3, 2)])
def test_masked_scores_are_the_baselines(queries: int, start: int) -> None:
    scores = torch.randn(2, 4, queries, start + queries)
    boolean, additive = BooleanMask(), AdditiveMask()
    masked = boolean.apply(scores, boolean.dense(queries, start, CPU, scores.dtype))
    assert torch.equal(masked, additive.apply(scores, additive.dense(queries, start, CPU, scores.dtype)))
    assert masked.isneginf().sum() == 2 * 4 * queries * (queries - 1) // 2


@pytest.mark.parametrize("on", [False, True])
def test_the_mask_is_built_once_a_forward_for_all_layers(
    tiny: ModelConfig, tiny_weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, on: bool
) -> None:
    kind = BooleanMask if on else AdditiveMask
    built: list[Tensor] = []
    used: list[Tensor] = []
    dense, apply = kind.dense, kind.apply

    def spy_dense(self: BooleanMask, queries: int, start: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        built.append(dense(self, queries, start, device, dtype))
        return built[-1]

    def spy_apply(self: BooleanMask, scores: Tensor, mask: Tensor) -> Tensor:
        used.append(mask)
        return apply(self, scores, mask)

    monkeypatch.setattr(kind, "dense", spy_dense)
    monkeypatch.setattr(kind, "apply", spy_apply)
    model = build_model(tiny, ("mask",) if on else (), tiny_weights)
    for count in (1, 2):
        model(torch.zeros(1, 5, dtype=torch.long))
        assert len(built) == count
        assert len(used) == count * tiny.num_layers
        assert all(mask is built[-1] for mask in used[-tiny.num_layers :])
    assert built[-1].dtype is (torch.bool if on else torch.float32)


def test_with_flash_no_mask_is_built(
    tiny: ModelConfig, tiny_weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> Tensor:
        raise AssertionError("a mask tensor was built")

    monkeypatch.setattr(BooleanMask, "dense", refuse)
    build_model(tiny, ("flash", "mask"), tiny_weights)(torch.zeros(1, 5, dtype=torch.long))
