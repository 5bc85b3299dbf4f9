"""The parts of the baseline, and how optimizations put others in their place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from qwen3bench.config.claims import Claim, Switch
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


@dataclass(frozen=True)
class _Change:
    """What an optimization makes of the parts that it is given: those it replaces, and which of these it builds on."""

    claim: Claim
    replaced: dict[str, Any]
    built_on: frozenset[str]

    @property
    def wraps(self) -> bool:
        """Whether it builds on all that it replaces."""
        return self.built_on >= self.replaced.keys()


def assemble(optimizations: Mapping[str, Optimization]) -> Parts:
    """The baseline's parts with each optimization's put in their place.

    Each optimization sees the baseline, so none can depend on another. Those that share a part (see `Claim`) wrap one
    another there: what replaces it without building on it is the innermost, the others follow in the order given.
    Raises `UserError` where two claim one part and do not share it, and where one fails or gives no parts.
    """
    claimed: dict[str, list[Claim]] = {}
    parts = BASELINE_PARTS
    changes = {name: _changed_by(name, each, BASELINE_PARTS) for name, each in optimizations.items()}
    for name, change in sorted(changes.items(), key=lambda item: item[1].wraps):
        shared = {field: getattr(parts, field) for field in change.replaced if field in claimed}
        for field in shared:
            for other in claimed[field]:
                if not change.claim.shares_with(other):
                    raise other.conflict(change.claim, field)
        if shared:
            change = _changed_by(name, optimizations[name], replace(BASELINE_PARTS, **shared))
            if lost := [field for field in shared if field not in change.built_on & change.replaced.keys()]:
                others = " and ".join(claim.name for claim in claimed[lost[0]])
                raise UserError(
                    f"{name} replaces '{lost[0]}' in place of wrapping what {others} made of it\n"
                    f"its function must build on parts.{lost[0]}, and read it when it is called"
                )
        for field in change.replaced:
            claimed.setdefault(field, []).append(change.claim)
        parts = replace(parts, **change.replaced)
    return parts


def _changed_by(name: str, optimization: Optimization, given: Parts) -> _Change:
    claim = optimization.claim if isinstance(optimization, Switch) else Claim(name)
    watched, read = _watched(given)
    try:
        changed = optimization(watched)
    except UserError:
        raise
    except Exception as error:  # whatever a user's own function raises
        why = " ".join(str(error).split())
        raise UserError(
            f"{name}: its function raised {type(error).__name__}: {why}; mend it or leave it out"
        ) from error
    if not isinstance(changed, Parts):
        raise UserError(f"{name}: its function gives {type(changed).__name__} and not Parts; return replace(parts, …)")
    built_on = frozenset(read)
    found = {each.name: getattr(changed, each.name) for each in fields(Parts)}
    replaced = {field: part for field, part in found.items() if part is not getattr(given, field)}
    if claim.part and (others := [field for field in replaced if field != claim.whole]):
        raise UserError(f"{name} replaces the part '{others[0]}', and its YAML file says part: {claim.part}; mend one")
    return _Change(claim, replaced, built_on & replaced.keys())


def _watched(given: Parts) -> tuple[Parts, set[str]]:
    """The same parts, and the names of those that are read of them; `replace` reads what it leaves alone."""
    read: set[str] = set()

    class Watched(Parts):
        def __getattribute__(self, name: str) -> Any:
            read.add(name)
            return super().__getattribute__(name)

    return Watched(**{each.name: getattr(given, each.name) for each in fields(Parts)}), read
