"""Whether a workload fits the memory of a host: beyond it the system ends processes, or everything slows to a halt."""

from __future__ import annotations

from dataclasses import replace

import torch

from qwen3bench.config.settings import Settings
from qwen3bench.errors import UserError
from qwen3bench.worker.costs import least_resident_bytes
from qwen3bench.worker.workloads import WorkloadSize, workload_sizes

# Times the least that a workload needs, as outputs are compared, and the allocator keeps what it was given: 9.6 were
# seen of tiny at 1,000 × 128.
_ROOM = 12


def refuse_beyond_host(settings: Settings, available_bytes: int) -> None:
    """Raise `UserError` where a workload of resolved settings needs more memory than there is; it names what fits."""
    for size in workload_sizes(settings):
        needed = _needed(settings, size)
        if needed > available_bytes:
            raise UserError(
                f"{size.name} of {size.batch_size:,} × {size.prompt_tokens:,} tokens needs at least "
                f"{needed / 1e9:.1f} GB with {settings.model.name}, and the memory here has "
                f"{available_bytes / 1e9:.1f} GB; {_mend(settings, size, available_bytes)}"
            )


def fits_host(settings: Settings, size: WorkloadSize, available_bytes: int) -> bool:
    """Whether a run over a workload of this size has memory to spare."""
    return _ROOM * _needed(settings, size) <= available_bytes


def _mend(settings: Settings, size: WorkloadSize, available_bytes: int) -> str:
    """The largest batch that fits; where none does, the longest prompt by halves."""
    each = _needed(settings, replace(size, batch_size=1))
    if batch_size := available_bytes // (_ROOM * each):
        return f"batch_size={batch_size} fits"
    prompt_tokens = size.prompt_tokens
    while prompt_tokens := prompt_tokens // 2:
        if fits_host(settings, replace(size, batch_size=1, prompt_tokens=prompt_tokens), available_bytes):
            return f"batch_size=1 prompt_tokens={prompt_tokens} fits"
    return "take a smaller model"


def _needed(settings: Settings, size: WorkloadSize) -> int:
    return least_resident_bytes(settings.model, size, getattr(torch, settings.dtype).itemsize)
