"""What changed between two runs, by the same verdicts as within one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import special

from qwen3bench.analysis.contrasts import OTHERS_OFF, others_of
from qwen3bench.analysis.frames import analysis_setting
from qwen3bench.analysis.run import Run
from qwen3bench.analysis.significance import OF_BYTES, OF_TIMES, Directions, Gains, holm, verdicts
from qwen3bench.analysis.variance import clustered_mean
from qwen3bench.errors import UserError
from qwen3bench.record.states import CellStatus, Verdict
from qwen3bench.record.typed import flat

_KEYS = ["cell", "workload", "runtime"]
_TERM_KEYS = ["workload", "runtime", "metric", "term", "kind"]
_CHANGE = ["a", "b", "ratio", "lo", "hi", "p_holm", "verdict"]
# Settings that say where results go or how they are shown, not what was measured.
_NOT_COMPARED = ("run.", "resume", "report.")


@dataclass(frozen=True)
class Comparison:
    """What differs between runs A and B; `ratio` above 1: B is faster, or needs less.

    - `config`, `environment`: key, a, b of the settings that differ
    - `status`: cell, workload, runtime, a, b of the cells whose status differs
    - `cells`: cell, workload, runtime, metric, a, b, ratio (A / B), lo, hi, p_holm, verdict
    - `effects`: workload, runtime, metric, term, kind, a, b, ratio (B's effect / A's), lo, hi, p_holm,
      verdict
    - `only`: what one run alone holds, in words
    - `lost`: cells that are ok in A and not in B, though B measures their workload and runtime, in words
    - `unlike`: sizes, model and dtype in which what is compared differs, in words
    - `warnings`: what makes a run less than it should be, in words: unfinished, noisy
    """

    config: pd.DataFrame
    environment: pd.DataFrame
    status: pd.DataFrame
    cells: pd.DataFrame
    effects: pd.DataFrame
    only: list[str]
    lost: list[str]
    unlike: list[str]
    warnings: list[str]

    @property
    def slower(self) -> list[str]:
        """What got slower in B, in words: cells, effects that lost worth, cells that are no longer ok."""
        lost = self.status[self.status["a"] == CellStatus.OK].fillna("not measured")
        said = [f"{r.cell} is {r.b!s} ({r.workload}, {r.runtime})" for r in lost.itertuples()]
        effects = self.effects[self.effects["verdict"] == Verdict.SLOWER]
        said += [
            f"effect of {r['term']}, {r['kind']}, {r['a']:.3f}× → {r['b']:.3f}× ({r['workload']}, {r['runtime']})"
            for r in effects.to_dict("records")
        ]
        cells = self.cells[self.cells["verdict"] == Verdict.SLOWER].to_dict("records")
        return said + [f"{r['cell']}, {r['ratio']:.3f}× ({r['workload']}, {r['runtime']})" for r in cells]


def compare(a: Run, b: Run) -> Comparison:
    """What changed from run A to run B.

    Effects are compared where both runs tell the same thing: of the same switches, and either an average over the
    others or a switch beside none, or all, of them. Latencies and effects of two runs are independent: intervals
    are Welch's (1947), p is Holm's over the terms, or the cells, of one workload and runtime; the verdicts are
    those of `effects`, with B's band. Bytes are compared as counted.

    Raises `UserError` where no cell under a workload and runtime is in both: nothing would be compared, and a gate
    must not pass for that.
    """
    if a.cells.merge(b.cells, on=_KEYS).empty:
        raise UserError(
            f"{a.path} and {b.path} have no cell under the same workload and runtime; there is nothing to compare"
        )
    band = analysis_setting(b.record, "band")
    confidence = analysis_setting(b.record, "confidence")
    return Comparison(
        config=_differences(a.config, b.config),
        environment=_differences(*_known_to_both(a.environment, b.environment)),
        status=_status(a, b),
        cells=_cells(a, b, band, confidence),
        effects=_effects(a, b, band, confidence),
        only=_only(a, b),
        lost=_lost(a, b),
        unlike=_unlike(a, b),
        warnings=[*_warnings("A", a), *_warnings("B", b)],
    )


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> pd.DataFrame:
    flat_a, flat_b = dict(flat(a)), dict(flat(b))
    keys = [k for k in dict.fromkeys([*flat_a, *flat_b]) if not k.startswith(_NOT_COMPARED)]
    rows = [(k, flat_a.get(k), flat_b.get(k)) for k in keys if flat_a.get(k) != flat_b.get(k)]
    return pd.DataFrame(rows, columns=["key", "a", "b"], dtype=object)


def _known_to_both(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Two environments without what an older version did not write down: not known then is no difference."""
    if not (a and b):
        return a, b
    known = [key for key in a if key in b]
    return {key: a[key] for key in known}, {key: b[key] for key in known}


