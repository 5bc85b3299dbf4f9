"""The pass that times: blocks in fresh processes, until every workload and runtime is known well enough."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from qwen3bench.analysis.stopping import half_widths, stop_reason
from qwen3bench.campaign.failures import Ledger
from qwen3bench.campaign.progress import duration
from qwen3bench.campaign.state import Timing, Where
from qwen3bench.campaign.worker_process import CellFailure, Request
from qwen3bench.record.card import Monitor, Telemetry, braked, flags
from qwen3bench.record.design import BASELINE, block_order

MEASURED_PER_SETUP = 0.25  # of the time that a process takes to be ready, at least so much again is measured in it


class Timings:
    """Times the cells of a run; what is done goes to `ledger`. `monitor` looks at the card after each block."""

    def __init__(self, ledger: Ledger, monitor: Monitor) -> None:
        self._ledger = ledger
        self._monitor = monitor
        self._settings = ledger.settings
        self._workers = ledger.workers
        self._progress = ledger.progress
        self._timings = ledger.done.timings

    @property
    def processes_needed(self) -> list[Where]:
        """The workload and runtime of each process that comes next, in turn: the least that a run takes.

        Where these were not enough, as many again, as most of a process's time goes to getting ready.
        """
        needed = {
            where: max(1, self._min_processes(where) - len(timing.processes), len(timing.processes))
            for where, timing in self._timings.items()
            if not timing.stopped
        }
        turns = range(max(needed.values(), default=0))
        return [where for turn in turns for where, count in needed.items() if turn < count]

    def run(self, at_once: int) -> None:
        """Blocks in fresh processes, of which up to `at_once` get ready side by side; one at a time is timed.

        Kalibera & Jones, ISMM 2013: replicate at the level where the variance lives; what differs from one process
        to the next (addresses, clocks, the choice of kernels) is part of the noise. Nothing else is timed in a
        process, as that changes what is timed after it: `flash` alone decoded 1 % slower after a prefill (H100).
        A failure beside others ends the getting ready side by side. `compile` gets ready alone: there the compiler
        times variants of its kernels to choose among them, and each process chooses for itself.
        """
        self._workers.purpose = "time"
        self._stop_what_is_known()
        while left := self.processes_needed:
            while left:
                together, left = _company(left, at_once)
                together = [where for where in together if not self._timings[where].stopped]
                if len(together) > 1 and not self._time_side_by_side(together):
                    at_once = 1
                    break
                if len(together) == 1:
                    self._time_alone(together[0])
                self._stop_what_is_known()

    def _stop_what_is_known(self) -> None:
        for where, timing in self._timings.items():
            if timing.stopped:
                continue
            if not self._ledger.cells(where):
                self._stop(where, "failed")
            elif reason := self._reason_to_stop(where, ahead_s=timing.setup_s if self._has_the_least(where) else 0.0):
                self._stop(where, reason)

    def _time_alone(self, where: Where) -> None:
        """One process, made ready and timed with none beside it."""
        if not self._ledger.cells(where):
            return
        started = time.monotonic()
        if self._prepare(where):
            self._blocks(where, time.monotonic() - started)
            self._workers.end()

    def _time_side_by_side(self, wheres: Sequence[Where]) -> bool:
        """Processes that get ready side by side and are timed one after another; False where something failed."""
        started = time.monotonic()
        self._prepare_side_by_side(wheres)
        setup_s = (time.monotonic() - started) / len(wheres)
        whole = True
        for index, where in enumerate(wheres):
            if self._timings[where].stopped:
                continue
            if not self._workers.take(index):
                whole = False
                continue
            if not self._blocks(where, setup_s):
                whole = False
                break
            self._workers.end()
        self._workers.dismiss()
        return whole

    # Getting ready

    def _preparations(self, where: Where) -> list[Request]:
        workload, runtime = where
        visits = [(cell, 0) for cell in self._ledger.cells(where)]
        if (BASELINE, 0) in visits:
            visits.append((BASELINE, 1))
        enter: Request = ("enter", {"workload": workload, "runtime": runtime, "cell": visits[0][0]})
        return [enter, *(("prepare", {"cell": cell, "copy": copy}) for cell, copy in visits)]

    def _prepare(self, where: Where) -> bool:
        """Make every cell ready in the present worker; False where a cell failed and the worker is gone."""
        requests = self._preparations(where)
        title = f"preparing {' '.join(where)} in process {self._workers.number}"
        place = {"workload": where[0], "runtime": where[1], "process": self._workers.number}
        compiled = []
        with self._progress.stage(title, len(requests) - 1) as stage:
            for op, arguments in requests:
                cell = arguments["cell"]
                if op == "prepare":
                    stage.step(cell)
                with self._ledger.failing("time", cell, *where) as outcome:
                    answer = self._workers.ask(op, **arguments)
                    if answer.get("compile_s") is not None:
                        told = {"seconds": answer["compile_s"], "options": answer.get("compile_options")}
                        compiled.append({"type": "compile", "cell": cell, **place, **told})
                if outcome.failed:
                    return False
                if op == "enter":
                    self._workers.start_ahead(1)  # while nothing is timed
        if compiled:
            self._ledger.writer.append(*compiled)
        self._workers.await_ahead()
        return True

    def _prepare_side_by_side(self, wheres: Sequence[Where]) -> None:
        """Make every cell ready in a process of its own for each of `wheres`; one that fails is ended, unblamed."""
        shares = [self._preparations(where) for where in wheres]
        names = ", ".join(dict.fromkeys(" ".join(where) for where in wheres))
        title = f"preparing {names} in {len(wheres)} processes at a time"
        with self._progress.stage(title, sum(map(len, shares)) - len(shares)) as stage:
            for op, arguments in self._workers.prepare(shares):
                if op == "prepare":
                    stage.step(arguments["cell"])
        self._workers.start_ahead(1)
        self._workers.await_ahead()

    # Blocks

    def _blocks(self, where: Where, setup_s: float) -> bool:
        """Up to `blocks_per_process` blocks in the present worker, ready after `setup_s`; False where a cell failed."""
        measure, timing = self._settings.measure, self._timings[where]
        timing.setup_s = setup_s
        more_s = setup_s if self._has_the_least(where) else 0.0
        timing.more_s += more_s
        before_s = timing.measured_s
        for blocks in itertools.count(1):
            if not self._block(where, more_s if blocks == 1 else 0.0):
                return False
            if reason := self._reason_to_stop(where):
                self._stop(where, reason)
                break
            spent_s = timing.measured_s - before_s
            # Kalibera & Jones, sec. 6: the dearer a process is to set up, the more is measured in each.
            enough = blocks >= measure.blocks_per_process and spent_s >= MEASURED_PER_SETUP * setup_s
            # A share of the time and of the blocks for each process, or there might never be a second one.
            if enough or blocks >= measure.max_blocks / self._min_processes(where):
                break
            if measure.max_seconds and spent_s >= measure.max_seconds / self._min_processes(where):
                break
        return True

    def _block(self, where: Where, more_s: float) -> bool:
        """One block, measured again under a brake or beside a foreign process; False where a cell failed in it.

        `more_s`: what it took to get its process ready, where the time allowed covers it and this is its first block.
        """
        timing = self._timings[where]
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
            self._close_block(where, attempt, state, telemetry, elapsed_s, more_s)
            if state != "repeat":
                timing.samples += samples
                timing.blocks += 1
                timing.attempts = timing.braked = 0
                timing.processes.add(self._workers.process)
                return True

    def _visits(self, where: Where, block: int, attempt: int) -> list[dict[str, Any]] | None:
        """All visits of one block, in its random order; None where a cell failed."""
        workload, runtime = where
        order = block_order(self._ledger.cells(where), self._settings.seed, workload, runtime, block, attempt)
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
                with self._ledger.failing("time", cell, workload=workload, runtime=runtime) as outcome:
                    answer = self._workers.ask("visit", cell=cell, copy=copy, repeats=repeats)
                    samples = [
                        {**sample, **visit, "repeat": repeat, "time": answer["time"]}
                        for repeat, sample in enumerate(answer["samples"])
                    ]
                    if repeats and len(samples) != repeats:
                        raise CellFailure("crashed", f"the worker answered {len(samples)} values, not {repeats}")
                    lines = [{**sample, "type": "sample"} for sample in samples]
                    self._ledger.append(*lines, {"type": "visit", **visit, "samples": len(samples)})
                    taken += samples
                if outcome.failed:
                    return None
        return taken

    def _close_block(
        self, where: Where, attempt: int, state: str, telemetry: Telemetry, elapsed_s: float, more_s: float
    ) -> None:
        self._ledger.writer.append(
            {
                "type": "block",
                "workload": where[0],
                "runtime": where[1],
                "process": self._workers.process,
                "block": self._timings[where].blocks,
                "attempt": attempt,
                "state": state,
                "flags": flags(telemetry),
                "time": time.time(),
                "elapsed_s": elapsed_s,
                "more_s": more_s,
                **asdict(telemetry),
            }
        )

    # Stopping

    def _min_processes(self, where: Where) -> int:
        return self._settings.min_processes(where[1])

    def _has_the_least(self, where: Where) -> bool:
        """Whether as many processes and blocks are measured as a run takes; what more processes cost is of its time."""
        timing, measure = self._timings[where], self._settings.measure
        return len(timing.processes) >= self._min_processes(where) and timing.blocks >= measure.min_blocks

    def _reason_to_stop(self, where: Where, ahead_s: float = 0.0) -> str | None:
        """`ahead_s`: what comes before the next block."""
        timing, measure = self._timings[where], self._settings.measure
        if not timing.blocks:
            return None
        return stop_reason(
            half_widths(timing.samples, self._settings.factors),
            timing.blocks,
            len(timing.processes),
            timing.measured_s + timing.more_s + ahead_s,
            target=self._settings.target(where[1]),
            max_seconds=self._settings.limit_s(where[1], timing.blocks, len(timing.processes)),
            min_blocks=measure.min_blocks,
            min_processes=self._min_processes(where),
            max_blocks=measure.max_blocks,
        )

    def _stop(self, where: Where, reason: str) -> None:
        timing = self._timings[where]
        timing.stopped = True
        self._ledger.writer.append(
            {
                "type": "stop",
                "workload": where[0],
                "runtime": where[1],
                "reason": reason,
                "half_width": self._half_widths(timing),
                "blocks": timing.blocks,
                "processes": len(timing.processes),
                "measured_s": timing.measured_s,
                "more_s": timing.more_s,
            }
        )

    def _half_widths(self, timing: Timing) -> dict[str, float | None]:
        """As the stopping rule sees them; what is not known yet is None, as JSON has no infinity."""
        if not timing.samples:
            return {}
        widths = half_widths(timing.samples, self._settings.factors)
        return {name: width if math.isfinite(width) else None for name, width in widths.items()}

    def _block_title(self, where: Where) -> str:
        timing, measure = self._timings[where], self._settings.measure
        title = f"timing {where[0]} {where[1]}, block {timing.blocks + 1}"
        if not timing.blocks:
            return title
        a_block_s = timing.measured_s / timing.blocks
        most = self._settings.limit_s(where[1], measure.min_blocks, self._min_processes(where))
        most -= timing.measured_s + timing.more_s
        least = max(0, measure.min_blocks - timing.blocks) * a_block_s
        if measure.max_seconds:
            least = min(least, most)
        most = max(least, most)
        return f"{title} ({duration(max(0, least))} to {duration(max(0, most))} left)"


def _company(left: list[Where], at_once: int) -> tuple[list[Where], list[Where]]:
    """Which of `left` get ready together next, at most `at_once`, and the rest in turn."""
    together = [where for where in left if where[1] != "compile"][:at_once] or left[:1]
    rest = left.copy()
    for where in together:
        rest.remove(where)
    return together, rest
