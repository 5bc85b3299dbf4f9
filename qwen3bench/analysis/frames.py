"""The samples of a record that count, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from qwen3bench.analysis.outliers import judged, telling, widening
from qwen3bench.analysis.variance import Clustered, Estimates, completed
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
    *("host", "card", "left_out", "excess"),
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
    the record does. `left_out` and `excess` are those of `with_judged_visits`.
    """
    samples = record.frame(SampleLine)
    factors = list(record.run.factors)
    blocks = record.frame(BlockLine)
    if samples.empty or blocks.empty:
        columns = [*_KEYS, "cell", "copy", "process", "attempt", "latency_s", "left_out", "excess", *factors]
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
    used = used.assign(**{f: codes[f].to_numpy() for f in factors})
    return with_judged_visits(undisturbed(used))


def undisturbed(samples: pd.DataFrame) -> pd.DataFrame:
    """`samples` without the values that other work was seen to disturb (`disturbed`), where their visit has others.

    Of a visit that was disturbed each time all values stay: how slow they are then says whether it counts.
    """
    if "disturbed" not in samples:
        return samples
    disturbed = samples["disturbed"].astype("boolean").fillna(False).astype(bool)
    keys = [samples[name] for name in (*_KEYS, "cell", "copy") if name in samples]
    always = disturbed.groupby(keys).transform("all")
    return samples[~disturbed | always]


def with_judged_visits(samples: pd.DataFrame) -> pd.DataFrame:
    """`samples` with what `outliers.judged` says of the visit of each, by workload and runtime.

    `left_out`: whether other work slowed it, so that no estimate counts it. `excess`: its residual over the limit.
    """
    label = samples["cell"].where(samples["copy"] == 0, COPY)
    places = [samples[name] for name in ("workload", "runtime") if name in samples]
    everything = [np.arange(len(samples))]
    parts = samples.groupby(places, sort=False).indices.values() if places else everything
    left_out, excess = np.zeros(len(samples), dtype=bool), np.zeros(len(samples))
    for rows in parts:
        here = samples.iloc[rows]
        keys = [here["block"], label.iloc[rows]]
        visits = _complete(here["latency_s"].groupby(keys).median().unstack())
        if not visits.empty:
            found = judged_rows(visits.astype(float).apply(np.log), _process_of(here, visits), keys)
            left_out[rows], excess[rows] = found["left_out"], found["excess"]
    return samples.assign(left_out=left_out, excess=excess)


def judged_rows(visits: pd.DataFrame, process: NDArray[Any], keys: Sequence[pd.Series[Any]]) -> pd.DataFrame:
    """`left_out` and `excess` of rows in the block and cell `keys`, by their `visits` (blocks, cells; log latency).

    Rows of visits that are not among them are not left out.
    """
    found = judged(visits.to_numpy(), process)
    block, cell = (
        index.get_indexer(pd.Index(key)) for index, key in zip((visits.index, visits.columns), keys, strict=True)
    )
    known = (block >= 0) & (cell >= 0)
    return pd.DataFrame(
        {
            "left_out": known & ~found.counts[block, cell],
            "excess": np.where(known, found.excess[block, cell], 0.0),
        }
    )


