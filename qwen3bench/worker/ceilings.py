"""What the device can do at best: measured, the denominators of MBU and MFU, and as its vendor states it."""

from __future__ import annotations

from statistics import median
from typing import Any

import torch

from qwen3bench.record.messages import Ceilings, Pace
from qwen3bench.record.vendor import vendor_of
from qwen3bench.worker.clock import time_device, time_host

_REPEATS = 9  # of which the median counts
# Bytes of the buffer to copy and rows of the square matrices: far beyond every cache, and still quick.
COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}
MATRIX_ROWS = {"cuda": 8192, "cpu": 768}


def vendor_figures(device_name: str, dtype: torch.dtype) -> dict[str, Any] | None:
    """`bytes_per_s`, `flops_per_s` (None but for 16-bit dtypes) and `source` of a known device, else None."""
    vendor = vendor_of(device_name)
    if vendor is None:
        return None
    flops = vendor.flops_per_s if dtype in (torch.bfloat16, torch.float16) else None
    return {"bytes_per_s": vendor.bytes_per_s, "flops_per_s": flops, "source": vendor.source}


def measure_ceilings(device: torch.device | str, dtype: torch.dtype) -> Ceilings:
    """What the device reaches: bandwidth of a large copy and rate of a large matrix product.

    A copy counts the bytes read and those written. Medians of repeats, on random data (constant data draws
    less power and reads too fast). Raises torch.cuda.OutOfMemoryError where some 2 GiB are not free on a CUDA
    device.
    """
    device = torch.device(device)
    copy_bytes_per_s = _copy_bytes_per_s(device)
    rows = MATRIX_ROWS[device.type]
    a, b = (torch.randn(rows, rows, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    matmul_s = _median_s(device, lambda: torch.mm(a, b, out=out))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return Ceilings(
        copy_bytes_per_s=copy_bytes_per_s,
        matmul_flops_per_s=2 * rows**3 / matmul_s,
        dtype=str(dtype).removeprefix("torch."),
        vendor=vendor_figures(name, dtype),
    )


def _copy_bytes_per_s(device: torch.device) -> float:
    source = torch.randn(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return (source.nbytes + target.nbytes) / _median_s(device, lambda: target.copy_(source))


def _median_s(device: torch.device, launch: Any) -> float:
    launch()
    on_host = Pace(inner=1, repeats=_REPEATS)
    values = time_device([launch], _REPEATS) if device.type == "cuda" else time_host([launch], on_host)
    return median(value.latency_s for value in values)
