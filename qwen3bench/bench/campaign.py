"""The passes of a run over its cells: design → check → verify → memory and evidence → time.

Each step goes to the record as it ends, so a run that stops anywhere continues where it was. A worker that fails is
replaced; its cell is recorded with a status and a reason, and the others go on.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

from qwen3bench.analysis.stopping import half_widths, stop_reason
from qwen3bench.bench.design import BASELINE, block_order, label, neighbours
from qwen3bench.bench.done import Done, Timing, Where
from qwen3bench.bench.monitor import Monitor, Telemetry, braked, flags
from qwen3bench.bench.progress import Reporter, duration
from qwen3bench.bench.record import Record, RecordWriter
from qwen3bench.bench.supervisor import CellFailure, WorkerProcess
from qwen3bench.bench.workers import StartWorker, Workers
from qwen3bench.settings import Settings

_MOST_AT_ONCE = 4  # processes that verify
_CORES_EACH = 4
_LEAST_SHARE = 4  # cells; fewer are verified before another process has started
MEASURED_PER_SETUP = 0.25  # of the time that a process takes to be ready, at least so much again is measured in it


class Campaign:
    """One run's passes. `record` is what earlier starts of the same run wrote; `ready` a worker started already."""

    def __init__(
        self,
        settings: Settings,
        writer: RecordWriter,
        progress: Reporter,
        record: Record | None = None,
        start_worker: StartWorker = WorkerProcess,
        monitor: Monitor | None = None,
        ready: WorkerProcess | None = None,
    ) -> None:
        self._settings = settings
        self._writer = writer
        self._progress = progress
        self._monitor = monitor or Monitor(int(settings.device.partition(":")[2] or 0))
        self._done = Done(settings, record)
        self._workers = Workers(settings, writer, start_worker, ready, self._done.process)
        self._labels = settings.labels

    def run(self) -> None:
        """All passes that are not done yet. Every process it started has ended when it returns or raises.

        Raises `UserError` where no worker can be started, where one refuses what the user asked for, and where the
        record cannot be written.
        """
        with self._workers:
            shares = self._shares()
            self._workers.start_beside(len(shares) - 1)
            self._check()
            if any(not timing.stopped for timing in self._done.timings.values()):
                self._workers.start_next()  # the first timing process, while nothing is timed yet
            self._each_cell("parameters", "counting parameters")
            self._verify(shares)
            self._look_at_each_cell()
            self._ceilings()
            self._workers.end()
            self._time()

    # One step for each cell

    def _check(self) -> None:
        """Build every cell once: what the user can mend is refused before anything is measured."""
        left = [cell for cell in self._labels if self._done.runs(cell) and ("parameters", cell) not in self._done.steps]
        with self._progress.stage("loading the weights, building every cell", len(left)) as stage:
            for cell in left:
                stage.step(cell)
                with self._failing("load", cell):
                    self._workers.ask("load", cells=[cell])

    def _each_cell(self, pass_: str, title: str) -> None:
        self._steps(title, [(pass_, cell, {}) for cell in self._labels])

    def _shares(self) -> list[list[str]]:
        """The cells to verify, shared out among as many processes as can work side by side.

        On a GPU alone, where most of the time goes to compiling kernels on the CPU; cells with the same ones together.
        """
        left = [cell for cell in self._labels if self._done.runs(cell) and ("verify", cell) not in self._done.steps]
        at_once = min(_MOST_AT_ONCE, _cores() // _CORES_EACH) if self._settings.device.startswith("cuda") else 1
        size = max(_LEAST_SHARE, math.ceil(len(left) / max(1, at_once)))
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
        if self._settings.device.startswith("cuda"):
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
        with self._failing(pass_, cell, **where):
            self._take(pass_, cell, where, self._workers.ask(pass_, cell=cell, **where))

    def _take(self, pass_: str, cell: str, where: dict[str, str], answer: dict[str, Any]) -> None:
        """Record an answer, and the failure that it may tell of."""
        line = {**answer, "type": pass_, "cell": cell, **where}
        if failure := _told_by(pass_, answer):
            self._fail(pass_, cell, failure, line, **where)
        else:
            self._append_answer(line)
        self._done.steps.add((pass_, cell, *where.values()))

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
                self._append_answer({**self._workers.ask("ceilings"), "type": "ceiling"}, *costs)
            except CellFailure as failure:  # no cell is to blame, and none needs it
                self._workers.end()
                self._progress.note(f"what the device can reach is not known: {failure.reason}")

    # Timing

    def _time(self) -> None:
        """Blocks in fresh processes until every workload and runtime is known well enough.

        Kalibera & Jones, ISMM 2013: replicate at the level where the variance lives; what differs from one process
        to the next (addresses, clocks, the choice of kernels) is part of the noise. Nothing else is timed in a
        process, as that changes what is timed after it: `flash` alone decoded 1 % slower after a prefill (H100).
        """
        self._workers.purpose = "time"
        while waiting := [where for where, timing in self._done.timings.items() if not timing.stopped]:
            for where in waiting:
                if not self._cells(where):
                    self._stop(where, "failed")
                elif reason := self._reason_to_stop(where):  # the earlier start was ended before it could say so
                    self._stop(where, reason)
                else:
                    self._time_in_process(where)
                    self._workers.end()

    def _time_in_process(self, where: Where) -> None:
        """Up to `blocks_per_process` blocks of one workload and runtime in a fresh worker."""
        measure, timing = self._settings.measure, self._done.timings[where]
        started = time.monotonic()
        if not self._prepare(where):
            return
        setup_s = time.monotonic() - started
        before_s = timing.measured_s
        for blocks in itertools.count(1):
            if not self._block(where):
                return
            if reason := self._reason_to_stop(where):
                self._stop(where, reason)
                return
            spent_s = timing.measured_s - before_s
            # Kalibera & Jones, sec. 6: the dearer a process is to set up, the more is measured in each.
            enough = blocks >= measure.blocks_per_process and spent_s >= MEASURED_PER_SETUP * setup_s
            # A share of the time and of the blocks for each process, or there might never be a second one.
            if enough or blocks >= measure.max_blocks / measure.min_processes:
                return
            if measure.max_seconds and spent_s >= measure.max_seconds / measure.min_processes:
                return

    def _prepare(self, where: Where) -> bool:
        """Make every cell ready in the present worker; False where a cell failed and the worker is gone."""
        cells = self._cells(where)
        visits = [(cell, 0) for cell in cells]
        if (BASELINE, 0) in visits:
            visits.append((BASELINE, 1))
        workload, runtime = where
        with self._progress.stage(
            f"preparing {workload} {runtime} in process {self._workers.number}", len(visits)
        ) as stage:
            with self._failing("time", cells[0], workload=workload, runtime=runtime) as outcome:
                self._workers.ask("enter", workload=workload, runtime=runtime, cell=cells[0])
            if outcome.failed:
                return False
            self._workers.start_next()  # while nothing is timed
            for cell, copy in visits:
                stage.step(cell)
                with self._failing("time", cell, workload=workload, runtime=runtime) as outcome:
                    answer = self._workers.ask("prepare", cell=cell, copy=copy)
                    if answer.get("compile_s") is not None:
                        self._writer.append(
                            {
                                "type": "compile",
                                "cell": cell,
                                "workload": workload,
                                "runtime": runtime,
                                "process": self._workers.process,
                                "seconds": answer["compile_s"],
                            }
                        )
                if outcome.failed:
                    return False
        self._workers.await_next()
        return True

    def _block(self, where: Where) -> bool:
        """One block, measured again under a brake or beside a foreign process; False where a cell failed in it."""
        timing = self._done.timings[where]
        most = self._settings.measure.max_attempts
        while True:
            attempt = timing.attempts
            timing.attempts += 1
            started = time.monotonic()
            samples = self._visits(where, timing.blocks, attempt)
            if samples is None:
                return False
            elapsed_s = time.monotonic() - started
            timing.measured_s += elapsed_s
            telemetry = self._monitor.sample(self._workers.pids)
            brakes = braked(telemetry)
            timing.braked += bool(brakes)
            state = "ok" if not brakes else "repeat" if timing.braked < most else "flagged"
            if brakes:
                self._progress.note(f"block {timing.blocks}, attempt {attempt + 1}: {state} ({', '.join(brakes)})")
            self._close_block(where, attempt, state, telemetry, elapsed_s)
            if state != "repeat":
                timing.samples += samples
                timing.blocks += 1
                timing.attempts = timing.braked = 0
                timing.processes.add(self._workers.process)
                return True

    def _visits(self, where: Where, block: int, attempt: int) -> list[dict[str, Any]] | None:
        """All visits of one block, in its random order; None where a cell failed."""
        workload, runtime = where
        order = block_order(self._cells(where), self._settings.seed, workload, runtime, block, attempt)
        taken: list[dict[str, Any]] = []
        repeats = self._settings.measure.repeats
        with self._progress.stage(self._block_title(where), len(order)) as stage:
            for position, (cell, copy) in enumerate(order):
                stage.step(cell)
                visit = {
                    "workload": workload,
                    "runtime": runtime,
                    "cell": cell,
                    "copy": copy,
                    "process": self._workers.process,
                    "block": block,
                    "attempt": attempt,
                    "position": position,
                }
                with self._failing("time", cell, workload=workload, runtime=runtime) as outcome:
                    answer = self._workers.ask("visit", cell=cell, copy=copy, repeats=repeats)
                    samples = [
                        {**sample, **visit, "repeat": repeat, "time": answer["time"]}
                        for repeat, sample in enumerate(answer["samples"])
                    ]
                    if repeats and len(samples) != repeats:
                        raise CellFailure("crashed", f"the worker answered {len(samples)} values, not {repeats}")
                    lines = [{**sample, "type": "sample"} for sample in samples]
                    self._append_answer(*lines, {"type": "visit", **visit, "samples": len(samples)})
                    taken += samples
                if outcome.failed:
                    return None
        return taken

    def _close_block(self, where: Where, attempt: int, state: str, telemetry: Telemetry, elapsed_s: float) -> None:
        self._writer.append(
            {
                "type": "block",
                "workload": where[0],
                "runtime": where[1],
                "process": self._workers.process,
                "block": self._done.timings[where].blocks,
                "attempt": attempt,
                "state": state,
                "flags": flags(telemetry),
                "time": time.time(),
                "elapsed_s": elapsed_s,
                **asdict(telemetry),
            }
        )

    def _reason_to_stop(self, where: Where) -> str | None:
        timing, measure = self._done.timings[where], self._settings.measure
        if not timing.blocks:
            return None
        return stop_reason(
            half_widths(timing.samples, self._settings.factors),
            timing.blocks,
            len(timing.processes),
            timing.measured_s,
            target=self._settings.target(where[1]),
            max_seconds=self._settings.limit_s(timing.blocks, len(timing.processes)),
            min_blocks=measure.min_blocks,
            min_processes=measure.min_processes,
            max_blocks=measure.max_blocks,
        )

    def _stop(self, where: Where, reason: str) -> None:
        timing = self._done.timings[where]
        timing.stopped = True
        self._writer.append(
            {
                "type": "stop",
                "workload": where[0],
                "runtime": where[1],
                "reason": reason,
                "half_width": self._half_widths(timing),
                "blocks": timing.blocks,
                "processes": len(timing.processes),
                "measured_s": timing.measured_s,
            }
        )

    def _half_widths(self, timing: Timing) -> dict[str, float | None]:
        """As the stopping rule sees them; what is not known yet is None, as JSON has no infinity."""
        if not timing.samples:
            return {}
        widths = half_widths(timing.samples, self._settings.factors)
        return {name: width if math.isfinite(width) else None for name, width in widths.items()}

    def _block_title(self, where: Where) -> str:
        timing, measure = self._done.timings[where], self._settings.measure
        title = f"timing {where[0]} {where[1]}, block {timing.blocks + 1}"
        if not timing.blocks:
            return title
        a_block_s = timing.measured_s / timing.blocks
        most = self._settings.limit_s(measure.min_blocks, measure.min_processes) - timing.measured_s
        least = max(0, measure.min_blocks - timing.blocks) * a_block_s
        if measure.max_seconds:
            least = min(least, most)
        most = max(least, most)
        return f"{title} ({duration(max(0, least))} to {duration(max(0, most))} left)"

    # Cells and their failures

    def _cells(self, where: Where) -> list[str]:
        return [cell for cell in self._labels if self._done.runs(cell, *where)]

    @contextmanager
    def _failing(
        self, pass_: str, cell: str, workload: str | None = None, runtime: str | None = None
    ) -> Iterator[Outcome]:
        """A step of a cell: where it fails, the failure is recorded and the worker, poisoned, is ended."""
        outcome = Outcome()
        try:
            yield outcome
        except CellFailure as failure:
            outcome.failed = True
            self._workers.end()
            self._fail(pass_, cell, failure, workload=workload, runtime=runtime)

    def _fail(
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
        self._append_answer(line, *answer)
        self._done.failures[cell, workload, runtime] = failure.status
        self._progress.note(f"{cell}: {failure.status} in the {pass_} pass: {failure.reason}")

    def _append_answer(self, *lines: dict[str, Any]) -> None:
        """To the record, what a worker answered. Raises `CellFailure` where it makes no line that can be used."""
        try:
            self._writer.append(*lines)
        except ValueError as error:
            raise CellFailure("crashed", f"the worker's answer cannot be used: {str(error)[:200]}") from None


@dataclass
class Outcome:
    """Whether a step failed."""

    failed: bool = False


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _told_by(pass_: str, answer: dict[str, Any]) -> CellFailure | None:
    """The failure that a worker's answer tells of, though it is one."""
    if pass_ == "verify" and not answer.get("equivalent"):
        return CellFailure("not_equivalent", answer.get("reason") or "no reason given")
    if pass_ == "evidence" and (again := answer.get("recompiles")):
        reason = f"compiled {again} more graphs after its warm-up, so a latency may hold a compilation"
        return CellFailure("invalid", reason)
    return None
