"""Triton kernels that switches share, where Triton is installed."""

from importlib.util import find_spec

HAS_TRITON = find_spec("triton") is not None
