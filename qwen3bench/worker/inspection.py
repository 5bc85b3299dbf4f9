"""What is told of one cell at a time and never timed: parameters, equivalence, memory, cost, evidence; and ceilings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qwen3bench.model.decoder import Decoder
from qwen3bench.record.design import BASELINE, cell_of, is_peer
from qwen3bench.record.host import available_memory_bytes
from qwen3bench.record.messages import (
    Ceilings,
    Cost,
    EagerTime,
    Evidence,
    ForwardTime,
    Judgment,
    Pace,
    ParameterCounts,
    PeakMemory,
)
from qwen3bench.worker.ceilings import measure_ceilings
from qwen3bench.worker.clock import least_s, time_host
from qwen3bench.worker.compile_counters import forget_compilations
from qwen3bench.worker.costs import cell_cost
from qwen3bench.worker.evidence import COMPARED, collect
from qwen3bench.worker.host_room import fits_host
from qwen3bench.worker.peers import gradients_of_peer, judge_peer
from qwen3bench.worker.runtimes import InvalidCell, Launch, PreparedStep
from qwen3bench.worker.session import Session
from qwen3bench.worker.training_inspection import training_evidence, training_memory
from qwen3bench.worker.workloads import Workload, WorkloadSize, keeping_output

# By the bytes of a number: compiled, a model of 28 layers in bfloat16 rounds otherwise by some 0.01 of its logits. That
# it is the same function is the gate's to say, in eager; this says that it is that forward which is launched.
LAUNCH_ERROR = {8: 1e-6, 4: 1e-3, 2: 0.1}
_FORWARDS = 6  # timed at most, behind one that is not; two where they agree
_EAGER_PASSES = 10  # three read 23 to 53 ms of the same cell on busy hosts
_EAGER_S = 2.0  # that they may take: the steps of `generate` are many, and those of training long


@dataclass(frozen=True)
class Warm:
    """A cell that has run, and how to run it again."""

    where: tuple[str, str, str]  # cell, workload, runtime
    model: Decoder  # whose steps are launched
    workload: Workload
    launches: Sequence[Launch]
    outputs: list[torch.Tensor]  # the logits of the last launch
    graph_bytes: int | None = None  # of its graphs, outside the allocator


class Inspection:
    """Looks at single cells of a session."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._counts: dict[str, ParameterCounts] = {}  # of the cells that were built as they are to be counted
        self._tied: dict[str, bool] = {}  # whether a cell's head is its embedding, once its model has been built
        self._warm: Warm | None = None  # what the memory pass leaves for evidence of the same cell
        self._workload: Workload | None = None  # of the last cell that evidence had to build

    def release(self) -> None:
        """Let go of what one look leaves for the next."""
        self._warm = self._workload = None

    def load(self, cell: str) -> None:
        """Build a cell on the weights that all share, once these are loaded."""
        model = self.session.on_bank(cell)
        if model.tok_emb.weight.dtype is self.session.dtype:  # what trains may hold its weights in another
            self._count(cell, model)

    def parameters(self, cell: str) -> ParameterCounts:
        """The three parameter counts and the bytes, from the model's own tensors."""
        if cell not in self._counts:
            self._count(cell, self.session.build(cell))
        return self._counts[cell]

    def _count(self, cell: str, model: Decoder) -> None:
        self._tied[cell] = is_tied(model)
        self._counts[cell] = ParameterCounts(
            num_parameters=model.num_parameters,
            num_unique_parameters=model.num_unique_parameters,
            num_non_embedding_parameters=model.num_non_embedding_parameters,
            parameter_bytes=model.parameter_bytes,
        )

    def verify(self, cell: str) -> Judgment:
        """The equivalence gate's verdict."""
        self.release()
        self.session.free()
        gate = self.session.gate
        return judge_peer(gate, cell) if is_peer(cell) else gate.judge_cell(cell_of(cell))

    def gradients(self, cell: str, workload: str) -> Judgment:
        """The gradient gate's verdict, in the precision of a workload."""
        self.release()
        self.session.free()
        gate = self.session.gradient_gate(workload)
        return gradients_of_peer(gate, cell) if is_peer(cell) else gate.judge_cell(cell_of(cell))

    def memory(self, cell: str, workload: str, runtime: str) -> PeakMemory:
        """Peak CUDA memory of one forward, or step, with this cell alone resident, on weights of its own, in bytes.

        The allocator's peaks (torch.cuda.max_memory_allocated and _reserved) from an empty device until the cell has
        run in `runtime`; what its libraries keep outside the allocator is the same for every cell and not counted.
        """
        self.release()
        self.session.forget_everything()
        torch._C._cuda_clearCublasWorkspaces()
        if self.session.size(workload).precision:
            return training_memory(self.session, cell, workload, runtime)
        device = self.session.device
        model = self.session.alone(cell, workload)
        inputs = self.session.inputs_alone(workload, model)
        torch.cuda.empty_cache()  # making the weights needed more for a moment than keeping them does
        torch.cuda.reset_peak_memory_stats(device)
        self._warm = self._warmed_up((cell, workload, runtime), model, inputs)
        torch.cuda.synchronize(device)
        return PeakMemory(
            peak_allocated_bytes=torch.cuda.max_memory_allocated(device),
            peak_reserved_bytes=torch.cuda.max_memory_reserved(device),
            cache_bytes=inputs.cache_bytes or None,
            graph_bytes=self._warm.graph_bytes,
        )

    def cost(self, cell: str, workload: str) -> Cost:
        """The least operations and bytes of one timed value."""
        if cell not in self._tied:
            self._tied[cell] = is_tied(self.session.build(cell))
        itemsize = self.session.dtype.itemsize
        return cell_cost(self.session.settings.model, self._tied[cell], self.session.size(workload), itemsize)

    def evidence(self, cell: str, workload: str, runtime: str) -> Evidence:
        """What really ran, from a profile of its own: of what the memory pass left where that was just this cell.

        Raises `InvalidCell` where it computes something else than when PyTorch launches it.
        """
        if self.session.size(workload).precision:
            self.release()
            self.session.free()
            return training_evidence(self.session, cell, workload, runtime)
        where = cell, workload, runtime
        warm, self._warm = self._warm, None
        if warm is None or warm.where != where:
            del warm
            self.session.free()
            model = self.session.on_bank(cell, workload)
            if self._workload is None or self._workload.size.name != workload:
                self._workload = self.session.inputs(workload, model)
            warm = self._warmed_up(where, model, self._workload)
        warm.workload.refill()
        found = collect(warm.model, warm.workload, runtime, warm.launches, warm.outputs)
        if runtime != "eager":
            error = error_against_eager(warm)
            if not error <= (limit := LAUNCH_ERROR[self.session.dtype.itemsize]):
                raise InvalidCell(
                    f"in {runtime} its logits differ by {error:.2g} of their size from those of eager (limit {limit:g})"
                )
        return found

    def eager(self, cell: str, workload: str) -> EagerTime:
        """About how long a cell takes in eager, on the host's clock: how far the host would hold a graph up.

        The quickest of ten passes, as others only slow them, or of as many as two seconds hold.
        """
        self.release()
        model = self.session.on_bank(cell, workload)
        steps = self.session.inputs(workload, model).steps(model)
        spent_s, least = 0.0, math.inf
        for value in time_host(steps, Pace(inner=1, repeats=_EAGER_PASSES), self.session.synchronize):
            spent_s, least = spent_s + value.latency_s, min(least, value.latency_s)
            if spent_s >= _EAGER_S:
                break
        return EagerTime(eager_s=least)

    def forward(self, prompt_tokens: int) -> ForwardTime:
        """How long the baseline's prefill of so many tokens takes: the quickest of some, as others only slow it.

        Raises `MemoryError` where a run over it would not fit this host.
        """
        model = self.session.on_bank(BASELINE)
        config, device = model.config, self.session.device
        batch = max(sizes.batch_size for sizes in self.session.settings.workloads.values())
        size = WorkloadSize("prefill", batch, min(prompt_tokens, config.context_length), 0)
        if device.type == "cpu" and not fits_host(self.session.settings, size, available_memory_bytes()):
            raise MemoryError(f"{batch:,} × {size.prompt_tokens} tokens do not fit the memory here")
        prompt = torch.zeros(batch, size.prompt_tokens, dtype=torch.long, device=device)
        times = time_host([lambda: model(prompt)], Pace(inner=1, repeats=_FORWARDS), self.session.synchronize)
        return ForwardTime(seconds=least_s(times))

    def ceilings(self) -> Ceilings:
        """What the device reaches: a large copy and a large matrix product."""
        self.release()
        self.session.forget_everything()
        return measure_ceilings(self.session.device, self.session.dtype)

    def _warmed_up(self, where: tuple[str, str, str], model: Decoder, workload: Workload) -> Warm:
        """A cell's launches; where the first differs from the others, after that one."""
        name = where[2]
        if name == "compile":
            forget_compilations()
        outputs: list[torch.Tensor] = []
        runtime = self.session.runtime(name)
        model = runtime.prepare_model(model).model
        steps = [keeping_output(step, outputs) for step in workload.steps(model)]
        prepared = [runtime.prepare(step) for step in steps]
        launches = [each.launch for each in prepared]
        if self.session.device.type == "cuda" or name == "compile":
            for launch in launches:
                launch()
        return Warm(where, model, workload, launches, outputs, graph_bytes_of(prepared))


