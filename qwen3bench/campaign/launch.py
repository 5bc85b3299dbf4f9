"""One run, from settings to report: its directory, its signals, its exit status."""

from __future__ import annotations

import json
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console

from qwen3bench.analysis.cells import columns
from qwen3bench.analysis.frames import SAMPLE_COLUMNS
from qwen3bench.analysis.run import Run, load_run, write_derived
from qwen3bench.campaign.passes import Campaign
from qwen3bench.campaign.progress import Reporter, duration
from qwen3bench.campaign.worker_pool import QUIET_S, StartWorker
from qwen3bench.campaign.worker_process import CellFailure, WorkerProcess
from qwen3bench.config.settings import Settings, settings_from
from qwen3bench.errors import UserError
from qwen3bench.record.card import Monitor
from qwen3bench.record.environment import CHANGES_NO_NUMBER, differences
from qwen3bench.record.reader import Record, RecordWriter, clean_stale, point_latest, read_record, write_atomic
from qwen3bench.reporting.findings import findings
from qwen3bench.reporting.pages import write_report
from qwen3bench.reporting.terminal import terminal_summary

RESULTS = Path("results")
_PLAIN_PATH = re.compile(r"(?!(?i:null|true|false|inf|nan)$)[A-Za-z_/][\w./-]*", re.ASCII)
_MOST_KEYS = 6  # named where a config changed


class Interrupted(BaseException):
    """A signal that asks the run to end; carries its number."""


def run(
    settings: Settings,
    start_worker: StartWorker = WorkerProcess,
    monitor: Monitor | None = None,
) -> int:
    """Measure what `settings` ask for and write the report; the exit status (CONTRACT.md, Commands).

    Raises `UserError` for what the user can mend. SIGINT and SIGTERM end the workers, keep the record, and give 130
    and 143.
    """
    started = time.monotonic()
    _refuse_column_names(settings)
    directory = _directory(settings)
    reporter = Reporter()
    writer = RecordWriter(directory)
    try:
        with _signals(), writer, reporter.running():
            with _interruption_recorded(writer), ExitStack() as workers:
                campaign = _campaign(settings, writer, reporter, workers, start_worker, monitor)
                if directory.resolve().parent == RESULTS.resolve():
                    point_latest(directory)
                campaign.run()
                writer.append({"type": "end", "status": "finished", "time": time.time()})
            with reporter.stage("analysing and writing the report", 1):
                finished = load_run(directory)
                write_derived(finished)
                found = findings(finished)
                write_report(finished, found)
    except UserError as error:
        if writer.last.get("status") != "finished":
            raise
        raise UserError(f"{error}\neverything is measured; write the report: {_report_command(directory)}") from error
    except Interrupted as stop:
        report = _report_command(directory)
        if writer.last.get("status") == "finished":
            print(f"\ninterrupted with everything measured. Write the report: {report}", file=sys.stderr)
        elif not writer.last:
            print("\ninterrupted before anything was recorded: give the same command again", file=sys.stderr)
        else:
            print(
                f"\ninterrupted; nothing measured is lost. Continue: {_resume_command(directory)}\n"
                f"or read what there is: {report}",
                file=sys.stderr,
            )
        return 128 + stop.args[0]
    terminal_summary(finished, found, Console())
    print(f"took {duration(time.monotonic() - started)}", file=sys.stderr)
    if not (finished.cells["status"] == "ok").any():
        print(f"qwen3bench: error: no cell could be measured; {directory / 'report.html'} says why", file=sys.stderr)
    return _status(finished)


def finished_status(settings: Settings) -> int | None:
    """Exit status of the run of these settings that their directory holds; None where it is another, or not finished.

    Raises `UserError` where the record cannot be read.
    """
    assert settings.dir is not None
    done = load_run(settings.dir)
    recorded = done.record.run["config"]
    same = settings.device in ("auto", recorded["device"])
    same = same and not config_differences(recorded, settings.resolved(recorded["device"]).to_dict())
    return _status(done) if done.finished and same else None


def _status(run: Run) -> int:
    return 0 if (run.cells["status"] == "ok").all() else 3


def _refuse_column_names(settings: Settings) -> None:
    """Raise `UserError` where an optimization's own column of the results would take another's place."""
    taken = {*SAMPLE_COLUMNS, *columns(())}
    for name in settings.factors:
        if name in taken:
            raise UserError(f"opt.{name}: the results have a column {name!r} already; give the YAML file another name")


def _directory(settings: Settings) -> Path:
    """Where the run is written. Raises `UserError` where it is to be continued there and cannot be."""
    if settings.resume and not (settings.resume / "samples.jsonl").exists():
        raise UserError(f"resume={settings.resume}: there is no run (samples.jsonl) to continue")
    name = re.sub(r"[^\w.-]+", "-", settings.model.name)[
        :80
    ]  # a model may have any name, and must not choose the place
    directory = settings.resume or settings.dir or RESULTS / f"{datetime.now():%Y-%m-%d_%H-%M-%S}-{name}"
    if not str(directory).isprintable():  # could not be typed to continue the run
        raise UserError(f"run.dir={str(directory)!r}: holds control characters; name another directory")
    if directory.is_dir() and any(directory.iterdir()) and not (directory / "samples.jsonl").exists():
        raise UserError(f"run.dir={directory}: holds other files and no run; name a new directory")
    return directory


@contextmanager
def _interruption_recorded(writer: RecordWriter) -> Iterator[None]:
    try:
        yield
    except Interrupted:
        with suppress(UserError):  # a full disk
            if writer.last and writer.last.get("status") != "finished":
                writer.append({"type": "end", "status": "interrupted", "time": time.time()})
        raise


