"""The clock, held against one whose every reading is known."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import pytest
import torch

from qwen3bench.record.messages import Pace
from qwen3bench.worker.clock import MIN_VALUE_S, TimedValue, inner_repeats, least_s, time_device, time_host


class FakeClock:
    """Time that passes only while something works."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now_s

    def work(self, seconds: float, name: str = "work") -> Callable[[], None]:
        def launch() -> None:
            self.log.append(name)
            self.now_s += seconds

        return launch


def pace(repeats: int, inner: int = 1) -> Pace:
    return Pace(inner=inner, repeats=repeats)


def test_a_value_is_the_time_of_its_launch() -> None:
    clock = FakeClock()
    values = list(time_host([clock.work(0.25)], pace(3), clock=clock))
    assert [value.latency_s for value in values] == pytest.approx([0.25] * 3)
    assert all(value.steps_s == () for value in values)
    assert len(clock.log) == 1 + 3  # one untimed


def test_long_work_is_timed_at_once() -> None:
    clock = FakeClock()
    values = list(time_host([clock.work(0.25)], Pace(inner=1, repeats=2, untimed=False), clock=clock))
    assert [value.latency_s for value in values] == pytest.approx([0.25] * 2)
    assert len(clock.log) == 2


def test_short_work_is_repeated_inside_a_value_and_divided() -> None:
    clock = FakeClock()
    (value,) = time_host([clock.work(1e-5)], pace(1, 100), clock=clock)
    assert value.latency_s == pytest.approx(1e-5)
    assert len(clock.log) == 1 + 100


def test_waiting_for_the_device_counts_and_the_wait_before_does_not() -> None:
    clock = FakeClock()
    (value,) = time_host([clock.work(0.1)], pace(1, 2), synchronize=clock.work(0.5, "wait"), clock=clock)
    assert clock.log == ["work", "wait", "work", "work", "wait"]
    assert value.latency_s == pytest.approx((0.1 + 0.1 + 0.5) / 2)


def test_each_of_several_steps_has_its_own_time_and_they_sum_up() -> None:
    clock = FakeClock()
    steps = [clock.work(seconds) for seconds in (0.4, 0.1, 0.2)]
    first, second = time_host(steps, pace(2), synchronize=clock.work(0.01, "wait"), clock=clock)
    assert first.steps_s == pytest.approx((0.41, 0.11, 0.21))
    assert first.latency_s == pytest.approx(0.73)
    assert second.steps_s == pytest.approx(first.steps_s)


@pytest.mark.parametrize("estimate_s", [1e-12, 1e-7, 3e-4, 9.9e-4, 1e-3, 5.0])
def test_a_value_is_a_thousand_times_the_resolution(estimate_s: float) -> None:
    inner = inner_repeats(estimate_s)
    assert inner * max(estimate_s, 1e-9) >= MIN_VALUE_S * (1 - 1e-9)
    assert inner == 1 or (inner - 1) * max(estimate_s, 1e-9) < MIN_VALUE_S
    assert time.get_clock_info("perf_counter").resolution <= MIN_VALUE_S / 1000


@pytest.mark.parametrize(
    ("values", "least", "taken"),
    [
        ((0.40, 0.41, 9.0), 0.40, 2),
        ((2.8, 0.40, 0.41, 9.0), 0.40, 3),  # the first was disturbed
        ((0.9, 1.4, 0.40, 0.55, 0.42), 0.40, 5),
        ((6.0, 0.40), 6.0, 1),  # too slow to be timed twice
        ((2.8, 1.9, 0.40, 0.41), 0.40, 3),
        ((0.9, 0.5), 0.5, 2),  # there are no more
    ],
)
def test_the_quickest_counts_and_no_more_are_timed_than_tell_it(
    values: tuple[float, ...], least: float, taken: int
) -> None:
    left = (TimedValue(value) for value in values)
    assert least_s(left) == least
    assert len([*left]) == len(values) - taken


def test_the_clock_is_monotonic_whatever_the_wall_clock_does(monkeypatch: pytest.MonkeyPatch) -> None:
    assert time.get_clock_info("perf_counter").monotonic
    jumps = iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: 1e9 - 1e6 * next(jumps))
    values = time_host([lambda: time.time()], pace(5))
    assert all(0 <= value.latency_s < 1 for value in values)


class FakeStream:
    """A device that works off what the host gives it: launching takes the host time, the work the device."""

    def __init__(self) -> None:
        self.host_s = self.device_s = 0.0

    def work(self, launch_s: float, work_s: float) -> Callable[[], None]:
        def launch() -> None:
            self.host_s += launch_s
            self.device_s = max(self.device_s, self.host_s) + work_s

        return launch

    def event(self, **_: object) -> FakeEvent:
        return FakeEvent(self)


class FakeEvent:
    """Its time is when the stream gets to it: at once where nothing is left to do."""

    def __init__(self, stream: FakeStream) -> None:
        self.stream, self.at_s = stream, 0.0

    def record(self) -> None:
        self.at_s = max(self.stream.device_s, self.stream.host_s)

    def elapsed_time(self, later: FakeEvent) -> float:
        return 1e3 * (later.at_s - self.at_s)


@pytest.mark.parametrize("steps", [1, 3])
def test_no_value_holds_the_hosts_launch(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    stream = FakeStream()
    monkeypatch.setattr(torch.cuda, "Event", stream.event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    launches = [stream.work(5e-5, 1e-3)] * steps
    for _ in range(2):
        stream.host_s = stream.device_s + 1.0  # the device is idle
        values = time_device(launches, repeats=3)
        assert [value.latency_s for value in values] == pytest.approx([steps * 1e-3] * 3)


@pytest.mark.cuda
def test_the_first_value_is_as_fast_as_the_others() -> None:
    a = torch.randn(2048, 2048, device="cuda")
    graph = torch.cuda.CUDAGraph()
    _products(a, 1)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        _products(a, 4)
    first, second = [], []
    for _ in range(200):  # whoever else uses the card makes values later, never sooner
        torch.cuda.synchronize()
        values = time_device([graph.replay], repeats=3)
        first.append(values[0].latency_s)
        second.append(values[1].latency_s)
    assert min(first) == pytest.approx(min(second), rel=2e-3)


def _products(a: torch.Tensor, count: int) -> None:
    for _ in range(count):
        a @ a


@pytest.mark.cuda
def test_device_time_is_that_of_the_work() -> None:
    a = torch.randn(4096, 4096, device="cuda")
    ratios = []
    for _ in range(9):  # other tests may use the card at the same time
        once, twice = (
            min(value.latency_s for value in time_device([partial(_products, a, n)], repeats=10)) for n in (4, 8)
        )
        ratios.append(twice / once)
    assert statistics.median(ratios) == pytest.approx(2, rel=0.1)
    (steps,) = time_device([lambda: a @ a, lambda: a @ a], repeats=1)
    assert len(steps.steps_s) == 2
    assert sum(steps.steps_s) == pytest.approx(steps.latency_s, rel=0.01)
