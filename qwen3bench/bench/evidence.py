"""What really ran: kernels, attention backend, launches, shared storage, compilations; never timed.

On CUDA the kernels are those of a profile (torch.profiler) of the launch itself, a graph's replay too. On a
CPU they are the ATen operations that compute something: not views, allocations, or those that only call
others.
"""

from __future__ import annotations

import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from qwen3bench.bench.design import cell_of, label
from qwen3bench.bench.workloads import Workload
from qwen3bench.model.decoder import Decoder

SEPARATE = "separate operations"
UNKNOWN = "unknown"

# What follows `aten::_scaled_dot_product_` in the name of each operation behind F.scaled_dot_product_attention.
_ATTENTION_OPERATIONS = {
    "flash_attention_for_cpu": "FlashAttention",
    "flash_attention": "FlashAttention",
    "efficient_attention": "memory-efficient",
    "cudnn_attention": "cuDNN",
    "fused_attention_overrideable": "overrideable",
    "attention_math": "math",
}
# What kernel names hold; the first that fits counts, as cuDNN's hold `flash` too.
_ATTENTION_KERNELS = {
    "cudnn": "cuDNN",
    "flash_fwd": "FlashAttention",
    "fmha_cutlass": "memory-efficient",
    "AttentionKernel": "memory-efficient",
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
) -> dict[str, Any]:
    """The record's `evidence` fields, `cell` apart, of a model that has run this workload in this runtime.

    `launches` are what the runtime made of the workload's steps (default: the steps). Looked at are the first
    and the last step: in `generate` the prefill and a decode step, elsewhere the only one. `kernels` and
    `kernel_launches` are of the last; they are empty where a CPU runs compiled code, which no profile sees.
    `recompiles` counts graphs compiled while looking, which a warm cell has no reason for; `graph_breaks` all
    since `forget_compilations`; both are None where nothing is compiled. Raises RuntimeError where a forced
    attention backend cannot run.
    """
    device = model.tok_emb.weight.device
    compiled = runtime == "compile"
    steps = workload.steps(model)
    ends = sorted({0, len(steps) - 1})
    before = _compiled_graphs()
    operations = [_profiled(steps[i], device).operations for i in ends]
    kernels = [_profiled((launches or steps)[i], device).kernels for i in ends]
    on_cpu = device.type == "cpu"
    last = {} if on_cpu and compiled else operations[-1] if on_cpu else kernels[-1]
    backends = [attention_backend(k, o, compiled) for k, o in zip(kernels, operations, strict=True)]
    notes = [] if on_cpu else [f"attention by an unknown kernel: {name}" for name in _unknown_attention(kernels)]
    if on_cpu and compiled:
        notes.append("compiled code on a CPU shows no kernels in a profile")
    return {
        "workload": workload.size.name,
        "runtime": runtime,
        "attention_backend": ", ".join(dict.fromkeys(backends)),
        "kernel_launches": sum(last.values()) or None,
        "tied_storage": model.out_head.weight.data_ptr() == model.tok_emb.weight.data_ptr(),
        "graph_breaks": _graph_breaks() if compiled else None,
        "recompiles": _compiled_graphs() - before if compiled else None,
        "kernels": dict(sorted(last.items(), key=lambda item: (-item[1], item[0]))),
        "notes": notes,
    }


def attention_backend(kernels: Iterable[str], operations: Iterable[str], compiled: bool = False) -> str:
    """The implementation of attention that the names of kernels and of ATen operations tell of."""
    for name in kernels:
        for part, backend in _ATTENTION_KERNELS.items():
            if part in name and any(word in name.lower() for word in _ATTENTION_WORDS):
                return backend
    operations = set(operations)
    for part, backend in _ATTENTION_OPERATIONS.items():
        if f"_scaled_dot_product_{part}" in operations:
            return backend
    if "_softmax" in operations or compiled:
        return SEPARATE
    return UNKNOWN


def compare_effective(evidence_by_cell: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Notes on switches without effect on what ran, by cell label, for one workload and runtime.

    A switch is without effect in a cell that ran the same kernels as often, over the same storage, as the
    cell without it. Cells whose kernels no profile shows, and cells without such a neighbour, get no note.
    """
    notes: dict[str, list[str]] = {}
    for name, evidence in evidence_by_cell.items():
        if ":" in name or not evidence.get("kernels"):
            continue
        cell = cell_of(name)
        for factor in cell:
            without = label(tuple(other for other in cell if other != factor))
            if without in evidence_by_cell and _same_work(evidence, evidence_by_cell[without]):
                notes.setdefault(name, []).append(f"{factor} changed nothing that ran: same kernels as {without}")
    return notes


def forget_compilations() -> None:
    """Set the counters of torch.compile to zero: to be called before a cell is compiled."""
    torch._dynamo.utils.counters.clear()


def _same_work(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(one[field] == other[field] for field in ("kernels", "attention_backend", "tied_storage"))


class _Profile:
    """Kernels and computing ATen operations of one launch: name → how often."""

    def __init__(self, events: Iterable[Any]) -> None:
        events = list(events)
        self.kernels = Counter(
            _short(e.name)
            for e in events
            if e.device_type == torch.autograd.DeviceType.CUDA
            and not e.is_user_annotation
            and not e.name.startswith(("Memcpy", "Memset"))
        )
        host = (e for e in events if e.device_type == torch.autograd.DeviceType.CPU and e.cpu_parent is None)
        self.operations = Counter(name for event in host for name in _computing(event))


def _profiled(launch: Callable[[], object], device: torch.device) -> _Profile:
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize(device)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # above USDT: else stderr tells of every start and stop
    with torch.no_grad(), profile(activities=activities) as profiled:  # as timed: another mode would recompile
        launch()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return _Profile(profiled.events())


def _short(name: str) -> str:
    """A kernel's name, cut where C++ templates make it long, with a checksum that keeps it unlike others."""
    return name if len(name) <= 120 else f"{name[:111]}…{zlib.crc32(name.encode()):08x}"


def _computing(event: Any) -> list[str]:
    """The operations under `event` that compute and call none that does; `add_` counts as `add`."""
    found = [name for child in event.cpu_children for name in _computing(child)]
    namespace, _, name = event.name.partition("::")
    if name.startswith("_scaled_dot_product_"):
        return [name]  # one operation, whatever it calls
    if not found and namespace == "aten" and _computes(name):
        found = [name.rstrip("_")]
    return found


@cache
def _computes(name: str) -> bool:
    if name in _IDLE or name.startswith(("empty", "new_empty")):
        return False
    packet = getattr(torch.ops.aten, name, None)
    if packet is None:
        return False
    return not any(getattr(packet, overload).is_view for overload in packet.overloads())


def _unknown_attention(kernels: Iterable[Mapping[str, int]]) -> list[str]:
    names = dict.fromkeys(name for counts in kernels for name in counts)
    return [
        name
        for name in names
        if any(word in name.lower() for word in _ATTENTION_WORDS)
        and not any(part in name for part in _ATTENTION_KERNELS)
    ]


def _compiled_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def _graph_breaks() -> int:
    return sum(torch._dynamo.utils.counters["graph_break"].values())
