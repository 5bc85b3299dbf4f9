"""The config groups and their choices, as the YAML files of configs/, and of a folder of the user's own, name them."""

from __future__ import annotations

import difflib
import math
import re
import sys
from collections.abc import Iterable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from qwen3bench.errors import UserError

SEVERAL = ("opt", "workload", "runtime", "peer")  # groups that take several options
SINGLE = ("model", "design", "measure")  # and those that take one
# Keys of a choice's YAML file that say when and where it is offered; the others are its options.
DECLARATIONS = ("order", "workloads", "excludes", "needs", "part", "commutes")
_SWITCH = re.compile(r"[A-Za-z][\w-]*", re.ASCII)  # a name that stands in labels, terms and columns
_RESERVED = ("all", "none", "null", "baseline")  # which mean something else where a switch is named
OWN_FOLDER = "--config-dir="  # as `overrides.normalize` gives it
_own: dict[str, Path] = {}  # "dir": the folder of `use_config_dir`


@cache
def config_dir() -> Path:
    """The directory of the YAML files: inside the installed package, or beside it in a source tree."""
    package = Path(__file__).resolve().parent.parent
    for directory in (package / "configs", package.parent / "configs"):
        if (directory / "config.yaml").is_file():
            return directory
    raise UserError(f"{package}: the config files are missing; install again with `pip install -e .`")


def own_config_dir() -> Path | None:
    """The folder of the user's own that offers choices besides configs/, where there is one."""
    return _own.get("dir")


def use_config_dir(directory: str | Path | None) -> None:
    """Offer the choices of this folder, laid out as configs/, besides those of configs/ itself; of none where None.

    What its files name is imported from wherever Python looks, and then from the current directory and from beside the
    folder. Raises `UserError` where there is no such folder, and where it holds no choice of any group.
    """
    found = None if directory is None else Path(directory).expanduser().absolute()
    if found and not found.is_dir():
        raise UserError(f"--config-dir: there is no folder {str(directory)!r}; name one that is laid out as configs/")
    if found and not any(_files(found, group) for group in (*SEVERAL, *SINGLE)):
        raise UserError(f"--config-dir: {str(found)!r} has no opt/NAME.yaml; write one for each switch of your own")
    if found:
        import_from(str(Path.cwd()), str(found.parent))
    if found != own_config_dir():
        _own.clear()
        _own.update({"dir": found} if found else {})
        for cached in (choices, _content):
            cached.cache_clear()


def import_from(*places: str) -> None:
    """Let Python look in these places too, after all others."""
    sys.path += [place for place in dict.fromkeys(places) if place not in sys.path]


@cache
def choices(group: str) -> tuple[str, ...]:
    """The options of a config group, e.g. `opt`: in the order that their YAML files ask for, then by name.

    Raises `UserError` where an optimization's file would set another one's options, and where a file of the user's own
    has a name that is taken or means something else.
    """
    ours, own = _files(config_dir(), group), _files(own_config_dir(), group)
    for name, path in own.items():
        if name in ours or (group == "opt" and (name in _RESERVED or not _SWITCH.fullmatch(name))):
            why = "is taken" if name in ours else "is none for an optimization"
            raise UserError(f"{path}: the name {name!r} {why}; give the file another one")
    if group == "opt":
        for name, path in {**ours, **own}.items():
            if f"# @package opt.{name}" not in path.read_text("utf-8").splitlines():
                raise UserError(f"{path}: the line `# @package opt.{name}` is missing, by which Hydra names it")
    orders = {name: place(_loaded(path)) for name, path in {**ours, **own}.items()}
    return tuple(sorted(orders, key=lambda name: (orders[name], _natural(name))))


def own_file(group: str, name: str) -> Path | None:
    """The YAML file of a choice in the user's own folder; None where configs/ has it, or nobody."""
    return _files(own_config_dir(), group).get(name)


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
    return deepcopy(_content(own_file(group, name) or config_dir() / group / f"{name}.yaml"))


def options_of(group: str, name: str) -> dict[str, Any]:
    """The options of one choice of a group, as its YAML file has them, without its declarations."""
    return {key: value for key, value in content_of(group, name).items() if key not in DECLARATIONS}


def place(options: Any) -> float:
    """The place that a choice asks for with `order`; without a wish it comes last."""
    order = options.get("order") if hasattr(options, "get") else None
    return order if isinstance(order, (int, float)) else math.inf


def _files(directory: Path | None, group: str) -> dict[str, Path]:
    return {path.stem: path for path in (directory / group).glob("*.yaml")} if directory else {}


@cache
def _content(path: Path) -> dict[str, Any]:
    content = OmegaConf.to_container(_loaded(path))
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def _loaded(path: Path) -> Any:
    """Raises `UserError` where the file is no YAML mapping."""
    try:
        loaded = OmegaConf.load(path)
    except Exception as error:  # whatever the parser of YAML raises
        raise UserError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, DictConfig):
        raise UserError(f"{path}: is a list; write KEY: VALUE, as the files in configs/ do")
    return loaded


def _natural(name: str) -> list[str | int]:
    """Sorts 8b before 14b."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
