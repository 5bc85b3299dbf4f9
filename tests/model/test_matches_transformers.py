"""The model is Qwen3: the logits of transformers' checkpoints, in every combination of the optimizations."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from qwen3bench import ModelConfig, build_model, load_weights
from qwen3bench.errors import UserError
from qwen3bench.model.cache import KVCache

MAX_ERROR = 1e-4  # at logits of order 1
SHAPES = ((3, 13), (2, 37), (5, 1))  # batch size and tokens


@dataclass(frozen=True)
class Case:
    """One checkpoint. Base and eps are not the published ones: a model that ignores the config is caught."""

    heads: int
    kv_heads: int
    head_dim: int
    tied: bool
    sharded: bool
    attention: str  # transformers' implementation
    emb_dim: int = 48
    rope_theta: float = 10_000.0
    eps: float = 1e-3

    def __str__(self) -> str:
        tied = "tied" if self.tied else "untied"
        return f"{self.heads}:{self.kv_heads}x{self.head_dim}-{tied}-{self.attention}"


CASES = [
    Case(4, 4, 12, tied=True, sharded=False, attention="eager"),
    Case(4, 2, 20, tied=True, sharded=True, attention="sdpa", rope_theta=1e6, eps=1e-6),
    Case(8, 2, 6, tied=True, sharded=True, attention="eager"),
    Case(8, 1, 16, tied=True, sharded=False, attention="sdpa"),
    Case(4, 4, 16, tied=False, sharded=True, attention="sdpa"),
    Case(6, 3, 8, tied=False, sharded=False, attention="eager"),
    Case(8, 2, 16, tied=False, sharded=False, attention="sdpa", rope_theta=1e6, eps=1e-6),
    Case(8, 1, 6, tied=False, sharded=True, attention="eager"),
]


@dataclass(frozen=True)
class Checkpoint:
    """What transformers saved, loaded, and the logits it gives for each of SHAPES."""

    config: ModelConfig
    weights: dict[str, Tensor]
    tokens: list[Tensor]
    logits: list[Tensor]


def save_checkpoint(case: Case, directory: Path) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=101,
        hidden_size=case.emb_dim,
        intermediate_size=72,
        num_hidden_layers=3,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        head_dim=case.head_dim,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": case.rope_theta},
        rms_norm_eps=case.eps,
        tie_word_embeddings=case.tied,
        initializer_range=0.15,
        attn_implementation=case.attention,
    )
    model = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            if "q_norm" in name or "k_norm" in name:
                parameter.mul_(2)  # attention that chooses: a wrong mask or rotation shows
    model.save_pretrained(directory, max_shard_size="50KB" if case.sharded else "5GB")
    return model


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def checkpoint(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory = tmp_path_factory.mktemp("checkpoint")
    model = save_checkpoint(case, directory)
    assert (len(list(directory.glob("*.safetensors"))) > 1) == case.sharded
    tokens = [torch.randint(0, 101, shape, generator=torch.Generator().manual_seed(1)) for shape in SHAPES]
    with torch.no_grad():
        logits = [model(t).logits for t in tokens]
    config = ModelConfig.from_pretrained(directory)
    return Checkpoint(config, load_weights(directory, config), tokens, logits)


@pytest.fixture(scope="module")
def models(checkpoint: Checkpoint, case: Case, all_cells: list[tuple[str, ...]]) -> dict[str, nn.Module]:
    """The checkpoint in every combination that keeps its function: all 32, or the 16 without `tie`."""
    cells = [cell for cell in all_cells if case.tied or "tie" not in cell]
    return {"+".join(cell) or "baseline": build_model(checkpoint.config, cell, checkpoint.weights) for cell in cells}


def test_tie_is_refused_exactly_where_the_checkpoint_does_not_tie(
    checkpoint: Checkpoint, case: Case, models: dict[str, nn.Module], all_cells: list[tuple[str, ...]]
) -> None:
    assert len(models) >= (32 if case.tied else 16)
    for cell in all_cells:
        if "tie" in cell and not case.tied:
            with pytest.raises(UserError, match="tying would change the function"):
                build_model(checkpoint.config, cell, checkpoint.weights)


def test_logits_are_of_order_one(checkpoint: Checkpoint) -> None:
    for logits in checkpoint.logits:
        assert 0.5 < logits.std() < 2


def test_forward_matches(checkpoint: Checkpoint, models: dict[str, nn.Module]) -> None:
    for tokens, expected in zip(checkpoint.tokens, checkpoint.logits, strict=True):
        for cell, model in models.items():
            logits = model(tokens)
            assert (logits.shape, logits.dtype) == (expected.shape, torch.float32)
            error = (logits - expected).abs().max()
            assert error <= MAX_ERROR, f"{cell} at {tuple(tokens.shape)}"


def test_decode_matches(checkpoint: Checkpoint, models: dict[str, nn.Module]) -> None:
    """A prompt, a chunk, then one token at a time, through the cache: transformers' full forward."""
    tokens, expected = checkpoint.tokens[0], checkpoint.logits[0]
    bounds = [0, 5, 9, 10, 11, 12, 13]
    for cell, model in models.items():
        cache = KVCache(checkpoint.config, tokens.shape[0], tokens.shape[1] + 3, "cpu", torch.float32)
        steps = [model(tokens[:, i:j], cache, start=i) for i, j in pairwise(bounds)]
        error = (torch.cat(steps, dim=1) - expected).abs().max()
        assert error <= MAX_ERROR, cell
