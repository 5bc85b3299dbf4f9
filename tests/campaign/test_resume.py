"""A run that is interrupted or killed loses nothing, and its continuation measures nothing twice."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any, Self

import psutil
import pytest
import yaml

from qwen3bench.analysis.run import load_run
from qwen3bench.campaign import continuation, launch, passes
from qwen3bench.campaign.machine import Machine
from qwen3bench.config.cli import compose, main
from qwen3bench.config.settings import Settings
from qwen3bench.errors import UserError
from qwen3bench.record.lines import BlockLine, EndLine, Line, SessionLine, StopLine, VerifyLine
from qwen3bench.record.reader import read_record
from qwen3bench.record.writer import RecordWriter

Measure = Callable[..., Any]
SOURCE = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("run_fake.py")
FULL = ("design=full", "opt=flash,tie")
KEYS = ["workload", "runtime", "block", "cell", "copy", "repeat"]


def _command(*arguments: str) -> list[str]:
    return [sys.executable, str(SCRIPT), *arguments]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(SOURCE)}


def _until(condition: Callable[[], bool], limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


def _keys(directory: Path) -> list[tuple[Any, ...]]:
    return sorted(load_run(directory).samples[KEYS].itertuples(index=False, name=None))


@pytest.mark.slow
def test_killed_at_a_hundred_random_moments_it_ends_with_the_same_samples(tmp_path: Path) -> None:
    sizes = [f"measure.{name}" for name in ("min_blocks=5", "max_blocks=5", "blocks_per_process=2", "repeats=2")]
    arguments = ["model=tiny", "device=cpu", *FULL, "workload=prefill,generate", "measure.target=0.00001", *sizes]
    done = subprocess.run(
        _command("kill", "100", "0", str(tmp_path), *arguments),
        env=_environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=250,
    )
    logs = "\n".join(log.read_text(errors="replace")[-2000:] for log in tmp_path.glob("*.log"))
    assert done.returncode == 0, done.stderr + logs
    finished = int(done.stdout)
    assert finished > 0
    expected = _keys(tmp_path / "whole")
    assert len(expected) == 2 * 5 * (4 + 1) * 2
    for number in range(finished):
        directory = tmp_path / str(number)
        assert _keys(directory) == expected
        used = load_run(directory).samples
        assert set(used.groupby(["workload", "runtime", "block"])["process"].nunique()) == {1}
        stops = read_record(directory).of(StopLine)
        assert sorted((line.workload, line.blocks) for line in stops) == [("generate", 5), ("prefill", 5)]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_children_keeps_the_record_and_tells_how_to_continue(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    start_fake: Callable[..., Any],
    number: signal.Signals,
    status: int,
) -> None:
    directory = tmp_path / "a run's place"
    hangs = '[{"does":"hang","op":"visit","cell":"flash"}]'
    settings = ["model=tiny", "device=cpu", *FULL, "measure.min_blocks=3", "measure.max_blocks=3"]
    process = subprocess.Popen(
        _command("run", hangs, *settings, 'run.dir="a run\'s place"'),
        env=_environment(),
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    record = directory / "samples.jsonl"
    assert _until(lambda: record.exists() and b'"purpose":"time"' in record.read_bytes(), 60)
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    time.sleep(0.3)
    process.send_signal(number)
    _, gone_late = psutil.wait_procs(children, timeout=5)
    _, err = process.communicate(timeout=10)
    assert gone_late == []
    assert process.returncode == status
    assert "Traceback" not in err
    kept = read_record(directory)
    assert kept.warnings == []
    assert kept.of(EndLine)[-1].status == "interrupted"
    (line,) = (line for line in err.splitlines() if "Continue: " in line)
    python, _, module, *arguments = shlex.split(line.partition("Continue: ")[2])
    assert (python, module) == ("python", "qwen3bench")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "write_report", lambda run, found: None)
    assert main(arguments, lambda settings: launch.run(settings, Machine(start_fake()))) == 0
    assert set(load_run(directory).cells["status"]) == {"ok"}


@pytest.mark.slow
def test_a_multirun_given_again_measures_the_points_that_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start_fake: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "write_report", lambda run, found: None)
    measured: list[int] = []

    def run(settings: Settings) -> int:
        measured.append(settings.seed)
        return launch.run(settings, Machine(start_fake()))

    quick = ["measure.min_blocks=3", "measure.max_blocks=3"]
    command = ["-m", "model=tiny", "design=full", "opt=[flash,tie]", *quick, "run.dir=points"]
    finished = launch.finished_status
    assert main([*command, "seed=1"], run, finished) == 0
    assert main([*command, "seed=1,2"], run, finished) == 0
    assert measured == [1, 2]
    assert "points/0 holds this point, finished" in capsys.readouterr().out
    for other in ("prompt_tokens=9", "device=cuda"):
        assert main([*command, "seed=1,2", other], run, finished) == 1  # another run's directory


def test_a_signal_while_the_report_is_written_asks_for_no_continuation(
    measure: Measure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "write_derived", lambda run: os.kill(os.getpid(), signal.SIGINT))
    done = measure(*FULL)
    assert done.status == 130
    assert "Continue" not in done.err
    assert f"python -m qwen3bench.report {tmp_path / 'run'}" in done.err
    assert [line.status for line in done.record.of(EndLine)] == ["finished"]


def test_the_newest_run_is_the_latest_though_it_was_interrupted(
    measure: Measure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = measure(*FULL, dir=None)
    assert older.status == 0
    finished = (tmp_path / "results" / "latest").resolve()
    monkeypatch.setattr(launch, "datetime", Later)
    monkeypatch.setattr(passes.Campaign, "run", lambda _: os.kill(os.getpid(), signal.SIGINT))
    assert measure(*FULL, dir=None).status == 130
    latest = (tmp_path / "results" / "latest").resolve()
    assert latest != finished
    assert read_record(latest).of(EndLine)[-1].status == "interrupted"


class Later(datetime):
    """A clock that is ahead, as a directory's name holds seconds."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Self:
        return super().now(tz) + timedelta(hours=1)


