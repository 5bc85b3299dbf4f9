"""Ceilings are measured in the units they claim; a vendor's figures are of that very device."""

from __future__ import annotations

import pytest
import torch

from qwen3bench.record.messages import Ceilings
from qwen3bench.worker import ceilings
from qwen3bench.worker.ceilings import measure_ceilings, vendor_figures
from qwen3bench.worker.clock import TimedValue


def test_rates_are_work_over_the_median_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def time_host(launches, repeats):
        launches[0]()
        return [TimedValue(latency_s) for latency_s in (9.0, 0.5, 0.25)]

    monkeypatch.setattr(ceilings, "time_host", time_host)
    monkeypatch.setattr(ceilings, "COPY_BYTES", {"cpu": 4096})
    monkeypatch.setattr(ceilings, "MATRIX_ROWS", {"cpu": 16})
    assert measure_ceilings("cpu", torch.bfloat16) == Ceilings(
        copy_bytes_per_s=2 * 4096 / 0.5,  # read and written
        matmul_flops_per_s=2 * 16**3 / 0.5,
        dtype="bfloat16",
    )


@pytest.mark.parametrize(
    ("name", "bytes_per_s", "flops_per_s"),
    [
        ("NVIDIA H100 80GB HBM3", 3.35e12, 989.4e12),
        ("NVIDIA H100 PCIe", 2.0e12, 756e12),
        ("NVIDIA H200", 4.8e12, 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 2.039e12, 312e12),
        ("NVIDIA A100 80GB PCIe", 1.935e12, 312e12),
        ("NVIDIA L4", 300e9, 121e12),
        ("NVIDIA L40S", 864e9, 362.05e12),
        ("NVIDIA GeForce RTX 4090", 1008e9, 165.2e12),
        ("NVIDIA GeForce RTX 3090", 936e9, 71e12),
    ],
)
def test_known_devices(name: str, bytes_per_s: float, flops_per_s: float) -> None:
    figures = vendor_figures(name, torch.bfloat16)
    assert figures is not None
    assert (figures["bytes_per_s"], figures["flops_per_s"]) == (bytes_per_s, flops_per_s)
    assert "NVIDIA" in figures["source"]
    in_float32 = vendor_figures(name, torch.float32)
    assert in_float32 is not None
    assert in_float32["flops_per_s"] is None  # the figure is one of 16-bit products


@pytest.mark.parametrize(
    "name",
    [
        "",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GH200 480GB",
        "NVIDIA H200 NVL",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA L40",
        "NVIDIA H100 NVL",
        "AMD Instinct MI300X",
    ],
)
def test_devices_that_only_sound_alike_have_no_figures(name: str) -> None:
    assert vendor_figures(name, torch.bfloat16) is None


@pytest.mark.cuda
def test_a_gpu_reaches_a_part_of_what_its_vendor_states() -> None:
    measured = measure_ceilings("cuda", torch.bfloat16)
    vendor = measured.vendor
    if vendor is None:
        pytest.skip("no figures of this device")
    assert 0.5 < measured.copy_bytes_per_s / vendor["bytes_per_s"] < 1.05
    assert 0.4 < measured.matmul_flops_per_s / vendor["flops_per_s"] < 1.05
