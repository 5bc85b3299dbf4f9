"""Tables of a report as plain values: headings, texts and what to sort by; pages and terminal render them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd

from qwen3bench.record.lines import EvidenceLine
from qwen3bench.record.states import CellStatus, Verdict
from qwen3bench.record.typed import flat
from qwen3bench.reporting.lookup import LATENCY, rows
from qwen3bench.reporting.units import BYTES, SECONDS, Unit, is_number, p_value, ratio, significant, unit_for
from qwen3bench.reporting.wording.page_words import GAIN_HEADING, effects_left_out

# Column of cells.csv → heading and how its values read; the order of the report's table.
_CELL_COLUMNS: dict[str, tuple[str, str]] = {
    "latency_s": ("latency", "seconds"),
    "speedup": (GAIN_HEADING, "ratio"),
    "tokens_per_s": ("tokens/s", "number"),
    "ttft_s": ("TTFT", "seconds"),
    "tpot_s": ("TPOT", "seconds"),
    "peak_allocated_bytes": ("peak allocated", "bytes"),
    "peak_reserved_bytes": ("peak reserved", "bytes"),
    "parameter_bytes": ("parameters", "bytes"),
    "gradient_bytes": ("gradients at the peak", "bytes"),
    "optimizer_bytes": ("optimizer", "bytes"),
    "activation_bytes": ("activations at the peak", "bytes"),
    "mfu": ("MFU", "fraction"),
    "mbu": ("MBU", "fraction"),
    "kernel_launches": ("kernel launches", "number"),
    "attention_backend": ("attention", "text"),
    "samples": ("samples", "number"),
    "status": ("status", "text"),
}
_CELL_MEASURED = ("latency_s", "speedup", "tokens_per_s", "peak_allocated_bytes", "parameter_bytes", "status")
_EQUIVALENCE_COLUMNS: dict[str, tuple[str, str]] = {
    "equivalent": ("same function", "text"),
    "max_abs_error": ("max error", "number"),
    "kl_mean": ("KL", "number"),
    "top1_agreement": ("top-1 agreement", "number"),
}
_EVIDENCE_COLUMNS: dict[str, tuple[str, str]] = {
    "workload": ("workload", "text"),
    "runtime": ("runtime", "text"),
    "attention_backend": ("attention", "text"),
    "kernel_launches": ("kernel launches", "number"),
    "tied_storage": ("head tied in storage", "text"),
    "graph_breaks": ("graph breaks", "number"),
    "recompiles": ("recompiles", "number"),
    "notes": ("notes", "text"),
}
_DECIDED = (Verdict.FASTER, Verdict.SLOWER, Verdict.LESS, Verdict.MORE)


@dataclass(frozen=True)
class Entry:
    """One value of a table: what it reads and what it sorts by (None sorts last)."""

    text: str
    key: float | str | None = None

    @property
    def number(self) -> bool:
        return isinstance(self.key, float)


@dataclass(frozen=True)
class Table:
    """Headings and rows; `constants` is said once instead of in every row, `note` tells what is left out."""

    headings: list[str]
    rows: list[list[Entry]]
    constants: list[tuple[str, str]] = field(default_factory=list)
    note: str = ""

    @property
    def numeric(self) -> list[bool]:
        """Per column, whether it holds numbers, to be set flush right."""
        return [any(row[i].number for row in self.rows) for i in range(len(self.headings))]

    def cut(self, most: int, kept: Sequence[str] = ()) -> list[list[Entry]]:
        """The first `most` rows, and of the others those that begin with one of `kept`."""
        return [*self.rows[:most], *(row for row in self.rows[most:] if row[0].text in kept)]


def ranking_table(cells: pd.DataFrame) -> Table:
    """Cells of one condition, the fastest first, those that failed at the end, as they have no rank."""
    return _ranked(cells, tuple(_CELL_COLUMNS))


def measured_table(cells: pd.DataFrame) -> Table:
    """The same with what one chooses a cell by: latency, speed-up, tokens/s, memory, parameters."""
    return _ranked(cells, _CELL_MEASURED)


def _ranked(cells: pd.DataFrame, names: Sequence[str]) -> Table:
    by_rank = cells.assign(failed=cells["status"].ne(CellStatus.OK)).sort_values(["failed", LATENCY], kind="stable")
    ordered = by_rank.drop(columns="failed")
    again = [name for name in ("ttft_s", "tpot_s") if cells[name].equals(cells[LATENCY].rename(name))]
    ordered = ordered.drop(columns=again)  # of prefill TTFT is the latency, of decode TPOT
    return _table(ordered, "cell", {name: _CELL_COLUMNS[name] for name in names}, keep=(LATENCY, "speedup"))


def effects_table(effects: pd.DataFrame) -> Table:
    """Effects of one condition and metric: term, kind, estimate with interval, p, verdict.

    Interactions of three and more switches are shown only where they are decided, interactions and shares only where
    they could be estimated; `note` counts the others.
    """
    unknown = effects["estimate"].isna() & (effects["kind"] != "main")
    large = (effects["term"].str.count(":") >= 2) & ~effects["verdict"].isin(_DECIDED)
    lines = []
    for row in rows(effects[~large & ~unknown]):
        estimate = ratio(row.estimate, row.lo, row.hi) if row.metric == LATENCY else signed_bytes(row.estimate)
        p = p_value(row.p_holm) if is_number(row.p_holm) else ""
        texts = [Entry(row.term, row.term), Entry(row.kind, row.kind), Entry(estimate, _key(row.estimate))]
        lines.append([*texts, Entry(p, _key(row.p_holm)), _text(row.verdict), _text(row.reason)])
    verdicts = effects.loc[large & ~unknown, "verdict"].value_counts(sort=False)
    untold = {kind: int((unknown & (effects["kind"] == kind)).sum()) for kind in ("interaction", "shapley")}
    note = effects_left_out({str(verdict): number for verdict, number in verdicts.items()}, untold)
    effect = "effect (× as fast)" if (effects["metric"] == LATENCY).any() else "effect"
    return drop_empty(Table(["term", "kind", effect, "p (Holm)", "verdict", "reason"], lines, note=note))


def equivalence_table(cells: pd.DataFrame) -> Table:
    """How far each cell's outputs are from the reference, one row per cell."""
    return _table(cells.drop_duplicates("cell"), "cell", _EQUIVALENCE_COLUMNS)


