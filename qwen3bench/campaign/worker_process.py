"""A campaign's handle of one worker process: start it, ask it, and end it whatever state it is in.

A CUDA fault or an out-of-memory error poisons the process that it happens in, so models run in a child that can be
thrown away. The campaign waits in the kernel (select), never in a loop, so that it takes no time from what is
measured.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

from qwen3bench.errors import UserError
from qwen3bench.record.environment import PACKAGE, refuse_other_code, running_code
from qwen3bench.record.messages import CellFailure, NoAnswerError, Request, RunningCode, decode_reply, encode_request
from qwen3bench.record.states import CellStatus

R = TypeVar("R")
WORKER = (sys.executable, "-P", str(PACKAGE / "worker" / "boot.py"))
MAX_BYTES = 1 << 26  # of one answer; the longest real one, a profile's kernels, has some 10 kB
END_S = 3.0  # for a process to be gone that has closed its output, or that was killed


class WorkerHandle(Protocol):
    """A worker that is asked one request at a time, wherever it runs: see `WorkerProcess`. Hashable."""

    @property
    def pid(self) -> int:
        """Its process id, on its machine."""

    def ask(self, request: Request[R], timeout_s: float) -> R:
        """The worker's answer to one request."""

    def send(self, request: Request[Any]) -> None:
        """Hand over one request."""

    def receive(self, request: Request[R], timeout_s: float) -> R:
        """The answer to it."""

    def fileno(self) -> int:
        """What to wait on for that answer."""

    def kill(self) -> None:
        """Have it end, and do not wait for that."""

    def end(self) -> None:
        """End it."""

    def __enter__(self) -> WorkerHandle: ...

    def __exit__(self, *_: object) -> None: ...


class WorkerProcess:
    """A fresh worker in a process group of its own. Use as a context manager: leaving it ends the group."""

    def __init__(
        self, log: Path, command: tuple[str, ...] = WORKER, variables: Mapping[str, str | None] | None = None
    ) -> None:
        """Start `command` with `variables` in its environment, without those that are None.

        Its standard error goes to the end of `log`.
        """
        running_code()  # as it is now; a worker that comes later must run the same
        self._log = log
        with log.open("ab") as errors:
            self._log_start = errors.tell()
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
                env={name: value for name, value in {**os.environ, **(variables or {})}.items() if value is not None},
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests: BinaryIO = self._process.stdin  # type: ignore[assignment]
        self._replies = self._process.stdout.fileno()
        os.set_blocking(self._replies, False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._replies, selectors.EVENT_READ)
        self._buffer = b""
        self._sent_s = 0.0  # when the last request was, by the monotonic clock
        self._ended = False

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def pid(self) -> int:
        """The worker's process id, also its group's."""
        return self._process.pid

    def ask(self, request: Request[R], timeout_s: float) -> R:
        """The worker's answer to one request.

        Raises `CellFailure` where the worker answers with an error, `NoAnswerError` where it dies, or is silent for
        `timeout_s` seconds, and `UserError` where it refuses what the user asked for.
        """
        self.send(request)
        return self.receive(request, timeout_s)

    def send(self, request: Request[Any]) -> None:
        """Hand over one request, whose answer is waited for later.

        Raises `NoAnswerError` where the worker is dead, or has said what it was not asked: that is no answer to this.
        """
        if not self._buffer and self._selector.select(0):
            self._buffer = os.read(self._replies, 1 << 16)
            if not self._buffer:
                raise self._died()
        if self._buffer:
            raise NoAnswerError(CellStatus.CRASHED, f"the worker said what it was not asked, before {request.op}")
        try:
            self._requests.write(encode_request(request))
            self._requests.flush()
            self._sent_s = time.monotonic()
        except BrokenPipeError:
            raise self._died() from None

    def receive(self, request: Request[R], timeout_s: float) -> R:
        """The answer to the request sent before.

        Raises as `ask` does, and `UserError` where the worker runs other code than this process.
        """
        answer = decode_reply(self._line(timeout_s, request.op), request)
        if isinstance(answer, RunningCode):
            refuse_other_code(answer)
        return answer

    def fileno(self) -> int:
        """What to wait on (select) for an answer to come."""
        return self._replies

    def kill(self) -> None:
        """Kill the process group, and do not wait until it is gone; the worker keeps nothing that would be lost."""
        if not self._ended:  # else another process may have its number by now
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def end(self) -> None:
        """Kill the process group, and wait until its first process is gone."""
        if self._ended:
            return
        self.kill()
        self._ended = True
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process that a driver holds must not hold the run
            self._process.wait(END_S)
        self._selector.close()
        with contextlib.suppress(BrokenPipeError):
            self._requests.close()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _line(self, timeout_s: float, op: str) -> bytes:
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not self._selector.select(left):
                waited_s = timeout_s or round(time.monotonic() - self._sent_s, 1)  # 0: it was waited for elsewhere
                raise NoAnswerError(CellStatus.TIMEOUT, f"the worker said nothing for {waited_s:g} s during {op}")
            chunk = os.read(self._replies, 1 << 16)
            if not chunk:
                raise self._died()
            self._buffer += chunk
            if len(self._buffer) > MAX_BYTES:
                raise NoAnswerError(CellStatus.CRASHED, f"the worker's answer to {op} has no end")
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line

    def _died(self) -> NoAnswerError:
        try:
            code = self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            return NoAnswerError(CellStatus.CRASHED, "the worker closed its output without an answer")
        how = f"was ended by {_signal_name(-code)}" if code < 0 else f"ended with exit status {code}"
        said = self._last_words()
        return NoAnswerError(CellStatus.CRASHED, f"the worker {how} without an answer" + (f": {said}" if said else ""))

    def _last_words(self) -> str:
        """The last line that the worker wrote to standard error."""
        with contextlib.suppress(OSError), self._log.open("rb") as log:
            log.seek(self._log_start)
            lines = deque((line.strip() for line in log if line.strip()), maxlen=1)
            return lines[0].decode(errors="replace")[:300] if lines else ""
        return ""


def answers(
    queues: Mapping[WorkerHandle, Sequence[Request[Any]]], timeout_s: float
) -> Iterator[tuple[WorkerHandle, Request[Any], Any]]:
    """The answers of several workers, each to its own requests one after another, as they come.

    Where `WorkerProcess.ask` would raise, the answer is None and the worker's last.
    """
    left = {worker: deque(requests) for worker, requests in queues.items()}
    deadlines: dict[WorkerHandle, float] = {}
    with selectors.DefaultSelector() as selector:
        begun = [worker for worker, requests in left.items() if requests]
        while begun or deadlines:
            for worker in begun:
                selector.register(worker, selectors.EVENT_READ, worker)
                deadlines[worker] = time.monotonic() + timeout_s
                with contextlib.suppress(CellFailure):  # of a dead one, which is told by its answer
                    worker.send(left[worker][0])
            begun = []
            first = min(deadlines, key=deadlines.__getitem__)
            ready = selector.select(max(0.0, deadlines[first] - time.monotonic()))
            for worker in [key.data for key, _ in ready] or [first]:
                selector.unregister(worker)
                del deadlines[worker]
                request = left[worker].popleft()
                try:
                    answer = worker.receive(request, timeout_s if ready else 0.0)
                except (CellFailure, UserError):
                    yield worker, request, None
                    continue
                if left[worker]:
                    begun.append(worker)
                yield worker, request, answer


def _signal_name(number: int) -> str:
    with contextlib.suppress(ValueError):  # real-time signals have no name
        return signal.Signals(number).name
    return f"signal {number}"