@dataclass(frozen=True)
class BlockMatrix:
    """log latency of each cell in each block, the cells of one workload and runtime beside the A/A copy.

    `log_s` (blocks, cells): natural logarithm of the median of the visit's repeats in seconds; NaN where the visit was
    left out. `process` (blocks,). `widening`: of errors, for what was left out.
    """

    log_s: pd.DataFrame
    process: NDArray[Any]
    widening: float = 1.0
    _clustered: dict[tuple[str, ...], Clustered] = field(default_factory=dict, repr=False, compare=False)

    @property
    def completed(self) -> pd.DataFrame:
        """`log_s`, each visit that was left out as the others tell it."""
        filled = completed(self.log_s.to_numpy(), self.process)
        return pd.DataFrame(filled, self.log_s.index, self.log_s.columns)

    def log_ratios(self, over: str, under: Sequence[str]) -> Estimates:
        """log(latency of `over` / latency of each cell in `under`), compared within blocks.

        A ratio to or of another implementation stands on these two cells alone: how much it scatters between processes
        tells nothing of our cells, nor they of it. Beside two cells of ours the A/A copy is left out, as in the one
        effect that they have.
        """
        ours = [cell for cell in self.log_s.columns if not is_peer(cell)]
        if len(ours) == 3 and COPY not in (over, *under):
            ours = [cell for cell in ours if cell != COPY]
        alone = {cell: [over, cell] for cell in under if is_peer(over) or is_peer(cell)}
        found = {cell: self.contrasts(pair, _ratio_contrasts(pair, over, [cell])) for cell, pair in alone.items()}
        rest = [cell for cell in under if cell not in found]
        together = self.contrasts(ours, _ratio_contrasts(ours, over, rest)) if rest else None

        def gather(name: str) -> NDArray[np.float64]:
            values = {cell: getattr(each, name)[0] for cell, each in found.items()}
            if together is not None:
                values |= dict(zip(rest, getattr(together, name), strict=True))
            return np.array([values[cell] for cell in under], dtype=float)

        return Estimates(gather("estimate"), gather("se"), gather("df"), gather("process_share"))

    def contrasts(self, columns: Sequence[str], matrix: NDArray[np.float64]) -> Estimates:
        """The contrasts `matrix` (terms, columns) of the cells `columns`."""
        known = self._clustered.get(tuple(columns))
        if known is None:  # a page asks for the ratios to each cell
            y = self.log_s[list(columns)].to_numpy()
            enough = 2 * (~np.isnan(y)).sum(axis=1) > y.shape[1]
            known = self._clustered[tuple(columns)] = Clustered(y[enough], self.process[enough])
        return known.estimates(matrix, self.widening)


def _ratio_contrasts(columns: list[str], over: str, under: list[str]) -> NDArray[np.float64]:
    matrix = np.zeros((len(under), len(columns)))
    matrix[:, columns.index(over)] = 1
    matrix[np.arange(len(under)), [columns.index(cell) for cell in under]] -= 1
    return matrix


def block_matrix(samples: pd.DataFrame, cells: Sequence[str] | None = None, value: str = "latency_s") -> BlockMatrix:
    """The complete blocks of `samples` (one workload and runtime) over `cells` and the A/A copy.

    `cells`: labels to keep; None keeps all. Blocks that lack one are left out, as are blocks and cells of which too
    many visits are (`outliers.telling`). `value`: another time than the latency. `samples` are judged here, unless
    they were before.
    """
    if "left_out" not in samples:
        samples = with_judged_visits(undisturbed(samples))
    label = samples["cell"].where(samples["copy"] == 0, COPY)
    if cells is not None:
        keep = label.isin([*cells, COPY])
        samples, label = samples[keep], label[keep]
    keys = [samples["block"], label]
    table = _complete(samples[value].groupby(keys).median().unstack()).astype(float).apply(np.log)
    table, widened = counted_visits(table, samples, keys)
    return BlockMatrix(table, _process_of(samples, table), widened)


def counted_visits(
    table: pd.DataFrame, samples: pd.DataFrame, keys: Sequence[pd.Series[Any]]
) -> tuple[pd.DataFrame, float]:
    """`table` (blocks, cells), NaN where a visit was left out, and how much that widens errors.

    Without the blocks and cells that then tell nothing. `samples`: those of the table, judged; `keys` are the block and
    the cell of each.
    """
    if table.empty:
        return table, 1.0
    grouped = samples[["left_out", "excess"]].groupby(list(keys)).max()
    left_out, excess = (
        grouped[name].unstack().reindex(index=table.index, columns=table.columns) for name in ("left_out", "excess")
    )
    counts = ~left_out.to_numpy(dtype=bool)
    blocks, columns = telling(counts)
    found = table.where(counts).loc[blocks, columns]
    return found, float(widening(excess.to_numpy(float)[np.ix_(blocks, columns)])) if found.size else 1.0


def _complete(table: pd.DataFrame) -> pd.DataFrame:
    """The cells that most blocks hold, and the blocks that hold all of them."""
    table = table.loc[:, table.notna().mean() >= 0.5]
    return table.dropna()


def _process_of(samples: pd.DataFrame, table: pd.DataFrame) -> NDArray[Any]:
    """The process of each block of the table."""
    return samples.groupby("block")["process"].first().loc[table.index].to_numpy()
