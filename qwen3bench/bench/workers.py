"""The worker processes of a run: one at work, the next one started before it is needed, and one beside it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from qwen3bench.bench.record import RecordWriter
from qwen3bench.bench.supervisor import CellFailure, WorkerProcess
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

    def beside(self) -> WorkerProcess:
        """One more worker, beside the one at work, that has taken the settings.

        It is the caller's to end; at the latest it ends with the others. Raises as `ask` does.
        """
        worker = self._launched()
        self._open(worker)
        return worker

    def end(self) -> None:
        """End the worker at work, poisoned or not."""
        if self._worker is not None:
            self._worker.end()
            self._worker = None

    def _at_work(self) -> WorkerProcess:
        if self._worker is None:
            started = time.monotonic()
            self.process = self.number
            self._worker = self._ready or self._launched()
            self._ready = None
            self._open(self._worker)
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

    def _open(self, worker: WorkerProcess) -> None:
        try:
            worker.ask("open", QUIET_S, config=self._settings.to_dict())
        except CellFailure as failure:  # no cell has run in it
            raise UserError(f"no worker could be started: {failure.reason}") from None

    def _launched(self) -> WorkerProcess:
        return self._stack.enter_context(self._start(self._writer.directory / "worker.log"))


class Beside:
    """One pass over `cells` in a worker of its own, a cell at a time, while another worker is at other passes."""

    def __init__(self, workers: Workers, op: str, cells: Sequence[str]) -> None:
        self.cells = deque(cells)
        self._workers = workers
        self._op = op
        self._worker: WorkerProcess | None = None
        self._lost: CellFailure | None = None  # why the present cell could not be asked for
        self._post()

    @property
    def cell(self) -> str:
        """The cell that is at work."""
        return self.cells[0]

    @property
    def answered(self) -> bool:
        """Whether `answer` need not wait."""
        return bool(self.cells) and (self._worker is None or self._worker.answered())

    def answer(self, timeout_s: float) -> dict[str, Any]:
        """The answer for `cell`. Raises as `WorkerProcess.ask` does."""
        if self._lost is not None:
            raise self._lost
        assert self._worker is not None
        return self._worker.answer(self._op, timeout_s)

    def next(self) -> None:
        """Go on to the next cell, in a fresh worker where the last was ended."""
        self.cells.popleft()
        if self.cells:
            self._post()

    def end(self) -> None:
        """End the worker, poisoned or not."""
        if self._worker is not None:
            self._worker.end()
            self._worker = None

    def _post(self) -> None:
        self._lost = None
        try:
            self._worker = self._worker or self._workers.beside()
            self._worker.post(self._op, cell=self.cell)
        except CellFailure as failure:
            self._lost = failure
            self.end()
