"""The passes of a run over its cells: design → check → verify → memory and evidence → time.

Each step goes to the record as it ends, so a run that stops anywhere continues where it was. A worker that fails is
replaced; its cell is recorded with a status and a reason, and the others go on.
"""

from __future__ import annotations

import math
import os
from contextlib import suppress
from typing import Any

from qwen3bench.campaign.blocks import Timings
from qwen3bench.campaign.failures import Ledger
from qwen3bench.campaign.progress import Reporter
from qwen3bench.campaign.state import Done
from qwen3bench.campaign.worker_pool import StartWorker, Workers
from qwen3bench.campaign.worker_process import CellFailure, WorkerProcess
from qwen3bench.config.settings import Settings
from qwen3bench.record.card import Monitor
from qwen3bench.record.design import label, neighbours
from qwen3bench.record.reader import Record, RecordWriter

_MOST_AT_ONCE = 4  # processes that verify, or get ready to time, side by side
_CORES_EACH = 4
_LEAST_SHARE = 4  # cells; fewer are verified before another process has started
_CONTEXT_BYTES = 2**30  # what a process needs of a card beside its tensors (CUDA's context, libraries), rounded up
_SLACK = 1.5  # times the peak of a cell alone: what the graphs of all cells and the allocator's gaps may need


class Campaign:
    """One run's passes.

    `record` is what earlier starts of the same run wrote; `ready` a worker started already; `card_bytes` the memory
    of the CUDA device, where it is known.
    """

    def __init__(
        self,
        settings: Settings,
        writer: RecordWriter,
        progress: Reporter,
        record: Record | None = None,
        start_worker: StartWorker = WorkerProcess,
        monitor: Monitor | None = None,
        ready: WorkerProcess | None = None,
        card_bytes: int | None = None,
    ) -> None:
        self._settings = settings
        self._progress = progress
        self._done = Done(settings, record)
        self._workers = Workers(settings, writer, start_worker, ready, self._done.process)
        self._ledger = Ledger(settings, writer, progress, self._done, self._workers)
        monitor = monitor or Monitor(int(settings.device.partition(":")[2] or 0))
        self.timings = Timings(self._ledger, monitor)
        self._labels = settings.labels
        self._card_bytes = card_bytes
        self._cuda = settings.device.startswith("cuda")

    def run(self) -> None:
        """All passes that are not done yet. Every process it started has ended when it returns or raises.

        Raises `UserError` where no worker can be started, where one refuses what the user asked for, and where the
        record cannot be written.
        """
        with self._workers:
            shares = self._shares()
            self._workers.start_ahead(len(shares))  # that verify, while nothing is measured
            self._check()
            timing = min(self._most_at_once, len(self.timings.processes_needed))
            self._workers.start_ahead(len(shares) - 1 + timing)  # and the first that time
            self._each_cell("parameters", "counting parameters")
            self._verify(shares)
            self._look_at_each_cell()
            self._ceilings()
            self._workers.end()
            self.timings.run(self._at_once)

    @property
    def _most_at_once(self) -> int:
        """How many processes may work side by side where nothing is timed: on a CPU they would share its cores."""
        return max(1, min(_MOST_AT_ONCE, _cores() // _CORES_EACH)) if self._cuda else 1

    @property
    def _at_once(self) -> int:
        """How many processes, each with all cells of a workload ready, the device's memory holds."""
        peak = self._done.peak_reserved_bytes
        if not (self._card_bytes and peak):
            return 1
        return max(1, min(self._most_at_once, int(self._card_bytes / (_SLACK * peak + _CONTEXT_BYTES))))

    # One step for each cell

    def _check(self) -> None:
        """Build every cell once: what the user can mend is refused before anything is measured."""
        left = [cell for cell in self._labels if self._done.runs(cell) and ("parameters", cell) not in self._done.steps]
        with self._progress.stage("loading the weights, building every cell", len(left)) as stage:
            for cell in left:
                stage.step(cell)
                with self._ledger.failing("load", cell):
                    self._workers.ask("load", cells=[cell])

    def _each_cell(self, pass_: str, title: str) -> None:
        self._steps(title, [(pass_, cell, {}) for cell in self._labels])

    def _shares(self) -> list[list[str]]:
        """The cells to verify, shared out among as many processes as can work side by side.

        On a GPU alone, where most of the time goes to compiling kernels on the CPU; cells with the same ones together.
        """
        left = [cell for cell in self._labels if self._done.runs(cell) and ("verify", cell) not in self._done.steps]
        size = max(_LEAST_SHARE, math.ceil(len(left) / self._most_at_once))
        if len(left) > size:
            left.sort(key=lambda cell: [name not in cell.split("+") for name in self._settings.factors])
        return [left[start : start + size] for start in range(0, len(left), size)]

    def _verify(self, shares: list[list[str]]) -> None:
        """The equivalence gate: first side by side, then alone what failed there."""
        title = "verifying that every cell computes the baseline's function"
        if len(shares) > 1:
            shares = [[cell for cell in share if self._done.runs(cell)] for share in shares]
            with self._progress.stage(f"{title}, {len(shares)} at a time", sum(map(len, shares))) as stage:
                for cell, answer in self._workers.side_by_side("verify", shares):
                    stage.step(cell)
                    if answer["equivalent"]:  # what is not may be of the others' making, too
                        with suppress(CellFailure):  # an answer that cannot be used
                            self._take("verify", cell, {}, answer)
        self._each_cell("verify", title)

    def _look_at_each_cell(self) -> None:
        """Peak memory, then evidence of what has just run there, so that a cell is built and compiled once for both."""
        passes, title = ["evidence"], "recording what really runs"
        if self._cuda:
            passes, title = ["memory", "evidence"], "measuring peak memory, recording what really runs"
        steps = []
        # What a switch changed is told by the cell without it, which is looked at even where it is not measured.
        compared = [label(cell) for cell in neighbours(self._settings.cells)]
        for workload, runtime in self._done.timings:
            where = {"workload": workload, "runtime": runtime}
            steps += [(pass_, cell, where) for cell in self._labels for pass_ in passes]
            if runtime != "compile":  # where a cell takes seconds to compile
                steps += [("evidence", cell, where) for cell in compared]
        self._steps(title, steps)

    def _steps(self, title: str, steps: list[tuple[str, str, dict[str, str]]]) -> None:
        left = [
            (pass_, cell, where)
            for pass_, cell, where in steps
            if (pass_, cell, *where.values()) not in self._done.steps and self._done.runs(cell, *where.values())
        ]
        with self._progress.stage(title, len(left)) as stage:
            for pass_, cell, where in left:
                stage.step(" ".join([cell, *where.values()]))
                if self._done.runs(cell, *where.values()):  # still, after its step before
                    self._step(pass_, cell, where)

    def _step(self, pass_: str, cell: str, where: dict[str, str]) -> None:
        with self._ledger.failing(pass_, cell, **where):
            self._take(pass_, cell, where, self._workers.ask(pass_, cell=cell, **where))

    def _take(self, pass_: str, cell: str, where: dict[str, str], answer: dict[str, Any]) -> None:
        """Record an answer, and the failure that it may tell of."""
        line = {**answer, "type": pass_, "cell": cell, **where}
        if failure := _told_by(pass_, answer):
            self._ledger.fail(pass_, cell, failure, line, **where)
        else:
            self._ledger.append(line)
        self._done.steps.add((pass_, cell, *where.values()))
        self._done.see_peak(answer)

    def _ceilings(self) -> None:
        """What the device can reach, and the least that each cell asks of it."""
        if ("ceiling",) in self._done.steps:
            return
        with self._progress.stage("measuring what the device can reach", 1):
            try:
                costs = [
                    {**self._workers.ask("cost", cell=cell, workload=workload), "type": "cost"}
                    | {"cell": cell, "workload": workload}
                    for workload in self._settings.workloads
                    for cell in self._labels
                    if self._done.runs(cell)
                ]
                self._ledger.append({**self._workers.ask("ceilings"), "type": "ceiling"}, *costs)
            except CellFailure as failure:  # no cell is to blame, and none needs it
                self._workers.end()
                self._progress.note(f"what the device can reach is not known: {failure.reason}")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _told_by(pass_: str, answer: dict[str, Any]) -> CellFailure | None:
    """The failure that a worker's answer tells of, though it is one."""
    if pass_ == "verify" and not answer.get("equivalent"):
        status = "not_equivalent" if answer.get("ran", True) else "crashed"
        return CellFailure(status, answer.get("reason") or "no reason given")
    if pass_ == "evidence" and (again := answer.get("recompiles")):
        reason = f"compiled {again} more graphs after its warm-up, so a latency may hold a compilation"
        return CellFailure("invalid", reason)
    return None
