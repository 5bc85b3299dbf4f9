"""The record loses nothing, invents nothing, and names what is damaged."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import lzma
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from records import lines_of

from qwen3bench.errors import UserError
from qwen3bench.record.files import clean_stale, point_latest, write_atomic
from qwen3bench.record.lines import (
    LINES,
    SCHEMA,
    EndLine,
    Line,
    MemoryLine,
    RunLine,
    SampleLine,
    VerifyLine,
    VisitLine,
    encode,
)
from qwen3bench.record.reader import read_record
from qwen3bench.record.states import EndStatus
from qwen3bench.record.typed import fields_of, made, plain
from qwen3bench.record.writer import RecordWriter

RUN = RunLine(
    config={"model": {"name": "tiny"}},
    factors=("flash", "tie"),
    cells=("baseline", "flash+tie"),
    workloads=("prefill",),
    runtimes=("eager",),
)
END = EndLine(status=EndStatus.FINISHED)
fuzz = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


WHERE = {"workload": "prefill", "runtime": "eager", "cell": "baseline", "copy": 0, "process": 1, "block": 0}


def sample(position: int = 0, **more: Any) -> SampleLine:
    return SampleLine(**{**WHERE, "position": position, "latency_s": 0.1 + position / 7, **more})


def seal(text: str) -> bytes:
    """A line with a true checksum around any text, made without the code under test."""
    body = text.encode().rstrip(b"}")
    return body + b',"crc":"' + f"{zlib.crc32(body):08x}".encode() + b'"}\n'


def written(directory: Path, *lines: Line) -> Path:
    with RecordWriter(directory) as writer:
        writer.append(RUN, *lines)
    return directory / "samples.jsonl"


def positions(path: Path) -> list[int]:
    return [line.position for line in read_record(path).of(SampleLine)]


def python(code: str, *args: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


# --- what is written is read ---


def test_reads_what_was_written(tmp_path: Path) -> None:
    hostile = sample(1, cell='=cmd|"\n\u2028\u0000\udc80</script>', ttft_s=None, itl_s=[0.1, 0.2], repeat=2**53 + 1)
    path = written(tmp_path, sample(0), hostile, END)

    record = read_record(tmp_path)

    assert record.of(SampleLine) == [sample(0), hostile]
    assert record.run == RUN
    assert record.types == {"run": 1, "sample": 2, "end": 1}
    assert record.warnings == []
    assert record.of(VerifyLine) == []
    assert path.read_bytes().count(b"\n") == 4


def test_line_has_the_published_form() -> None:
    line = encode(EndLine(status=EndStatus.FINISHED, time=1.5))

    body = b'{"v":1,"type":"end","status":"finished","time":1.5'
    assert line == body + b',"crc":"' + b"%08x" % zlib.crc32(body) + b'"}\n'


@pytest.mark.parametrize(
    "fields",
    [
        {"latency_s": 0.0},
        {"latency_s": -0.1},
        {"latency_s": float("nan")},
        {"latency_s": "0.1"},
        {"latency_s": True},
        {"ttft_s": 0},
        {"tpot_s": "fast"},
        {"cell": None},
        {"block": -1},
        {"copy": "x"},
        {"itl_s": [0.1, None]},
    ],
    ids=str,
)
def test_no_line_is_made_that_cannot_be_used(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        sample(**fields)


@pytest.mark.parametrize("kind", LINES.values(), ids=LINES)
def test_every_type_of_line_says_what_it_lacks(kind: type[Line]) -> None:
    needed = [f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING]  # type: ignore[arg-type]
    for name in needed:
        with pytest.raises(ValueError, match=name):
            made(kind, {})
        break
    else:
        assert made(kind, {}) is not None


def test_a_number_that_is_not_finite_is_refused_wherever_it_stands(tmp_path: Path) -> None:
    path = written(tmp_path)
    before = path.read_bytes()
    hostile = made(LINES["ceiling"], {"vendor": {"deep": [1.0, float("-inf")]}})
    with RecordWriter(tmp_path) as writer, pytest.raises(ValueError, match="JSON compliant"):
        writer.append(sample(), hostile)
    assert path.read_bytes() == before


def test_frame_has_a_column_per_field_and_keeps_order(tmp_path: Path) -> None:
    written(tmp_path, sample(0), sample(1), VisitLine(**WHERE))
    assert set(read_record(tmp_path).frame(SampleLine)) == {*WHERE, "position", "latency_s", "attempt"}
    assert read_record(tmp_path).frame(SampleLine)["latency_s"].tolist() == [0.1, 0.1 + 1 / 7]

    with RecordWriter(tmp_path) as writer:
        writer.append(sample(2, ttft_s=0.05), sample(3))
    frame = read_record(tmp_path).frame(SampleLine)

    assert frame["position"].tolist() == [0, 1, 2, 3]
    assert frame["ttft_s"].isna().tolist() == [True, True, False, True]
    assert read_record(tmp_path).frame(MemoryLine).empty


def test_resumed_record_continues_the_file(tmp_path: Path) -> None:
    with RecordWriter(tmp_path) as writer:
        assert writer.empty
    path = written(tmp_path, sample(0))
    before = path.read_bytes()

    with RecordWriter(tmp_path) as writer:
        assert not writer.empty
        writer.append(sample(1))

    assert path.read_bytes().startswith(before)
    assert positions(path) == [0, 1]


# --- torn and damaged files ---


def test_torn_last_line_is_dropped_and_cut_off_wherever_it_tore(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = written(tmp_path, sample(0), sample(1))
    whole = path.read_bytes()
    last = len(encode(sample(1)))
    for cut in range(1, last):
        path.write_bytes(whole[:-cut])

        record = read_record(path)
        assert [line.position for line in record.of(SampleLine)] == [0]
        assert len(record.warnings) == 1
        assert "line 3: is torn" in record.warnings[0]

        if 20 < cut < last - 20:
            continue
        caplog.clear()
        with RecordWriter(tmp_path) as writer:
            writer.append(sample(2))
        assert "torn" in caplog.text
        assert positions(path) == [0, 2]
        assert read_record(path).warnings == []


@pytest.mark.parametrize("content", [b"my own notes", b"my own\nnotes", b'{"v":2,"type":"run","crc":"1"}\n{"v":2,"ty'])
def test_what_is_no_record_is_refused_and_stays_as_it_is(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "samples.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=r"is no record|has schema 2|first line is damaged"), RecordWriter(tmp_path):
        raise AssertionError("taken for a record")
    assert (tmp_path / "samples.jsonl").read_bytes() == content


def test_long_torn_tail_is_cut_off(tmp_path: Path) -> None:
    path = written(tmp_path, sample(0))
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0" * 200_000)  # as a file system leaves it after a power cut

    with RecordWriter(tmp_path):
        assert path.read_bytes() == whole


def test_torn_first_line_leaves_an_empty_record(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_bytes(encode(RUN)[:-1])
    with pytest.raises(UserError, match="first line is damaged"):
        read_record(path)
    with RecordWriter(tmp_path) as writer:
        assert writer.empty


def test_every_flipped_bit_of_a_line_is_found_and_named(tmp_path: Path) -> None:
    path = written(tmp_path, *map(sample, range(4)))
    whole = path.read_bytes()
    start = whole.index(encode(sample(1)))
    end = start + len(encode(sample(1))) - 1  # its newline
    for place in range(start, end):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)

            record = read_record(path)

            assert [line.position for line in record.of(SampleLine)] == [0, 2, 3], (place, bit)
            assert record.warnings[0].startswith("line 3: the checksum does not match")

    damaged = bytearray(whole)
    damaged[end] ^= 1
    path.write_bytes(damaged)
    assert positions(path) == [0, 3]
    assert read_record(path).warnings[0].startswith("line 3: ")


def test_damaged_first_line_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, sample())
    whole = bytearray(path.read_bytes())
    whole[20] ^= 1
    path.write_bytes(whole)
    with pytest.raises(UserError, match="first line is damaged"):
        read_record(path)


def test_counts_damaged_lines_beyond_the_first_twenty(tmp_path: Path) -> None:
    path = written(tmp_path, sample())
    path.write_bytes(path.read_bytes() + b"rust\n" * 33)

    warnings = read_record(path).warnings

    assert len(warnings) == 21
    assert warnings[0].startswith("line 3: ")
    assert warnings[-1].startswith("13 more damaged lines")


@pytest.mark.parametrize("version", [SCHEMA + 1, 0, -1])
@pytest.mark.parametrize("type_", ["run", "end"])
def test_refuses_another_schema(tmp_path: Path, version: int, type_: str) -> None:
    path = tmp_path / "samples.jsonl"
    before = encode(RUN) if type_ == "end" else b""
    path.write_bytes(before + seal(json.dumps({"v": version, "type": type_, "status": "finished"})))
    with pytest.raises(UserError, match=f"schema {version} .*reads {SCHEMA}"):
        read_record(path)


def test_ignores_unknown_types_with_a_warning(tmp_path: Path) -> None:
    path = written(tmp_path, sample())
    path.write_bytes(path.read_bytes() + 2 * seal('{"v":1,"type":"mood"}'))

    record = read_record(path)

    assert record.types == {"run": 1, "sample": 1}
    assert record.warnings == ["2 lines of the unknown type 'mood' are ignored"]


@pytest.mark.parametrize(
    "text",
    [
        '{"v":1,"type":"sample","workload":"p","runtime":"e","cell":"c","block":0,"latency_s":NaN}',
        '{"v":1,"type":"sample","workload":"p","runtime":"e","cell":"c","block":0,"latency_s":1e999}',
        '{"v":1,"type":"sample","workload":"p","runtime":"e","cell":"c","block":0,"latency_s":-1}',
        '{"v":1,"type":"sample","workload":"p","runtime":"e","cell":"c","block":0}',
        '{"v":1,"type":"sample","workload":"p","runtime":"e","cell":"c","block":0,"latency_s":1e308}',
        '{"v":1,"type":"sample","workload":"p","runtime":"e","cell":"c","block":0,"latency_s":1,"copy":"x"}',
        '{"v":1,"type":"sample","workload":"p","runtime":"e","cell":"c","block":0,"latency_s":1,"process":[1]}',
        '{"v":1,"type":"sample","workload":"p","runtime":"e","cell":"c","block":-1,"latency_s":1}',
        '{"v":1,"type":"sample","workload":"p","runtime":"e","cell":"c","block":0,"latency_s":1,"itl_s":"abc"}',
        '{"v":1,"type":"sample","workload":"p","runtime":"e","cell":"c","block":0,"latency_s":1,"itl_s":[1,null]}',
        '{"v":1,"type":"ceiling","vendor":{"a":[[-1e999]]}}',
        '{"v":1,"type":["end"],"status":"finished"}',
        '{"v":true,"type":"end","status":"finished"}',
        '{"v":1,"type":"ceiling","vendor":' + "[" * 700 + "]" * 700 + "}",
        '{"v":1,"type":"ceiling","vendor":' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"v":1,"type":"end","status":"\xff"}',
        "5}",
    ],
    ids=lambda text: text[:60] + text[-9:],
)
def test_drops_a_line_with_a_true_checksum_that_makes_no_sense(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, sample())
    path.write_bytes(path.read_bytes() + seal(text))

    record = read_record(path)

    assert record.types == {"run": 1, "sample": 1}
    assert len(record.warnings) == 1
    assert record.warnings[0].startswith("line 3: ")


def test_refuses_what_is_no_record(tmp_path: Path) -> None:
    for content, why in [
        (b"", "is empty"),
        (b"\n", "is no record"),
        (b"cell,latency_s\nbaseline,1\n", "is no record"),
        (os.urandom(4096), "is no record"),
        (encode(END), "is no record"),
        (seal(json.dumps({"v": 1, "type": "run", **plain(RUN), "factors": [1, 2]})), "factors"),
    ]:
        (tmp_path / "samples.jsonl").write_bytes(content)
        with pytest.raises(UserError, match=why):
            read_record(tmp_path)
    (tmp_path / "empty").mkdir()
    for path in ("missing", "empty", "a\0b", "n" * 5000):
        with pytest.raises(UserError, match="holds no record"):
            read_record(tmp_path / path)
    with pytest.raises(UserError, match="holds no record"):
        read_record("/dev/null")


@fuzz
@given(st.binary(max_size=400))
def test_arbitrary_bytes_give_a_clear_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "samples.jsonl").write_bytes(content)
    with pytest.raises(UserError):
        read_record(tmp_path)


@fuzz
@given(st.data())
def test_no_damage_gives_a_wrong_number(tmp_path: Path, data: st.DataObject) -> None:
    lines = [sample(position) for position in range(5)]
    content = encode(RUN) + b"".join(map(encode, lines))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content)))
        end = data.draw(st.integers(start, min(len(content), start + 300)))
        copied = data.draw(st.integers(0, len(content)))
        new = data.draw(st.one_of(st.binary(max_size=20), st.just(content[copied : copied + 250])))
        content = content[:start] + new + content[end:]
    (tmp_path / "samples.jsonl").write_bytes(content)
    try:
        record = read_record(tmp_path)
    except UserError:
        return
    back = record.of(SampleLine)
    assert all(line in lines for line in back)
    assert len(record.frame(SampleLine)) == len(back)


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@fuzz
@given(st.dictionaries(st.sampled_from([*fields_of(sample()), "v", "type"]), json_values, max_size=4))
def test_any_values_under_a_true_checksum_are_used_whole_or_not_at_all(tmp_path: Path, values: dict[str, Any]) -> None:
    forged = {"v": 1, "type": "sample", **plain(sample()), **values}
    (tmp_path / "samples.jsonl").write_bytes(encode(RUN) + seal(json.dumps(forged)[:-1] + "}"))
    try:
        record = read_record(tmp_path)
    except UserError:
        event("another schema")
        return
    for line in record.of(SampleLine):
        assert plain(line) == {name: value for name, value in forged.items() if name in plain(line)}
        assert all(value is None for name, value in forged.items() if name not in ("v", "type", *plain(line)))
        assert 0 < line.latency_s < float("inf")
    record.frame(SampleLine)


# --- a disk that refuses ---


def test_full_device_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").symlink_to("/dev/full")
    with RecordWriter(tmp_path) as writer, pytest.raises(UserError, match=r"No space left.*resume="):
        writer.append(RUN)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_full_disk_leaves_whole_lines_and_recovers(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        (tmp_path / "filler").write_bytes(b"x" * 32_768)
        (tmp_path / "report.md").write_text("old")
        with RecordWriter(tmp_path) as writer:
            writer.append(RUN)
            done = 0
            with pytest.raises(UserError, match="No space left"):  # noqa: PT012
                for done in range(10_000):
                    writer.append(sample(done, repeat=0), sample(done, repeat=1))
            with pytest.raises(UserError, match="No space left"):
                write_atomic(tmp_path / "report.md", "new" * 20_000)
            assert (tmp_path / "report.md").read_text() == "old"
            assert positions(tmp_path) == [i for i in range(done) for _ in "ab"]
            assert read_record(tmp_path).warnings == []

            (tmp_path / "filler").unlink()
            writer.append(sample(done))
        assert positions(tmp_path)[-2:] == [done - 1, done]
        assert not list(tmp_path.glob(".*.tmp-*"))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_file_size_limit_leaves_whole_lines(tmp_path: Path) -> None:
    written(tmp_path, sample(0))
    (tmp_path / "old.md").write_text("old")
    code = """
