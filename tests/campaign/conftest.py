"""Whole runs with a fake worker: the real command line, supervisor, campaign, record and analysis, without PyTorch."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import psutil
import pytest
from small_run import SMALL

from qwen3bench.analysis.run import Run, load_run
from qwen3bench.campaign import launch
from qwen3bench.campaign.machine import Machine, UsedCard
from qwen3bench.campaign.progress import Reporter, Stage
from qwen3bench.campaign.worker_pool import WorkerPool
from qwen3bench.campaign.worker_process import WorkerProcess
from qwen3bench.config.cli import compose, guarded
from qwen3bench.config.settings import Settings
from qwen3bench.record.card import Card
from qwen3bench.record.environment import running_code
from qwen3bench.record.lines import Telemetry
from qwen3bench.record.messages import Request, decode_reply, encode_request
from qwen3bench.record.reader import Record, read_record

Fault = dict[str, Any]
Start = Callable[[Path], WorkerProcess]


@pytest.fixture
def titles_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pass and each part of one is a line of its own, its title, however soon after another."""
    part = Reporter.part

    def told(reporter: Reporter, title: str, total: int) -> AbstractContextManager[Stage]:
        if total:
            reporter.console.print(title, markup=False)
        return part(reporter, title, total)

    monkeypatch.setattr(Reporter, "part", told)
    monkeypatch.setattr(Reporter, "stage", told)


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many processes wait to be needed, each time that others begin to get ready side by side."""
    waiting: list[int] = []
    stand_by = WorkerPool.stand_by

    def noted(workers: WorkerPool, shares: Any) -> Any:
        found = stand_by(workers, shares)
        waiting.append(len(workers.ahead))
        return found

    monkeypatch.setattr(WorkerPool, "stand_by", noted)
    return waiting


@pytest.fixture
def start_fake() -> Callable[..., Start]:
    """Makes `start_worker` for a run: fake workers that suffer `faults` (fake_worker.py), from process `since` on."""

    def make(faults: Sequence[Fault] = (), since: int = 0, pids: list[int] | None = None) -> Start:
        started = 0

        def start(log: Path) -> WorkerProcess:
            nonlocal started
            text = json.dumps(list(faults) if started >= since else [])
            started += 1
            script = str(Path(__file__).with_name("fake_worker.py"))
            code = json.dumps(asdict(running_code()))
            worker = WorkerProcess(log, (sys.executable, "-I", "-S", script, text, code))
            if pids is not None:
                pids.append(worker.pid)
            return worker

        return start

    return make


class FakeCard(Card):
    """A card whose state is told beforehand, one look after another; the last stays."""

    def __init__(self, *looks: Telemetry) -> None:
        self.looks = list(looks)

    def sample(self, own_pids: object = None) -> Telemetry:
        return self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]


@pytest.fixture
def fake_card() -> type[FakeCard]:
    return FakeCard


def gone(pid: int) -> bool:
    """Whether a process has ended."""
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@dataclass
class Outcome:
    """What a command left."""

    directory: Path
    status: int
    out: str
    err: str
    pids: list[int] = field(default_factory=list)

    @property
    def record(self) -> Record:
        return read_record(self.directory)

    @cached_property
    def run(self) -> Run:
        return load_run(self.directory)

    @property
    def statuses(self) -> dict[str, str | None]:
        """The status of each cell, of the first workload and runtime."""
        cells = self.run.cells
        return dict(zip(cells["cell"], cells["status"], strict=True))

    @property
    def alive(self) -> list[int]:
        """The workers that it left."""
        return [pid for pid in self.pids if not gone(pid)]

    @property
    def error(self) -> str:
        """The one error, told in one or two lines without a traceback."""
        assert self.status == 1
        assert "Traceback" not in self.err
        _, error = self.err.split("qwen3bench: error: ")
        assert len(error.splitlines()) <= 2
        return error


class TellingWorker:
    """A worker in this process: fake_worker.py's answers, `change(op, answer)` of them, through the real protocol."""

    pid = 0
    spec = spec_from_file_location("fake_worker", Path(__file__).with_name("fake_worker.py"))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)

    def __init__(self, change: Callable[[str, dict[str, Any]], dict[str, Any]]) -> None:
        self.change = change
        self.worker = self.module.FakeWorker(asdict(running_code()))

    def __enter__(self) -> TellingWorker:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def ask(self, request: Request[Any], timeout_s: float) -> Any:
        self.send(request)
        return self.receive(request, timeout_s)

    def send(self, request: Request[Any]) -> None:
        arguments = json.loads(encode_request(request))
        op = arguments.pop("op")
        self.reply = {"ok": self.change(op, getattr(self.worker, op)(**arguments))}

    def receive(self, request: Request[Any], timeout_s: float) -> Any:
        return decode_reply(json.dumps(self.reply).encode(), request)

    def end(self) -> None:
        """There is no process to end."""


@pytest.fixture(scope="session")
def telling_worker() -> type[TellingWorker]:
    return TellingWorker


@pytest.fixture(scope="session")
def small_settings() -> Callable[..., Settings]:
    """Settings of a small run that some overrides change."""
    return lambda *overrides: _composed((*SMALL, *overrides))


@pytest.fixture
def measure(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    start_fake: Callable[..., Start],
) -> Callable[..., Outcome]:
    """`python -m qwen3bench` in this process with fake workers, a small run unless it continues one.

    Writes to tmp_path/run, `to` or `resume`; `changes` are made to the composed settings. The report is not written
    unless asked for, as drawing takes longer than all else.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "qwen3bench.campaign.replication.MEASURED_PER_SETUP", 0.0
    )  # else how many blocks depends on the clock

    def command(
        *overrides: str,
        faults: Sequence[Fault] = (),
        since: int = 0,
        card: Card | None = None,
        to: Path | None = None,
        resume: Path | None = None,
        report: bool = False,
        cards: Sequence[UsedCard] = (),
        **changes: Any,
    ) -> Outcome:
        directory = resume or to or tmp_path / "run"
        pids: list[int] = []
        start = start_fake(faults, since, pids)
        settings = _composed(overrides if resume else (*SMALL, *overrides))
        place = {"dir": None if resume else directory, "resume": resume}
        settings = replace(settings, **{**place, **changes})
        where = f"resume={directory}" if resume else f"run.dir={directory}"
        with monkeypatch.context() as patched:
            patched.setattr(sys, "argv", ["qwen3bench", *overrides, where])
            if not report:
                patched.setattr(launch, "write_report", lambda run, found: None)
            status = guarded(lambda: launch.run(settings, Machine(start, card, tuple(cards))))
        out, err = capsys.readouterr()
        return Outcome(directory, status, out, err, pids)

    return command


@cache
def _composed(overrides: tuple[str, ...]) -> Settings:
    return compose(overrides)
