"""Triton kernels that switches share, where Triton is installed."""

from functools import cache
from importlib.util import find_spec

import torch

_found = find_spec("triton")
HAS_TRITON = _found is not None and _found.origin is not None  # a folder of that name alone is not the package


@cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a card has: fewer programs than these leave some idle."""
    return torch.cuda.get_device_properties(device).multi_processor_count
