"""Samples in long form as a table of values by cell, checked, without the visits that other work slowed."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from qwen3bench.analysis.contrasts import Contrasts, contrasts, every_cell
from qwen3bench.analysis.frames import counted_visits, judged_rows
from qwen3bench.analysis.least_squares import lack_of_fit, with_model_error
from qwen3bench.analysis.variance import Estimates, clustered, replicated
from qwen3bench.errors import UserError

_MAX_FACTORS = 12  # 4,095 terms


class NoWholeBlockError(UserError):
    """No block holds a visit that counts to every cell, so nothing is compared within a block."""


NO_INTERVAL = "no interval"


@dataclass(frozen=True)
class Question:
    """Of which factors' effects on which column is asked; the columns of blocks and of their processes."""

    factors: tuple[str, ...]
    value: str = "latency_s"
    block: str | None = "block"
    process: str | None = "process"
    log: bool = True


@dataclass(frozen=True)
class CellTable:
    """Values by cell: `y` (blocks, cells) with each block's `process`, or without blocks each cell's replicates.

    `y` is NaN where a visit was left out; `widening`: of errors, for that.
    """

    factors: tuple[str, ...]
    cells: tuple[tuple[int, ...], ...]
    y: NDArray[np.float64] | None
    process: NDArray[Any]
    replicates: list[NDArray[np.float64]]
    widening: float = 1.0

    @property
    def plan(self) -> Contrasts:
        """What these cells tell, and how."""
        return contrasts(self.factors, self.cells)

    @property
    def means(self) -> NDArray[np.float64]:
        """Each cell's mean value."""
        scale = self._scale()
        values = self.replicates if self.y is None else self.y.T
        return scale * np.array([np.nanmean(of_cell / scale) for of_cell in values])

    @property
    def baseline(self) -> float:
        """The baseline's mean value; where it was not measured, the mean over cells."""
        off = [m for cell, m in zip(self.cells, self.means, strict=True) if not any(cell)]
        return float(off[0] if off else np.mean(self.means))

    @property
    def no_error(self) -> str:
        """Why there is no interval, where there is none."""
        return f"{NO_INTERVAL}: one block" if self.y is not None else f"{NO_INTERVAL}: no replicates"

    def _scale(self) -> float:
        """A power of two near the largest value: divided by it no square overflows, and no digit changes."""
        values = np.concatenate(self.replicates) if self.y is None else self.y
        _, exponent = np.frexp(np.nanmax(np.abs(values)))
        return float(np.ldexp(1.0, int(np.clip(exponent - 1, -1000, 1000))))

    def estimates(self, matrix: NDArray[np.float64], decimals: int | None) -> Estimates:
        """With their errors, or rounded to so many decimals and exact."""
        scale = self._scale()
        if self.y is None:
            found = replicated([values / scale for values in self.replicates], matrix)
        else:
            found = clustered(self.y / scale, self.process, matrix, self.widening)
        with np.errstate(over="ignore"):
            found = replace(found, estimate=found.estimate * scale, se=found.se * scale)
        if decimals is None:
            return found
        estimate = np.round(found.estimate, decimals) + 0.0  # no −0; weights such as 1/5 leave crumbs
        nothing = np.zeros_like(found.estimate)
        return Estimates(estimate, nothing, nothing, nothing)

    def answers(
        self,
        asked: Iterable[NDArray[np.float64]],
        truth: Iterable[NDArray[np.float64] | None] = (),
        decimals: int | None = None,
    ) -> Estimates:
        """What these contrasts come to; of a screen's model, what it does not describe counts as an error.

        `truth`: of each contrast, what each interaction of three adds to it; None where it adds nothing.
        """
        matrix = np.array([*asked]).reshape(-1, len(self.cells))
        fit = self.plan.fit
        if fit is None:
            return self.estimates(matrix, decimals)
        everything = self.estimates(np.vstack([matrix, fit.told, fit.left_over]), decimals)
        ends = len(matrix), len(matrix) + len(fit.told)
        found, terms, left = (everything.at(slice(*part)) for part in ((0, ends[0]), ends, (ends[1], None)))
        added = np.zeros((len(matrix), fit.triples.shape[1]))
        for row, triples in enumerate(truth):
            added[row] = 0.0 if triples is None else triples
        return with_model_error(found, matrix, added, fit, lack_of_fit(fit, terms, left))


