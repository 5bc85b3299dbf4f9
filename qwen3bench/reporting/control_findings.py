"""Controls in words: is the machine quiet, do negative controls read as nothing, who is the bottleneck?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from qwen3bench.analysis.controls import beyond_noise, noise_of
from qwen3bench.record.lines import BlockLine
from qwen3bench.record.states import BlockState, CellStatus
from qwen3bench.reporting.conditions import Condition, conditions
from qwen3bench.reporting.lookup import BASELINE, all_on, band, rows
from qwen3bench.reporting.units import count, interval_decimals, is_number, listing, percent, ratio, size
from qwen3bench.reporting.wording import NoVerdict

if TYPE_CHECKING:
    from qwen3bench.analysis.run import Run

_BUSY_ENOUGH = 0.9  # below this share of GPU work, eager latency is to a good part the host's


@dataclass(frozen=True)
class Control:
    """One control's outcome in words.

    `judged`: there is a limit to pass; `absent`: the run does not hold it; `unsure`: passed, but the interval reaches
    beyond the limit.
    """

    text: str
    failed: bool
    absent: bool = False
    judged: bool = True
    unsure: bool = False

    @property
    def mark(self) -> str:
        """For a list: passed, failed, or neither."""
        return "–" if self.absent or not self.judged or self.unsure else "✗" if self.failed else "✓"


def sentences(run: Run) -> list[Control]:
    """Outcome of every control that the run holds."""
    outcome = [*_equivalence(run)]
    for condition in conditions(run):
        outcome += [*_aa(run, condition), *_tie_latency(run, condition), *_drift(run, condition)]
    of_all = (_processes, _tie_memory, _flagged, _power_cap, _host, _absent)
    return [*outcome, *(control for each in of_all for control in each(run))]


def noise(run: Run, condition: Condition) -> float:
    """By how much two copies of the baseline differ, in log latency, where the A/A control fails; else 0."""
    return noise_of(condition.select(run.controls.aa))


def heard(run: Run, condition: Condition, verdict: str, estimate: float) -> str:
    """The verdict, or `noise` where two copies of the baseline are as far apart as the estimate is from 1."""
    told = not is_number(estimate) or beyond_noise(estimate, condition.select(run.controls.aa))
    return verdict if told else NoVerdict.NOISE


def heard_effects(run: Run, condition: Condition, effects: pd.DataFrame) -> pd.DataFrame:
    """Effects on latency with the verdicts that are `heard`."""
    verdicts = [heard(run, condition, row.verdict, row.estimate) for row in rows(effects)]
    return effects.assign(verdict=pd.Series(verdicts, effects.index, dtype=object))


def _equivalence(run: Run) -> Iterator[Control]:
    cells = run.cells.drop_duplicates("cell")
    verdicts = cells["equivalent"].dropna().astype(bool)
    if len(verdicts) and verdicts.all():
        text = f"Equivalence: {count(len(verdicts), 'cell')} verified, all compute the baseline's function."
        yield Control(text, False)
    unverified = cells[(cells["status"] == CellStatus.OK) & cells["equivalent"].isna() & (cells["cell"] != BASELINE)]
    if len(unverified):
        text = f"Not verified to compute the baseline's function: {listing(list(unverified['cell']))}."
        yield Control(text, True)


def _aa(run: Run, condition: Condition) -> Iterator[Control]:
    for row in rows(condition.select(run.controls.aa)):
        said, limit = ratio(row.ratio, row.lo, row.hi), f"{100 * row.limit:g} %"
        further = not row.noisy and (row.lo < 1 - row.limit or row.hi > 1 + row.limit)
        if row.noisy:
            compiled = "each compiled model chose its kernels for itself, so measure it in more processes"
            mend = compiled if condition.runtime == "compile" else "measure again on a quiet machine"
            text = (
                f"Noisy: two copies of the baseline differ by more than {limit}, {said} ({condition}). "
                f"Differences of that size and less mean nothing; {mend}."
            )
        else:
            unsure = " The interval reaches further: more processes would tell." if further else ""
            text = f"A/A: two copies of the baseline read {said}, allowed are ±{limit} ({condition}).{unsure}"
        yield Control(text, bool(row.noisy), unsure=bool(further))


def _tie_latency(run: Run, condition: Condition) -> Iterator[Control]:
    for row in rows(condition.select(run.controls.tie_latency)):
        said = f"{ratio(row.estimate, row.lo, row.hi)} ({condition})"
        outcome = "its interval holds 1" if row.ok else "its interval leaves out 1; effects of that size mean nothing"
        yield Control(f"Negative control: tie cannot change latency, and reads {said}: {outcome}.", not row.ok)


def _drift(run: Run, condition: Condition) -> Iterator[Control]:
    for text in drifts(run, condition):
        yield Control(f"Drift: {text} ({condition}); effects are taken within blocks.", False, judged=False)
    if (apart := processes_apart(run, condition)) > band(run):
        text = f"Processes: the slowest is {percent(apart)} slower than the fastest ({condition})"
        yield Control(
            f"{text}; effects are taken within blocks, and intervals count what processes do to them.",
            False,
            judged=False,
        )


def _processes(run: Run) -> Iterator[Control]:
    timed = [(condition, condition.select(run.samples)["process"].nunique()) for condition in conditions(run)]
    if alone := [str(condition) for condition, processes in timed if processes == 1]:
        text = f"Timed in one process ({listing(alone)}): intervals leave out what differs between processes"
        yield Control(f"{text}, so a second run need not confirm them.", True)


def _tie_memory(run: Run) -> Iterator[Control]:
    pairs = rows(run.controls.tie_memory)
    if not pairs:
        return
    head_bytes = int(pairs[0].head_bytes)
    what = f"the head's {size(head_bytes)} ({head_bytes:,} bytes) of parameters"
    wrong = [str(pair.cell) for pair in pairs if not pair.ok]
    if wrong:
        text = f"Positive control: tie should save exactly {what}, but does not when added to {listing(wrong)}."
    else:
        text = f"Positive control: tie saves exactly {what} in {count(len(pairs), 'pair')} of cells."
    yield Control(text, bool(wrong))


def _flagged(run: Run) -> Iterator[Control]:
    flagged = [line for line in run.record.of(BlockLine) if line.state == BlockState.FLAGGED]
    if flagged:
        flags = list(dict.fromkeys(flag for line in flagged for flag in line.flags))
        text = f"{count(len(flagged), 'block')} measured under a disturbance that stayed"
        yield Control(f"{text}: {listing(flags) or 'no reason recorded'}.", True)


def _power_cap(run: Run) -> Iterator[Control]:
    """The power cap is where a card may well run all day; that it did is said, and no block done again for it."""
    reasons = [line.throttle_reasons for line in run.record.of(BlockLine) if line.throttle_reasons is not None]
    capped = sum("sw_power_cap" in of_block for of_block in reasons)
    if capped:
        text = f"{capped} of {count(len(reasons), 'block')} ended at the card's power limit, with lower clocks"
        yield Control(
            f"{text}: cells that draw more power are slowed more, as they would be in use.", False, judged=False
        )


def _absent(run: Run) -> Iterator[Control]:
    """What this run cannot tell, and what would."""
    held = run.controls
    if held.aa.empty:
        yield Control("A/A: no second copy of the baseline was timed.", False, absent=True)
    if held.tie_latency.empty:
        tie = run.effects[(run.effects["term"] == "tie") & (run.effects["kind"] == "main")]
        why = "this run has no effect of tie; design=full with tie among the switches has one"
        if tie["estimate"].notna().any():
            why = "the effect of tie has no interval; more blocks give one"
        text = f"Negative control: {why}."
        yield Control(text, False, absent=True)
    if held.host.empty and set(run.cells["runtime"]) == {"graph"}:
        text = "Host: graph replays are device time; how far the host would hold them up shows runtime=eager,graph."
        yield Control(text, False, absent=True)
    elif held.host.empty and "eager" in set(run.cells["runtime"]):
        text = (
            "Host: eager latency holds the host's launches; on CUDA runtime=eager,graph shows how much of it they are."
        )
        yield Control(text, False, absent=True)


def _host(run: Run) -> Iterator[Control]:
    for workload in run.controls.host["workload"].unique():
        shares = {r.cell: r.busy_share for r in rows(run.controls.host) if r.workload == workload}
        named = [name for name in dict.fromkeys((BASELINE, all_on(run))) if name in shares]
        if not named:
            continue
        said = listing([f"{percent(min(1.0, shares[name]))} of the time ({name})" for name in named])
        text = f"Under eager the GPU works {said} in {workload}, by graph over eager latency."
        if min(shares[name] for name in named) < _BUSY_ENOUGH:
            text += " The rest is the host launching kernels: eager effects are not kernel time."
        yield Control(text, False, judged=False)


def drifts(run: Run, condition: Condition) -> Iterator[str]:
    """By how much latency moves while a process is timed, with its interval."""
    for row in rows(condition.select(run.controls.drift)):
        if is_number(row.total):
            decimals = interval_decimals(100 * row.lo, 100 * row.hi)
            said = (f"{100 * value:+.{decimals}f}" for value in (row.total, row.lo, row.hi))
            total, lo, hi = (text.replace("-", "−") for text in said)
            yield f"from a process's first block to its last, latency moved by {total} % [{lo}, {hi}]"


def processes_apart(run: Run, condition: Condition) -> float:
    """By how much the blocks of the slowest process are slower than those of the fastest, relative."""
    of_processes = condition.select(run.controls.drift_series).groupby("process")["relative_latency"].mean()
    return float(of_processes.max() / of_processes.min() - 1) if len(of_processes) else 0.0


def aa_series(run: Run, condition: Condition) -> pd.DataFrame:
    """Per block, latency of the baseline's second copy over that of the first: columns block, ratio."""
    samples = condition.select(run.samples)
    visits = samples[samples["cell"] == BASELINE].groupby(["block", "copy"])["latency_s"].median().unstack()
    if not {0, 1} <= set(visits.columns):
        return pd.DataFrame(columns=["block", "ratio"])
    return (visits[1] / visits[0]).rename("ratio").dropna().reset_index()
