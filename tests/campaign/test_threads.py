"""On a CPU fewer threads measure where other work keeps cores busy; a run that goes on keeps their number."""

from __future__ import annotations

import os
from collections import namedtuple
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from qwen3bench.campaign import launch, passes, threads
from qwen3bench.campaign.forecast import seconds_ahead
from qwen3bench.campaign.neighbors import Neighbors
from qwen3bench.campaign.threads import (
    LOOK_S,
    FewerThreads,
    beside_others,
    fewer_threads,
    free_threads,
    threads_line,
    with_fewer,
)
from qwen3bench.config.cli import compose
from qwen3bench.config.settings import Settings
from qwen3bench.record.host import Host
from qwen3bench.record.lines import PromptLine

Measure = Callable[..., Any]


@pytest.mark.parametrize(
    ("usual", "cores", "busy_cores", "expected"),
    [
        (2, 2, 0.0, 2),
        (2, 2, 0.24, 2),  # services
        (2, 2, 0.5, 1),
        (2, 2, 1.9, 1),
        (2, 2, 40.0, 1),
        (8, 8, 0.2, 8),
        (8, 8, 1.1, 7),
        (8, 8, 1.5, 6),
        (4, 8, 3.0, 4),  # as many as the user's OMP_NUM_THREADS find a core
        (4, 8, 5.0, 3),
        (1, 2, 2.0, 1),
    ],
)
def test_each_thread_has_a_core_to_itself(usual: int, cores: int, busy_cores: float, expected: int) -> None:
    assert free_threads(usual, cores, busy_cores) == expected


class Others(Neighbors):
    """Others that keep `busy(seconds)` cores busy on average, once it has looked for so long."""

    def __init__(self, busy: Callable[[float], float], looked_s: float = 4.0) -> None:
        self.busy = busy
        self.seconds = looked_s
        self.slept = False

    @property
    def looked_s(self) -> float:
        return self.seconds

    def busy_cores(self) -> float:
        return self.busy(self.seconds)

    def shares(self) -> dict[str, float]:
        return {"firefox": 0.25}

    def sleep(self, seconds: float) -> None:
        self.slept = True
        self.seconds += seconds


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(cpus=(0, 1), cores=2, cpu_quota=None, memory_limit_bytes=None, governor=None, variables={})
    monkeypatch.setattr(Host, "here", classmethod(lambda cls: host))


@pytest.mark.parametrize(
    ("busy", "usual", "expected", "seconds"),
    [
        (lambda s: 0.03, 2, None, 4.0),  # an idle machine is not waited for
        (lambda s: 0.5, 2, 1, LOOK_S),
        (lambda s: 2.0 / s, 2, None, LOOK_S),  # something worked for two seconds in all
        (lambda s: 1.0 if s < 9.0 else 0.05, 2, None, 9.0),
        (lambda s: 2.0, 1, None, 4.0),  # as of a small model
        (lambda s: 0.03, 16, None, 4.0),  # OMP_NUM_THREADS, beyond the CPUs: nobody else is to blame
    ],
)
def test_it_looks_for_as_long_as_it_takes_to_know(
    monkeypatch: pytest.MonkeyPatch,
    two_cores: None,
    busy: Callable[[float], float],
    usual: int,
    expected: int | None,
    seconds: float,
) -> None:
    others = Others(busy)
    monkeypatch.setattr(threads, "time", others)
    found = fewer_threads(others, usual)
    assert (found and found.threads) == expected
    assert others.seconds == pytest.approx(seconds)


def test_half_of_the_cores_are_threads_of_the_other_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch uses one thread for each of the 4 cores; 8, where a user asks for them."""
    host = Host(cpus=tuple(range(8)), cores=4, cpu_quota=None, memory_limit_bytes=None, governor=None, variables={})
    monkeypatch.setattr(Host, "here", classmethod(lambda cls: host))
    for usual, expected in ((4, 3), (8, 7)):
        found = fewer_threads(Others(lambda _: 1.0, LOOK_S), usual)
        assert found is not None
        assert found.threads == expected


@pytest.mark.parametrize(
    ("quota", "busy", "expected", "reason"),
    [
        (1.0, 0.03, 1, 1.0),  # docker run --cpus=1
        (1.5, 0.03, 1, 1.5),
        (0.4, 0.03, 1, 0.4),
        (2.0, 0.03, None, None),
        (float("inf"), 0.03, None, None),
        (1.0, 1.0, 1, None),  # others are a reason to measure more blocks, too
    ],
)
def test_threads_are_no_more_than_a_quota_has_time_for(
    monkeypatch: pytest.MonkeyPatch, quota: float, busy: float, expected: int | None, reason: float | None
) -> None:
    host = Host(cpus=(0, 1), cores=2, cpu_quota=quota, memory_limit_bytes=None, governor=None, variables={})
    monkeypatch.setattr(Host, "here", classmethod(lambda cls: host))
    found = fewer_threads(Others(lambda _: busy, LOOK_S), 2)
    assert (found and found.threads, found and found.quota) == (expected, reason)
    if found:
        settings = compose(("model=tiny",))
        blocks = with_fewer(settings, found).measure.min_blocks
        assert blocks == settings.measure.min_blocks * (1 if reason else 2)
        assert with_fewer(settings, found).threads == expected


def test_a_quota_holds_beside_others_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others leave three of four cores, and the quota has time for one thread."""
    host = Host(cpus=(0, 1, 2, 3), cores=4, cpu_quota=1.5, memory_limit_bytes=None, governor=None, variables={})
    monkeypatch.setattr(Host, "here", classmethod(lambda cls: host))
    found = fewer_threads(Others(lambda _: 1.0, LOOK_S), 4)
    assert (found and found.threads, found and found.quota) == (1, None)


