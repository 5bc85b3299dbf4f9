"""Files of a run's directory: written whole or not at all, found, pointed at."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil

from qwen3bench.errors import UserError

RECORD = "samples.jsonl"
COMPRESSED = "samples.jsonl.xz"  # as a finished record may be kept
_STALE = re.compile(r"\..+\.tmp-(\d{1,9})")


def record_file(directory: Path) -> Path | None:
    """The record in a run's directory, as it is written or compressed; None where there is none."""
    return next((file for name in (RECORD, COMPRESSED) if (file := directory / name).is_file()), None)


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """Directories of runs: each path that is one, and every run below a path that holds runs, once each.

    Raises UserError where a path holds no run.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if record_file(path) or not path.is_dir():
            below = [path]  # what is no run after all is named when it is read
        else:
            files = (file for name in (RECORD, COMPRESSED) for file in path.rglob(name))
            homes = {file.parent for file in files if file.stat().st_size}  # empty: it stopped before anything
            below = sorted(homes, key=_by_number)
        if not below:
            raise UserError(f"{path}: holds no run, nor any directory with one; name the directory of a run")
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
            with temporary.open("wb") as file:
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
