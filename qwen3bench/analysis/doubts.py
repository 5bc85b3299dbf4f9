"""Why two runs cannot tell whether something got slower, and what would tell."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import pandas as pd

from qwen3bench.analysis.changes import PLACE, Compared, ok_cells
from qwen3bench.analysis.regression import MOST_PROCESSES, Change, processes_that_tell
from qwen3bench.analysis.run import Run
from qwen3bench.record.design import BASELINE, is_peer

_KEYS = ["cell", *PLACE]


class Cause(StrEnum):
    """Why two runs cannot tell whether something got slower."""

    NOT_COMPARED = "not compared"
    NO_CONTROL = "no control"
    CONTROL = "control"
    WIDE = "wide"


@dataclass(frozen=True)
class Doubt:
    """What two runs cannot tell in one workload and runtime.

    - `names`: what it is about: cells, terms, or the runs that lack a control
    - `apart`: by how much the two copies of the baseline differ in A and in B, as fractions
    - `processes`: about how many in each run would tell; None where that is not known, or too many
    - `tolerance`: the least, in whole percent, by which these runs would tell; None where they tell nothing
    """

    cause: Cause
    workload: str
    runtime: str
    names: tuple[str, ...] = ()
    apart: tuple[float, float] = (0.0, 0.0)
    processes: int | None = None
    tolerance: float | None = None


class Controlled:
    """Two runs by their A/A controls: how far two copies of the baseline are from each other in each."""

    def __init__(self, a: Run, b: Run) -> None:
        self._runs = a, b
        self.places = list(dict.fromkeys(pd.concat([a.cells, b.cells])[PLACE].itertuples(index=False, name=None)))

    def apart(self, place: tuple[str, str]) -> tuple[float, float]:
        """In A and in B, in log; NaN where a run has no such control."""
        of_a, of_b = (abs(float(np.log(row["ratio"]))) if row is not None else np.nan for row in self._rows(place))
        return of_a, of_b

    def noise(self) -> dict[tuple[str, str], float]:
        """Of both runs together: what may differ between them without any change."""
        return {place: float(np.nansum(self.apart(place))) for place in self.places}

    def doubts(self, changes: pd.DataFrame, tolerance: float) -> Iterator[Doubt]:
        """Where the copies are, in both runs together, as far apart as a change that counts."""
        for workload, runtime in changes[PLACE].drop_duplicates().itertuples(index=False, name=None):
            apart = np.array(self.apart((workload, runtime)))
            lacking = tuple(name for name, log in zip("AB", apart, strict=True) if np.isnan(log))
            if lacking:
                yield Doubt(Cause.NO_CONTROL, workload, runtime, lacking)
            elif apart.sum() >= np.log1p(tolerance):
                by_a, by_b = (
                    abs(float(row["ratio"]) - 1) for row in self._rows((workload, runtime)) if row is not None
                )
                processes = self._that_agree((workload, runtime), float(apart.sum() / np.log1p(tolerance)))
                yield Doubt(Cause.CONTROL, workload, runtime, apart=(by_a, by_b), processes=processes)

    def processes(self, place: tuple[str, str]) -> int:
        """How many timed it, in the run that has fewer."""
        workload, runtime = place
        return min(
            int(samples.loc[(samples["workload"] == workload) & (samples["runtime"] == runtime), "process"].nunique())
            for samples in (run.samples for run in self._runs)
        )

    def _rows(self, place: tuple[str, str]) -> list[pd.Series | None]:
        tables = [run.controls.aa for run in self._runs]
        found = [aa[(aa["workload"] == place[0]) & (aa["runtime"] == place[1])] for aa in tables]
        return [rows.iloc[0] if len(rows) else None for rows in found]

    def _that_agree(self, place: tuple[str, str], excess: float) -> int | None:
        """Processes that halve what is apart, where chance may have done it; None where an interval leaves out 1."""
        if any(row is None or not row["lo"] <= 1 <= row["hi"] for row in self._rows(place)):
            return None
        needed = int(np.ceil(self.processes(place) * (2 * excess) ** 2))
        return needed if needed <= MOST_PROCESSES else None


def doubts(a: Run, b: Run, changes: pd.DataFrame, tolerance: float) -> list[Doubt]:
    """Why the runs cannot tell whether any of the judged `changes` is a loss of the tolerance."""
    controlled = Controlled(a, b)
    judged = changes[changes["kind"] != Compared.INTERACTION]
    wide = judged[judged["change"] == Change.UNDECIDED]
    return [
        *_uncompared(a, b, judged),
        *controlled.doubts(judged, tolerance),
        *(_wide(rows, controlled, tolerance) for _, rows in wide.groupby(PLACE, sort=False)),
    ]


def _uncompared(a: Run, b: Run, judged: pd.DataFrame) -> Iterator[Doubt]:
    """Where a cell that is ok in both runs is not judged: without a baseline, or the baseline by itself."""
    told = {place: set(rows["name"]) for place, rows in judged.groupby(PLACE)}
    ok = ok_cells(b)[_KEYS].merge(ok_cells(a)[_KEYS], on=_KEYS)
    for place, rows in ok.groupby(PLACE, sort=False):
        names = told.get(place, set())
        ours = [cell for cell in rows["cell"] if not is_peer(cell) and cell not in names]
        if left := [cell for cell in ours if not names or cell != BASELINE]:
            yield Doubt(Cause.NOT_COMPARED, *_place(rows), tuple(left))


def _wide(rows: pd.DataFrame, controlled: Controlled, tolerance: float) -> Doubt:
    processes = controlled.processes(_place(rows))
    needed = [processes_that_tell(se, df, processes, tolerance) for se, df in zip(rows["se"], rows["df"], strict=True)]
    known = [number for number in needed if number is not None]
    names = rows.sort_values("lo", na_position="first")["name"]
    most = max(known) if len(known) == len(needed) else None
    ruled_out = np.floor(100 / rows["lo"].min(skipna=False) - 100) / 100 + 0.01
    enough = round(float(ruled_out), 2) if ruled_out < 1 else None
    return Doubt(Cause.WIDE, *_place(rows), tuple(dict.fromkeys(names)), processes=most, tolerance=enough)


def _place(rows: pd.DataFrame) -> tuple[str, str]:
    return str(rows["workload"].iloc[0]), str(rows["runtime"].iloc[0])
