"""Runs with fake workers as processes of their own, for tests that signal and kill them. Draws no report.

`run_fake.py run FAULTS ARGUMENT…`: as `python -m qwen3bench ARGUMENT…`, with workers that suffer FAULTS.
`run_fake.py kill COUNT SEED DIRECTORY ARGUMENT…`: one run uninterrupted, in DIRECTORY/whole; then runs that are killed
(SIGKILL) at COUNT random moments and continued each time, in DIRECTORY/0, 1, …; prints how many of these finished.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from qwen3bench.campaign import launch
from qwen3bench.campaign.machine import Machine
from qwen3bench.campaign.worker_process import WorkerProcess
from qwen3bench.config.cli import compose, guarded, main
from qwen3bench.config.settings import Settings
from qwen3bench.record.card import Card
from qwen3bench.record.environment import running_code
from qwen3bench.record.lines import Telemetry


def starter(faults: str) -> Callable[[Path], WorkerProcess]:
    script = str(Path(__file__).with_name("fake_worker.py"))
    code = json.dumps(asdict(running_code()))
    return lambda log: WorkerProcess(log, (sys.executable, "-I", "-S", script, faults, code))


class Fitful(Card):
    """A card that is throttled now and then."""

    def __init__(self) -> None:
        self.random = random.Random(os.getpid())

    def sample(self, own_pids: object = None) -> Telemetry:
        return Telemetry(throttle_reasons=("hw_slowdown",) if self.random.random() < 0.2 else ())


def fork_run(settings: Settings, log: Path) -> int:
    """The process id of a child that runs `settings`; its exit status is the run's."""
    child = os.fork()
    if child:
        return child
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.dup2(2, 1)
    sys.argv = ["qwen3bench", f"resume={settings.resume}" if settings.resume else f"run.dir={settings.dir}"]
    os._exit(guarded(lambda: launch.run(settings, Machine(starter("[]"), Fitful()))))


def kill(count: int, seed: int, directory: Path, arguments: list[str]) -> None:
    settings = compose(arguments)
    chance = random.Random(seed)
    started = time.monotonic()
    _, code = os.waitpid(fork_run(replace(settings, dir=directory / "whole"), directory / "whole.log"), 0)
    assert code == 0, "the uninterrupted run"
    whole_s = time.monotonic() - started
    kills = finished = 0
    while True:
        run = directory / str(finished)
        record = run / "samples.jsonl"
        # Either way continues a run; with nothing recorded yet there is none to name.
        by_name = chance.random() < 0.5 and record.exists() and record.stat().st_size > 0
        child = fork_run(
            replace(settings, resume=run) if by_name else replace(settings, dir=run), directory / f"{finished}.log"
        )
        if kills < count:
            time.sleep(chance.uniform(0, whole_s / 4))
            os.kill(child, signal.SIGKILL)
        _, code = os.waitpid(child, 0)
        if os.WIFSIGNALED(code):
            kills += 1
            if not (record.exists() and b'"status":"finished"' in record.read_bytes()):
                continue
        else:
            assert code == 0, f"run {finished} ended with {code}"
        finished += 1
        if kills >= count:
            break
    print(finished)


if __name__ == "__main__":
    launch.write_report = lambda run, _: run.path / "report.html"  # type: ignore[assignment]
    mode, *rest = sys.argv[1:]
    if mode == "run":
        sys.exit(main(rest[1:], lambda settings: launch.run(settings, Machine(starter(rest[0])))))
    kill(int(rest[0]), int(rest[1]), Path(rest[2]), rest[3:])
