"""Controls that show whether a run's numbers can be trusted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import special

from qwen3bench.analysis.frames import BASELINE, COPY, analysis_setting, block_matrix
from qwen3bench.analysis.significance import holm
from qwen3bench.analysis.variance import Array, Estimates
from qwen3bench.record.lines import EagerLine, EvidenceLine, ParametersLine
from qwen3bench.record.reader import Record
from qwen3bench.record.states import CellStatus

# By less than this two copies of one model may differ, though it be shown: device time, host time.
_NOISY = {"graph": 0.005, "compile": 0.005, "eager": 0.02}
_AA_COLUMNS = ["workload", "runtime", "ratio", "lo", "hi", "limit", "noisy"]
_ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Controls:
    """The controls of a run; each a table that is empty where the run cannot tell.

    - `aa`: workload, runtime, ratio (copy / baseline latency), lo, hi, limit, noisy (see `copies_differ`)
    - `tie_latency`: workload, runtime, estimate, lo, hi, ok (the interval holds 1); tying cannot change
      latency
    - `tie_memory`: cell (without tie), saved_bytes, head_bytes, ok (equal); tying saves the head exactly
    - `drift`: workload, runtime, per_hour (slope of log latency within processes), total, lo, hi (relative
      change of latency from a process's first block to its last), blocks
    - `drift_series`: workload, runtime, block, process, time, relative_latency (block mean / run mean)
    - `host`: workload, cell, eager_s, graph_s, busy_share (graph / eager: the share of time that the GPU
      works)
    """

    aa: pd.DataFrame
    tie_latency: pd.DataFrame
    tie_memory: pd.DataFrame
    drift: pd.DataFrame
    drift_series: pd.DataFrame
    host: pd.DataFrame

    @property
    def noisy(self) -> bool:
        """Whether two copies of the baseline are shown to differ anywhere."""
        return bool(self.aa["noisy"].any())

    @cached_property
    def noise(self) -> dict[tuple[str, str], float]:
        """`noise_of` each workload and runtime that has an A/A control."""
        of_each = self.aa.groupby(["workload", "runtime"], sort=False)
        return {(str(workload), str(runtime)): noise_of(aa) for (workload, runtime), aa in of_each}


def noise_of(aa: pd.DataFrame) -> float:
    """By how much two copies of the baseline differ, in log latency, where the A/A control fails; else 0.

    `aa`: rows of `Controls.aa`.
    """
    return max((abs(math.log(ratio)) for ratio in aa.loc[aa["noisy"].astype(bool), "ratio"]), default=0.0)


def beyond_noise(estimate: float, noise: float) -> bool:
    """Whether a ratio is farther from 1 than two copies of the baseline are, where their control fails.

    The one rule for what a noisy condition lets be said. `noise`: the condition's, see `noise_of`.
    """
    return not noise or abs(math.log(estimate)) > noise


def controls(record: Record, samples: pd.DataFrame, cells: pd.DataFrame, effects: pd.DataFrame) -> Controls:
    """The controls of a run from its record and its tables of samples, cells and effects."""
    confidence = analysis_setting(record, "confidence")
    drift, series = _drift(samples, confidence)
    return Controls(
        aa=aa_control(samples, cells, confidence),
        tie_latency=_tie_latency(effects),
        tie_memory=_tie_memory(record),
        drift=drift,
        drift_series=series,
        host=_host(cells, record),
    )


def aa_control(samples: pd.DataFrame, cells: pd.DataFrame, confidence: float) -> pd.DataFrame:
    """`Controls.aa` of these samples, beside the cells that are ok."""
    places, pairs = [], []
    ok = cells[cells["status"] == CellStatus.OK]
    for (workload, runtime), here in samples.groupby(["workload", "runtime"], sort=False):
        names = ok.loc[(ok["workload"] == workload) & (ok["runtime"] == runtime), "cell"]
        matrix = block_matrix(here, names.tolist())
        if matrix.log_s.empty or not {BASELINE, COPY} <= set(matrix.log_s):
            continue
        places.append((workload, runtime))
        pairs.append(matrix.log_ratios(COPY, [BASELINE]))
    if not pairs:
        return pd.DataFrame(columns=_AA_COLUMNS)
    parts = [(each.estimate, each.se, each.df, each.process_share) for each in pairs]
    found = Estimates(*(np.concatenate(values) for values in zip(*parts, strict=True)))
    ends = (found.estimate + side * found.half_width(confidence) for side in (0, -1, 1))
    limit = np.array([_NOISY.get(str(runtime), 0.02) for _, runtime in places])
    values = (*map(np.exp, ends), limit, copies_differ(found, limit, confidence))
    table = pd.DataFrame(places, columns=_AA_COLUMNS[:2])
    return table.assign(**dict(zip(_AA_COLUMNS[2:], values, strict=True)))


def copies_differ(found: Estimates, limit: Array | float, confidence: float) -> NDArray[np.bool_]:
    """Which pairs of copies of one model are shown to differ, and read as farther apart than the `limit`.

    The one rule for what is noisy. `found`: log ratios (…, conditions). A run with nothing wrong has a noisy condition
    with a chance of at most 1 − confidence (Holm's method over its conditions), however imprecise it is. Where the
    interval is well within the limit, what reads as farther apart is shown to differ. Without an interval nothing is
    shown; a difference known without error (se = 0) needs no p. See docs/how-we-measure.md, "Two copies".
    """
    shown = (holm(found.p()) < 1 - confidence) | (found.se == 0)
    return shown & (np.abs(np.expm1(found.estimate)) > limit)


def _tie_latency(effects: pd.DataFrame) -> pd.DataFrame:
    """Not of training, where `tie` saves a gradient, two moments and their traffic."""
    row = (effects["metric"] == "latency_s") & (effects["term"] == "tie") & (effects["kind"] == "main")
    row &= effects["workload"] != "train"
    rows = effects.loc[row, ["workload", "runtime", "estimate", "lo", "hi"]].dropna().reset_index(drop=True)
    return rows.assign(ok=(rows["lo"] <= 1) & (rows["hi"] >= 1))


def _tie_memory(record: Record) -> pd.DataFrame:
    columns = ["cell", "saved_bytes", "head_bytes", "ok"]
    factors, model = record.run.factors, record.run.setting("model")
    item_bytes = _ITEM_BYTES.get(str(record.run.dtype).removeprefix("torch."))
    if "tie" not in factors or not isinstance(model, dict) or not item_bytes:
        return pd.DataFrame(columns=columns)
    sizes = {line.cell: line.parameter_bytes for line in record.of(ParametersLine)}
    vocab_size, emb_dim = model.get("vocab_size"), model.get("emb_dim")
    if not (type(vocab_size) is int and type(emb_dim) is int):
        return pd.DataFrame(columns=columns)
    head_bytes = vocab_size * emb_dim * item_bytes
    rows = []
    for cell, size in sizes.items():
        on = {"tie", *([] if cell == BASELINE else cell.split("+"))}
        label = "+".join(f for f in factors if f in on)
        tied = sizes.get(label)
        if on <= set(factors) and cell != label and size is not None and tied is not None:
            rows.append((cell, size - tied, head_bytes, size - tied == head_bytes))
    return pd.DataFrame(rows, columns=columns)


def _drift(samples: pd.DataFrame, confidence: float) -> tuple[pd.DataFrame, pd.DataFrame]:
    slopes: list[dict[str, Any]] = []
    series = []
    for (workload, runtime), here in samples.groupby(["workload", "runtime"], sort=False):
        matrix = block_matrix(here)
        if matrix.log_s.empty or "time" not in here:
            continue
        blocks = here.groupby("block")["time"].median().loc[matrix.log_s.index]
        level = matrix.completed.mean(axis=1)
        level = level - level.mean()
        trend = _trend((blocks / 3600).to_numpy(float), level.to_numpy(), matrix.process, confidence)
        slopes.append({"workload": workload, "runtime": runtime, **trend, "blocks": len(blocks)})
        series.append(
            pd.DataFrame(
                {
                    "workload": workload,
                    "runtime": runtime,
                    "block": blocks.index,
                    "process": matrix.process,
                    "time": blocks.to_numpy(),
                    "relative_latency": np.exp(level.to_numpy()),
                }
            )
        )
    empty = pd.DataFrame(columns=["workload", "runtime", "block", "process", "time", "relative_latency"])
    return (
        pd.DataFrame(slopes, columns=["workload", "runtime", "per_hour", "total", "lo", "hi", "blocks"]),
        pd.concat(series, ignore_index=True) if series else empty,
    )


def _trend(hours: Array, level: Array, process: NDArray[Any], confidence: float) -> dict[str, float]:
    """The slope that all processes share, and what it makes of a process's time: `per_hour`, `total`, `lo`, `hi`.

    Each process has a level of its own (analysis of covariance; Montgomery, section 15.3): one that is slow and late in
    the run is no trend. Over the whole run the slope would be an extrapolation, as processes start anew. NaN where no
    block is left to tell the slope's error from.
    """
    _, group, size = np.unique(process, return_inverse=True, return_counts=True)
    x, y = (values - (np.bincount(group, values) / size)[group] for values in (hours, level))
    df, spread = len(x) - len(size) - 1, float(x @ x)
    if df < 1 or not spread > 0:
        return dict.fromkeys(("per_hour", "total", "lo", "hi"), np.nan)
    slope = float(x @ y) / spread
    half = special.stdtrit(df, (1 + confidence) / 2) * np.sqrt(((y - slope * x) ** 2).sum() / df / spread)
    spans = np.array([np.ptp(hours[group == each]) for each in np.flatnonzero(size > 1)])
    total, lo, hi = np.expm1(np.array([slope, slope - half, slope + half]) * spans.mean())
    return {"per_hour": slope, "total": total, "lo": lo, "hi": hi}


def _host(cells: pd.DataFrame, record: Record) -> pd.DataFrame:
    ok = cells.loc[cells["status"] == CellStatus.OK, ["workload", "runtime", "cell", "latency_s"]]
    if "eager" not in set(cells["runtime"]):  # then by the few eager passes of the evidence
        columns = ["workload", "runtime", "cell", "eager_s"]
        looks = record.frame(EvidenceLine).reindex(columns=columns).dropna()  # of older records
        own = record.frame(EagerLine).assign(runtime="graph").reindex(columns=columns).dropna()
        looks = pd.concat([each for each in (looks, own) if len(each)] or [looks])
        looks = looks[looks["runtime"] == "graph"].assign(runtime="eager").rename(columns={"eager_s": "latency_s"})
        ok = pd.concat([ok, looks]) if len(looks) else ok
    by_runtime = ok.pivot_table(index=["workload", "cell"], columns="runtime", values="latency_s", sort=False)
    if not {"eager", "graph"} <= set(by_runtime):
        return pd.DataFrame(columns=["workload", "cell", "eager_s", "graph_s", "busy_share"])
    both = by_runtime[["eager", "graph"]].dropna().rename(columns={"eager": "eager_s", "graph": "graph_s"})
    both["busy_share"] = both["graph_s"] / both["eager_s"]
    return both.reset_index().rename_axis(columns=None)
