"""`python -m qwen3bench.aa [campaigns=20] [KEY=VALUE …]`: how often does the measuring call noise an effect?

A/A campaigns: every cell of the 2^5 is a copy of the baseline under the cell's label, measured and analysed as any run
is, so each significant effect is a false one. Each campaign has a seed of its own and is a run directory of its own,
`campaign-01`, …; with the same run.dir finished campaigns are read and an unfinished one is continued.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import binom

from qwen3bench.analysis.run import Run, load_run, to_csv, write_derived
from qwen3bench.analysis.significance import ALPHA
from qwen3bench.campaign.passes import Campaign
from qwen3bench.campaign.progress import Reporter
from qwen3bench.campaign.worker_pool import QUIET_S
from qwen3bench.campaign.worker_process import WorkerProcess
from qwen3bench.config.cli import compose, guarded
from qwen3bench.config.settings import Settings
from qwen3bench.errors import UserError
from qwen3bench.record.design import BASELINE, label
from qwen3bench.record.environment import differences
from qwen3bench.record.messages import CellFailure
from qwen3bench.record.reader import RecordWriter, read_record, write_atomic

# On a noisy machine more than sixteen blocks take time and tell nothing more about false alarms.
DEFAULTS = (
    "model=tiny",
    "workload=prefill",
    "prompt_tokens=64",
    "design=full",
    "device=cpu",
    "measure=quick",
    "measure.max_seconds=30",
    "measure.max_blocks=16",
)


class CopiesProcess(WorkerProcess):
    """A worker that is asked for one more copy of the baseline wherever another cell is meant."""

    def __init__(self, log: Path, *command: tuple[str, ...]) -> None:
        super().__init__(log, *command)
        self._copies: dict[tuple[str, int], int] = {}

    def ask(self, op: str, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        """As `WorkerProcess.ask`; each (cell, copy) has one model of its own, the same for all requests."""
        if "copy" in arguments:
            model = (arguments["cell"], arguments["copy"])
            arguments["copy"] = self._copies.setdefault(model, len(self._copies))
        if "cell" in arguments:
            arguments["cell"] = BASELINE
        return super().ask(op, timeout_s, **arguments)


class CopiesCampaign(Campaign):
    """The timed pass alone: the others say nothing about copies."""

    def run(self) -> None:
        """Time the cells until the stopping rule is content."""
        with self._workers:
            self.timings.run(at_once=1)


@dataclass(frozen=True)
class Outcome:
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


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 no more false alarms than chance allows, 3 more, 1 an error, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if any(argument in ("-h", "--help") for argument in arguments):
        print(f"{__doc__}\n{main.__doc__}\nUnless told otherwise: {' '.join(DEFAULTS)}")
        return 0
    return guarded(lambda: measure(compose([*DEFAULTS, *_settings_of(arguments)]), _count(arguments)))


def measure(settings: Settings, count: int) -> int:
    """Run `count` campaigns, write aa.csv and aa.md, print what came out; the exit status."""
    directory = settings.dir or Path("results") / f"{datetime.now():%Y-%m-%d_%H-%M-%S}-aa-{settings.model.name}"
    directory.mkdir(parents=True, exist_ok=True)
    settings, identity = _identified(settings, directory)
    outcomes: list[Outcome] = []
    print(f"{count} A/A campaigns on {len(settings.cells)} copies of {settings.model.name}; in {directory}")
    for number in range(1, count + 1):
        started = time.monotonic()
        home = directory / f"campaign-{number:02}"
        try:
            _campaign(replace(settings, seed=settings.seed + number - 1, dir=home, resume=None), identity)
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


def outcomes_of(run: Run, number: int) -> list[Outcome]:
    """The outcomes of campaign `number`, one for each workload and runtime.

    Raises `UserError` where the campaign could not compare all cells.
    """
    if failures := run.record.of("failure"):
        raise UserError(f"{run.path}: {failures[0]['cell']} {failures[0]['status']}: {failures[0]['reason']}")
    outcomes = []
    for stop in run.record.of("stop"):
        effects = _here(run.effects, stop)
        effects = effects[(effects["metric"] == "latency_s") & (effects["kind"] != "shapley")]
        p = effects["p_holm"].to_numpy(dtype=float)
        estimates = effects["estimate"].to_numpy(dtype=float)
        if not len(p) or np.isnan(p).any():
            raise UserError(f"{run.path}: {stop['blocks']} blocks give no p; raise measure.max_seconds or max_blocks")
        outcomes.append(
            Outcome(
                campaign=number,
                seed=int(run.config["seed"]),
                workload=stop["workload"],
                runtime=stop["runtime"],
                blocks=stop["blocks"],
                processes=stop["processes"],
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


def _conditions(outcomes: Sequence[Outcome]) -> int:
    return len({(each.workload, each.runtime) for each in outcomes})


def false_alarms(outcomes: Sequence[Outcome]) -> int:
    """The number of campaigns with any significant effect."""
    return len({each.campaign for each in outcomes if each.significant})


def summary(outcomes: Sequence[Outcome]) -> str:
    """What came out, in one line."""
    campaigns, conditions = len({each.campaign for each in outcomes}), _conditions(outcomes)
    each_of = f" for each of {conditions} workloads and runtimes" if conditions > 1 else ""
    return (
        f"{false_alarms(outcomes)} of {campaigns} campaigns with any Holm-significant effect "
        f"({ALPHA:.0%} family-wise expected{each_of}: {_rate(conditions) * campaigns:.2g}; "
        f"at most {allowed(campaigns, conditions)} allowed)"
    )


def page(outcomes: Sequence[Outcome], settings: Settings, identity: dict[str, Any]) -> str:
    """The campaigns as a Markdown page."""
    heads = ("campaign", "seed", "workload", "runtime", "blocks", "processes")
    lines = [
        " | ".join([*heads, "smallest Holm p", "its effect", "widest effect", "A/A copy"]),
        " | ".join(["---"] * (len(heads) + 4)),
    ]
    for each in outcomes:
        own = [str(getattr(each, head)) for head in heads] + [f"{each.smallest_p_holm:.3f}", each.term]
        lines.append(" | ".join([*own, f"×{each.widest_effect:.4f}", f"×{each.aa_ratio:.4f}"]))
    return (
        f"# A/A campaigns\n\n**{summary(outcomes)}**\n\n"
        f"Every one of the {len(settings.cells)} cells is the same {settings.model.name} model "
        f"({settings.dtype}, {identity['environment']['device']}, torch {identity['environment']['torch']}); "
        f"so each effect is noise.\n\n" + "".join(f"| {line} |\n" for line in lines)
    )


def _count(arguments: Sequence[str]) -> int:
    given = [argument.partition("=")[2] for argument in arguments if argument.startswith("campaigns=")]
    if not given:
        return 20
    if not (given[-1].isdecimal() and 1 <= int(given[-1]) <= 10_000):
        raise UserError(f"campaigns={given[-1]} must be a whole number from 1 to 10000")
    return int(given[-1])


def _settings_of(arguments: Sequence[str]) -> list[str]:
    return [argument for argument in arguments if not argument.startswith("campaigns=")]


def _identified(settings: Settings, directory: Path) -> tuple[Settings, dict[str, Any]]:
    """The settings on the device present, and what that is."""
    patience_s = settings.measure.step_timeout_s
    try:
        with WorkerProcess(directory / "worker.log") as worker:
            settings = settings.resolved(worker.ask("probe", QUIET_S, device=settings.device)["device"])
            worker.ask("open", QUIET_S, config=settings.to_dict())
            identity = worker.ask("identify", patience_s)
    except CellFailure as failure:
        raise UserError(f"no worker could be started: {failure}; see {directory / 'worker.log'}") from None
    # What is the same for all campaigns; config and weights differ by the seed.
    for name in ("config", "weights"):
        del identity["fingerprint"][name]
    return settings, identity


def _campaign(settings: Settings, identity: dict[str, Any]) -> None:
    """Measure one campaign, or what is left of it, and write its tables."""
    assert settings.dir is not None
    progress = Reporter()
    progress.console.quiet = not progress.console.is_terminal  # a line per campaign is enough for a log
    with RecordWriter(settings.dir) as writer, progress.running():
        done = None if writer.empty else read_record(settings.dir)
        config = settings.to_dict()
        if done is None:
            writer.append(_first_line(settings, config, identity))
        else:
            changed = differences(done.run.get("fingerprint", {}), identity["fingerprint"])
            old = {**done.run["config"], "run": config["run"]}
            if changed or old != config:
                raise UserError(
                    f"{settings.dir}: cannot be continued, as {', '.join(changed) or 'the configuration'} changed "
                    "since it began; name another run.dir"
                )
            if done.of("end"):
                return
        CopiesCampaign(settings, writer, progress, done, start_worker=CopiesProcess).run()
        writer.append({"type": "end", "status": "finished", "time": time.time()})
    write_derived(load_run(settings.dir))


def _first_line(settings: Settings, config: dict[str, Any], identity: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "run",
        "created": datetime.now().astimezone().isoformat(timespec="seconds"),
        "config": config,
        "factors": list(settings.factors),
        "cells": [label(cell) for cell in settings.cells],
        "workloads": list(settings.workloads),
        "runtimes": list(settings.runtimes),
        "model": f"{settings.model.name} (A/A: each cell is the baseline)",
        "device": identity["environment"]["device"],
        "dtype": settings.dtype,
        "fingerprint": identity["fingerprint"],
    }


def _here(table: pd.DataFrame, stop: dict[str, Any]) -> pd.DataFrame:
    return table[(table["workload"] == stop["workload"]) & (table["runtime"] == stop["runtime"])]


def _said(outcome: Outcome) -> str:
    return (
        f"{outcome.workload} {outcome.runtime}: smallest Holm p {outcome.smallest_p_holm:.3f} ({outcome.term}), "
        f"widest effect ×{outcome.widest_effect:.4f}, A/A copy ×{outcome.aa_ratio:.4f}, "
        f"{outcome.blocks} blocks in {outcome.processes} processes"
    )


if __name__ == "__main__":
    sys.exit(main())
