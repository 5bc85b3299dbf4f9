"""What is told of a training step and never timed: peak memory by part, what really ran, how long its parts take."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.linalg import vector_norm

from qwen3bench.model.decoder import Decoder
from qwen3bench.record.messages import Evidence, PeakMemory
from qwen3bench.worker.compile_counters import forget_compilations
from qwen3bench.worker.evidence import collect
from qwen3bench.worker.runtimes import InvalidCell
from qwen3bench.worker.session import Session
from qwen3bench.worker.training import FORWARD, PARTS, TrainingWorkload, gradient_bytes
from qwen3bench.worker.workloads import keeping_output

_GRADIENT = "gradient"
# Relative (L2), of all gradients together: compiled, a model in bfloat16 rounds otherwise. That they are the right ones
# is the gate's to say, in eager; this says that it is that step which is launched.
GRADIENT_ERROR = {"fp32": 1e-3, "amp": 0.1, "bf16": 0.1}


def training_memory(session: Session, cell: str, workload: str, runtime: str) -> PeakMemory:
    """Peak CUDA memory of one step with this cell alone resident, in bytes, and what is held at the peak.

    The parts are those of a step launched from Python, compiled where `runtime` compiles.
    """
    device = session.device
    model = session.alone(cell, workload)
    work = session.inputs_alone(workload, model)
    assert isinstance(work, TrainingWorkload)
    launcher = session.runtime(runtime)
    prepared = launcher.prepare_model(model).model
    work.step_in_parts(prepared, lambda _: None)  # the first one makes AdamW's state, and compiles
    torch.cuda.empty_cache()
    held = _held_at_peak(work, prepared, device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    (step,) = work.steps(prepared)
    ready = launcher.prepare(step)
    ready.launch()
    torch.cuda.synchronize(device)
    return PeakMemory(
        peak_allocated_bytes=torch.cuda.max_memory_allocated(device),
        peak_reserved_bytes=torch.cuda.max_memory_reserved(device),
        gradient_bytes=held.gradient_bytes,
        optimizer_bytes=work.state.num_bytes,
        activation_bytes=held.activation_bytes,
        graph_bytes=ready.graph_bytes,
    )


@dataclass
class _Held:
    """What a step holds at its peak beside weights and AdamW's state, in bytes."""

    peak_bytes: int = 0
    gradient_bytes: int = 0
    activation_bytes: int = 0


def _held_at_peak(work: TrainingWorkload, model: Decoder, device: torch.device) -> _Held:
    """Looks behind each part of the step and behind each gradient: what lives then is held, the rest is temporary.

    Of a peak within the forward the activations are those at its end, as its last block has the highest.
    """
    before = torch.cuda.memory_allocated(device)
    parameters = list(model.original.parameters())  # once: it is asked behind each gradient
    begun = _Held()
    highest = _Held()

    def done(part: str) -> None:
        nonlocal begun, highest
        allocated = torch.cuda.memory_stats_as_nested_dict(device)["allocated_bytes"]["all"]
        peak, now = allocated["peak"], allocated["current"]
        gradients = gradient_bytes(parameters)
        here = _Held(peak, gradients, max(0, now - before - gradients))
        if peak > highest.peak_bytes:
            highest = replace(here if part == FORWARD else begun, peak_bytes=peak)
        begun = here
        torch.cuda.reset_peak_memory_stats(device)

    torch.cuda.reset_peak_memory_stats(device)
    work.step_in_parts(model, done, of_gradient=_GRADIENT)
    return highest


def training_evidence(session: Session, cell: str, workload: str, runtime: str) -> Evidence:
    """What really ran in a step, and how long its parts take.

    Raises `InvalidCell` where its gradients are others than when PyTorch launches it.
    """
    model = session.on_bank(cell, workload)
    work = session.inputs(workload, model)
    assert isinstance(work, TrainingWorkload)
    if runtime == "compile":
        forget_compilations()
    launcher = session.runtime(runtime)
    prepared = launcher.prepare_model(model).model
    outputs: list[Tensor] = []
    (first,) = work.steps(prepared)
    step = keeping_output(first, outputs)
    try:
        parts_s = _seconds_of_parts(work, prepared, session.synchronize)
        expected: list[Tensor] = []
        if runtime != "eager":  # before a graph takes memory of its own
            if prepared is not model:  # else the parts are eager's
                (eager,) = work.steps(model)
                work.restore()
                eager()
            expected = [moment.clone() for moment in work.state.first_moments]
            session.free()
        launch = launcher.prepare(step).launch
        if runtime != "eager":  # whose parts have run
            launch()
        found = collect(prepared, work, runtime, [launch], outputs)
        if runtime != "eager":
            work.restore()
            launch()
            error = _error(work.state.first_moments, expected)
            if not error <= (limit := GRADIENT_ERROR[str(work.size.precision)]):
                raise InvalidCell(
                    f"in {runtime} its gradients differ by {error:.2g} of their size from those of eager "
                    f"(limit {limit:g})"
                )
    finally:
        work.restore()
    return replace(found, parts_s=parts_s)


def _seconds_of_parts(work: TrainingWorkload, model: Decoder, synchronize: Callable[[], object]) -> dict[str, float]:
    """About how long each part of a step takes: the quicker of two, the first of which also sets up what it needs."""
    least = dict.fromkeys(PARTS, math.inf)
    ended = 0.0

    def done(part: str) -> None:
        nonlocal ended
        synchronize()
        began, ended = ended, time.perf_counter()
        least[part] = min(least[part], ended - began)

    for _ in range(2):
        work.restore()
        synchronize()
        ended = time.perf_counter()
        work.step_in_parts(model, done)
    return least


def _error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The distance of two sets of first moments, of the second one's size; these are a tenth of gradients.

    Takes memory for single tensors: a card that trains a cell may have no room for further copies of its weights.
    """
    pairs = list(zip(found, expected, strict=True))
    apart, size = (
        sum(float(vector_norm(tensor, dtype=torch.float64)) ** 2 for tensor in tensors)
        for tensors in ((a - b for a, b in pairs), (b for _, b in pairs))
    )
    return math.sqrt(apart / size)
