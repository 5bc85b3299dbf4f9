"""The command line: what a person types → Hydra's overrides → settings → the run. Imports no torch."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from qwen3bench.config.choices import OWN_FOLDER, config_dir, own_config_dir
from qwen3bench.config.composition_errors import plain_errors
from qwen3bench.config.entry import FULL_ERROR, Parser, guarded
from qwen3bench.config.overrides import check, normalize, quoted, sweep_directory
from qwen3bench.config.settings import Settings, settings_from, with_checkpoint_shape
from qwen3bench.errors import UserError

__all__ = ["Parser", "compose", "guarded", "main"]

Run = Callable[[Settings], int]
Finished = Callable[[Settings], int | None]
About = Callable[[Settings], Sequence[str]]
_CONFIG = "config"
_HYDRA = "1.3"  # the release whose behavior is asked for
_INTERRUPTED = 128  # and more: 128 plus the number of a signal


def main(argv: Sequence[str] | None, run: Run, finished: Finished = lambda _: None, about: About = lambda _: ()) -> int:
    """Exit status of `python -m qwen3bench ARGV`: the worst of the runs that it asks for.

    `run` measures one set of settings and returns its exit status. `finished` is the exit status of the run that their
    directory holds, or None where it holds another or an unfinished one. `about` says what they would measure, in lines
    that `--cfg job` prints as comments below the config.
    """
    return guarded(lambda: _launch(sys.argv[1:] if argv is None else argv, run, finished, about))


def compose(argv: Sequence[str]) -> Settings:
    """The settings that a command line without multirun describes, for entries that launch no run.

    Raises `UserError` where it describes none.
    """
    arguments = normalize(argv)
    overrides = [argument for argument in arguments if not argument.startswith(OWN_FOLDER)]
    if option := next((override for override in overrides if override.startswith("-")), None):
        raise UserError(f"{option} is not an option here; give KEY=VALUE, as in `model=tiny`")
    check(overrides)
    if own := own_config_dir():
        overrides.append(f"hydra.searchpath=[{quoted(f'file://{own}')}]")  # what --config-dir is to Hydra's own main
    with plain_errors(overrides), hydra.initialize_config_dir(str(config_dir()), version_base=_HYDRA):
        config = hydra.compose(_CONFIG, overrides)
    return with_checkpoint_shape(settings_from(config), overrides)


def _launch(argv: Sequence[str], run: Run, finished: Finished, about: About) -> int:
    statuses = [0]
    points: list[Path] = []  # of a multirun
    homes: list[Path] = []  # that Hydra made for them
    full_error = os.environ.get(FULL_ERROR)

    def job(config: DictConfig) -> int:
        settings = _job_settings(config)
        if settings.dir and HydraConfig.get().mode == RunMode.MULTIRUN:
            points.append(settings.dir)
            if (status := finished(settings)) is not None:
                print(f"{settings.dir} holds this point, finished")
                return status
        return run(settings)

    def task(config: DictConfig) -> None:
        with _environment(FULL_ERROR, full_error):
            statuses.append(guarded(lambda: job(config)))
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            homes.append(Path(HydraConfig.get().runtime.output_dir))
        if statuses[-1] >= _INTERRUPTED:  # the rest of a multirun is not wanted either
            raise SystemExit(statuses[-1])

    arguments = normalize(argv)
    check(arguments)
    arguments += sweep_directory(arguments)
    program = hydra.main(config_path=str(config_dir()), config_name=_CONFIG, version_base=_HYDRA)(task)
    # Hydra prints its errors, at length, unless it is told to raise them.
    with plain_errors(arguments), _arguments(arguments), _environment(FULL_ERROR, "1"):
        try:
            program()
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    if any(argument in ("--cfg=job", "--cfg=all") for argument in arguments):
        overrides = [argument for argument in arguments if argument.startswith(OWN_FOLDER) or argument[0] != "-"]
        print("\n".join(f"# {line}" for line in about(compose(overrides))))
    _drop_empty(homes)
    if len(points) > 1:
        print(f"One page over these runs: python -m qwen3bench.report {shlex.quote(str(points[0].parent))}")
    return max(statuses, key=(0, 3, 1).index)


def _job_settings(config: DictConfig) -> Settings:
    """Settings of this job; each point of a multirun gets a directory of its own."""
    job = HydraConfig.get()
    if job.mode == RunMode.MULTIRUN:
        print(f"#{job.job.num}: {' '.join(job.overrides.task)}", flush=True)
        directory = config.get("run", {}).get("dir")
        config.run.dir = str(Path(directory) / str(job.job.num)) if directory else _from_here(job.runtime.output_dir)
    return with_checkpoint_shape(settings_from(config), job.overrides.task)


def _drop_empty(homes: Sequence[Path]) -> None:
    """Remove the directories that Hydra made for points of a multirun where these were refused."""
    for home in homes:
        with suppress(OSError):  # it holds a run
            home.rmdir()
    for parent in {home.parent for home in homes}:
        if [each.name for each in parent.glob("*")] == ["multirun.yaml"]:  # Hydra's
            (parent / "multirun.yaml").unlink()
            parent.rmdir()


def _from_here(path: str) -> str:
    """Hydra's absolute path as a relative one where it lies below, as it is typed: it goes into the record."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path


@contextmanager
def _arguments(arguments: Sequence[str]) -> Iterator[None]:
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