import sys
from qwen3bench.record.files import write_atomic
from qwen3bench.record.lines import SessionLine
from qwen3bench.record.writer import RecordWriter
from qwen3bench.errors import UserError
line = SessionLine(command=("s" * 1500,))
with RecordWriter(sys.argv[1]) as writer:
    for act in (lambda: [writer.append(line, line) for _ in range(9)],
                lambda: write_atomic(sys.argv[1] + "/old.md", "x" * 9000)):
        try:
            act()
        except UserError as error:
            print(error)
"""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))  # noqa: E731
    result = python(code, tmp_path, preexec_fn=limit)

    assert result.stdout.count("File too large") == 2, result.stderr
    assert read_record(tmp_path).types == {"run": 1, "sample": 1, "session": 4}
    assert read_record(tmp_path).warnings == []
    assert (tmp_path / "old.md").read_text() == "old"


def test_unwritable_directory_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"cannot be written.*run\.dir="),
        RecordWriter(tmp_path / "file" / "run"),
    ):
        pass
    (tmp_path / "run" / "samples.jsonl").mkdir(parents=True)
    with pytest.raises(UserError, match=r"samples\.jsonl: cannot be written"), RecordWriter(tmp_path / "run"):
        pass


def test_failed_sync_takes_the_lines_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, sample(0))
    before = path.read_bytes()

    def fail(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with RecordWriter(tmp_path) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(UserError, match="Input/output error"):
                writer.append(sample(1))
        assert path.read_bytes() == before
        writer.append(sample(2))
    assert positions(path) == [0, 2]


def test_lines_of_one_append_go_out_in_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, write = [], os.write

    def counted(file: int, data: bytes) -> int:
        sizes.append(len(data))
        return write(file, data)

    with RecordWriter(tmp_path) as writer:
        monkeypatch.setattr(os, "write", counted)
        writer.append(RUN, sample(0), sample(1))
    assert sizes == [(tmp_path / "samples.jsonl").stat().st_size]


def test_short_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:7]))
    assert positions(written(tmp_path, sample(0), sample(1))) == [0, 1]


def test_interrupt_amid_a_write_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write = written(tmp_path, sample(0)), os.write

    def interrupted(file: int, data: bytes) -> int:
        write(file, data[:50])
        raise KeyboardInterrupt

    with RecordWriter(tmp_path) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", interrupted)
            with pytest.raises(KeyboardInterrupt):
                writer.append(sample(1))
        writer.append(EndLine(status=EndStatus.INTERRUPTED))
    assert read_record(path).types == {"run": 1, "sample": 1, "end": 1}
    assert read_record(path).warnings == []


# --- one writer ---

HOLD = """
import sys, time
from qwen3bench.record.writer import RecordWriter
with RecordWriter(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_second_process_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError) as refused, RecordWriter(tmp_path):
            pass
        assert str(tmp_path) in str(refused.value)
        assert f"process {holder.pid})" in str(refused.value)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    written(tmp_path, sample(0))


