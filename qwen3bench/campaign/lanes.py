"""The cards of a run, each with workers of its own: steps shared out over them, blocks timed on all of them at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

from qwen3bench.campaign.blocks import Blocks
from qwen3bench.campaign.context import RunContext
from qwen3bench.campaign.scheduler import CardLostError, Orders, Scheduler, Steps
from qwen3bench.campaign.state import Where
from qwen3bench.campaign.worker_pool import NoWorkerError, WorkerPool, prepare, side_by_side
from qwen3bench.record.card import Card
from qwen3bench.record.messages import Prepare, Request
from qwen3bench.record.states import Purpose

J = TypeVar("J")
R = TypeVar("R")


@dataclass(frozen=True, eq=False)
class Lane:
    """A card's line of work; `monitor` is looked at after each block, `socket` is the processor beside the card.

    `name`: what a person calls the card.
    """

    context: RunContext
    monitor: Card
    name: str = "the device"
    socket: int = 0

    @cached_property
    def blocks(self) -> Blocks:
        """What times blocks on this card."""
        return Blocks(self.context, self.monitor)

    @property
    def workers(self) -> WorkerPool:
        """The card's workers."""
        return self.context.workers

    def send(self, request: Request[Any]) -> None:
        """Hand over one request to the worker at work. Raises `CardLostError` where none starts, and others may."""
        try:
            self.workers.send(request)
        except NoWorkerError as error:
            if self.context.cards() > 1:
                raise CardLostError(str(error).splitlines()[0]) from error
            raise

    def receive(self, request: Request[R], timeout_s: float) -> R:
        """The answer to the request sent before."""
        return self.workers.receive(request, timeout_s)

    def fileno(self) -> int:
        """What to wait on for that answer."""
        return self.workers.fileno()


