"""What really ran: kernels, attention backend, launches, shared storage, compilations; never timed.

On CUDA the kernels are those of a profile (torch.profiler) of the launch itself, a graph's replay too. On a
CPU they are the ATen operations that compute something: not views, allocations, or those that only call
others.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.profiler import ProfilerActivity, profile

from qwen3bench.model.decoder import Decoder
from qwen3bench.model.qwen3 import Qwen3Model
from qwen3bench.record.messages import Evidence
from qwen3bench.worker.compile_counters import compiled_graphs, graph_breaks
from qwen3bench.worker.costs import forwards
from qwen3bench.worker.runtimes import require_finite
from qwen3bench.worker.workloads import Workload, WorkloadSize, keeping_output

SEPARATE = "separate operations"
OWN = "Triton"
UNKNOWN = "unknown"
COMPARED = 16  # tokens: the last ones' logits tell of all before them

# What follows `aten::_scaled_dot_product_` in the name of each operation behind F.scaled_dot_product_attention.
_ATTENTION_OPERATIONS = {
    "flash_attention_for_cpu": "FlashAttention",
    "flash_attention": "FlashAttention",
    "efficient_attention": "memory-efficient",
    "cudnn_attention": "cuDNN",
    "fused_attention_overrideable": "overrideable",
    "attention_math": "math",
}
# What kernel names hold; of one name the first that fits counts, as cuDNN's hold `flash` too.
_ATTENTION_KERNELS = {
    "cudnn": "cuDNN",
    "flash_fwd": "FlashAttention",
    "flash_bwd": "FlashAttention",
    "fmha_cutlass": "memory-efficient",
    "AttentionKernel": "memory-efficient",
    "attention_kernel": OWN,  # of a switch
}
_FORCED = {
    SDPBackend.FLASH_ATTENTION: "FlashAttention",
    SDPBackend.CUDNN_ATTENTION: "cuDNN",
    SDPBackend.EFFICIENT_ATTENTION: "memory-efficient",
    SDPBackend.MATH: "math",
}
_ATTENTION_WORDS = ("sdpa", "flash", "fmha", "attention")
# Operations that compute nothing and are no views.
_IDLE = {
    "to",
    "type_as",
    "contiguous",
    "promote_types",
    "result_type",
    "resolve_conj",
    "resolve_neg",
    "set_",
    "resize_",
    "_unsafe_view",
    "reshape",
    "_reshape_alias",
    "lift_fresh",
    "item",
    "_local_scalar_dense",
    "is_nonzero",
}


def collect(
    model: Decoder,
    workload: Workload,
    runtime: str = "eager",
    launches: Sequence[Callable[[], object]] | None = None,
    outputs: list[Tensor] | None = None,
) -> Evidence:
    """What really ran of a model that has run this workload in this runtime.

    `model` is what the runtime made of a cell's, and `launches` what it made of the workload's steps (default: the
    steps), which leave what they return in `outputs`. Looked at are the first and the last step: in `generate` the
    prefill and a decode step, elsewhere the only one. `kernels` and `kernel_launches` are of the last; they are empty
    where a CPU runs compiled code, which no profile sees.
    `recompiles` counts graphs compiled while looking, which a warm cell has no reason for; `graph_breaks` all
    since `forget_compilations`; both are None where nothing is compiled. Raises RuntimeError where a forced
    attention backend cannot run, and on a CPU `InvalidCell` where what a step returns is not finite.
    """
    device = model.tok_emb.weight.device
    compiled = runtime == "compile"
    outputs = [] if outputs is None else outputs
    steps = [keeping_output(step, outputs) for step in workload.steps(model)]
    ends = sorted({0, len(steps) - 1})
    before = compiled_graphs() if compiled else 0
    on_cpu = device.type == "cpu"
    kernels: list[Counter[str]] = [Counter() if on_cpu else _kernels((launches or steps)[i]) for i in ends]
    trained = workload.size.precision is not None
    backends, last = [], Counter[str]()
    for i, ran in zip(ends, kernels, strict=True):
        backend = _backend_of_kernels(ran, trained)
        operations = Counter[str]()
        if on_cpu:
            operations = operations_of(steps[i])
            require_finite(outputs[0], workload.output)
        elif backend is None:
            operations = operations_of_a_forward(model, workload, i)
        backends.append(backend or attention_backend((), operations, compiled))
        last = ran if not on_cpu else Counter() if compiled else operations
    notes = [f"attention by an unknown kernel: {name}" for name in _unknown_attention(kernels)]
    if isinstance(original := model.original, Qwen3Model):
        notes += asked_note(original, backends, compiled) + split_note(original, workload.size, backends[-1])
        notes += repeated_note(original)
        if SEPARATE not in backends and (backends[-1] != OWN or _splits(original)):
            notes.append(_mask_note(original, workload.size))
    if on_cpu and compiled:
        notes.append("compiled code on a CPU shows no kernels in a profile")
    return Evidence(
        attention_backend=", ".join(dict.fromkeys(backends)),
        kernel_launches=sum(last.values()) or None,
        tied_storage=model.out_head.weight.data_ptr() == model.tok_emb.weight.data_ptr(),
        graph_breaks=graph_breaks() if compiled else None,
        recompiles=compiled_graphs() - before if compiled else None,
        kernels=dict(sorted(last.items(), key=lambda item: (-item[1], item[0]))),
        notes=tuple(notes),
        output=output_hash(outputs[-1]) if outputs else None,
    )


def operations_of_a_forward(model: Decoder, workload: Workload, step: int) -> Counter[str]:
    """The ATen operations of a forward through the first block: name → how often.

    An operation costs the profiler far more than a kernel, and all blocks are alike. Of training it is eager's forward:
    compiled code has none without gradients, and would be compiled anew.
    """
    asked = model if workload.size.precision is None else model.original
    return operations_of(workload.forwards(asked.first_block_alone())[step])


def last_tokens(output: Tensor) -> Tensor:
    """The last tokens' logits (b, t, vocabulary); a loss as it is."""
    return output[:, -COMPARED:] if output.dim() > 1 else output