def test_lock_dies_though_a_child_lives_on(tmp_path: Path) -> None:
    code = """
import subprocess, sys
from qwen3bench.record.writer import RecordWriter
with RecordWriter(sys.argv[1]):
    subprocess.run([sys.executable, "-c", "print('held', flush=True); input()"], close_fds=False)
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        holder.kill()
        holder.wait()
        written(tmp_path, sample(0))
    finally:
        holder.communicate("\n")


def test_a_lock_that_outlives_its_dead_holder_for_a_moment_is_waited_for(tmp_path: Path) -> None:
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    lock = os.open(tmp_path / ".lock", os.O_RDWR | os.O_CREAT)
    os.pwrite(lock, gone.stdout, 0)
    fcntl.flock(lock, fcntl.LOCK_EX)
    threading.Timer(0.3, os.close, [lock]).start()
    with RecordWriter(tmp_path) as writer:
        assert writer.empty


def test_lock_is_free_after_closing_though_a_copy_lives_on(tmp_path: Path) -> None:
    with RecordWriter(tmp_path) as writer:
        copy = os.dup(writer.lock)  # as a child has it between its fork and its exec
    try:
        written(tmp_path, sample(0))
    finally:
        os.close(copy)


def test_refused_writer_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    with RecordWriter(tmp_path) as writer:
        writer.append(RUN)
        path.write_bytes(path.read_bytes() + b'{"half')  # what a reader may see amid a write
        with pytest.raises(UserError, match=f"process {os.getpid()}"), RecordWriter(tmp_path):
            pass
        assert path.read_bytes().endswith(b'{"half')


# --- derived files ---


def test_writes_text_and_bytes(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a.md", "é\udc80")
    write_atomic(tmp_path / "b.bin", b"\x89\x00")
    write_atomic(str(tmp_path / "b.bin"), b"new")
    assert (tmp_path / "a.md").read_bytes() == "é\\udc80".encode()
    assert (tmp_path / "b.bin").read_bytes() == b"new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.md", "b.bin"]
    with pytest.raises(UserError, match="cannot be written"):
        write_atomic(tmp_path / "missing" / "a.md", "text")


def test_death_before_the_rename_leaves_the_old_file_and_a_stale_one(tmp_path: Path) -> None:
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "a.svg").write_text("old")
    code = """
