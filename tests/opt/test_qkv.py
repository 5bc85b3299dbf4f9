"""One product for queries, keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from qwen3bench import ModelConfig, build_model
from qwen3bench.opt.qkv import FusedProjectionAttention


def test_the_three_weights_are_rows_of_one_stored_tensor(tiny: ModelConfig, tiny_weights: dict[str, Tensor]) -> None:
    attention = build_model(tiny, ("qkv",), tiny_weights).trf_blocks[0].att
    assert isinstance(attention, FusedProjectionAttention)
    stack = attention.stacked_weight
    rows = 0
    for linear in (attention.W_query, attention.W_key, attention.W_value):
        assert linear.weight.data_ptr() == stack[rows:].data_ptr()
        rows += linear.weight.shape[0]
    assert rows == stack.shape[0]
    assert stack.data_ptr() == tiny_weights["model.layers.0.self_attn.q_proj.weight"].data_ptr()


def test_projections_are_those_of_three_products(tiny: ModelConfig, tiny_weights: dict[str, Tensor]) -> None:
    one = build_model(tiny, ("qkv",), tiny_weights).trf_blocks[0].att
    three = build_model(tiny, (), tiny_weights).trf_blocks[0].att
    x = torch.randn(2, 7, tiny.emb_dim)
    for fused, separate in zip(one.project(x), three.project(x), strict=True):
        torch.testing.assert_close(fused, separate, rtol=1e-5, atol=1e-6)
