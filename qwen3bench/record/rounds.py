"""The rounds that confirm what a screen predicts: their lines, apart from those that the screen stands on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen3bench.record.lines import (
    BlockLine,
    CeilingLine,
    CompileLine,
    ConfirmBlockLine,
    ConfirmLine,
    ConfirmSampleLine,
    ConfirmStopLine,
    ConfirmVisitLine,
    CostLine,
    EvidenceLine,
    FailureLine,
    GradientsLine,
    Line,
    MemoryLine,
    ParametersLine,
    ProcessLine,
    SampleLine,
    StopLine,
    VerifyLine,
    VisitLine,
)
from qwen3bench.record.reader import Record
from qwen3bench.record.typed import fields_of
from qwen3bench.record.writer import RecordWriter

ROUNDS = (1, 2)
_TIME, CONFIRM = "time", "confirm"  # the pass that a failure while timing is of: in the screen, and in a round
_OF_ROUND: dict[type[Line], Any] = {
    SampleLine: ConfirmSampleLine,
    VisitLine: ConfirmVisitLine,
    BlockLine: ConfirmBlockLine,
    StopLine: ConfirmStopLine,
}
_OF_CELLS = (
    *(ProcessLine, ParametersLine, VerifyLine, GradientsLine, MemoryLine, EvidenceLine),
    *(CostLine, CeilingLine, CompileLine, FailureLine),
)


class RoundWriter:
    """Writes what is timed in a round as lines of that round, and all else as it is."""

    def __init__(self, writer: RecordWriter, round_: int) -> None:
        self._writer = writer
        self._round = round_

    @property
    def directory(self) -> Path:
        """The run's directory."""
        return self._writer.directory

    def append(self, *lines: Line) -> None:
        """As `RecordWriter.append`."""
        self._writer.append(*(self._of_round(line) for line in lines))

    def _of_round(self, line: Line) -> Line:
        if isinstance(line, FailureLine) and line.pass_ == _TIME:
            return replace(line, pass_=CONFIRM)
        kind = _OF_ROUND.get(type(line))
        found: Line = line if kind is None else kind(**fields_of(line), round=self._round)
        return found


def chosen_in(record: Record, round_: int) -> list[ConfirmLine]:
    """What was chosen for a round, in each workload and runtime."""
    return [line for line in record.of(ConfirmLine) if line.round == round_]


def round_of(record: Record, round_: int) -> Record:
    """A round as a record of its own, of the cells that it measured; what is known of cells is in it too.

    A failure while timing is of the round alone: what the screen measured of that cell before stands.
    """
    cells = dict.fromkeys(cell for line in chosen_in(record, round_) for cell in line.cells)
    view = Record(record.path, replace(record.run, cells=tuple(cells)))
    for kind in _OF_CELLS:
        for line in record.of(kind):
            confirms = isinstance(line, FailureLine) and line.pass_ == CONFIRM
            view.add(FailureLine(**{**fields_of(line), "pass_": _TIME}) if confirms else line)
    for plain, of_round in _OF_ROUND.items():
        for line in record.of(of_round):
            fields = fields_of(line)
            if fields.pop("round") == round_:
                made: Any = plain
                view.add(made(**fields))
    return view
