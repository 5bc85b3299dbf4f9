"""The supervisor's end of a worker: whatever the other end does becomes an answer or one reason."""

from __future__ import annotations

import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3bench.campaign.worker_process import WorkerProcess
from qwen3bench.errors import UserError
from qwen3bench.record.messages import (
    REQUESTS,
    CellFailure,
    DeviceFound,
    Load,
    MeasureMemory,
    Probe,
    Request,
    Touch,
    Visit,
    decode_reply,
    decode_request,
    encode_reply,
    encode_request,
)

SOURCE = Path(__file__).parents[2]
Talk = Callable[[str], WorkerProcess]


@pytest.fixture
def talk(tmp_path: Path) -> Iterator[Talk]:
    """A worker that runs a line of Python; `r()` in it reads a request, `w(text)` writes."""
    workers = []
    head = "import os, signal, sys, time; r = sys.stdin.readline; w = lambda text: os.write(1, text.encode('latin-1'))"

    def start(code: str) -> WorkerProcess:
        worker = WorkerProcess(tmp_path / "worker.log", (sys.executable, "-I", "-S", "-c", f"{head}\n{code}"))
        workers.append(worker)
        return worker

    yield start
    for worker in workers:
        worker.end()


def _gone(pid: int, limit_s: float = 5.0) -> bool:
    deadline = time.monotonic() + limit_s
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_it_answers_one_request_after_another(talk: Talk) -> None:
    worker = talk("""import json
while line := r(): w('{"ok":' + json.dumps({'device': line.strip()}) + '}\\n')""")
    for asked in (Probe(device="first"), Probe(device="é\n")):
        assert decode_request(worker.ask(asked, 10).device.encode()) == asked


def test_a_second_line_answers_no_later_request(talk: Talk) -> None:
    worker = talk("""r(); w('{"ok":{}}\\n{"ok":{"stale":1}}\\n'); r(); r()""")
    worker.ask(Touch(), 10)
    with pytest.raises(CellFailure, match="said what it was not asked, before probe"):
        worker.ask(Probe(device="cpu"), 10)


def test_a_line_that_comes_late_answers_no_later_request(talk: Talk) -> None:
    worker = talk("""r(); w('{"ok":{}}\\n'); time.sleep(0.1); w('{"ok":{"stale":1}}\\n'); r(); r()""")
    worker.ask(Touch(), 10)
    select.select([worker], [], [], 10)
    with pytest.raises(CellFailure, match="said what it was not asked, before probe"):
        worker.ask(Probe(device="cpu"), 10)


def test_an_answer_in_pieces_and_one_of_a_megabyte_are_read_whole(talk: Talk) -> None:
    worker = talk("""r(); w('{"ok":'); time.sleep(0.1); w('{"device":"'); sys.stdout.write('x' * 2**20 + '"}}\\n')
sys.stdout.flush(); r()""")
    assert worker.ask(Probe(device="cpu"), 10) == DeviceFound(device="x" * 2**20)


@pytest.mark.parametrize(
    ("code", "status", "reason"),
    [
        ("sys.exit(3)", "crashed", "the worker ended with exit status 3 without an answer"),
        ("r(); print('first\\nlast words', file=sys.stderr); sys.exit(0)", "crashed", "status 0 .*: last words$"),
        ("r(); os.kill(os.getpid(), signal.SIGSEGV)", "crashed", "was ended by SIGSEGV"),
        ("r(); os.kill(os.getpid(), 35)", "crashed", "was ended by signal 35|SIGRTMIN"),
        ("r(); w('half an answer'); sys.exit(0)", "crashed", "ended with exit status 0 without an answer"),
        ("r(); time.sleep(60)", "timeout", "the worker said nothing for 0.5 s during touch"),
        ("r()\nwhile True: w('x'); time.sleep(0.01)", "timeout", "the worker said nothing for 0.5 s during touch"),
        ("r(); w('{\"ok\":[]}\\n'); r()", "crashed", "the worker's answer to touch is no message"),
    ],
)
def test_whatever_goes_wrong_is_one_reason(talk: Talk, code: str, status: str, reason: str) -> None:
    with pytest.raises(CellFailure, match=reason) as caught:
        talk(code).ask(Touch(), 0.5 if status == "timeout" else 20)
    assert caught.value.status == status


def test_an_answer_that_was_waited_for_elsewhere_is_late_by_the_time_since_it_was_asked_for(talk: Talk) -> None:
    worker = talk("r(); time.sleep(60)")
    worker.send(Touch())
    time.sleep(0.3)
    with pytest.raises(CellFailure, match=r"said nothing for (0\.[3-9]|[1-9]\S*) s during touch"):
        worker.receive(Touch(), 0.0)


