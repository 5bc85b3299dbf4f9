"""The worker processes of a run: one at work, others started before they are needed, and at times some side by side."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from qwen3bench.campaign.scheduler import Steps
from qwen3bench.campaign.worker_process import WorkerHandle, answers
from qwen3bench.config.choices import own_config_dir
from qwen3bench.config.settings import Settings
from qwen3bench.config.sources import own_code
from qwen3bench.errors import UserError
from qwen3bench.record.lines import ProcessLine
from qwen3bench.record.messages import CellFailure, Open, Request, Touch
from qwen3bench.record.states import Purpose
from qwen3bench.record.writer import RecordWriter

QUIET_S = 120.0  # limit of a request that runs no model
StartWorker = Callable[[Path], WorkerHandle]
R = TypeVar("R")


T = TypeVar("T")


class NoWorkerError(UserError):
    """No worker can be started on a card."""


@dataclass(frozen=True)
class Seat:
    """Where workers run: how one is started there, the machine's name, and the card's UUID (None on a CPU)."""

    start: StartWorker
    host: str | None = None
    card: str | None = None


def opening(settings: Settings) -> Open:
    """What a worker is told first: the settings, and where and what a switch of the user's own is."""
    folder = own_config_dir()
    return Open(
        config=settings.to_dict(),
        config_dir=None if folder is None else str(folder),
        import_path=tuple(str(Path(place).absolute()) for place in sys.path),
        own_code=own_code(settings.opts),
    )


@dataclass
class ProcessNumbers:
    """Numbers the processes of a run over all starts and cards; `last` is the last one given."""

    last: int = -1

    def take(self) -> int:
        """The next number."""
        self.last += 1
        return self.last


