"""Files of a run's directory: written whole or not at all, found, pointed at."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil

from qwen3bench.errors import UserError

RECORD = "samples.jsonl"
COMPRESSED = "samples.jsonl.xz"  # as a finished record may be kept
_SMALL_BYTES = 2**20  # environment.json has some 2**12
_STALE = re.compile(r"\..+\.tmp-(\d{1,9})")


def record_file(directory: Path) -> Path | None:
    """The record in a run's directory, as it is written or compressed; None where there is none."""
    return next((file for name in (RECORD, COMPRESSED) if (file := directory / name).is_file()), None)


def refuse_no_directory(path: Path) -> None:
    """Raise `UserError` where `path`, given as run.dir, cannot be a directory."""
    if not str(path).isprintable():  # could not be typed to continue the run
        raise UserError(f"run.dir={str(path)!r}: holds control characters; name another directory")
    if any(each.exists() and not each.is_dir() for each in (path, *path.parents)):
        raise UserError(f"run.dir={path}: is a file, or below one; name a directory")


def small_file(path: Path) -> bytes:
    """What a regular file of a run's directory holds.

    Raises OSError where it cannot be read, and where it is no regular file or larger than any of these.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would be waited for
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Not a regular file", str(path))
        data = file.read(_SMALL_BYTES + 1)
    if len(data) > _SMALL_BYTES:
        raise OSError(errno.EFBIG, f"Over {_SMALL_BYTES:,} bytes", str(path))
    return data


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """Directories of runs: each path that is one, and every run below a path that holds runs, once each.

    A path that holds none is among them: reading it says so, and the others keep their pages.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if record_file(path) or not path.is_dir():
            below = [path]  # what is no run after all is named when it is read
        else:
            files = (file for name in (RECORD, COMPRESSED) for file in path.rglob(name))
            # An empty file: it stopped before anything. What is no file is named when it is read.
            homes = {file.parent for file in files if not file.is_file() or file.stat().st_size}
            below = sorted(homes, key=_by_number) or [path]
        for run in below:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def _by_number(path: Path) -> list[tuple[int, str]]:
    """Sorts a multirun's 2 before its 10."""
    return [(int(digits or 0), text) for digits, text in re.findall(r"(\d*)(\D*)", str(path))]


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
            temporary.unlink(missing_ok=True)  # a link there would lead elsewhere
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)  # noqa: PTH105
        sync_directory(path.parent)
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


def sync_directory(directory: Path) -> None:
    """Makes a new name in `directory` outlast a power cut; not every file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
