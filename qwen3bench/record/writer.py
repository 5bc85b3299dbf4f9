"""The one writer of a run's record: it appends, under a lock, and never rewrites."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import stat
import time
from pathlib import Path
from types import TracebackType

import psutil

from qwen3bench.errors import UserError
from qwen3bench.record.files import COMPRESSED, RECORD, sync_directory
from qwen3bench.record.lines import SCHEMA, Line, encode
from qwen3bench.record.reader import LINE_LIMIT_BYTES, read_record

_BEGINNING = b'{"v":%d,"type":"run",' % SCHEMA
_MOMENT_S = 5.0  # a child that a killed run was just starting has its lock for less


class RecordWriter:
    """The one writer of the record in a run's directory; a context manager.

    Entering makes the directory, takes a lock that dies with this process, and cuts a torn last line off.
    Raises `UserError` where the directory cannot be written, another process writes there, or what lies there is a
    compressed record or no record of this schema, which stays as it is. `last` is the last line appended.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.path = self.directory / RECORD
        self.last: Line | None = None

    def __enter__(self) -> RecordWriter:
        if (self.directory / COMPRESSED).exists():
            raise UserError(
                f"{self.directory}: holds a finished run, compressed; name another directory with run.dir=DIR"
            )
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self.lock = os.open(self.directory / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
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
                sync_directory(self.directory)
            except BaseException:
                os.close(self._file)
                raise
        except BaseException:
            os.close(self.lock)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)
        # Closing alone is not enough while a child is being started. The file stays: all must lock the same.
        fcntl.flock(self.lock, fcntl.LOCK_UN)
        os.close(self.lock)

    @property
    def empty(self) -> bool:
        """Whether nothing is recorded yet, so that the `run` line is still to be written."""
        return os.fstat(self._file).st_size == 0

    def append(self, *lines: Line) -> None:
        """Writes lines to the disk, all or none, even where an interrupt strikes.

        Raises `UserError` where the disk refuses or the directory was removed, ValueError for a number that is not
        finite.
        """
        data = memoryview(b"".join(map(encode, lines)))
        self.refuse_removed()
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

    def refuse_removed(self) -> None:
        """Raise `UserError` where the record no longer stands under its name: what is appended would be lost."""
        mine = os.fstat(self._file)
        try:
            there: os.stat_result | None = self.path.stat()
        except OSError:
            there = None
        if there is None or not os.path.samestat(mine, there):
            what = "removed" if mine.st_nlink == 0 else "moved away or replaced"
            lost = "what it held is lost" if mine.st_nlink == 0 else "it holds what was measured until now"
            raise UserError(f"{self.path}: was {what} while the run wrote there; {lost}, so start the run again")

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
            os.ftruncate(self.lock, 0)
            os.pwrite(self.lock, b"%d\n" % os.getpid(), 0)

    def _lock_once_its_holder_is_gone(self) -> None:
        """A child that a killed run was just starting has its lock for a moment longer; then the holder is dead."""
        deadline = time.monotonic() + _MOMENT_S
        while True:
            try:
                return fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = self._holder()
                if not holder.isdecimal() or psutil.pid_exists(int(holder)) or time.monotonic() > deadline:
                    raise
            time.sleep(0.02)

    def _holder(self) -> str:
        return os.pread(self.lock, 20, 0).decode("ascii", "replace").strip()

    def _check_first_line(self) -> None:
        """Refuse what is no record before anything of it is changed; a torn first line is what a run begins with."""
        if stat.S_ISFIFO(os.fstat(self._file).st_mode):
            raise UserError(f"{self.path}: is a pipe and no file; name another directory with run.dir=DIR")
        if self.empty:
            return
        first = os.pread(self._file, len(_BEGINNING), 0)
        if not _BEGINNING.startswith(first):
            read_record(self.path)  # which says what it is
            raise UserError(f"{self.path}: is no record of a run; name another directory with run.dir=DIR")

    def _cut_torn_line(self) -> None:
        size = end = os.fstat(self._file).st_size
        while end and os.pread(self._file, 1, end - 1) != b"\n":
            if size - end > LINE_LIMIT_BYTES:
                read_record(self.path)  # which says that no run writes such a line
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