def test_the_line_says_why_and_what_it_costs() -> None:
    line = threads_line(FewerThreads(1, 2, {"firefox": 0.25}))
    assert line.startswith("this machine is busy (firefox 25% of its ")
    assert line.endswith(" cores), so it measures with 1 thread in place of 2. threads=2 takes all")
    quota = "a quota allows 1.5 CPUs' worth of time, so it measures with 1 thread in place of 2. threads=2 takes all"
    assert threads_line(FewerThreads(1, 2, {}, 1.5)) == quota
    assert "with 6 threads in place of 8. threads=8 takes" in threads_line(FewerThreads(6, 8, {"x": 0.2}))


@pytest.mark.parametrize(
    ("overrides", "blocks", "each"),
    [
        ([], 16, 4),
        (["measure.blocks_per_process=3"], 16, 3),
        (["measure.max_blocks=9"], 9, 4),
        (["measure.max_seconds=9"], 8, 2),
    ],
)
def test_it_takes_more_blocks_beside_others(overrides: list[str], blocks: int, each: int) -> None:
    settings = beside_others(compose(["device=cpu", *overrides]), 3)
    assert (settings.threads, settings.measure.min_blocks, settings.blocks_per_process) == (3, blocks, each)


def test_more_blocks_are_said_to_take_longer() -> None:
    settings = compose(["device=cpu", "design=full"]).resolved("cpu")
    choice = PromptLine(prompt_tokens=16, limit_s=0.4, forward_s={"16": 0.5})
    alone_s, beside_s = (seconds_ahead(each, 3.0, choice) for each in (settings, beside_others(settings, 1)))
    assert beside_s - alone_s == pytest.approx(8 * 33 * 0.5 * 1.4, rel=0.1)  # decoding too


class Process:
    """A process of psutil's, with its processor times."""

    def __init__(self, pid: int, name: str) -> None:
        self.pid = pid
        self.title = name
        self.times = SimpleNamespace(user=0.0, system=0.0, children_user=0.0, children_system=0.0)

    def oneshot(self) -> Any:
        return nullcontext()

    def cpu_times(self) -> SimpleNamespace:
        return self.times

    def create_time(self) -> float:
        return 0.0

    def name(self) -> str:
        return self.title


def test_only_what_others_take_of_our_own_cpus_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of CPUs 0 and 1, of four: neither our own time, that of a child that has ended too, nor the hypervisor's."""
    ours, other = Process(os.getpid(), "python"), Process(2**22 + 1, "firefox")
    cpus = [SimpleNamespace(idle=0.0, user=0.0, steal=0.0) for _ in range(4)]
    rows = lambda percpu: [Row(each.idle, each.user, each.steal) for each in cpus]  # noqa: E731
    clock = SimpleNamespace(monotonic=lambda: clock.now, now=0.0)
    place = "qwen3bench.campaign.neighbors"
    monkeypatch.setattr(f"{place}.time", clock)
    monkeypatch.setattr(f"{place}.usable_cpus", lambda: (0, 1))
    monkeypatch.setattr(f"{place}.psutil.process_iter", lambda: [ours, other])
    monkeypatch.setattr(f"{place}.psutil.cpu_times", rows)
    neighbors = Neighbors()
    clock.now = 10.0
    cpus[0] = SimpleNamespace(idle=4.0, user=6.0, steal=0.0)
    cpus[1] = SimpleNamespace(idle=5.0, user=3.0, steal=2.0)
    cpus[2] = cpus[3] = SimpleNamespace(idle=0.0, user=10.0, steal=0.0)
    ours.times = SimpleNamespace(user=4.0, system=1.0, children_user=0.5, children_system=0.5)
    other.times.user = 23.0
    assert neighbors.looked_s == 10.0
    assert neighbors.busy_cores() == pytest.approx(0.3)


