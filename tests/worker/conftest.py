"""Fixtures of the worker's tests: settings of a small run, and a worker in this process on the tiny model."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_run import SMALL

from qwen3bench.config.cli import compose
from qwen3bench.config.settings import Settings
from qwen3bench.model.weights import load_weights
from qwen3bench.record.messages import REQUESTS, decode_reply, encode_request
from qwen3bench.worker.serve import Worker, serve

Ask = Callable[..., Any]


@pytest.fixture(scope="session")
def small_settings() -> Callable[..., Settings]:
    """Settings of a small run that some overrides change."""
    return lambda *overrides: compose((*SMALL, *overrides))


@pytest.fixture
def gradients() -> Iterator[None]:
    """A worker turns them off for its process."""
    yield
    torch.set_grad_enabled(True)


@pytest.fixture
def settings(small_settings: Callable[..., Settings]) -> Settings:
    overrides = ("design=full", "opt=flash,tie", "workload=prefill,decode,generate", "new_tokens=3", "prompt_tokens=8")
    return small_settings(*overrides).resolved("cpu")


@pytest.fixture
def worker(gradients: None) -> Worker:
    return Worker()


@pytest.fixture
def ask(worker: Worker) -> Ask:
    """A request to the worker through its real loop and the real protocol."""

    def send(op: str, **arguments: Any) -> Any:
        request, replies = REQUESTS[op](**arguments), io.BytesIO()
        serve(io.BytesIO(encode_request(request)), replies, worker)
        return decode_reply(replies.getvalue(), request)

    return send


@pytest.fixture
def opened(ask: Ask, settings: Settings) -> Ask:
    ask("open", config=settings.to_dict())
    return ask


@pytest.fixture
def overflowing(tmp_path: Path, settings: Settings) -> Settings:
    """A checkpoint whose numbers are finite and whose logits are not."""
    shape = settings.model
    weights = {name: tensor.clone() for name, tensor in load_weights("random", shape).items()}
    weights["model.layers.0.mlp.up_proj.weight"].fill_(1e38)
    weights.pop("lm_head.weight", None)
    save_file(weights, tmp_path / "model.safetensors")
    names = {"vocab_size": "vocab_size", "num_layers": "num_hidden_layers", "emb_dim": "hidden_size"}
    names |= {"num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads", "head_dim": "head_dim"}
    names |= {"hidden_dim": "intermediate_size", "context_length": "max_position_embeddings"}
    names |= {"rms_norm_eps": "rms_norm_eps", "tie_word_embeddings": "tie_word_embeddings"}
    config = {theirs: getattr(shape, ours) for ours, theirs in names.items()}
    config |= {"rope_theta": shape.rope_base, "hidden_act": "silu", "model_type": "qwen3"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return replace(settings, weights=str(tmp_path))
