"""Whole runs on two pretended cards, of which what hosts one is lost at some moment, with fake workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import Any

import pytest

from qwen3bench.campaign.machine import UsedCard
from qwen3bench.campaign.scheduler import CardGoneError
from qwen3bench.campaign.worker_pool import Seat, WorkerPool, side_by_side
from qwen3bench.record.lines import BlockLine, CeilingLine, FailureLine, Telemetry
from qwen3bench.record.messages import Verify
from qwen3bench.record.states import CellStatus
from qwen3bench.record.writer import RecordWriter

FULL = (
    "design=full",
    "opt=flash,tie",
    "prompt_tokens=16",
    "measure.min_processes=4",
    "measure.min_blocks=6",
    "measure.max_blocks=6",
)
ON_CUDA = ("device=cuda", "runtime=graph")


class Host:
    """What hosts a card's workers: gone with all of them after `left` requests, or where one kind follows another."""

    def __init__(self, start: Callable[[Path], Any], left: float = inf, at: tuple[str, str] = ("", "")) -> None:
        self.start_worker = start
        self.left = left
        self.at = at
        self.asked: list[str] = [""]

    def start(self, log: Path) -> HostedFake:
        return HostedFake(self, self.start_worker(log))

    def count(self, op: str) -> None:
        self.left = -1 if (self.asked[-1], op) == self.at else self.left - 1
        self.asked.append(op)
        self.refuse_gone()

    def refuse_gone(self) -> None:
        if self.left < 0:
            raise CardGoneError(CellStatus.CRASHED, "the host is gone")


class HostedFake:
    """A fake worker on a host that may be gone."""

    def __init__(self, host: Host, worker: Any) -> None:
        self.host, self.worker, self.pid = host, worker, worker.pid

    def __enter__(self) -> HostedFake:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def ask(self, request: Any, timeout_s: float) -> Any:
        self.send(request)
        return self.receive(request, timeout_s)

    def send(self, request: Any) -> None:
        self.host.count(request.op)
        self.worker.send(request)

    def receive(self, request: Any, timeout_s: float) -> Any:
        answer = self.worker.receive(request, timeout_s)
        self.host.refuse_gone()
        return answer

    def fileno(self) -> int:
        return int(self.worker.fileno())

    def kill(self) -> None:
        self.end()

    def end(self) -> None:
        self.worker.end()


def hosted(hosts: list[Host], fake_card: Any) -> list[UsedCard]:
    return [UsedCard(host.start, fake_card(Telemetry()), f"GPU-{n}", socket=n) for n, host in enumerate(hosts)]


@pytest.mark.slow
@pytest.mark.parametrize(("lost", "where"), [(1, ()), (0, ON_CUDA)], ids=["alone", "side by side"])
def test_a_run_survives_the_loss_of_a_host_at_any_step(
    measure: Callable[..., Any],
    start_fake: Callable[..., Any],
    fake_card: Any,
    tmp_path: Path,
    where: tuple[str, ...],
    lost: int,
) -> None:
    sound = [Host(start_fake()) for _ in range(2)]
    measure(*FULL, *where, cards=hosted(sound, fake_card), to=tmp_path / "whole")
    asked = sound[lost].asked
    steps = dict.fromkeys(pair for pair in pairwise(asked) if pair[1] not in ("", "probe", "identify"))
    steps = {pair: None for pair in steps if pair != ("probe", "open")}  # the machine is identified by the first card
    assert len(steps) >= 8
    for number, at in enumerate(steps):
        hosts = [Host(start_fake()) for _ in range(2)]
        hosts[lost].at = at
        done = measure(*FULL, *where, cards=hosted(hosts, fake_card), to=tmp_path / str(number))
        assert done.status == 0, (at, done.err)
        assert set(done.run.cells["status"]) == {"ok"}
        assert not done.record.of(FailureLine)
        assert len(done.record.of(CeilingLine)) == 1, at
        closed = Counter((line.workload, line.runtime, line.block) for line in done.record.of(BlockLine))
        assert set(closed.values()) == {1}, at
        assert len(closed) >= 6


def test_the_shares_of_a_card_that_is_gone_are_left_to_be_asked_again(
    small_settings: Callable[..., Any], start_fake: Callable[..., Any], tmp_path: Path
) -> None:
    settings, gone, sound = small_settings(), Host(start_fake(), 0), Host(start_fake())
    shares = [[Verify(cell=cell)] for cell in ("baseline", "tie")]
    with RecordWriter(tmp_path) as writer, ExitStack() as ends:
        pools = [ends.enter_context(WorkerPool(settings, writer, Seat(host.start))) for host in (gone, sound)]
        assert [request.cell for request, _ in side_by_side(pools, shares)] == ["tie"]


@pytest.mark.slow
def test_where_the_last_host_is_lost_no_cell_is_to_blame_and_the_run_can_be_continued(
    measure: Callable[..., Any], start_fake: Callable[..., Any], fake_card: Any
) -> None:
    hosts = [Host(start_fake(), 30), Host(start_fake(), 45)]
    stopped = measure(*FULL, "measure.min_blocks=12", "measure.max_blocks=12", cards=hosted(hosts, fake_card))
    assert "no worker could be started: the host is gone" in stopped.error
    assert f"continue with resume={stopped.directory}" in stopped.error
    assert stopped.record.of(BlockLine)
    assert not stopped.record.of(FailureLine)
    done = measure(cards=hosted([Host(start_fake()) for _ in range(2)], fake_card), resume=stopped.directory)
    assert done.status == 0
    assert set(done.run.cells["status"]) == {"ok"}
