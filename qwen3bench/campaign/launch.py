"""One run, from settings to report: its directory, its signals, its exit status."""

from __future__ import annotations

import re
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from qwen3bench.analysis.cells import columns
from qwen3bench.analysis.frames import SAMPLE_COLUMNS
from qwen3bench.analysis.run import Run, load_run, write_derived
from qwen3bench.campaign import continuation
from qwen3bench.campaign.assembly import assembled
from qwen3bench.campaign.machine import Machine, UsedCard
from qwen3bench.campaign.progress import Reporter, duration
from qwen3bench.campaign.prompt import as_recorded
from qwen3bench.campaign.threads import recorded_threads
from qwen3bench.config.settings import Settings
from qwen3bench.errors import UserError
from qwen3bench.record.files import point_latest, record_file, refuse_no_directory
from qwen3bench.record.lines import EndLine
from qwen3bench.record.states import CellStatus, EndStatus
from qwen3bench.record.writer import RecordWriter
from qwen3bench.reporting.findings import findings
from qwen3bench.reporting.pages import write_report
from qwen3bench.reporting.terminal import terminal_summary
from qwen3bench.reporting.units import count

RESULTS = Path("results")
_CLOSING_LINES = 2  # beside the summary: facts that waited, or that the run is analyzed; how long it took
_FAILED_LINES = 2  # that no cell could be measured, where its path breaks over two
_INTERRUPTED_LINES = 6  # facts that waited, Ctrl-C again, analyzing, an empty one, how to continue, how to read


class Interrupted(BaseException):
    """A signal that asks the run to end; carries its number."""


class Signals:
    """SIGINT and SIGTERM as `Interrupted`; a context manager.

    Once one has come the next are only counted, as workers are being ended.
    """

    def __init__(self) -> None:
        self.count = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._came)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _came(self, number: int, _: object) -> None:
        self.count += 1
        if self.count == 1:
            raise Interrupted(number)


def run(settings: Settings, machine: Machine | None = None) -> int:
    """Measure what `settings` ask for and write the report; the exit status (CONTRACT.md, Commands).

    Raises `UserError` for what the user can mend. SIGINT and SIGTERM end the workers, keep the record, and give 130
    and 143. After a first SIGINT the report is written of what there is; a second one ends at once.
    """
    machine = machine or Machine()
    if settings.devices and not settings.resume and len(strata := _strata(machine.used(settings))) > 1:
        return _each_kind(settings, machine, strata)
    started = time.monotonic()
    _refuse_column_names(settings)
    directory = _directory(settings)
    reporter = Reporter()
    writer = RecordWriter(directory)
    signals = Signals()
    try:
        with signals, continuation.no_trace_where_refused(directory), writer, reporter.running():
            with _interruption_recorded(writer), ExitStack() as workers:
                campaign = assembled(settings, writer, reporter, workers, machine)
                campaign.check()
                if directory.resolve().parent == RESULTS.resolve():
                    point_latest(directory)
                campaign.run()
                writer.append(EndLine(status=EndStatus.FINISHED, time=time.time()))
            finished = _reported(directory, reporter)
    except UserError as error:
        if not _is_finished(writer):
            raise
        report = continuation.report_command(directory)
        raise UserError(f"{error}\neverything is measured; write the report: {report}") from error
    except Interrupted as stop:
        if stop.args[0] == signal.SIGINT and signals.count == 1 and not _is_finished(writer):
            _report_of_a_part(directory, reporter)
        _say_interrupted(writer)
        return 128 + int(stop.args[0])
    nothing = not (finished.cells["status"] == CellStatus.OK).any()
    terminal_summary(finished, Console(), _CLOSING_LINES + _FAILED_LINES * nothing)
    print(f"the run took {duration(time.monotonic() - started)}", file=sys.stderr)
    if nothing:
        print(f"qwen3bench: error: no cell could be measured; {directory / 'report.html'} says why", file=sys.stderr)
    return _status(finished)


def _strata(cards: Sequence[UsedCard]) -> dict[str, list[UsedCard]]:
    """The cards by their kind: what unlike cards read is not one number."""
    kinds: dict[str, list[UsedCard]] = {}
    for card in cards:
        kinds.setdefault(card.kind, []).append(card)
    return kinds


