"""What a person types → the options and overrides that Hydra takes."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import OverrideParseException
from omegaconf import OmegaConf

from qwen3bench import __version__
from qwen3bench.config.catalogue import known_to
from qwen3bench.config.choices import SEVERAL, SINGLE, choices, config_dir, use_config_dir
from qwen3bench.config.entry import Parser
from qwen3bench.errors import UserError

# flash,tie or [flash, tie]; anything else is Hydra's to read or refuse.
_NAMES = re.compile(r"[\w.,\- ]*|\[[\w.,\- ]*\]")
_PATHS = ("run.dir", "resume", "weights", "hydra.sweep.dir")
_REFUSED = {  # what Hydra would do with its own directory, and this program does with run.dir
    "hydra.run.dir": "name the directory with run.dir",
    "hydra.job.chdir": "a run stays where it is started; name its directory with run.dir",
    "hydra.output_subdir": "config.yaml in run.dir holds the composed config",
}
_SWEEP_DIR = "hydra.sweep.dir"
_ALL = "all"  # of `opt`: every switch that the workload knows
_INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


def normalize(argv: Sequence[str]) -> list[str]:
    """The arguments as Hydra wants them: its own options first, then the overrides.

    In groups that take several options `+opt=tie,flash`, `opt=[flash,tie,tie]`, … become `opt=[flash,tie]`;
    with multirun a comma keeps Hydra's meaning, and `+opt=tie` becomes `opt=tie`. `flash.backend=math` is short for
    `opt.flash.backend=math`, `model=8b` for `model=qwen3-8b`. `opt=all` names what the workloads of the arguments know.
    From here on the choices are those of `--config-dir` too. Raises `UserError` on an option that does not exist, and
    on `+opt=flash +opt=tie`, which asks for both; of `opt=flash opt=tie` the last is taken, as Hydra does.
    """
    args = _parser().parse_intermixed_args(list(argv))
    use_config_dir(args.config_dir)
    if args.experimental_rerun is not None:
        raise UserError("--experimental-rerun reads a pickle, which can run anything; give the overrides again")
    options = [
        f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
        for name, value in vars(args).items()
        if name != "overrides" and value is not None and value is not False
    ]
    overrides = [_lengthened(override) for override in args.overrides]
    _refuse_repeats(overrides)
    multirun = _asks_for_multirun([*options, *overrides])
    overrides = [_all_named(override, overrides, multirun) for override in overrides]
    several = _chosen if multirun else _as_list
    return options + [several(override) for override in overrides]


def check(arguments: Sequence[str]) -> None:
    """Raise `UserError` on normalized arguments that Hydra would refuse for their form alone.

    These are: what is no override, a group set to something other than names, several values without multirun.
    """
    parsed = _parsed(arguments)
    multirun = _asks_for_multirun(arguments)
    _refuse_hydras_directories(parsed, multirun)
    _refuse_two_directories(parsed)
    for override in parsed:
        key = override.key_or_group
        typed = str(override.input_line)
        if override.is_sweep_override():
            if not multirun:
                advice = f"; one value with a comma: {hint}" if key in _PATHS and (hint := _with_quotes(typed)) else ""
                if key == "devices":
                    advice = f"; several cards in one run: devices=[{typed.partition('=')[2]}]"
                raise UserError(f"{key} takes one value; for one run per value add -m (multirun){advice}")
        elif key in _PATHS and not override.is_delete() and not isinstance(override.value(), str | None):
            raise UserError(f"{typed!r}: without quotes the value is no text; type {_with_quotes(typed)}")
        elif override.key_or_group in (*SEVERAL, *SINGLE) and not override.is_delete():
            value = override.value()
            if not all(isinstance(name, str) for name in (value if isinstance(value, list) else [value])):
                raise UserError("a group is set to the name of an option, as in `model=tiny`; --help lists them")


def sweep_directory(arguments: Sequence[str]) -> list[str]:
    """The override by which Hydra, in a multirun, makes its directories where `run.dir` puts the runs.

    Raises `UserError` where the arguments name both.
    """
    given = {each.key_or_group: each for each in _parsed(arguments)}
    named = given.get("run.dir")
    if not _asks_for_multirun(arguments) or named is None or named.is_sweep_override() or named.is_delete():
        return []
    if _SWEEP_DIR in given:
        raise UserError(f"run.dir and {_SWEEP_DIR} both name the multirun's directory; give one of them")
    return [f"{_SWEEP_DIR}={quoted(str(_home(str(named.value()))))}"] if named.value() else []


def _parsed(arguments: Sequence[str]) -> list[Override]:
    overrides = [argument for argument in arguments if not argument.startswith("-")]
    try:
        return OverridesParser.create().parse_overrides(overrides)
    except OverrideParseException as error:
        if hint := _with_quotes(error.override):
            raise UserError(f"{error.override!r}: the value needs quotes; type {hint}") from error
        advice = "give KEY=VALUE without spaces, as in `model=tiny` or `opt=[flash,tie]`"
        raise UserError(f"{error.override!r} is no override; {advice}") from error


def _refuse_hydras_directories(parsed: Sequence[Override], multirun: bool) -> None:
    for key, value in (each for override in parsed if not override.is_delete() for each in _settings_of(override)):
        if key in _REFUSED and value not in (None, False):
            raise UserError(f"{key} is not for this program: {_REFUSED[key]}")
        if key == _SWEEP_DIR and not multirun:
            raise UserError(f"{_SWEEP_DIR} is for a multirun (-m); name the directory of one run with run.dir")


def _refuse_two_directories(parsed: Sequence[Override]) -> None:
    given = {each.key_or_group: each.value() for each in parsed if not each.is_delete()}
    resume, directory = given.get("resume"), given.get("run.dir")
    if resume and directory and resume != directory:
        raise UserError(f"resume={resume} and run.dir={directory} both name the run's directory; give one of them")


def _settings_of(override: Override) -> Iterator[tuple[str, object]]:
    """The settings that an override makes, those of `key={name: value}` each by itself."""
    key, value = override.key_or_group, override.value()
    if isinstance(value, dict):
        yield from ((f"{key}.{name}", each) for name, each in value.items())
    else:
        yield key, value


def quoted(value: str) -> str:
    """`value` as Hydra reads text with any characters in it."""
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + (r"\'" if found[2] else ""), value) + "'"


def _with_quotes(override: str) -> str:
    """What to type in a shell for a path that Hydra misreads; empty where it is no path, or nothing helps."""
    key, _, value = override.partition("=")
    typed = f"{key}={quoted(value.strip(chr(39) + chr(34)))}"
    if key.lstrip("+") not in _PATHS or not typed.isprintable():
        return ""
    try:
        OverridesParser.create().parse_override(typed)
    except OverrideParseException:
        return ""
    return f'"{typed}"' if not set(typed) & set('"$`\\!') else shlex.quote(typed)


def _home(path: str) -> Path:
    """`path` with the home directory for `~`."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: no home directory is known for it; name the directory in full") from None


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
    """The override in full: `opt.flash.backend=…` for `flash.backend=…`, `workload.train.clip=…` for `train.clip=…`.

    `model=qwen3-8b` for `model=8b`, `design=…` for `+design=…`.
    """
    key, equals, value = override.partition("=")
    name = key.lstrip("+~")
    sign = key[: len(key) - len(name)]
    first, dot, _ = name.partition(".")
    if dot and first in choices("opt"):
        return f"{sign}opt.{name}{equals}{value}"
    if dot and first in choices("workload"):
        return f"{sign}workload.{name}{equals}{value}"
    if name in _PATHS and value.startswith("~"):  # a shell leaves it as it is within a word
        return f"{sign}{name}={quoted(str(_home(value)))}"
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
            names = ",".join("".join(value.split()).strip("[]") for _, _, value in given)
            raise UserError(f"{group} is given more than once; name all together, as in {group}={names}")


