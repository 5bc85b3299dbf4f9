"""Synthetic records with planted effects, so that reports can be built without measuring anything."""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from records import write_record

from qwen3bench.analysis.run import Run, load_run
from qwen3bench.record.design import label
from qwen3bench.record.screen import screen as screen_of_factors
from qwen3bench.reporting.pages import write_report

FACTORS = ("flash", "tie", "mlp", "mask", "norm")
HEAD_BYTES = 151_936 * 1024 * 2
GAINS = {"flash": 0.165, "mlp": 0.012, "norm": 0.24}  # of log latency
JOINT_GAINS = {("flash", "mask"): 0.04}
BASE_S = {
    ("prefill", "graph"): 7.2e-3,
    ("prefill", "eager"): 29e-3,
    ("decode", "graph"): 3.1e-3,
    ("decode", "eager"): 29.6e-3,
    ("train", "graph"): 0.2,
}
Line = dict[str, Any]


MASK_NOTES = {False: "fused attention is given a mask tensor", True: "fused attention without a mask tensor"}


def cell_label(levels: dict[str, int]) -> str:
    """Label of the cell whose factors stand at these levels."""
    return "+".join(name for name, on in levels.items() if on) or "baseline"


def record_lines(
    factors: tuple[str, ...] = FACTORS,
    workloads: tuple[str, ...] = ("prefill",),
    runtimes: tuple[str, ...] = ("graph",),
    blocks: int = 6,
    noise: float = 0.0005,
    copy_shift: float = 0.0,
    memory: bool = True,
    evidence: bool = True,
    eager_look: bool = False,
    prompt_tokens: int = 512,
    seed: int = 0,
    screen: bool = False,
) -> list[Line]:
    """Lines of a finished run: GAINS and JOINT_GAINS planted in log latency, `tie` in memory alone.

    Under `eager` every gain is a quarter of what it is under `graph`, and the noise four times as large.
    `copy_shift` moves the second copy of the baseline, in log latency. `screen`: the cells are those of a screen.
    """
    rng = np.random.default_rng(seed)
    grid = [dict(zip(factors, levels, strict=True)) for levels in product((0, 1), repeat=len(factors))]
    grid.sort(key=lambda levels: sum(levels.values()))
    cells = {cell_label(levels): levels for levels in grid}
    if screen:
        cells = {name: cells[name] for name in map(label, screen_of_factors(factors).cells)}
    sizes = {"batch_size": 1, "prompt_tokens": prompt_tokens, "new_tokens": 64}
    config = {
        "model": {"name": "qwen3-0.6b", "vocab_size": 151_936, "emb_dim": 1024},
        **sizes,
        "device": "cuda",
        "dtype": "bfloat16",
        "seed": 0,
        "weights": "random",
        "opt": {name: {"_target_": f"qwen3bench.opt.{name}.apply"} for name in factors},
        "workload": {name: dict(sizes) for name in workloads},
        "runtime": {name: {} for name in runtimes},
        "design": {"name": "screen" if screen else "full"},
        "measure": {"name": "default", "target": 0.0025, "max_seconds": 60, "min_blocks": 6, "repeats": 3},
        "analysis": {"band": 0.01, "confidence": 0.95},
        "report": {"memory_limit_gib": None},
        "run": {"dir": "results/example"},
    }
    lines: list[Line] = [
        {
            "type": "run",
            "created": "2025-01-02T03:04:05+00:00",
            "config": config,
            "factors": list(factors),
            "cells": list(cells),
            "workloads": list(workloads),
            "runtimes": list(runtimes),
            "model": "qwen3-0.6b",
            "device": "NVIDIA H100 80GB HBM3",
            "dtype": "bfloat16",
            "fingerprint": {"config": "c0", "weights": "w0", "code": "s0", "torch": "2.11", "device": "h100"},
        },
        {
            "type": "session",
            "command": ["python", "-m", "qwen3bench", "design=full"],
            "time": 1_735_787_045.0,
        },
        *(
            {
                "type": "process",
                "process": p,
                "pid": 100 + p,
                "purpose": "time",
                "time": 1_735_787_050.0 + p,
            }
            for p in (0, 1)
        ),
    ]
    for cell, levels in cells.items():
        tied = levels.get("tie", 0)
        stored = 1_503_264_768 - HEAD_BYTES * tied
        lines.append(
            {
                "type": "parameters",
                "cell": cell,
                "num_parameters": 751_632_384 - 155_582_464 * tied,
                "num_unique_parameters": 596_049_920,
                "num_non_embedding_parameters": 440_467_456,
                "parameter_bytes": stored,
            }
        )
        lines.append(
            {
                "type": "verify",
                "cell": cell,
                "equivalent": True,
                "max_abs_error": 2.1e-6,
                "kl_mean": 1.3e-5,
                "top1_agreement": 0.998,
                "reason": None,
                "checks": {"prefill": 1.1},
            }
        )
        for workload, runtime in product(workloads, runtimes):
            scores = 0 if levels.get("flash") else 16 * 512 * 512 * 6
            where = {"cell": cell, "workload": workload, "runtime": runtime}
            if memory:
                peak = stored + 400_000_000 + scores
                lines.append(
                    {
                        "type": "memory",
                        **where,
                        "peak_allocated_bytes": peak,
                        "peak_reserved_bytes": peak + 2**25,
                        "cache_bytes": 0,
                    }
                )
            if evidence:
                backend = "none" if not levels.get("flash") else "flash_attention" if levels.get("mask") else "cudnn"
                launches = (
                    1500 - 400 * levels.get("flash", 0) - 600 * levels.get("norm", 0) - 28 * levels.get("mask", 0)
                )
                lines.append(
                    {
                        "type": "evidence",
                        **where,
                        "attention_backend": backend,
                        "kernel_launches": launches,
                        "tied_storage": bool(tied),
                        "graph_breaks": 0,
                        "eager_s": 29e-3 if runtime == "graph" and eager_look else None,
                        "recompiles": 0,
                        "kernels": {"gemm": 197},
                        "notes": [MASK_NOTES[bool(levels.get("mask"))]] if levels.get("flash") else [],
                    }
                )
        for workload in workloads:
            lines.append(
                {
                    "type": "cost",
                    "cell": cell,
                    "workload": workload,
                    "flops": 9.5e11 if workload == "prefill" else 1.9e9,
                    "bytes": 1.4e9,
                }
            )
    lines.append(
        {
            "type": "ceiling",
            "copy_bytes_per_s": 2.98e12,
            "matmul_flops_per_s": 7.73e14,
            "dtype": "bfloat16",
            "vendor": None,
        }
    )
    clock = 1_735_787_060.0
    for workload, runtime in product(workloads, runtimes):
        scale = 0.25 if runtime == "eager" else 1.0
        for block in range(blocks):
            process = block * 2 // blocks
            where = {
                "workload": workload,
                "runtime": runtime,
                "process": process,
                "block": block,
                "attempt": 0,
            }
            visits = [(cell, 0) for cell in cells] + [("baseline", 1)]
            shift = rng.normal(0, 0.002)
            for position, index in enumerate(rng.permutation(len(visits))):
                cell, copy = visits[index]
                levels = cells[cell]
                gain = sum(value for name, value in GAINS.items() if levels.get(name))
                gain += sum(value for names, value in JOINT_GAINS.items() if all(levels.get(n) for n in names))
                shifted = shift - scale * gain + copy * copy_shift
                for repeat in range(3):
                    value = BASE_S[workload, runtime] * float(np.exp(shifted + rng.normal(0, noise / scale)))
                    clock += value + 0.001
                    at = {**where, "cell": cell, "copy": copy, "position": position}
                    lines.append({"type": "sample", **at, "repeat": repeat, "latency_s": value, "time": clock})
                lines.append({"type": "visit", **where, "cell": cell, "copy": copy, "position": position, "samples": 3})
            telemetry = {
                "sm_clock_mhz": 1980,
                "memory_clock_mhz": 2619,
                "temperature_c": 41,
                "power_w": 310.0,
                "throttle_reasons": [],
                "foreign_processes": [],
            }
            lines.append({"type": "block", **where, "state": "ok", "flags": [], "time": clock, **telemetry})
        lines.append(
            {
                "type": "stop",
                "workload": workload,
                "runtime": runtime,
                "reason": "target",
                "half_width": dict.fromkeys(factors, 0.0011),
                "blocks": blocks,
                "processes": 2,
                "measured_s": 8.2,
            }
        )
    lines.append({"type": "end", "status": "finished", "time": clock})
    return lines


