"""What other work takes from a timed value is seen, and nothing is where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen3bench.worker.disturbance import CoreTimes, Waits, Watch
from qwen3bench.worker.serve import Worker

Ask = Callable[..., Any]
SPIN = "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\nprint(flush=True)\nwhile True: pass"


@pytest.fixture
def one_core() -> Iterator[int]:
    """This process on one of its cores."""
    before = os.sched_getaffinity(0)
    core = min(before)
    os.sched_setaffinity(0, {core})
    yield core
    os.sched_setaffinity(0, before)


def work(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="counts of Linux")
def test_a_process_on_our_core_makes_us_wait(one_core: int) -> None:
    watch = Watch()
    watch.find_threads()
    with subprocess.Popen([sys.executable, "-S", "-c", SPIN, str(one_core)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        before, cores, started = watch.waits(), watch.core_times(), time.perf_counter()
        work(0.2)
        wall_s = time.perf_counter() - started
        waits, taken = watch.waits().since(before), watch.core_times().since(cores)
        other.kill()
    assert waits.waited_s is not None
    assert 0.05 < waits.waited_s < wall_s
    assert waits.disturb(wall_s)
    assert taken.others_s is not None
    assert taken.others_s > 0.05
    assert taken.disturb(wall_s, cpus=1)


@pytest.mark.parametrize(
    ("waited_s", "switches", "disturbed"),
    [(0.0, 0, False), (0.0049, 9, False), (0.0051, 0, True), (None, 0, False), (None, 4, False), (None, 6, True)],
)
def test_waiting_counts_by_its_share_of_a_value(waited_s: float | None, switches: int, disturbed: bool) -> None:
    assert Waits(waited_s, switches).disturb(0.1) is disturbed


@pytest.mark.parametrize(
    ("taken", "disturbed"),
    [
        (CoreTimes(), False),
        (CoreTimes(0.02, 0.0), False),  # two ticks, which may be rounding
        (CoreTimes(0.04, 0.0), True),
        (CoreTimes(0.0, 0.04), True),
        (CoreTimes(None, 0.02), False),
    ],
)
def test_time_of_others_counts_beyond_the_rounding_of_its_clock(taken: CoreTimes, disturbed: bool) -> None:
    assert taken.disturb(0.05, cpus=2) is disturbed


def test_others_may_have_the_cores_that_are_left_to_them() -> None:
    """Of two, one: a process there slows nothing. Two that share both do."""
    assert CoreTimes(1.0, 0.0).disturb(1.0, cpus=2)
    assert not CoreTimes(1.0, 0.0).disturb(1.0, cpus=2, left=1)
    assert CoreTimes(1.6, 0.0).disturb(1.0, cpus=2, left=1)
    assert CoreTimes(0.0, 0.06).disturb(1.0, cpus=2, left=1)  # a hypervisor takes any core


def test_what_the_system_does_not_count_is_unknown(tmp_path: Path) -> None:
    watch = Watch(tmp_path / "no-tasks", tmp_path / "no-stat")
    watch.find_threads()
    assert watch.waits().waited_s is None
    assert watch.core_times() == CoreTimes()
    (tmp_path / "stat").write_text("cpu 1 2 3\ncpu0 garbage\n")
    assert Watch(tmp_path, tmp_path / "stat").core_times() == CoreTimes()


def test_threads_come_and_go(tmp_path: Path) -> None:
    for name, waited_ns in (("1", 5_000_000), ("2", 7_000_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "schedstat").write_text(f"99 {waited_ns} 3\n")
    watch = Watch(tmp_path)
    watch.find_threads()
    assert watch.waits().waited_s == pytest.approx(0.012)
    (tmp_path / "2" / "schedstat").unlink()
    (tmp_path / "2").rmdir()
    watch.find_threads()
    assert watch.waits().waited_s == pytest.approx(0.005)


class Scripted(Watch):
    """Tells of so many seconds that values waited, in turn; the last stays."""

    def __init__(self, *waited_s: float) -> None:
        super().__init__()
        self.left = list(waited_s)
        self.total_s = 0.0
        self.looks = 0

    def find_threads(self) -> None:
        self.looks = 0

    def waits(self) -> Waits:
        if self.looks:  # the first look of a take opens it
            self.total_s += self.left.pop(0) if len(self.left) > 1 else self.left[0]
        self.looks += 1
        return Waits(self.total_s, 0)

    def core_times(self) -> CoreTimes:
        return CoreTimes(0.0, 0.0)


@pytest.mark.parametrize(
    ("waited_s", "takes", "disturbed"),
    [
        ((0.0,), 3, [None] * 3),
        ((0.0, 9.0, 0.0), 3, [None, True, None, None]),  # what was disturbed is taken again, and stays
        ((9.0,), 3, [True] * 9),  # not for ever
        ((9.0,), 1, [True] * 3),
        ((9.0, 9.0, 9.0, 0.0), 2, [True] * 3 + [None] * 3),
    ],
)
def test_a_disturbed_visit_is_taken_again_at_once(
    opened: Ask, worker: Worker, waited_s: tuple[float, ...], takes: int, disturbed: list[bool | None]
) -> None:
    opened("enter", workload="prefill", runtime="eager", cell="baseline")
    opened("prepare", cell="baseline", copy=0)
    worker.timing.watch = Scripted(*waited_s)
    visit = opened("visit", cell="baseline", copy=0, repeats=3, inner=1, takes=takes)
    assert [sample.disturbed for sample in visit.samples] == disturbed
    assert all(sample.latency_s > 0 and sample.waited_s is not None for sample in visit.samples)
    assert visit.takes == -(-len(disturbed) // 3)
    assert (visit.repeats, visit.inner) == (3, 1)


def test_others_on_our_cores_disturb_all_values_of_a_take(opened: Ask, worker: Worker) -> None:
    opened("enter", workload="prefill", runtime="eager", cell="baseline")
    opened("prepare", cell="baseline", copy=0)

    class Crowded(Scripted):
        taken = 0.0

        def core_times(self) -> CoreTimes:
            self.taken += 1.0
            return CoreTimes(self.taken, None)

    worker.timing.watch = Crowded(0.0)
    visit = opened("visit", cell="baseline", copy=0, repeats=2, inner=1, takes=1)
    assert [sample.disturbed for sample in visit.samples] == [True, True]
    worker.session.cores_left = 2**20  # they may have theirs
    assert [sample.disturbed for sample in opened("visit", cell="baseline", copy=0, repeats=1).samples] == [None]
    assert visit.others_s == pytest.approx(1.0)
    assert visit.steal_s is None
