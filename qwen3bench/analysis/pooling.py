"""Runs of the same question on several machines as one: what holds for this kind of card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from qwen3bench.analysis.cell_table import NO_INTERVAL
from qwen3bench.analysis.changes import Compared, error_of, ok_cells, ratios_told
from qwen3bench.analysis.effects import order_of
from qwen3bench.analysis.frames import analysis_setting
from qwen3bench.analysis.nested import Measured, Nested, nested
from qwen3bench.analysis.run import Run, of_each_card
from qwen3bench.analysis.significance import OF_TIMES, Gains, holm, verdicts
from qwen3bench.analysis.variance import Array, Estimates
from qwen3bench.errors import UserError
from qwen3bench.record.environment import HOST_KEYS
from qwen3bench.record.typed import flat

_PLACE = ["workload", "runtime"]
_WHAT = [*_PLACE, "kind", "term", "over"]
_NUMBERS = ("estimate", "se", "df")
# Settings that say where a run was measured, where it is written or how it is shown, not what is asked.
_NOT_ASKED = ("run.", "resume", "report.", "hydra.", "device", "threads", "cluster")
_OF_ONE_RUN = rf"(; |^){NO_INTERVAL}: [^;]*"  # what a reason says of a run's interval: the pool has its own
_MAX_NAMED = 6  # differences in an error
_FIRST = 1000  # samples of a run by which a copy of it is known, as a few may be damaged there
_OF_MACHINE = ("driver", "os", "cpu", "cpu_cores", "power_limit_w", "memory_bytes", "usable_cpus", "variables")
POOLED_COLUMNS = [
    *_WHAT,
    *("estimate", "lo", "hi", "p_holm", "verdict", "reason", "p", "df", "machines", "cards"),
    *("sd_machines", "sd_machines_lo", "sd_machines_hi", "p_machines", "sd_cards", "sd_cards_lo", "sd_cards_hi"),
]


@dataclass(frozen=True)
class CardRun:
    """What one card measured in one run, its `number` from 1; `card` is empty where the record does not name it.

    `named` is what the run, or who pools it, calls the machine: another name where a card shows that it is the same.
    """

    number: int
    machine: str
    card: str
    run: Run
    named: str


@dataclass(frozen=True)
class Pool:
    """Runs of one question as one, by machine and card.

    - `effects` (`POOLED_COLUMNS`): one row per workload, runtime and effect: main effects, interactions and Shapley
      shares, each cell over the baseline (`speedup`) and over each peer (`peer`). Ratios of speed, as in effects.csv;
      `sd_…` are the spreads between machines, and between cards of a machine, as fractions; `p_machines` is Holm's p
      of the first
    - `machines`: machine, `_WHAT`, estimate, lo, hi: what each machine tells by itself
    - `latencies`: run, machine, card, cell, workload, runtime, latency_s with its interval: of that card alone
    - `unlike`: key, and the value of each machine that is not the same on all
    """

    runs: tuple[Run, ...]
    parts: tuple[CardRun, ...]
    effects: pd.DataFrame
    machines: pd.DataFrame
    latencies: pd.DataFrame
    unlike: pd.DataFrame

    @property
    def machine_names(self) -> list[str]:
        """The machines, in the order of the runs."""
        return list(dict.fromkeys(part.machine for part in self.parts))

    @property
    def cards(self) -> list[tuple[str, str]]:
        """Machine and card of each card, in the order of the runs."""
        return list(dict.fromkeys((part.machine, part.card) for part in self.parts))


def pool(runs: Sequence[Run], machines: Sequence[str] | None = None) -> Pool:
    """The runs as one analysis; `machines` names the machine of each run, instead of the record.

    Raises `UserError` where they do not ask the same question, were measured on different kinds of cards, or do not
    say on which machine, and where one of them is named twice, holds no complete block or tells nothing.
    """
    _refuse_twice(runs)
    refuse_unlike(runs)
    parts = tuple(_parts(runs, machines))
    confidence, band = (analysis_setting(runs[0].record, name) for name in ("confidence", "band"))
    told = [_told(part.run) for part in parts]
    order = pd.concat([each[[*_WHAT, "reason"]] for each in told]).drop_duplicates(_WHAT).reset_index(drop=True)
    if order.empty:
        raise UserError("these runs tell no effect and no ratio of two cells; there is nothing to pool")
    aligned = [order[_WHAT].merge(each, on=_WHAT, how="left", sort=False) for each in told]
    found = nested(
        Measured(
            estimate=_stacked(aligned, "estimate"),
            se=_stacked(aligned, "se"),
            df=_stacked(aligned, "df"),
            card=[f"{part.machine}\0{part.card}" for part in parts],
            machine=[part.machine for part in parts],
        ),
        confidence,
    )
    reasons = np.stack([each["reason"].fillna("").to_numpy(object) for each in aligned])
    table = order.assign(reason=[_reason(values) for values in reasons.T])
    table["reason"] = table["reason"].where(np.isfinite(found.pooled.estimate), "not told by every run")
    return Pool(
        runs=tuple(runs),
        parts=parts,
        effects=_published(table, found, confidence, band, len({(p.machine, p.card) for p in parts})),
        machines=_of_machines(order, found, confidence),
        latencies=_latencies(parts),
        unlike=_unlike(parts),
    )


def refuse_unlike(runs: Sequence[Run]) -> None:
    """Raise `UserError` where the runs were not measured on one kind of card, or do not ask the same question."""
    kinds = list(dict.fromkeys(str(run.record.run.device) for run in runs))
    if len(kinds) > 1:
        names = " ".join(str(run.path) for run in runs)
        raise UserError(
            f"these runs are of different kinds of cards ({', '.join(kinds)}): a comparison, not a pool\n"
            f"set them side by side with python -m qwen3bench.report {names} --out DIR, "
            "or two of them with python -m qwen3bench.compare"
        )
    first = runs[0]
    for run in runs[1:]:
        if differ := [*_differing(_asked(first), _asked(run)), *_differing(_made_with(first), _made_with(run))]:
            more = f" and {len(differ) - _MAX_NAMED} more" if len(differ) > _MAX_NAMED else ""
            raise UserError(
                f"{first.path} and {run.path} do not ask the same question: {'; '.join(differ[:_MAX_NAMED])}{more}\n"
                "pool runs of one command, code and software; python -m qwen3bench.compare sets two others side by side"
            )


def _refuse_twice(runs: Sequence[Run]) -> None:
    """Raise `UserError` where two runs share samples: copies of one record, however long or damaged each is."""
    seen: dict[tuple[Any, ...], Run] = {}
    for run in runs:
        first = run.samples.head(_FIRST)
        times = first["time"] if "time" in first else [None] * len(first)
        keys = [(run.record.run.created, *sample) for sample in zip(times, first["latency_s"], strict=True)]
        if other := next((seen[key] for key in keys if key in seen), None):
            raise UserError(f"{other.path} and {run.path} hold samples of the same run; name one of them")
        seen |= dict.fromkeys(keys, run)


def _asked(run: Run) -> dict[str, Any]:
    """The settings that say what is asked."""
    return {key: value for key, value in flat(run.config) if not key.startswith(_NOT_ASKED)}


def _made_with(run: Run) -> dict[str, Any]:
    """Code, weights and software of a run, as in its fingerprint."""
    known = run.record.run.fingerprint or {}
    return {key: value for key, value in known.items() if key not in (*HOST_KEYS, "config")}


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    keys = [key for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)]
    return [f"{key}: {_short(a.get(key), b.get(key))} and {_short(b.get(key), a.get(key))}" for key in keys]


def _short(value: Any, other: Any) -> str:
    """A value in words, of a long one the part in which it differs from the other."""
    text, beside = repr(value), repr(other)
    start = next((i for i, (one, another) in enumerate(zip(text, beside, strict=False)) if one != another), 0) - 10
    return f"…{text[start : start + 30]}" if len(text) > 40 and start > 10 else text[:40]


def _parts(runs: Sequence[Run], machines: Sequence[str] | None) -> list[CardRun]:
    if machines is not None and len(machines) != len(runs):
        names, many = (f"{n} {one}{'s' * (n != 1)}" for n, one in ((len(machines), "machine"), (len(runs), "run")))
        raise UserError(f"--machines names {names} for {many}; name one for each run")
    parts = []
    for number, run in enumerate(runs, start=1):
        if run.samples.empty:
            raise UserError(f"{run.path}: no complete block was timed in it; leave it out, or continue it")
        for host, card, here in of_each_card(run):
            machine = host if machines is None else machines[number - 1]
            if machine is None:
                raise UserError(
                    f"{run.path}: does not say on which machine it was measured\n"
                    "name the machine of each run, in their order: --machines NAME,NAME,…"
                )
            parts.append(CardRun(number, machine, card or "", here, machine))
    homes = _first_names(parts)
    return [replace(part, machine=homes[part.machine]) for part in parts]


def _first_names(parts: Sequence[CardRun]) -> dict[str, str]:
    """The first name of each machine: names under which one card was seen are one machine's."""
    homes = {part.machine: part.machine for part in parts}
    seen: dict[str, str] = {}  # a card's machine
    for part in parts:
        if part.card:
            first, other = homes[seen.setdefault(part.card, part.machine)], homes[part.machine]
            homes = {name: first if home == other else home for name, home in homes.items()}
    return homes


