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
from qwen3bench.record.lines import (
    SCHEMA,
    BlockLine,
    Line,
    OtherSchemaError,
    RunLine,
    SampleLine,
    StopLine,
    UnknownTypeError,
    VisitLine,
    decode,
)
from qwen3bench.record.states import BlockState

if TYPE_CHECKING:
    import pandas as pd

L = TypeVar("L", bound=Line)
_attempt = attrgetter(*BlockLine.key)
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

    @property
    def stops(self) -> list[StopLine]:
        """Why measuring ended in each workload and runtime."""
        return list({(line.workload, line.runtime): line for line in self.of(StopLine)}.values())

    @property
    def lacking(self) -> list[BlockLine]:
        """The closed attempts at blocks of which a visit or a value is not in the record any more.

        A visit says how many values it has, and a block how many visits. What does not say it lacks nothing.
        """
        visits, values = Counter[Any](), Counter[Any]()
        for visit in self.of(VisitLine):
            visits[_attempt(visit)] += 1
            values[_attempt(visit)] += visit.samples or 0
        values.subtract(map(_attempt, self.of(SampleLine)))

        def lacks(block: BlockLine) -> bool:
            attempt = _attempt(block)
            return block.visits not in (None, visits[attempt]) or bool(visits[attempt] and values[attempt])

        return [block for block in self.of(BlockLine) if block.state != BlockState.REPEAT and lacks(block)]

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
    record.warnings += _lost_values(record)
    return record


def _lost_values(record: Record) -> list[str]:
    """How many blocks lack values, in words; of one that was measured again its last attempt counts."""
    closed = [line for line in record.of(BlockLine) if line.state != BlockState.REPEAT]
    last = {(line.workload, line.runtime, line.block): _attempt(line) for line in closed}.values()
    lacking = [block for block in record.lacking if _attempt(block) in last]
    if not lacking:
        return []
    first = lacking[0]
    blocks = "1 block" if len(lacking) == 1 else f"{len(lacking)} blocks"
    return [
        f"{blocks} ({first.workload} {first.runtime}, block {first.block} first) lost values: a report uses what is "
        "left of them, a run that goes on measures them again"
    ]


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
