"""What a number holds for: one workload at its sizes, under one runtime."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from qwen3bench.reporting.units import is_number

if TYPE_CHECKING:
    from qwen3bench.analysis.run import Run


@dataclass(frozen=True)
class Condition:
    """A workload with its sizes under one runtime; every table and finding belongs to one."""

    workload: str
    runtime: str
    sizes: str

    def __str__(self) -> str:
        return " ".join(word for word in (self.workload, self.sizes, self.runtime) if word)

    @property
    def slug(self) -> str:
        """Name for files and anchors, for example `prefill-graph`."""
        # A record chooses these names; as a file's they lead nowhere else.
        return re.sub(r"[^\w-]+", "-", f"{self.workload}-{self.runtime}", flags=re.ASCII)[:80]

    def select(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Rows of a table of cells, effects or samples that belong to this condition."""
        return frame[(frame["workload"] == self.workload) & (frame["runtime"] == self.runtime)]


def conditions(run: Run) -> list[Condition]:
    """Conditions of a run in the order of its cells table."""
    first = run.cells.drop_duplicates(["workload", "runtime"])
    return [
        Condition(str(row.workload), str(row.runtime), _sizes(row, row.workload in run.last_logits))
        for row in first.itertuples()
    ]


def _sizes(row: Any, last_logits: bool) -> str:
    """`batch×tokens`, or `batch×prompt+new` where tokens are generated; with what a prefill leaves out."""
    if not (is_number(row.batch_size) and is_number(row.prompt_tokens)):
        return ""
    text = f"{int(row.batch_size)}×{int(row.prompt_tokens)}{' (last logits)' if last_logits else ''}"
    return f"{text}+{int(row.new_tokens)}" if row.workload == "generate" and is_number(row.new_tokens) else text
