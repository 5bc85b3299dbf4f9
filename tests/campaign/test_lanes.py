"""The cards of a run, what is lost in a part of it is lost to all of it; and the workers that wait on a card."""

from __future__ import annotations

from typing import Any

from qwen3bench.campaign.context import RunContext
from qwen3bench.campaign.lanes import Lane, Lanes
from qwen3bench.campaign.worker_pool import WorkerPool
from qwen3bench.config.cli import compose
from qwen3bench.record.messages import CellFailure, Request
from qwen3bench.record.states import CellStatus


class Workers:
    """A card's workers, which can be ended."""

    ended = 0

    def end_all(self) -> None:
        self.ended += 1


class Progress:
    """What is said."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_a_card_that_is_lost_in_a_round_is_not_tried_in_the_next() -> None:
    nothing: Any = None
    progress: Any = Progress()
    lanes = Lanes(())
    workers: list[Any] = [Workers(), Workers(), Workers()]
    for number, each in enumerate(workers):
        context = RunContext(nothing, nothing, progress, nothing, each, cards=lanes.__len__)
        lanes.add(Lane(context, nothing, f"card {number}"))
    first = lanes.over(lanes.first.context)
    first.leave_out([*first][1], "it is gone")
    assert [lane.name for lane in lanes.over(lanes.first.context)] == ["card 0", "card 2"]
    assert [lane.name for lane in lanes] == [lane.name for lane in first] == ["card 0", "card 2"]
    assert [lane.context.cards() for lane in (lanes.first, first.first)] == [2, 2]
    assert [each.ended for each in workers] == [0, 1, 0]
    assert progress.notes == ["card 1 is left out: it is gone"]


class Waiting:
    """A worker that was started ahead; `asked` notes for all of them what is sent and what is answered."""

    def __init__(self, name: str, asked: list[str]) -> None:
        self.name, self.asked = name, asked

    def send(self, request: Request[Any]) -> None:
        self.asked.append(f"{request.op} to {self.name}")

    def receive(self, request: Request[Any], timeout_s: float) -> None:
        self.asked.append(f"{self.name} answers {request.op}")
        if self.name == "b":
            raise CellFailure(CellStatus.CRASHED, "it is dead")

    def ask(self, request: Request[Any], timeout_s: float) -> None:
        self.send(request)
        self.receive(request, timeout_s)

    def end(self) -> None:
        self.asked.append(f"{self.name} ends")


def test_workers_that_wait_take_the_settings_side_by_side() -> None:
    """To import another implementation takes each of them seconds. One that is dead is let go."""
    nothing: Any = None
    asked: list[str] = []
    waiting: list[Any] = [Waiting(name, asked) for name in "abc"]
    workers = WorkerPool(compose(["model=tiny"]).resolved("cpu"), nothing, nothing)
    workers.ahead = [*waiting]
    workers.await_ahead()
    assert asked[:3] == ["open to a", "open to b", "open to c"]
    assert asked[3:] == [
        *("a answers open", "touch to a", "a answers touch", "b answers open", "b ends"),
        *("c answers open", "touch to c", "c answers touch"),
    ]
    assert workers.ahead == [waiting[0], waiting[2]]