def output_hash(output: Tensor) -> str:
    """A hash of a loss, or of the last tokens' logits (b, t, vocabulary): equal where all their bits are."""
    raw = last_tokens(output).detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(raw, digest_size=8).hexdigest()


def attention_backend(
    kernels: Iterable[str], operations: Iterable[str], compiled: bool = False, trained: bool = False
) -> str:
    """The implementation of attention that the names of kernels and of ATen operations tell of.

    `trained`: the kernels are of a training step, whose loss has a softmax of its own.
    """
    if backend := _backend_of_kernels(kernels, trained):
        return backend
    operations = set(operations)
    found = [each for part, each in _ATTENTION_OPERATIONS.items() if f"_scaled_dot_product_{part}" in operations]
    if "_softmax" in operations or (compiled and not found):
        found.append(SEPARATE)
    return " and ".join(found) or UNKNOWN


def _backend_of_kernels(kernels: Iterable[str], trained: bool) -> str | None:
    """All fused implementations that ran, and whether a softmax of its own did; None where nothing fused ran.

    Of a training step no softmax counts, as it may be the loss's.
    """
    kernels = list(kernels)
    found = list(dict.fromkeys(filter(None, map(_fused_backend, kernels))))
    if found and not trained and any("softmax" in name.lower() for name in kernels if _fused_backend(name) is None):
        found.append(SEPARATE)
    return " and ".join(found) or None


def _fused_backend(kernel: str) -> str | None:
    if any(word in kernel.lower() for word in _ATTENTION_WORDS):
        return next((backend for part, backend in _ATTENTION_KERNELS.items() if part in kernel), None)
    return None


def _kernels(launch: Callable[[], object]) -> Counter[str]:
    """The CUDA kernels of one launch: name → how often."""
    for activities in ([ProfilerActivity.CUDA], [ProfilerActivity.CPU, ProfilerActivity.CUDA]):
        found = Counter(
            _short(event.name)
            for event in _profiled(launch, activities)
            if event.device_type == torch.autograd.DeviceType.CUDA
            and not event.is_user_annotation
            and not event.name.lower().startswith(("memcpy", "memset"))  # copies, a graph's first replay has one too
        )
        if found:  # profiling the host too takes ten times as long, and some versions show no kernels without
            return found
    return Counter()


def operations_of(launch: Callable[[], object]) -> Counter[str]:
    """The ATen operations of one launch that compute: name → how often."""
    profiled = _profile(launch, [ProfilerActivity.CPU])
    events = [  # as the profiler has them: its own tables of 28 layers take longer than their forward
        Span(event.start_ns(), event.end_ns(), event.name(), event.start_thread_id())
        for event in profiled.profiler.kineto_results.events()
        if event.device_type() == torch.autograd.DeviceType.CPU
    ]
    return computing_operations(events)


@dataclass(frozen=True)
class Span:
    """An operation of a profile: from when to when it ran, in ns, and in which thread."""

    start: int
    end: int
    name: str
    thread: int = 0


def computing_operations(spans: Iterable[Span]) -> Counter[str]:
    """Count the operations that compute and call none that does; `add_` counts as `add`.

    One calls another where it runs while the other does, in the same thread. Attention counts as one operation,
    whatever it calls.
    """
    counts = Counter[str]()
    running: list[_Running] = []

    def end_until(span: Span | None) -> None:
        while running and (span is None or running[-1].ends_before(span)):
            ended = running.pop()
            ended.computes |= not ended.inside_attention and _count(ended, counts)
            if running:
                running[-1].computes |= ended.computes

    for span in sorted(spans, key=lambda each: (each.thread, each.start, -each.end)):
        end_until(span)
        running.append(_Running(span, bool(running) and running[-1].is_attention))
    end_until(None)
    return counts


