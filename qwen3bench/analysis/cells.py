"""One row per cell, workload and runtime: what it took, what it gained, what it is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from qwen3bench.analysis.frames import (
    BASELINE,
    COPY,
    analysis_setting,
    block_matrix,
    factor_columns,
    used_samples,
)
from qwen3bench.analysis.variance import clustered_mean
from qwen3bench.record.lines import (
    CeilingLine,
    CompileLine,
    CostLine,
    EvidenceLine,
    FailureLine,
    GradientsLine,
    Line,
    MemoryLine,
    ParametersLine,
    RunLine,
    VerifyLine,
)
from qwen3bench.record.messages import Judgment
from qwen3bench.record.reader import Record
from qwen3bench.record.rounds import CONFIRM
from qwen3bench.record.states import CellStatus

_KEYS = ["cell", "workload", "runtime"]
_PARAMETERS = ["parameter_bytes", "num_parameters", "num_unique_parameters", "num_non_embedding_parameters"]
_VERIFY = ["equivalent", "max_abs_error", "kl_mean", "top1_agreement"]
_HELD = ["gradient_bytes", "optimizer_bytes", "activation_bytes"]  # at the peak of a training step
_MEMORY = ["peak_allocated_bytes", "peak_reserved_bytes", "cache_bytes", *_HELD]
_EVIDENCE = ["attention_backend", "kernel_launches", "graph_breaks", "recompiles", "tied_storage"]
_BEFORE = ["model", "workload", "runtime", "device", "dtype", "batch_size", "prompt_tokens", "new_tokens"]
_LATENCY = ["latency_s", "latency_lo_s", "latency_hi_s", "samples"]
_SPEED = ["tokens_per_s", "ttft_s", "tpot_s", "speedup", "speedup_lo", "speedup_hi"]
_TRAINED_BYTES = {"amp": 4, "fp32": 4, "bf16": 2}  # of a weight, by training's precision
_RATIOS = {"ttft_ratio": "ttft_s", "tpot_ratio": "tpot_s"}
_AFTER = ["attention_backend", "kernel_launches", "mfu", "mbu"]
_MORE = ["cache_bytes", "compile_s", "graph_breaks", "recompiles", "tied_storage", "itl_p50_s", "itl_p99_s", *_HELD]


def columns(factors: Iterable[str]) -> list[str]:
    """The columns of cells.csv, those that CONTRACT promises first."""
    promised = ["cell", *factors, *_BEFORE, "status", "reason", *_LATENCY, *_SPEED]
    return [*promised, *_MEMORY[:2], *_PARAMETERS, *_VERIFY, *_AFTER, *_MORE]


def cells_table(record: Record, samples: pd.DataFrame | None = None) -> pd.DataFrame:
    """One row per cell × workload × runtime of a record, whole or partial.

    What was not measured is missing, never 0.

    `speedup` is the geometric mean of baseline / cell within blocks, for cells with status `ok` alone. `latency_s` is
    the baseline's over it, so that the two cannot contradict each other; the baseline's, and that of a cell without a
    speed-up, is the median over visits. `ttft_s` and `tpot_s` likewise. The interval of a latency is as wide as that of
    the mean of its logarithm; all intervals are over blocks, clustered by process. The A/A copy never counts.

    Visits that other work slowed (`left_out`) do not count.

    `samples`: what `used_samples(record)` gave, where the caller has it.
    """
    factors = list(record.run.factors)
    samples = used_samples(record) if samples is None else samples
    table = _grid(record, samples)
    of_cells: tuple[tuple[type[Line], list[str], list[str]], ...] = (
        (ParametersLine, _PARAMETERS, ["cell"]),
        (VerifyLine, _VERIFY, ["cell"]),
        (MemoryLine, _MEMORY, _KEYS),
        (EvidenceLine, _EVIDENCE, _KEYS),
    )
    for kind, fields, keys in of_cells:
        table = _add(table, record.frame(kind), fields, keys)
    for wrong in (line for line in record.of(GradientsLine) if not line.equivalent):
        table.loc[(table["cell"] == wrong.cell) & (table["workload"] == wrong.workload), "equivalent"] = False
    _weights_as_trained(table)
    compiled = record.frame(CompileLine)
    if {"seconds", *_KEYS} <= set(compiled):
        compiled = compiled.groupby(_KEYS)["seconds"].median().reset_index(name="compile_s")
    table = _add(table, compiled, ["compile_s"], _KEYS)

    table["status"], table["reason"] = _status(record, table, samples)
    timed = samples[samples["copy"] == 0]
    if "left_out" in timed:
        timed = timed[~timed["left_out"].astype(bool)]
    confidence = analysis_setting(record, "confidence")
    table = _add(table, _latency(timed, confidence), [*_LATENCY, "ttft_s", "tpot_s", "itl_p50_s", "itl_p99_s"], _KEYS)
    # Numbers computed from NaN have no speed: they took other paths.
    times = [*_LATENCY[:3], "ttft_s", "tpot_s", "itl_p50_s", "itl_p99_s"]
    table.loc[table["status"] == CellStatus.INVALID, times] = np.nan
    table = _add(table, _speedups(samples, table, confidence), ["speedup", "speedup_lo", "speedup_hi", *_RATIOS], _KEYS)
    _by_ratios(table)
    _rates(record, table)
    codes = factor_columns(table["cell"].tolist(), factors)
    for factor in factors:
        table[factor] = pd.array(codes[factor].to_numpy(), dtype="Int64")
    for name in [*_PARAMETERS, *_MEMORY, "samples", "kernel_launches", "graph_breaks", "recompiles"]:
        table[name] = pd.to_numeric(table[name], errors="coerce").round().astype("Int64")
    return table[columns(factors)]


def _grid(record: Record, samples: pd.DataFrame) -> pd.DataFrame:
    """A row per planned cell × workload × runtime, with what the configuration says about it."""
    run = record.run
    planned = [(c, w, r) for w in run.workloads for r in run.runtimes for c in run.cells]
    measured = samples[_KEYS].drop_duplicates().itertuples(index=False, name=None)
    table = pd.DataFrame(list(dict.fromkeys([*planned, *measured])), columns=_KEYS, dtype=object)
    table["model"] = run.model or run.setting("model", "name")
    precisions = {w: run.setting("workload", w, "precision") or run.dtype for w in table["workload"].unique()}
    table["device"], table["dtype"] = run.device, table["workload"].map(precisions)
    for field in ("batch_size", "prompt_tokens", "new_tokens"):
        sizes = {w: _size(run, w, field) for w in table["workload"].unique()}
        table[field] = pd.array([sizes[w] for w in table["workload"]], dtype="Int64")
    return table


def _size(run: RunLine, workload: str, field: str) -> int | None:
    value = run.setting("workload", workload, field)
    if value is None and not (field == "new_tokens" and workload != "generate"):
        value = run.setting(field)
    return value if type(value) is int else None


def _add(table: pd.DataFrame, more: pd.DataFrame, fields: list[str], keys: list[str]) -> pd.DataFrame:
    """`table` with the `fields` that `more` has for `keys`, the last line counting; missing where it has
    none."""
    more = more.reindex(columns=[*keys, *fields]).drop_duplicates(keys, keep="last")
    if more.empty:
        return table.assign(**dict.fromkeys(fields, np.nan))
    return table.merge(more, on=keys, how="left")


def _weights_as_trained(table: pd.DataFrame) -> None:
    """Bytes of parameters in the precision of training, where that is not the run's dtype."""
    each = table["dtype"].map(_TRAINED_BYTES)
    bytes_ = pd.to_numeric(table["num_parameters"], errors="coerce") * each
    table["parameter_bytes"] = table["parameter_bytes"].where(bytes_.isna(), bytes_)


