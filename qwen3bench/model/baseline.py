"""The parts of the baseline, and how optimizations put others in their place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace

from qwen3bench.errors import UserError
from qwen3bench.model.attention import AdditiveMask, EagerAttention
from qwen3bench.model.layers import (
    FeedForward,
    GroupedQueryAttention,
    RMSNorm,
    SeparateResidual,
    TransformerBlock,
    separate_head,
    separate_rope,
)
from qwen3bench.model.loss import CrossEntropy, keep_activations
from qwen3bench.model.parts import Parts

Optimization = Callable[[Parts], Parts]

BASELINE_PARTS = Parts(
    block=TransformerBlock,
    attention=GroupedQueryAttention,
    rope=separate_rope,
    attend=EagerAttention(),
    mask=AdditiveMask(),
    norm=RMSNorm,
    residual=SeparateResidual(),
    mlp=FeedForward,
    head=separate_head,
    loss=CrossEntropy(),
    recomputed=keep_activations,
)


def assemble(optimizations: Mapping[str, Optimization]) -> Parts:
    """The baseline's parts with each optimization's put in their place, whatever the order.

    Each optimization sees the baseline, so none can depend on another. Raises `UserError` where two claim one part, and
    where one fails or gives no parts.
    """
    claims: dict[str, str] = {}
    parts = BASELINE_PARTS
    for name, optimization in optimizations.items():
        changed = _changed_by(name, optimization)
        for field in (f.name for f in fields(Parts)):
            part = getattr(changed, field)
            if part is getattr(BASELINE_PARTS, field):
                continue
            if field in claims:
                raise UserError(
                    f"optimizations {claims[field]} and {name} both replace the part '{field}'; switch one of them off"
                )
            claims[field] = name
            parts = replace(parts, **{field: part})
    return parts


def _changed_by(name: str, optimization: Optimization) -> Parts:
    try:
        changed = optimization(BASELINE_PARTS)
    except UserError:
        raise
    except Exception as error:  # whatever a user's own function raises
        why = " ".join(str(error).split())
        raise UserError(
            f"{name}: its function raised {type(error).__name__}: {why}; mend it or leave it out"
        ) from error
    if not isinstance(changed, Parts):
        raise UserError(f"{name}: its function gives {type(changed).__name__} and not Parts; return replace(parts, …)")
    return changed
