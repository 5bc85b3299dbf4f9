"""The cards of a Ray cluster (https://docs.ray.io), each with an actor that hosts its workers; the record stays here.

Ray's memory and its tasks are not used, only actors: at most once, so that nothing is measured twice. Ray is imported
where a run asks for it alone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from qwen3bench.campaign.card_host import CardHost, CardSeen, WorkerSaid
from qwen3bench.campaign.scheduler import CardGoneError
from qwen3bench.campaign.worker_pool import opening
from qwen3bench.campaign.worker_process import WorkerHandle
from qwen3bench.config.settings import Settings
from qwen3bench.errors import Refused, UserError
from qwen3bench.record.card import Card
from qwen3bench.record.environment import HOST_KEYS, running_code
from qwen3bench.record.lines import Telemetry
from qwen3bench.record.messages import CellFailure, Identify, Identity, NoAnswerError, Request, RunningCode
from qwen3bench.record.states import CellStatus

R = TypeVar("R")
_START_S = 60.0  # for the actors to be up: a node imports Ray and this package in 2 s
_CONNECT_S = 5.0  # for the cluster's head to take a connection
_ANSWER_S = 20.0  # for what an actor does at once; ending a worker takes up to 3 s
_MOMENT_S = 1e-3  # instead of no time at all, which to a socket is another mode
_STORE_BYTES = 80 * 2**20  # of Ray's shared memory, the least that it takes: nothing is kept there
# Set before Ray is imported. It would listen at the interface's address, run workers at niceness 15, and know no token.
_LOCAL = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_worker_niceness": "0", "RAY_AUTH_MODE": "token"}


class HostedCard(Card):
    """A card of a cluster and the actor beside it: starts workers there, and reads the card's state from here."""

    def __init__(self, actor: Any, seen: CardSeen) -> None:
        self.seen = seen
        self._actor = actor
        self._gone = ""

    def start(self, log: Path) -> HostedWorker:
        """A worker there; what it writes to standard error comes to `log`, with its answers."""
        return HostedWorker(self, log)

    def sample(self, own_pids: Any = None) -> Telemetry:
        """The state of the card now; nothing is known of one that is gone."""
        try:
            state: Telemetry = self.call("look", frozenset(own_pids or ()))
        except CardGoneError:
            return Telemetry()
        return state

    def call(self, method: str, *arguments: Any) -> Any:
        """What a method of the actor gives that takes no time. Raises `CardGoneError`."""
        return self.outcome(self.begin(method, *arguments), _ANSWER_S)

    def begin(self, method: str, *arguments: Any) -> Future[Any]:
        """What a method of the actor will give; `outcome` tells."""
        future: Future[Any] = Future()
        if self._gone:
            future.set_exception(CardGoneError(CellStatus.CRASHED, self._gone))
        else:
            future = getattr(self._actor, method).remote(*arguments).future()
        return future

    def outcome(self, future: Future[Any], timeout_s: float = 0.0) -> Any:
        """What a method has given. Raises `CardGoneError`, from then on for everything that is asked of this card."""
        from ray.exceptions import RayError

        try:
            return future.result(timeout_s)
        except (RayError, TimeoutError) as error:
            why = f"no answer in {timeout_s:g} s" if isinstance(error, TimeoutError) else type(error).__name__
            self._gone = f"the Ray actor beside the card is gone ({self.seen.host}: {why})"
            raise CardGoneError(CellStatus.CRASHED, self._gone) from error

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(CardGoneError):
            self.call("close")


