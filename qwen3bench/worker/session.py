"""The process that runs models: it takes one request at a time on standard input and answers on standard output.

`python -m qwen3bench.worker.session`, started by the supervisor. It knows cells and clocks, not designs or records.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

from qwen3bench.config.settings import Settings, settings_from
from qwen3bench.errors import UserError
from qwen3bench.kernels.token_attention import forget_counters
from qwen3bench.model.build import build_model, forget_rope_tables
from qwen3bench.model.decoder import Decoder
from qwen3bench.model.weights import load_weights, weights_fingerprint
from qwen3bench.record import messages as protocol
from qwen3bench.record.design import BASELINE, Cell, cell_of, is_peer
from qwen3bench.record.environment import environment, fingerprint
from qwen3bench.worker.bank import Bank
from qwen3bench.worker.ceilings import measure_ceilings
from qwen3bench.worker.clock import inner_repeats, time_device, time_host, visit_repeats
from qwen3bench.worker.costs import cell_cost
from qwen3bench.worker.equivalence.gate import SMALL_DIM, Gate
from qwen3bench.worker.evidence import collect, compiled_graphs, forget_compilations
from qwen3bench.worker.peers import build_peer, judge_peer, require_peer
from qwen3bench.worker.runtimes import CompileRuntime, Runtime, make_runtime, uncompiled
from qwen3bench.worker.workloads import Step, Workload, WorkloadSize

FAST_S = 0.05  # what is launched once more rather than trusted at once
# By the bytes of a number: compiled, a model of 28 layers in bfloat16 rounds otherwise by some 0.01 of its logits. That
# it is the same function is the gate's to say, in eager; this says that it is that forward which is launched.
LAUNCH_ERROR = {8: 1e-6, 4: 1e-3, 2: 0.1}
_COMPARED = 16  # tokens
_EAGER_PASSES = 3


class InvalidCell(Exception):
    """A cell that runs and must not be measured, with the reason."""


@dataclass
class Prepared:
    """A cell ready to be timed."""

    model: Decoder
    launches: list[Callable[[], object]]


@dataclass(frozen=True)
class Pace:
    """How much a visit takes in, the same for all cells that are compared."""

    inner: int  # launches inside one timed value
    repeats: int  # timed values, unless the settings say how many


@dataclass
class Warm:
    """A cell that has run, and how to run it again."""

    where: tuple[str, str, str]  # cell, workload, runtime
    model: Decoder
    workload: Workload
    launches: list[Callable[[], object]]
    outputs: list[torch.Tensor]  # the logits of the last launch


class Worker:
    """What the requests do. Each method named `op_…` is one; it returns the reply's fields."""

    def __init__(self) -> None:
        self.settings: Settings
        self.device: torch.device
        self.dtype: torch.dtype
        self._bank: Bank | None = None
        self._runtime: Runtime | None = None
        self._workload: Workload | None = None
        self._prepared: dict[tuple[str, int], Prepared] = {}
        self._pace: Pace | None = None
        self._gate: Gate | None = None
        self._warm: Warm | None = None

    # Set-up

    def op_probe(self, device: str) -> dict[str, Any]:
        """The device that `device` (auto, cpu, cuda, cuda:1) means here; refused where it does not exist."""
        return {"device": device_here(device)}

    def op_open(self, config: dict[str, Any]) -> dict[str, Any]:
        """Take the resolved settings; nothing is loaded yet."""
        self.settings = settings_from(config)
        for cell in filter(is_peer, self.settings.labels):
            require_peer(cell)
        self.device = use_device(self.settings.device)
        self.dtype = getattr(torch, self.settings.dtype)
        if self.device.type == "cpu" and self.settings.model.emb_dim <= SMALL_DIM:
            torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        return {}

    def op_touch(self) -> dict[str, Any]:
        """Run a kernel, so that the device turns once from the processes that are ready to this one.

        Until then a process may start the kernels of a graph 0.2 to 0.4 µs later, as was seen on an H100 after cuBLAS's
        first product of one row (docs/log.md, "How soon kernels start").
        """
        if self.device.type == "cuda":
            torch.zeros(1, device=self.device).add_(1)
            torch.cuda.synchronize(self.device)
        return {}

    def op_identify(self) -> dict[str, Any]:
        """The environment, and what must not change when a run is continued."""
        config = self.settings.to_dict()
        weights = weights_fingerprint(self.settings.weights, self.settings.seed)
        return {"environment": environment(self.settings.device), "fingerprint": fingerprint(config, weights)}

    def op_load(self, cells: list[str]) -> dict[str, Any]:
        """Load the weights and build every cell: what cannot be built is refused before anything is measured."""
        for cell in cells:
            self._on_bank(cell)
        return {}

    # Passes over single cells

    def op_parameters(self, cell: str) -> dict[str, Any]:
        """The three parameter counts and the bytes, from the model's own tensors."""
        model = self._build(cell)
        return {
            "num_parameters": model.num_parameters,
            "num_unique_parameters": model.num_unique_parameters,
            "num_non_embedding_parameters": model.num_non_embedding_parameters,
            "parameter_bytes": model.parameter_bytes,
        }

    def op_verify(self, cell: str) -> dict[str, Any]:
        """The equivalence gate."""
        self.op_release()
        if self._gate is None:
            s = self.settings
            self._gate = Gate(
                s.model, device=self.device, dtype=self.dtype, seed=s.seed, opts=s.opts, sizes=s.prompt_sizes
            )
        return judge_peer(self._gate, cell) if is_peer(cell) else self._gate.check(cell_of(cell))

    def op_memory(self, cell: str, workload: str, runtime: str) -> dict[str, Any]:
        """Peak CUDA memory of one forward with this cell alone resident, on weights of its own, in bytes.

        The allocator's peaks (torch.cuda.max_memory_allocated and _reserved) from an empty device until the cell has
        run in `runtime`; what its libraries keep outside the allocator is the same for every cell and not counted.
        """
        self._forget_everything()
        torch._C._cuda_clearCublasWorkspaces()
        s = self.settings
        weights = load_weights(s.weights, s.model, device=self.device, dtype=self.dtype, seed=s.seed)
        model = self._build(cell, weights)
        del weights
        inputs = Workload(self._size(workload), model, s.seed)
        torch.cuda.empty_cache()  # making the weights needed more for a moment than keeping them does
        torch.cuda.reset_peak_memory_stats(self.device)
        self._warm = self._warmed_up((cell, workload, runtime), model, inputs)
        torch.cuda.synchronize(self.device)
        return {
            "peak_allocated_bytes": torch.cuda.max_memory_allocated(self.device),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(self.device),
            "cache_bytes": inputs.cache_bytes or None,
        }

    def op_cost(self, cell: str, workload: str) -> dict[str, Any]:
        """The least operations and bytes of one timed value."""
        model = self._build(cell)
        tied = model.out_head.weight is model.tok_emb.weight
        return dict(cell_cost(self.settings.model, tied, self._size(workload), self.dtype.itemsize))

    def op_evidence(self, cell: str, workload: str, runtime: str) -> dict[str, Any]:
        """What really ran, from a profile of its own: of what the memory pass left where that was just this cell.

        Raises `InvalidCell` where it computes something else than when PyTorch launches it.
        """
        warm, self._warm = self._warm, None
        if warm is None or warm.where != (cell, workload, runtime):
            del warm
            self._forget_graphs()
            model = self._on_bank(cell)
            if self._workload is None or self._workload.size.name != workload:
                self._workload = Workload(self._size(workload), model, self.settings.seed)
            warm = self._warmed_up((cell, workload, runtime), model, self._workload)
        evidence = collect(warm.model, warm.workload, runtime, warm.launches)
        if runtime != "eager":
            error = self._against_eager(warm)
            if not error <= (limit := LAUNCH_ERROR[self.dtype.itemsize]):
                raise InvalidCell(
                    f"in {runtime} its logits differ by {error:.2g} of their size from those of eager (limit {limit:g})"
                )
        beside = runtime == "graph" and "eager" not in self.settings.runtimes  # where eager is timed it is known better
        evidence["eager_s"] = self._eager_s(warm) if beside else None
        return evidence

    def op_ceilings(self) -> dict[str, Any]:
        """What the device reaches: a large copy and a large matrix product."""
        self._forget_everything()
        return measure_ceilings(self.device, self.dtype)

    # Timing

    def op_enter(self, workload: str, runtime: str, cell: str = BASELINE) -> dict[str, Any]:
        """Begin timing cells of one workload in one runtime; `cell` fills the cache where there is one."""
        self.op_release()
        self._runtime = self._make_runtime(runtime)
        self._workload = Workload(self._size(workload), self._on_bank(cell), self.settings.seed)
        return {}

    def op_prepare(self, cell: str, copy: int) -> dict[str, Any]:
        """Build a cell on the bank, warm it up, capture it; refuse logits that are not finite."""
        assert self._runtime is not None
        assert self._workload is not None
        model = self._on_bank(cell)
        steps = self._workload.steps(model)
        self._runtime.compile_s = None
        if self._runtime.on_device_clock:  # a graph's logits can be read after its replay
            outputs: list[torch.Tensor] = []
            launches = self._launches(self._runtime, model, [_kept(step, outputs) for step in steps])
            for launch in launches:
                launch()
            logits = outputs.pop()
            outputs.clear()
        else:
            for step in steps:
                logits = step()
            launches = self._launches(self._runtime, model, steps)
        if not bool(torch.isfinite(logits).all()):
            raise InvalidCell("its logits are not finite (NaN or infinity), so its latency would mean nothing")
        del logits
        self._prepared[cell, copy] = Prepared(model, launches)
        self._pace = None
        return {"compile_s": self._runtime.compile_s, "compile_options": self._runtime.compile_options}

    def op_visit(self, cell: str, copy: int, repeats: int | None) -> dict[str, Any]:
        """One visit: an untimed launch, then `repeats` timed values (None: as the slowest cell asks), in seconds."""
        launches = self._prepared[cell, copy].launches
        compiled = self._compiled_graphs()
        if self._pace is None:  # found at the first visit, as others may get ready before
            self._pace = self._found_pace()
        started = time.time()
        values = self._time(launches, repeats or self._pace.repeats, self._pace.inner)
        if self._compiled_graphs() != compiled:
            raise InvalidCell("it was compiled again while it was timed, so its latency may hold a compilation")
        samples = []
        for value in values:
            sample: dict[str, Any] = {"latency_s": value.latency_s}
            if value.steps_s:
                first, *rest = value.steps_s
                sample |= {"ttft_s": first, "itl_s": rest, "tpot_s": sum(rest) / len(rest)}
            samples.append(sample)
        return {"time": started, "samples": samples}

    def op_release(self) -> dict[str, Any]:
        """Forget all prepared cells, keep the bank."""
        self._forget_graphs()
        self._workload = None
        return {}

    # Helpers

    def _on_bank(self, cell: str) -> Decoder:
        """A cell's model, its parameters views on the bank."""
        bank = self._models()
        return self._build(cell, bank.weights) if is_peer(cell) else bank.build(cell_of(cell))

    def _build(self, cell: str, weights: dict[str, torch.Tensor] | None = None) -> Decoder:
        """A cell's model on `weights`, or on `meta`, where nothing is allocated."""
        if is_peer(cell):
            return build_peer(cell, self.settings.model, weights, self.dtype)
        device = "meta" if weights is None else self.device
        return build_model(self.settings.model, self._opts(cell_of(cell)), weights, device, self.dtype)

    def _opts(self, cell: Cell) -> dict[str, dict[str, Any]]:
        return {name: self.settings.opts.get(name, {}) for name in cell}

    def _make_runtime(self, name: str) -> Runtime:
        return make_runtime(name, self.device, **self.settings.runtimes[name])

    def _size(self, workload: str) -> WorkloadSize:
        sizes = self.settings.workloads[workload]
        assert sizes.prompt_tokens is not None
        return WorkloadSize(workload, sizes.batch_size, sizes.prompt_tokens, sizes.new_tokens)

    def _models(self) -> Bank:
        if self._bank is None:
            s = self.settings
            self._gate = None
            self._bank = Bank(s.model, s.weights, self.device, self.dtype, s.seed, s.opts)
        return self._bank

    def _launches(self, runtime: Runtime, model: Decoder, steps: Sequence[Step]) -> list[Callable[[], object]]:
        runtime.prepare_model(model)
        return [runtime.prepare(step) for step in steps]

    def _warmed_up(self, where: tuple[str, str, str], model: Decoder, workload: Workload) -> Warm:
        """A cell's launches; where the first differs from the others, after that one."""
        runtime = where[2]
        if runtime == "compile":
            forget_compilations()
        outputs: list[torch.Tensor] = []
        steps = [_kept(step, outputs) for step in workload.steps(model)]
        launches = self._launches(self._make_runtime(runtime), model, steps)
        if self.device.type == "cuda" or runtime == "compile":
            for launch in launches:
                launch()
        return Warm(where, model, workload, launches, outputs)

    def _against_eager(self, warm: Warm) -> float:
        """How far the last tokens' logits of the last launch are from those of eager, relative (L2).

        The last step alone, on the same tokens: in `generate` one token chosen otherwise would change all that follow.
        Launched on other tokens first: what read a value before it was written would else find the same one there.
        """
        *before, last = warm.launches
        given = warm.workload.prompt, warm.workload.token
        kept = [tokens.clone() for tokens in given]
        for tokens in given:
            tokens.add_(1).remainder_(warm.model.config.vocab_size)
        for launch in warm.launches:
            launch()
        for tokens, ids in zip(given, kept, strict=True):
            tokens.copy_(ids)
        for launch in before:
            launch()
        token = warm.workload.token.clone() if before else None
        last()
        launched = warm.outputs[0][:, -_COMPARED:].double()
        if token is not None:
            warm.workload.token.copy_(token)
        with uncompiled(warm.model):  # what the gate judged
            expected = warm.workload.steps(warm.model)[-1]()[:, -_COMPARED:].double()
        return float((launched - expected).norm() / expected.norm())

    def _eager_s(self, warm: Warm) -> float:
        """About how long the same work takes in eager, on the host's clock: how far the host would hold it up.

        The median of three passes; one, where a pass has many steps.
        """
        steps = warm.workload.steps(warm.model)
        passes = _EAGER_PASSES if len(steps) == 1 else 1
        values = time_host(steps, passes, 1, self._synchronize)
        return statistics.median(value.latency_s for value in values)

    def _time(self, launches: Sequence[Callable[[], object]], repeats: int, inner: int) -> list[Any]:
        assert self._runtime is not None
        if self._runtime.on_device_clock:
            return time_device(launches, repeats, inner)
        return time_host(launches, repeats, inner, self._synchronize)

    def _compiled_graphs(self) -> int:
        return compiled_graphs() if isinstance(self._runtime, CompileRuntime) else 0

    def _found_pace(self) -> Pace:
        """Of the cells that are ready: values of the fastest are long enough, and the slowest fills a visit."""
        ready = [prepared.launches for prepared in self._prepared.values()]
        estimates_s = [self._estimate(launches) for launches in ready]
        inner = inner_repeats(min(estimates_s)) if all(len(launches) == 1 for launches in ready) else 1
        return Pace(inner, visit_repeats(max(estimates_s) * inner))

    def _estimate(self, launches: Sequence[Callable[[], object]]) -> float:
        """About how long all launches take, in seconds."""
        estimate_s = math.inf
        for _ in range(2):
            self._synchronize()
            started = time.perf_counter()
            for launch in launches:
                launch()
            self._synchronize()
            estimate_s = min(estimate_s, time.perf_counter() - started)
            if estimate_s >= FAST_S:  # else once more, as the first launch of a graph also uploads it
                break
        return estimate_s

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _forget_graphs(self) -> None:
        self._prepared.clear()
        self._pace = None
        self._runtime = self._warm = None
        gc.collect()
        gc.freeze()  # what lives now are imports and the bank: looking at them again would take 0.2 s a cell
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _forget_everything(self) -> None:
        self._bank = self._gate = self._workload = None
        forget_rope_tables()
        self._forget_graphs()
        forget_counters()


