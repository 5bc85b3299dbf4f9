"""The config groups and their choices, as the YAML files under configs/ name them."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from qwen3bench.errors import UserError

SEVERAL = ("opt", "workload", "runtime", "peer")  # groups that take several options
SINGLE = ("model", "design", "measure")  # and those that take one
# Keys of a choice's YAML file that say when and where it is offered; the others are its options.
DECLARATIONS = ("order", "excludes", "needs")


@cache
def config_dir() -> Path:
    """The directory of the YAML files: inside the installed package, or beside it in a source tree."""
    package = Path(__file__).resolve().parent.parent
    for directory in (package / "configs", package.parent / "configs"):
        if (directory / "config.yaml").is_file():
            return directory
    raise UserError(f"{package}: the config files are missing; install again with `pip install -e .`")


@cache
def choices(group: str) -> tuple[str, ...]:
    """The options of a config group, e.g. `opt`: in the order that their YAML files ask for, then by name.

    Raises `UserError` where an optimization's file would set another one's options.
    """
    if group == "opt":
        for path in (config_dir() / group).glob("*.yaml"):
            if f"# @package opt.{path.stem}" not in path.read_text("utf-8").splitlines():
                raise UserError(f"{path}: the line `# @package opt.{path.stem}` is missing, by which Hydra names it")
    orders = {path.stem: place(OmegaConf.load(path)) for path in (config_dir() / group).glob("*.yaml")}
    return tuple(sorted(orders, key=lambda name: (orders[name], _natural(name))))


@cache
def five() -> tuple[str, ...]:
    """The optimizations that `make ablate` measures, as five.yaml names them."""
    (override,) = OmegaConf.load(config_dir() / "five.yaml").defaults
    return tuple(override["override /opt"])


def nearest(name: str, names: Iterable[str]) -> str:
    """`; did you mean …?` with the likeliest of `names`, or nothing where none is like it."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def no_such_choice(group: str, name: str, found: Iterable[str] = ()) -> str:
    """The two lines for a person who named a choice that `group` has not, though it has those `found`."""
    what = "optimization" if group == "opt" else group
    own = choices(group)
    known = [*own, *sorted(set(found) - set(own))]
    return f"there is no {what} {name!r}{nearest(name, known)}\nthere are: {', '.join(known)}"


def content_of(group: str, name: str) -> dict[str, Any]:
    """What the YAML file of one choice of a group says."""
    return deepcopy(_content(config_dir() / group / f"{name}.yaml"))


def options_of(group: str, name: str) -> dict[str, Any]:
    """The options of one choice of a group, as its YAML file has them, without its declarations."""
    return {key: value for key, value in content_of(group, name).items() if key not in DECLARATIONS}


def place(options: Any) -> float:
    """The place that a choice asks for with `order`; without a wish it comes last."""
    order = options.get("order") if hasattr(options, "get") else None
    return order if isinstance(order, (int, float)) else math.inf


@cache
def _content(path: Path) -> dict[str, Any]:
    content = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def _natural(name: str) -> list[str | int]:
    """Sorts 8b before 14b."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
