"""The catalogue of optimizations: what configs/opt/*.yaml declares, and opt/*.yaml of a folder of the user's own.

No module names an optimization; adding one takes its Python file and its YAML file.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from hydra.utils import get_method

from qwen3bench.config.choices import DECLARATIONS, choices, content_of, nearest
from qwen3bench.config.claims import ALL, Claim, Switch
from qwen3bench.config.sources import module_file
from qwen3bench.errors import UserError
from qwen3bench.record.screen import Rules

_NOT_OPTIONS = ("_target_", *DECLARATIONS)


def declared(name: str) -> dict[str, Any]:
    """What the YAML file of an optimization says: `_target_` (its function Parts → Parts), declarations, options.

    Raises `UserError`, naming those that exist and the nearest, where there is no such optimization.
    """
    if name not in choices("opt"):
        raise UserError(
            f"unknown optimization {name!r}; there are {', '.join(choices('opt'))}{nearest(name, choices('opt'))}"
        )
    return content_of("opt", name)


def rules_of(names: Iterable[str]) -> Rules:
    """Which of these optimizations do not go together: what their YAML files list under `excludes` and `needs`.

    Raises `UserError` where a file lists what is no optimization, and where one that is needed is not among the names.
    """
    names = tuple(names)
    excludes = [(name, other) for name in names for other in _listed(name, "excludes") if other in names]
    needs = [(name, other) for name in names for other in _listed(name, "needs")]
    for name, other in needs:
        if other not in names:
            raise UserError(f"{name} needs {other}; name both, as in opt={other},{name}")
    return Rules(tuple(excludes), tuple(needs))


def _listed(name: str, key: str) -> list[str]:
    listed = (declared(name).get(key) or []) if name in choices("opt") else []
    if not isinstance(listed, list) or not set(listed) <= set(choices("opt")) - {name}:
        raise UserError(f"opt/{name}.yaml: {key} must be a list of other optimizations, not {listed}")
    return listed


def claim_of(name: str, target: str | None = None) -> Claim:
    """The part that an optimization's YAML file says it changes, and those that it commutes with there.

    Of another function than the file's, `target`, the file says nothing.
    Raises `UserError` where `part` is no name, and where `commutes` lists what is no other optimization.
    """
    content = declared(name) if name in choices("opt") else {}  # of a record's there may be none any more
    if not content or target not in (None, content.get("_target_")):
        return Claim(name)
    part = content.get("part") or ""
    if not isinstance(part, str):
        raise UserError(f"opt/{name}.yaml: part must be the name of one part, as in mlp or mlp.activation, not {part}")
    return Claim(name, part, (ALL,) if content.get("commutes") == ALL else tuple(_listed(name, "commutes")))


def known_to(workloads: Iterable[str]) -> tuple[str, ...]:
    """The optimizations that one of these workloads knows, in the order of labels: what `opt=all` names.

    A YAML file lists under `workloads` those in which its switch can change what runs; without that it is all of them.
    Raises `UserError` where it lists one that does not exist.
    """
    return tuple(name for name in choices("opt") if set(workloads_of(name)) & set(workloads))


def workloads_of(name: str) -> tuple[str, ...]:
    """The workloads that know an optimization. Raises as `known_to` does."""
    every = choices("workload")
    listed = declared(name).get("workloads", list(every))
    if not (isinstance(listed, list) and set(listed) <= set(every)):
        raise UserError(f"opt/{name}.yaml: workloads must be a list of some of {', '.join(every)}, not {listed}")
    return tuple(each for each in every if each in listed)


def described(name: str, recorded: Any = None) -> str:
    """What an optimization of the catalogue is, in a line: how its module's docstring begins, and its recorded options.

    `recorded`, from a record, is data: nothing that it names is looked up. Empty where the catalogue has no such name,
    or another function under it. The module is read and not imported, which takes seconds.
    """
    own = declared(name) if name in choices("opt") else {}
    content = recorded if isinstance(recorded, Mapping) else {}
    target = own.get("_target_", "")
    if content.get("_target_", target) != target:
        return ""
    file = module_file(target.rpartition(".")[0])
    try:
        docstring = ast.get_docstring(ast.parse(file.read_text("utf-8") if file else "")) or ""
    except (OSError, SyntaxError, ValueError):
        return ""
    line = " ".join(docstring.partition("\n\n")[0].split()).rstrip(".")
    if line.startswith("`"):  # its name
        line = line.partition("`: ")[2] or line
    options = ", ".join(f"{key}={value}".lower() for key, value in _options(content).items() if key in own)
    return f"{line} ({options})" if line and options else line


def resolve(opts: Iterable[str] | Mapping[str, Mapping[str, Any]]) -> dict[str, Switch]:
    """The named optimizations in the order of labels: functions Parts → Parts, options bound, and what they claim.

    `opts` are names, or a mapping of names to options. Raises `UserError` for an unknown name or option.
    """
    declarations = {name: declared(name) for name in ([opts] if isinstance(opts, str) else opts)}
    given: Mapping[str, Mapping[str, Any]] = opts if isinstance(opts, Mapping) else {}
    targets = {name: given.get(name, {}).get("_target_", declarations[name]["_target_"]) for name in declarations}
    return {
        name: Switch(partial(_loaded(name, targets[name]), **options), claim_of(name, targets[name]))
        for name, options in all_options({name: given.get(name, {}) for name in declarations}).items()
    }


def all_options(opts: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """All options of the named optimizations, in the order of labels: those given, and what their YAML files declare.

    Raises `UserError` for an unknown name or option; nothing is imported.
    """
    declarations = {name: _options(declared(name)) for name in opts}
    given = {name: _options(opts[name]) for name in sorted(opts, key=choices("opt").index)}
    for name, options in given.items():
        if unknown := sorted(set(options) - set(declarations[name])):
            known = ", ".join(declarations[name]) or "none"
            raise UserError(f"{name} has no option {', '.join(unknown)}; it has: {known}")
    return {name: {**declarations[name], **options} for name, options in given.items()}


def _loaded(name: str, target: str) -> Callable[[Any], Any]:
    try:
        return get_method(target)
    except Exception as error:  # whatever importing the module raises
        why = " ".join(str(error).split())
        raise UserError(f"{name}: its _target_ {target} cannot be loaded: {why}") from error


def _options(content: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key not in _NOT_OPTIONS}
