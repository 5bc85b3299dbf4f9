"""torchtitan's Qwen3 as a peer that trains: the package where it is installed, else a stand-in with its interface."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen3bench.__main__ import main
from qwen3bench.config.model_config import ModelConfig
from qwen3bench.errors import UserError
from qwen3bench.model.build import build_model
from qwen3bench.model.weights import load_weights
from qwen3bench.worker.equivalence.gate import Gate
from qwen3bench.worker.equivalence.gradient_gate import GradientGate
from qwen3bench.worker.peers import build_peer, gradients_of_peer, judge_peer, require_peer
from qwen3bench.worker.runtimes import make_runtime

CELL = "torchtitan:sdpa"
INSTALLED = find_spec("torchtitan") is not None and find_spec("triton") is not None
THEIRS = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "self_attn.q_norm": "attention.q_norm",
    "self_attn.k_norm": "attention.k_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "model.layers": "layers",
    "lm_head": "output",
}


@dataclass
class Arguments:
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    head_dim: int
    hidden_dim: int
    norm_eps: float
    rope_theta: float
    max_seq_len: int
    enable_weight_tying: bool


def rope_cache(dim: int, positions: int, base: float) -> Tensor:
    speeds = 1.0 / base ** (torch.arange(0, dim, 2).float() / dim)
    angles = torch.outer(torch.arange(positions).float(), speeds).repeat(1, 2)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Attention(nn.Module):
    def __init__(self, given: Arguments) -> None:
        super().__init__()
        self.head_dim = given.head_dim
        self.wq = nn.Linear(given.dim, given.n_heads * given.head_dim, bias=False)
        self.wk, self.wv = (nn.Linear(given.dim, given.n_kv_heads * given.head_dim, bias=False) for _ in range(2))
        self.wo = nn.Linear(given.n_heads * given.head_dim, given.dim, bias=False)
        self.q_norm, self.k_norm = (nn.RMSNorm(given.head_dim, eps=given.norm_eps) for _ in range(2))

    def forward(self, x: Tensor, cache: Tensor) -> Tensor:
        q, k, v = (each(x).unflatten(-1, (-1, self.head_dim)) for each in (self.wq, self.wk, self.wv))
        cos, sin = (table[: x.shape[1], None].to(x.dtype) for table in cache.chunk(2, dim=-1))
        q, k = (self._turned(norm(each), cos, sin) for norm, each in ((self.q_norm, q), (self.k_norm, k)))
        heads = (each.transpose(1, 2) for each in (q, k, v))
        out = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
        result: Tensor = self.wo(out.transpose(1, 2).flatten(2))
        return result

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        low, high = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-high, low], dim=-1) * sin


class FeedForward(nn.Module):
    def __init__(self, given: Arguments) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(given.dim, given.hidden_dim, bias=False) for _ in range(2))
        self.w2 = nn.Linear(given.hidden_dim, given.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return result


class Block(nn.Module):
    def __init__(self, given: Arguments) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(given), FeedForward(given)
        self.attention_norm, self.ffn_norm = (nn.RMSNorm(given.dim, eps=given.norm_eps) for _ in range(2))

    def forward(self, x: Tensor, rope_cache: Tensor, attention_masks: None, positions: None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope_cache)
        return x + self.feed_forward(self.ffn_norm(x))


class Model(nn.Module):
    def __init__(self, given: Arguments) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(given.vocab_size, given.dim)
        self.register_buffer(
            "rope_cache", rope_cache(given.head_dim, given.max_seq_len, given.rope_theta), persistent=False
        )
        self.layers = nn.ModuleDict({str(i): Block(given) for i in range(given.n_layers)})
        self.norm = nn.RMSNorm(given.dim, eps=given.norm_eps)
        self.output = nn.Linear(given.dim, given.vocab_size, bias=False)
        if given.enable_weight_tying:
            self.output.weight = self.tok_embeddings.weight


class Adapter:
    def __init__(self, given: Arguments, assets: None) -> None:
        pass

    def from_hf(self, state: dict[str, Any]) -> dict[str, Any]:
        return {_renamed(name, THEIRS): value for name, value in state.items()}

    def to_hf(self, state: dict[str, Any]) -> dict[str, Any]:
        ours = {theirs: hf for hf, theirs in THEIRS.items()}
        return {_renamed(name, ours): value for name, value in state.items()}


def _renamed(name: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        parts, found = name.split("."), old.split(".")
        for start in range(len(parts) - len(found) + 1):
            if parts[start : start + len(found)] == found:
                name = ".".join([*parts[:start], *new.split("."), *parts[start + len(found) :]])
                break
    return name


@pytest.fixture(autouse=True)
def _package(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not INSTALLED:
        modules = {
            name: ModuleType(name) for name in ("torchtitan.models.qwen3", "torchtitan.models.qwen3.model.model")
        }
        theirs, rotation = modules.values()
        vars(theirs).update(Qwen3ModelArgs=Arguments, Qwen3Model=Model, Qwen3StateDictAdapter=Adapter)
        vars(rotation).update(precompute_rope_cache=rope_cache)
        parents = ("torchtitan", "torchtitan.models", "torchtitan.models.qwen3.model")
        for name, module in {**{name: ModuleType(name) for name in parents}, **modules}.items():
            monkeypatch.setitem(sys.modules, name, module)
    with torch.no_grad():
        yield


@pytest.mark.parametrize("tied", [True, False])
def test_it_computes_what_ours_does(tiny: ModelConfig, tied: bool) -> None:
    config = replace(tiny, tie_word_embeddings=tied)
    weights = load_weights("random", config)
    tokens = torch.randint(config.vocab_size, (3, 37))
    peer = build_peer(CELL, config, weights)
    assert (peer.out_head.weight is peer.tok_emb.weight) == tied
    assert (peer(tokens) - build_model(config, (), weights)(tokens)).abs().max() <= 1e-4
    assert build_peer(CELL, config).num_unique_parameters == build_model(config, device="meta").num_unique_parameters


@pytest.mark.parametrize("tied", [True, False])
def test_its_gradients_pass_the_gate_and_others_do_not(
    tiny: ModelConfig, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(tiny, tie_word_embeddings=tied)
    gate = GradientGate(config, torch.device("cpu"), "fp32")
    judged = gradients_of_peer(gate, CELL)
    assert judged.equivalent, judged.reason
    silu = F.silu
    monkeypatch.setattr(F, "silu", lambda x: silu(x.detach()) + x - x.detach())  # the slope is 1
    assert not gradients_of_peer(gate, CELL).equivalent


def test_its_function_passes_the_gate(tiny: ModelConfig) -> None:
    gate = Gate(tiny, device="cpu", dtype=torch.float32)
    judged = judge_peer(gate, CELL)
    assert judged.equivalent, judged.reason


@pytest.mark.slow
def test_compiled_it_trains_alike(tiny: ModelConfig, tiny_weights: dict[str, Tensor]) -> None:
    peer = build_peer(CELL, tiny, tiny_weights)
    compiled = make_runtime("compile", torch.device("cpu")).prepare_model(peer).model
    tokens = torch.randint(tiny.vocab_size, (2, 16))
    assert compiled.original is peer
    assert float(compiled.loss(tokens, tokens)) == pytest.approx(float(peer.loss(tokens, tokens)), rel=1e-5)
    assert (compiled(tokens) - peer(tokens)).abs().max() <= 1e-4


def test_it_only_trains(tiny: ModelConfig) -> None:
    with pytest.raises(UserError, match="only trains; leave it out, or leave out workload=prefill,decode"):
        require_peer(CELL, "cpu", (), ("prefill", "train", "decode"))
    with pytest.raises(UserError, match="'eager' is unknown: use sdpa"):
        require_peer("torchtitan:eager")
    with pytest.raises(ValueError, match="without a cache"):
        build_peer(CELL, tiny, load_weights("random", tiny))(torch.zeros(1, 2, dtype=torch.long), logits_to_keep=1)


@pytest.mark.parametrize("found", [None, ModuleType("torchtitan.models.qwen3")], ids=["none", "newer"])
def test_where_it_is_not_installed_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, found: ModuleType | None
) -> None:
    monkeypatch.setitem(sys.modules, "torchtitan.models.qwen3", found)
    with pytest.raises(UserError, match=r"needs the package torchtitan.*pip install 'qwen3bench\[torchtitan\]'"):
        require_peer(CELL, "cpu", ("eager",), ("train",))


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="a worker has no stand-in")
def test_it_has_a_place_in_a_run(tmp_path: Any) -> None:
    argv = ["model=tiny", "device=cpu", "workload=train", "peer=torchtitan", "measure=quick", f"run.dir={tmp_path}"]
    assert main(argv) == 0
    assert CELL in (tmp_path / "report.md").read_text()
