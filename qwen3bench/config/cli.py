"""The command line: what a person types → Hydra's overrides → settings → the run. Imports no torch."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig

from qwen3bench import __version__
from qwen3bench.config.choices import choices, config_dir, nearest
from qwen3bench.config.settings import Settings, settings_from, with_checkpoint_shape
from qwen3bench.errors import UserError

SEVERAL = ("opt", "workload", "runtime", "peer")  # groups that take several options
SINGLE = ("model", "design", "measure")  # and those that take one
_NAMES = re.compile(
    r"[\w.,\- ]*|\[[\w.,\- ]*\]"
)  # flash,tie or [flash, tie]; anything else is Hydra's to read or refuse
_FULL_ERROR = "HYDRA_FULL_ERROR"


def main(argv: Sequence[str] | None = None, run: Callable[[Settings], int] | None = None) -> int:
    """Exit status of `python -m qwen3bench ARGV`: the worst of the runs that it asks for.

    `run` measures one set of settings and returns its exit status (default: `qwen3bench.campaign.launch.run`).
    """
    return guarded(lambda: _launch(sys.argv[1:] if argv is None else argv, run or _run))


def compose(argv: Sequence[str] | None = None) -> Settings:
    """The settings that a command line without multirun describes, for entries that launch no run.

    Raises `UserError` where it describes none.
    """
    overrides = normalise(sys.argv[1:] if argv is None else argv)
    if any(override.startswith("-") for override in overrides):
        raise UserError(f"{overrides[0]} is not an option here; give KEY=VALUE, as in `model=tiny`")
    with _plain_errors(), hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = hydra.compose("config", overrides)
    return with_checkpoint_shape(settings_from(config), overrides)


def guarded(action: Callable[[], int]) -> int:
    """Exit status of `action`; an error that the user can mend is printed in one or two lines and gives 1.

    HYDRA_FULL_ERROR=1 in the environment shows the traceback as well. Any other exception is a bug.
    """
    try:
        return action()
    except BrokenPipeError:  # the reader of a pipe has seen enough; what is left goes nowhere (Python's docs, SIGPIPE)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UserError, OSError) as error:
        if os.environ.get(_FULL_ERROR) == "1":
            traceback.print_exc()
        message = "\n".join(_printable(line) for line in str(error).split("\n"))
        print(f"qwen3bench: error: {message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except Exception:
        traceback.print_exc()
        return 1


def normalise(argv: Sequence[str]) -> list[str]:
    """The arguments as Hydra wants them: its own options first, then the overrides.

    In groups that take several options `+opt=tie,flash`, `opt=[flash,tie,tie]`, … become `opt=[flash,tie]`;
    with multirun a comma keeps Hydra's meaning, and `+opt=tie` becomes `opt=tie`. `flash.backend=math` is short for
    `opt.flash.backend=math`, `model=8b` for `model=qwen3-8b`. Raises `UserError` on an option that does not exist, and
    on `+opt=flash +opt=tie`, which asks for both; of `opt=flash opt=tie` the last is taken, as Hydra does.
    """
    args = _parser().parse_intermixed_args(list(argv))
    if args.experimental_rerun is not None:
        raise UserError("--experimental-rerun reads a pickle, which can run anything; give the overrides again")
    overrides = [_lengthened(override) for override in args.overrides]
    multirun = args.multirun or any(override.lower() == "hydra.mode=multirun" for override in overrides)
    _refuse_repeats(overrides)
    overrides = [_chosen(override) if multirun else _as_list(override) for override in overrides]
    options = [
        f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
        for name, value in vars(args).items()
        if name != "overrides" and value is not None and value is not False
    ]
    return options + overrides


def _launch(argv: Sequence[str], run: Callable[[Settings], int]) -> int:
    statuses = [0]
    points: list[Path] = []  # of a multirun
    full_error = os.environ.get(_FULL_ERROR)

    def job(config: DictConfig) -> int:
        settings = _job_settings(config)
        if settings.dir and HydraConfig.get().mode == RunMode.MULTIRUN:
            points.append(settings.dir)
            if (status := _finished(settings)) is not None:
                print(f"{settings.dir} holds this point, finished")
                return status
        return run(settings)

    def task(config: DictConfig) -> None:
        with _environment(_FULL_ERROR, full_error):
            statuses.append(guarded(lambda: job(config)))
        if statuses[-1] >= 128:  # interrupted: the rest of a multirun is not wanted either
            raise SystemExit(statuses[-1])

    program = hydra.main(config_path=str(config_dir()), config_name="config", version_base="1.3")(task)
    # Hydra prints its errors, at length, unless it is told to raise them.
    with _plain_errors(), _arguments(normalise(argv)), _environment(_FULL_ERROR, "1"):
        try:
            program()
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    if len(points) > 1:
        print(f"One page over these runs: python -m qwen3bench.report {shlex.quote(str(points[0].parent))}")
    return max(statuses, key=(0, 3, 1).index)


def _finished(settings: Settings) -> int | None:
    """Exit status of the finished run of these settings in their directory, so that a multirun can be given again."""
    record = settings.dir / "samples.jsonl" if settings.dir else None
    if not (record and record.is_file() and record.stat().st_size):
        return None
    from qwen3bench.campaign.launch import finished_status

    return finished_status(settings)


def _run(settings: Settings) -> int:
    from qwen3bench.campaign.launch import run  # late: --help, --cfg and mistakes need no torch

    return run(settings)


def _job_settings(config: DictConfig) -> Settings:
    """Settings of this job; each point of a multirun gets a directory of its own."""
    job = HydraConfig.get()
    if job.mode == RunMode.MULTIRUN:
        print(f"#{job.job.num}: {' '.join(job.overrides.task)}", flush=True)
        directory = config.get("run", {}).get("dir")
        config.run.dir = str(Path(directory) / str(job.job.num)) if directory else _from_here(job.runtime.output_dir)
    return with_checkpoint_shape(settings_from(config), job.overrides.task)


def _from_here(path: str) -> str:
    """Hydra's absolute path as a relative one where it lies below, as it is typed: it goes into the record."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path


