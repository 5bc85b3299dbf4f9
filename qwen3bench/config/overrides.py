"""What a person types → the options and overrides that Hydra takes."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException

from qwen3bench import __version__
from qwen3bench.config.choices import SEVERAL, SINGLE, choices
from qwen3bench.config.entry import Parser
from qwen3bench.errors import UserError

# flash,tie or [flash, tie]; anything else is Hydra's to read or refuse.
_NAMES = re.compile(r"[\w.,\- ]*|\[[\w.,\- ]*\]")
_INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


def normalize(argv: Sequence[str]) -> list[str]:
    """The arguments as Hydra wants them: its own options first, then the overrides.

    In groups that take several options `+opt=tie,flash`, `opt=[flash,tie,tie]`, … become `opt=[flash,tie]`;
    with multirun a comma keeps Hydra's meaning, and `+opt=tie` becomes `opt=tie`. `flash.backend=math` is short for
    `opt.flash.backend=math`, `model=8b` for `model=qwen3-8b`. Raises `UserError` on an option that does not exist, and
    on `+opt=flash +opt=tie`, which asks for both; of `opt=flash opt=tie` the last is taken, as Hydra does.
    """
    args = _parser().parse_intermixed_args(list(argv))
    if args.experimental_rerun is not None:
        raise UserError("--experimental-rerun reads a pickle, which can run anything; give the overrides again")
    options = [
        f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
        for name, value in vars(args).items()
        if name != "overrides" and value is not None and value is not False
    ]
    overrides = [_lengthened(override) for override in args.overrides]
    _refuse_repeats(overrides)
    several = _chosen if _asks_for_multirun([*options, *overrides]) else _as_list
    return options + [several(override) for override in overrides]


def check(arguments: Sequence[str]) -> None:
    """Raise `UserError` on normalized arguments that Hydra would refuse for their form alone.

    These are: what is no override, a group set to something other than names, several values without multirun.
    """
    overrides = [argument for argument in arguments if not argument.startswith("-")]
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except OverrideParseException as error:
        raise UserError(f"{error.override!r} is no override; give KEY=VALUE, as in `model=tiny`") from error
    multirun = _asks_for_multirun(arguments)
    for override in parsed:
        if override.is_sweep_override():
            if not multirun:
                key = override.key_or_group
                raise UserError(f"{key} takes one value; for one run per value add -m (multirun)")
        elif override.key_or_group in (*SEVERAL, *SINGLE) and not override.is_delete():
            value = override.value()
            if not all(isinstance(name, str) for name in (value if isinstance(value, list) else [value])):
                raise UserError("a group is set to the name of an option, as in `model=tiny`; --help lists them")


def _parser() -> argparse.ArgumentParser:
    """A parser of Hydra's options."""
    parser = Parser("python -m qwen3bench", add_help=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--version", action="version", version=f"qwen3bench {__version__}")
    for flags in (["--help", "-h"], ["--hydra-help"], ["--resolve"]):
        parser.add_argument(*flags, action="store_true")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--cfg", "-c", choices=("job", "hydra", "all"))
    action.add_argument("--info", "-i", nargs="?", const="all", choices=_INFO)
    for flags in (["--run", "-r"], ["--multirun", "-m"], ["--shell-completion", "-sc"]):
        action.add_argument(*flags, action="store_true")
    for flags in (["--package", "-p"], ["--config-path", "-cp"], ["--config-name", "-cn"], ["--config-dir", "-cd"]):
        parser.add_argument(*flags)
    parser.add_argument("--experimental-rerun")
    return parser


def _asks_for_multirun(arguments: Sequence[str]) -> bool:
    return any(each == "--multirun" or each.lower() == "hydra.mode=multirun" for each in arguments)


def _lengthened(override: str) -> str:
    """`opt.flash.backend=…` for `flash.backend=…`, `model=qwen3-8b` for `model=8b`, `design=…` for `+design=…`."""
    key, equals, value = override.partition("=")
    name = key.lstrip("+~")
    sign = key[: len(key) - len(name)]
    first, dot, _ = name.partition(".")
    if dot and first in choices("opt"):
        return f"{sign}opt.{name}{equals}{value}"
    if name in SINGLE and "~" not in sign:  # to Hydra the plus would add it to the one that there is
        return f"{name}{equals}{_model_names(value) if name == 'model' else value}"
    return override


def _model_names(value: str) -> str:
    """`qwen3-8b,tiny` for `8B,tiny`; a value with an unknown name as it is."""
    known = choices("model")
    names = [f"qwen3-{n}" if n not in known and f"qwen3-{n}" in known else n for n in value.lower().split(",")]
    return ",".join(names) if set(names) <= set(known) else value


def _refuse_repeats(overrides: Sequence[str]) -> None:
    for group in SEVERAL:
        given = [override.partition("=") for override in overrides if override.lstrip("+").startswith(f"{group}=")]
        if len(given) > 1 and any(key.startswith("+") for key, _, _ in given):
            names = ",".join(value.strip("[]") for _, _, value in given)
            raise UserError(f"{group} is given more than once; name all together, as in {group}={names}")


def _chosen(override: str) -> str:
    """`opt=tie` for `+opt=tie`: to Hydra the plus would add it to those that a design brings."""
    bare = override.lstrip("+")
    return bare if bare.partition("=")[0] in SEVERAL else override


def _as_list(override: str) -> str:
    """`opt=[flash,tie]` for `+opt=tie,flash,tie`: the options once each, in the order of labels."""
    key, equals, value = override.partition("=")
    group = key.lstrip("+")
    if not equals or group not in SEVERAL or not _NAMES.fullmatch(value.strip()):
        return override
    names = list(dict.fromkeys(name.strip() for name in value.strip().strip("[]").split(",") if name.strip()))
    known = choices(group)
    names.sort(key=lambda name: known.index(name) if name in known else len(known))
    return f"{group}=[{','.join([] if names in (['none'], ['null']) else names)}]"
