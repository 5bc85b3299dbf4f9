"""The worker processes of a run: one at work, the next one started before it is needed, and at times some beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from qwen3bench.bench.record import RecordWriter
from qwen3bench.bench.supervisor import CellFailure, Request, WorkerProcess, answers
from qwen3bench.errors import UserError
from qwen3bench.settings import Settings

QUIET_S = 120.0  # limit of a request that runs no model
StartWorker = Callable[[Path], WorkerProcess]


class Workers:
    """Asks the worker at work, and starts one where there is none; a context manager that ends them all.

    `ready` is a worker that has been started already. `process` numbers the one at work, or the last one, over all
    starts of a run; `purpose` (check, time) goes to the record with it.
    """

    def __init__(
        self,
        settings: Settings,
        writer: RecordWriter,
        start: StartWorker,
        ready: WorkerProcess | None = None,
        process: int = -1,
    ) -> None:
        self.purpose = "check"
        self.process = process
        self._settings = settings
        self._writer = writer
        self._start = start
        self._ready = ready
        self._worker: WorkerProcess | None = None
        self._beside: list[WorkerProcess] = []
        self._stack = ExitStack()

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        """The answer of the worker at work.

        Raises as `WorkerProcess.ask` does, and `UserError` where no worker can be started.
        """
        return self._at_work().ask(op, self._settings.measure.step_timeout_s, **arguments)

    @property
    def number(self) -> int:
        """The number of the worker at work, or of the next one."""
        return self.process if self._worker is not None else self.process + 1

    @property
    def pids(self) -> set[int]:
        """The process id of the worker at work."""
        return {self._worker.pid} if self._worker is not None else set()

    def start_next(self) -> None:
        """Start the next worker ahead, as importing PyTorch takes seconds."""
        self._ready = self._ready or self._launched()

    def await_next(self) -> None:
        """Wait until the next worker is up, so that its start takes nothing from what is timed."""
        if self._ready is None:
            return
        try:
            self._ready.ask("probe", QUIET_S, device=self._settings.device)
        except (CellFailure, UserError):  # the next start tells why
            self._ready.end()
            self._ready = None

    def start_beside(self, count: int) -> None:
        """Start workers for `side_by_side`, ahead, as importing PyTorch takes seconds."""
        self._beside += [self._launched() for _ in range(count)]

    def side_by_side(self, op: str, shares: Sequence[Sequence[str]]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Cells and the answers to `op` of them as they come: of the worker at work and of those beside it.

        `shares`: the cells of each. A share ends with its first failure, as that may be of the others' making: only
        asking again, alone, tells. All workers but the one at work have ended afterwards.
        """
        opening: Request = ("open", {"config": self._settings.to_dict()})
        queues: dict[WorkerProcess, Sequence[Request]] = {}
        for worker, share in zip([self._at_work(), *self._beside], shares, strict=True):
            requests: list[Request] = [(op, {"cell": cell}) for cell in share]
            queues[worker] = requests if worker is self._worker else [opening, *requests]
        try:
            for worker, (asked, arguments), answer in answers(queues, self._settings.measure.step_timeout_s):
                if answer is None:
                    self.end() if worker is self._worker else worker.end()
                elif asked == op:
                    yield arguments["cell"], answer
        finally:
            for worker in self._beside:
                worker.end()
            self._beside = []

    def end(self) -> None:
        """End the worker at work, poisoned or not."""
        if self._worker is not None:
            self._worker.end()
            self._worker = None

    def _at_work(self) -> WorkerProcess:
        if self._worker is None:
            started = time.monotonic()
            self.process = self.number
            self._worker = self._opened()
            self._writer.append(
                {
                    "type": "process",
                    "process": self.process,
                    "pid": self._worker.pid,
                    "purpose": self.purpose,
                    "time": time.time(),
                    "setup_s": time.monotonic() - started,
                }
            )
        return self._worker

    def _opened(self) -> WorkerProcess:
        """A worker that has taken the settings: the one started ahead, or where that has died meanwhile a new one."""
        config = self._settings.to_dict()
        ahead, self._ready = self._ready, None
        if ahead is not None:
            try:
                ahead.ask("open", QUIET_S, config=config)
                return ahead
            except CellFailure:
                ahead.end()
        worker = self._launched()
        try:
            worker.ask("open", QUIET_S, config=config)
        except CellFailure as failure:  # no cell has run in it
            worker.end()
            raise UserError(
                f"no worker could be started: {failure.reason}\n"
                f"what was measured is safe: continue with resume={self._writer.directory}"
            ) from None
        return worker

    def _launched(self) -> WorkerProcess:
        return self._stack.enter_context(self._start(self._writer.directory / "worker.log"))
