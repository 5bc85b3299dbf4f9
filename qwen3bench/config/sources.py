"""Where the Python source of a switch lies, and what tells it from another; nothing is imported to find out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qwen3bench.config.choices import own_file
from qwen3bench.errors import UserError

_OURS = __name__.partition(".")[0]  # its code is told by record.environment.code_hash
_SOURCES = (".py", ".cu", ".cuh", ".cpp", ".c", ".h", ".so")  # of a package, what may compute


def own_code(opts: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The sha256 of what decides what switches of the user's own do, by name.

    These are the YAML files of his own folder (`opt/mine.yaml`), and the whole package, or the single file, that a
    `_target_` lies in (`mypackage`). Empty where all switches are ours; what has no source is left out.
    """
    found: dict[str, str] = {}
    for name, options in opts.items():
        if file := own_file("opt", name):
            found[f"opt/{name}.yaml"] = _sha256({file.name: file})
        package = str(options.get("_target_", "")).partition(".")[0]
        if package != _OURS and package not in found and (files := _package_files(package)):
            found[package] = _sha256(files)
    return found


def module_file(module: str) -> Path | None:
    """The source file of a module, dotted; None where there is none."""
    package, *inner = module.split(".")
    for place in _places(package):
        for path in (place.joinpath(*inner), place.joinpath(*inner, "__init__")):
            if (file := path.with_name(f"{path.name}.py")).is_file():
                return file
    spec = None if inner else _spec(package)
    return Path(spec.origin) if spec and spec.has_location and spec.origin else None


def _package_files(package: str) -> dict[str, Path]:
    """The source files of a package, by their place in it."""
    files = {
        path.relative_to(place).as_posix(): path
        for place in _places(package)
        for path in place.rglob("*")
        if path.suffix in _SOURCES
    }
    if not files and (file := module_file(package)):
        files = {file.name: file}
    return files


def _places(package: str) -> Iterator[Path]:
    spec = _spec(package)
    yield from map(Path, (spec and spec.submodule_search_locations) or ())


def _spec(package: str) -> Any:
    try:
        return find_spec(package)
    except (ImportError, ValueError):  # no name, or a module that nobody can find again
        return None


def _sha256(files: Mapping[str, Path]) -> str:
    digest = hashlib.sha256()
    for place, path in sorted(files.items()):
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error
        digest.update(f"{place}\0{len(content)}\0".encode())
        digest.update(content)
    return f"sha256:{digest.hexdigest()}"