def _all_named(override: str, overrides: Sequence[str], multirun: bool) -> str:
    """`opt=[flash,…]` with every switch that the workloads of `overrides` know, for `opt=all`."""
    key, _, value = override.partition("=")
    named = _names(value)
    if key.lstrip("+") != "opt" or _ALL not in named:
        return override
    typed = [_names(each.partition("=")[2]) for each in overrides if each.lstrip("+").startswith("workload=")]
    everything = known_to(typed[-1] if typed else _default_workloads())
    together = f"[{','.join(everything)}]"
    if multirun and not value.strip().startswith("["):  # each a point of its own
        return f"{key}={','.join(together if each == _ALL else each for each in named)}"
    return f"{key}=[{','.join(dict.fromkeys((*everything, *(each for each in named if each != _ALL))))}]"


def _default_workloads() -> list[str]:
    defaults = OmegaConf.load(config_dir() / "config.yaml").defaults
    return next(list(each["workload"]) for each in defaults if "workload" in each)


def _names(value: str) -> list[str]:
    """The names of `flash,tie` and of `[flash, tie]`."""
    return [name.strip() for name in value.strip().strip("[]").split(",") if name.strip()]


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
    names = list(dict.fromkeys(_names(value)))
    known = choices(group)
    names.sort(key=lambda name: known.index(name) if name in known else len(known))
    return f"{group}=[{','.join([] if names in (['none'], ['null']) else names)}]"