class WorkerPool:
    """Asks the worker at work, and starts one where there is none; a context manager that ends them all.

    `ready` are workers that have been started already; `ahead` are those that wait to be needed. `process` numbers the
    one at work, or the last one, over all starts of a run; `purpose` goes to the record with it.
    """

    def __init__(
        self,
        settings: Settings,
        writer: RecordWriter,
        seat: Seat,
        ready: Sequence[WorkerHandle] = (),
        numbers: ProcessNumbers | None = None,
    ) -> None:
        self.purpose = Purpose.CHECK
        self._numbers = numbers or ProcessNumbers()
        self.process = self._numbers.last
        self._settings = settings
        self._opening = opening(settings)
        self._writer = writer
        self._seat = seat
        self.ahead = [*ready]  # started and not needed yet
        self._worker: WorkerHandle | None = None
        self._standing_by: dict[int, WorkerHandle] = {}  # by their places in `prepare`
        self.gave_up: dict[int, Request[Any]] = {}  # at what those failed that stand by no more
        self._stack = ExitStack()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    # One at work

    @property
    def timeout_s(self) -> float:
        """The limit of a request that runs a model."""
        return self._settings.measure.step_timeout_s

    def ask(self, request: Request[R]) -> R:
        """The answer of the worker at work.

        Raises as `WorkerProcess.ask` does, and `NoWorkerError` where no worker can be started.
        """
        return self._at_work().ask(request, self.timeout_s)

    def drive(self, steps: Steps[T]) -> T:
        """What the steps give in the end, each of their requests answered by the worker at work.

        Where `ask` raises `CellFailure`, so does the request in the steps.
        """
        step: Callable[[], Request[Any]] = partial(next, steps)
        while True:
            try:
                request = step()
            except StopIteration as end:
                return end.value
            try:
                step = partial(steps.send, self.ask(request))
            except CellFailure as failure:
                step = partial(steps.throw, failure)

    def send(self, request: Request[Any]) -> None:
        """Hand over one request to the worker at work. Raises as `WorkerProcess.send` does."""
        self._at_work().send(request)

    def receive(self, request: Request[R], timeout_s: float) -> R:
        """The answer to the request sent before. Raises as `WorkerProcess.receive` does."""
        return self._at_work().receive(request, timeout_s)

    def fileno(self) -> int:
        """What to wait on (select) for that answer to come."""
        return self._at_work().fileno()

    @property
    def number(self) -> int:
        """The number of the worker at work, or of the next one."""
        return self.process if self._worker is not None else self._numbers.last + 1

    def is_lost(self) -> bool:
        """Whether a fresh worker, too, cannot run a kernel here: then the card is to blame, and no cell."""
        worker = self._launched()
        try:
            worker.ask(self._opening, QUIET_S)
            worker.ask(Touch(), QUIET_S)
        except (CellFailure, UserError):
            worker.end()
            return True
        self.ahead.append(worker)
        return False

    @property
    def pids(self) -> set[int]:
        """The process ids of all workers."""
        at_work = [] if self._worker is None else [self._worker]
        return {worker.pid for worker in (*at_work, *self._standing_by.values(), *self.ahead)}

    def end(self) -> None:
        """End the worker at work, poisoned or not."""
        if self._worker is not None:
            self._worker.end()
            self._worker = None

    def end_all(self) -> None:
        """End every worker of this card."""
        self.end()
        self.dismiss()
        _end(self.ahead)
        self.ahead = []

    # Ahead of their time

    def start_ahead(self, count: int) -> None:
        """Start workers until `count` wait to be needed, as importing PyTorch takes seconds."""
        while len(self.ahead) < count:
            self.ahead.append(self._launched())

    def await_ahead(self) -> None:
        """Wait until these are up and have imported what they need, so that they take nothing from what is timed.

        They also touch the device, after the workers that are ready to time: see `messages.Touch`.
        """
        for worker in self.ahead:  # side by side: another implementation takes seconds to import
            with suppress(CellFailure):  # of a dead one, which is told by its answer
                worker.send(self._opening)
        for worker in list(self.ahead):
            try:
                worker.receive(self._opening, QUIET_S)
                worker.ask(Touch(), QUIET_S)
            except (CellFailure, UserError):  # the next start tells why
                worker.end()
                self.ahead.remove(worker)

    # Several side by side

    def share_out(self, shares: Sequence[Sequence[Request[Any]]]) -> dict[WorkerHandle, Sequence[Request[Any]]]:
        """Each share with its worker: that at work for the first, and one beside it for each other."""
        if not shares:
            return {}
        first = {self._at_work(): shares[0]}
        return first | {self._next(): [self._opening, *share] for share in shares[1:]}

    def end_one(self, worker: WorkerHandle) -> None:
        """End this worker, at work or beside it."""
        self.end() if worker is self._worker else worker.end()

    def end_beside(self, workers: Iterable[WorkerHandle]) -> None:
        """End those of the workers that are not at work."""
        _end([worker for worker in workers if worker is not self._worker])

    def stand_by(self, shares: Sequence[Sequence[Request[Any]]]) -> dict[WorkerHandle, Sequence[Request[Any]]]:
        """Each share with a fresh worker, which stands by in its place."""
        workers = [self._next() for _ in shares]
        self._standing_by, self.gave_up = dict(enumerate(workers)), {}
        return {worker: [self._opening, *share] for worker, share in zip(workers, shares, strict=True)}

    def give_up(self, worker: WorkerHandle, request: Request[Any]) -> None:
        """End a worker that stands by, as it failed at a request."""
        self.gave_up |= {place: request for place, each in self._standing_by.items() if each is worker}
        self._standing_by = {place: each for place, each in self._standing_by.items() if each is not worker}
        worker.end()

    def take(self, place: int) -> bool:
        """Put to work the worker that stands by in this place of `prepare`; False where it failed."""
        worker = self._standing_by.pop(place, None)
        if worker is not None:
            self._put_to_work(worker)
        return worker is not None

    def dismiss(self) -> bool:
        """End the workers that stand by; whether there were any."""
        there_were = bool(self._standing_by)
        _end(self._standing_by.values())
        self._standing_by = {}
        return there_were

    # Helpers

    def _at_work(self) -> WorkerHandle:
        if self._worker is None:
            self._put_to_work(self._opened())
        assert self._worker is not None
        return self._worker

    def _put_to_work(self, worker: WorkerHandle) -> None:
        self.process = self._numbers.take()
        self._worker = worker
        line = ProcessLine(process=self.process, pid=worker.pid, purpose=self.purpose, time=time.time())
        self._writer.append(replace(line, host=self._seat.host, card=self._seat.card))

    def _opened(self) -> WorkerHandle:
        """A worker that has taken the settings: one started ahead, or where that has died meanwhile a new one."""
        if self.ahead:
            ahead = self._next()
            try:
                ahead.ask(self._opening, QUIET_S)
                return ahead
            except CellFailure:
                ahead.end()
        worker = self._launched()
        try:
            worker.ask(self._opening, QUIET_S)
        except CellFailure as failure:  # no cell has run in it
            worker.end()
            raise self.no_worker(failure) from None
        return worker

    def no_worker(self, failure: CellFailure) -> NoWorkerError:
        """The error where no worker can be started."""
        return NoWorkerError(
            f"no worker could be started: {failure.reason}\n"
            f"what was measured is safe: continue with resume={self._writer.directory}"
        )

    def _next(self) -> WorkerHandle:
        """A worker started ahead, or a new one."""
        return self.ahead.pop(0) if self.ahead else self._launched()

    def _launched(self) -> WorkerHandle:
        self._writer.refuse_removed()  # or it would be the worker's log that is missed
        return self._stack.enter_context(self._seat.start(self._writer.directory / "worker.log"))