def test_a_signal_before_anything_is_recorded_asks_for_the_command_again(
    measure: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuation, "begin", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    done = measure(*FULL)
    assert done.status == 143
    assert "before anything was recorded: give the same command again" in done.err
    assert "Continue" not in done.err
    monkeypatch.undo()


def test_a_signal_just_after_the_last_line_leaves_a_finished_run(
    measure: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = RecordWriter.append

    def interrupted(writer: RecordWriter, *lines: Line) -> None:
        append(writer, *lines)
        if isinstance(lines[-1], EndLine):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(RecordWriter, "append", interrupted)
    done = measure(*FULL)
    assert done.status == 130
    assert "everything measured. Write the report" in done.err
    assert [line.status for line in done.record.of(EndLine)] == ["finished"]


def test_a_disk_full_of_plots_loses_nothing_measured(measure: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: object) -> None:
        raise UserError("plots/a.svg: cannot be written (No space left on device)")

    monkeypatch.setattr(launch, "write_derived", full)
    done = measure(*FULL)
    assert "No space left on device" in done.error
    assert f"everything is measured; write the report: python -m qwen3bench.report {done.directory}" in done.error


def test_after_a_signal_the_handlers_are_those_of_before(measure: Measure) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    measure(*FULL)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


NAMES = ["results/2026-01-01_10-00-00-tiny", "r", "123", "1e5", "null", "True", "a b", "a'b", 'a"b', "a,b", "[a]", "é"]
NAMES += ["k=v", "{a: b}", "${oc.env:HOME}", "$HOME", "back\\slash", 'both\\"', "end\\", "-m", "a#b", "~", "*"]


@pytest.mark.parametrize("name", NAMES)
def test_the_line_to_resume_names_any_directory(name: str) -> None:
    line = continuation.resume_command(Path(name))
    said = subprocess.run(["sh", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[:3] == ["python", "-m", "qwen3bench"]
    (override,) = said.splitlines()[3:]
    assert compose([override]).resume == Path(name).expanduser()
    if name[0] == "r":
        assert line == f"python -m qwen3bench resume={name}"


# What may be continued


@pytest.fixture
def broken(measure: Measure) -> Any:
    """A run that ended before its timing."""
    return measure(*FULL, faults=[{"does": "die", "op": "open"}], since=2)


def test_resume_alone_takes_the_recorded_config(measure: Measure, broken: Any) -> None:
    done = measure(resume=broken.directory)
    assert done.status == 0
    assert set(done.statuses) == {"baseline", "flash", "tie", "flash+tie"}
    assert len(done.record.of(SessionLine)) == 2
    verified = [line.cell for line in done.record.of(VerifyLine)]
    assert sorted(verified) == sorted(set(verified))  # nothing was done twice


def test_the_same_command_with_its_directory_continues(measure: Measure, broken: Any) -> None:
    assert measure(*FULL).status == 0


def test_another_config_is_refused_with_the_keys_that_differ(measure: Measure, broken: Any) -> None:
    before = (broken.directory / "samples.jsonl").read_bytes()
    done = measure(*FULL, "batch_size=3", "seed=5")
    assert "the configuration (" in done.error
    assert "batch_size: 1 then, 3 now" in done.error
    assert "seed: 0 then, 5 now" in done.error
    assert f"or continue it as it was with resume={broken.directory} alone" in done.error
    assert "opt." not in done.error
    assert (broken.directory / "samples.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("weights", "the weights"),
        ("code", "the code"),
        ("torch", "torch (none then, other now)"),
        ("device", "device"),
        ("usable CPUs", "usable CPUs (2 then, other now)"),
    ],
)
def test_other_weights_code_torch_device_or_host_are_refused(
    measure: Measure, broken: Any, tmp_path: Path, part: str, words: str
) -> None:
    fingerprint = {**broken.record.run.fingerprint, part: "other"}
    fault = {"does": "answer", "fields": {"fingerprint": fingerprint}, "op": "identify"}
    done = measure(resume=broken.directory, faults=[fault])
    assert f"cannot be continued, as {words}" in done.error
    assert "configuration" not in done.error


def test_a_run_that_did_not_write_its_threads_down_can_be_continued(measure: Measure, broken: Any) -> None:
    fingerprint = {**broken.record.run.fingerprint, "threads": "2 in an operation, 2 between operations"}
    fault = {"does": "answer", "fields": {"fingerprint": fingerprint}, "op": "identify"}
    assert measure(resume=broken.directory, faults=[fault]).status == 0


def test_a_finished_run_is_not_continued(measure: Measure) -> None:
    done = measure(*FULL)
    before = (done.directory / "samples.jsonl").read_bytes()
    for again in (measure(*FULL), measure(resume=done.directory)):
        assert "holds a finished run" in again.error
        assert again.pids == []
    assert (done.directory / "samples.jsonl").read_bytes() == before


def test_what_is_no_run_is_not_continued(measure: Measure, tmp_path: Path) -> None:
    assert "there is no run" in measure(resume=tmp_path / "nowhere").error
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "samples.jsonl").touch()
    assert "nothing is recorded there yet" in measure(resume=tmp_path / "begun").error


def test_a_config_of_another_version_is_refused_in_one_line(measure: Measure, broken: Any, tmp_path: Path) -> None:
    run = broken.record.run
    with RecordWriter(tmp_path / "other") as writer:
        writer.append(replace(run, config={**run.config, "unheard_of": 1}))
    assert "holds a config that this qwen3bench does not read" in measure(resume=tmp_path / "other").error


@pytest.mark.parametrize(
    ("group", "options"),
    [
        ("opt", {"flash": {"_target_": "evil.mod.apply"}}),
        ("opt", {"mine": {"_target_": "evil.mod.apply"}}),
        ("runtime", {"compile": {"inductor": {"cpp": {"cxx": "/tmp/evil"}}}}),
    ],
    ids=str,
)
def test_code_that_a_record_alone_names_is_not_run(
    measure: Measure, broken: Any, tmp_path: Path, group: str, options: dict[str, Any]
) -> None:
    run = broken.record.run
    with RecordWriter(tmp_path / "other") as writer:
        writer.append(replace(run, config={**run.config, group: {**run.config[group], **options}}))
    done = measure(resume=tmp_path / "other")
    assert f"its record asks for {group}." in done.error
    assert done.pids == []


def test_a_recorded_text_is_never_resolved(broken: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "told")
    with RecordWriter(tmp_path / "other") as writer:
        writer.append(replace(broken.record.run, config={**broken.record.run.config, "weights": "${oc.env:SECRET}"}))
    settings = continuation.recorded_settings(read_record(tmp_path / "other"), tmp_path / "other")
    assert settings.weights == "${oc.env:SECRET}"


@pytest.mark.parametrize("name", ["${oc.env:HOME}", "${", "a: b"])
def test_a_run_in_a_directory_of_any_name_is_measured(measure: Measure, tmp_path: Path, name: str) -> None:
    done = measure(to=tmp_path / name)
    assert done.status == 0
    assert yaml.safe_load((tmp_path / name / "config.yaml").read_text())["run"]["dir"] == str(tmp_path / name)


# Ctrl-C


def _strikes_after(blocks: int, number: signal.Signals = signal.SIGINT) -> Callable[..., None]:
    """A writer's append after which, at the so many-th block, a signal comes."""
    append, closed = RecordWriter.append, 0

    def interrupted(writer: RecordWriter, *lines: Line) -> None:
        nonlocal closed
        append(writer, *lines)
        closed += isinstance(lines[-1], BlockLine)
        if isinstance(lines[-1], BlockLine) and closed == blocks:
            os.kill(os.getpid(), number)

    return interrupted


@pytest.mark.slow
def test_ctrl_c_once_reports_what_there_is(measure: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(RecordWriter, "append", _strikes_after(2))
        begun = measure(*FULL, "workload=prefill", report=True)
    assert begun.status == 130
    assert not begun.alive
    assert (begun.directory / "report.html").exists()
    assert "this run has not finished: what is here is what was measured until now" in begun.out
    assert "report.html" in begun.out
    assert "Continue: python -m qwen3bench resume=" in begun.err
    assert [line.status for line in begun.record.of(EndLine)] == ["interrupted"]
    done = measure(resume=begun.directory)
    assert done.status == 0
    assert len(done.record.of(BlockLine)) == 3


def test_ctrl_c_twice_ends_at_once(measure: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time while the report is written."""
    with monkeypatch.context() as patched:
        patched.setattr(RecordWriter, "append", _strikes_after(2))
        patched.setattr(launch, "write_derived", lambda run: os.kill(os.getpid(), signal.SIGINT))
        begun = measure(*FULL, "workload=prefill", report=True)
    assert begun.status == 130
    assert not (begun.directory / "report.html").exists()
    assert "Continue: python -m qwen3bench resume=" in begun.err
    assert begun.out == ""


@pytest.mark.parametrize(
    ("blocks", "number", "status"), [(2, signal.SIGTERM, 143), (1, signal.SIGTERM, 143), (0, signal.SIGINT, 130)]
)
def test_no_report_is_written_for_a_machine_that_shuts_down_nor_of_nothing(
    measure: Measure, monkeypatch: pytest.MonkeyPatch, blocks: int, number: signal.Signals, status: int
) -> None:
    with monkeypatch.context() as patched:
        if blocks:
            patched.setattr(RecordWriter, "append", _strikes_after(blocks, number))
        else:
            patched.setattr(passes.Campaign, "run", lambda _: os.kill(os.getpid(), number))
        begun = measure(*FULL, "workload=prefill", report=True)
    assert begun.status == status
    assert not (begun.directory / "report.html").exists()
    assert "Continue: " in begun.err
    assert "Ctrl-C again" not in begun.err
