"""Whole runs on two pretended cards, of which what hosts one is lost at some moment, with fake workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen3bench.campaign.launch import UsedCard
from qwen3bench.campaign.scheduler import CardGoneError
from qwen3bench.record.lines import BlockLine, FailureLine, Telemetry
from qwen3bench.record.states import CellStatus

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
    """What hosts a card's workers: it is gone after `left` more requests, and every worker with it."""

    def __init__(self, start: Callable[[Path], Any], left: float = float("inf")) -> None:
        self.start_worker = start
        self.left = left

    def start(self, log: Path) -> HostedFake:
        return HostedFake(self, self.start_worker(log))

    def count(self) -> None:
        self.left -= 1
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
        self.host.count()
        self.worker.send(request)

    def receive(self, request: Any, timeout_s: float) -> Any:
        answer = self.worker.receive(request, timeout_s)
        self.host.refuse_gone()
        return answer

    def fileno(self) -> int:
        return int(self.worker.fileno())

    def end(self) -> None:
        self.worker.end()


def hosted(hosts: list[Host], fake_card: Any) -> list[UsedCard]:
    return [UsedCard(host.start, fake_card(Telemetry()), f"GPU-{n}", socket=n) for n, host in enumerate(hosts)]


def asked_of(host: Host) -> int:
    return int(10**9 - host.left)


@pytest.mark.slow
@pytest.mark.parametrize(("lost", "where"), [(1, ()), (0, ON_CUDA)], ids=["alone", "side by side"])
def test_a_run_survives_the_loss_of_a_host_at_any_moment(
    measure: Callable[..., Any],
    start_fake: Callable[..., Any],
    fake_card: Any,
    tmp_path: Path,
    where: tuple[str, ...],
    lost: int,
) -> None:
    whole = [Host(start_fake(), 10**9) for _ in range(2)]
    measure(*FULL, *where, cards=hosted(whole, fake_card), to=tmp_path / "whole")
    asked = asked_of(whole[lost])
    assert asked > 20
    for moment in range(3, asked, max(1, asked // 7)):  # three identify the machine
        hosts = [Host(start_fake()) for _ in range(2)]
        hosts[lost].left = moment
        done = measure(*FULL, *where, cards=hosted(hosts, fake_card), to=tmp_path / str(moment))
        assert done.status == 0, (moment, done.err)
        assert set(done.run.cells["status"]) == {"ok"}
        assert not done.record.of(FailureLine)
        closed = Counter((line.workload, line.runtime, line.block) for line in done.record.of(BlockLine))
        assert set(closed.values()) == {1}, moment
        assert len(closed) >= 6


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