def _told(run: Run) -> pd.DataFrame:
    """`_WHAT`, estimate (log speed), se, df and reason of all that a run tells of latency."""
    table = run.effects[(run.effects["metric"] == "latency_s") & run.effects["estimate"].notna()]
    lo, hi, df = (table[name].to_numpy(float) for name in ("lo", "hi", "df"))
    se = error_of(lo, hi, df, analysis_setting(run.record, "confidence"))
    reason = table["reason"].fillna("").str.replace(_OF_ONE_RUN, "", regex=True)
    effects = table.assign(estimate=np.log(table["estimate"].to_numpy(float)), se=se, over="", reason=reason)
    ratios = ratios_told(run).rename(columns={"name": "term"}).assign(reason="")
    columns = [*_WHAT, *_NUMBERS, "reason"]
    return pd.concat([part[columns] for part in (effects, ratios) if len(part)] or [effects[columns]])


def _stacked(tables: Sequence[pd.DataFrame], name: str) -> Array:
    return np.stack([table[name].to_numpy(float) for table in tables])


def _reason(values: Sequence[str]) -> str:
    """What an effect takes for granted, where it does so in every part alike; else that parts do not."""
    different = set(values)
    return different.pop() if len(different) == 1 else "not told in the same way by every run"


def _published(table: pd.DataFrame, found: Nested, confidence: float, band: float, cards: int) -> pd.DataFrame:
    """`POOLED_COLUMNS`."""
    untold = table["reason"].str.startswith("not told").to_numpy(bool)
    pooled = _unless(found.pooled, untold)
    estimate, lo, hi = _ratios_of(pooled, confidence)
    count = len(found.machines)
    table = table.assign(estimate=estimate, lo=lo, hi=hi, p=pooled.p(), df=count - 1, machines=count, cards=cards)
    table["p_machines"] = np.where(untold, np.nan, found.between_machines.p)
    families = table.groupby([*_PLACE, _family(table)], sort=False)
    for corrected, plain in (("p_holm", "p"), ("p_machines", "p_machines")):
        table[corrected] = families[plain].transform(lambda of_family: holm(of_family.to_numpy()))
    table["verdict"] = verdicts(Gains(estimate - 1, lo - 1, hi - 1, table["p_holm"]), band, OF_TIMES)
    for name, spread in (("sd_machines", found.between_machines), ("sd_cards", found.between_cards)):
        for column, values in ((name, spread.sd), (f"{name}_lo", spread.lo), (f"{name}_hi", spread.hi)):
            table[column] = np.where(untold, np.nan, values)
    return table[POOLED_COLUMNS]


