"""What every pass shares: the record it writes to, the workers it asks, and whose failure a failure is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from qwen3bench.campaign.progress import Reporter
from qwen3bench.campaign.state import Done, Where
from qwen3bench.campaign.worker_pool import Workers
from qwen3bench.campaign.worker_process import CellFailure
from qwen3bench.config.settings import Settings
from qwen3bench.record.reader import RecordWriter


@dataclass
class Outcome:
    """Whether a step failed."""

    failed: bool = False


@dataclass
class Ledger:
    """A run's record, what is done of it, its workers, and who watches."""

    settings: Settings
    writer: RecordWriter
    progress: Reporter
    done: Done
    workers: Workers

    def cells(self, where: Where) -> list[str]:
        """The cells that are still to be run there."""
        return [cell for cell in self.settings.labels if self.done.runs(cell, *where)]

    @contextmanager
    def failing(
        self, pass_: str, cell: str, workload: str | None = None, runtime: str | None = None
    ) -> Iterator[Outcome]:
        """A step of a cell: where it fails, the worker, poisoned, is ended and the failure recorded.

        While other processes stand by on the same device it may be of their making: then they are ended too, and
        nothing is recorded, as only asking again, alone, tells.
        """
        outcome = Outcome()
        try:
            yield outcome
        except CellFailure as failure:
            outcome.failed = True
            self.workers.end()
            if self.workers.dismiss():
                self.progress.note(f"{cell}: {failure.status} beside other processes, to be run again alone")
            else:
                self.fail(pass_, cell, failure, workload=workload, runtime=runtime)

    def fail(
        self,
        pass_: str,
        cell: str,
        failure: CellFailure,
        *answer: dict[str, Any],
        workload: str | None = None,
        runtime: str | None = None,
    ) -> None:
        """Record a failure, and the answer that told of it: both or none, and never the answer without its failure."""
        line = {
            "type": "failure",
            "cell": cell,
            "workload": workload,
            "runtime": runtime,
            "status": failure.status,
            "reason": failure.reason,
            "pass": pass_,
            "peak_allocated_bytes": failure.peak_allocated_bytes,
        }
        self.append(line, *answer)
        self.done.failures[cell, workload, runtime] = failure.status
        self.progress.note(f"{cell}: {failure.status} in the {pass_} pass: {failure.reason}")

    def append(self, *lines: dict[str, Any]) -> None:
        """To the record, what a worker answered. Raises `CellFailure` where it makes no line that can be used."""
        try:
            self.writer.append(*lines)
        except ValueError as error:
            raise CellFailure("crashed", f"the worker's answer cannot be used: {str(error)[:200]}") from None
