"""What a run has done so far, as its record tells: so that it continues where it was."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from qwen3bench.config.settings import Settings
from qwen3bench.record.reader import Record

Where = tuple[str, str]  # workload, runtime


@dataclass
class Timing:
    """What is known of one workload in one runtime: closed blocks and their samples."""

    samples: list[dict[str, Any]] = field(default_factory=list)
    blocks: int = 0
    attempts: int = 0  # at the next block, whatever became of them
    braked: int = 0  # of these, ended under a brake
    processes: set[int] = field(default_factory=set)
    measured_s: float = 0.0
    setup_s: float = 0.0  # of its last process
    more_s: float = 0.0  # spent on getting processes ready beyond the least that a run takes
    stopped: bool = False


class Done:
    """Finished steps, failures, timings and the last process of a run; `record` is what earlier starts wrote."""

    def __init__(self, settings: Settings, record: Record | None = None) -> None:
        self.failures: dict[tuple[str, str | None, str | None], str] = {}  # cell, workload, runtime → status
        self.steps: set[tuple[str, ...]] = set()  # (pass, cell, workload, runtime) of those that ended
        self.process = -1
        self.peak_reserved_bytes = 0  # of the memory pass, over all cells so far
        self.timings: dict[Where, Timing] = {
            (workload, runtime): Timing() for workload in settings.workloads for runtime in settings.runtimes
        }
        if record is not None:
            self._take_up_steps(record)
            self._take_up_blocks(record)

    def runs(self, cell: str, workload: str | None = None, runtime: str | None = None) -> bool:
        """Whether a cell is still to be run there: not after a failure, except that of the gate."""
        scopes = {(cell, None, None), (cell, workload, runtime)}
        return not any(self.failures.get(scope, "not_equivalent") != "not_equivalent" for scope in scopes)

    def see_peak(self, answer: dict[str, Any]) -> None:
        """Take note of a step's peak memory, where it tells of any."""
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, answer.get("peak_reserved_bytes") or 0)

    def _take_up_steps(self, record: Record) -> None:
        for line in record.of("failure"):
            self.failures[line["cell"], line.get("workload"), line.get("runtime")] = line["status"]
        for pass_ in ("parameters", "verify"):
            self.steps |= {(pass_, line["cell"]) for line in record.of(pass_)}
        for pass_ in ("memory", "evidence"):
            self.steps |= {(pass_, line["cell"], line["workload"], line["runtime"]) for line in record.of(pass_)}
        for line in record.of("memory"):
            self.see_peak(line)
        if record.of("ceiling"):
            self.steps.add(("ceiling",))
        self.process = max((line["process"] for line in record.of("process")), default=-1)

    def _take_up_blocks(self, record: Record) -> None:
        closed = set()
        for line in record.of("block"):
            timing = self.timings[line["workload"], line["runtime"]]
            timing.measured_s += line.get("elapsed_s") or 0.0
            if line["state"] != "repeat":
                closed.add(_attempt(line))
                timing.more_s += line.get("more_s") or 0.0
                timing.blocks = max(timing.blocks, line["block"] + 1)
                timing.processes.add(line["process"])
        for line in [*record.of("sample"), *record.of("block")]:
            timing = self.timings[line["workload"], line["runtime"]]
            if line["block"] == timing.blocks:  # begun and not closed: its next attempt is another one
                timing.attempts = max(timing.attempts, line["attempt"] + 1)
                timing.braked += line["type"] == "block"
        for line in record.of("sample"):
            if _attempt(line) in closed:
                self.timings[line["workload"], line["runtime"]].samples.append(line)
        for line in record.of("stop"):
            self.timings[line["workload"], line["runtime"]].stopped = True


def _attempt(line: dict[str, Any]) -> tuple[Any, ...]:
    """The attempt at a block that a line belongs to."""
    return tuple(line[name] for name in ("workload", "runtime", "process", "block", "attempt"))