def device_here(device: str) -> str:
    """The device that `device` (auto, cpu, cuda, cuda:1) means here. Raises `UserError` where it does not exist."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        device = "cuda" if count else "cpu"
    kind, _, index = device.partition(":")
    if kind == "cuda" and int(index or 0) >= count:
        raise UserError(f"device={device}: PyTorch sees {count or 'no'} CUDA device(s); use device=cpu or device=auto")
    return device


def use_device(device: str) -> torch.device:
    """The device of that name (cpu, cuda, cuda:1), PyTorch's current one where it is a card."""
    kind, _, index = device.partition(":")
    found = torch.device(kind, int(index or 0))
    if kind == "cuda":
        torch.cuda.set_device(found)
    return found


def _kept(step: Step, outputs: list[torch.Tensor]) -> Step:
    """The step, its output added to `outputs`."""

    def run() -> torch.Tensor:
        outputs.clear()  # first, or two of them would be in memory at once
        outputs.append(step())
        return outputs[0]

    return run


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: PyTorch's allocator says so by a type of its own, CUDA and the CPU in words."""
    words = ("DefaultCPUAllocator", "CUDA error: out of memory")
    return isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or any(each in str(error) for each in words)


def failure(error: BaseException) -> dict[str, Any]:
    """The reply's `error` for an exception: the cell's status, and the reason in one line."""
    line = " ".join(str(error).split())[:500] or type(error).__name__
    if isinstance(error, UserError):
        return {"status": "refused", "reason": str(error)}
    if isinstance(error, InvalidCell):
        return {"status": "invalid", "reason": line}
    if is_out_of_memory(error):
        peak = None
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            peak = torch.cuda.max_memory_allocated()
        return {"status": "oom", "reason": line, "peak_allocated_bytes": peak}
    return {"status": "crashed", "reason": f"{type(error).__name__}: {line}"}


def serve(requests: BinaryIO, replies: BinaryIO, worker: Worker) -> None:
    """Answer requests until the other end closes."""
    for line in requests:
        request = protocol.decode(line)
        operation = getattr(worker, f"op_{request.pop('op')}")
        try:
            reply = protocol.encode({"ok": operation(**request)})
        except Exception as error:
            reply = protocol.encode({"error": failure(error)})
        replies.write(reply)
        replies.flush()


def main() -> None:
    """Serve on the process's own pipes; whatever libraries print goes to standard error."""
    if sys.platform == "linux":  # die with the supervisor, however it dies
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    # A machine that shuts down sends this to all; that is the end of the run, and no cell's failure.
    signal.signal(signal.SIGTERM, lambda *_: None)
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    gc.freeze()  # what imports made stays; collecting between cells need not look at it
    serve(sys.stdin.buffer, replies, Worker())


if __name__ == "__main__":
    main()
