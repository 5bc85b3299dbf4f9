"""Which layers of a model are judged for all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

_ABSENT = "absent"
_PLAIN = frozenset(vars(nn.Module()))  # what every module has


def judged_layers(blocks: Sequence[nn.Module], most: int) -> list[int] | None:
    """The first, a middle and the last layer, at most `most`; others in their place where a kind would be missing.

    Layers are of one kind where they are made of the same modules with the same attributes. None where there are more
    kinds than that.
    """
    count = len(blocks)
    if count <= most:
        return list(range(count))
    kinds = _kinds(blocks)
    if len(set(kinds)) > most:
        return None
    chosen = [0, count - 1, count // 2][:most]
    for kind in dict.fromkeys(kinds):
        of_chosen = [kinds[layer] for layer in chosen]
        if kind not in of_chosen:
            twice = [layer for layer in reversed(chosen) if of_chosen.count(kinds[layer]) > 1]
            chosen[chosen.index(twice[0])] = kinds.index(kind)
    return sorted(chosen)


def _kinds(blocks: Sequence[nn.Module]) -> list[Hashable]:
    """What each block is made of, but what differs in all of them: its place, say."""
    found = [dict(_features(block)) for block in blocks]
    keys = dict.fromkeys(key for features in found for key in features)
    telling = [key for key in keys if len({features.get(key, _ABSENT) for features in found}) < len(blocks)]
    return [tuple(features.get(key, _ABSENT) for key in telling) for features in found]


def _features(block: nn.Module) -> Iterator[tuple[tuple[str, str], Any]]:
    for path, module in block.named_modules():
        yield (path, "type"), type(module)
        hooks = Counter(name for name, value in vars(module).items() if name.endswith("_hooks") and value)
        yield (path, "hooks"), tuple(hooks)
        for name, value in vars(module).items():
            if name not in _PLAIN:
                yield (path, name), _told_apart(value)


def _told_apart(value: Any) -> Any:
    """What an attribute's value is equal by, hashable."""
    if isinstance(value, Tensor):
        return tuple(value.shape), str(value.dtype)
    if isinstance(value, partial):
        return _told_apart(value.func), tuple(map(_told_apart, value.args))
    if isinstance(value, (list, tuple)):
        return type(value).__name__, tuple(map(_told_apart, value))
    if hasattr(value, "__func__"):  # a bound method: of a function, whatever the module
        return value.__func__
    return value if isinstance(value, Hashable) else type(value)
