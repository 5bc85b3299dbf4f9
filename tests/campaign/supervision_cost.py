"""What supervision and recording add to a measured latency: A/B in one worker process, in random order.

A: one request per timed value, each answer recorded and flushed to disk before the next, as in a run. B: all values in
one request, nothing between them. `python tests/campaign/supervision_cost.py [DEVICE [RUNTIME [OVERRIDE…]]]`.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from qwen3bench.campaign.worker_process import WorkerProcess
from qwen3bench.config.cli import compose
from qwen3bench.record.lines import SampleLine
from qwen3bench.record.messages import Enter, Open, Prepare, Visit
from qwen3bench.record.writer import RecordWriter

PAIRS, VALUES, LIMIT_S = 200, 5, 600.0
SHAPE = ("model=tiny", "model.num_layers=4", "model.emb_dim=256", "model.hidden_dim=1024", "prompt_tokens=64")


def main(device: str = "cpu", runtime: str = "eager", *overrides: str) -> None:
    settings = compose([*(overrides or SHAPE), f"device={device}", f"runtime={runtime}"]).resolved(device)
    where = {"workload": "prefill", "runtime": runtime, "cell": "baseline"}
    chance = random.Random(0)
    ratios, walls = [], {"supervised": 0.0, "alone": 0.0}
    with (
        tempfile.TemporaryDirectory() as place,
        RecordWriter(place) as writer,
        WorkerProcess(Path(place) / "worker.log") as worker,
    ):
        worker.ask(Open(config=settings.to_dict()), LIMIT_S)
        worker.ask(Enter(workload="prefill", runtime=runtime, cell="baseline"), LIMIT_S)
        worker.ask(Prepare(cell="baseline", copy=0), LIMIT_S)

        def ask(repeats: int) -> list[float]:
            visit = worker.ask(Visit(cell="baseline", copy=0, repeats=repeats), LIMIT_S)
            return [sample.latency_s for sample in visit.samples]

        def supervised() -> float:
            values = []
            for block in range(VALUES):
                (latency_s,) = ask(1)
                writer.append(SampleLine(**where, block=block, latency_s=latency_s))
                values.append(latency_s)
            return median(values)

        def alone() -> float:
            return median(ask(VALUES))

        for _ in range(PAIRS):
            order = [supervised, alone]
            chance.shuffle(order)
            taken = {}
            for which in order:
                started = time.perf_counter()
                taken[which] = which()
                walls[which.__name__] += time.perf_counter() - started
            ratios.append(taken[supervised] / taken[alone] - 1)
            latency_s = taken[alone]
        # Each request launches once untimed, which is measuring and not supervising.
        own_s = walls["supervised"] - walls["alone"] - PAIRS * (VALUES - 1) * latency_s
    ratios.sort()
    reach = round(0.98 * PAIRS**0.5)  # ranks of the 95 % interval of a median (Hahn & Meeker, ch. 5)
    middle = PAIRS // 2
    print(
        f"latency {1e3 * latency_s:.3f} ms; supervised against alone: {median(ratios):+.3%} "
        f"({ratios[middle - reach]:+.3%} to {ratios[middle + reach]:+.3%}); "
        f"{own_s / walls['supervised']:.1%} of the wall time of measuring"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