def _family(table: pd.DataFrame) -> pd.Series:
    """What is corrected together by Holm's method: effects of one order, shares, speed-ups, ratios to one peer."""
    ours = table["kind"].isin([Compared.MAIN, Compared.INTERACTION])
    return table["kind"].where(~ours, order_of(table["term"]).astype(str)) + table["over"]


def _unless(found: Estimates, left_out: Any) -> Estimates:
    estimate, se = (np.where(left_out, np.nan, values) for values in (found.estimate, found.se))
    return Estimates(estimate, se, found.df, found.process_share)


def _ratios_of(found: Estimates, confidence: float) -> tuple[Any, Any, Any]:
    half = found.half_width(confidence)
    with np.errstate(over="ignore"):
        return np.exp(found.estimate), np.exp(found.estimate - half), np.exp(found.estimate + half)


def _of_machines(order: pd.DataFrame, found: Nested, confidence: float) -> pd.DataFrame:
    told = zip(found.machines, *_ratios_of(found.of_machine, confidence), strict=True)
    tables = [order[_WHAT].assign(machine=name, estimate=e, lo=lo, hi=hi) for name, e, lo, hi in told]
    return pd.concat(tables, ignore_index=True)[["machine", *_WHAT, "estimate", "lo", "hi"]]


def _latencies(parts: Sequence[CardRun]) -> pd.DataFrame:
    columns = ["cell", *_PLACE, "latency_s", "latency_lo_s", "latency_hi_s"]
    tables = [
        ok_cells(part.run)[columns].assign(run=part.number, machine=part.machine, card=part.card) for part in parts
    ]
    return pd.concat(tables, ignore_index=True)[["run", "machine", "card", *columns]]


def _unlike(parts: Sequence[CardRun]) -> pd.DataFrame:
    """What of the machines and their drivers is not the same on all, as environment.json tells."""
    rows = []
    machines = {part.machine: part.run.environment for part in reversed(parts)}
    for key in _OF_MACHINE:
        values = {name: environment.get(key) for name, environment in reversed(machines.items())}
        if len({str(value) for value in values.values()}) > 1:
            rows.append({"key": key, **values})
    return pd.DataFrame(rows, columns=["key", *reversed(machines)], dtype=object)