@dataclass
class _Running:
    """An operation that others may be called by; `computes`: whether one of them, or it, does."""

    span: Span
    inside_attention: bool
    computes: bool = False

    @property
    def is_attention(self) -> bool:
        return self.inside_attention or self.operation.startswith("_scaled_dot_product_")

    @property
    def operation(self) -> str:
        return self.span.name.partition("::")[2]

    def ends_before(self, span: Span) -> bool:
        return self.span.thread != span.thread or self.span.end <= span.start


def _count(ended: _Running, counts: Counter[str]) -> bool:
    """Count an operation where it computes and none that it called does; whether it does."""
    name = ended.operation
    if ended.is_attention:
        counts[name] += 1
        return True
    if ended.computes or not ended.span.name.startswith("aten::") or not _computes(name):
        return False
    counts[name.rstrip("_")] += 1
    return True


def _profiled(launch: Callable[[], object], activities: Sequence[ProfilerActivity]) -> list[Any]:
    """The events of one launch."""
    return list(_profile(launch, activities).events())


def _profile(launch: Callable[[], object], activities: Sequence[ProfilerActivity]) -> Any:
    """The profile of one launch."""
    synchronize = torch.cuda.synchronize if ProfilerActivity.CUDA in activities else lambda: None
    synchronize()
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # above USDT: else stderr tells of every start and stop
    with torch.no_grad(), profile(activities=activities) as profiled:  # as timed: another mode would recompile
        launch()
        synchronize()
    return profiled


def _short(name: str) -> str:
    """A kernel's name, cut where C++ templates make it long, with a checksum that keeps it unlike others."""
    return name if len(name) <= 120 else f"{name[:111]}…{zlib.crc32(name.encode()):08x}"


@cache
def _computes(name: str) -> bool:
    if name in _IDLE or name.startswith(("empty", "new_empty")):
        return False
    packet = getattr(torch.ops.aten, name, None)
    if packet is None:
        return False
    return not any(getattr(packet, overload).is_view for overload in packet.overloads())


def asked_note(model: Qwen3Model, backends: Iterable[str], compiled: bool) -> list[str]:
    """Whether fused attention ran, and the backend that was forced, where the model asks for it."""
    attend: Any = model.parts.attend
    if not hasattr(attend, "backend"):  # it is not fused
        return []
    own = {OWN} if _splits(model) else set()
    if attend.backend is None:
        return (
            [f"{SEPARATE} ran where fused attention was asked for"] if any(SEPARATE in ran for ran in backends) else []
        )
    asked = _FORCED[attend.backend]
    fits = {asked, SEPARATE} if asked == "math" and compiled else {asked}  # which the compiler takes apart
    return [f"{asked} was asked for, {ran} ran" for ran in dict.fromkeys(backends) if ran not in fits | own]


def repeated_note(model: Qwen3Model) -> list[str]:
    """Whether keys and values were repeated for all heads in the last forward, as the baseline does."""
    if getattr(model.parts.attend, "grouped", True):
        return []
    return ["keys and values are repeated for all heads: no fused kernel that is allowed here takes grouped ones"]


def split_note(model: Qwen3Model, size: WorkloadSize, backend: str) -> list[str]:
    """Whether a single token's query took our kernel, where the model asks for it."""
    queries, _, _ = forwards(size)[-1]
    if not _splits(model) or queries > 1 or backend == OWN:
        return []
    return [f"flash.decode=split was asked for, {backend} ran: it takes one sequence's token on CUDA, beside mask"]


def _splits(model: Qwen3Model) -> bool:
    return getattr(model.parts.attend, "split", False)


def _mask_note(model: Qwen3Model, size: WorkloadSize) -> str:
    """Whether fused attention is given a mask tensor: what `mask` is worth beside `flash`."""
    queries, start, _ = forwards(size)[-1]
    weight = model.tok_emb.weight
    if model.parts.attend.mask(model.parts.mask, queries, start, weight.device, weight.dtype) is None:
        return "fused attention without a mask tensor"
    refused = ", which the FlashAttention kernel refuses" if weight.is_cuda else ""
    return f"fused attention is given a mask tensor{refused}"


def _unknown_attention(kernels: Iterable[Mapping[str, int]]) -> list[str]:
    names = dict.fromkeys(name for counts in kernels for name in counts)
    return [
        name
        for name in names
        if any(word in name.lower() for word in _ATTENTION_WORDS)
        and not any(part in name for part in _ATTENTION_KERNELS)
    ]
