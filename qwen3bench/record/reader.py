"""The record of a run: append-only JSON lines, each with its schema version and its checksum."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
import re
import sys
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import psutil

from qwen3bench.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1
_NAME = "samples.jsonl"
_TAIL = b',"crc":"%08x"}'
_TAIL_BYTES = len(_TAIL % 0)
_BEGINNING = b'{"v":%d,"type":"run",' % SCHEMA
_MOMENT_S = 5.0
_MAX_NAMED = 20  # damaged lines that get a warning of their own; the rest are counted
_STALE = re.compile(r"\..+\.tmp-(\d{1,9})")

_PLAIN = {str, int, bool, type(None)}
_NUMBER = (int, float)
_TIMES = ("latency_s", "ttft_s", "tpot_s")
_LONGEST_S = 1e9  # no time is longer
_COUNTS = ("block", "copy", "process", "attempt", "position", "repeat")
_WHERE: dict[str, Any] = {"cell": str, "workload": str, "runtime": str}
# What a line of each type must hold to be usable. Any other field may be absent: not measured.
_REQUIRED: dict[str, dict[str, Any]] = {
    "run": {"config": dict, "factors": list, "cells": list, "workloads": list, "runtimes": list},
    "session": {},
    "process": {"process": int},
    "parameters": {"cell": str},
    "verify": {"cell": str, "equivalent": bool},
    "memory": _WHERE,
    "evidence": _WHERE,
    "cost": {"cell": str, "workload": str},
    "ceiling": {},
    "compile": _WHERE,
    "sample": {**_WHERE, "block": int, "latency_s": _NUMBER},
    "visit": {**_WHERE, "block": int},
    "block": {"workload": str, "runtime": str, "block": int, "state": str},
    "failure": {"cell": str, "status": str},
    "stop": {"workload": str, "runtime": str, "reason": str},
    "end": {"status": str},
}


def encode(line: dict[str, Any]) -> bytes:
    """One line of the record, with its version, checksum and newline.

    Raises ValueError where `line` could not be read back: an unknown type, a required field missing, a number
    that is not finite.
    """
    body = {"v": SCHEMA, "type": line.get("type")}
    body.update((key, value) for key, value in line.items() if key not in body)
    fault = "its type is unknown" if body["type"] not in _REQUIRED else _fault(body)
    if fault or "crc" in line:
        raise ValueError(f"no line of a record: {fault or 'crc is set'}: {line!r}")
    # ASCII alone: no byte that is no UTF-8, no character that some reader takes for the end of a line.
    text = json.dumps(body, separators=(",", ":"), allow_nan=False).encode("ascii")[:-1]
    return text + _TAIL % zlib.crc32(text) + b"\n"


def _fault(line: dict[str, Any]) -> str | None:
    """What makes a line of a known type unusable, in words; None where nothing does."""
    for field, kind in _REQUIRED[line["type"]].items():
        if not isinstance(line.get(field), kind):
            return f"{line['type']} without a proper {field}"
    for field in _COUNTS:
        value = line.get(field)
        if value is not None and not (type(value) is int and 0 <= value < 2**62):
            return f"{line['type']} with a {field} that is no count"
    if line["type"] == "sample":
        for field in _TIMES:
            value = line.get(field)
            if value is not None and not _is_time(value):
                return f"sample with a {field} that is not above zero"
        gaps = line.get("itl_s")
        if gaps is not None and not (isinstance(gaps, list) and all(map(_is_time, gaps))):
            return "sample with itl_s that are no times"
    if line["type"] == "run":
        for field in ("factors", "cells", "workloads", "runtimes"):
            if not all(isinstance(name, str) for name in line[field]):
                return f"run with {field} that are no names"
    return None


def _is_time(value: Any) -> bool:
    return isinstance(value, _NUMBER) and type(value) is not bool and 0 < value < _LONGEST_S


class RecordWriter:
    """The one writer of the record in a run's directory; a context manager.

    Entering makes the directory, takes a lock that dies with this process, and cuts a torn last line off.
    Raises `UserError` where the directory cannot be written, another process writes there, or what lies there is no
    record of this schema, which stays as it is. `last` is the last line appended.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.path = self.directory / _NAME
        self.last: dict[str, Any] = {}

    def __enter__(self) -> RecordWriter:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.directory / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(
                f"{self.directory}: cannot be written ({error.strerror}); name another directory with run.dir=DIR"
            ) from error
        try:
            self._take_lock()
            try:
                self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            except OSError as error:
                raise UserError(f"{self.path}: cannot be written ({error.strerror}); check its permissions") from error
            try:
                self._check_first_line()
                self._cut_torn_line()
                _sync_directory(self.directory)
            except BaseException:
                os.close(self._file)
                raise
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)
        # Closing alone is not enough while a child is being started. The file stays: all must lock the same.
        fcntl.flock(self._lock, fcntl.LOCK_UN)
        os.close(self._lock)

    @property
    def empty(self) -> bool:
        """Whether nothing is recorded yet, so that the `run` line is still to be written."""
        return os.fstat(self._file).st_size == 0

    def append(self, *lines: dict[str, Any]) -> None:
        """Writes lines to the disk, all or none, even where an interrupt strikes.

        Raises `UserError` where the disk refuses, ValueError where a line could not be read back.
        """
        data = memoryview(b"".join(map(encode, lines)))
        good_bytes = os.fstat(self._file).st_size
        try:
            while data:
                data = data[os.write(self._file, data) :]
            os.fsync(self._file)
            self.last = lines[-1]
        except BaseException as error:
            with contextlib.suppress(OSError):  # should this fail too, the next writer cuts the torn line off
                os.ftruncate(self._file, good_bytes)
            if isinstance(error, OSError):
                raise UserError(
                    f"{self.path}: cannot be written ({error.strerror}); "
                    f"what it holds is safe: make room and continue with resume={self.directory}"
                ) from error
            raise

    def _take_lock(self) -> None:
        try:
            self._lock_once_its_holder_is_gone()
        except BlockingIOError as error:
            holder = self._holder() or "unknown"
            raise UserError(
                f"{self.directory}: another run (process {holder}) is writing there; "
                "wait for it or name another directory with run.dir=DIR"
            ) from error
        except OSError as error:
            raise UserError(
                f"{self.directory}: cannot be locked ({error.strerror}); name a directory on a local disk"
            ) from error
        with contextlib.suppress(OSError):  # a full disk: the first append says so better
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, b"%d\n" % os.getpid(), 0)

    def _lock_once_its_holder_is_gone(self) -> None:
        """A child that a killed run was just starting has its lock for a moment longer; then the holder is dead."""
        deadline = time.monotonic() + _MOMENT_S
        while True:
            try:
                return fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = self._holder()
                if not holder.isdecimal() or psutil.pid_exists(int(holder)) or time.monotonic() > deadline:
                    raise
            time.sleep(0.02)

    def _holder(self) -> str:
        return os.pread(self._lock, 20, 0).decode("ascii", "replace").strip()

    def _check_first_line(self) -> None:
        """Refuse what is no record before anything of it is changed; a torn first line is what a run begins with."""
        if self.empty:
            return
        first = os.pread(self._file, len(_BEGINNING), 0)
        if not _BEGINNING.startswith(first):
            read_record(self.path)  # which says what it is
            raise UserError(f"{self.path}: is no record of a run; name another directory with run.dir=DIR")

    def _cut_torn_line(self) -> None:
        size = end = os.fstat(self._file).st_size
        while end and os.pread(self._file, 1, end - 1) != b"\n":
            start = max(0, end - 65536)
            newline = os.pread(self._file, end - start, start).rfind(b"\n")
            end = start + newline + 1
        if end < size:
            os.ftruncate(self._file, end)
            os.fsync(self._file)
            logging.getLogger(__name__).warning(
                "%s: the last line was torn (%d bytes) and is dropped; its step is done again",
                self.path,
                size - end,
            )


