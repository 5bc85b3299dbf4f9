"""The handle of a worker that an actor hosts, with an actor in this process, and what is refused of a cluster."""

from __future__ import annotations

import select
import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwen3bench.campaign.card_host import CardSeen, WorkerSaid
from qwen3bench.campaign.cluster import HostedCard, refuse_difference
from qwen3bench.campaign.scheduler import CardGoneError
from qwen3bench.campaign.worker_process import answers
from qwen3bench.errors import Refused, UserError
from qwen3bench.record.environment import running_code
from qwen3bench.record.lines import Telemetry
from qwen3bench.record.messages import CellFailure, Done, Open, RunningCode, Touch
from qwen3bench.record.states import CellStatus

ray = pytest.importorskip("ray")
OPEN = Open(config={}, config_dir=None, import_path=(), own_code={})


class Actor:
    """Answers at once what `at_once` has; everything else waits in `pending` for the test."""

    def __init__(self, **at_once: Any) -> None:
        self.at_once = {"start": 11, "end": None, **at_once}
        self.pending: list[Future[Any]] = []
        self.asked: list[str] = []

    def __getattr__(self, method: str) -> Any:
        def remote(*_: Any) -> Any:
            self.asked.append(method)
            future: Future[Any] = Future()
            if method not in self.at_once:
                self.pending.append(future)
            elif isinstance(answer := self.at_once[method], Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)
            return SimpleNamespace(future=lambda: future)

        return SimpleNamespace(remote=remote)


@pytest.fixture
def hosted() -> Callable[..., tuple[Actor, HostedCard]]:
    def make(**at_once: Any) -> tuple[Actor, HostedCard]:
        actor = Actor(**at_once)
        return actor, HostedCard(actor, CardSeen("node-a", running_code().code, None, 0, {}))

    return make


def readable(worker: Any) -> bool:
    return bool(select.select([worker], [], [], 0)[0])


def test_an_answer_is_heard_of_and_brings_the_log(hosted: Callable[..., Any], tmp_path: Path) -> None:
    actor, card = hosted()
    with card.start(tmp_path / "worker.log") as worker:
        assert worker.pid == 11
        for number in range(3):
            worker.send(Touch())
            assert not readable(worker)
            actor.pending[-1].set_result(WorkerSaid(Done(), b"%d\n" % number))
            assert readable(worker)
            assert worker.receive(Touch(), 5) == Done()
            assert not readable(worker)
    assert (tmp_path / "worker.log").read_bytes() == b"0\n1\n2\n"
    assert actor.asked[-1] == "end"


def test_a_failure_or_a_refusal_there_is_one_here(hosted: Callable[..., Any], tmp_path: Path) -> None:
    for error in (CellFailure(CellStatus.OOM, "out of memory", 5), UserError("no such peer")):
        _, card = hosted(ask=WorkerSaid(error, b""))
        with card.start(tmp_path / "worker.log") as worker, pytest.raises(type(error)) as raised:
            worker.ask(Touch(), 5)
        assert raised.value is error