def _status(a: Run, b: Run) -> pd.DataFrame:
    both = a.cells[[*_KEYS, "status"]].merge(b.cells[[*_KEYS, "status"]], on=_KEYS, suffixes=("_a", "_b"))
    both = both.rename(columns={"status_a": "a", "status_b": "b"}).astype(object)
    both = both.where(both.notna(), None)
    return both.loc[[x != y for x, y in zip(both["a"], both["b"], strict=True)]].reset_index(drop=True)


def _cells(a: Run, b: Run, band: float, confidence: float) -> pd.DataFrame:
    columns = [*_KEYS, "metric", *_CHANGE]
    order = b.cells[_KEYS]  # as the cells stand in their table
    latency = order.merge(_log_latency(a), on=_KEYS).merge(_log_latency(b), on=_KEYS, suffixes=("_a", "_b"))
    latency = _judged(latency, _KEYS[1:], OF_TIMES, band, confidence)
    latency["a"], latency["b"] = np.exp(latency["mean_a"]), np.exp(latency["mean_b"])
    metric = "peak_allocated_bytes"
    ok_a, ok_b = (run.cells.loc[run.cells["status"] == CellStatus.OK, [*_KEYS, metric]].dropna() for run in (a, b))
    memory = ok_a.merge(ok_b, on=_KEYS, suffixes=("_a", "_b"))
    memory["a"], memory["b"] = memory[f"{metric}_a"].astype(float), memory[f"{metric}_b"].astype(float)
    memory["ratio"] = memory["lo"] = memory["hi"] = memory["a"] / memory["b"]
    memory["p_holm"] = np.nan
    gain = memory["ratio"] - 1
    memory["verdict"] = verdicts(Gains(gain, gain, gain, memory["p_holm"]), band, OF_BYTES)
    parts = [t for t in (latency.assign(metric="latency_s"), memory.assign(metric=metric)) if len(t)]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def _log_latency(run: Run) -> pd.DataFrame:
    """Mean log latency of each cell that is ok, with its error over blocks and processes."""
    samples = run.samples[run.samples["copy"] == 0].merge(
        run.cells.loc[run.cells["status"] == CellStatus.OK, _KEYS], on=_KEYS
    )
    visits = samples.groupby([*_KEYS, "block"], sort=False).agg({"latency_s": "median", "process": "first"})
    rows = []
    for key, group in visits.groupby(level=_KEYS, sort=False):
        found = clustered_mean(np.log(group["latency_s"].to_numpy(float)), group["process"].to_numpy())
        rows.append((*tuple(key), float(found.estimate), float(found.se), float(found.df)))
    return pd.DataFrame(rows, columns=[*_KEYS, "mean", "se", "df"])


def _effects(a: Run, b: Run, band: float, confidence: float) -> pd.DataFrame:
    columns = [*_TERM_KEYS, *_CHANGE]
    terms = []
    for run in (a, b):
        table = run.effects[(run.effects["metric"] == "latency_s") & run.effects["estimate"].notna()].copy()
        half = (np.log(table["hi"].astype(float)) - np.log(table["lo"].astype(float))) / 2
        quantile = special.stdtrit(table["df"].astype(float), (1 + analysis_setting(run.record, "confidence")) / 2)
        table["se"], table["mean"] = half / quantile, -np.log(table["estimate"].astype(float))
        table["others"] = table["reason"].map(others_of)
        terms.append(table[[*_TERM_KEYS, "others", "estimate", "mean", "se", "df"]])
    both = terms[0].merge(terms[1], on=[*_TERM_KEYS, "others"], suffixes=("_a", "_b"))
    if _factors(a) != _factors(b):
        both = both[both["others"] == OTHERS_OFF].reset_index(drop=True)
    if both.empty:
        return pd.DataFrame(columns=columns)
    both["shapley"] = both["kind"] == "shapley"
    both = _judged(both, ["workload", "runtime", "shapley"], OF_TIMES, band, confidence)
    return both.rename(columns={"estimate_a": "a", "estimate_b": "b"})[columns]


def _factors(run: Run) -> set[str]:
    return set(run.factors)


