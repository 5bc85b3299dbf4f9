"""What runs beside a card of a Ray cluster: it hosts the card's worker processes. Imports no torch and no Ray."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen3bench.campaign.worker_process import WorkerProcess
from qwen3bench.errors import UserError
from qwen3bench.record.card import Card
from qwen3bench.record.card_choice import present_cards
from qwen3bench.record.environment import running_code, system_device_name, version_of
from qwen3bench.record.lines import Telemetry
from qwen3bench.record.messages import CellFailure, Request

_REST_S = 10.0  # for an answer to be whole that has begun: a worker writes it at once
_MAX_LOG = 1 << 16  # bytes that go to the driver's log with an answer


@dataclass(frozen=True)
class CardSeen:
    """A card of a cluster: the machine's name, the card's UUID (None on a CPU), the processor beside it.

    `code` is the hash of this package there; `must_agree`: what must be the same of all cards of a run.
    """

    host: str
    code: str
    uuid: str | None
    socket: int
    must_agree: Mapping[str, str | None]


@dataclass(frozen=True)
class WorkerSaid:
    """A worker's answer, or the error that stands for it; `log` is what it has written to standard error since."""

    answer: Any
    log: bytes


@dataclass(frozen=True)
class _Hosted:
    """A worker, and the answer that is waited for."""

    worker: WorkerProcess
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    ready: list[asyncio.Future[None]] = field(default_factory=list)


class CardHost:
    """Hosts a card's worker processes for a driver: an actor with one event loop, whose thread starts every worker.

    `niceness` and `threads` (OMP_NUM_THREADS) are the driver's: Ray would give workers its own, which slows them down.
    A worker ends with this process, however it ends.
    """

    def __init__(self, niceness: int, threads: str | None, on_card: bool) -> None:
        self._niceness = niceness
        self._card = Card()  # heeds the CUDA_VISIBLE_DEVICES that Ray has set
        self._uuid = self._card.describe()["card"] if on_card else None
        self._variables = {"OMP_NUM_THREADS": threads}
        if self._uuid or not on_card:  # CUDA and NVML number cards unlike, and know them by UUID both
            self._variables["CUDA_VISIBLE_DEVICES"] = self._uuid or ""
        self._log = Path(tempfile.mkdtemp(prefix="qwen3bench-")) / "worker.log"
        self._log_read = 0
        self._workers: dict[int, _Hosted] = {}

    async def seen(self) -> CardSeen:
        """What is here."""
        sockets = {card.uuid: card.socket for card in present_cards()}
        agree = {
            "torch": version_of("torch"),
            "niceness": str(self._be_as_nice()),
            "driver": self._card.describe()["driver"] if self._uuid else None,
            "kind of card": system_device_name("cuda" if self._uuid else "cpu"),
        }
        beside = sockets.get(self._uuid or "", 0)
        return CardSeen(socket.gethostname(), running_code().code, self._uuid, beside, agree)

    async def start(self) -> int:
        """Start a worker; its process id, by which it is asked. Raises OSError where that is not possible."""
        self._be_as_nice()
        worker = WorkerProcess(self._log, variables=self._variables)
        self._workers[worker.pid] = _Hosted(worker)
        return worker.pid

    async def ask(self, pid: int, request: Request[Any]) -> WorkerSaid:
        """A worker's answer, however long it takes, or what `WorkerProcess.ask` raises."""
        hosted = self._workers[pid]
        async with hosted.lock:
            try:
                hosted.worker.send(request)
                await _answered(hosted)
                answer: Any = hosted.worker.receive(request, _REST_S)
            except (CellFailure, UserError) as error:
                answer = error
            return WorkerSaid(answer, self._said())

    async def end(self, pid: int) -> None:
        """End a worker."""
        hosted = self._workers.pop(pid)
        for ready in hosted.ready:
            ready.cancel()
        async with hosted.lock:  # no one reads what is about to be closed
            hosted.worker.end()

    async def look(self, own_pids: frozenset[int]) -> Telemetry:
        """The state of the card."""
        return self._card.sample(own_pids)

    async def close(self) -> None:
        """End every worker."""
        for pid in [*self._workers]:
            await self.end(pid)
        self._log.unlink(missing_ok=True)
        self._log.parent.rmdir()

    def _be_as_nice(self) -> int:
        """The niceness of this thread, and of workers that it starts: the driver's, where that is allowed."""
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, self._niceness)
        return os.getpriority(os.PRIO_PROCESS, 0)

    def _said(self) -> bytes:
        with contextlib.suppress(OSError), self._log.open("rb") as log:
            log.seek(self._log_read)
            said = log.read(_MAX_LOG)
            self._log_read += len(said)
            return said
        return b""


async def _answered(hosted: _Hosted) -> None:
    """Wait until a worker has begun an answer, or has ended. Raises CancelledError where it is ended from here."""
    loop, fileno = asyncio.get_running_loop(), hosted.worker.fileno()
    ready = loop.create_future()
    hosted.ready[:] = [ready]
    loop.add_reader(fileno, _set, ready)
    try:
        await ready
    finally:
        loop.remove_reader(fileno)


def _set(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