def _campaign(
    settings: Settings,
    writer: RecordWriter,
    reporter: Reporter,
    workers: ExitStack,
    start_worker: StartWorker,
    monitor: Monitor | None,
) -> Campaign:
    """The run's campaign: a new record's first line written, or an old record checked and taken up."""
    directory = writer.directory
    clean_stale(directory)
    done = None if writer.empty else read_record(directory)
    if done is not None:
        _refuse_finished(done, directory)
        for warning in done.warnings:
            reporter.note(f"warning: {warning}")
        if _only_resume(sys.argv):
            settings = _recorded_settings(done, directory)
    elif settings.resume:
        raise UserError(f"resume={directory}: nothing is recorded there yet; begin again with run.dir={directory}")
    with reporter.stage("starting a worker", 1):
        worker = workers.enter_context(start_worker(directory / "worker.log"))
        try:
            settings = settings.resolved(worker.ask("probe", QUIET_S, device=settings.device)["device"])
            worker.ask("open", QUIET_S, config=settings.to_dict())
            identity = worker.ask("identify", settings.measure.step_timeout_s)
        except CellFailure as failure:
            raise UserError(f"no worker could be started: {failure.reason}; see {directory / 'worker.log'}") from None
    if done is None:
        _begin(settings, writer, identity)
    else:
        _refuse_changed(done, settings, identity, directory)
    command = ["python", "-m", "qwen3bench", *sys.argv[1:]]
    writer.append({"type": "session", "command": command, "time": time.time()})
    card = identity["environment"]
    card_bytes = None if card.get("mig") else card.get("device_memory_bytes")  # of a part of the card nothing is known
    return Campaign(settings, writer, reporter, done, start_worker, monitor, worker, card_bytes)


def _begin(settings: Settings, writer: RecordWriter, identity: dict[str, Any]) -> None:
    directory = writer.directory
    config = replace(settings, dir=directory, resume=None).to_dict()
    write_atomic(directory / "environment.json", json.dumps(identity["environment"], indent=2) + "\n")
    write_atomic(directory / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(config)))
    writer.append(
        {
            "type": "run",
            "created": datetime.now().astimezone().isoformat(timespec="seconds"),
            "config": config,
            "factors": list(settings.factors),
            "cells": settings.labels,
            "workloads": list(settings.workloads),
            "runtimes": list(settings.runtimes),
            "model": settings.model.name,
            "device": identity["environment"].get("device"),
            "dtype": settings.dtype,
            "fingerprint": identity["fingerprint"],
        }
    )


def _refuse_finished(done: Record, directory: Path) -> None:
    if any(line["status"] == "finished" for line in done.of("end")):
        raise UserError(
            f"{directory}: holds a finished run; name another run.dir, "
            f"or rebuild its report with python -m qwen3bench.report {directory}"
        )


def _refuse_changed(done: Record, settings: Settings, identity: dict[str, Any], directory: Path) -> None:
    """Raises `UserError` where something differs that would make the old samples and the new ones two things."""
    changed = differences(done.run.get("fingerprint") or {}, identity["fingerprint"])
    if not changed:
        return
    keys = config_differences(done.run["config"], settings.to_dict())
    words = [f"the configuration ({'; '.join(keys)})" if keys and w == "the configuration" else w for w in changed]
    advice = f"or continue it as it was with {_override('resume', directory)} alone" if keys else ""
    raise UserError(
        f"{directory}: cannot be continued, as {', '.join(words)} changed since it began\n"
        f"start a new run with another run.dir {advice}".rstrip()
    )


def config_differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two resolved configs, in words: key, old value, new value; where a run is written apart."""
    before, after = (dict(_leaves("", {k: v for k, v in c.items() if k not in CHANGES_NO_NUMBER})) for c in (old, new))
    keys = [key for key in dict.fromkeys((*before, *after)) if before.get(key) != after.get(key)]
    words = [f"{key}: {before.get(key)!r:.60} then, {after.get(key)!r:.60} now" for key in keys]
    return words if len(words) <= _MOST_KEYS else [*words[:_MOST_KEYS], f"and {len(words) - _MOST_KEYS} more"]


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(f"{path}.{key}" if path else str(key), item)
    else:
        yield path, value


def _recorded_settings(done: Record, directory: Path) -> Settings:
    try:
        return settings_from({**done.run["config"], "resume": str(directory)})
    except UserError as error:
        raise UserError(f"{directory}: holds a config that this qwen3bench does not read ({error})") from None


def _only_resume(argv: list[str]) -> bool:
    """Whether the command says nothing but which run to continue."""
    return len(argv) == 2 and argv[1].startswith("resume=")


def _report_command(directory: Path) -> str:
    """The line that writes this run's report."""
    return f"python -m qwen3bench.report {shlex.quote(str(directory))}"


def _resume_command(directory: Path) -> str:
    """The line that continues this run."""
    return f"python -m qwen3bench {_override('resume', directory)}"


def _override(key: str, path: Path) -> str:
    """KEY=PATH as the shell, Hydra and OmegaConf want it quoted."""
    text = str(path)
    if not _PLAIN_PATH.fullmatch(text):
        # Hydra takes backslashes literally but before its own quote; OmegaConf reads ${…}.
        text = re.sub(r'(\\*)("|$)', lambda m: 2 * m[1] + ('\\"' if m[2] else ""), text).replace("${", "\\${")
        text = f'"{text}"'
    return shlex.quote(f"{key}={text}")


@contextmanager
def _signals() -> Iterator[None]:
    """SIGINT and SIGTERM as `Interrupted`, once: a second one finds the workers being ended already."""

    def interrupt(number: int, _: object) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        raise Interrupted(number)

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