def evidence_table(lines: Sequence[EvidenceLine]) -> Table:
    """What really ran in each cell."""
    frame = pd.DataFrame({name: [getattr(line, name) for line in lines] for name in ("cell", *_EVIDENCE_COLUMNS)})
    frame["notes"] = ["; ".join(line.notes) for line in lines]
    return _table(frame, "cell", _EVIDENCE_COLUMNS)


def parts_table(lines: Sequence[EvidenceLine]) -> Table | None:
    """How long the parts of a training step take in each cell; None where nothing was trained."""
    trained = [line for line in lines if line.parts_s]
    if not trained:
        return None
    names = dict.fromkeys(part for line in trained for part in line.parts_s or {})
    frame = pd.DataFrame({name: [getattr(line, name) for line in trained] for name in ("cell", "runtime")})
    for name in names:
        frame[name] = [(line.parts_s or {}).get(name) for line in trained]
    return _table(frame, "cell", {"runtime": ("runtime", "text"), **{name: (name, "seconds") for name in names}})


def mapping_table(mapping: Mapping[str, object], headings: tuple[str, str] = ("", "")) -> Table:
    """A nested mapping as two columns, keys joined by dots; what is None or an empty mapping is left out."""
    texts = [
        (key, ", ".join(map(str, value)) if isinstance(value, list) else _words(value))
        for key, value in flat(mapping)
        if value is not None and value != {}
    ]
    return Table(list(headings), [[Entry(key, key), Entry(text, text)] for key, text in texts])


def signed_bytes(value: float) -> str:
    """Change of memory with sign and unit, for example `−296.8 MiB`."""
    if not is_number(value):
        return ""
    unit = unit_for([value], BYTES)
    sign = "−" if value < 0 else "+" if value > 0 else ""
    return f"{sign}{unit.text(abs(value))} {unit.symbol}"


def drop_empty(table: Table) -> Table:
    """The table without the columns in which no row has a text."""
    keep = [i for i in range(len(table.headings)) if any(row[i].text for row in table.rows)]
    rows = [[row[i] for i in keep] for row in table.rows]
    return Table([table.headings[i] for i in keep], rows, table.constants, table.note)


def _table(frame: pd.DataFrame, index: str, columns: dict[str, tuple[str, str]], keep: Sequence[str] = ()) -> Table:
    """Table of a frame: empty columns dropped, columns that never vary said once (except those in `keep`)."""
    headings, entries, constants = [index], [[_text(value) for value in frame[index]]], []
    for name, (heading, kind) in columns.items():
        if name not in frame or frame[name].isna().all():
            continue
        heading, values = _column(frame, name, heading, kind)
        if len(values) > 1 and name not in keep and len({value.text for value in values}) == 1:
            if values[0].text:
                constants.append((heading, values[0].text))
        elif any(value.text for value in values):
            headings.append(heading)
            entries.append(values)
    return Table(headings, [list(row) for row in zip(*entries, strict=True)], constants)


def _column(frame: pd.DataFrame, name: str, heading: str, kind: str) -> tuple[str, list[Entry]]:
    values = frame[name].tolist()
    if kind in ("seconds", "bytes"):
        unit = unit_for(values, SECONDS if kind == "seconds" else BYTES)
        return f"{heading} ({unit.symbol})", [Entry(unit.text(value), _key(value)) for value in values]
    if kind == "ratio":
        bounds = zip(values, frame[f"{name}_lo"], frame[f"{name}_hi"], strict=True)
        return heading, [Entry(ratio(*triple), _key(triple[0])) for triple in bounds]
    if kind == "fraction":
        percent = Unit("%", 0.01)
        return f"{heading} (%)", [Entry(percent.text(value), _key(value)) for value in values]
    if kind == "number":
        return heading, [Entry(_number(value), _key(value)) for value in values]
    return heading, [_text(value) for value in values]


def _number(value: object) -> str:
    if not is_number(value):
        return ""
    number = float(value)  # type: ignore[arg-type]
    if math.isclose(number, round(number), rel_tol=1e-12):  # a mean of ones may be 1 − 1e-16
        return f"{round(number):,}"
    return f"{number:.2g}" if abs(number) < 1e-3 else significant(number)


def _key(value: object) -> float | None:
    return float(value) if is_number(value) else None  # type: ignore[arg-type]


def _text(value: object) -> Entry:
    text = _words(value)
    return Entry(text, text or None)


def _words(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)) or value is pd.NA:
        return ""
    return ("yes" if value else "no") if str(value) in ("True", "False") else str(value)