class Lanes:
    """The cards that a run still has, one at least. A card that is lost is left out, and said to be.

    The last one is never left out: where nothing else is left to try, a failure is the cell's, as on one card.
    `within`: what else loses a card that is lost here.
    """

    def __init__(self, lanes: Iterable[Lane], within: Lanes | None = None) -> None:
        self._lanes = [*lanes]
        self._within = within

    def __len__(self) -> int:
        return len(self._lanes)

    def __iter__(self) -> Iterator[Lane]:
        return iter([*self._lanes])

    @property
    def first(self) -> Lane:
        """The card that does what only one is needed for."""
        return self._lanes[0]

    def add(self, lane: Lane) -> None:
        """One more card."""
        self._lanes.append(lane)

    def over(self, context: RunContext) -> Lanes:
        """These cards, to measure what another context says, with the workers that they have.

        A card that is lost there is lost here.
        """
        lanes = Lanes((), within=self)
        for lane in self:
            own = replace(context, workers=lane.workers, cards=lanes.__len__)
            lanes.add(replace(lane, context=own))
        return lanes

    def leave_out(self, lane: Lane, why: str) -> None:
        """End what works on a card, and use it no more; the blocks that it finished stay."""
        self._lanes.remove(lane)
        if self._within is not None:
            self._within.forget(lane.workers)
        lane.workers.end_all()
        lane.context.progress.note(f"{lane.name} is left out: {why}")

    def forget(self, workers: WorkerPool) -> None:
        """Use the card of these workers no more."""
        self._lanes = [lane for lane in self._lanes if lane.workers is not workers]
        if self._within is not None:
            self._within.forget(workers)

    def share_out(self, jobs: Iterable[J], begin: Callable[[Lane, J], Steps[Any]]) -> None:
        """Each job on the card that is free next; on one card in their order."""
        left = [*jobs]
        if len(self) > 1:
            left = self._scheduler(begin).run(self._lanes.copy(), left)
        for job in left:
            self.first.workers.drive(begin(self.first, job))

    def on_first(self, jobs: Iterable[J], begin: Callable[[Lane, J], Steps[Any]]) -> None:
        """Every job on the first card, or where that is lost on the next."""
        left = [*jobs]
        while left and len(self) > 1:
            left = self._scheduler(begin).run([self.first], left)
        for job in left:
            self.first.workers.drive(begin(self.first, job))

    def side_by_side(self, shares: Sequence[Sequence[Request[Any]]]) -> Iterator[tuple[Request[Any], Any]]:
        """The requests of all shares and their answers, the shares dealt out to the cards in turn."""
        return side_by_side([lane.workers for lane in self], shares)

    def start_ahead(self, count: int) -> None:
        """Start workers until `count` wait to be needed, each card having its part of them."""
        for place, lane in enumerate(self):
            lane.workers.start_ahead(-(-(count - place) // len(self)))

    def time(self, at_once: int) -> None:
        """The pass that times, on all cards; `at_once`: how many processes get ready side by side on each.

        A process lives on one card, and so does each of its blocks. Cards time side by side, a card one process at a
        time; nothing is timed while processes get ready side by side. One card alone goes the way of `Blocks.run`.
        """
        for lane in self:
            lane.workers.purpose = Purpose.TIME
        self.first.blocks.stop_what_is_known()
        while len(self) > 1 and (left := self._needed()):
            for group in _groups(left):
                lines = self._lines(group[0][1])
                if at_once == 1 or group[0][1] == "compile":
                    self._each_alone(group, lines)
                elif not self._together(group, lines, at_once):
                    at_once = 1
                    break
                self.first.blocks.stop_what_is_known()
        if len(self) == 1:
            self.first.blocks.run(at_once)

    def _needed(self) -> list[Where]:
        """The processes that come next, as many as keep all cards busy."""
        needed = self.first.blocks.processes_needed
        return needed + needed[: -len(needed) % len(self)] if needed else []

    def _lines(self, runtime: str) -> list[Lane]:
        """The cards that time at once: in eager one beside each processor, as the host is what is timed."""
        if runtime != "eager":
            return [*self]
        return list({lane.socket: lane for lane in reversed(self._lanes)}.values())

    def _each_alone(self, group: Sequence[Where], lines: Sequence[Lane]) -> None:
        """Processes that get ready and are timed one after another, on each card by itself."""

        def begin(lane: Lane, where: Where) -> Steps[None]:
            return lane.blocks.alone(where)

        self._scheduler(begin).run(lines, own=_dealt(group, lines))  # what a lost card leaves is needed still

    def _together(self, group: Sequence[Where], lines: Sequence[Lane], at_once: int) -> bool:
        """Processes that get ready side by side on all cards; False where one failed, and no card is to blame."""
        size, timings = at_once * len(lines), self.first.context.state.timings
        for start in range(0, len(group), size):
            chunk = [where for where in group[start : start + size] if not timings[where].stopped]
            if not chunk:
                continue
            here = _dealt(chunk, lines)
            setup_s = self._get_ready(here)
            whole: list[bool] = []

            def begin(
                lane: Lane, place: int, here: Any = here, setup_s: float = setup_s, whole: Any = whole
            ) -> Steps[None]:
                whole.append((yield from lane.blocks.standing_by(place, here[lane][place], setup_s)))

            places = {lane: range(len(wheres)) for lane, wheres in here.items()}
            self._scheduler(begin).run(lines, own=places)
            for lane in lines:
                lane.workers.dismiss()
            if set(lines) - {*self}:  # a card is gone; the others are as good as before
                return True
            if not all(whole):
                return False
        return True

    def _get_ready(self, here: Mapping[Lane, Sequence[Where]]) -> float:
        """Make every cell ready in a process of its own for each workload and runtime; seconds for each process."""
        started = time.monotonic()
        shares = [[lane.blocks.preparations(where) for where in wheres] for lane, wheres in here.items()]
        names = ", ".join(dict.fromkeys(" ".join(where) for wheres in here.values() for where in wheres))
        count = sum(map(len, shares))
        title = f"preparing {names} in {count} processes on {len(here)} cards"
        total = sum(len(share) - 1 for mine in shares for share in mine)
        for lane, wheres in here.items():
            lane.workers.start_ahead(len(wheres) + 1)  # the one that comes then, too, while nothing is timed
        with self.first.context.progress.part(title, total) as stage:
            for request in prepare([lane.workers for lane in here], shares):
                if isinstance(request, Prepare):
                    stage.step(request.cell)
        for lane in here:
            lane.workers.await_ahead()
        return (time.monotonic() - started) / count

    def _scheduler(self, begin: Callable[[Lane, J], Steps[Any]]) -> Scheduler[Lane, J]:
        return Scheduler(Orders(begin, self.leave_out, self.first.workers.timeout_s))


def _dealt(wheres: Iterable[Where], lines: Sequence[Lane]) -> dict[Lane, list[Where]]:
    """Which card gets which processes: those of a workload and runtime over all cards, or its numbers were one card's.

    And each card about as many as the others.
    """
    here: dict[Lane, list[Where]] = {line: [] for line in lines}
    for where in wheres:
        line = min(lines, key=lambda each: (here[each].count(where), len(here[each])))
        here[line].append(where)
    return here


def _groups(left: Sequence[Where]) -> list[list[Where]]:
    """The processes that may be at work beside each other: eager by itself, compile by itself, the others."""
    groups: dict[str, list[Where]] = {}
    for where in left:
        groups.setdefault(where[1] if where[1] in ("eager", "compile") else "", []).append(where)
    return [*groups.values()]
