from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from records import write_record

from qwen3bench.record.lines import LINES

FACTORS = ("flash", "tie", "mlp", "mask", "norm")
MODEL = {"name": "small", "num_layers": 2, "emb_dim": 64, "vocab_size": 512}
HEAD_BYTES = 512 * 64 * 2


def _labels(factors: Sequence[str]) -> list[str]:
    cells = product((0, 1), repeat=len(factors))
    return ["+".join(f for f, on in zip(factors, cell, strict=True) if on) or "baseline" for cell in cells]


@pytest.fixture
def labels() -> Callable[[Sequence[str]], list[str]]:
    """Every cell's label, the baseline first."""
    return _labels


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes the record of a simulated run and returns its directory.

    `worth` maps a factor (or `a:b`) to what it multiplies the speed by when on.
    """

    def write(
        name: str = "run",
        *,
        factors: Sequence[str] = FACTORS,
        cells: Sequence[str] | None = None,
        worth: Mapping[str, float] | None = None,
        noise: float = 0.001,
        process_noise: float = 0.0,
        blocks: int = 6,
        blocks_per_process: int = 3,
        repeats: int = 3,
        baseline_s: Mapping[tuple[str, str], float] | None = None,
        copy_ratio: float = 1.0,
        drift_per_block: float = 0.0,
        extra: Sequence[dict[str, Any]] = (),
        config: Mapping[str, Any] | None = None,
        skip: Sequence[str] = (),
        seed: int = 0,
        finished: bool = True,
    ) -> Path:
        rng = np.random.default_rng(seed)
        baseline_s = baseline_s or {("prefill", "graph"): 0.01}
        cells = list(cells or _labels(factors))
        worth = worth or {"flash": 1.2, "norm": 1.3, "flash:mask": 1.03}
        lines: list[dict[str, Any]] = [
            {
                "type": "run",
                "created": "2026-01-01T00:00:00Z",
                "config": {
                    "model": MODEL,
                    "batch_size": 2,
                    "prompt_tokens": 128,
                    "new_tokens": 16,
                    "analysis": {"band": 0.01, "confidence": 0.95},
                    **(config or {}),
                },
                "factors": list(factors),
                "cells": cells,
                "workloads": list(dict.fromkeys(w for w, _ in baseline_s)),
                "runtimes": list(dict.fromkeys(r for _, r in baseline_s)),
                "model": "small",
                "device": "Simulated",
                "dtype": "bfloat16",
                "fingerprint": {"code": "0"},
            },
            {"type": "ceiling", "copy_bytes_per_s": 1e12, "matmul_flops_per_s": 1e14, "dtype": "bfloat16"},
        ]
        for cell in cells:
            tied = "tie" in cell.split("+")
            lines += [
                {
                    "type": "parameters",
                    "cell": cell,
                    "num_parameters": 100_000 - tied * 512 * 64,
                    "num_unique_parameters": 100_000 - 512 * 64,
                    "num_non_embedding_parameters": 100_000 - 2 * 512 * 64,
                    "parameter_bytes": 200_000 - tied * HEAD_BYTES,
                },
                {"type": "verify", "cell": cell, "equivalent": True, "max_abs_error": 1e-6, "kl_mean": 1e-9},
            ]
            for workload, runtime in baseline_s:
                where = {"cell": cell, "workload": workload, "runtime": runtime}
                lines += [
                    {
                        "type": "memory",
                        **where,
                        "peak_allocated_bytes": 900_000 - tied * HEAD_BYTES,
                        "peak_reserved_bytes": 1_000_000,
                    },
                    {"type": "cost", "cell": cell, "workload": workload, "flops": 1e10, "bytes": 2e9},
                ]
        lines = [line for line in lines if line.get("cell") not in skip or line["type"] == "run"]
        for (workload, runtime), seconds in baseline_s.items():
            level = {cell: np.log(seconds) - _gain(cell, worth) for cell in cells}
            offset: dict[tuple[str, int], float] = {}
            for block in range(blocks):
                process = block // blocks_per_process
                if block % blocks_per_process == 0:
                    offset = {(c, k): rng.normal(0, process_noise) for c in cells for k in (0, 1)}
                visits = [(c, 0) for c in cells if c not in skip] + [("baseline", 1)]
                for position, i in enumerate(rng.permutation(len(visits))):
                    cell, copy = visits[i]
                    mean = level[cell] + copy * np.log(copy_ratio) + offset[cell, copy]
                    mean += drift_per_block * (block + position / len(visits))
                    where = {"workload": workload, "runtime": runtime, "cell": cell, "copy": copy}
                    where |= {"process": process, "block": block, "attempt": 0, "position": position}
                    value = np.exp(mean + rng.normal(0, noise))
                    for repeat in range(repeats):
                        sample = {**where, "repeat": repeat, "latency_s": float(value), "time": 1e9 + block}
                        if workload == "generate":
                            gaps = [float(value) / 20] * 15
                            sample |= {"ttft_s": float(value) / 4, "tpot_s": float(value) / 20, "itl_s": gaps}
                        lines.append({"type": "sample", **sample})
                    lines.append({"type": "visit", **where, "samples": repeats})
                lines.append(
                    {
                        "type": "block",
                        "workload": workload,
                        "runtime": runtime,
                        "process": process,
                        "block": block,
                        "attempt": 0,
                        "state": "ok",
                        "flags": [],
                        "time": 1e9 + block,
                    }
                )
        told = {_key(line) for line in extra}
        lines = [line for line in lines if not LINES[line["type"]].key or _key(line) not in told]
        lines += extra
        if finished:
            lines.append({"type": "end", "status": "finished", "time": 1e9 + blocks})
        return write_record(tmp_path / name, lines)

    return write


def _key(line: Mapping[str, Any]) -> tuple[Any, ...]:
    return line["type"], *(line.get(name) for name in LINES[line["type"]].key)


def _gain(cell: str, worth: Mapping[str, float]) -> float:
    on = set(cell.split("+"))
    return float(sum(np.log(w) for term, w in worth.items() if set(term.split(":")) <= on))
