"""How far compiling the same cell again moves its latency, and which of Inductor's options keep it still.

Copies of one cell in one worker process, each compiled for itself, then visited in random order.
`python tests/worker/kernel_choice.py [DEVICE [OVERRIDE…]]`; an override may choose the cell and the workload.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path
from statistics import median

from qwen3bench.campaign.worker_process import WorkerProcess
from qwen3bench.config.cli import compose

COPIES, VISITS, LIMIT_S = 6, 12, 600.0
SMALL = ("model=tiny", "workload=prefill", "prompt_tokens=64")
OPTIONS = {
    "as configured": (),
    "elementwise kernels by timing": ("runtime.compile.inductor.triton.autotune_pointwise=true",),
    "without deterministic": ("runtime.compile.inductor.deterministic=false",),
    "without combo_kernels": ("runtime.compile.inductor.combo_kernels=false",),
    "without both": ("runtime.compile.inductor.deterministic=false", "runtime.compile.inductor.combo_kernels=false"),
}


def main(device: str = "cpu", *overrides: str) -> None:
    for name, options in OPTIONS.items():
        asked = [
            *(overrides or SMALL),
            "opt=[flash,tie,mlp,mask,norm]",
            "runtime=[compile]",
            f"device={device}",
            *options,
        ]
        settings = compose(asked).resolved(device)
        cell, (workload,) = settings.labels[-1], settings.workloads
        values: list[list[float]] = [[] for _ in range(COPIES)]
        with tempfile.TemporaryDirectory() as place, WorkerProcess(Path(place) / "worker.log") as worker:
            worker.ask("open", LIMIT_S, config=settings.to_dict())
            worker.ask("enter", LIMIT_S, workload=workload, runtime="compile", cell=cell)
            for copy in range(COPIES):
                worker.ask("prepare", LIMIT_S, cell=cell, copy=copy)
            order = list(range(COPIES)) * VISITS
            random.Random(0).shuffle(order)
            for copy in order:
                samples = worker.ask("visit", LIMIT_S, cell=cell, copy=copy, repeats=3).samples
                values[copy].append(1e3 * median(sample.latency_s for sample in samples))
        latencies = sorted(map(median, values))
        spread = latencies[-1] / latencies[0] - 1
        print(
            f"{name}: {cell}, {workload}: spread {spread:.1%}; ms:",
            *(f"{latency:.4g}" for latency in latencies),
            flush=True,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
