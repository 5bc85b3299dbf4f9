"""A run, recomputed from its record."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from qwen3bench.analysis.cell_table import NoWholeBlockError
from qwen3bench.analysis.cells import cells_table
from qwen3bench.analysis.controls import Controls, controls
from qwen3bench.analysis.effective import PARTLY_SEEN, compare_effective, idle_switches
from qwen3bench.analysis.effects import COLUMNS, effects
from qwen3bench.analysis.frames import analysis_setting, used_samples
from qwen3bench.analysis.screen_results import ScreenResult, confirmed_cells, screen_results
from qwen3bench.record.files import find_runs, small_file, write_atomic
from qwen3bench.record.lines import ConfirmLine, EndLine, EvidenceLine
from qwen3bench.record.reader import Record, read_record
from qwen3bench.record.rounds import ROUNDS, chosen_in, round_of
from qwen3bench.record.states import CellStatus, EndStatus
from qwen3bench.record.typed import parsed_line

_SIZES = ("batch_size", "prompt_tokens", "new_tokens")
EFFECT_COLUMNS = ["workload", "runtime", *_SIZES, "metric", *COLUMNS]
_TIMES = ("latency_s", "ttft_s", "tpot_s")
_BYTES = ("peak_allocated_bytes", "parameter_bytes")


@dataclass(frozen=True, eq=False)
class Run:
    """A run's tables: `cells`, `effects` (columns as cells.csv and effects.csv) and `samples` (those that count).

    `environment` and `config` as recorded. `screens`: of a screen, what it predicts and what confirmed that; the cells
    that confirm are among `cells`, and their samples, those of each of the `rounds`, do not count for the effects.
    `warnings`: what of the record was not usable.
    """

    path: Path
    record: Record
    config: dict[str, Any]
    environment: dict[str, Any]
    cells: pd.DataFrame
    effects: pd.DataFrame
    samples: pd.DataFrame
    controls: Controls
    screens: tuple[ScreenResult, ...] = ()
    rounds: tuple[pd.DataFrame, ...] = ()

    @property
    def factors(self) -> list[str]:
        """The run's factors in their order."""
        return list(self.record.run.factors)

    @property
    def warnings(self) -> list[str]:
        """What of the record was not usable, in words."""
        return self.record.warnings

    @property
    def evidence(self) -> list[EvidenceLine]:
        """What ran in each cell, workload and runtime; the notes name switches that changed nothing of it.

        Cells that were only looked at, to compare others with them, are left out.
        """
        by_place: dict[tuple[str, str], dict[str, EvidenceLine]] = {}
        lines = self.record.of(EvidenceLine)
        measured = {*self.record.run.cells, *(cell for line in self.record.of(ConfirmLine) for cell in line.cells)}
        for line in lines:
            by_place.setdefault((line.workload, line.runtime), {})[line.cell] = line
        idle = {
            place: compare_effective(of_cells) for place, of_cells in by_place.items() if place[0] not in PARTLY_SEEN
        }
        return [
            replace(line, notes=(*line.notes, *idle.get((line.workload, line.runtime), {}).get(line.cell, ())))
            for line in lines
            if line.cell in measured
        ]

    @cached_property
    def idle(self) -> dict[tuple[str, str], dict[str, int]]:
        """The switches that change nothing that runs, by workload and runtime: see `idle_switches`."""
        by_place: dict[tuple[str, str], dict[str, EvidenceLine]] = {}
        for line in self.record.of(EvidenceLine):
            by_place.setdefault((line.workload, line.runtime), {})[line.cell] = line
        return {where: idle_switches(found) for where, found in by_place.items() if where[0] not in PARTLY_SEEN}

    @property
    def threads(self) -> int | None:
        """How many threads of one operation computed on a CPU; None on a card, whose own they are, or where unknown."""
        threads = self.environment.get("torch_threads")
        return threads if isinstance(threads, int) and self.config.get("device") == "cpu" else None

    @property
    def last_logits(self) -> frozenset[str]:
        """The workloads that compute the last token's logits alone."""
        workloads = self.config.get("workload")
        sizes = workloads.items() if isinstance(workloads, dict) else ()
        return frozenset(name for name, each in sizes if isinstance(each, dict) and each.get("logits_to_keep") == 1)

    @property
    def finished(self) -> bool:
        """Whether the run came to its end; a partial one can be read too."""
        return any(line.status == EndStatus.FINISHED for line in self.record.of(EndLine))


