"""The passes of a run over its cells: design → check → verify → memory → evidence → time.

Each step goes to the record as it ends, so a run that stops anywhere continues where it was. A worker that fails is
replaced; its cell is recorded with a status and a reason, and the others go on.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qwen3bench.analysis.stopping import half_widths, stop_reason
from qwen3bench.bench.design import BASELINE, block_order
from qwen3bench.bench.monitor import Monitor, Telemetry, braked, flags
from qwen3bench.bench.progress import Reporter, duration
from qwen3bench.bench.record import Record, RecordWriter
from qwen3bench.bench.supervisor import CellFailure, WorkerProcess
from qwen3bench.errors import UserError
from qwen3bench.settings import Settings

Where = tuple[str, str]  # workload, runtime
MEASURED_PER_SETUP = 0.25  # of the time that a process takes to be ready, at least so much again is measured in it
QUIET_S = 120.0  # limit of a request that runs no model


@dataclass
class Timing:
    """What is known of one workload in one runtime: closed blocks and their samples."""

    samples: list[dict[str, Any]] = field(default_factory=list)
    blocks: int = 0
    attempts: int = 0  # at the next block, whatever became of them
    braked: int = 0  # of these, ended under a brake
    processes: set[int] = field(default_factory=set)
    measured_s: float = 0.0
    stopped: bool = False


class Campaign:
    """One run's passes. `done` is what an earlier start of the same run recorded."""

    def __init__(
        self,
        settings: Settings,
        writer: RecordWriter,
        progress: Reporter,
        done: Record | None = None,
        start_worker: Callable[[Path], WorkerProcess] = WorkerProcess,
        monitor: Monitor | None = None,
        ready: WorkerProcess | None = None,
    ) -> None:
        self.settings = settings
        self.writer = writer
        self.progress = progress
        self._monitor = monitor or Monitor(int(settings.device.partition(":")[2] or 0))
        self._start_worker = start_worker
        self._stack = ExitStack()
        self._worker: WorkerProcess | None = None
        self._ready = ready  # started before it is needed, as importing PyTorch takes seconds
        self._process = -1
        self._purpose = "check"
        self.labels = settings.labels
        self.failures: dict[tuple[str, str | None, str | None], str] = {}
        self._finished: set[tuple[str, ...]] = set()  # (pass, cell, workload, runtime) of steps that ended
        self.timings: dict[Where, Timing] = {
            (workload, runtime): Timing() for workload in settings.workloads for runtime in settings.runtimes
        }
        if done is not None:
            self._take_up(done)

    def run(self) -> None:
        """All passes that are not done yet. Every process it started has ended when it returns or raises.

        Raises `UserError` where no worker can be started, where one refuses what the user asked for, and where the
        record cannot be written.
        """
        with self._stack:
            self._check()
            if any(not timing.stopped for timing in self.timings.values()):
                self._ready = self._launched()  # the first timing process, while nothing is timed yet
            self._each_cell("parameters", "counting parameters")
            self._each_cell("verify", "verifying that every cell computes the baseline's function")
            if self.settings.device.startswith("cuda"):
                self._each_cell_where("memory", "measuring peak memory")
            self._each_cell_where("evidence", "recording what really runs")
            self._ceilings()
            self._end_worker()
            self._purpose = "time"
            self._time()

    # One step for each cell

    def _check(self) -> None:
        """Build every cell once: what the user can mend is refused before anything is measured."""
        left = [cell for cell in self.labels if self._runs(cell) and not self._is_done("parameters", cell)]
        with self.progress.stage("loading the weights, building every cell", len(left)) as stage:
            for cell in left:
                stage.step(cell)
                with self._failing("load", cell):
                    self._ask("load", cells=[cell])

    def _each_cell(self, pass_: str, title: str) -> None:
        self._steps(pass_, title, [(cell, {}) for cell in self.labels])

    def _each_cell_where(self, pass_: str, title: str) -> None:
        steps = [
            (cell, {"workload": workload, "runtime": runtime})
            for workload, runtime in self.timings
            for cell in self.labels
        ]
        self._steps(pass_, title, steps)

    def _steps(self, pass_: str, title: str, steps: list[tuple[str, dict[str, str]]]) -> None:
        left = [s for s in steps if not self._is_done(pass_, s[0], *s[1].values()) and self._runs(s[0], *s[1].values())]
        with self.progress.stage(title, len(left)) as stage:
            for cell, where in left:
                stage.step(" ".join([cell, *where.values()]))
                with self._failing(pass_, cell, **where):
                    answer = self._ask(pass_, cell=cell, **where)
                    self._append_answer({**answer, "type": pass_, "cell": cell, **where})
                    if pass_ == "verify" and not answer["equivalent"]:
                        reason = answer.get("reason") or "no reason given"
                        self._fail(pass_, cell, CellFailure("not_equivalent", reason))
                    if pass_ == "evidence" and (again := answer.get("recompiles")):
                        reason = f"compiled {again} more graphs after its warm-up, so a latency may hold a compilation"
                        self._fail(pass_, cell, CellFailure("invalid", reason), **where)

    def _ceilings(self) -> None:
        """What the device can reach, and the least that each cell asks of it."""
        if self._is_done("ceiling"):
            return
        with self.progress.stage("measuring what the device can reach", 1):
            try:
                costs = [
                    {**self._ask("cost", cell=cell, workload=workload), "type": "cost"}
                    | {"cell": cell, "workload": workload}
                    for workload in self.settings.workloads
                    for cell in self.labels
                    if self._runs(cell)
                ]
                self._append_answer({**self._ask("ceilings"), "type": "ceiling"}, *costs)
            except CellFailure as failure:  # no cell is to blame, and none needs it
                self._end_worker()
                self.progress.note(f"what the device can reach is not known: {failure.reason}")

    # Timing

    def _time(self) -> None:
        """Blocks in fresh processes until every workload and runtime is known well enough.

        Kalibera & Jones, ISMM 2013: replicate at the level where the variance lives; what differs from one process
        to the next (addresses, clocks, the choice of kernels) is part of the noise.
        """
        while waiting := [where for where, timing in self.timings.items() if not timing.stopped]:
            for where in waiting:
                if not self._cells(where):
                    self._stop(where, "failed")
                elif reason := self._reason_to_stop(where):  # the earlier start was ended before it could say so
                    self._stop(where, reason)
                else:
                    self._time_in_process(where)
                if where is waiting[-1]:
                    self._end_worker()

    def _time_in_process(self, where: Where) -> None:
        """Up to `blocks_per_process` blocks of one workload and runtime in the present worker."""
        measure, timing = self.settings.measure, self.timings[where]
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
            # A share of the time for each process, or a slow device would never see a second one.
            if enough or (measure.max_seconds and spent_s >= measure.max_seconds / measure.min_processes):
                return

    def _prepare(self, where: Where) -> bool:
        """Make every cell ready in the present worker; False where a cell failed and the worker is gone."""
        cells = self._cells(where)
        visits = [(cell, 0) for cell in cells]
        if (BASELINE, 0) in visits:
            visits.append((BASELINE, 1))
        workload, runtime = where
        with self.progress.stage(f"preparing {workload} {runtime} in process {self._number()}", len(visits)) as stage:
            with self._failing("time", cells[0], workload=workload, runtime=runtime) as outcome:
                self._ask("enter", workload=workload, runtime=runtime, cell=cells[0])
            if outcome.failed:
                return False
            self._ready = self._ready or self._launched()  # the next process starts while nothing is timed
            for cell, copy in visits:
                stage.step(cell)
                with self._failing("time", cell, workload=workload, runtime=runtime) as outcome:
                    answer = self._ask("prepare", cell=cell, copy=copy)
                    if answer.get("compile_s") is not None:
                        self.writer.append(
                            {
                                "type": "compile",
                                "cell": cell,
                                "workload": workload,
                                "runtime": runtime,
                                "process": self._process,
                                "seconds": answer["compile_s"],
                            }
                        )
                if outcome.failed:
                    return False
        self._await_next()
        return True

    def _block(self, where: Where) -> bool:
        """One block, measured again under a brake or beside a foreign process; False where a cell failed in it."""
        timing = self.timings[where]
        most = self.settings.measure.max_attempts
        while True:
            attempt = timing.attempts
            timing.attempts += 1
            started = time.monotonic()
            samples = self._visits(where, timing.blocks, attempt)
            if samples is None:
                return False
            elapsed_s = time.monotonic() - started
            timing.measured_s += elapsed_s
            telemetry = self._monitor.sample(self._own_pids())
            brakes = braked(telemetry)
            timing.braked += bool(brakes)
            state = "ok" if not brakes else "repeat" if timing.braked < most else "flagged"
            if brakes:
                self.progress.note(f"block {timing.blocks}, attempt {attempt + 1}: {state} ({', '.join(brakes)})")
            self._close_block(where, attempt, state, telemetry, elapsed_s)
            if state != "repeat":
                timing.samples += samples
                timing.blocks += 1
                timing.attempts = timing.braked = 0
                timing.processes.add(self._process)
                return True

    def _visits(self, where: Where, block: int, attempt: int) -> list[dict[str, Any]] | None:
        """All visits of one block, in its random order; None where a cell failed."""
        workload, runtime = where
        order = block_order(self._cells(where), self.settings.seed, workload, runtime, block, attempt)
        taken: list[dict[str, Any]] = []
        repeats = self.settings.measure.repeats
        with self.progress.stage(self._block_title(where), len(order)) as stage:
            for position, (cell, copy) in enumerate(order):
                stage.step(cell)
                visit = {
                    "workload": workload,
                    "runtime": runtime,
                    "cell": cell,
                    "copy": copy,
                    "process": self._process,
                    "block": block,
                    "attempt": attempt,
                    "position": position,
                }
                with self._failing("time", cell, workload=workload, runtime=runtime) as outcome:
                    answer = self._ask("visit", cell=cell, copy=copy, repeats=repeats)
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
        self.writer.append(
            {
                "type": "block",
                "workload": where[0],
                "runtime": where[1],
                "process": self._process,
                "block": self.timings[where].blocks,
                "attempt": attempt,
                "state": state,
                "flags": flags(telemetry),
                "time": time.time(),
                "elapsed_s": elapsed_s,
                **asdict(telemetry),
            }
        )

    def _reason_to_stop(self, where: Where) -> str | None:
        timing, measure = self.timings[where], self.settings.measure
        if not timing.blocks:
            return None
        return stop_reason(
            half_widths(timing.samples, self.settings.factors),
            timing.blocks,
            len(timing.processes),
            timing.measured_s,
            target=self.settings.target(where[1]),
            max_seconds=self.settings.limit_s(timing.blocks, len(timing.processes)),
            min_blocks=measure.min_blocks,
            min_processes=measure.min_processes,
            max_blocks=measure.max_blocks,
        )

    def _stop(self, where: Where, reason: str) -> None:
        timing = self.timings[where]
        timing.stopped = True
        self.writer.append(
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
        widths = half_widths(timing.samples, self.settings.factors)
        return {name: width if math.isfinite(width) else None for name, width in widths.items()}

    def _block_title(self, where: Where) -> str:
        timing, measure = self.timings[where], self.settings.measure
        title = f"timing {where[0]} {where[1]}, block {timing.blocks + 1}"
        if not timing.blocks:
            return title
        a_block_s = timing.measured_s / timing.blocks
        most = self.settings.limit_s(measure.min_blocks, measure.min_processes) - timing.measured_s
        least = max(0, measure.min_blocks - timing.blocks) * a_block_s
        if measure.max_seconds:
            least = min(least, most)
        most = max(least, most)
        return f"{title} ({duration(max(0, least))} to {duration(max(0, most))} left)"

    # Cells and their failures

    def _cells(self, where: Where) -> list[str]:
        return [cell for cell in self.labels if self._runs(cell, *where)]

    def _runs(self, cell: str, workload: str | None = None, runtime: str | None = None) -> bool:
        """Whether a cell is still to be run there: not after a failure, except that of the gate."""
        scopes = {(cell, None, None), (cell, workload, runtime)}
        return not any(self.failures.get(scope, "not_equivalent") != "not_equivalent" for scope in scopes)

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
            self._end_worker()
            self._fail(pass_, cell, failure, workload, runtime)

    def _fail(
        self,
        pass_: str,
        cell: str,
        failure: CellFailure,
        workload: str | None = None,
        runtime: str | None = None,
    ) -> None:
        self.failures[cell, workload, runtime] = failure.status
        self.progress.note(f"{cell}: {failure.status} in the {pass_} pass: {failure.reason}")
        self.writer.append(
            {
                "type": "failure",
                "cell": cell,
                "workload": workload,
                "runtime": runtime,
                "status": failure.status,
                "reason": failure.reason,
                "pass": pass_,
                "peak_allocated_bytes": failure.peak_allocated_bytes,
            }
        )

    def _append_answer(self, *lines: dict[str, Any]) -> None:
        """To the record, what a worker answered. Raises `CellFailure` where it makes no line that can be used."""
        try:
            self.writer.append(*lines)
        except ValueError as error:
            raise CellFailure("crashed", f"the worker's answer cannot be used: {str(error)[:200]}") from None

    def _is_done(self, *step: str) -> bool:
        return step in self._finished

    def _take_up(self, done: Record) -> None:
        """Continue from a record: finished steps, failures, and the blocks that were closed."""
        for line in done.of("failure"):
            self.failures[line["cell"], line.get("workload"), line.get("runtime")] = line["status"]
        for pass_ in ("parameters", "verify"):
            self._finished |= {(pass_, line["cell"]) for line in done.of(pass_)}
        for pass_ in ("memory", "evidence"):
            self._finished |= {(pass_, line["cell"], line["workload"], line["runtime"]) for line in done.of(pass_)}
        if done.of("ceiling"):
            self._finished.add(("ceiling",))
        self._process = max((line["process"] for line in done.of("process")), default=-1)
        closed = set()
        for line in done.of("block"):
            timing = self.timings[line["workload"], line["runtime"]]
            timing.measured_s += line.get("elapsed_s") or 0.0
            if line["state"] != "repeat":
                closed.add((line["workload"], line["runtime"], line["process"], line["block"], line["attempt"]))
                timing.blocks = max(timing.blocks, line["block"] + 1)
                timing.processes.add(line["process"])
        for line in [*done.of("sample"), *done.of("block")]:
            timing = self.timings[line["workload"], line["runtime"]]
            if line["block"] == timing.blocks:  # begun and not closed: its next attempt is another one
                timing.attempts = max(timing.attempts, line["attempt"] + 1)
                timing.braked += line["type"] == "block"
        for line in done.of("sample"):
            if tuple(line[k] for k in ("workload", "runtime", "process", "block", "attempt")) in closed:
                self.timings[line["workload"], line["runtime"]].samples.append(line)
        for line in done.of("stop"):
            self.timings[line["workload"], line["runtime"]].stopped = True

    # The worker

    def _ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        return self._ready_worker().ask(op, self.settings.measure.step_timeout_s, **arguments)

    def _ready_worker(self) -> WorkerProcess:
        if self._worker is None:
            started = time.monotonic()
            self._process = self._number()
            self._worker = self._ready or self._launched()
            self._ready = None
            try:
                self._worker.ask("open", QUIET_S, config=self.settings.to_dict())
            except CellFailure as failure:  # no cell has run in it
                raise UserError(f"no worker could be started: {failure.reason}") from None
            self.writer.append(
                {
                    "type": "process",
                    "process": self._process,
                    "pid": self._worker.pid,
                    "purpose": self._purpose,
                    "time": time.time(),
                    "setup_s": time.monotonic() - started,
                }
            )
        return self._worker

    def _await_next(self) -> None:
        """Wait until the next worker is up, so that its start takes nothing from what is timed."""
        if self._ready is None:
            return
        try:
            self._ready.ask("probe", QUIET_S, device=self.settings.device)
        except (CellFailure, UserError):  # the next start tells why
            self._ready.end()
            self._ready = None

    def _launched(self) -> WorkerProcess:
        return self._stack.enter_context(self._start_worker(self.writer.directory / "worker.log"))

    def _number(self) -> int:
        """The number of the present worker, or of the next one."""
        return self._process if self._worker is not None else self._process + 1

    def _end_worker(self) -> None:
        if self._worker is not None:
            self._worker.end()
            self._worker = None

    def _own_pids(self) -> set[int]:
        return {self._worker.pid} if self._worker is not None else set()


@dataclass
class Outcome:
    """Whether a step failed."""

    failed: bool = False
