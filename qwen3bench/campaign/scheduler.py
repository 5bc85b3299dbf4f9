"""Work shared out over cards: each takes the next job when it is free; what a lost card had begun is done elsewhere."""

from __future__ import annotations

import selectors
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from qwen3bench.record.messages import CellFailure, Request

T = TypeVar("T")
Steps = Generator[Request[Any], Any, T]  # each request is answered before the next


class CardLostError(Exception):
    """A card fails, or somebody else uses it; the argument says why."""


class CardGoneError(CellFailure):
    """What hosts a card's workers is gone: no cell is to blame."""


class WorkLine(Protocol):
    """A card's line of work: its worker is asked one request at a time. Hashable."""

    def send(self, request: Request[Any]) -> None:
        """Hand over one request. Raises `CellFailure` where the worker is dead."""

    def receive(self, request: Request[Any], timeout_s: float) -> Any:
        """The answer. Raises as `WorkerProcess.ask` does."""

    def fileno(self) -> int:
        """What to wait on for the answer."""


L = TypeVar("L", bound=WorkLine)
J = TypeVar("J")


@dataclass(frozen=True)
class Orders(Generic[L, J]):
    """How a job is begun on a line, and who is told where a line is left out, and why."""

    begin: Callable[[L, J], Steps[Any]]
    lost: Callable[[L, str], None]
    timeout_s: float  # of one request


@dataclass(frozen=True)
class Waiting:
    """How answers are waited for: in the kernel, in one thread, so that it takes nothing from what is timed."""

    selector: Callable[[], selectors.BaseSelector] = selectors.DefaultSelector
    clock: Callable[[], float] = time.monotonic


@dataclass(frozen=True)
class _Begun(Generic[J]):
    job: J
    of_line: bool  # whether it may be done by no other line
    steps: Steps[Any]
    request: Request[Any]


class Scheduler(Generic[L, J]):
    """Runs jobs on lines of work, one job a line at a time, until none is left.

    A job of a line that is lost goes to another line, from its beginning: what is recorded by halves must not count.
    """

    def __init__(self, orders: Orders[L, J], waiting: Waiting | None = None) -> None:
        self._orders = orders
        self._waiting = waiting or Waiting()
        self._shared: deque[J] = deque()
        self._own: dict[L, deque[J]] = {}
        self._undone: list[J] = []
        self._idle: dict[L, None] = {}
        self._begun: dict[L, _Begun[J]] = {}
        self._deadlines: OrderedDict[L, float] = OrderedDict()  # all wait equally long: the first is the next

    def run(self, lines: Sequence[L], jobs: Iterable[J] = (), own: Mapping[L, Iterable[J]] | None = None) -> list[J]:
        """The jobs that no line did: `own` ones of lost lines, and any where no line is left.

        `jobs` are done by any line, in their order; `own` by the line named alone, before those. Raises what a job
        raises, other than `CardLostError`; what else is at work is then left as it is.
        """
        self._shared = deque(jobs)
        self._own = {line: deque((own or {}).get(line, ())) for line in lines}
        with self._waiting.selector() as selector:
            for line in lines:
                self._start(line, selector)
            while self._begun:
                for line, late in self._answered(selector):
                    self._take_answer(line, selector, late=late)
        return [*self._undone, *self._shared]

    def _answered(self, selector: selectors.BaseSelector) -> list[tuple[L, bool]]:
        """The lines whose answer is there, else the one whose time is over, which is late."""
        first = next(iter(self._deadlines))
        ready = selector.select(max(0.0, self._deadlines[first] - self._waiting.clock()))
        return [(key.data, False) for key, _ in ready] or [(first, True)]

    def _take_answer(self, line: L, selector: selectors.BaseSelector, *, late: bool) -> None:
        selector.unregister(line)
        del self._deadlines[line]
        at = self._begun.pop(line)
        try:
            answer = line.receive(at.request, 0.0 if late else self._orders.timeout_s)
        except CellFailure as failure:
            step = partial(at.steps.throw, failure)
        else:
            step = partial(at.steps.send, answer)
        if self._advance(line, (at.job, at.of_line, at.steps), step, selector):
            self._start(line, selector)

    def _start(self, line: L, selector: selectors.BaseSelector) -> None:
        """The line's next job; where there is none it is idle, and waits for what another may leave."""
        while self._own[line] or self._shared:
            of_line = bool(self._own[line])
            job = (self._own[line] if of_line else self._shared).popleft()
            steps = self._orders.begin(line, job)
            if not self._advance(line, (job, of_line, steps), partial(next, steps), selector):
                return
        self._idle[line] = None

    def _advance(
        self,
        line: L,
        begun: tuple[J, bool, Steps[Any]],
        step: Callable[[], Request[Any]],
        selector: selectors.BaseSelector,
    ) -> bool:
        """Take a job's next step; whether it is over, and the line free."""
        job, of_line, steps = begun
        while True:
            try:
                request = step()
                line.send(request)
            except StopIteration:
                return True
            except CardLostError as lost:
                self._leave_out(line, begun, str(lost), selector)
                return False
            except CellFailure as failure:  # of a worker that is dead already
                step = partial(steps.throw, failure)
            else:
                break
        selector.register(line, selectors.EVENT_READ, line)
        self._begun[line] = _Begun(job, of_line, steps, request)
        self._deadlines[line] = self._waiting.clock() + self._orders.timeout_s
        return False

    def _leave_out(
        self, line: L, begun: tuple[J, bool, Steps[Any]], why: str, selector: selectors.BaseSelector
    ) -> None:
        job, of_line, _ = begun
        if of_line:
            self._undone.append(job)
        else:
            self._shared.appendleft(job)
        self._undone += self._own.pop(line)
        self._orders.lost(line, why)
        idle, self._idle = [*self._idle], {}
        for other in idle:
            self._start(other, selector)