def load_run(path: str | Path) -> Run:
    """The run in directory `path`, finished or partial, with everything recomputed from its samples.jsonl.

    Raises `UserError` where there is no usable record.
    """
    path = Path(path)
    record = read_record(path)
    samples = used_samples(record)
    cells = cells_table(record, samples)
    table = _all_effects(record, cells, samples)
    confirmed = confirmed_cells(record, cells)
    return Run(
        path=path,
        record=record,
        config=record.run.config,
        environment=_environment(record),
        cells=confirmed,
        effects=table,
        samples=samples,
        controls=controls(record, samples, cells, table),
        screens=tuple(screen_results(record, confirmed, samples)),
        rounds=tuple(used_samples(round_of(record, each)) for each in ROUNDS if chosen_in(record, each)),
    )


def load_runs(path: str | Path) -> list[Run]:
    """The runs in a directory of runs, such as a multirun's, in natural order; a run's own directory is one.

    Raises `UserError` where there is none, or one has no usable record.
    """
    return [load_run(home) for home in find_runs([Path(path)])]


def of_each_card(run: Run) -> list[tuple[str | None, str | None, Run]]:
    """Machine, card, and the run as what this card alone measured; None where the record does not name them.

    Cells and effects are recomputed from its samples. The controls stay those of the whole run. A process whose line
    the record has lost was on the one place that there is; where there are several, its samples count for none.
    """
    if run.samples.empty:
        return [(None, None, run)]
    places = run.samples[["host", "card"]].astype(object).where(run.samples[["host", "card"]].notna(), None)
    unnamed = (None, None)
    different = [place for place in dict.fromkeys(places.itertuples(index=False, name=None)) if place != unnamed]
    if len(different) < 2:
        return [(*(different or [unnamed])[0], run)]
    found = []
    for host, card in different:
        here = [place == (host, card) for place in places.itertuples(index=False, name=None)]
        samples = run.samples[here]
        cells = cells_table(run.record, samples)
        table = _all_effects(run.record, cells, samples)
        found.append((host, card, replace(run, samples=samples, cells=cells, effects=table)))
    return found


def write_derived(run: Run) -> None:
    """Writes cells.csv and effects.csv into the run's directory, each whole or not at all."""
    directory = run.record.path.parent
    write_atomic(directory / "cells.csv", to_csv(run.cells))
    write_atomic(directory / "effects.csv", to_csv(run.effects))


def to_csv(table: pd.DataFrame) -> str:
    """`table` as CSV, missing values empty; a text that a spreadsheet would run as a formula gets a leading
    quote."""
    table = table.copy()
    for column in table.columns:
        if table[column].dtype == object or pd.api.types.is_string_dtype(table[column]):
            table[column] = [
                f"'{v}" if isinstance(v, str) and v.startswith(("=", "+", "-", "@", "\t", "\r")) else v
                for v in table[column]
            ]
    return table.to_csv(index=False, lineterminator="\n")


def _all_effects(record: Record, cells: pd.DataFrame, samples: pd.DataFrame) -> pd.DataFrame:
    factors = list(record.run.factors)
    band, confidence = analysis_setting(record, "band"), analysis_setting(record, "confidence")
    ok = cells[(cells["status"] == CellStatus.OK) & (cells[factors].notna().all(axis=1) if factors else False)]
    parts = []
    for key, rows in ok.groupby(["workload", "runtime"], sort=False):
        workload, runtime = key
        here = samples[
            (samples["workload"] == workload)
            & (samples["runtime"] == runtime)
            & samples["cell"].isin(rows["cell"])
            & (samples["copy"] == 0)
        ]
        found = {}
        for metric in _TIMES:
            if metric in here and here[metric].notna().any():
                with suppress(NoWholeBlockError):  # as of a damaged record: there is no effect to tell
                    found[metric] = effects(here, factors, metric, block="block", band=band, confidence=confidence)
        for metric in _BYTES:
            known = rows.dropna(subset=[metric])
            if len(known):
                found[metric] = effects(known, factors, metric, log=False, exact=True, band=band)
        where = {"workload": str(workload), "runtime": str(runtime)} | {size: rows[size].iloc[0] for size in _SIZES}
        parts += [table.assign(**where, metric=metric) for metric, table in found.items()]
    if not parts:
        kinds = (
            dict.fromkeys(EFFECT_COLUMNS, "object") | dict.fromkeys(_NUMBERS, "float") | dict.fromkeys(_SIZES, "Int64")
        )
        return pd.DataFrame({c: pd.Series(dtype=kind) for c, kind in kinds.items()})
    return pd.concat(parts, ignore_index=True)[EFFECT_COLUMNS].astype(dict.fromkeys(_SIZES, "Int64"))


_NUMBERS = ("estimate", "lo", "hi", "p_holm", "p", "df")


def _environment(record: Record) -> dict[str, Any]:
    try:
        return parsed_line(small_file(record.path.parent / "environment.json"), "utf-8")
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        record.warnings.append(f"environment.json cannot be used ({why}); the first line says less of the machine")
    return {"device": record.run.device, "dtype": record.run.dtype, **(record.run.fingerprint or {})}