def _each_kind(settings: Settings, machine: Machine, strata: Mapping[str, Sequence[UsedCard]]) -> int:
    """A run for each kind of card, in a directory of its own, one after another; the worst exit status."""
    home, worst = _directory(settings), 0
    for kind, cards in strata.items():
        print(f"{kind}: {count(len(cards), 'card')}", file=sys.stderr)
        here = replace(settings, dir=home / _file_name(kind), devices=tuple(str(card.uuid) for card in cards))
        status = run(here, replace(machine, cards=tuple(cards)))
        if status > 128:  # interrupted
            return status
        worst = max(worst, status)
    return worst


def _reported(directory: Path, reporter: Reporter) -> Run:
    """The run of this directory, analyzed, its report written."""
    with reporter.stage("analyzing and writing the report", 1):
        run = load_run(directory)
        write_derived(run)
        write_report(run, findings(run))
    return run


def _report_of_a_part(directory: Path, reporter: Reporter) -> None:
    """Write and say what there is of a run that was interrupted, unless that is nothing, or another signal comes."""
    with suppress(Interrupted, UserError), Signals():
        if load_run(directory).samples.empty:
            return
        reporter.note("Ctrl-C again: stop without a report")
        terminal_summary(_reported(directory, reporter), Console(), _INTERRUPTED_LINES)


def finished_status(settings: Settings) -> int | None:
    """Exit status of the run of these settings that their directory holds; None where it holds none that is finished.

    Raises `UserError` where the record cannot be read.
    """
    file = record_file(settings.dir) if settings.dir else None
    if not (file and file.stat().st_size):
        return None
    done = load_run(file.parent)
    recorded, device = done.record.run.config, done.record.run.setting("device")
    emulated = settings.dtype == "auto" and done.record.run.dtype == "float16"  # or the card would have computed in it
    settings = recorded_threads(as_recorded(settings, done.record), done.record)
    same = device in ("cpu", "cuda", settings.device) and settings.device in ("auto", device)
    same = same and not continuation.config_differences(
        recorded, settings.resolved(device, emulates_bfloat16=emulated).to_dict()
    )
    return _status(done) if done.finished and same else None


def _status(run: Run) -> int:
    return 0 if (run.cells["status"] == CellStatus.OK).all() else 3


def _refuse_column_names(settings: Settings) -> None:
    """Raise `UserError` where an optimization's own column of the results would take another's place."""
    taken = {*SAMPLE_COLUMNS, *columns(())}
    for name in settings.factors:
        if name in taken:
            raise UserError(f"opt.{name}: the results have a column {name!r} already; give the YAML file another name")


def _directory(settings: Settings) -> Path:
    """Where the run is written. Raises `UserError` where it is to be continued there and cannot be."""
    if settings.resume and not record_file(settings.resume):
        raise UserError(f"resume={settings.resume}: there is no run (samples.jsonl) to continue")
    name = f"{datetime.now():%Y-%m-%d_%H-%M-%S}-{_file_name(settings.model.name)}"
    directory = settings.resume or settings.dir or RESULTS / name
    refuse_no_directory(directory)
    if directory.is_dir() and any(directory.iterdir()) and not record_file(directory):
        raise UserError(f"run.dir={directory}: holds other files and no run; name a new directory")
    return directory


def _file_name(name: str) -> str:
    """A name as a directory may have it: a model or a card may have any, and must not choose the place."""
    return re.sub(r"[^\w.-]+", "-", name)[:80]


def _is_finished(writer: RecordWriter) -> bool:
    return isinstance(writer.last, EndLine) and writer.last.status == EndStatus.FINISHED


def _say_interrupted(writer: RecordWriter) -> None:
    """What is there after an interrupt, and the line that goes on."""
    report = continuation.report_command(writer.directory)
    if _is_finished(writer):
        text = f"interrupted with everything measured. Write the report: {report}"
    elif writer.last is None:
        text = "interrupted before anything was recorded: give the same command again"
    else:
        resume = continuation.resume_command(writer.directory)
        text = f"interrupted; nothing measured is lost. Continue: {resume}\nor read what there is: {report}"
    print(f"\n{text}", file=sys.stderr)


@contextmanager
def _interruption_recorded(writer: RecordWriter) -> Iterator[None]:
    try:
        yield
    except Interrupted:
        with suppress(UserError):  # a full disk
            if writer.last is not None and not _is_finished(writer):
                writer.append(EndLine(status=EndStatus.INTERRUPTED, time=time.time()))
        raise