def is_tied(model: Decoder) -> bool:
    """Whether the head is the embedding."""
    return model.out_head.weight is model.tok_emb.weight


def graph_bytes_of(prepared: Sequence[PreparedStep]) -> int | None:
    """What the graphs of these steps take outside the allocator; None where none is a graph."""
    known = [each.graph_bytes for each in prepared if each.graph_bytes is not None]
    return sum(known) if known else None


def error_against_eager(warm: Warm) -> float:
    """How far the last tokens' logits of the last launch are from those of eager, relative (L2).

    The last step alone, on the same tokens: in `generate` one token chosen otherwise would change all that follow.
    Launched on other tokens first: what read a value before it was written would else find the same one there.
    """
    *before, last = warm.launches
    given = warm.workload.prompt, warm.workload.token
    saved = [tokens.clone() for tokens in given]
    for tokens in given:
        tokens.add_(1).remainder_(warm.model.config.vocab_size)
    for launch in warm.launches:
        launch()
    for tokens, ids in zip(given, saved, strict=True):
        tokens.copy_(ids)
    for launch in before:
        launch()
    token = warm.workload.token.clone() if before else None
    last()
    launched = warm.outputs[0][:, -COMPARED:].double()
    if token is not None:
        warm.workload.token.copy_(token)
    steps = warm.workload.steps(warm.model.original)  # what the gate judged
    expected = steps[-1]()[:, -COMPARED:].double()
    return float((launched - expected).norm() / expected.norm())
