"""Other implementations of Qwen3, called as ours is, on the same weights and the same cache.

A peer is called as its users call it, with a static cache where there is one (transformers' documentation,
"Optimizing LLM inference": the fastest of its caches, and the one that compiles), and compiled with PyTorch's defaults
unless `runtime.compile.peers` says otherwise. Its SDPA leaves the mask of a prompt away by itself, but not in compiled
code before PyTorch 2.14, and not while a graph is captured, where it cannot tell that it may. There it is told;
`sdpa_mask` is not. `sdpa_flce` trains with Liger's loss, which takes the output head in and stores no logits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from qwen3bench.config.model_config import ModelConfig
from qwen3bench.errors import UserError
from qwen3bench.model.cache import KVCache
from qwen3bench.model.checkpoint import EMBEDDING
from qwen3bench.model.compiled import CompiledModel, Training, shared_forward
from qwen3bench.model.decoder import Compile, Decoder, Forward
from qwen3bench.model.weights import head_is_tied, with_head
from qwen3bench.record.messages import Judgment
from qwen3bench.worker.equivalence.candidate import Candidate, kv_cache
from qwen3bench.worker.equivalence.gate import Gate
from qwen3bench.worker.equivalence.gradient_gate import GradientCandidate, GradientGate
from qwen3bench.worker.peer_modules import PEERS, fused_loss, modeling, transformers
from qwen3bench.worker.torchtitan_model import TorchtitanModel, torchtitan

_FUSED_LOSS = "sdpa_flce"  # Liger's, of the states before the output head
ATTENTIONS = {"sdpa": "sdpa", "eager": "eager", "sdpa_mask": "sdpa", _FUSED_LOSS: "sdpa"}  # by transformers' names
_KNOWN = {
    "transformers": [each for each in ATTENTIONS if each != _FUSED_LOSS],
    "liger": list(ATTENTIONS),
    "torchtitan": ["sdpa"],
}
_TOLD = ("sdpa", _FUSED_LOSS)  # told that a prompt needs no mask
NO_MASK = {"full_attention": None}  # tells transformers that a prompt needs none
FREQUENCY_ERROR = 1e-6  # relative, of the rotary frequencies, which transformers computes in float32


def require_peer(
    cell: str,
    device: torch.device | str | None = None,
    runtimes: Iterable[str] = (),
    workloads: Iterable[str] = (),
) -> None:
    """Raise `UserError` where a peer of this label does not exist, cannot be imported, or does not run here.

    That is on `device`, each of the `workloads` in each of the `runtimes`.
    """
    name, _, attention = cell.partition(":")
    if name not in PEERS:
        raise UserError(f"peer {name!r} is not known; there are {', '.join(PEERS)}")
    if attention not in (known := _KNOWN[name]):
        raise UserError(f"peer.{name}.attention: {attention!r} is unknown: use {' | '.join(known)}")
    if _only_trains(cell):
        if others := [each for each in workloads if each != "train"]:
            raise UserError(
                f"peer=torchtitan has no cache and only trains; leave it out, or leave out workload={','.join(others)}"
            )
        torchtitan()
        return
    if attention == _FUSED_LOSS and (captured := [each for each in runtimes if each != "eager"]):
        raise UserError(
            f"peer.liger.attention={_FUSED_LOSS} reads a number back from the card in each step, which no graph can "
            f"hold; leave it out, or leave out runtime={','.join(captured)}"
        )
    modeling(name)
    if name == "liger" and device is not None and torch.device(device).type != "cuda":
        raise UserError(f"peer=liger has kernels for CUDA alone, and the device is {device}; leave the peer out")


def build_peer(
    cell: str,
    config: ModelConfig,
    weights: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> Decoder:
    """The peer with this label, its parameters the tensors of `weights`, a state dict with Hugging Face's names.

    Without `weights` it is on `meta`, in `dtype`. Its head is tied where the config says so and the weights agree,
    as in transformers; else a head that shares the embedding's tensor gets a copy. Raises `UserError` as
    `require_peer` does.
    """
    require_peer(cell)
    if _only_trains(cell):
        return TorchtitanModel(config, weights, dtype)
    return TransformersModel(config, cell, weights, dtype)


def judge_peer(gate: Gate, cell: str) -> Judgment:
    """The equivalence gate's verdict on a peer."""

    def build(weights: dict[str, Tensor], dtype: torch.dtype) -> Decoder:
        return build_peer(cell, replace(gate.config, vocab_size=len(weights[EMBEDDING])), weights, dtype)

    tied = gate.config.tie_word_embeddings  # as its own checkpoints have it
    new_cache = None if _only_trains(cell) else kv_cache
    rope = transformers_rope(gate.config)  # torchtitan rounds angles alike
    return gate.judge(Candidate(build, new_cache, tied=tied, rope=rope))


