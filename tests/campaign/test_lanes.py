"""The cards of a run: what is lost in a part of it is lost to all of it."""

from __future__ import annotations

from typing import Any

from qwen3bench.campaign.context import RunContext
from qwen3bench.campaign.lanes import Lane, Lanes


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
