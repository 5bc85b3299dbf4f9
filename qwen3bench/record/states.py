"""States and verdicts, by the words that stand in records and tables."""

from __future__ import annotations

from enum import StrEnum


class CellStatus(StrEnum):
    """What became of a cell in a workload and runtime; `status` of cells.csv."""

    OK = "ok"
    OOM = "oom"
    CRASHED = "crashed"
    TIMEOUT = "timeout"
    NOT_EQUIVALENT = "not_equivalent"
    INVALID = "invalid"


class BlockState(StrEnum):
    """Whether a block counts: as it is, flagged as disturbed, or not, as it is measured again."""

    OK = "ok"
    FLAGGED = "flagged"
    REPEAT = "repeat"


class StopReason(StrEnum):
    """Why measuring of a workload in a runtime ended; `ENDED` where the run was interrupted before."""

    TARGET = "target"
    MAX_SECONDS = "max_seconds"
    OUT_OF_REACH = "out_of_reach"  # the target, within the time allowed, and every effect has an answer
    MAX_BLOCKS = "max_blocks"
    FAILED = "failed"
    ENDED = "ended"


class EndStatus(StrEnum):
    """How a run ended."""

    FINISHED = "finished"
    INTERRUPTED = "interrupted"


class Purpose(StrEnum):
    """What a worker process is for: the passes over single cells, or timing."""

    CHECK = "check"
    TIME = "time"


class Verdict(StrEnum):
    """What an interval and a corrected p allow to be said of an effect; of times, of bytes, of both."""

    FASTER = "faster"
    SLOWER = "slower"
    LESS = "less"
    MORE = "more"
    SAME = "same"
    UNDECIDED = "undecided"