class HostedWorker:
    """A handle of a worker process that an actor hosts: asked as a `WorkerProcess` is.

    Its answer waits in Ray; a byte in a socket tells that it has come, so that one thread waits for many workers.
    """

    def __init__(self, card: HostedCard, log: Path) -> None:
        self._card = card
        self._log = log
        self._answer: Future[Any] | None = None
        self._sent_s = 0.0  # when the last request was, by the monotonic clock
        self._hears, self._rings = socket.socketpair()
        self._lock = threading.Lock()
        self._ended = False
        self.pid = 0  # of none
        with contextlib.suppress(CardGoneError):  # the first request tells
            self.pid = card.call("start")

    def __enter__(self) -> HostedWorker:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def ask(self, request: Request[R], timeout_s: float) -> R:
        """The worker's answer to one request. Raises as `WorkerProcess.ask` does, and `CardGoneError`."""
        self.send(request)
        return self.receive(request, timeout_s)

    def send(self, request: Request[Any]) -> None:
        """Hand over one request, whose answer is waited for later."""
        self._answer = self._card.begin("ask", self.pid, request)
        self._sent_s = time.monotonic()
        self._answer.add_done_callback(self._ring)

    def receive(self, request: Request[R], timeout_s: float) -> R:
        """The answer to the request sent before. Raises as `WorkerProcess.receive` does, and `CardGoneError`."""
        self._hears.settimeout(max(timeout_s, _MOMENT_S))
        try:
            self._hears.recv(1)
        except TimeoutError:
            waited_s = timeout_s or round(time.monotonic() - self._sent_s, 1)  # 0: it was waited for elsewhere
            why = f"the worker said nothing for {waited_s:g} s during {request.op}"
            raise NoAnswerError(CellStatus.TIMEOUT, why) from None
        assert self._answer is not None
        said: WorkerSaid = self._card.outcome(self._answer)
        with self._log.open("ab") as log:
            log.write(said.log)
        if isinstance(said.answer, Exception):
            raise said.answer
        if isinstance(said.answer, RunningCode) and said.answer.code != running_code().code:
            raise UserError(f"the code of qwen3bench has changed on {self._card.seen.host}; begin a new run")
        answer: R = said.answer
        return answer

    def fileno(self) -> int:
        """What to wait on (select) for an answer to come."""
        return self._hears.fileno()

    def kill(self) -> None:
        """End the worker: the actor that hosts it ends one after another."""
        self.end()

    def end(self) -> None:
        """End the worker at once, and forget what was asked of it."""
        if self._ended:
            return
        self._ended = True
        with contextlib.suppress(CardGoneError):
            self._card.call("end", self.pid)
        with self._lock:
            self._hears.close()
            self._rings.close()

    def _ring(self, _: object = None) -> None:
        with self._lock:  # or a file that is opened meanwhile might get the byte
            if self._rings.fileno() >= 0:
                self._rings.send(b"\0")


@contextmanager
def cluster_cards(settings: Settings) -> Iterator[list[HostedCard]]:
    """The cards of the cluster that `settings` name, or of one that is started; of a cluster without cards its nodes.

    Raises `Refused` where there is none, where Ray is missing, and where cards differ in what numbers depend on.
    """
    if settings.devices or settings.device not in ("auto", "cpu", "cuda"):
        where = "devices" if settings.devices else f"device={settings.device}"
        raise Refused(f"cluster=ray and {where} both say where to measure; leave one out")
    with contextlib.ExitStack() as stack:
        ray = stack.enter_context(_joined(settings.cluster or "local"))
        cards = [stack.enter_context(card) for card in _hosted(ray, on_cpu=settings.device == "cpu")]
        if settings.device == "cuda" and not cards[0].seen.uuid:
            raise Refused("device=cuda: no node of the Ray cluster has a card that NVML finds")
        yield cards


def refuse_unlike_workers(settings: Settings, identity: Identity, hosts: Mapping[WorkerHandle, str]) -> None:
    """Raise `Refused` where workers, with the names of their hosts, are not what the first one is by its `identity`.

    Raises `UserError` where one cannot tell.
    """
    (_, here), *others = hosts.items()
    try:
        requests: tuple[Request[Any], ...] = (opening(settings), Identify())
        for request in requests:
            for worker, _ in others:
                worker.send(request)
            told = [worker.receive(request, settings.measure.step_timeout_s) for worker, _ in others]
    except CellFailure as failure:
        raise UserError(f"no worker could be started: {failure.reason}") from None
    for (_, there), other in zip(others, told, strict=True):
        refuse_difference((here, identity.fingerprint), (there, other.fingerprint))


def refuse_difference(ours: tuple[str, Mapping[str, str | None]], theirs: tuple[str, Mapping[str, str | None]]) -> None:
    """Raise `Refused` where two machines, each with its name, differ in what numbers depend on."""
    (here, mine), (there, other) = ours, theirs
    keys = [key for key in dict.fromkeys((*mine, *other)) if key not in HOST_KEYS or (key in mine and key in other)]
    unlike = [key for key in keys if mine.get(key) != other.get(key)]
    if unlike:
        told = [f"{key}{_both(mine.get(key), other.get(key))}" for key in unlike]
        advice = "run each kind by itself, or make them alike; docs/clusters.md says how Ray is started"
        raise Refused(f"cluster: {there} differs from {here}: {'; '.join(told)}\n{advice}")


