"""The scheduler by itself, with lines that answer in a time of their own: no process, and no waiting."""

from __future__ import annotations

import heapq
import selectors
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from qwen3bench.campaign.scheduler import CardLostError, Orders, Scheduler, Steps, Waiting
from qwen3bench.record.messages import CellFailure, CountParameters, Request
from qwen3bench.record.states import CellStatus


class Clock(selectors.BaseSelector):
    """Time that passes where it is waited for: the answer that is due first comes first."""

    def __init__(self) -> None:
        self.now = 0.0
        self.due: list[tuple[float, int, Card]] = []
        self.waiting: dict[Any, selectors.SelectorKey] = {}

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        key = selectors.SelectorKey(fileobj, 0, events, data)
        assert fileobj not in self.waiting, "asked twice"
        self.waiting[fileobj] = key
        heapq.heappush(self.due, (fileobj.answers_at, id(fileobj), fileobj))
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self.waiting.pop(fileobj)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        end = self.now + (timeout or 0.0)
        while self.due and self.due[0][0] <= end:
            at, _, line = heapq.heappop(self.due)
            if line in self.waiting and line.answers_at == at:
                self.now = at
                return [(self.waiting[line], selectors.EVENT_READ)]
        self.now = end
        return []

    def get_map(self) -> Any:
        return self.waiting

    def close(self) -> None:
        """There is nothing to close."""


@dataclass(eq=False)
class Card:
    """A card whose answers take `takes()` seconds; from `breaks_at` on it gives none but failures."""

    clock: Clock
    takes: Callable[[], float]
    breaks_at: float = np.inf
    answers_at: float = 0.0
    busy_s: float = 0.0
    asked: int = 0
    hangs: bool = False
    log: list[str] = field(default_factory=list)

    @property
    def broken(self) -> bool:
        return self.clock.now >= self.breaks_at

    def send(self, request: Request[Any]) -> None:
        if self.broken and not self.hangs:
            raise CellFailure(CellStatus.CRASHED, "dead")
        took_s = self.takes()
        self.asked += 1
        self.busy_s += took_s
        self.answers_at = np.inf if self.hangs and self.broken else self.clock.now + took_s

    def receive(self, request: Request[Any], timeout_s: float) -> Any:
        if self.broken:
            raise CellFailure(CellStatus.TIMEOUT if self.hangs else CellStatus.CRASHED, "no answer")
        return self.asked

    def fileno(self) -> int:
        return 0


@pytest.fixture
def clock() -> Clock:
    return Clock()


def scheduler(clock: Clock, work: Callable[[Card, Any], Steps[None]], lost: list[Card]) -> Scheduler[Card, Any]:
    orders = Orders(work, lambda card, why: lost.append(card), timeout_s=50.0)
    return Scheduler(orders, Waiting(lambda: clock, lambda: clock.now))


def steps_of(count: int, done: list[Any]) -> Callable[[Card, Any], Steps[None]]:
    """A job of so many requests, noted when the last is answered; a failure of a broken card is the card's."""

    def work(card: Card, job: Any) -> Steps[None]:
        for _ in range(count):
            try:
                yield CountParameters(cell=str(job))
            except CellFailure as failure:
                raise CardLostError(failure.reason) from failure
        card.log.append(str(job))
        done.append(job)

    return work


def test_a_free_card_takes_the_next_job(clock: Clock) -> None:
    slow, fast, done, lost = Card(clock, lambda: 4.5), Card(clock, lambda: 1.0), [], []
    assert scheduler(clock, steps_of(2, done), lost).run([slow, fast], range(5)) == []
    assert done == [1, 2, 3, 4, 0]
    assert (len(slow.log), len(fast.log), lost) == (1, 4, [])
    assert clock.now == 9.0


@pytest.mark.parametrize("hangs", [False, True], ids=["dies", "hangs"])
def test_what_a_lost_card_had_begun_is_done_by_another_that_was_idle_already(clock: Clock, hangs: bool) -> None:
    breaking, other = Card(clock, lambda: 3.0, breaks_at=4.0, hangs=hangs), Card(clock, lambda: 1.0)
    done: list[Any] = []
    lost: list[Card] = []
    assert scheduler(clock, steps_of(2, done), lost).run([breaking, other], "ab") == []
    assert (done, lost, breaking.log) == (["b", "a"], [breaking], [])


def test_jobs_of_a_card_alone_wait_for_no_other_and_are_told_of_where_it_is_lost(clock: Clock) -> None:
    breaking, other = Card(clock, lambda: 1.0, breaks_at=1.5), Card(clock, lambda: 1.0)
    done: list[Any] = []
    left = scheduler(clock, steps_of(1, done), []).run([breaking, other], "s", {breaking: "abc", other: "d"})
    assert sorted(done) == ["a", "d", "s"]
    assert left == ["b", "c"]


def test_where_no_card_is_left_the_jobs_are_given_back(clock: Clock) -> None:
    cards = [Card(clock, lambda: 1.0, breaks_at=0.5) for _ in range(2)]
    done: list[Any] = []
    lost: list[Card] = []
    assert sorted(scheduler(clock, steps_of(1, done), lost).run(cards, "abc")) == ["a", "b", "c"]
    assert (done, set(lost)) == ([], set(cards))


def test_a_failure_that_a_job_can_bear_is_its_own_affair(clock: Clock) -> None:
    card, seen = Card(clock, lambda: 1.0, breaks_at=0.5), []

    def work(card: Card, job: str) -> Iterator[Any]:
        try:
            yield CountParameters(cell=job)
        except CellFailure as failure:
            seen.append((job, failure.reason))

    assert scheduler(clock, work, []).run([card], "ab") == []  # type: ignore[arg-type]
    assert seen == [("a", "no answer"), ("b", "dead")]


def test_what_a_job_raises_ends_it_all(clock: Clock) -> None:
    def work(card: Card, job: str) -> Iterator[Any]:
        yield CountParameters(cell=job)
        raise KeyError(job)

    with pytest.raises(KeyError, match="a"):
        scheduler(clock, work, []).run([Card(clock, lambda: 1.0)], "ab")  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_thousand_cards_of_which_a_tenth_fails(clock: Clock) -> None:
    """1,024 cards, 10^6 samples in visits of three: no step lost or doubled, and next to no time idle."""
    rng = np.random.default_rng(0)
    visits, blocks = 33, 10_102
    waits = iter(rng.lognormal(np.log(0.05), 0.3, 2 * visits * blocks).tolist())
    usual_s = visits * blocks * 0.05 / 1024
    fails_at = np.where(rng.random(1024) < 0.1, rng.uniform(0, usual_s, 1024), np.inf)
    cards = [Card(clock, lambda: next(waits), breaks_at=at) for at in fails_at]
    samples: Counter[int] = Counter()

    def work(card: Card, block: int) -> Steps[None]:
        taken = 0
        for _ in range(visits):
            try:
                yield CountParameters(cell=str(block))
            except CellFailure as failure:
                raise CardLostError(failure.reason) from failure
            taken += 3
        samples[block] += taken  # a block counts when it is whole

    lost: list[Card] = []
    assert scheduler(clock, work, lost).run(cards, range(blocks)) == []
    assert samples == dict.fromkeys(range(blocks), 3 * visits)
    assert samples.total() > 10**6
    assert {card for card in cards if card.broken} == set(lost) != set()
    there_s = sum(min(clock.now, card.breaks_at) for card in cards)
    busy_s = sum(card.busy_s for card in cards)
    assert busy_s / there_s > 0.95