def _end(workers: Collection[WorkerHandle]) -> None:
    """End workers side by side: each takes a moment to give its card's memory back."""
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.end()


def side_by_side(
    pools: Sequence[WorkerPool], shares: Sequence[Sequence[Request[Any]]]
) -> Iterator[tuple[Request[Any], Any]]:
    """The requests of all shares and their answers as they come: of the workers at work and of those beside them.

    Shares are dealt out to the cards in turn. One ends with its first failure (None), as that may be of the others'
    making: only asking again, alone, tells. All workers but those at work have ended afterwards.
    """
    homes: dict[WorkerHandle, WorkerPool] = {}
    queues: dict[WorkerHandle, Sequence[Request[Any]]] = {}
    for place, pool in enumerate(pools):
        try:
            mine = pool.share_out(shares[place :: len(pools)])
        except NoWorkerError:  # what its share asks is asked again alone, and elsewhere
            continue
        queues |= mine
        homes |= dict.fromkeys(mine, pool)
    try:
        for worker, request, answer in answers(queues, pools[0].timeout_s):
            if answer is None:
                homes[worker].end_one(worker)
            if not isinstance(request, Open):
                yield request, answer
    finally:
        for pool in pools:
            pool.end_beside(worker for worker, home in homes.items() if home is pool)


def prepare(pools: Sequence[WorkerPool], shares: Sequence[Sequence[Sequence[Request[Any]]]]) -> Iterator[Request[Any]]:
    """The requests of all shares as they are answered, each share by a fresh worker; each card has shares of its own.

    A worker that has answered all of its share stands by until `WorkerPool.take`; one that failed has ended.
    """
    homes: dict[WorkerHandle, WorkerPool] = {}
    queues: dict[WorkerHandle, Sequence[Request[Any]]] = {}
    for pool, mine in zip(pools, shares, strict=True):
        standing = pool.stand_by(mine)
        queues |= standing
        homes |= dict.fromkeys(standing, pool)
    for worker, request, answer in answers(queues, pools[0].timeout_s):
        if answer is None:
            homes[worker].give_up(worker, request)
        elif not isinstance(request, Open):
            yield request
