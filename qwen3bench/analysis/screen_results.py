"""What a run's screen predicts beyond the cells that it measured, and what was measured to see whether it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd

from qwen3bench.analysis.cells import cells_table
from qwen3bench.analysis.confirm import MeasuredSpeedup, Prediction, measured_speedups
from qwen3bench.analysis.controls import aa_control, noise_of
from qwen3bench.analysis.frames import analysis_setting, used_samples
from qwen3bench.analysis.least_squares import LackOfFit
from qwen3bench.analysis.predictions import left_over, predicted_steps, predictions
from qwen3bench.record.design import BASELINE, is_peer
from qwen3bench.record.reader import Record
from qwen3bench.record.rounds import ROUNDS, chosen_in, round_of
from qwen3bench.record.states import CellStatus

_PLACE = ["workload", "runtime"]
_TIMES = ["latency_s", "latency_lo_s", "latency_hi_s", "ttft_s", "tpot_s", "itl_p50_s", "itl_p99_s"]
_RATES = ["tokens_per_s", "mfu", "mbu"]


@dataclass(frozen=True)
class Confirmed:
    """A cell that was predicted to be among the best, and its speed-up as measured; None where it has none.

    `round`: in which it was measured; 0 where in the screen itself. `best`: predicted to be the fastest of all.
    """

    prediction: Prediction
    measured: MeasuredSpeedup | None
    round: int
    best: bool

    @property
    def tested(self) -> bool:
        """Whether it was measured, and intervals are narrow enough for agreement to mean something."""
        return self.measured is not None and self.prediction.is_tested_by(self.measured)

    @property
    def noisy(self) -> bool:
        """Whether two copies of the baseline differed too much where it was measured."""
        return self.measured is not None and self.measured.noise > 0

    @property
    def agrees(self) -> bool | None:
        """Whether both differ by no more than their intervals allow; None where it was not measured."""
        return None if self.measured is None else self.prediction.agrees(self.measured)


@dataclass(frozen=True)
class ScreenResult:
    """What the screen of one workload and runtime tells beyond its effects.

    `cells`, `every`: how many cells it measured, of how many. `lack`: what its model leaves over. `predicted`: all
    cells as the model has them (`effects.predictions`), `steps` from one to the next (`effects.predicted_steps`).
    `confirmed`: what was predicted to be best, by round.
    """

    workload: str
    runtime: str
    cells: int
    every: int
    lack: LackOfFit
    predicted: pd.DataFrame
    steps: pd.DataFrame
    confirmed: tuple[Confirmed, ...]


def confirmed_cells(record: Record, cells: pd.DataFrame) -> pd.DataFrame:
    """`cells` (of the screen) with a row for each other cell that a round measured, its times on the same baseline."""
    parts = [cells]
    for round_ in ROUNDS:
        chosen = {(cell, line.workload, line.runtime) for line in chosen_in(record, round_) for cell in line.cells}
        if not chosen:
            continue
        there = {key for part in parts for key in part[["cell", *_PLACE]].itertuples(index=False, name=None)}
        view = round_of(record, round_)
        found = cells_table(view, used_samples(view))
        keys = list(found[["cell", *_PLACE]].itertuples(index=False, name=None))
        new = found[[key in chosen and key not in there for key in keys]].copy()
        for place, rows in new.groupby(_PLACE):
            ours, theirs = (_baseline_s(table, tuple(place)) for table in (cells, found))
            new.loc[rows.index, _TIMES] = rows[_TIMES].astype(float) * (ours / theirs)
            new.loc[rows.index, _RATES] = rows[_RATES].astype(float) / (ours / theirs)
        parts.append(new)
    if len(parts) == 1:
        return cells
    return pd.concat([part for part in parts if len(part)], ignore_index=True)[cells.columns].astype(cells.dtypes)


def screen_results(record: Record, cells: pd.DataFrame, samples: pd.DataFrame) -> list[ScreenResult]:
    """Of each workload and runtime in which a screen has a model.

    `cells`: as `confirmed_cells` gives them; `samples`: of the screen.
    """
    factors, found = list(record.run.factors), []
    confidence = analysis_setting(record, "confidence")
    ok = cells[(cells["status"] == CellStatus.OK) & ~cells["cell"].map(is_peer).astype(bool)]
    if record.run.setting("design", "name") != "screen" or not factors:
        return []
    for place, rows in ok.groupby(_PLACE, sort=False):
        workload, runtime = (str(name) for name in place)
        here = samples[
            (samples["workload"] == workload)
            & (samples["runtime"] == runtime)
            & samples["cell"].isin(rows["cell"])
            & (samples["copy"] == 0)
        ]
        lack = left_over(here, factors) if len(here) else None
        if lack is None:
            continue
        found.append(
            ScreenResult(
                workload=workload,
                runtime=runtime,
                cells=here["cell"].nunique(),
                every=2 ** len(factors),
                lack=lack,
                predicted=predictions(here, factors, confidence),
                steps=predicted_steps(here, factors, confidence),
                confirmed=tuple(_confirmed(record, rows, samples)),
            )
        )
    return found


def _confirmed(record: Record, ok: pd.DataFrame, screened: pd.DataFrame) -> list[Confirmed]:
    """What was predicted of one workload and runtime, whose cells with a speed-up are `ok`, beside what was measured.

    A cell is measured in its round, or before it: the second round may name again what the first one measured.
    """
    place = ok["workload"].iloc[0], ok["runtime"].iloc[0]
    measured = {cell: (each, 0) for cell, each in _speedups(record, ok, screened).items()}
    found: list[Confirmed] = []
    for round_ in ROUNDS:
        for line in chosen_in(record, round_):
            if (line.workload, line.runtime) != place:
                continue
            of_round = _speedups(record, ok, used_samples(round_of(record, round_)))
            measured |= {cell: (each, round_) for cell, each in of_round.items()}
            for values in zip(line.predicted, line.speedup, line.lo, line.hi, strict=True):
                prediction = Prediction(*values)
                known, since = measured.get(prediction.cell, (None, round_))
                found.append(Confirmed(prediction, known, since, prediction.cell == line.best))
    return found


def _speedups(record: Record, ok: pd.DataFrame, samples: pd.DataFrame) -> dict[str, MeasuredSpeedup]:
    """`measured_speedups` of the cells `ok`, which are of one workload and runtime, with their noise."""
    confidence = analysis_setting(record, "confidence")
    where = (samples["workload"] == ok["workload"].iloc[0]) & (samples["runtime"] == ok["runtime"].iloc[0])
    here = samples[where & samples["cell"].isin(ok["cell"])]
    noise = noise_of(aa_control(here, ok, confidence))
    return {cell: replace(each, noise=noise) for cell, each in measured_speedups(here, confidence).items()}


def _baseline_s(cells: pd.DataFrame, place: Sequence[object]) -> float:
    workload, runtime = place
    here = cells[(cells["cell"] == BASELINE) & (cells["workload"] == workload) & (cells["runtime"] == runtime)]
    return float(here["latency_s"].iloc[0]) if len(here) else float("nan")
