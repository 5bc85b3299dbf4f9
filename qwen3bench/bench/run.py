"""One run, from settings to report: its directory, its signals, its exit status."""

from __future__ import annotations

import json
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console

from qwen3bench.analysis.run import load_run, write_derived
from qwen3bench.bench.campaign import QUIET_S, Campaign
from qwen3bench.bench.environment import differences
from qwen3bench.bench.progress import Reporter, duration
from qwen3bench.bench.record import Record, RecordWriter, clean_stale, point_latest, read_record, write_atomic
from qwen3bench.bench.supervisor import CellFailure, WorkerProcess
from qwen3bench.errors import UserError
from qwen3bench.reporting.pages import write_report
from qwen3bench.reporting.terminal import terminal_summary
from qwen3bench.settings import Settings, settings_from

RESULTS = Path("results")


class Interrupted(BaseException):
    """A signal that asks the run to end; carries its number."""


def run(settings: Settings) -> int:
    """Measure what `settings` ask for and write the report; the exit status (CONTRACT.md, Commands).

    Raises `UserError` for what the user can mend. SIGINT and SIGTERM end the workers, keep the record, and give 130
    and 143.
    """
    started = time.monotonic()
    directory = settings.resume or settings.dir or RESULTS / f"{datetime.now():%Y-%m-%d_%H-%M-%S}-{settings.model.name}"
    if settings.resume and not (directory / "samples.jsonl").exists():
        raise UserError(f"resume={directory}: there is no run (samples.jsonl) to continue")
    reporter = Reporter()
    try:
        with _signals(), RecordWriter(directory) as writer, reporter.running():
            campaign = _campaign(settings, writer, reporter)
            campaign.run()
            writer.append({"type": "end", "status": "finished", "time": time.time()})
            with reporter.stage("analysing and writing the report", 1):
                finished = load_run(directory)
                write_derived(finished)
                write_report(finished)
    except Interrupted as stop:
        print(
            f"\ninterrupted; nothing measured is lost. Continue: {_resume_command(directory)}\n"
            f"or read what there is: python -m qwen3bench.report {shlex.quote(str(directory))}",
            file=sys.stderr,
        )
        return 128 + stop.args[0]
    if directory.resolve().parent == RESULTS.resolve():
        point_latest(directory)
    terminal_summary(finished, Console())
    print(f"took {duration(time.monotonic() - started)}", file=sys.stderr)
    return _status(finished.cells)


def _campaign(settings: Settings, writer: RecordWriter, reporter: Reporter) -> Campaign:
    """The run's campaign: a new record's first line written, or an old record checked and taken up."""
    directory = writer.directory
    clean_stale(directory)
    done = None if writer.empty else read_record(directory)
    if done is not None:
        _refuse_finished(done, directory)
        for warning in done.warnings:
            reporter.note(f"warning: {warning}")
        if _only_resume(sys.argv):
            settings = settings_from({**done.run["config"], "resume": str(directory)})
    with reporter.stage("starting a worker", 1), WorkerProcess(directory / "worker.log") as worker:
        try:
            settings = settings.resolved(worker.ask("probe", QUIET_S, device=settings.device)["device"])
            worker.ask("open", QUIET_S, config=settings.to_dict())
            identity = worker.ask("identify", settings.measure.step_timeout_s)
        except CellFailure as failure:
            raise UserError(f"no worker could be started: {failure.reason}; see {directory / 'worker.log'}") from None
    if done is None:
        _begin(settings, writer, identity)
    else:
        changed = differences(done.run.get("fingerprint", {}), identity["fingerprint"])
        if changed:
            raise UserError(
                f"{directory}: cannot be continued, as {', '.join(changed)} changed since it began; "
                "start a new run with another run.dir"
            )
    writer.append({"type": "session", "command": sys.argv, "time": time.time()})
    return Campaign(settings, writer, reporter, done)


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
            "cells": ["+".join(cell) or "baseline" for cell in settings.cells],
            "workloads": list(settings.workloads),
            "runtimes": list(settings.runtimes),
            "model": settings.model.name,
            "device": identity["environment"]["device"],
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


def _only_resume(argv: list[str]) -> bool:
    """Whether the command says nothing but which run to continue."""
    return len(argv) == 2 and argv[1].startswith("resume=")


def _resume_command(directory: Path) -> str:
    """The line that continues this run."""
    return f"python -m qwen3bench resume={shlex.quote(str(directory))}"


def _status(cells: Any) -> int:
    ok = cells["status"] == "ok"
    return 0 if ok.all() else 3 if ok.any() else 1


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
