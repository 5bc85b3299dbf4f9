"""A/A campaigns: every cell is a copy of the baseline, so each significant effect is a false one; they are counted."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from scipy.stats import binom

from qwen3bench.analysis.run import Run, load_run, to_csv, write_derived
from qwen3bench.analysis.significance import ALPHA, holm
from qwen3bench.campaign import continuation
from qwen3bench.campaign.blocks import Blocks
from qwen3bench.campaign.context import RunContext
from qwen3bench.campaign.progress import Reporter
from qwen3bench.campaign.state import RunState
from qwen3bench.campaign.worker_pool import ProcessNumbers, Seat, WorkerPool
from qwen3bench.campaign.worker_process import WORKER, WorkerProcess
from qwen3bench.config.settings import Settings
from qwen3bench.errors import UserError
from qwen3bench.record.card import Card
from qwen3bench.record.design import BASELINE
from qwen3bench.record.environment import differences
from qwen3bench.record.files import refuse_no_directory, write_atomic
from qwen3bench.record.lines import EndLine, FailureLine, StopLine
from qwen3bench.record.messages import Enter, Identity, Prepare, Request, Visit
from qwen3bench.record.reader import read_record
from qwen3bench.record.states import EndStatus
from qwen3bench.record.writer import RecordWriter
from qwen3bench.reporting.units import p_value

R = TypeVar("R")


class CopiesProcess(WorkerProcess):
    """A worker that is asked for one more copy of the baseline wherever another cell is meant."""

    def __init__(self, log: Path, command: tuple[str, ...] = WORKER) -> None:
        super().__init__(log, command)
        self._copies: dict[tuple[str, int], int] = {}

    def ask(self, request: Request[R], timeout_s: float) -> R:
        """As `WorkerProcess.ask`; each (cell, copy) has one model of its own, the same for all requests."""
        asked: Request[Any] = request
        if isinstance(request, Prepare | Visit):
            copy = self._copies.setdefault((request.cell, request.copy), len(self._copies))
            asked = replace(request, cell=BASELINE, copy=copy)
        elif isinstance(request, Enter):
            asked = replace(request, cell=BASELINE)
        answer: R = super().ask(asked, timeout_s)
        return answer


@dataclass(frozen=True)
class CopiesOutcome:
    """One campaign's false alarms in one workload and runtime.

    `smallest_p_holm` over the 2^k − 1 effects; `term` is the effect it belongs to. `widest_effect` is the one farthest
    from 1; `aa_ratio` the latency of the baseline's second copy over the first's.
    """

    campaign: int
    seed: int
    workload: str
    runtime: str
    blocks: int
    processes: int
    term: str
    smallest_p_holm: float
    widest_effect: float
    aa_ratio: float

    @property
    def significant(self) -> bool:
        """Whether some effect is called real."""
        return self.smallest_p_holm < ALPHA


def measure(settings: Settings, count: int) -> int:
    """Run `count` campaigns, write aa.csv and aa.md, print what came out; the exit status.

    Raises `UserError` where the directory holds other files and no campaigns, or cannot be one.
    """
    if settings.resume:
        raise UserError(f"resume={settings.resume} continues a run; campaigns go on with the same run.dir")
    directory = settings.dir or Path("results") / f"{datetime.now():%Y-%m-%d_%H-%M-%S}-aa-{settings.model.name}"
    refuse_no_directory(directory)
    log = directory / "worker.log"  # alone, where the first campaign did not begin
    if directory.is_dir() and not _home(directory, 1).is_dir() and {*directory.iterdir()} - {log}:
        raise UserError(f"run.dir={directory}: holds other files and no campaigns; name a new directory")
    with continuation.no_trace_where_refused(directory):
        directory.mkdir(parents=True, exist_ok=True)
        with WorkerProcess(log) as worker:
            settings, identity = continuation.identified(settings, worker, directory)
    outcomes: list[CopiesOutcome] = []
    print(f"{count} A/A campaigns on {len(settings.cells)} copies of {settings.model.name}; in {directory}")
    for number in range(1, count + 1):
        started = time.monotonic()
        home = _home(directory, number)
        try:
            _campaign(replace(settings, seed=settings.seed + number - 1, dir=home), identity)
        except KeyboardInterrupt:
            print(f"\ninterrupted; nothing measured is lost. Continue with run.dir={directory}", file=sys.stderr)
            raise
        found = outcomes_of(load_run(home), number)
        outcomes += found
        for each in found:
            print(f"{number:3}  {_said(each)}  ({time.monotonic() - started:.0f} s)", flush=True)
    write_atomic(directory / "aa.csv", to_csv(pd.DataFrame([asdict(each) for each in outcomes])))
    write_atomic(directory / "aa.md", page(outcomes, settings, identity))
    print(f"{summary(outcomes)}\n{directory / 'aa.md'}")
    return 3 if false_alarms(outcomes) > allowed(count, _conditions(outcomes)) else 0


def _home(directory: Path, number: int) -> Path:
    return directory / f"campaign-{number:02}"


def outcomes_of(run: Run, number: int) -> list[CopiesOutcome]:
    """The outcomes of campaign `number`, one for each workload and runtime.

    Raises `UserError` where the campaign could not compare all cells.
    """
    for failure in run.record.of(FailureLine):
        raise UserError(f"{run.path}: {failure.cell} {failure.status}: {failure.reason}")
    outcomes = []
    for stop in run.record.stops:
        effects = _here(run.effects, stop)
        effects = effects[(effects["metric"] == "latency_s") & (effects["kind"] != "shapley")]
        p = holm(effects["p"])  # over all of them; a run's own is over those of one order
        estimates = effects["estimate"].to_numpy(dtype=float)
        if not len(p) or np.isnan(p).any():
            raise UserError(f"{run.path}: {stop.blocks} blocks give no p; raise measure.max_seconds or max_blocks")
        outcomes.append(
            CopiesOutcome(
                campaign=number,
                seed=int(run.config["seed"]),
                workload=stop.workload,
                runtime=stop.runtime,
                blocks=stop.blocks or 0,
                processes=stop.processes or 0,
                term=str(effects["term"].iloc[p.argmin()]),
                smallest_p_holm=float(p.min()),
                widest_effect=float(estimates[abs(estimates - 1).argmax()]),
                aa_ratio=float(_here(run.controls.aa, stop)["ratio"].iloc[0]),
            )
        )
    return outcomes


def allowed(campaigns: int, conditions: int = 1) -> int:
    """How many of `campaigns` may show a significant effect: 2 of 20.

    The 90 % quantile of a binomial with the family-wise error that Holm's method promises, which each workload and
    runtime of a campaign has for itself; honest p exceed it in less than one trial in ten.
    """
    return int(binom.ppf(0.9, campaigns, _rate(conditions)))


def _rate(conditions: int) -> float:
    """How often a campaign of so many families of effects has a false alarm."""
    return 1 - (1 - ALPHA) ** conditions


def _conditions(outcomes: Sequence[CopiesOutcome]) -> int:
    return len({(each.workload, each.runtime) for each in outcomes})


def false_alarms(outcomes: Sequence[CopiesOutcome]) -> int:
    """The number of campaigns with any significant effect."""
    return len({each.campaign for each in outcomes if each.significant})


def summary(outcomes: Sequence[CopiesOutcome]) -> str:
    """What came out, in one line."""
    campaigns, conditions = len({each.campaign for each in outcomes}), _conditions(outcomes)
    each_of = f" for each of {conditions} workloads and runtimes" if conditions > 1 else ""
    return (
        f"{false_alarms(outcomes)} of {campaigns} campaigns with any Holm-significant effect "
        f"({ALPHA:.0%} family-wise expected{each_of}: {_rate(conditions) * campaigns:.2g}; "
        f"at most {allowed(campaigns, conditions)} allowed)"
    )


def page(outcomes: Sequence[CopiesOutcome], settings: Settings, identity: Identity) -> str:
    """The campaigns as a Markdown page."""
    heads = ("campaign", "seed", "workload", "runtime", "blocks", "processes")
    lines = [
        " | ".join([*heads, "smallest Holm p", "its effect", "widest effect", "A/A copy"]),
        " | ".join(["---"] * (len(heads) + 4)),
    ]
    for each in outcomes:
        own = [str(getattr(each, head)) for head in heads] + [p_value(each.smallest_p_holm), each.term]
        lines.append(" | ".join([*own, f"×{each.widest_effect:.4f}", f"×{each.aa_ratio:.4f}"]))
    return (
        f"# A/A campaigns\n\n**{summary(outcomes)}**\n\n"
        f"Every one of the {len(settings.cells)} cells is the same {settings.model.name} model "
        f"({settings.dtype}, {identity.environment['device']}, torch {identity.environment['torch']}); "
        f"so each effect is noise.\n\n" + "".join(f"| {line} |\n" for line in lines)
    )


def _campaign(settings: Settings, identity: Identity) -> None:
    """Measure one campaign, or what is left of it, and write its tables."""
    assert settings.dir is not None
    # What is the same for all campaigns; config and weights differ by the seed.
    same = {name: value for name, value in identity.fingerprint.items() if name not in ("config", "weights")}
    progress = Reporter()
    progress.console.quiet = not progress.console.is_terminal  # a line per campaign is enough for a log
    with RecordWriter(settings.dir) as writer, progress.running():
        done = None if writer.empty else read_record(settings.dir)
        config = settings.to_dict()
        if done is None:
            first = continuation.first_line(settings, config, replace(identity, fingerprint=same))
            writer.append(replace(first, model=f"{settings.model.name} (A/A: each cell is the baseline)"))
        else:
            changed = differences(done.run.fingerprint or {}, same)
            if changed or {**done.run.config, "run": config["run"]} != config:
                raise UserError(
                    f"{settings.dir}: cannot be continued, as {', '.join(changed) or 'the configuration'} changed "
                    "since it began; name another run.dir"
                )
            if done.of(EndLine):
                return
        state = RunState(settings, done)
        seat = Seat(CopiesProcess, identity.environment.get("host"), identity.environment.get("card"))
        with WorkerPool(settings, writer, seat, numbers=ProcessNumbers(state.process)) as workers:
            # The timed pass alone: the others say nothing about copies.
            Blocks(RunContext(settings, writer, progress, state, workers), Card.of(settings.device)).run(at_once=1)
        writer.append(EndLine(status=EndStatus.FINISHED, time=time.time()))
    write_derived(load_run(settings.dir))


def _here(table: pd.DataFrame, stop: StopLine) -> pd.DataFrame:
    return table[(table["workload"] == stop.workload) & (table["runtime"] == stop.runtime)]


def _said(outcome: CopiesOutcome) -> str:
    return (
        f"{outcome.workload} {outcome.runtime}: smallest Holm p {p_value(outcome.smallest_p_holm)} ({outcome.term}), "
        f"widest effect ×{outcome.widest_effect:.4f}, A/A copy ×{outcome.aa_ratio:.4f}, "
        f"{outcome.blocks} blocks in {outcome.processes} processes"
    )
