"""What vendors state of their cards: memory bandwidth and dense products."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Vendor:
    """A vendor's figures: memory bandwidth, and dense bfloat16 products with float32 accumulation."""

    bytes_per_s: float
    flops_per_s: float
    source: str


# By what the device's name holds; the first that fits counts.
_VENDOR = {
    "H200": Vendor(4.8e12, 989.4e12, "NVIDIA H200 data sheet (half of the figure with sparsity)"),
    "H100 PCIe": Vendor(2.0e12, 756e12, "NVIDIA H100 data sheet, PCIe (half of the figure with sparsity)"),
    "H100 80GB HBM3": Vendor(3.35e12, 989.4e12, "NVIDIA H100 data sheet, SXM (half of the figure with sparsity)"),
    "A100-SXM4-80GB": Vendor(2.039e12, 312e12, "NVIDIA A100 data sheet, 80 GB SXM"),
    "A100 80GB PCIe": Vendor(1.935e12, 312e12, "NVIDIA A100 data sheet, 80 GB PCIe"),
    "A100-SXM4-40GB": Vendor(1.555e12, 312e12, "NVIDIA A100 data sheet, 40 GB"),
    "A100-PCIE-40GB": Vendor(1.555e12, 312e12, "NVIDIA A100 data sheet, 40 GB"),
    "L40S": Vendor(864e9, 362.05e12, "NVIDIA L40S data sheet"),
    "NVIDIA L4": Vendor(300e9, 121e12, "NVIDIA L4 data sheet (half of the figure with sparsity)"),
    "RTX 4090": Vendor(1008e9, 165.2e12, "NVIDIA Ada GPU architecture white paper, appendix A"),
    "RTX 3090": Vendor(936e9, 71e12, "NVIDIA Ampere GA102 white paper, appendix A"),
}
# Slower or faster chips whose names hold one of those above.
_LOOKALIKES = ("Laptop", "Ti", "D v2", " D", "MIG", "NVL")


def vendor_of(device_name: str) -> Vendor | None:
    """The figures of a known device, else None."""
    if any(f"{word} " in f"{device_name} " for word in _LOOKALIKES):
        return None
    return next((vendor for name, vendor in _VENDOR.items() if f" {name} " in f" {device_name} "), None)
