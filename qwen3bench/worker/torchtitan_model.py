"""torchtitan's Qwen3, which trains in the same blocks as ours.

It runs as its users run it: PyTorch's fused attention and norms, and compiled block by block. It has no cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from qwen3bench.config.model_config import ModelConfig
from qwen3bench.model.cache import KVCache
from qwen3bench.model.compiled import CompiledModel, Training, shared_forward
from qwen3bench.model.decoder import Compile, Decoder, Forward
from qwen3bench.model.weights import head_is_tied, with_head
from qwen3bench.worker.peer_modules import not_installed


def torchtitan() -> Any:
    """The package's module of Qwen3. Raises `UserError` where it is not installed, or is another version."""
    try:
        module = import_module("torchtitan.models.qwen3")
        if not hasattr(module, "Qwen3ModelArgs"):
            raise ImportError("this one has no Qwen3ModelArgs")
    except ImportError as error:
        needs = "peer=torchtitan needs the package torchtitan, 0.2.2, and Triton"
        raise not_installed(needs, error, "torchtitan") from error
    return module


class TorchtitanModel(Decoder):
    """torchtitan's Qwen3Model with our model's call, its parameters the tensors of `weights`, as in `build_peer`."""

    is_peer = True

    def __init__(
        self, config: ModelConfig, weights: Mapping[str, Tensor] | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        theirs = torchtitan()
        tied = config.tie_word_embeddings and (weights is None or head_is_tied(weights))
        arguments = theirs.Qwen3ModelArgs(
            dim=config.emb_dim,
            n_layers=config.num_layers,
            n_heads=config.num_heads,
            n_kv_heads=config.num_kv_heads,
            vocab_size=config.vocab_size,
            head_dim=config.head_dim,
            hidden_dim=config.hidden_dim,
            norm_eps=config.rms_norm_eps,
            rope_theta=config.rope_base,
            max_seq_len=config.context_length,
            enable_weight_tying=tied,
        )
        with torch.device("meta"):
            language_model = theirs.Qwen3Model(arguments)
        adapter = theirs.Qwen3StateDictAdapter(arguments, None)
        if weights is None:
            language_model.to(dtype=dtype)
        else:
            language_model.load_state_dict(adapter.from_hf(with_head(weights, tied)), strict=True, assign=True)
            if tied:
                language_model.output.weight = language_model.tok_embeddings.weight
            rotation = import_module("torchtitan.models.qwen3.model.model")  # a table that no checkpoint has
            table = rotation.precompute_rope_cache(config.head_dim, config.context_length, config.rope_base)
            language_model.rope_cache = table.to(language_model.output.weight.device)
        self.language_model = language_model.eval().requires_grad_(False)
        self.tok_emb, self.out_head = language_model.tok_embeddings, language_model.output
        hf_names = adapter.to_hf({name: name for name, _ in language_model.named_parameters()})
        self.checkpoint_names = {f"language_model.{ours}": theirs for theirs, ours in hf_names.items()}

    def forward(self, tokens: Tensor, cache: KVCache | None = None, start: int = 0, logits_to_keep: int = 0) -> Tensor:
        """Raises ValueError where a cache or the last logits alone are asked for: it has neither."""
        return self._logits(self.states, tokens, cache, start, logits_to_keep)

    def states(self, tokens: Tensor) -> Tensor:
        return self._states(nn.Module.__call__, tokens)

    def compiled(self, compile_: Compile) -> CompiledModel:
        """The blocks compiled as one, as torchtitan does, and the loss."""
        states = partial(self._states, compile_(shared_forward(list(self.language_model.layers.values()))))
        call = partial(self._logits, states)
        return CompiledModel(self, call, call, Training(states, partial(compile_(Decoder.loss_of), self)))

    def _logits(
        self, states: Forward, tokens: Tensor, cache: KVCache | None = None, start: int = 0, logits_to_keep: int = 0
    ) -> Tensor:
        if cache is not None or start or logits_to_keep:
            raise ValueError("torchtitan's Qwen3 takes a whole prompt without a cache, and gives all its logits")
        logits: Tensor = self.out_head(states(tokens))
        return logits

    def _states(self, run_block: Forward, tokens: Tensor) -> Tensor:
        x = self.tok_emb(tokens)
        for block in self.language_model.layers.values():
            x = run_block(block, x, self.language_model.rope_cache, None, None)
        states: Tensor = self.language_model.norm(x)
        return states