class Record:
    """What a run recorded: its lines by type, as they were written.

    `run` is the first line; `warnings` tells in words what was not usable.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run: dict[str, Any] = {}
        self.warnings: list[str] = []
        # Rows of (field names, values): a hundred thousand samples share their names, as dicts would not.
        self._rows: dict[str, list[tuple[tuple[str, ...], tuple[Any, ...]]]] = {}

    @property
    def types(self) -> dict[str, int]:
        """The number of usable lines of each type that occurs."""
        return {name: len(rows) for name, rows in self._rows.items()}

    def of(self, type_: str) -> list[dict[str, Any]]:
        """All usable lines of one type, in the order they were written."""
        return [dict(zip(*row, strict=True)) for row in self._rows.get(type_, ())]

    def frame(self, type_: str) -> pd.DataFrame:
        """All usable lines of one type as a DataFrame, in the order they were written.

        One column per field, without `v`, `type` and `crc`; what a line does not have is missing there.
        """
        import pandas as pd

        rows = self._rows.get(type_, [])
        shapes = dict.fromkeys(keys for keys, _ in rows)
        names = dict.fromkeys(name for keys in shapes for name in keys if name not in ("v", "type", "crc"))
        if len(shapes) != 1:
            return pd.DataFrame(self.of(type_), columns=list(names))
        (keys,) = shapes
        return pd.DataFrame({name: [row[i] for _, row in rows] for i, name in enumerate(keys) if name in names})


def read_record(path: str | Path) -> Record:
    """The record in a run's directory (or in the file itself), damaged lines dropped and named in `warnings`.

    Raises `UserError` where there is none, where its first line (which describes the run) is damaged, and
    where it has another schema.
    """
    record = Record(_find(Path(path)))
    names: dict[tuple[str, ...], tuple[str, ...]] = {}
    strings: dict[str, str] = {}
    damaged: list[str] = []
    unknown: dict[str, int] = {}
    number = 0
    for number, raw in enumerate(_lines(record.path), start=1):
        line = _decode(raw)
        if number == 1 and not (isinstance(line, dict) and (line["v"] != SCHEMA or line["type"] == "run")):
            raise UserError(
                f"{record.path}: is no record of a run, or its first line is damaged; "
                "name the directory of a run, or of a copy that is whole"
            )
        if isinstance(line, str):
            damaged.append(f"line {number}: {line}; it is dropped and not used")
        elif line["v"] != SCHEMA:
            raise UserError(
                f"{record.path}: has schema {line['v']} (line {number}), but this qwen3bench reads {SCHEMA}; "
                "use the version of qwen3bench that wrote it"
            )
        elif line["type"] not in _REQUIRED:
            unknown[line["type"]] = unknown.get(line["type"], 0) + 1
        elif fault := _fault(line):
            damaged.append(f"line {number}: {fault}; it is dropped and not used")
        else:
            if number == 1:
                record.run = line
            keys = tuple(line)
            values = [strings.setdefault(v, v) if type(v) is str else v for v in line.values()]
            record._rows.setdefault(sys.intern(line["type"]), []).append((names.setdefault(keys, keys), tuple(values)))
    if not number:
        raise UserError(f"{record.path}: is empty; nothing was recorded there")
    if not record.run:
        raise UserError(f"{record.path}: {damaged[0]}; without it the run cannot be read")
    record.warnings += damaged[:_MAX_NAMED]
    if len(damaged) > _MAX_NAMED:
        record.warnings.append(f"{len(damaged) - _MAX_NAMED} more damaged lines are dropped and not used")
    for name, count in unknown.items():
        record.warnings.append(f"{count} lines of the unknown type {name!r} are ignored")
    return record


def _find(path: Path) -> Path:
    try:
        if path.is_file() and path.name == "latest":  # see point_latest
            path = path.parent / path.read_text(encoding="utf-8", errors="replace").strip()
        file = path / _NAME if path.is_dir() else path
        if file.is_file():
            return file
    except (OSError, ValueError):  # a name that no file can have
        pass
    raise UserError(f"{path}: holds no record ({_NAME}); name the directory of a run")


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            yield from file
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error


def _decode(raw: bytes) -> dict[str, Any] | str:
    """The line as an object with a whole `v` and a string `type`, or what is wrong with it in words."""
    if not raw.endswith(b"\n"):
        return "is torn"
    text, tail = raw[: -_TAIL_BYTES - 1], raw[-_TAIL_BYTES - 1 : -1]
    if tail != _TAIL % zlib.crc32(text):
        return "the checksum does not match"
    try:
        line = json.loads(raw.decode("ascii"))
        finite = _finite(line)
    except (ValueError, RecursionError):
        return "is no JSON"
    if not finite:
        return "holds a number that is not finite"
    if not isinstance(line, dict) or type(line.get("v")) is not int or not isinstance(line.get("type"), str):
        return "is no line of a record"
    return line


def _finite(value: Any) -> bool:
    """Whether no number in a JSON value is NaN or infinite, as 1e999 is."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        value = value.values()
    # Most values are passed over here, without a call: reading a large record spends its time in this line.
    return type(value) in _PLAIN or all(_finite(item) for item in value if type(item) not in _PLAIN)


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Writes a whole file or leaves the old one whole, whatever happens meanwhile.

    Raises `UserError` where the disk refuses.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    # A lone surrogate (from a file name that is no UTF-8) must not cost the whole report.
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    try:
        with _removed_on_failure(temporary):
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)  # noqa: PTH105
        _sync_directory(path.parent)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); what was there is unchanged: "
            "check the room on the disk and the permissions"
        ) from error


