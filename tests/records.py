"""Records for tests, written from plain dicts: one for each line, with its `type`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qwen3bench.record.lines import LINES, Line
from qwen3bench.record.typed import made
from qwen3bench.record.writer import RecordWriter


def lines_of(contents: Iterable[Mapping[str, Any]]) -> list[Line]:
    """The lines that such dicts describe."""
    return [made(LINES[content["type"]], content) for content in contents]


def write_record(directory: Path, contents: Iterable[Mapping[str, Any]]) -> Path:
    """The run's directory, with a record that holds these lines."""
    with RecordWriter(directory) as writer:
        writer.append(*lines_of(contents))
    return directory
