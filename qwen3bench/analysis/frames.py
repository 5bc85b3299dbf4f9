"""The samples of a record that count, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from qwen3bench.analysis.variance import Estimates, clustered
from qwen3bench.record.design import is_peer
from qwen3bench.record.lines import BlockLine, ProcessLine, SampleLine
from qwen3bench.record.reader import Record
from qwen3bench.record.states import BlockState

_USUAL = {"band": 0.01, "confidence": 0.95}
_KEYS = ["workload", "runtime", "block"]
BASELINE = "baseline"
COPY = "baseline (copy)"  # the column of the A/A copy in a block matrix


# Of a sample, beside a column for each factor.
SAMPLE_COLUMNS = (
    *("cell", "workload", "runtime", "copy", "process", "block", "attempt", "position", "repeat", "time"),
    *("latency_s", "ttft_s", "tpot_s", "itl_s", "waited_s", "switches", "disturbed"),
    *("host", "card"),
)


def analysis_setting(record: Record, name: str) -> float:
    """`analysis.band` or `analysis.confidence` of a run, its usual value where the record has none."""
    value = record.run.setting("analysis", name)
    return float(value) if isinstance(value, (int, float)) and 0 < value < 1 else _USUAL[name]


def factor_columns(labels: Sequence[str], factors: Sequence[str]) -> pd.DataFrame:
    """One 0/1 column per factor for cell labels; missing (float NaN) for a peer's label."""
    seen: dict[str, list[float]] = {}
    for label in dict.fromkeys(labels):
        on = set() if label == BASELINE else set(label.split("+"))
        seen[label] = [float(f in on) for f in factors] if on <= set(factors) else [np.nan] * len(factors)
    table = pd.DataFrame(list(seen.values()), index=list(seen), columns=list(factors), dtype=float)
    return table.loc[list(labels)]


def used_samples(record: Record) -> pd.DataFrame:
    """The samples of finished blocks, one row each, with a 0/1 column per factor.

    A block counts when its last attempt is closed as ok or flagged; what was measured of others stays in the
    record. `copy` = 1 marks the second copy of the baseline. `host` and `card` say on which machine and card, where
    the record does.
    """
    samples = record.frame(SampleLine)
    factors = list(record.run.factors)
    blocks = record.frame(BlockLine)
    if samples.empty or blocks.empty:
        columns = [*_KEYS, "cell", "copy", "process", "attempt", "latency_s", *factors]
        return pd.DataFrame(
            {c: pd.Series(dtype=object if c in ("workload", "runtime", "cell") else float) for c in columns}
        )
    closed = blocks[blocks["state"] != BlockState.REPEAT]
    closed = closed.drop_duplicates(_KEYS, keep="last")[[*_KEYS, "attempt"]]
    used = samples.merge(closed, on=[*_KEYS, "attempt"])
    codes = factor_columns(used["cell"].tolist(), factors)
    places = {line.process: (line.host, line.card) for line in record.of(ProcessLine)}
    for column, name in enumerate(("host", "card")):
        of_each = [places.get(process, (None, None))[column] for process in used["process"]]
        used[name] = pd.Series(of_each, used.index, dtype=object)
    return used.assign(**{f: codes[f].to_numpy() for f in factors})


@dataclass(frozen=True)
class BlockMatrix:
    """log latency of each cell in each block, the cells of one workload and runtime beside the A/A copy.

    `log_s` (blocks, cells): natural logarithm of the median of the visit's repeats in seconds; complete.
    `process` (blocks,).
    """

    log_s: pd.DataFrame
    process: NDArray[Any]

    def log_ratios(self, over: str, under: Sequence[str]) -> Estimates:
        """log(latency of `over` / latency of each cell in `under`), compared within blocks.

        A ratio to or of another implementation stands on these two cells alone: how much it scatters between processes
        tells nothing of our cells, nor they of it. Beside two cells of ours the A/A copy is left out, as in the one
        effect that they have.
        """
        ours = [cell for cell in self.log_s.columns if not is_peer(cell)]
        if len(ours) == 3 and COPY not in (over, *under):
            ours = [cell for cell in ours if cell != COPY]
        found = {cell: self._contrasts([over, cell], over, [cell]) for cell in under if is_peer(over) or is_peer(cell)}
        rest = [cell for cell in under if cell not in found]
        together = self._contrasts(ours, over, rest) if rest else None

        def gather(name: str) -> NDArray[np.float64]:
            values = {cell: getattr(each, name)[0] for cell, each in found.items()}
            if together is not None:
                values |= dict(zip(rest, getattr(together, name), strict=True))
            return np.array([values[cell] for cell in under], dtype=float)

        return Estimates(gather("estimate"), gather("se"), gather("df"), gather("process_share"))

    def _contrasts(self, columns: list[str], over: str, under: list[str]) -> Estimates:
        matrix = np.zeros((len(under), len(columns)))
        matrix[:, columns.index(over)] = 1
        matrix[np.arange(len(under)), [columns.index(cell) for cell in under]] -= 1
        return clustered(self.log_s[columns].to_numpy(), self.process, matrix)


def block_matrix(samples: pd.DataFrame, cells: Sequence[str] | None = None, value: str = "latency_s") -> BlockMatrix:
    """The complete blocks of `samples` (one workload and runtime) over `cells` and the A/A copy.

    `cells`: labels to keep; None keeps all. Blocks that lack one are left out. `value`: another time than the latency.
    """
    label = samples["cell"].where(samples["copy"] == 0, COPY)
    if cells is not None:
        keep = label.isin([*cells, COPY])
        samples, label = samples[keep], label[keep]
    table = samples[value].groupby([samples["block"], label]).median().unstack()
    table = table.loc[:, table.notna().mean() >= 0.5].dropna()
    process = samples.groupby("block")["process"].first().loc[table.index].to_numpy()
    return BlockMatrix(table.astype(float).apply(np.log), process)