def _both(mine: str | None, other: str | None) -> str:
    """Two values for a reader; of hashes nothing."""
    short = all(value is None or len(value) < 64 for value in (mine, other))  # characters of a sha256
    return f" ({other}, not {mine})" if short else ""


@contextmanager
def _joined(address: str) -> Iterator[Any]:
    """Ray, joined to the cluster at `address`, or with one of its own that listens on loopback alone."""
    local = address == "local"
    if local:
        for name, value in _LOCAL.items():
            os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise Refused(f"cluster=ray needs Ray ({error}): pip install 'qwen3bench[cluster]'") from None
    own: dict[str, Any] = (
        {"include_dashboard": False, "num_cpus": 1, "object_store_memory": _STORE_BYTES} if local else {}
    )
    try:
        if ":" in address:  # for which Ray would wait some minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), _CONNECT_S).close()
        with _signals_kept():
            joined: Any = ray.init(address=address, log_to_driver=False, configure_logging=False, **own)
    except (OSError, OverflowError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        ray.shutdown()
        raise Refused(
            f"cluster.address={address}: no Ray cluster answers ({_one_line(error)})\n"
            "was it started, and with the same token? docs/clusters.md says how; cluster.address=local starts one"
        ) from None
    try:
        yield ray
    finally:
        ray.shutdown()
        if local and (session := joined.address_info.get("session_dir")):
            _remove_session(Path(session))


def _remove_session(directory: Path) -> None:
    """Remove what a Ray of our own wrote, and the link to it unless that is another's by now."""
    latest = directory.with_name("session_latest")
    shutil.rmtree(directory, ignore_errors=True)  # what its last processes still hold stays
    if latest.is_symlink() and latest.readlink() == directory:
        latest.unlink(missing_ok=True)


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Take the signals back from Ray, whose handler of SIGTERM leaves with another exit status."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except SystemExit:  # Ray's handler
        signal.signal(signal.SIGTERM, kept[signal.SIGTERM])
        os.kill(os.getpid(), signal.SIGTERM)
        raise
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def _hosted(ray: Any, on_cpu: bool) -> list[HostedCard]:
    """An actor for each card, spread; one a node where there is no card, or none is wanted. In the order of hosts."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    cards = 0 if on_cpu else int(ray.cluster_resources().get("GPU", 0))
    places: list[dict[str, Any]] = [{"num_gpus": 1, "scheduling_strategy": "SPREAD"}] * cards or [
        {"scheduling_strategy": NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)}
        for node in ray.nodes()
        if node["Alive"]
    ]
    niceness, threads = os.getpriority(os.PRIO_PROCESS, 0), os.environ.get("OMP_NUM_THREADS")
    once = {"num_cpus": 0, "max_restarts": 0, "max_task_retries": 0}
    host = ray.remote(CardHost)
    actors = [host.options(**once, **place).remote(niceness, threads, bool(cards)) for place in places]
    asked = {actor.seen.remote(): actor for actor in actors}
    up, late = ray.wait([*asked], num_returns=len(asked), timeout=_START_S)
    if late:
        raise Refused(
            f"cluster: of {len(asked)} cards {len(late)} did not answer in {_START_S:g} s; somebody else uses them, or "
            "their node is overloaded"
        )
    try:
        found = [HostedCard(asked[each], ray.get(each)) for each in up]
    except ray.exceptions.RayError as error:
        raise Refused(f"cluster: an actor could not be started: {_one_line(error, -1)}") from None
    found.sort(key=lambda card: (card.seen.host, card.seen.uuid or ""))
    _refuse_what_differs(found, niceness)
    return found


def _refuse_what_differs(found: Sequence[HostedCard], niceness: int) -> None:
    """Raise `Refused` where cards, or their hosts, differ from each other, or from this process."""
    first = found[0].seen
    ours = {"the code of qwen3bench": running_code().code, "niceness": str(niceness)}
    for card in found:
        theirs = {"the code of qwen3bench": card.seen.code, "niceness": card.seen.must_agree["niceness"]}
        refuse_difference(("this process", ours), (card.seen.host, theirs))
        refuse_difference((first.host, first.must_agree), (card.seen.host, card.seen.must_agree))
    uuids = [card.seen.uuid for card in found if card.seen.uuid]
    if twice := {uuid for uuid in uuids if uuids.count(uuid) > 1}:
        raise Refused(f"cluster: Ray gave out card {min(twice)} twice; start one Ray node on each machine")


def _one_line(error: Exception, which: int = 0) -> str:
    """A line of an error's text, the first unless another is asked for."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[which].strip()[:300]
