"""A run's record, read: its lines by type, with what is damaged named and left out."""

from __future__ import annotations

import dataclasses
import lzma
from collections import Counter
from collections.abc import Callable, Iterator
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qwen3bench.errors import UserError
from qwen3bench.record.files import RECORD, record_file, small_file
from qwen3bench.record.lines import SCHEMA, Line, OtherSchemaError, RunLine, UnknownTypeError, decode

if TYPE_CHECKING:
    import pandas as pd

L = TypeVar("L", bound=Line)
_MAX_NAMED = 20  # damaged lines that get a warning of their own; the rest are counted
_MAX_DAMAGED = 100_000  # more is no record that rusted
LINE_LIMIT_BYTES = 2**22  # the longest line, of 40,960 generated tokens, has under 2**20
RECORD_LIMIT_BYTES = 2**30  # a thorough run of 64 cells has some 2**25


class Record:
    """What a run recorded: its lines by type, in the order they were written.

    `run` is the first line; `warnings` tells in words what was not usable.
    """

    def __init__(self, path: Path, run: RunLine) -> None:
        self.path = path
        self.run = run
        self.warnings: list[str] = []
        self._lines: dict[type[Line], list[Line]] = {}
        self._of_kind: dict[type[Line], tuple[Callable[[Line], Any] | None, set[Any]]] = {}

    @property
    def types(self) -> dict[str, int]:
        """The number of usable lines of each type that occurs."""
        return {kind.type: len(lines) for kind, lines in self._lines.items()}

    def add(self, line: Line) -> bool:
        """Take in one more line; False, and it does not count, where one with its key stands before it."""
        kind = type(line)
        of_kind = self._of_kind.get(kind)
        if of_kind is None:
            of_kind = self._of_kind[kind] = (attrgetter(*kind.key) if kind.key else None, set())
            self._lines[kind] = []
        key_of, keys = of_kind
        if key_of is not None:
            count = len(keys)
            keys.add(key_of(line))
            if len(keys) == count:
                return False
        self._lines[kind].append(line)
        return True

    def of(self, kind: type[L]) -> list[L]:
        """All usable lines of one type, in the order they were written."""
        return list(self._lines.get(kind, ()))  # type: ignore[arg-type]

    def frame(self, kind: type[Line]) -> pd.DataFrame:
        """All usable lines of one type as a DataFrame, in the order they were written.

        One column per field that any line has; what a line does not have is missing there.
        """
        import pandas as pd

        lines = self._lines.get(kind, [])
        columns = {field.name: [getattr(line, field.name) for line in lines] for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
        known = {name: values for name, values in columns.items() if any(value is not None for value in values)}
        return pd.DataFrame(known)


def read_record(path: str | Path) -> Record:
    """The record in a run's directory (or in the file itself), damaged lines dropped and named in `warnings`.

    Of lines with one key the first counts. Raises `UserError` where there is none, where its first line (which
    describes the run) is damaged, where it has another schema, and where it is larger than any record.
    """
    file = _find(Path(path))
    record: Record | None = None
    damaged: list[str] = []
    repeated: dict[str, list[int]] = {}
    unknown: Counter[str] = Counter()
    for number, raw in enumerate(_raw_lines(file), start=1):
        try:
            line = decode(raw)
        except OtherSchemaError as other:
            raise UserError(
                f"{file}: has schema {other} (line {number}), but this qwen3bench reads {SCHEMA}; "
                "use the version of qwen3bench that wrote it"
            ) from None
        except UnknownTypeError as other:
            unknown[f"{other!s:.80}"] += 1
            continue
        except ValueError as fault:
            damaged.append(f"line {number}: {fault}; it is dropped and not used")
            if len(damaged) > _MAX_DAMAGED:
                raise UserError(f"{file}: has over {_MAX_DAMAGED:,} damaged lines; name a copy that is whole") from None
            line = None
        if record is None:
            if not isinstance(line, RunLine):
                raise UserError(_no_record(file, damaged))
            record = Record(file, line)
        if line is not None and not record.add(line):
            repeated.setdefault(line.type, []).append(number)
    if record is None:
        raise UserError(_no_record(file, damaged) if unknown else f"{file}: is empty; nothing was recorded there")
    record.warnings += damaged[:_MAX_NAMED]
    if len(damaged) > _MAX_NAMED:
        record.warnings.append(f"{len(damaged) - _MAX_NAMED} more damaged lines are dropped and not used")
    for type_, numbers in repeated.items():
        record.warnings.append(
            f"{len(numbers)} {type_} line{'s' * (len(numbers) > 1)} (line {numbers[0]} first) "
            "tell again what an earlier one told; each counts once, as it was told first"
        )
    record.warnings += [f"{count} lines of the unknown type {name!r} are ignored" for name, count in unknown.items()]
    return record


def _no_record(file: Path, damaged: list[str]) -> str:
    why = f" ({damaged[0].partition('; ')[0]})" if damaged else ""
    return (
        f"{file}: is no record of a run, or its first line is damaged{why}; "
        "name the directory of a run, or of a copy that is whole"
    )


def _find(path: Path) -> Path:
    try:
        if path.is_file() and path.name == "latest":  # see point_latest
            path = path.parent / Path(small_file(path).decode("utf-8", "replace").strip()).name
        if (file := record_file(path) if path.is_dir() else path) and file.is_file():
            return file
    except (OSError, ValueError):  # a name that no file can have
        pass
    raise UserError(f"{path}: holds no record ({RECORD}); name the directory of a run")


def _raw_lines(path: Path) -> Iterator[bytes]:
    read = 0
    try:
        with lzma.open(path, "rb") if path.suffix == ".xz" else path.open("rb") as file:
            while line := file.readline(LINE_LIMIT_BYTES + 1):
                read += len(line)
                if len(line) > LINE_LIMIT_BYTES:
                    raise UserError(
                        f"{path}: has a line of over {LINE_LIMIT_BYTES:,} bytes, which no run writes; "
                        "name a copy that is whole"
                    )
                if read > RECORD_LIMIT_BYTES:
                    raise UserError(
                        f"{path}: holds over {RECORD_LIMIT_BYTES:,} bytes, which no run writes; "
                        "name a copy that is whole"
                    )
                yield line
    except (lzma.LZMAError, EOFError) as error:
        raise UserError(f"{path}: cannot be decompressed ({error}); name a copy that is whole") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