def gradients_of_peer(gate: GradientGate, cell: str) -> Judgment:
    """The gradient gate's verdict on a peer, which rounds rotary angles and norms to float32 by design."""

    def build(weights: dict[str, Tensor]) -> Decoder:
        return build_peer(cell, gate.config, weights)

    return gate.judge(GradientCandidate(build, tied=gate.config.tie_word_embeddings, exact=False))


def transformers_rope(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine, in float64, of the angles that transformers rounds to float32.

    At position 700 these are off by 4e-5, and with peaky attention single logits by 5 × the baseline's maximum error.
    That is a choice of theirs and no mistake, so the gate compares with a reference that shares it. Raises ValueError
    where their frequencies are off by more than their rounding.
    """
    with torch.device("cpu"):
        plain = _on_meta("transformers", transformers_config(config, "sdpa", False))
        rotary = type(plain.model.rotary_emb)(plain.config)
    frequencies = rotary.inv_freq
    exact = config.rope_base ** -(torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim)
    if rotary.attention_scaling != 1 or not torch.allclose(frequencies.double(), exact, rtol=FREQUENCY_ERROR, atol=0):
        raise ValueError("transformers' rotary frequencies are not Qwen3's")
    angles = torch.outer(torch.arange(config.context_length).float(), frequencies).double().repeat(1, 2)
    return angles.cos(), angles.sin()


def _only_trains(cell: str) -> bool:
    """Whether a peer has no cache."""
    return cell.partition(":")[0] == "torchtitan"


class TransformersModel(Decoder):
    """transformers' Qwen3ForCausalLM, Liger's kernels in it or not, with our model's call."""

    is_peer = True

    def __init__(
        self,
        config: ModelConfig,
        cell: str,
        weights: Mapping[str, Tensor] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        name, _, self.attention = cell.partition(":")
        tied = config.tie_word_embeddings and (weights is None or head_is_tied(weights))
        language_model = _on_meta(name, transformers_config(config, ATTENTIONS[self.attention], tied))
        if weights is None:
            language_model.to(dtype=dtype)
        else:
            _assign(language_model, weights, tied)
        self.language_model = language_model.eval().requires_grad_(False)
        self.tok_emb = language_model.model.embed_tokens
        self.out_head = language_model.lm_head
        self.checkpoint_names = {f"language_model.{name}": name for name, _ in language_model.named_parameters()}
        self._static_caches: WeakKeyDictionary[KVCache, Any] = WeakKeyDictionary()

    def forward(self, tokens: Tensor, cache: KVCache | None = None, start: int = 0, logits_to_keep: int = 0) -> Tensor:
        return self._through(self.language_model, tokens, cache, start, logits_to_keep)

    def states(self, tokens: Tensor) -> Tensor:
        return self._states(self.language_model.model, tokens)

    def compiled(self, compile_: Compile) -> CompiledModel:
        """The whole model compiled, as transformers does; in training all before the loss, and the loss."""
        run, run_states = (
            partial(compile_(shared_forward([each])), each) for each in (self.language_model, self.language_model.model)
        )
        loss_of = self.loss_of if self.attention == _FUSED_LOSS else partial(compile_(Decoder.loss_of), self)
        call = partial(self._through, run)
        return CompiledModel(self, call, call, Training(partial(self._states, run_states), loss_of))

    def loss_of(self, states: Tensor, targets: Tensor) -> Tensor:
        if self.attention != _FUSED_LOSS:
            return super().loss_of(states, targets)
        loss: Tensor = fused_loss()(self.out_head.weight, states.flatten(0, 1), targets.flatten())
        return loss

    def _states(self, before_head: Forward, tokens: Tensor) -> Tensor:
        mask: Mapping[str, Tensor | None] | None = NO_MASK if self.attention in _TOLD else None
        if before_head is self.language_model.model and self.attention not in _TOLD and _is_captured(tokens):
            mask = {"full_attention": self._additive_mask(tokens, None, 0)}
        states: Tensor = before_head(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
        return states

    def _through(
        self,
        language_model: Forward,
        tokens: Tensor,
        cache: KVCache | None = None,
        start: int = 0,
        logits_to_keep: int = 0,
    ) -> Tensor:
        past = None if cache is None else self._static_cache(cache)
        if past is not None:
            lengths = [layer.cumulative_length for layer in past.layers]
            torch._foreach_zero_(lengths)
            torch._foreach_add_(lengths, start)
        whole = past is None or (start == 0 and tokens.shape[1] > 1)  # no token before these
        compiled = language_model is not self.language_model
        captured = not compiled and _is_captured(tokens)
        mask: Mapping[str, Tensor | None] | None = None
        if whole and self.attention in _TOLD and (compiled or captured):
            mask = NO_MASK
        elif captured and self.attention not in _TOLD:  # its own float mask fails there: it copies a 0 over
            mask = {"full_attention": self._additive_mask(tokens, past, start)}
        output = language_model(
            input_ids=tokens,
            attention_mask=mask,
            past_key_values=past,
            use_cache=past is not None,
            logits_to_keep=logits_to_keep,
        )
        logits: Tensor = output.logits
        return logits

    def _additive_mask(self, tokens: Tensor, past: Any, start: int) -> Tensor:
        """What transformers builds: (1, 1, t, keys), 0 where a query attends and the least number where not."""
        queries = tokens.shape[1]
        keys = queries if past is None else past.layers[0].keys.shape[2]
        dtype = self.tok_emb.weight.dtype
        mask = torch.full((queries, keys), torch.finfo(dtype).min, device=tokens.device, dtype=dtype)
        return mask.triu(diagonal=start + 1)[None, None]

    def _static_cache(self, cache: KVCache) -> Any:
        """transformers' StaticCache over the tensors of `cache`."""
        if cache not in self._static_caches:
            with torch.inference_mode(False):  # else it could not be written to outside of it
                past = transformers().StaticCache(self.language_model.config, max_cache_len=cache.keys.shape[3])
                for index, layer in enumerate(past.layers):
                    keys, values = cache.layer(index)
                    layer.lazy_initialization(keys[:, :, :0], values[:, :, :0])
                    layer.keys, layer.values = keys, values
            self._static_caches[cache] = past
        return self._static_caches[cache]


def _is_captured(tokens: Tensor) -> bool:
    """Whether what is launched on these goes into a CUDA graph."""
    return tokens.is_cuda and torch.cuda.is_current_stream_capturing()


def _on_meta(peer: str, config: Any) -> Any:
    with torch.device("meta"):
        return modeling(peer).Qwen3ForCausalLM(config)


def transformers_config(config: ModelConfig, attention: str, tied: bool) -> Any:
    """transformers' configuration of the same shape."""
    return transformers().Qwen3Config(
        vocab_size=config.vocab_size,
        hidden_size=config.emb_dim,
        intermediate_size=config.hidden_dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.context_length,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
        rms_norm_eps=config.rms_norm_eps,
        tie_word_embeddings=tied,
        attn_implementation=attention,
    )


def _assign(language_model: Any, weights: Mapping[str, Tensor], tied: bool) -> None:
    language_model.load_state_dict(with_head(weights, tied), strict=True, assign=True)
    if tied:
        language_model.lm_head.weight = language_model.model.embed_tokens.weight
    rotary = language_model.model.rotary_emb  # its frequencies are no part of a checkpoint
    language_model.model.rotary_emb = type(rotary)(language_model.config).to(weights[EMBEDDING].device)