def test_a_worker_that_says_nothing_is_late_and_its_answer_no_longer_heard(
    hosted: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    actor, card = hosted()
    worker = card.start(tmp_path / "worker.log")
    with pytest.raises(CellFailure, match=r"said nothing for 0\.05 s during touch") as late:
        worker.ask(Touch(), 0.05)
    assert late.value.status == CellStatus.TIMEOUT
    worker.end()
    actor.pending[-1].set_result(WorkerSaid(Done(), b""))  # a socket that is closed is not written to
    assert not caplog.records  # where a future tells what its callback raised
    worker.end()
    assert actor.asked == ["start", "ask", "end"]


def test_what_is_asked_of_a_card_that_is_gone_fails_at_once(hosted: Callable[..., Any], tmp_path: Path) -> None:
    actor, card = hosted(ask=ray.exceptions.ActorUnavailableError("it is gone", None), look=Telemetry(power_w=3.0))
    assert card.sample().power_w == 3.0
    worker = card.start(tmp_path / "worker.log")
    with pytest.raises(CardGoneError, match=r"is gone \(node-a: ActorUnavailableError\)"):
        worker.ask(Touch(), 5)
    before = len(actor.asked)
    another = card.start(tmp_path / "worker.log")
    for each in (worker, another):
        with pytest.raises(CardGoneError):
            each.ask(Touch(), 5)
        each.end()
    assert card.sample() == Telemetry()
    assert len(actor.asked) == before


def test_workers_on_several_cards_are_waited_for_together(hosted: Callable[..., Any], tmp_path: Path) -> None:
    (actor, card), (_, gone) = hosted(), hosted(start=ray.exceptions.ActorUnavailableError("it is gone", None))
    first, second, lost = (each.start(tmp_path / "worker.log") for each in (card, card, gone))
    said = answers({first: [Touch()], second: [Touch()], lost: [Touch(), Touch()]}, 5)
    assert next(said) == (lost, Touch(), None)
    for future in actor.pending[::-1]:  # the second one first
        future.set_result(WorkerSaid(Done(), b""))
    assert {worker for worker, _, answer in said if answer == Done()} == {first, second}


def test_a_worker_with_other_code_is_refused(hosted: Callable[..., Any], tmp_path: Path) -> None:
    for code, refused in ((running_code().code, False), ("0" * 64, True)):
        _, card = hosted(ask=WorkerSaid(RunningCode(package="/elsewhere", code=code), b""))
        with card.start(tmp_path / "worker.log") as worker:
            if refused:
                with pytest.raises(UserError, match="code of qwen3bench has changed on node-a"):
                    worker.ask(OPEN, 5)
            else:
                assert worker.ask(OPEN, 5).package == "/elsewhere"


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"torch": "2.12", "driver": "570", "kind": "H100", "weights": "sha256:" + "a" * 64}, "torch (2.12, not 2.13)"),
        ({"torch": "2.13", "driver": "580", "kind": "H100", "weights": "sha256:" + "a" * 64}, "driver (580, not 570)"),
        ({"torch": "2.13", "driver": "570", "kind": "H200", "weights": "sha256:" + "a" * 64}, "kind (H200, not H100)"),
        ({"torch": "2.13", "driver": "570", "kind": "H100", "weights": "sha256:" + "b" * 64}, "weights\n"),
        ({"torch": "2.13", "kind": "H100", "weights": "sha256:" + "a" * 64}, "driver (None, not 570)"),
    ],
)
def test_machines_that_differ_are_refused_with_what_differs(other: dict[str, str | None], told: str) -> None:
    ours = {"torch": "2.13", "driver": "570", "kind": "H100", "weights": "sha256:" + "a" * 64}
    refuse_difference(("node-a", ours), ("node-b", {**ours}))
    refuse_difference(("node-a", {**ours, "CPU governor": "powersave"}), ("node-b", ours))  # one does not know it
    with pytest.raises(Refused) as refused:
        refuse_difference(("node-a", ours), ("node-b", other))
    assert f"node-b differs from node-a: {told}" in f"{refused.value}\n"


def test_a_missing_ray_says_what_to_install(measure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    for name in ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_worker_niceness", "RAY_AUTH_MODE"):
        monkeypatch.setenv(name, "as it was")
    done = measure("cluster=ray")
    assert "cluster=ray needs Ray" in done.error
    assert "pip install 'qwen3bench[cluster]'" in done.error
    assert not done.directory.exists()


@pytest.mark.parametrize("where", ["devices=all", "device=cuda:1"])
def test_two_answers_to_where_are_refused(measure: Callable[..., Any], where: str) -> None:
    assert "both say where to measure" in measure("cluster=ray", where).error


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1:99999"])
def test_an_address_where_no_cluster_is_is_refused(measure: Callable[..., Any], address: str) -> None:
    done = measure("cluster=ray", f"cluster.address={address}")
    assert f"cluster.address={address}: no Ray cluster answers" in done.error
    assert not done.directory.exists()
