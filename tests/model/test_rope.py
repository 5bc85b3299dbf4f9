"""Rotary position embedding: its tables, and what the rotation must and must not change."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding, apply_rotary_pos_emb

from qwen3bench.config.model_config import ModelConfig
from qwen3bench.model.layers import apply_rope
from qwen3bench.model.qwen3 import rope_tables


def rotate(x: Tensor, position: int, config: ModelConfig) -> Tensor:
    cos, sin = rope_tables(config, "cpu", torch.float64)
    return apply_rope(x, cos[position : position + 1], sin[position : position + 1])


def test_tables_are_the_angles_of_each_position(tiny: ModelConfig) -> None:
    config = replace(tiny, context_length=40_960, head_dim=128)
    cos, sin = rope_tables(config, "cpu", torch.float32)
    assert cos.shape == sin.shape == (40_960, 128)
    for position, i in ((0, 0), (1, 0), (40_959, 0), (40_959, 1), (12_345, 40), (777, 63)):
        angle = position * config.rope_base ** (-2 * i / 128)
        for column in (i, 64 + i):  # both halves of a pair turn by one angle
            assert cos[position, column].item() == pytest.approx(math.cos(angle), abs=1e-7)
            assert sin[position, column].item() == pytest.approx(math.sin(angle), abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tables_are_rounded_once(tiny: ModelConfig, dtype: torch.dtype) -> None:
    exact = rope_tables(tiny, "cpu", torch.float64)
    for table, wide in zip(rope_tables(tiny, "cpu", dtype), exact, strict=True):
        assert torch.equal(table, wide.to(dtype))


def test_rotation_is_transformers(tiny: ModelConfig) -> None:
    theirs = Qwen3RotaryEmbedding(
        Qwen3Config(
            hidden_size=tiny.emb_dim,
            num_attention_heads=tiny.num_heads,
            head_dim=tiny.head_dim,
            rope_parameters={"rope_type": "default", "rope_theta": tiny.rope_base},
        )
    )
    q, k = torch.randn(2, 4, 50, tiny.head_dim), torch.randn(2, 2, 50, tiny.head_dim)
    expected = apply_rotary_pos_emb(q, k, *theirs(q, torch.arange(50)[None]))
    cos, sin = (table[:50] for table in rope_tables(tiny, "cpu", torch.float32))
    for ours, other in zip((apply_rope(q, cos, sin), apply_rope(k, cos, sin)), expected, strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=3e-5)  # theirs has float32 angles, up to 50 radians


def test_rotation_keeps_lengths(tiny: ModelConfig) -> None:
    x = torch.randn(1, 1, 1, tiny.head_dim, dtype=torch.float64)
    assert torch.equal(rotate(x, 0, tiny), x)
    for position in (1, 100, 511):
        rotated = rotate(x, position, tiny)
        assert (rotated - x).norm() > 0.1
        torch.testing.assert_close(rotated.norm(), x.norm())


def test_scores_depend_on_the_distance_alone(tiny: ModelConfig) -> None:
    q, k = torch.randn(2, 1, 1, 1, tiny.head_dim, dtype=torch.float64)

    def score(i: int, j: int) -> Tensor:
        return (rotate(q, i, tiny) * rotate(k, j, tiny)).sum()

    torch.testing.assert_close(score(10, 3), score(407, 400))
    torch.testing.assert_close(score(3, 10), score(400, 407))
    assert not torch.isclose(score(10, 3), score(10, 4))
    assert not torch.isclose(score(10, 3), score(3, 10))


def test_tables_on_meta_allocate_nothing(tiny: ModelConfig) -> None:
    cos, sin = rope_tables(tiny, "meta", torch.bfloat16)
    assert cos.is_meta
    assert sin.is_meta
    assert cos.shape == (tiny.context_length, tiny.head_dim)
    assert cos.dtype is torch.bfloat16