def test_a_worker_that_closes_its_output_and_lives_on_is_not_waited_for(
    talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen3bench.campaign.worker_process.END_S", 0.2)
    with pytest.raises(CellFailure, match="closed its output"):
        talk("r(); os.close(1); time.sleep(60)").ask(Touch(), 20)


def test_an_answer_without_end_is_cut_off(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen3bench.campaign.worker_process.MAX_BYTES", 10_000)
    with pytest.raises(CellFailure, match="has no end"):
        talk("r()\nwhile True: w('x' * 4096)").ask(Touch(), 20)


def test_refusals_are_the_users_and_errors_the_cells(talk: Talk) -> None:
    worker = talk("""r(); w('{"error":{"status":"refused","reason":"no such file; name another"}}\\n')
r(); w('{"error":{"status":"oom","reason":"too much","peak_allocated_bytes":7}}\\n'); r()""")
    with pytest.raises(UserError, match="no such file; name another"):
        worker.ask(Load(cells=("a",)), 20)
    with pytest.raises(CellFailure, match="too much") as caught:
        worker.ask(MeasureMemory(cell="a", workload="prefill", runtime="eager"), 20)
    assert (caught.value.status, caught.value.peak_allocated_bytes) == ("oom", 7)


def test_end_ends_the_whole_group_and_once(talk: Talk) -> None:
    worker = talk('child = os.fork()\nif child: r(); w(\'{"ok":{"device":"%d"}}\\n\' % child)\ntime.sleep(60)')
    child = int(worker.ask(Probe(device="cpu"), 20).device)
    assert os.getpgid(child) == worker.pid
    assert os.getpgid(child) != os.getpgid(0)  # Ctrl-C in the terminal is the supervisor's alone
    worker.end()
    assert _gone(worker.pid)
    assert _gone(child)
    worker.end()


def test_waiting_takes_no_processor_time(talk: Talk) -> None:
    worker = talk("r(); time.sleep(1); w('{\"ok\":{}}\\n'); r()")
    before = time.process_time()
    worker.ask(Touch(), 20)
    assert time.process_time() - before < 0.1


PARENT = """
import os, sys, time
from pathlib import Path
from qwen3bench.campaign.worker_process import WorkerProcess
from qwen3bench.record.messages import Probe
worker = WorkerProcess(Path(sys.argv[1]))
worker.ask(Probe(device="cpu"), 100)
if os.fork() == 0:  # holds the worker's pipes open, so that no end of file tells it
    time.sleep(60)
print(worker.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.slow
def test_the_real_worker_dies_with_its_supervisor(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    arguments = [sys.executable, "-c", PARENT, str(tmp_path / "worker.log")]
    parent = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, start_new_session=True, text=True)
    try:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        os.kill(worker, signal.SIGTERM)  # a machine that shuts down: the supervisor's business
        time.sleep(0.2)
        assert psutil.Process(worker).status() != psutil.STATUS_ZOMBIE
        parent.kill()
        assert _gone(worker)
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
        parent.wait()


# Arbitrary answers

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
ASKED: list[Request[object]] = [
    Probe(device="cpu"),
    MeasureMemory(cell="a", workload="prefill", runtime="eager"),
    Visit(cell="a", copy=0),
    *(REQUESTS[op](**fields) for op, fields in (("identify", {}), ("verify", {"cell": "a"}), ("ceilings", {}))),
]
FIELDS = sorted({field.name for request in REQUESTS.values() for field in dataclasses.fields(request.reply)})


def _accepted(line: bytes, request: Request[object]) -> object:
    try:
        return decode_reply(line, request)
    except (CellFailure, UserError):
        return None


@given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()), st.sampled_from(ASKED))
def test_arbitrary_bytes_are_an_answer_or_one_reason(line: bytes, request: Request[object]) -> None:
    assert isinstance(_accepted(line, request), request.reply | None)


ANSWERS = st.dictionaries(st.sampled_from([*FIELDS, "other"]), JSON, max_size=6)


@pytest.mark.slow
@given(
    st.fixed_dictionaries({"ok": ANSWERS}) | st.fixed_dictionaries({"error": ANSWERS | JSON}), st.sampled_from(ASKED)
)
@settings(max_examples=300)
def test_what_is_accepted_is_typed_and_said_again_the_same(message: object, request: Request[object]) -> None:
    reply = _accepted(json.dumps(message).encode(), request)
    if reply is not None:
        assert decode_reply(encode_reply(reply), request) == reply


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("time", None),
        ("time", "1"),
        ("time", True),
        ("samples", {}),
        ("samples", [{}]),
        ("samples", [{"latency_s": 0}]),
        ("samples", [{"latency_s": -1.0}]),
        ("samples", [{"latency_s": "1"}]),
        ("samples", [{"latency_s": True}]),
        ("samples", [{"latency_s": 1, "itl_s": [1, None]}]),
        ("samples", [{"latency_s": 1, "ttft_s": [1]}]),
    ],
)
def test_what_others_rely_on_is_refused_where_it_is_of_another_kind(field: str, value: object) -> None:
    good = {"time": 1.5, "samples": [{"latency_s": 1}]}
    assert _accepted(json.dumps({"ok": good}).encode(), Visit(cell="a", copy=0)) is not None
    with pytest.raises(CellFailure, match="is no message"):
        decode_reply(json.dumps({"ok": {**good, field: value}}).encode(), Visit(cell="a", copy=0))


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999", "[" * 100_000, "1" * 5000])
def test_numbers_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(CellFailure, match="is no message"):
        decode_reply(f'{{"ok":{{"time":1,"samples":[{{"latency_s":{text}}}]}}}}'.encode(), Visit(cell="a", copy=0))


def test_a_request_is_read_as_it_was_asked() -> None:
    for request in ASKED:
        assert decode_request(encode_request(request)) == request
    for line in (b'{"op":"unheard of"}', b'{"op":["visit"]}', b'{"op":"visit"}', b'{"op":"probe","device":NaN}', b"[]"):
        with pytest.raises(ValueError, match=r"no request|missing|finite|object"):
            decode_request(line)