import os, sys
from qwen3bench.record.files import write_atomic
os.replace = lambda *_: os._exit(9)
write_atomic(sys.argv[1], "new" * 1000)
"""
    assert python(code, tmp_path / "plots" / "a.svg").returncode == 9
    stale = list(tmp_path.rglob(".*.tmp-*"))
    assert [path.read_text() for path in stale] == ["new" * 1000]
    assert (tmp_path / "plots" / "a.svg").read_text() == "old"

    (tmp_path / f".b.md.tmp-{os.getppid()}").write_text("of a live process")
    (tmp_path / f".c.md.tmp-{os.getpid()}").write_text("of an earlier process with our id")
    (tmp_path / ".notes.tmp-mine").write_text("not ours")
    clean_stale(tmp_path)

    left = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert left == sorted(["a.svg", f".b.md.tmp-{os.getppid()}", ".notes.tmp-mine"])


@pytest.mark.parametrize("links", [True, False])
def test_latest_points_at_the_newest_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    if not links:
        monkeypatch.setattr(Path, "symlink_to", refuse)
    for number, name in enumerate(["first", "second"]):
        written(tmp_path / "results" / name, sample(number))
        point_latest(tmp_path / "results" / name)
    latest = tmp_path / "results" / "latest"
    assert latest.is_symlink() is links
    assert positions(latest) == [1]

    (tmp_path / "results").rename(tmp_path / "moved")
    assert positions(tmp_path / "moved" / "latest") == [1]
    assert sorted(path.name for path in (tmp_path / "moved").iterdir()) == ["first", "latest", "second"]


def test_latest_never_replaces_a_directory(tmp_path: Path) -> None:
    written(tmp_path / "latest", sample(3))
    written(tmp_path / "run", sample(4))
    point_latest(tmp_path / "latest")
    with pytest.raises(UserError, match="latest: cannot be replaced"):
        point_latest(tmp_path / "run")
    assert positions(tmp_path / "latest") == [3]
    assert not list(tmp_path.glob(".*.tmp-*"))


def test_reader_needs_neither_torch_nor_pandas() -> None:
    code = "import sys, qwen3bench.record.reader; print({'torch', 'pandas'} & set(sys.modules))"
    assert python(code).stdout == "set()\n"


# --- compressed ---


def test_a_finished_record_may_be_kept_compressed(tmp_path: Path) -> None:
    path = written(tmp_path, sample(0), sample(1), END)
    (tmp_path / "samples.jsonl.xz").write_bytes(lzma.compress(path.read_bytes()))
    plain_lines = read_record(tmp_path).of(SampleLine)
    path.unlink()
    assert read_record(tmp_path).of(SampleLine) == plain_lines
    with pytest.raises(UserError, match=r"compressed.*run\.dir"), RecordWriter(tmp_path):
        pass
    whole = (tmp_path / "samples.jsonl.xz").read_bytes()
    for content in (whole[:-20], whole[:60] + b"\0" + whole[61:], b"", b"no xz"):
        (tmp_path / "samples.jsonl.xz").write_bytes(content)
        with pytest.raises(UserError, match=r"samples\.jsonl\.xz: (cannot be decompressed|is empty)"):
            read_record(tmp_path)


# --- what stands twice, and what is no record at all ---


def test_what_stands_twice_counts_once_and_is_named(tmp_path: Path) -> None:
    where = {"workload": "prefill", "runtime": "eager"}
    lines = lines_of(
        [
            {"type": "parameters", "cell": "baseline", "num_parameters": 7},
            {"type": "verify", "cell": "baseline", "equivalent": True},
            {"type": "memory", "cell": "baseline", **where, "peak_allocated_bytes": 7},
            {"type": "evidence", "cell": "baseline", **where, "kernel_launches": 7},
            {"type": "sample", **WHERE, "position": 0, "repeat": 0, "latency_s": 0.1},
            {"type": "visit", **WHERE, "position": 0, "samples": 1},
            {"type": "block", **where, "block": 0, "state": "ok"},
            {"type": "failure", "cell": "flash", "status": "oom", "pass": "verify"},
            {"type": "stop", **where, "reason": "target"},
        ]
    )
    path = written(tmp_path, *lines)
    for line in lines:
        later = {**plain(line), "reason": "max_blocks", "status": "crashed", "equivalent": False, "latency_s": 9.0}
        later |= {
            "state": "flagged",
            "peak_allocated_bytes": 9,
            "num_parameters": 9,
            "kernel_launches": 9,
            "samples": 9,
        }
        with path.open("ab") as file:
            file.write(3 * encode(made(type(line), later)))
    with path.open("ab") as file:
        file.write(encode(dataclasses.replace(RUN, factors=())))

    record = read_record(path)

    for line in lines:
        assert record.of(type(line)) == [line]
    assert record.run == RUN
    assert len(record.warnings) == len(lines) + 1
    assert "3 sample lines (line 23 first) tell again" in " ".join(record.warnings)


def test_what_a_run_may_write_twice_counts_as_it_is(tmp_path: Path) -> None:
    attempts = [sample(0, attempt=attempt, repeat=0) for attempt in (0, 1)]
    repeats = [sample(1, repeat=repeat) for repeat in (0, 1)]
    copies = [sample(2, copy=copy, repeat=0) for copy in (0, 1)]
    compiled = [made(LINES["compile"], {**WHERE, "seconds": 1.0})] * 2  # of the baseline and its copy
    written(tmp_path, *attempts, *repeats, *copies, *compiled, END, END)
    record = read_record(tmp_path)
    assert record.types == {"run": 1, "sample": 6, "compile": 2, "end": 2}
    assert record.warnings == []


def endless(path: Path) -> None:
    with path.open("ab") as file:
        file.truncate(10 * 2**30)  # sparse: it takes no room


def many_lines(path: Path) -> None:
    path.write_bytes(encode(RUN) + b"\n" * 2**21)


@pytest.mark.parametrize("spoil", [endless, many_lines])
@pytest.mark.parametrize("whole", [True, False], ids=["behind a whole record", "alone"])
def test_a_record_without_an_end_is_one_clear_line(tmp_path: Path, spoil: Callable[[Path], None], whole: bool) -> None:
    path = written(tmp_path, sample()) if whole else tmp_path / "samples.jsonl"
    spoil(path)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"which no run writes|over 100,000 damaged lines"):
        read_record(tmp_path)
    assert time.monotonic() - started < 10
    if spoil is endless:
        with pytest.raises(UserError, match="which no run writes"), RecordWriter(tmp_path):
            raise AssertionError("taken for a record")
        assert path.stat().st_size == 10 * 2**30  # and nothing of it was cut off


def test_a_compressed_record_without_an_end_is_one_clear_line(tmp_path: Path) -> None:
    bomb = lzma.LZMACompressor(preset=0)
    with (tmp_path / "samples.jsonl.xz").open("wb") as file:
        file.write(bomb.compress(encode(RUN)))
        for _ in range(2**6):
            file.write(bomb.compress(bytes(2**20)))
        file.write(bomb.flush())
    with pytest.raises(UserError, match="which no run writes"):
        read_record(tmp_path)


def test_a_record_larger_than_any_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen3bench.record.reader.RECORD_LIMIT_BYTES", 1000)
    written(tmp_path, *map(sample, range(9)))
    with pytest.raises(UserError, match="holds over 1,000 bytes, which no run writes"):
        read_record(tmp_path)


def test_a_first_line_nested_deep_is_one_clear_line(tmp_path: Path) -> None:
    for depth in (500, 100_000):
        deep = '{"v":1,"type":"run","config":' + '{"a":' * depth + "1" + "}" * depth + ',"x":1}'
        (tmp_path / "samples.jsonl").write_bytes(seal(deep))
        with pytest.raises(UserError, match="nested too deep"):
            read_record(tmp_path)


@pytest.mark.parametrize("name", ["samples.jsonl", "samples.jsonl.xz", "latest"])
def test_a_pipe_is_no_record_and_is_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="holds no record"):
        read_record(tmp_path / name if name == "latest" else tmp_path)
    if name != "latest":
        with pytest.raises(UserError, match=r"is a pipe|holds a finished run"), RecordWriter(tmp_path):
            raise AssertionError("taken for a record")


def test_a_file_latest_names_a_run_beside_it_and_nothing_else(tmp_path: Path) -> None:
    written(tmp_path / "elsewhere")
    (tmp_path / "results").mkdir()
    latest = tmp_path / "results" / "latest"
    latest.write_text(str(tmp_path / "elsewhere"))
    with pytest.raises(UserError, match="holds no record"):
        read_record(latest)
    endless(latest)
    with pytest.raises(UserError, match="holds no record"):
        read_record(latest)


# --- removed while it runs ---


def removed(directory: Path) -> None:
    shutil.rmtree(directory)


def removed_and_made_again(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.mkdir()
    (directory / "samples.jsonl").touch()


def moved(directory: Path) -> None:
    directory.rename(directory.with_name("away"))


@pytest.mark.parametrize(
    ("lose", "told"),
    [
        (removed, "was removed .* what it held is lost"),
        (removed_and_made_again, "was removed .* what it held is lost"),
        (moved, "was moved away"),
    ],
)
def test_a_directory_that_is_removed_while_it_is_written_is_named(
    tmp_path: Path, lose: Callable[[Path], None], told: str
) -> None:
    with RecordWriter(tmp_path / "run") as writer:
        writer.append(RUN)
        lose(tmp_path / "run")
        with pytest.raises(UserError, match=told):
            writer.append(sample())