def _judged(both: pd.DataFrame, family: list[str], words: Directions, band: float, confidence: float) -> pd.DataFrame:
    """`both` with ratio, lo, hi, p_holm and verdict of the change in the log scale columns `mean`, `se` and
    `df`."""
    change = (both["mean_a"] - both["mean_b"]).to_numpy(float)
    variance_a, variance_b = both["se_a"].to_numpy(float) ** 2, both["se_b"].to_numpy(float) ** 2
    se = np.sqrt(variance_a + variance_b)
    with np.errstate(divide="ignore", invalid="ignore"):
        df = se**4 / (variance_a**2 / both["df_a"].to_numpy(float) + variance_b**2 / both["df_b"].to_numpy(float))
        p = np.where(se > 0, 2 * special.stdtr(df, -np.abs(change) / se), np.nan)
        half = np.where(se == 0, 0.0, special.stdtrit(df, (1 + confidence) / 2) * se)
    both = both.assign(ratio=np.exp(change), lo=np.exp(change - half), hi=np.exp(change + half), p_holm=p)
    both["p_holm"] = both.groupby(family)["p_holm"].transform(lambda values: holm(values.to_numpy()))
    gains = Gains(both["ratio"] - 1, both["lo"] - 1, both["hi"] - 1, both["p_holm"])
    both["verdict"] = verdicts(gains, band, words)
    return both


def _warnings(name: str, run: Run) -> Iterator[str]:
    if not run.finished:
        yield f"{name} has not finished: what is here is what was measured until now"
    for row in run.controls.aa.to_dict("records"):
        if row["noisy"]:
            off = f"{100 * abs(row['ratio'] - 1):.2g} % apart, more than {100 * row['limit']:g} %"
            yield f"{name} is noisy: two copies of the baseline are {off} ({row['workload']}, {row['runtime']})"


def _only(a: Run, b: Run) -> list[str]:
    said = []
    for name, run, other in (("A", a, b), ("B", b, a)):
        for what, column in (("cell", "cell"), ("workload", "workload"), ("runtime", "runtime")):
            theirs = set(other.cells[column])
            alone = [str(v) for v in dict.fromkeys(run.cells[column]) if v not in theirs]
            if alone:
                said.append(f"{what}{'s' if len(alone) > 1 else ''} in {name} alone: {', '.join(alone)}")
    if differ := _factors(a) ^ _factors(b):
        text = "an effect is one over the others, and compared only where these are off"
        said.append(f"not both vary {', '.join(sorted(differ))}: {text}")
    told = [_told(run) for run in (a, b)]
    unlike = {key: (told[0][key], told[1][key]) for key in told[0] if told[1].get(key, told[0][key]) != told[0][key]}
    for where in dict.fromkeys(unlike.values()):
        terms = dict.fromkeys(key[-1] for key, others in unlike.items() if others == where)
        in_a, in_b = (text or "as an average over the others" for text in where)
        said.append(f"not compared: {', '.join(terms)}, told {in_a} in A and {in_b} in B")
    return said


def _lost(a: Run, b: Run) -> list[str]:
    there = b.cells[_KEYS[1:]].drop_duplicates()
    ok = a.cells.loc[a.cells["status"] == CellStatus.OK, _KEYS].merge(there, on=_KEYS[1:])
    left = ok.merge(b.cells[_KEYS], on=_KEYS, how="left", indicator="found")
    return [f"{r.cell} ({r.workload}, {r.runtime})" for r in left[left["found"] == "left_only"].itertuples()]


def _unlike(a: Run, b: Run) -> list[str]:
    both = a.cells.merge(b.cells, on=_KEYS, suffixes=("_a", "_b"))
    said = []
    for name in ("model", "dtype", "batch_size", "prompt_tokens", "new_tokens"):
        pairs = both[[f"{name}_a", f"{name}_b"]].dropna().drop_duplicates().itertuples(index=False, name=None)
        said += [f"{name} {old} and {new}" for old, new in pairs if old != new]
    return said


def _told(run: Run) -> dict[tuple[str, ...], str]:
    """What the other switches do where the main effects on latency are told, by workload, runtime and term."""
    table = run.effects[(run.effects["metric"] == "latency_s") & (run.effects["kind"] == "main")]
    table = table[table["estimate"].notna()]
    keys = table[["workload", "runtime", "term"]].itertuples(index=False, name=None)
    return dict(zip(keys, map(others_of, table["reason"]), strict=True))