def _status(record: Record, table: pd.DataFrame, samples: pd.DataFrame) -> tuple[list[str | None], list[str | None]]:
    of_screen = (line for line in record.of(FailureLine) if line.pass_ != CONFIRM)
    failures = {(line.cell, line.workload, line.runtime): line for line in of_screen}
    verified = {line.cell: line for line in record.of(VerifyLine)}
    trained = {(line.cell, line.workload): line for line in record.of(GradientsLine)}
    training = {workload for _, workload in trained}
    timed = samples.loc[samples["copy"] == 0, _KEYS].drop_duplicates()
    measured = set(timed.itertuples(index=False, name=None))
    status: list[str | None] = []
    reason: list[str | None] = []
    for cell, workload, runtime in table[_KEYS].itertuples(index=False, name=None):
        keys = [(cell, w, r) for w in (None, workload) for r in (None, runtime)]
        failed = next((failures[key] for key in keys if key in failures), None)
        checks: list[Judgment | None] = [verified.get(cell)] if verified else []
        checks += [trained.get((cell, workload))] if workload in training else []
        wrong = next((check for check in checks if check and not check.equivalent), None)
        state: CellStatus | None
        why: str | None
        if failed:
            state, why = failed.status, failed.reason
        elif wrong:
            state, why = CellStatus.NOT_EQUIVALENT if wrong.ran else CellStatus.CRASHED, wrong.reason
        elif None in checks and (cell, workload, runtime) in measured:
            state, why = CellStatus.NOT_EQUIVALENT, "not known to be: the record has lost what the gate said of it"
        elif (cell, workload, runtime) in measured:
            state, why = CellStatus.OK, None
        else:
            state, why = None, "not measured"
        status.append(state.value if state else None)
        reason.append(why or None)
    return status, reason


