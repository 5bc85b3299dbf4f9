"""Triton kernels that switches share, where Triton is installed."""

from functools import cache
from importlib.util import find_spec

import torch

HAS_TRITON = find_spec("triton") is not None


@cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a card has: fewer programs than these leave some idle."""
    return torch.cuda.get_device_properties(device).multi_processor_count
