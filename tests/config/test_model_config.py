"""Shapes of models: the published ones, what is refused, and Hugging Face's config.json."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from qwen3bench import ModelConfig, build_model
from qwen3bench.config.choices import choices, options_of
from qwen3bench.errors import UserError

# Layers, width, heads, key/value heads, feed-forward width; whether the published checkpoint ties.
PUBLISHED = {
    "qwen3-0.6b": (28, 1024, 16, 8, 3072, True),
    "qwen3-1.7b": (28, 2048, 16, 8, 6144, True),
    "qwen3-4b": (36, 2560, 32, 8, 9728, True),
    "qwen3-8b": (36, 4096, 32, 8, 12288, False),
    "qwen3-14b": (40, 5120, 40, 8, 17408, False),
    "qwen3-32b": (64, 5120, 64, 8, 25600, False),
}
HF = {
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "num_hidden_layers": 28,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "use_sliding_window": False,
}


def published(name: str) -> ModelConfig:
    return ModelConfig(**options_of("model", name))


def test_the_group_has_the_published_sizes_and_tiny() -> None:
    assert set(choices("model")) == {*PUBLISHED, "tiny"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes(name: str) -> None:
    layers, width, heads, kv_heads, hidden, tied = PUBLISHED[name]
    assert published(name) == ModelConfig(
        name=name,
        num_layers=layers,
        emb_dim=width,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=128,
        hidden_dim=hidden,
        vocab_size=151_936,
        context_length=40_960,
        rope_base=1e6,
        rms_norm_eps=1e-6,
        tie_word_embeddings=tied,
    )


def transformers_parameters(config: ModelConfig) -> int:
    with torch.device("meta"):
        model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=config.vocab_size,
                hidden_size=config.emb_dim,
                intermediate_size=config.hidden_dim,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                num_key_value_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                tie_word_embeddings=config.tie_word_embeddings,
            )
        )
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_many_as_transformers_has(name: str) -> None:
    config = published(name)
    model = build_model(config, ("tie",) if config.tie_word_embeddings else (), device="meta")
    assert model.num_parameters == transformers_parameters(config)


def test_an_odd_shape_is_an_error_that_names_the_key() -> None:
    config = published("tiny")
    for changes, said in (
        ({"num_kv_heads": 3}, "num_kv_heads=3"),
        ({"head_dim": 15}, "head_dim=15 is odd"),
        ({"num_layers": 0}, "num_layers"),
        ({"emb_dim": -1}, "emb_dim"),
        ({"vocab_size": 5.0}, "vocab_size"),
        ({"hidden_dim": True}, "hidden_dim"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
        ({"rope_base": float("nan")}, "rope_base"),
        ({"rope_base": "1e6"}, "rope_base"),
    ):
        with pytest.raises(UserError, match=said):
            replace(config, **changes)


def test_hugging_faces_config() -> None:
    assert ModelConfig.from_hf(HF, name="qwen3-0.6b") == published("qwen3-0.6b")


def test_each_of_hugging_faces_numbers_is_read() -> None:
    names = {
        "vocab_size": "vocab_size",
        "num_hidden_layers": "num_layers",
        "hidden_size": "emb_dim",
        "num_attention_heads": "num_heads",
        "head_dim": "head_dim",
        "intermediate_size": "hidden_dim",
        "max_position_embeddings": "context_length",
        "rms_norm_eps": "rms_norm_eps",
        "rope_theta": "rope_base",
    }
    for theirs, ours in names.items():
        assert getattr(ModelConfig.from_hf(HF | {theirs: 48}), ours) == 48
    assert ModelConfig.from_hf(HF | {"num_key_value_heads": 4}).num_kv_heads == 4
    assert not ModelConfig.from_hf(HF | {"tie_word_embeddings": False}).tie_word_embeddings


def test_a_config_without_a_word_on_tying_does_not_tie() -> None:
    hf = {key: value for key, value in HF.items() if key != "tie_word_embeddings"}
    assert not ModelConfig.from_hf(hf).tie_word_embeddings


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    ],
)
def test_where_the_rotary_base_may_stand(rope: dict[str, Any]) -> None:
    hf = {key: value for key, value in (HF | rope).items() if key != "rope_theta" or value is not None}
    assert ModelConfig.from_hf(hf).rope_base == 5e5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "qwen3_moe"}, "model_type is 'qwen3_moe'"),
        ({"model_type": "llama"}, "only dense Qwen3"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"quantization_config": {"bits": 4, "ignore": ["x" * 9999]}}, "is of a quantized checkpoint"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "is of a quantized checkpoint"),
        ({"hidden_act": "x" * 9999}, "hidden_act="),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "linear"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_scaling": {"rope_type": "yarn"}},
            "yarn",
        ),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has sliding_attention"),
    ],
)
def test_what_would_change_the_function_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        ModelConfig.from_hf(HF | change)


@pytest.mark.parametrize("key", ["hidden_size", "head_dim", "num_key_value_heads", "rms_norm_eps", "rope_theta"])
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(UserError, match=key):
        ModelConfig.from_hf({name: value for name, value in HF.items() if name != key})


def test_from_pretrained(tmp_path: Path) -> None:
    directory = tmp_path / "qwen3-0.6b"
    directory.mkdir()
    with pytest.raises(UserError, match=r"config\.json"):
        ModelConfig.from_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(HF))
    assert ModelConfig.from_pretrained(directory) == published("qwen3-0.6b")
    (directory / "config.json").write_text(json.dumps(HF)[:-5])
    with pytest.raises(UserError, match="JSON"):
        ModelConfig.from_pretrained(str(directory))


def test_from_pretrained_reads_what_transformers_writes(tmp_path: Path) -> None:
    Qwen3Config(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        rope_parameters={"rope_type": "default", "rope_theta": 12_345.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    ).save_pretrained(tmp_path)
    config = ModelConfig.from_pretrained(tmp_path)
    assert (config.emb_dim, config.hidden_dim, config.num_layers) == (64, 96, 2)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 2, 32)
    assert (config.rope_base, config.rms_norm_eps, config.tie_word_embeddings) == (12_345.0, 1e-5, True)
