"""The catalogue of optimizations: what configs/opt/*.yaml declares.

No module names an optimization; adding one takes its Python file and its YAML file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from qwen3bench.choices import choices, config_dir, nearest
from qwen3bench.errors import UserError

_NOT_OPTIONS = ("_target_", "order")


def declared(name: str) -> dict[str, Any]:
    """What the YAML file of an optimization says: `_target_` (its function Parts → Parts), `order`, and its options.

    Raises `UserError`, naming those that exist and the nearest, where there is no such optimization.
    """
    if name not in choices("opt"):
        raise UserError(
            f"unknown optimization {name!r}; there are {', '.join(choices('opt'))}{nearest(name, choices('opt'))}"
        )
    return dict(_content(config_dir() / "opt" / f"{name}.yaml"))


@cache
def _content(path: Path) -> dict[str, Any]:
    content = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def resolve(opts: Iterable[str] | Mapping[str, Mapping[str, Any]]) -> dict[str, Callable[[Any], Any]]:
    """The functions Parts → Parts of the named optimizations, in the order of labels, options bound.

    `opts` are names, or a mapping of names to options. Raises `UserError` for an unknown name or option.
    """
    from hydra.utils import get_method

    names = [opts] if isinstance(opts, str) else opts
    given: dict[str, Mapping[str, Any]] = {name: opts[name] if isinstance(opts, Mapping) else {} for name in names}
    declarations = {name: declared(name) for name in given}
    resolved: dict[str, Callable[[Any], Any]] = {}
    for name in sorted(given, key=choices("opt").index):
        defaults, asked = _options(declarations[name]), _options(given[name])
        target = given[name].get("_target_", declarations[name]["_target_"])
        if unknown := sorted(set(asked) - set(defaults)):
            raise UserError(f"{name} has no option {', '.join(unknown)}; it has: {', '.join(defaults) or 'none'}")
        resolved[name] = partial(get_method(target), **{**defaults, **asked})
    return resolved


def _options(content: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key not in _NOT_OPTIONS}