@pytest.fixture(name="record_lines", scope="session")
def record_lines_fixture() -> Callable[..., list[Line]]:
    return record_lines


@pytest.fixture
def run_of(tmp_path: Path) -> Callable[[list[Line]], Run]:
    """Loads a run from the lines of its record."""
    return lambda lines: load_run(write_record(tmp_path / "run", lines))


@pytest.fixture(scope="session")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """32 cells, two workloads under two runtimes, finished and quiet. Tests read it and write beside it."""
    lines = record_lines(workloads=("prefill", "decode"), runtimes=("graph", "eager"))
    return load_run(write_record(tmp_path_factory.mktemp("full"), lines))


NINE = (*FACTORS, "rope", "residual", "qkv", "gemv")


def confirming(
    lines: list[Line], predicted: dict[str, tuple[float, float, float]], measured: dict[str, float]
) -> list[Line]:
    """Lines of a round of a screen's run: speed-ups (with their intervals) predicted, and measured in six blocks."""
    speedups = {"baseline": 1.0, **measured}
    chosen = {"workload": "prefill", "runtime": "graph", "round": 1}
    columns = zip(*predicted.values(), strict=True)
    found: list[Line] = [
        {
            **{"type": "confirm", **chosen, "best": next(iter(predicted)), "predicted": list(predicted)},
            **dict(zip(("speedup", "lo", "hi"), map(list, columns), strict=True)),
            "cells": list(speedups),
        }
    ]
    rng = np.random.default_rng(1)
    parameters = next(line for line in lines if line["type"] == "parameters")
    verified = next(line for line in lines if line["type"] == "verify")
    known = {line["cell"] for line in lines if line["type"] == "verify"}
    found += [{**line, "cell": cell} for cell in measured if cell not in known for line in (parameters, verified)]
    for block in range(6):
        where = {**chosen, "process": 10 + block // 3, "block": block, "attempt": 0}
        for position, (cell, gain) in enumerate(speedups.items()):
            value = BASE_S["prefill", "graph"] / gain * float(np.exp(rng.normal(0, 0.0005)))
            at = {"cell": cell, "copy": 0, "position": position, "repeat": 0}
            found.append({"type": "confirm_sample", **where, **at, "latency_s": value, "time": 1_735_787_070.0})
        found.append({"type": "confirm_block", **where, "state": "ok", "flags": [], "time": 1_735_787_070.0})
    return [*lines[:-1], *found, lines[-1]]


@pytest.fixture(scope="session")
def nine() -> tuple[str, ...]:
    """Names of nine switches."""
    return NINE


@pytest.fixture(name="confirming", scope="session")
def confirming_fixture() -> Callable[..., list[Line]]:
    return confirming


@pytest.fixture(scope="session")
def screened_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Nine switches in 64 cells, the best predicted measured: one agrees, one is slower than predicted."""
    lines = record_lines(NINE, screen=True, memory=False)
    predicted = {"flash+mlp+mask+norm": (1.58, 1.57, 1.59), "flash+tie+mlp+mask+norm": (1.579, 1.569, 1.589)}
    measured = {"flash+mlp+mask+norm": 1.578, "flash+tie+mlp+mask+norm": 1.4}
    directory = write_record(tmp_path_factory.mktemp("screened"), confirming(lines, predicted, measured))
    return load_run(directory)


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a written report: eight cells, two workloads, texts that try to be markup."""
    lines = record_lines(factors=("flash", "tie", "mask"), workloads=("prefill", "decode"))
    lines[0]["device"] = "<script>alert('device')</script> | *H100*"
    where = {"cell": "flash+tie", "workload": "prefill", "runtime": "graph", "status": "oom", "pass": "time"}
    failure = {"type": "failure", **where, "reason": "no | room <b>left</b>\nsecond line"}
    directory = write_record(tmp_path_factory.mktemp("written"), [*lines[:-1], failure, lines[-1]])
    write_report(load_run(directory))
    return directory
