"""What the state of a card after a block says of the block."""

from __future__ import annotations

from qwen3bench.record.lines import Telemetry

# NVML's names (nvml.h, nvmlClocksEventReasons). An idle card, clocks that someone set and the software power cap (usual
# on a large card under load) are not among them: measuring again would not rid a block of them.
_THROTTLED = ("hw_slowdown", "sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown")


def disturbances(telemetry: Telemetry) -> list[str]:
    """Why a block that ended like this is to be measured again: a throttled card, other processes on it."""
    reasons = [reason for reason in telemetry.throttle_reasons or () if reason in _THROTTLED]
    percent = telemetry.foreign_sm_percent
    share = "" if percent is None else f" ({percent:g} % of the SMs)"
    return reasons + [f"foreign process {pid}{share}" for pid in telemetry.foreign_processes or ()]


def flags(telemetry: Telemetry) -> list[str]:
    """What a reader of the block should know: the disturbances, and the software power cap."""
    return disturbances(telemetry) + [r for r in telemetry.throttle_reasons or () if r == "sw_power_cap"]