def _printable(text: str) -> str:
    """`text` with control characters escaped: a file's name must not steer the terminal."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


class Parser(argparse.ArgumentParser):
    """A parser of a command line, with mistakes as `UserError` instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{_printable(message)}; `{self.prog} --help` shows what there is")


def _parser() -> argparse.ArgumentParser:
    """Hydra's parser, which says so likewise, and whose --version is ours."""
    parser = get_args_parser()
    parser.prog = "python -m qwen3bench"
    parser.error = MethodType(Parser.error, parser)  # type: ignore[method-assign]
    for action in parser._actions:
        if isinstance(action, argparse._VersionAction):
            action.version, action.help = f"qwen3bench {__version__}", "Show the version and exit"
    return parser


def _lengthened(override: str) -> str:
    """`opt.flash.backend=…` for `flash.backend=…`, `model=qwen3-8b` for `model=8b`, `design=…` for `+design=…`."""
    key, equals, value = override.partition("=")
    first = key.partition(".")
    if first[1] and first[0].lstrip("+~") in choices("opt"):
        name = key.lstrip("+~")
        return f"{key[: len(key) - len(name)]}opt.{name}{equals}{value}"
    if (group := key.lstrip("+")) in SINGLE:  # to Hydra the plus would add it to the one that there is
        key, override = group, f"{group}{equals}{value}"
    if key == "model":
        known = choices("model")
        names = [f"qwen3-{n}" if n not in known and f"qwen3-{n}" in known else n for n in value.lower().split(",")]
        return f"model={','.join(names)}" if set(names) <= set(known) else override
    return override


def _chosen(override: str) -> str:
    """`opt=tie` for `+opt=tie`: to Hydra the plus would add it to those that a design brings."""
    bare = override.lstrip("+")
    return bare if bare.partition("=")[0] in SEVERAL else override


def _refuse_repeats(overrides: list[str]) -> None:
    for group in SEVERAL:
        given = [override.partition("=") for override in overrides if override.lstrip("+").startswith(f"{group}=")]
        if len(given) > 1 and any(key.startswith("+") for key, _, _ in given):
            names = ",".join(value.strip("[]") for _, _, value in given)
            raise UserError(f"{group} is given more than once; name all together, as in {group}={names}")


def _as_list(override: str) -> str:
    """`opt=[flash,tie]` for `+opt=tie,flash,tie`: the options once each, in the order of labels."""
    key, equals, value = override.partition("=")
    group = key.lstrip("+")
    if not equals or group not in SEVERAL or not _NAMES.fullmatch(value.strip()):
        return override
    names = dict.fromkeys(name.strip() for name in value.strip().strip("[]").split(",") if name.strip())
    if list(names) in (["none"], ["null"]):
        names = {}
    known = choices(group)
    ordered = sorted(names, key=lambda name: known.index(name) if name in known else len(known))
    return f"{group}=[{','.join(ordered)}]"


@contextmanager
def _arguments(arguments: list[str]) -> Iterator[None]:
    """Hydra reads sys.argv."""
    before, sys.argv = sys.argv, ["qwen3bench", *arguments]
    try:
        yield
    finally:
        sys.argv = before


@contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    """The environment variable `name` set to `value`, or unset where that is None."""
    before = os.environ.pop(name, None)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Whatever Hydra, OmegaConf or YAML finds wrong while composing, as `UserError`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (UserError, OSError)) and not isinstance(error, HydraException):
            raise
        raise UserError(_explained(error)) from error


def _explained(error: Exception) -> str:
    """What an error of Hydra's means here, in one or two lines."""
    text = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    found = re.search(r"Could not (?:find|load) '(\w+)/([^']*)'", text[0])
    if found and choices(found[1]):
        return _no_such_choice(found[1], found[2])
    if isinstance(error, OverrideParseException):
        return f"{error.override!r} is no override; give KEY=VALUE, as in `model=tiny`"
    if found := re.match(r"Could not override '([^']*)'", text[0]):
        return _no_such_key(found[1], f"{error} {error.__cause__}")
    if text[0].startswith("Config group override must be"):
        return "a group is set to the name of an option, as in `model=tiny`; --help lists them"
    if text[0].startswith("Ambiguous value for argument"):
        key = text[0].split("'")[1].partition("=")[0]
        return f"{key} takes one value; for one run per value add -m (multirun)"
    return " ".join(text[:2])


def _no_such_key(key: str, text: str) -> str:
    group, _, rest = key.partition(".")
    name, _, option = rest.partition(".")
    if group in SEVERAL and option:
        if name not in choices(group):
            return _no_such_choice(group, name)
        if f"Key '{name}'" in text:
            return f"{key} sets an option of {name}, which is not in this run; add {group}={name}"
    return f"there is no setting {key!r}; `python -m qwen3bench --cfg job` shows what can be set"


def _no_such_choice(group: str, name: str) -> str:
    what = "optimization" if group == "opt" else group
    known = choices(group)
    return f"there is no {what} {name!r}{nearest(name, known)}\nthere are: {', '.join(known)}"