def _latency(timed: pd.DataFrame, confidence: float) -> pd.DataFrame:
    """Median latency over visits with its interval, and the token times, per cell × workload × runtime."""
    if timed.empty:
        return pd.DataFrame(columns=_KEYS)
    fields = ["latency_s", *[c for c in ("ttft_s", "tpot_s") if c in timed]]
    by_visit = timed.groupby([*_KEYS, "block"])
    visits = by_visit[fields].median()
    visits["process"] = by_visit["process"].first()
    groups = visits.groupby(level=_KEYS)
    result = groups[fields].median()
    result["samples"] = timed.groupby(_KEYS).size()
    log_s, process = np.log(visits["latency_s"].to_numpy(float)), visits["process"].to_numpy()
    where: dict[Any, Any] = dict(groups.indices)
    half = pd.Series(
        [float(clustered_mean(log_s[i], process[i]).half_width(confidence)) for i in where.values()],
        index=pd.MultiIndex.from_tuples(list(where), names=_KEYS),
    )
    result["latency_lo_s"] = result["latency_s"] * np.exp(-half)
    result["latency_hi_s"] = result["latency_s"] * np.exp(half)
    if "itl_s" in timed:
        gaps = timed[[*_KEYS, "itl_s"]].dropna().explode("itl_s")
        gaps["itl_s"] = pd.to_numeric(gaps["itl_s"])
        by_cell = gaps.groupby(_KEYS)["itl_s"]
        result["itl_p50_s"], result["itl_p99_s"] = by_cell.quantile(0.5), by_cell.quantile(0.99)
    return result.reset_index()


def _speedups(samples: pd.DataFrame, table: pd.DataFrame, confidence: float) -> pd.DataFrame:
    ok = table[table["status"] == CellStatus.OK]
    parts = []
    for key, rows in ok.groupby(_KEYS[1:]):
        workload, runtime = key
        if BASELINE not in set(rows["cell"]):
            continue
        here = samples[(samples["workload"] == workload) & (samples["runtime"] == runtime)]
        matrix = block_matrix(here, rows["cell"].tolist())
        if matrix.log_s.empty or BASELINE not in matrix.log_s:
            continue
        others = [c for c in matrix.log_s.columns if c not in (BASELINE, COPY)]
        ratios = {name: _ratios(here, [BASELINE, *others], time) for name, time in _RATIOS.items()}
        found = matrix.log_ratios(BASELINE, others)
        half = found.half_width(confidence)
        part = pd.DataFrame(
            {
                "workload": workload,
                "runtime": runtime,
                "cell": [BASELINE, *others],
                "speedup": np.exp([0.0, *found.estimate]),
                "speedup_lo": [np.nan, *np.exp(found.estimate - half)],
                "speedup_hi": [np.nan, *np.exp(found.estimate + half)],
                **ratios,
            }
        )
        parts.append(part)
    return pd.concat(parts) if parts else pd.DataFrame(columns=_KEYS)


def _ratios(here: pd.DataFrame, cells: list[str], time: str) -> NDArray[np.float64]:
    """Of each cell the geometric mean of baseline / cell within blocks; NaN where there is none."""
    log_s = block_matrix(here, cells, time).completed if time in here else pd.DataFrame()
    if BASELINE not in log_s or log_s.empty:
        return np.full(len(cells), np.nan)
    means = log_s.reindex(columns=cells).mean()
    return np.exp(means[BASELINE] - means.to_numpy())


def _by_ratios(table: pd.DataFrame) -> None:
    """Times of cells become the baseline's over the ratio within blocks, where there is one."""
    baselines = table[table["cell"] == BASELINE].set_index(_KEYS[1:])
    of_baseline = baselines.reindex(pd.MultiIndex.from_frame(table[_KEYS[1:]])).reset_index(drop=True)
    for time, ratio in (("latency_s", "speedup"), *((time, name) for name, time in _RATIOS.items())):
        own = table[time].astype(float)
        found = of_baseline[time].astype(float) / table[ratio].astype(float)
        table[time] = found.where(found.notna(), own)
        if time == "latency_s":
            for end in ("latency_lo_s", "latency_hi_s"):
                table[end] = table[end].astype(float) * (table[time] / own)


def _rates(record: Record, table: pd.DataFrame) -> None:
    """Adds tokens/s, TTFT, TPOT, MFU and MBU as the field uses them, from latency and the recorded cost."""
    latency, workload = table["latency_s"].astype(float), table["workload"]
    only_first = (workload == "prefill") | ((workload == "generate") & (table["new_tokens"] == 1))
    table["ttft_s"] = table["ttft_s"].where(~only_first.fillna(False).astype(bool), latency)
    table["tpot_s"] = table["tpot_s"].where(workload != "decode", latency)
    tokens = table["batch_size"].astype(float)
    tokens = tokens * table["prompt_tokens"].astype(float).where(workload.isin(["prefill", "train"]), 1.0)
    tokens = tokens * table["new_tokens"].astype(float).where(workload == "generate", 1.0)
    table["tokens_per_s"] = (tokens / latency).where(workload.isin(["prefill", "decode", "generate", "train"]))
    ceiling = next(reversed(record.of(CeilingLine)), CeilingLine())
    cost = _add(table[["cell", "workload"]], record.frame(CostLine), ["flops", "bytes"], ["cell", "workload"])
    peaks = (("mfu", "flops", ceiling.matmul_flops_per_s), ("mbu", "bytes", ceiling.copy_bytes_per_s))
    for name, amount, peak_per_s in peaks:
        amounts = pd.to_numeric(cost[amount], errors="coerce").to_numpy(dtype=float)
        table[name] = amounts / latency / peak_per_s if peak_per_s else np.nan
