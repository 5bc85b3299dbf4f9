"""How a record begins, and whether a run may be continued: nothing may have changed that its numbers depend on."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from qwen3bench.campaign.worker_pool import QUIET_S, opening
from qwen3bench.campaign.worker_process import WorkerHandle
from qwen3bench.config.catalogue import described
from qwen3bench.config.choices import choices, content_of, own_config_dir, own_file
from qwen3bench.config.settings import Settings, settings_from
from qwen3bench.errors import Refused, UserError
from qwen3bench.record.environment import CHANGES_NO_NUMBER, differences
from qwen3bench.record.files import RECORD, write_atomic
from qwen3bench.record.lines import EndLine, ProcessLine, PromptLine, RunLine, ScreenFacts, SessionLine
from qwen3bench.record.messages import CellFailure, Identify, Identity, Probe
from qwen3bench.record.reader import Record, read_record
from qwen3bench.record.states import EndStatus
from qwen3bench.record.typed import flat
from qwen3bench.record.writer import RecordWriter

_PLAIN_PATH = re.compile(r"(?!(?i:null|true|false|inf|nan)$)[A-Za-z_/][\w./-]*", re.ASCII)
_BEGUN = (RECORD, ".lock", "worker.log", "environment.json", "config.yaml")  # what a run lays down at first
_MAX_KEYS = 6  # named where a config changed


def identified(settings: Settings, worker: WorkerHandle, directory: Path) -> tuple[Settings, Identity]:
    """The settings on the device that is there, which the worker has taken, and what machine and code that is.

    Raises `UserError` where the worker cannot tell.
    """
    try:
        found = worker.ask(Probe(device=settings.device), QUIET_S)
        settings = settings.resolved(found.device, emulates_bfloat16=found.emulates_bfloat16)
        worker.ask(opening(settings), QUIET_S)
        return settings, worker.ask(Identify(), settings.measure.step_timeout_s)
    except CellFailure as failure:
        raise UserError(f"no worker could be started: {failure.reason}; see {directory / 'worker.log'}") from None


@contextmanager
def no_trace_where_refused(directory: Path) -> Iterator[None]:
    """Leave a new directory as it was where what is asked of the run is refused before anything is measured."""
    missing = [place for place in (directory, *directory.parents) if not place.exists()]
    new = bool(missing) or not any(directory.iterdir())
    try:
        yield
    except Refused:
        if new and _nothing_measured(directory):
            for name in _BEGUN:
                (directory / name).unlink(missing_ok=True)
            with suppress(OSError):  # what lies there is not this run's
                for place in missing:
                    place.rmdir()
        raise


def _nothing_measured(directory: Path) -> bool:
    record = directory / RECORD
    if not (record.exists() and record.stat().st_size):
        return True
    return set(read_record(directory).types) <= {line.type for line in (RunLine, SessionLine, PromptLine, ProcessLine)}


def begin(settings: Settings, writer: RecordWriter, identity: Identity, choice: PromptLine | None = None) -> None:
    """Write environment.json, config.yaml and the record's first line, with it how the prompt was chosen."""
    directory = writer.directory
    config = replace(settings, dir=directory, resume=None).to_dict()
    write_atomic(directory / "environment.json", json.dumps(identity.environment, indent=2) + "\n")
    write_atomic(directory / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    writer.append(first_line(settings, config, identity), *([choice] if choice is not None else []))


def first_line(settings: Settings, config: dict[str, Any], identity: Identity) -> RunLine:
    """The record's first line."""
    return RunLine(
        created=datetime.now().astimezone().isoformat(timespec="seconds"),
        config=config,
        factors=settings.factors,
        cells=tuple(settings.labels),
        workloads=tuple(settings.workloads),
        runtimes=tuple(settings.runtimes),
        model=settings.model.name,
        device=identity.environment.get("device"),
        dtype=settings.dtype,
        fingerprint=dict(identity.fingerprint),
        own_switches={name: described(name, settings.opts[name]) for name in settings.factors if own_file("opt", name)}
        or None,
        design=screen_facts(settings),
    )


def screen_facts(settings: Settings) -> ScreenFacts | None:
    """How the screen of a run was made; None of other designs."""
    if settings.design != "screen":
        return None
    screen = settings.screen
    of_mains, of_pairs = screen.variance or (None, None)
    return ScreenFacts(
        made=screen.made,
        terms=len(screen.terms),
        d_efficiency=screen.efficiency,
        variance_main=of_mains,
        variance_pair=of_pairs,
        aliases=tuple(" = ".join(map(":".join, group)) for group in screen.aliases),
    )


def refuse_finished(done: Record, directory: Path) -> None:
    """Raise `UserError` where nothing is left to continue."""
    if any(line.status == EndStatus.FINISHED for line in done.of(EndLine)):
        raise UserError(
            f"{directory}: holds a finished run; name another run.dir, or rebuild its report with "
            f"{report_command(directory)}"
        )


def refuse_changed(done: Record, settings: Settings, identity: Identity, directory: Path) -> None:
    """Raise `UserError` where something differs that would make the old samples and the new ones two things."""
    changed = differences(done.run.fingerprint or {}, identity.fingerprint)
    if not changed:
        return
    keys = config_differences(done.run.config, settings.to_dict())
    words = [f"the configuration ({'; '.join(keys)})" if keys and w == "the configuration" else w for w in changed]
    advice = f"or continue it as it was with {_override_of(directory)} alone" if keys else ""
    raise UserError(
        f"{directory}: cannot be continued, as {', '.join(words)} changed since it began\n"
        f"start a new run with another run.dir {advice}".rstrip()
    )


def config_differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two resolved configs, in words: key, old value, new value; where a run is written apart."""
    before, after = (dict(flat({k: v for k, v in c.items() if k not in CHANGES_NO_NUMBER})) for c in (old, new))
    keys = [key for key in dict.fromkeys((*before, *after)) if before.get(key) != after.get(key)]
    words = [f"{key}: {before.get(key)!r:.60} then, {after.get(key)!r:.60} now" for key in keys]
    return words if len(words) <= _MAX_KEYS else [*words[:_MAX_KEYS], f"and {len(words) - _MAX_KEYS} more"]


def recorded_settings(done: Record, directory: Path) -> Settings:
    """The settings that a record began with.

    Raises `UserError` where this version does not read them, or they name code or a compiler's options that this
    project's configs do not: a record is data, and may be somebody else's.
    """
    for key, value in _named_by_record_alone(done.run):
        raise UserError(
            f"{directory}: its record asks for {key}={value!r:.60}, which configs/ does not have\n"
            f"if you trust it, give the whole command that began it, with {_override_of(directory)}"
        )
    try:
        return settings_from({**done.run.config, "resume": str(directory)})
    except UserError as error:
        raise UserError(f"{directory}: holds a config that this qwen3bench does not read ({error})") from None


def _named_by_record_alone(run: RunLine) -> Iterator[tuple[str, Any]]:
    """Settings of optimizations and runtimes that no YAML file has, and functions other than the YAML file's."""
    for group in ("opt", "runtime"):
        recorded = run.setting(group)
        for name, options in recorded.items() if isinstance(recorded, dict) else ():
            known = dict(flat(content_of(group, name))) if name in choices(group) else {}
            for key, value in flat(options) if isinstance(options, dict) else ():
                if key not in known or (key == "_target_" and value != known[key]):
                    yield f"{group}.{name}.{key}", value


def report_command(directory: Path) -> str:
    """The line that writes this run's report."""
    return f"python -m qwen3bench.report {shlex.quote(str(directory))}"


def resume_command(directory: Path) -> str:
    """The line that continues this run."""
    own = own_config_dir()
    folder = f"--config-dir {shlex.quote(str(own))} " if own else ""
    return f"python -m qwen3bench {folder}{_override_of(directory)}"


def _override_of(path: Path) -> str:
    """resume=PATH as the shell, Hydra and OmegaConf want it quoted."""
    text = str(path)
    if not _PLAIN_PATH.fullmatch(text):
        # Hydra takes backslashes literally but before its own quote; OmegaConf reads ${…}.
        text = re.sub(r'(\\*)("|$)', lambda m: 2 * m[1] + ('\\"' if m[2] else ""), text).replace("${", "\\${")
        text = f'"{text}"'
    return shlex.quote(f"resume={text}")
