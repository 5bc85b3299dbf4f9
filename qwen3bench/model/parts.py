"""The parts that a Qwen3 model is assembled from. An optimization is a function from Parts to Parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace

from torch import nn

from qwen3bench.config.model_config import ModelConfig
from qwen3bench.errors import UserError
from qwen3bench.model.attention import AdditiveMask, Attend, EagerAttention, Mask
from qwen3bench.model.layers import FeedForward, GroupedQueryAttention, Linear, RMSNorm, TransformerBlock


def separate_head(tok_emb: nn.Embedding) -> nn.Linear:
    """An output projection (e → vocabulary) with a weight of its own."""
    return Linear(tok_emb.embedding_dim, tok_emb.num_embeddings, bias=False)


_EAGER, _ADDITIVE = EagerAttention(), AdditiveMask()


@dataclass(frozen=True)
class Parts:
    """What the builder puts together; the defaults are the baseline."""

    block: Callable[[ModelConfig, Parts], nn.Module] = TransformerBlock
    attention: Callable[[ModelConfig, Parts], nn.Module] = GroupedQueryAttention
    attend: Attend = _EAGER
    mask: Mask = _ADDITIVE
    norm: Callable[[int, float], nn.Module] = RMSNorm
    mlp: Callable[[ModelConfig], nn.Module] = FeedForward
    head: Callable[[nn.Embedding], nn.Linear] = separate_head


Optimization = Callable[[Parts], Parts]


def assemble(optimizations: Mapping[str, Optimization]) -> Parts:
    """The baseline's parts with each optimization's put in their place, whatever the order.

    Each optimization sees the baseline, so none can depend on another. Raises `UserError` where two claim one part.
    """
    baseline = Parts()
    claims: dict[str, str] = {}
    parts = baseline
    for name, optimization in optimizations.items():
        changed = optimization(baseline)
        for field in (f.name for f in fields(Parts)):
            part = getattr(changed, field)
            if part is getattr(baseline, field):
                continue
            if field in claims:
                raise UserError(
                    f"optimizations {claims[field]} and {name} both replace the part '{field}'; switch one of them off"
                )
            claims[field] = name
            parts = replace(parts, **{field: part})
    return parts