def test_the_time_of_guests_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host of virtual machines counts theirs as `user` or `nice` as well (proc(5))."""
    times = namedtuple("times", "user nice system idle iowait guest guest_nice")
    clock = SimpleNamespace(monotonic=lambda: clock.now, now=0.0)
    rows = [times(0, 0, 0, 0, 0, 0, 0)]
    place = "qwen3bench.campaign.neighbors"
    monkeypatch.setattr(f"{place}.time", clock)
    monkeypatch.setattr(f"{place}.usable_cpus", lambda: (0,))
    monkeypatch.setattr(f"{place}.psutil.process_iter", lambda: [])
    monkeypatch.setattr(f"{place}.psutil.cpu_times", lambda percpu: rows)
    neighbors = Neighbors()
    clock.now, rows[0] = 10.0, times(user=2.0, nice=3.0, system=0, idle=4.0, iowait=1.0, guest=2.0, guest_nice=3.0)
    assert neighbors.busy_cores() == pytest.approx(0.5)


class Row(tuple[float, ...]):
    """A row of psutil's CPU times."""

    idle = property(lambda self: self[0])
    steal = property(lambda self: self[2])

    def __new__(cls, *values: float) -> Row:
        return super().__new__(cls, values)


ENVIRONMENT = {"device": "a fake device", "host": "here", "torch_threads": 2, "usable_cores": 2}
TWO_THREADS = {"does": "answer", "op": "identify", "fields": {"environment": ENVIRONMENT}}


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch, two_cores: None) -> Callable[[float], None]:
    """Makes a machine on which others keep so many cores busy."""

    def make(busy_cores: float) -> None:
        monkeypatch.setattr(Neighbors, "busy_cores", lambda self: busy_cores)
        monkeypatch.setattr(Neighbors, "shares", lambda self: {"firefox": busy_cores / 2})
        monkeypatch.setattr(Neighbors, "looked_s", LOOK_S)

    return make


def test_a_run_beside_others_measures_with_fewer_threads(measure: Measure, others: Callable[[float], None]) -> None:
    others(0.5)
    done = measure(faults=[TWO_THREADS])
    assert done.run.config["threads"] == 1
    assert done.err.count("this machine is busy") == 1
    assert "so it measures with 1 thread in place of 2" in done.err


@pytest.mark.parametrize(
    ("overrides", "busy_cores", "expected"),
    [
        ([], 0.2, "auto"),
        (["threads=2"], 0.5, 2),
        (["device=cuda", "runtime=eager"], 0.5, "auto"),
    ],
)
def test_else_it_measures_with_all(
    measure: Measure, others: Callable[[float], None], overrides: list[str], busy_cores: float, expected: object
) -> None:
    others(busy_cores)
    done = measure(*overrides, faults=[TWO_THREADS])
    assert done.status == 0, done.err
    assert done.run.config.get("threads", "auto") == expected
    assert "so it measures with" not in done.err
    assert done.err.count("this machine is busy") == 1


@pytest.mark.parametrize(("then", "now", "threads"), [(0.5, 0.0, 1), (0.0, 0.5, "auto")])
@pytest.mark.parametrize("by_name", [True, False])
def test_a_run_that_goes_on_keeps_its_threads(
    measure: Measure,
    monkeypatch: pytest.MonkeyPatch,
    others: Callable[[float], None],
    then: float,
    now: float,
    threads: object,
    by_name: bool,
    small_settings: Callable[..., Settings],
) -> None:
    """By the same command as by its directory alone, where the machine has become idle or busy."""
    others(then)
    with monkeypatch.context() as patched:
        patched.setattr(passes.Campaign, "run", lambda _: (_ for _ in ()).throw(launch.Interrupted(2)))
        begun = measure(faults=[TWO_THREADS])
    assert begun.status == 130
    others(now)
    done = measure(faults=[TWO_THREADS], **({"resume": begun.directory} if by_name else {}))
    assert done.status == 0, done.err
    assert done.run.config.get("threads", "auto") == threads
    assert (done.run.config["measure"]["blocks_per_process"], done.run.config["measure"]["min_blocks"]) == (2, 3)
    assert launch.finished_status(replace(small_settings(), dir=done.directory)) == 0


@pytest.mark.slow
def test_threads_that_its_command_named_stay_too(
    measure: Measure, others: Callable[[float], None], small_settings: Callable[..., Settings]
) -> None:
    """They bring no more blocks, so neither does the command without them."""
    others(0.0)
    done = measure("threads=1", "measure.max_blocks=9", faults=[TWO_THREADS])
    assert done.run.config["measure"]["min_blocks"] == 3
    assert launch.finished_status(replace(small_settings("measure.max_blocks=9"), dir=done.directory)) == 0


def test_more_blocks_are_measured_and_go_on(
    measure: Measure, others: Callable[[float], None], small_settings: Callable[..., Settings]
) -> None:
    others(0.5)
    done = measure("measure.max_blocks=9", faults=[TWO_THREADS])
    assert done.run.config["measure"]["min_blocks"] == 6
    others(0.0)
    assert launch.finished_status(replace(small_settings("measure.max_blocks=9"), dir=done.directory)) == 0
