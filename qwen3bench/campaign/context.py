"""What every pass shares: the settings, the record, the workers, what is done; and whose failure a failure is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from qwen3bench.campaign.progress import Reporter
from qwen3bench.campaign.scheduler import CardGoneError, CardLostError
from qwen3bench.campaign.state import Place, RunState, Where
from qwen3bench.campaign.worker_pool import WorkerPool
from qwen3bench.config.settings import Settings
from qwen3bench.record.lines import FailureLine, Line
from qwen3bench.record.messages import CellFailure, NoAnswerError
from qwen3bench.record.rounds import RoundWriter
from qwen3bench.record.states import CellStatus
from qwen3bench.record.writer import RecordWriter


@dataclass
class Outcome:
    """Whether a step failed, and if so whether it is to be asked again."""

    failed: bool = False
    again: bool = False


@dataclass(frozen=True)
class RunContext:
    """A run's settings, record, progress, state and workers; `chosen` are the cells of a place where not all are."""

    settings: Settings
    writer: RecordWriter | RoundWriter
    progress: Reporter
    state: RunState
    workers: WorkerPool
    cards: Callable[[], int] = lambda: 1  # how many there are to work on
    chosen: Mapping[Where, Sequence[str]] | None = None

    def cells(self, where: Where) -> list[str]:
        """The cells that are still to be run there."""
        cells = self.settings.labels if self.chosen is None else self.chosen[where]
        return [cell for cell in cells if self.state.runs(Place(cell, *where))]

    @contextmanager
    def failing(self, pass_: str, place: Place) -> Iterator[Outcome]:
        """A step of a cell: where it fails, the worker, poisoned, is ended and the failure recorded.

        While other processes stand by on the same device the failure may be of their making. Then they are ended too,
        and nothing is recorded: only asking again, alone, tells. Nor is anything recorded of what may be an accident,
        as a hang or a death, the first time: it is asked again once, in a fresh worker. Raises `CardLostError` where
        the card is to blame, and there is another, and `NoWorkerError` where what hosts the last one is gone.
        """
        outcome = Outcome()
        try:
            yield outcome
        except CellFailure as failure:
            outcome.failed = True
            self.workers.end()
            if self.workers.dismiss():
                outcome.again = True
                self.state.unanswered.add((pass_, place))
                self.progress.note(f"{place.cell}: {failure.status} beside other processes, to be run again alone")
            elif self.cards() > 1 and self.workers.is_lost():
                raise CardLostError(f"no kernel runs on it any more, since {place.cell}: {failure.reason}") from failure
            elif isinstance(failure, CardGoneError):
                raise self.workers.no_worker(failure) from failure
            elif self._may_be_accident(pass_, place, failure):
                outcome.again = True
                self.state.unanswered.add((pass_, place))
                self.progress.note(f"{place.cell}: {failure.status}, to be asked again: {failure.reason}")
            else:
                self.fail(pass_, place, failure)

    def _may_be_accident(self, pass_: str, place: Place, failure: CellFailure) -> bool:
        """Whether a cell failed for the first time in a pass, and its worker did not say itself what is wrong.

        A hang costs `step_timeout_s`. So once some cell has hung twice, the first hang of another counts: where all
        cells hang, one of them is waited for twice and the others once.
        """
        if not isinstance(failure, NoAnswerError) or (pass_, place) in self.state.unanswered:
            return False
        return failure.status != CellStatus.TIMEOUT or CellStatus.TIMEOUT not in self.state.failures.values()

    @contextmanager
    def spared(self, what: str) -> Iterator[None]:
        """A step that no cell needs: where it fails, no cell is to blame, and `what` it would tell is not known.

        Raises `CardLostError` where what hosts the card is gone, and there is another.
        """
        try:
            yield
        except CellFailure as failure:
            self.workers.end()
            if isinstance(failure, CardGoneError) and self.cards() > 1:
                raise CardLostError(failure.reason) from failure
            self.progress.note(f"{what} is not known: {failure.reason}")

    def fail(self, pass_: str, place: Place, failure: CellFailure, *answer: Line) -> None:
        """Record a failure, and the answer that told of it: both or none, and never the answer without its failure."""
        line = FailureLine(
            cell=place.cell,
            workload=place.workload,
            runtime=place.runtime,
            status=failure.status,
            reason=failure.reason,
            pass_=pass_,
            peak_allocated_bytes=failure.peak_allocated_bytes,
        )
        self.writer.append(line, *answer)
        self.state.failures[place] = failure.status
        self.progress.note(f"{place.cell}: {failure.status} in the {pass_} pass: {failure.reason}")
