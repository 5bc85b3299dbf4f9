"""The record of a run on many pretended cards, as large as asked for: what a large run's report has to cope with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from qwen3bench.record.lines import (
    BlockLine,
    CeilingLine,
    CostLine,
    EndLine,
    EvidenceLine,
    Line,
    MemoryLine,
    ParametersLine,
    ProcessLine,
    RunLine,
    SampleLine,
    StopLine,
    VerifyLine,
    VisitLine,
)
from qwen3bench.record.states import BlockState, EndStatus, Purpose, StopReason
from qwen3bench.record.writer import RecordWriter

FACTORS = ("flash", "tie", "mlp", "mask", "norm", "qkv", "rope", "residual", "gemv")
WORTH = {"flash": 1.2, "norm": 1.3, "mlp": 1.02, "mask": 0.97}
_REPEATS = 3
_A_HOST = 8
_BLOCKS_A_PROCESS = 5
_MODEL = {"name": "small", "num_layers": 2, "emb_dim": 64, "vocab_size": 512}


def cells_of(factors: int) -> list[str]:
    """The labels of all cells of the first so many factors, the baseline first."""
    names = FACTORS[:factors]
    return ["+".join(n for i, n in enumerate(names) if code >> i & 1) or "baseline" for code in range(2**factors)]


def write_large(
    directory: Path,
    *,
    factors: int = 5,
    blocks: int = 10_102,
    cards: int = 1_024,
    workloads: tuple[str, ...] = ("prefill",),
) -> Path:
    """The directory of a finished run of all cells: visits of three values, blocks dealt out to cards in turn.

    One block in ten was begun on a card that failed in the middle of it, and measured again on another.
    """
    cells = cells_of(factors)
    config = {"model": _MODEL, "batch_size": 2, "prompt_tokens": 128, "new_tokens": 16}
    run = RunLine(
        created="2026-01-01T00:00:00Z",
        config=config,
        factors=FACTORS[:factors],
        cells=tuple(cells),
        workloads=workloads,
        runtimes=("graph",),
        model="small",
        device="Simulated",
        dtype="bfloat16",
        fingerprint={"code": "0"},
    )
    with RecordWriter(directory) as writer:
        writer.append(run, *_of_cells(cells, workloads))
        processes = -(-blocks // _BLOCKS_A_PROCESS)
        numbers = range(len(workloads) * processes)
        writer.append(*(_process(number, number % cards) for number in numbers))
        for place, workload in enumerate(workloads):
            for lines in blocks_of(cells, workload, blocks, place * processes):
                writer.append(*lines)
            stop = StopLine(workload=workload, runtime="graph", reason=StopReason.MAX_BLOCKS, blocks=blocks)
            writer.append(stop)
        writer.append(EndLine(status=EndStatus.FINISHED, time=1e9 + blocks))
    return directory


def blocks_of(cells: list[str], workload: str, blocks: int, first_process: int = 0) -> Iterator[list[Line]]:
    """The lines of each block, with those of the attempt that failed before it."""
    rng = np.random.default_rng(first_process)
    for block in range(blocks):
        yield [*_block(rng, cells, workload, first_process + block // _BLOCKS_A_PROCESS, block)]


def _process(number: int, card: int) -> ProcessLine:
    host = f"host-{card // _A_HOST}"
    return ProcessLine(process=number, pid=1, purpose=Purpose.TIME, host=host, card=f"GPU-{card:04d}", time=1e9)


def _of_cells(cells: list[str], workloads: tuple[str, ...]) -> Iterator[Line]:
    yield CeilingLine(copy_bytes_per_s=1e12, matmul_flops_per_s=1e14, dtype="bfloat16")
    for cell in cells:
        head_bytes = 512 * 64 * 2 * ("tie" not in cell.split("+"))
        yield ParametersLine(
            cell=cell,
            num_parameters=100_000 + head_bytes // 2,
            num_unique_parameters=100_000,
            num_non_embedding_parameters=67_232,
            parameter_bytes=200_000 + head_bytes,
        )
        yield VerifyLine(cell=cell, equivalent=True, max_abs_error=1e-6, kl_mean=1e-9)
        for workload in workloads:
            peak_bytes = 900_000 + head_bytes
            yield MemoryLine(
                cell=cell,
                workload=workload,
                runtime="graph",
                peak_allocated_bytes=peak_bytes,
                peak_reserved_bytes=peak_bytes,
            )
            yield EvidenceLine(cell=cell, workload=workload, runtime="graph", kernel_launches=100 + len(cell))
            yield CostLine(cell=cell, workload=workload, flops=10**10, bytes=2 * 10**9)


def _block(rng: np.random.Generator, cells: list[str], workload: str, process: int, block: int) -> Iterator[Line]:
    where = {"workload": workload, "runtime": "graph", "process": process, "block": block}
    broken = block % 10 == 7
    visits = [*((cell, 0) for cell in cells), ("baseline", 1)]
    for attempt in range(1 + broken):
        order = rng.permutation(len(visits))
        noise = rng.normal(0, 0.003, len(visits)) + np.where(rng.random(len(visits)) < 0.01, 0.5, 0)
        repeats = rng.normal(0, 0.0005, (len(visits), _REPEATS))
        last = attempt == broken
        for position, index in enumerate(order if last else order[: len(order) // 2]):
            cell, copy = visits[index]
            speed = np.prod([WORTH.get(name, 1.0) for name in cell.split("+")])
            of_visit = {"cell": cell, "copy": copy, "attempt": attempt, "position": position}
            for repeat, more in enumerate(repeats[index]):
                latency_s = float(0.01 / speed * np.exp(noise[index] + more))
                yield SampleLine(**where, **of_visit, repeat=repeat, latency_s=latency_s, time=1e9 + block)
            yield VisitLine(**where, **of_visit, samples=_REPEATS, takes=1, repeats=_REPEATS, inner=1)
        if last:
            yield BlockLine(**where, attempt=attempt, state=BlockState.OK, time=1e9 + block, elapsed_s=1.0)
