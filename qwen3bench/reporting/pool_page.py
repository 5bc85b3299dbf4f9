"""One page over runs of the same question on several machines."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from qwen3bench.analysis.changes import Compared
from qwen3bench.analysis.frames import analysis_setting
from qwen3bench.analysis.pooling import Pool
from qwen3bench.analysis.run import Run, to_csv
from qwen3bench.record.files import write_atomic
from qwen3bench.record.states import Verdict
from qwen3bench.reporting import figures
from qwen3bench.reporting.across import make_home
from qwen3bench.reporting.conditions import Condition, conditions
from qwen3bench.reporting.finding import Effect
from qwen3bench.reporting.lookup import all_on, band, device, directory, rows
from qwen3bench.reporting.over_runs import limits
from qwen3bench.reporting.pages import about, moment, switches
from qwen3bench.reporting.plot_machines import machines_plot
from qwen3bench.reporting.tables import Entry, Table, drop_empty
from qwen3bench.reporting.templates import render
from qwen3bench.reporting.units import SECONDS, count, is_number, ratio, unit_for
from qwen3bench.reporting.wording import pool_words
from qwen3bench.reporting.wording.page_words import PAGE
from qwen3bench.reporting.wording.ratio_words import band_words
from qwen3bench.reporting.wording.sentences import sentence

_ROWS = 200  # of a table in report.md; the page holds all
_FEW = 3  # machines: with fewer, Student's t is over twice as wide as with many
_EFFECTS = (Compared.MAIN, Compared.INTERACTION, "shapley")


def write_pool(pool: Pool, home: Path) -> Path:
    """Write report.md, report.html, effects.csv, machines.csv and plots/ into the directory; the path of report.html.

    Raises `UserError` where the directory cannot be written, or holds a run.
    """
    make_home(home)
    with figures.style():
        drawn = [machines_plot(pool, condition) for condition in conditions(pool.runs[0])]
        saved = [figures.save(plot, home / "plots") for plot in drawn if plot]
    content = {
        "title": f"{count(len(pool.machine_names), 'machine')} together",
        "about": list(_about(pool)),
        "switches": switches(pool.runs[:1]),
        "said": list(pool_sentences(pool)),
        "warnings": list(pool_warnings(pool)),
        "plots": saved,
        "effects": _effects(pool, _EFFECTS),
        "ratios": _effects(pool, (Compared.SPEEDUP, Compared.PEER)),
        "latencies": _latencies(pool),
        "unlike": _unlike(pool),
        "method": pool_words.POOL_METHOD,
        "max_rows": _ROWS,
        "words": {**PAGE, **pool_words.POOL},
    }
    write_atomic(home / "effects.csv", to_csv(pool.effects))
    write_atomic(home / "machines.csv", to_csv(pool.machines))
    for name in ("report.md", "report.html"):
        runs = [(_link(run, home), _described(pool, number)) for number, run in enumerate(pool.runs, start=1)]
        write_atomic(home / name, render(f"pool_{name}.jinja", {**content, "runs": runs}))
    return home / "report.html"


def _about(pool: Pool) -> Iterator[tuple[str, str]]:
    """What holds for all runs. Their machines stand with them, as `--machines` may name those of one name."""
    for name, value in about(pool.runs[0]):
        if name != "machine" and all((name, value) in about(run) for run in pool.runs):
            yield name, value


def pool_sentences(pool: Pool) -> Iterator[str]:
    """What the pool says: on what it stands, each switch, all of them, and how far machines differ."""
    machines = len(pool.machine_names)
    on_cpu = pool.runs[0].config.get("device") == "cpu"
    corrected = False  # whether an effect is undecided though its interval leaves out 1
    level = (1 - analysis_setting(pool.runs[0].record, "confidence")) / 2  # as the ends of a spread's interval
    yield pool_words.pool_scope(machines, 0 if on_cpu else len(pool.cards), device(pool.runs[0]))
    for condition in conditions(pool.runs[0]):
        here = condition.select(pool.effects)
        mains = here[here["kind"] == Compared.MAIN]
        if untold := list(mains.loc[mains["estimate"].isna(), "term"]):
            yield pool_words.not_pooled(untold, str(condition))
        mains = mains[mains["estimate"].notna()]
        together = here[(here["kind"] == Compared.SPEEDUP) & (here["term"] == all_on(pool.runs[0]))]
        together = together[together["estimate"].notna() & ~together["term"].isin(mains["term"])]
        for row in rows(pd.concat([mains, together])):
            corrected |= row.verdict == Verdict.UNDECIDED and (row.lo > 1 or row.hi < 1)
            effect = Effect(row.term, row.estimate, row.lo, row.hi, row.verdict)
            yield pool_words.pooled_words(effect, str(condition), band_words(band(pool.runs[0])))
        yield from _widest(mains, str(condition), level)
    if corrected:
        yield PAGE["holm"]
    if 1 < machines < _FEW:
        yield pool_words.few_machines(machines)


def _widest(mains: pd.DataFrame, where: str, level: float) -> Iterator[str]:
    """What differs most between machines of what is shown to; else what of all could differ most."""
    known = mains[mains["sd_machines_hi"].notna()]
    shown = known[known["p_machines"] <= level]
    most, by = (shown, "sd_machines") if len(shown) else (known, "sd_machines_hi")
    for row in rows(most.sort_values(by, ascending=False, kind="stable")[:1]):
        spread = row.sd_machines, row.sd_machines_lo, row.sd_machines_hi
        yield pool_words.widest_words(row.term, where, spread, shown=bool(len(shown)))


def pool_warnings(pool: Pool) -> Iterator[str]:
    """What makes the pool worth less than it looks: what runs lack, noise, one machine of two names, unlike ones."""
    yield from map(sentence, limits(pool.runs))
    for number, run in enumerate(pool.runs, start=1):
        if any(row["noisy"] for row in run.controls.aa.to_dict("records")):
            yield pool_words.noisy_run(number)
    for named, machine in dict.fromkeys((part.named, part.machine) for part in pool.parts):
        if named != machine:
            yield pool_words.one_machine(named, machine)
    if len(pool.unlike):
        yield pool_words.machines_differ(list(pool.unlike["key"]))


def _condition_of(pool: Pool) -> dict[tuple[str, str], Condition]:
    return {(each.workload, each.runtime): each for each in conditions(pool.runs[0])}


def _effects(pool: Pool, kinds: Sequence[str]) -> Table:
    """One row for each effect or ratio: pooled, its verdict, and how far machines and cards differ."""
    named, lines = _condition_of(pool), []
    for row in rows(pool.effects[pool.effects["kind"].isin(kinds)]):
        spreads = [
            Entry(pool_words.spread_words(sd, lo, hi), float(sd) if is_number(sd) else None)
            for sd, lo, hi in (
                (row.sd_machines, row.sd_machines_lo, row.sd_machines_hi),
                (row.sd_cards, row.sd_cards_lo, row.sd_cards_hi),
            )
        ]
        told = [Entry(text, text) for text in (row.term, str(row.kind), row.over)]
        shown = ratio(row.estimate, row.lo, row.hi)
        value = Entry(shown, float(row.estimate) if shown else None)
        own = [Entry(text, text) for text in (row.verdict if is_number(row.lo) else "", row.reason)]
        where = str(named[row.workload, row.runtime])
        lines.append([*told, Entry(where, where), value, own[0], *spreads, own[1]])
    heads = ["term", "kind", "over", "condition", "× as fast", "verdict", "between machines", "between cards", "reason"]
    return drop_empty(Table(heads, lines))


def _latencies(pool: Pool) -> Table:
    """The baseline and all switches on, card by card."""
    shown = pool.latencies[pool.latencies["cell"].isin(["baseline", all_on(pool.runs[0])])]
    unit = unit_for(shown["latency_s"], SECONDS)
    named, lines = _condition_of(pool), []
    for row in rows(shown):
        where = str(named[row.workload, row.runtime])
        texts = [Entry(text, text) for text in (str(row.run), row.machine, row.card, where, row.cell)]
        ends = [Entry(unit.text(value), float(value)) for value in (row.latency_s, row.latency_lo_s, row.latency_hi_s)]
        lines.append([*texts, *ends])
    heads = ["run", "machine", "card", "condition", "cell", f"latency ({unit.symbol})", "from", "to"]
    return drop_empty(Table(heads, lines))


def _unlike(pool: Pool) -> Table | None:
    if pool.unlike.empty:
        return None
    texts = [["" if value is None else str(value) for value in row] for row in pool.unlike.itertuples(index=False)]
    return Table([str(name) for name in pool.unlike.columns], [[Entry(text, text) for text in row] for row in texts])


def _link(run: Run, home: Path) -> str:
    return os.path.relpath(directory(run), home)


def _described(pool: Pool, number: int) -> str:
    mine: list[Any] = [part for part in pool.parts if part.number == number]
    cards = [part.card for part in mine if part.card]
    created = mine[0].run.record.run.created
    return ", ".join([mine[0].machine, *cards, *([moment(created)] if created else [])])
