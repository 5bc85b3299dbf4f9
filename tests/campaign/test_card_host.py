"""What runs beside a card of a cluster, without the cluster: workers asked from an event loop."""

from __future__ import annotations

import asyncio
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import psutil
import pytest

from qwen3bench.campaign import card_host
from qwen3bench.campaign.card_host import CardHost
from qwen3bench.campaign.worker_process import WorkerProcess
from qwen3bench.record.environment import running_code
from qwen3bench.record.messages import CellFailure, Load, Probe, Touch
from qwen3bench.record.states import CellStatus

# Answers a probe with two variables of its environment, and a touch never; it writes to standard error first.
SCRIPT = """
import json, os, sys, time
for line in sys.stdin:
    print("a line of the log", file=sys.stderr, flush=True)
    op = json.loads(line)["op"]
    if op == "touch":
        time.sleep(3600)
    if op == "load":
        sys.exit(7)
    text = "|".join(str(os.environ.get(name)) for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"))
    print(json.dumps({"ok": {"device": text, "emulates_bfloat16": False}}), flush=True)
"""
ASK = Probe(device="auto")


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., CardHost]]:
    """Makes what hosts small workers; Ray's own number of threads is in its environment."""
    command = (sys.executable, "-I", "-S", "-c", SCRIPT)
    monkeypatch.setattr(card_host, "WorkerProcess", partial(WorkerProcess, command=command))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return lambda threads=None: CardHost(os.getpriority(os.PRIO_PROCESS, 0), threads, False)


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(("threads", "seen"), [(None, "None"), ("3", "3")])
def test_a_worker_has_the_drivers_threads_and_no_card_that_ray_did_not_give(
    host: Callable[..., CardHost], threads: str | None, seen: str
) -> None:
    async def asked() -> Any:
        here = host(threads)
        said = await here.ask(await here.start(), ASK)
        await here.close()
        return said

    said = asyncio.run(asked())
    assert said.answer.device == f"{seen}|"
    assert said.log == b"a line of the log\n"


def test_workers_are_asked_beside_each_other_and_one_that_hangs_is_ended(host: Callable[..., CardHost]) -> None:
    async def asked() -> None:
        here = host()
        hangs, answers = await here.start(), await here.start()
        pending = asyncio.ensure_future(here.ask(hangs, Touch()))
        await asyncio.sleep(0)
        for _ in range(3):
            assert (await asyncio.wait_for(here.ask(answers, ASK), 10)).answer.device
        await asyncio.wait_for(here.end(hangs), 10)
        assert gone(hangs)
        with pytest.raises(asyncio.CancelledError):
            await pending
        fresh = await here.start()  # may have the file numbers of the one that was ended
        assert (await asyncio.wait_for(here.ask(fresh, ASK), 10)).answer.device
        await here.close()
        assert gone(answers)
        assert gone(fresh)

    asyncio.run(asked())


def test_a_failure_comes_as_an_answer_and_as_it_was(host: Callable[..., CardHost]) -> None:
    async def asked() -> Any:
        here = host()

        said = await here.ask(await here.start(), Load(cells=("baseline",)))
        await here.close()
        return pickle.loads(pickle.dumps(said))

    failure = asyncio.run(asked()).answer
    assert isinstance(failure, CellFailure)
    assert failure.status == CellStatus.CRASHED
    assert "ended with exit status 7" in failure.reason
    assert "a line of the log" in failure.reason


def test_what_is_seen_of_a_card_says_what_must_agree(host: Callable[..., CardHost]) -> None:
    seen = asyncio.run(host().seen())
    assert seen.uuid is None
    assert seen.code == running_code().code
    assert seen.must_agree["torch"]
    assert seen.must_agree["niceness"] == str(os.getpriority(os.PRIO_PROCESS, 0))
    assert seen == pickle.loads(pickle.dumps(seen))