def by_cell(samples: pd.DataFrame, asked: Question) -> CellTable:
    """The values of long-form samples by cell.

    Raises `UserError` where these cannot answer what is asked, `NoWholeBlockError` where no block compares the cells.
    """
    rows = _checked(samples, asked)
    factors, value, block, process, log = asked.factors, asked.value, asked.block, asked.process, asked.log
    code = rows[list(factors)].to_numpy(dtype=np.int64) @ (1 << np.arange(len(factors)))
    values = rows[value].to_numpy(dtype=float)
    cell = every_cell(len(factors))
    if block is None:
        values = np.log(values) if log else values
        present = np.unique(code)
        replicates = [values[code == c] for c in present]
        return CellTable(factors, tuple(cell[c] for c in present), None, np.empty(0), replicates)
    keys = [pd.Series(rows[block].to_numpy(), name="block"), pd.Series(code, name="cell")]
    visits = pd.Series(values).groupby(keys).median().unstack()
    visits = visits.loc[:, visits.notna().mean() >= 0.5]  # a cell that most blocks lack is a missing cell
    visits = visits.dropna()
    if visits.empty:
        raise NoWholeBlockError("no block holds every cell; there is nothing to compare within a block")
    if process is not None and process in rows:
        names = rows.groupby(block)[process].first().fillna(-1)
    else:
        names = pd.Series(0, visits.index)
    table = visits.apply(np.log) if log else visits
    widened = 1.0
    if is_time(value):
        table, widened = counted_visits(table, _judged(rows, visits, keys, names), keys)
        if table.empty:
            raise NoWholeBlockError("other work slowed most visits; there is nothing to compare within a block")
    cells = tuple(cell[c] for c in table.columns.to_numpy())
    return CellTable(factors, cells, table.to_numpy(), names.loc[table.index].to_numpy(), [], widened)


def is_time(value: str) -> bool:
    """Whether a column holds times, by its name: `latency_s`, not `tokens_per_s`."""
    return value.endswith("_s") and not value.endswith("_per_s")


def _checked(samples: pd.DataFrame, asked: Question) -> pd.DataFrame:
    """The rows that count. Raises `UserError` where they cannot answer."""
    factors, value, block, log = asked.factors, asked.value, asked.block, asked.log
    if not factors or len(set(factors)) < len(factors):
        raise UserError(f"factors must be one or more different column names, not {list(factors)}")
    if len(factors) > _MAX_FACTORS:
        raise UserError(f"{len(factors)} factors have 2^{len(factors)} terms; ask for at most {_MAX_FACTORS}")
    absent = [c for c in (*factors, value, *([block] if block else [])) if c not in samples]
    if absent:
        raise UserError(f"the samples have no column {', '.join(absent)}; they have {', '.join(map(str, samples))}")
    for column in ("workload", "runtime"):
        if column in samples and samples[column].nunique() > 1:
            raise UserError(f"the samples mix several {column}s; select one before asking for effects")
    rows = samples
    if "copy" in rows:
        rows = rows[rows["copy"].fillna(0) == 0]
    needed = [*factors, value, *([block] if block else [])]
    rows, before = rows.dropna(subset=needed), rows
    if rows.empty:
        raise UserError(
            f"no sample has a {value}" if before[value].isna().all() else f"no sample has all of {', '.join(needed)}"
        )
    if len(rows) < len(before):
        lacking = ", ".join(f"{int(before[c].isna().sum())} have no {c}" for c in needed if before[c].isna().any())
        warnings.warn(f"of {len(before)} samples {lacking}; they are left out", stacklevel=4)
    if not np.isin(rows[list(factors)].to_numpy(), (0, 1)).all():
        raise UserError(f"the columns {', '.join(factors)} must hold 0 and 1 alone")
    try:
        values = rows[value].to_numpy(dtype=float)
    except (OverflowError, TypeError, ValueError) as error:
        raise UserError(f"{value} must hold numbers that a float can hold ({error})") from error
    if not np.isfinite(values).all() or (log and (values <= 0).any()):
        raise UserError(f"{value} must be finite{' and above zero to take its logarithm' if log else ''}")
    return rows


def _judged(
    rows: pd.DataFrame, visits: pd.DataFrame, keys: list[pd.Series[Any]], names: pd.Series[Any]
) -> pd.DataFrame:
    """`left_out` and `excess` of each row, which is in the block and cell `keys`; `names`: each block's process."""
    if "left_out" in rows:
        told = rows[["left_out", "excess"]].reset_index(drop=True)
        return told.assign(left_out=told["left_out"].astype("boolean").fillna(False).astype(bool))
    if not (visits.to_numpy() > 0).all():
        return pd.DataFrame({"left_out": False, "excess": 0.0}, index=range(len(rows)))
    return judged_rows(visits.apply(np.log), names.loc[visits.index].to_numpy(), keys)
