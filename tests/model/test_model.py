"""The assembled decoder: its names, its shapes, causality, and the three counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qwen3bench import ModelConfig, build_model
from qwen3bench.config.choices import options_of
from qwen3bench.model.cache import KVCache


@pytest.fixture
def tokens(tiny: ModelConfig) -> Tensor:
    return torch.randint(0, tiny.vocab_size, (3, 11))


def test_module_names(tiny: ModelConfig) -> None:
    model = build_model(replace(tiny, num_layers=1), device="meta")
    attention = [f"trf_blocks.0.att.{name}" for name in ("W_query", "W_key", "W_value", "out_proj", "q_norm", "k_norm")]
    feed_forward = [f"trf_blocks.0.ff.{name}" for name in ("fc1", "fc2", "fc3")]
    rest = ["trf_blocks.0.norm1", "trf_blocks.0.norm2"]
    names = ["tok_emb", *attention, *feed_forward, *rest, "final_norm", "out_head"]
    assert list(model.state_dict()) == [f"{name}.weight" for name in names]


def test_logits_have_a_row_for_each_token(tiny: ModelConfig, tiny_weights: dict[str, Tensor], tokens: Tensor) -> None:
    logits = build_model(tiny, (), tiny_weights)(tokens)
    assert logits.shape == (3, 11, tiny.vocab_size)
    assert logits.isfinite().all()


def test_logits_to_keep(
    tiny: ModelConfig, tiny_weights: dict[str, Tensor], tokens: Tensor, all_opts: tuple[str, ...]
) -> None:
    for opts in ((), all_opts):
        model = build_model(tiny, opts, tiny_weights)
        full = model(tokens)
        for keep in (1, 4, 11):
            kept = model(tokens, logits_to_keep=keep)
            assert kept.shape == (3, keep, tiny.vocab_size)
            torch.testing.assert_close(kept, full[:, -keep:])


def test_a_later_token_changes_no_earlier_logit(
    tiny: ModelConfig, tiny_weights: dict[str, Tensor], tokens: Tensor, each_cell: tuple[str, ...]
) -> None:
    model = build_model(tiny, each_cell, tiny_weights)
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 1) % tiny.vocab_size
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert ((before - after)[:, 7:].abs().amax(-1) > 1e-3).all()  # and every later one sees it


def test_sequences_of_a_batch_do_not_meet(
    tiny: ModelConfig, tiny_weights: dict[str, Tensor], tokens: Tensor, all_opts: tuple[str, ...]
) -> None:
    for opts in ((), all_opts):
        model = build_model(tiny, opts, tiny_weights)
        alone = torch.cat([model(sequence[None]) for sequence in tokens])
        torch.testing.assert_close(model(tokens), alone)


def test_tokens_past_the_context_are_refused(tiny: ModelConfig) -> None:
    config = replace(tiny, context_length=8)
    model = build_model(config)
    assert model(torch.zeros(1, 8, dtype=torch.long)).shape[1] == 8
    with pytest.raises(ValueError, match="9 tokens are more than the context of 8"):
        model(torch.zeros(1, 9, dtype=torch.long))
    cache = KVCache(config, 1, 16, "cpu", torch.float32)
    with pytest.raises(ValueError, match="9 tokens"):
        model(torch.zeros(1, 1, dtype=torch.long), cache, start=8)


def test_counts_of_qwen3_0_6b(each_cell: tuple[str, ...]) -> None:
    config = ModelConfig(**options_of("model", "qwen3-0.6b"))
    model = build_model(config, each_cell, device="meta")
    assert model.num_parameters == (596_049_920 if "tie" in each_cell else 751_632_384)
    assert model.num_unique_parameters == 596_049_920
    assert model.num_non_embedding_parameters == 440_467_456


@pytest.mark.parametrize(
    ("name", "untied", "unique", "non_embedding"),
    [
        # The published totals: of the tied checkpoint up to 4b, of the untied one above.
        ("qwen3-1.7b", 2_031_739_904, 1_720_574_976, 1_409_410_048),
        ("qwen3-4b", 4_411_424_256, 4_022_468_096, 3_633_511_936),
        ("qwen3-8b", 8_190_735_360, 7_568_405_504, 6_946_075_648),
        ("qwen3-14b", 14_768_307_200, 13_990_394_880, 13_212_482_560),
        ("qwen3-32b", 32_762_123_264, 31_984_210_944, 31_206_298_624),
    ],
)
def test_counts_of_the_other_sizes(name: str, untied: int, unique: int, non_embedding: int) -> None:
    config = ModelConfig(**options_of("model", name))
    for opts, stored in (((), untied), (("tie",), unique)):
        model = build_model(config, opts, device="meta")
        assert model.num_parameters == stored
        assert model.num_unique_parameters == unique
        assert model.num_non_embedding_parameters == non_embedding


def test_parameter_bytes(tiny: ModelConfig) -> None:
    for dtype, item_bytes in ((torch.float32, 4), (torch.bfloat16, 2)):
        for opts in ((), ("tie",), ("mlp",)):
            model = build_model(tiny, opts, dtype=dtype)
            assert model.parameter_bytes == item_bytes * model.num_parameters
