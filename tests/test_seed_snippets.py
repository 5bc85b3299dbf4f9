"""The snippets of the document that the project starts from, and what each of them does wrong.

The document asks for five optimizations and shows a few lines for each. Four do not work as printed, and
one of the parameter counts printed after them is wrong. Each test runs the lines unchanged, in the smallest
model around them.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen3bench import ModelConfig, build_model
from qwen3bench.config.choices import options_of
from qwen3bench.model.layers import RMSNorm
from qwen3bench.opt.norm import FusedRMSNorm

EMB_DIM, HIDDEN_DIM, HEADS, HEAD_DIM = 24, 40, 4, 6


# Fused MLP


class DocumentsFeedForward(nn.Module):
    def __init__(self, emb_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(emb_dim, hidden_dim, bias=False)
        self.fc2 = nn.Linear(emb_dim, hidden_dim, bias=False)
        self.fc3 = nn.Linear(hidden_dim, emb_dim, bias=False)

    # fmt: off
    def forward(self, x):
        x = self.fc1(x)
        x = F.silu(x) * self.fc2(x)
        return self.fc3(x)
    # fmt: on


def test_mlp_feeds_fc2_the_output_of_fc1() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        DocumentsFeedForward(EMB_DIM, HIDDEN_DIM)(torch.randn(2, 3, EMB_DIM))


def test_mlp_is_another_function_where_its_shapes_happen_to_fit() -> None:
    ff, x = DocumentsFeedForward(EMB_DIM, EMB_DIM), torch.randn(2, 3, EMB_DIM)
    swiglu = ff.fc3(F.silu(ff.fc1(x)) * ff.fc2(x))
    assert (ff(x) - swiglu).abs().max() > 0.05 * swiglu.abs().max()


# Optimize Mask Creation, then Flash Attention


def documents_mask(x: Tensor, num_tokens: int) -> Tensor:
    # fmt: off
    mask = torch.triu(torch.ones(num_tokens, num_tokens, device=x.device, dtype=torch.bool), diagonal=1)
    # fmt: on
    return mask


def documents_context(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    # fmt: off
    context = torch.nn.functional.scaled_dot_product_attention(
        queries, keys, values,
        attn_mask=mask,  # This can be None or a boolean mask
        dropout_p=0.0,   # or nonzero if training
        is_causal=False  # or True, depending on your attention type
    )
    # fmt: on
    return context


@pytest.fixture
def qkv() -> tuple[Tensor, Tensor, Tensor]:
    queries, keys, values = torch.randn(3, 2, HEADS, 5, HEAD_DIM)
    return queries, keys, values


def test_mask_leaks_the_future(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    """The mask is True where a query may NOT attend; fused attention reads True as attend."""
    queries, keys, values = qkv
    mask = documents_mask(queries, 5)
    context = documents_context(queries, keys, values, mask)
    later = values.clone()
    later[:, :, 4] += 1  # the last token changes
    changed = documents_context(queries, keys, later, mask)
    assert ((changed - context)[:, :, :4].abs() > 1e-4).all()  # and every earlier output with it
    past = values.clone()
    past[:, :, 0] += 1  # while no output depends on the first token
    assert torch.equal(documents_context(queries, keys, past, mask), context)


def test_mask_inverted_is_causal(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    queries, keys, values = qkv
    context = documents_context(queries, keys, values, ~documents_mask(queries, 5))
    causal = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    torch.testing.assert_close(context, causal)


def test_mask_leaves_the_last_query_nothing_to_attend(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    """Over a fully blocked row, softmax in separate operations is NaN and the fused one zero."""
    queries, keys, values = qkv
    mask = documents_mask(queries, 5)
    assert not mask[4].any()
    assert (documents_context(queries, keys, values, mask)[:, :, 4] == 0).all()
    scores = (queries @ keys.transpose(-2, -1)).masked_fill(~mask, float("-inf"))
    assert scores.softmax(-1)[:, :, 4].isnan().all()
    assert scores.softmax(-1)[:, :, :4].isfinite().all()


def test_a_lone_query_called_causal_sees_only_the_first_key(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    """What `is_causal=True  # depending on your attention type` gives when decoding against a cache."""
    queries, keys, values = qkv
    context = F.scaled_dot_product_attention(queries[:, :, 4:], keys, values, is_causal=True)
    torch.testing.assert_close(context, values[:, :, :1])


def test_attention_refuses_grouped_heads(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    queries, keys, values = qkv
    with pytest.raises(RuntimeError, match="must match the size"):
        documents_context(queries, keys[:, :2], values[:, :2], ~documents_mask(queries, 5))


def test_heads_are_not_put_back_after_attention(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    """The context is (b, heads, t, d); the output projection takes (b, t, heads · d)."""
    queries, keys, values = qkv
    out_proj = nn.Linear(HEADS * HEAD_DIM, EMB_DIM, bias=False)
    context = documents_context(queries, keys, values, ~documents_mask(queries, 5))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        out_proj(context)
    assert out_proj(context.transpose(1, 2).flatten(-2)).shape == (2, 5, EMB_DIM)


def test_heads_reshaped_without_the_transpose_leak_the_future(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    queries, keys, values = qkv
    mask = ~documents_mask(queries, 5)
    scrambled = documents_context(queries, keys, values, mask).reshape(2, 5, HEADS * HEAD_DIM)
    later = values.clone()
    later[:, :, 4] += 1
    changed = documents_context(queries, keys, later, mask).reshape(2, 5, HEADS * HEAD_DIM)
    assert (changed - scrambled)[:, 1].abs().max() > 0.01  # the second token sees the fifth


# RMSNorm with Fused RMSNorm


class DocumentsBlock(nn.Module):
    def __init__(self, config: dict[str, int]) -> None:
        super().__init__()
        self.att = nn.Module()
        self.att.q_norm = RMSNorm(config["head_dim"], eps=1e-6)
        self.att.k_norm = RMSNorm(config["head_dim"], eps=1e-6)
        # fmt: off
        self.norm1 = FusedRMSNorm(config["emb_dim"], eps=1e-6)
        self.norm2 = FusedRMSNorm(config["emb_dim"], eps=1e-6)
        # fmt: on


def fused_norms(module: nn.Module) -> tuple[int, int]:
    norms = [type(m) for m in module.modules() if isinstance(m, RMSNorm)]
    return norms.count(FusedRMSNorm), len(norms)


def test_norm_leaves_the_query_and_key_norms_unfused(tiny: ModelConfig) -> None:
    assert fused_norms(DocumentsBlock({"emb_dim": EMB_DIM, "head_dim": HEAD_DIM})) == (2, 4)
    assert fused_norms(build_model(tiny, ("norm",), device="meta").trf_blocks[0]) == (4, 4)


# Weight Sharing, and the "unique" count printed after it


class DocumentsModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tok_emb = nn.Embedding(50, EMB_DIM)
        self.out_head = nn.Linear(EMB_DIM, 50, bias=False)

    def share(self) -> None:
        # fmt: off
        # implementing weight sharing
        self.out_head.weight = self.tok_emb.weight
        # fmt: on


def test_weight_sharing_works() -> None:
    model = DocumentsModel()
    model.share()
    assert sum(parameter.numel() for parameter in model.parameters()) == 50 * EMB_DIM


def test_unique_count_subtracts_the_tied_embedding_twice() -> None:
    """It prints 440,467,456 for the tied model, which has 596,049,920 parameters, all of them unique."""
    config = ModelConfig(**options_of("model", "qwen3-0.6b"))
    printed = {}
    for opts in ((), ("tie",)):
        model = build_model(config, opts, device="meta")
        total = sum(parameter.numel() for parameter in model.parameters())
        printed[opts] = total - model.tok_emb.weight.numel()
        assert model.num_unique_parameters == 596_049_920
    assert printed[()] == 596_049_920  # right where the head is a second copy
    assert printed["tie",] == 440_467_456  # wrong where it is not: this is the count without the embedding
    assert printed["tie",] == model.num_non_embedding_parameters