def clean_stale(directory: str | Path) -> None:
    """Removes what processes that died inside `write_atomic` left under `directory`."""
    _remove_stale(Path(directory).rglob(".*.tmp-*"))


def _remove_stale(paths: Iterable[Path]) -> None:
    for path in paths:
        match = _STALE.fullmatch(path.name)
        # Process ids come again, in containers soon: a file under our own is of a process before us.
        if match and (int(match[1]) == os.getpid() or not psutil.pid_exists(int(match[1]))):
            with contextlib.suppress(OSError):
                path.unlink()


def point_latest(run_dir: str | Path) -> None:
    """Makes `latest` beside `run_dir` point at it.

    A symbolic link; where the file system has none, a file that holds the name. Raises `UserError` where the
    disk refuses.
    """
    run_dir = Path(run_dir).absolute()
    latest = run_dir.with_name("latest")
    if latest == run_dir:
        return
    _remove_stale(latest.parent.glob(".latest.tmp-*"))
    temporary = latest.with_name(f".latest.tmp-{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(run_dir.name)
    except (OSError, NotImplementedError):
        write_atomic(latest, run_dir.name + "\n")
        return
    try:
        with _removed_on_failure(temporary):
            os.replace(temporary, latest)  # noqa: PTH105
    except OSError as error:
        raise UserError(f"{latest}: cannot be replaced ({error.strerror}); move it away") from error


@contextlib.contextmanager
def _removed_on_failure(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _sync_directory(directory: Path) -> None:
    """Makes a new name in `directory` outlast a power cut; not every file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
