"""When a workload and runtime is known well enough, and how many more processes it takes."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest

from qwen3bench.campaign.replication import Replication
from qwen3bench.campaign.state import Timing
from qwen3bench.config.cli import compose
from qwen3bench.config.settings import Settings
from qwen3bench.record.lines import SampleLine
from qwen3bench.record.states import StopReason

LIMITS = ("target=0.01", "min_blocks=6", "min_processes=3", "max_blocks=21", "blocks_per_process=2")


def measured(blocks: int = 0, processes: int = 0, *limits: str, width: float = math.inf, **timing: Any) -> Replication:
    """So many blocks in so many processes, on a CPU; the effect known least, to `width` beside one to half of it."""
    known = {"widths": {"flash": width / 2, "tie": width}, "judged_until": math.inf}
    so_far = Timing(blocks=blocks, processes={*range(processes)}, **(known | timing))
    return Replication(settings_with(limits), ("prefill", "eager"), so_far)


@cache
def settings_with(limits: tuple[str, ...]) -> Settings:
    return compose(["+opt=flash,tie", *(f"measure.{each}" for each in (*LIMITS, *limits))]).resolved("cpu")


@pytest.mark.parametrize(
    ("blocks", "processes", "width", "needed"),
    [
        (0, 0, math.inf, 3),  # the least
        (0, 3, math.inf, 1),  # all of their blocks were disturbed
        (2, 1, math.inf, 2),
        (4, 4, math.inf, 2),  # two blocks are left, and a process had one
        (1, 3, math.inf, 3),  # fifteen would lack, but three tell too little
        (6, 2, 0.001, 1),  # enough blocks, of too few processes
        (6, 3, math.inf, 3),
        (6, 3, 0.02, 3),  # nine would do
        (6, 5, 0.011, 2),
        (6, 3, 0.01, 1),  # one at least
    ],
)
def test_as_many_processes_come_next_as_lack_and_at_most_as_many_again(
    blocks: int, processes: int, width: float, needed: int
) -> None:
    assert measured(blocks, processes, width=width).processes_needed == needed


@pytest.mark.parametrize(
    ("blocks", "processes", "width", "measured_s", "reason"),
    [
        (6, 3, 0.01, 1.0, "target"),
        (6, 3, 0.0101, 1.0, None),
        (5, 3, 0.001, 1.0, None),
        (6, 2, 0.001, 1.0, None),
        (6, 3, 0.01, 30.0, "target"),
        (6, 3, math.inf, 30.0, "max_seconds"),
        (5, 3, math.inf, 30.0, None),  # however long the least takes
        (6, 2, math.inf, 30.0, None),
        (21, 2, 0.001, 1.0, "max_blocks"),
        (0, 0, math.inf, 30.0, None),
    ],
)
def test_measuring_ends_at_the_target_or_at_a_limit(
    blocks: int, processes: int, width: float, measured_s: float, reason: str | None
) -> None:
    assert measured(blocks, processes, width=width, measured_s=measured_s).reason_to_stop() == reason


def test_a_time_that_somebody_asked_for_ends_measuring_before_its_least() -> None:
    asked = measured(1, 1, "max_seconds=7", measured_s=7.0)
    assert asked.reason_to_stop() == "max_seconds"
    assert measured(1, 1, "max_seconds=7", measured_s=6.9).reason_to_stop() is None
    assert measured(0, 0, "max_seconds=7", measured_s=7.0).reason_to_stop() is None  # all of it was disturbed


def test_where_no_effect_can_be_told_the_target_is_not_reached() -> None:
    assert measured(6, 3, widths={}).reason_to_stop() is None
    assert measured(6, 3, widths={}, measured_s=30.0).reason_to_stop() == "max_seconds"


@pytest.mark.parametrize(
    ("limits", "blocks", "measured_s", "done"),
    [
        ((), 2, 5.0, True),
        ((), 1, 5.0, False),
        ((), 2, 4.9, False),  # it took longer to be ready
        ((), 7, 0.1, True),  # a third of all blocks
        ((), 1, 10.0, False),  # its share of the time, which nobody asked for
        (("max_seconds=12",), 1, 4.0, True),
        (("max_seconds=12",), 1, 3.9, False),
        (("max_seconds=12",), 2, 4.0, True),
    ],
)
def test_a_process_measures_as_long_as_it_took_to_be_ready_and_no_more_than_its_share(
    limits: tuple[str, ...], blocks: int, measured_s: float, done: bool
) -> None:
    assert measured(0, 0, *limits).is_process_done(blocks, measured_s, setup_s=5.0) is done


def test_a_process_that_took_longer_than_its_share_to_be_ready_measures_for_its_share() -> None:
    assert measured().is_process_done(2, 10.0, setup_s=15.0)
    assert not measured().is_process_done(2, 9.9, setup_s=15.0)


def test_what_the_target_takes_is_known_once_the_least_is_measured() -> None:
    assert measured(5, 3, width=0.02).shortfall() is None
    assert measured(6, 2, width=0.02).shortfall() is None
    lack = measured(6, 3, width=0.02, measured_s=12.0, setup_s=5.0).shortfall()
    assert lack is not None
    assert (lack.term, lack.over, lack.target, lack.more) == ("tie", 2.0, 0.01, 9)
    assert (lack.measured_s, lack.setup_s, lack.spent_s, lack.left_s) == (4.0, 5.0, 12.0, 18.0)


@pytest.mark.parametrize(
    ("blocks", "processes", "limits", "measured_s", "left_s"),
    [
        (0, 0, (), 0.0, 3 * 5 + 15),
        (3, 1, (), 6.0, 2 * 5 + (6 + 24) / 2),
        (3, 1, (), 60.0, 2 * 5 + 60),  # the least, though the time is up
        (3, 1, ("max_seconds=10",), 9.0, 2 * 5 + 1),
        (9, 5, (), 40.0, 0),
    ],
)
def test_what_is_left_lies_halfway_between_the_least_and_the_most(
    blocks: int, processes: int, limits: tuple[str, ...], measured_s: float, left_s: float
) -> None:
    assert measured(blocks, processes, *limits, measured_s=measured_s).left_s(setup_s=5.0) == pytest.approx(left_s)


def test_what_a_process_took_to_be_ready_the_next_ones_take() -> None:
    assert measured(6, 1, measured_s=30.0, setup_s=2.0).left_s(setup_s=5.0) == pytest.approx(2 * 2)


def test_what_ends_is_stopped_and_an_effect_that_is_not_known_has_no_half_width() -> None:
    where = {"workload": "prefill", "runtime": "eager", "copy": 0, "attempt": 0, "repeat": 0, "time": 0.0}
    samples = [
        SampleLine(cell=cell, block=block, process=block, position=place, latency_s=1.0 + 0.1 * place, **where)
        for block in range(2)
        for place, cell in enumerate(("baseline", "flash", "tie", "flash+tie"))
    ]
    ended = measured(2, 2, samples=samples, measured_s=3.0, more_s=1.0)
    line = ended.stop(StopReason.MAX_SECONDS)
    assert ended.timing.stopped
    assert (line.workload, line.runtime, line.reason) == ("prefill", "eager", "max_seconds")
    assert (line.blocks, line.processes, line.measured_s, line.more_s) == (2, 2, 3.0, 1.0)
    assert line.half_width == {"flash": None, "tie": None}
