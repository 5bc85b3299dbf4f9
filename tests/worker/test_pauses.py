"""A pause inside timed values is seen, whatever made it, and the values are taken again."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen3bench.campaign.worker_process import WorkerProcess
from qwen3bench.config.settings import Settings
from qwen3bench.record.messages import Enter, Open, Prepare, Visit
from qwen3bench.worker import pauses
from qwen3bench.worker.pauses import unpaused, watch_pauses
from qwen3bench.worker.serve import Worker
from qwen3bench.worker.timed_pass import PreparedCell

Ask = Callable[..., Any]
STOP_S = 0.3


@pytest.fixture
def watched() -> Iterator[None]:
    """This process counts how often it is continued; what is no longer stopped can be continued too."""
    before = signal.getsignal(signal.SIGCONT)
    watch_pauses()
    yield
    signal.signal(signal.SIGCONT, before)


def continued(times: int) -> Callable[[], int]:
    """An action that is continued in the first so many times; it gives how often it was taken."""
    taken = 0

    def action() -> int:
        nonlocal taken
        taken += 1
        if taken <= times:
            os.kill(os.getpid(), signal.SIGCONT)
        return taken

    return action


@pytest.mark.parametrize(("times", "found"), [(0, (1, False)), (1, (2, False)), (2, (2, True))])
def test_what_a_stop_struck_is_taken_again_once(watched: None, times: int, found: tuple[int, bool]) -> None:
    assert unpaused(continued(times)) == found


def test_a_suspended_machine_is_seen_by_its_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    asleep_s = 0.0

    def clock(which: int) -> float:
        return 100.0 + (asleep_s if which == time.CLOCK_BOOTTIME else 0.0)

    def suspend() -> None:
        nonlocal asleep_s
        asleep_s += 30.0

    monkeypatch.setattr(pauses.time, "clock_gettime", clock)
    assert unpaused(suspend) == (None, True)
    assert unpaused(lambda: None) == (None, False)


def test_a_visit_with_a_pause_says_so_and_leaves_no_pace(opened: Ask, worker: Worker, watched: None) -> None:
    opened("enter", workload="prefill", runtime="eager", cell="baseline")
    opened("prepare", cell="baseline", copy=0)
    assert opened("visit", cell="baseline", copy=0, repeats=2).paused is None
    timed = worker.timed_pass
    assert timed is not None
    model = timed.ready["baseline", 0].model
    timed.ready["baseline", 0] = PreparedCell(model, [lambda: os.kill(os.getpid(), signal.SIGCONT)])
    assert opened("visit", cell="baseline", copy=0, repeats=2).paused is True
    timed.pace = None
    timed.launch_s.clear()  # or getting ready told it
    assert opened("visit", cell="baseline", copy=0, repeats=2).paused is True
    assert timed.pace is None  # found while it was stopped, it would hold for all cells


@pytest.mark.slow
def test_a_real_stop_of_a_real_worker(tmp_path: Path, settings: Settings) -> None:
    with WorkerProcess(tmp_path / "worker.log") as worker:
        worker.ask(Open(config=settings.to_dict()), 60)
        worker.ask(Enter(workload="prefill", runtime="eager", cell="baseline"), 60)
        worker.ask(Prepare(cell="baseline", copy=0), 60)
        quick = Visit(cell="baseline", copy=0, repeats=3)
        a_value_s = max(value.latency_s for value in worker.ask(quick, 60).samples)
        visit = Visit(cell="baseline", copy=0, repeats=int(2 / a_value_s))
        done = threading.Event()

        def stop(times: int) -> None:
            for _ in range(times):
                if done.wait(STOP_S):
                    break
                os.kill(worker.pid, signal.SIGSTOP)
                time.sleep(STOP_S)
                os.kill(worker.pid, signal.SIGCONT)

        for times, paused in ((0, None), (1, None), (100, True)):
            done.clear()
            stopper = threading.Thread(target=stop, args=(times,))
            stopper.start()
            answer = worker.ask(visit, 60)
            done.set()
            stopper.join()
            assert answer.paused is paused
            longest_s = max(value.latency_s for value in answer.samples)
            assert (longest_s > STOP_S / 2) == bool(paused)
