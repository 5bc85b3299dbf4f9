"""The device that a process works on: which one a name means, and whether its memory ran out."""

from __future__ import annotations

import torch

from qwen3bench.errors import UserError


def device_here(device: str) -> str:
    """The device that `device` (auto, cpu, cuda, cuda:1) means here. Raises `UserError` where it does not exist."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        device = "cuda" if count else "cpu"
    kind, _, index = device.partition(":")
    if kind == "cuda" and int(index or 0) >= count:
        seen = f"{count or 'no'} CUDA device{'s' * (count > 1)}"
        raise UserError(f"device={device}: PyTorch sees {seen}; use device=cpu or device=auto")
    return device


def emulates_bfloat16(device: str) -> bool:
    """Whether a card computes in bfloat16 by way of float32 alone: before compute capability 8.0 (CUDA C guide, 5.4.1).

    On such cards Triton has no bfloat16 at all.
    """
    kind, _, index = device.partition(":")
    return kind == "cuda" and torch.cuda.get_device_capability(int(index or 0)) < (8, 0)


def use_device(device: str) -> torch.device:
    """The device of that name (cpu, cuda, cuda:1), PyTorch's current one where it is a card."""
    kind, _, index = device.partition(":")
    found = torch.device(kind, int(index or 0))
    if kind == "cuda":
        torch.cuda.set_device(found)
    return found


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: PyTorch's allocator says so by a type of its own, CUDA and the CPU in words."""
    words = ("DefaultCPUAllocator", "CUDA error: out of memory")
    return isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or any(each in str(error) for each in words)
