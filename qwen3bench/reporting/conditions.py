"""What a number holds for: one workload at its sizes, under one runtime."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from qwen3bench.reporting.units import is_number

if TYPE_CHECKING:
    from qwen3bench.analysis.run import Run

BASELINE = "baseline"


@dataclass(frozen=True)
class Condition:
    """A workload with its sizes under one runtime; every table and finding belongs to one."""

    workload: str
    runtime: str
    sizes: str

    def __str__(self) -> str:
        return f"{self.workload} {self.sizes}, {self.runtime}".replace(" ,", ",")

    @property
    def slug(self) -> str:
        """Name for files and anchors, for example `prefill-graph`."""
        return f"{self.workload}-{self.runtime}"

    def select(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Rows of a table of cells, effects or samples that belong to this condition."""
        if frame.empty:
            return frame
        return frame[(frame["workload"] == self.workload) & (frame["runtime"] == self.runtime)]


def conditions(run: Run) -> list[Condition]:
    """Conditions of a run in the order of its cells table."""
    if run.cells.empty:
        return []
    first = run.cells.drop_duplicates(["workload", "runtime"])
    return [Condition(str(row.workload), str(row.runtime), _sizes(row)) for row in first.itertuples()]


def _sizes(row: object) -> str:
    """`batch×tokens`, or `batch×prompt+new` where tokens are generated."""
    batch, prompt, new = (getattr(row, name, None) for name in ("batch_size", "prompt_tokens", "new_tokens"))
    if not (is_number(batch) and is_number(prompt)):
        return ""
    text = f"{int(batch)}×{int(prompt)}"  # type: ignore[call-overload]
    generates = getattr(row, "workload", "") == "generate" and is_number(new)
    return f"{text}+{int(new)}" if generates else text  # type: ignore[call-overload]


def factors(run: Run) -> list[str]:
    """The run's factors in its own order."""
    return [str(name) for name in run.record.run["factors"]]


def all_on(run: Run) -> str:
    """Label of the cell with every factor on."""
    return "+".join(factors(run)) or BASELINE


def device(run: Run) -> str:
    """Name of the device that was measured."""
    return str(run.record.run.get("device") or "an unnamed device")


def usable(cells: pd.DataFrame) -> pd.DataFrame:
    """Cells that finished with status ok and have a latency: the only ones a finding may rank."""
    return cells[(cells["status"] == "ok") & cells["latency_s"].notna()]
