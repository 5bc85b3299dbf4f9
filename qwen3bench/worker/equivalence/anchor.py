"""Qwen3's forward in float64, a second time and by itself: what the baseline is held to before cells are held to it.

Written from the papers and not from `model`, of which it uses nothing: the Qwen3 Technical Report (arXiv:2505.09388)
for the order of the parts and the norms on query and key heads; RMSNorm (arXiv:1910.07467), rotary embedding
(arXiv:2104.09864) with the halves of a head as pairs, grouped queries (arXiv:2305.13245), SwiGLU (arXiv:2002.05202).
It keeps no scores of all queries at once, so it needs far less memory than the baseline.

Shapes: b sequences, t tokens, s keys, e width, g key/value heads of d numbers, r query heads for each of them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qwen3bench.config.model_config import ModelConfig

Past = list[tuple[Tensor, Tensor]]  # keys and values of each layer, (b, g, s, d)

_NUMBERS = 2**26  # of the scores that are in memory at once: half a GiB
_TOKENS = 4096  # that go through the layers together
_ROWS = 2**14  # of the head that are in float64 at once


class Anchor:
    """The forward of one set of weights with Hugging Face's names, whatever their dtype.

    `rope`: cosine and sine of every position, (positions, d) each in float64, in place of its own.
    """

    def __init__(
        self, config: ModelConfig, weights: Mapping[str, Tensor], rope: tuple[Tensor, Tensor] | None = None
    ) -> None:
        self.config = config
        self._embedding = weights["model.embed_tokens.weight"]
        self._final_gain = weights["model.norm.weight"].double()
        prefixes = [f"model.layers.{i}." for i in range(config.num_layers)]
        self._layers = [
            {name.removeprefix(prefix): tensor.double() for name, tensor in weights.items() if name.startswith(prefix)}
            for prefix in prefixes
        ]
        if rope is None:
            pairs = torch.arange(config.head_dim // 2, dtype=torch.float64)
            speeds = config.rope_base ** (-2 * pairs / config.head_dim)
            turns = torch.arange(config.context_length, dtype=torch.float64)[:, None] * speeds
            rope = turns.cos(), turns.sin()
        half = config.head_dim // 2
        self._cos, self._sin = (table[:, :half].to(self._embedding.device) for table in rope)

    @torch.inference_mode()
    def states(self, tokens: Tensor, past: Past | None = None) -> tuple[Tensor, Past]:
        """The normed last states (b, t, e) of tokens (b, t) that follow `past`, and all keys and values."""
        at_once = max(1, _TOKENS // tokens.shape[1])
        found = []
        for first in range(0, len(tokens), at_once):
            rows = slice(first, first + at_once)
            before = [(keys[rows], values[rows]) for keys, values in past] if past else None
            found.append(self._states(tokens[rows], before))
        pasts = zip(*(each for _, each in found), strict=True)
        joined = [(torch.cat([k for k, _ in layer]), torch.cat([v for _, v in layer])) for layer in pasts]
        return torch.cat([states for states, _ in found]), joined

    def _states(self, tokens: Tensor, past: Past | None) -> tuple[Tensor, Past]:
        x = self._embedding[tokens].double()
        filled: Past = []
        for index, layer in enumerate(self._layers):
            normed = self._norm(x, layer["input_layernorm.weight"])
            keys, values = self._heads(normed, layer, "k"), self._heads(normed, layer, "v")
            start = past[index][0].shape[2] if past else 0
            queries = self._turned(self._norm(self._heads(normed, layer, "q"), layer["self_attn.q_norm.weight"]), start)
            keys = self._turned(self._norm(keys, layer["self_attn.k_norm.weight"]), start)
            if past:
                keys, values = (torch.cat(pair, dim=2) for pair in zip(past[index], (keys, values), strict=True))
            filled.append((keys, values))
            x = x + self._attended(queries, keys, values, start) @ layer["self_attn.o_proj.weight"].T
            normed = self._norm(x, layer["post_attention_layernorm.weight"])
            gate = normed @ layer["mlp.gate_proj.weight"].T
            up = normed @ layer["mlp.up_proj.weight"].T
            x = x + (gate / (1 + torch.exp(-gate)) * up) @ layer["mlp.down_proj.weight"].T
        return self._norm(x, self._final_gain), filled

    def _norm(self, x: Tensor, gain: Tensor) -> Tensor:
        return x / (x.square().mean(dim=-1, keepdim=True) + self.config.rms_norm_eps).sqrt() * gain

    def _heads(self, x: Tensor, layer: Mapping[str, Tensor], part: str) -> Tensor:
        """The projection of x (b, t, e) as heads, (b, heads, t, d)."""
        projected = x @ layer[f"self_attn.{part}_proj.weight"].T
        return projected.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)

    def _turned(self, x: Tensor, start: int) -> Tensor:
        """x (b, heads, t, d), number i and number i + d/2 turned together by the angle of the position."""
        cos, sin = (table[start : start + x.shape[2]] for table in (self._cos, self._sin))
        half = x.shape[-1] // 2
        real, imaginary = x[..., :half], x[..., half:]
        return torch.cat((real * cos - imaginary * sin, real * sin + imaginary * cos), dim=-1)

    def _attended(self, queries: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
        """The context (b, t, heads · d); a query sees its own position and those before it."""
        heads, (b, g, s, d) = queries.shape[1], keys.shape
        grouped = queries.unflatten(1, (g, heads // g))  # (b, g, r, t, d)
        places = torch.arange(s, device=keys.device)
        contexts = []
        for first in range(0, queries.shape[2], rows := max(1, _NUMBERS // (b * heads * s))):
            some = grouped[:, :, :, first : first + rows]
            scores = torch.einsum("bgrtd,bgsd->bgrts", some, keys) / d**0.5
            own = start + first + torch.arange(some.shape[3], device=keys.device)
            scores.masked_fill_(places > own[:, None], float("-inf"))
            contexts.append(torch.einsum("bgrts,bgsd->bgrtd", scores.softmax(dim=-1), values))
        return torch.cat(contexts, dim=3).flatten(1, 2).transpose(1, 2).flatten(2)


@torch.inference_mode()
def logits_of_states(states: Tensor, head: Tensor) -> Tensor:
    """The float64 logits (…, rows) of normed states (…, e) for these rows of the head (rows, e)."""
    return torch.cat([states @ rows.double().T for rows in head.split(_ROWS)], dim=-1)
