"""The state of the card between blocks, through NVML: clocks, temperature, power, brakes, other processes."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import psutil

# NVML's bits of "clocks event reasons" (nvml.h, nvmlClocksEventReasons) and their names there.
_REASONS = {
    0x001: "gpu_idle",
    0x002: "applications_clocks_setting",
    0x004: "sw_power_cap",
    0x008: "hw_slowdown",
    0x010: "sync_boost",
    0x020: "sw_thermal_slowdown",
    0x040: "hw_thermal_slowdown",
    0x080: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
}
_BRAKES = ("hw_slowdown", "sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown")
# nvml.h, nvmlClockType_t and nvmlTemperatureSensors_t.
_SM_CLOCK, _MEMORY_CLOCK, _GPU_SENSOR = 1, 2, 0


@dataclass(frozen=True)
class Telemetry:
    """One look at the card; None is what could not be read."""

    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    temperature_c: int | None = None
    power_w: float | None = None
    throttle_reasons: list[str] | None = None  # NVML's names, harmless ones too: see `braked`
    foreign_processes: list[int] | None = None


def braked(telemetry: Telemetry) -> list[str]:
    """Why a block that ended like this is to be measured again: thermal or power brakes, foreign processes.

    An idle card, clocks that someone set, and the software power cap (usual on a large card under load) are
    no brakes: measuring again would not rid a block of them.
    """
    reasons = [reason for reason in telemetry.throttle_reasons or [] if reason in _BRAKES]
    return reasons + [f"foreign process {pid}" for pid in telemetry.foreign_processes or []]


def flags(telemetry: Telemetry) -> list[str]:
    """What a reader of the block should know: the brakes, and the software power cap."""
    return braked(telemetry) + [reason for reason in telemetry.throttle_reasons or [] if reason == "sw_power_cap"]


class Monitor:
    """Reads the card that PyTorch calls `cuda:<device_index>`; a context manager.

    Nothing here raises: without NVML, a card or a permission, what cannot be read is None. Under MIG, clocks,
    power and temperature are the whole card's.
    """

    def __init__(self, device_index: int = 0) -> None:
        self._nvml: Any = None
        self._card: Any = None
        try:
            import pynvml

            self._nvml = pynvml
            pynvml.nvmlInit()
            self._card = _find_card(pynvml, device_index)
        except Exception:  # no driver, no card, no such card
            self.close()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets NVML go; what is read afterwards is None."""
        self._ask("nvmlShutdown")
        self._nvml = self._card = None

    def sample(self, own_pids: Collection[int] | None = None) -> Telemetry:
        """The state of the card now.

        own_pids: the processes of this run; None means this one and all that it started. In a container NVML
        may list the host's process ids, or none. Then ours are not in the list, nobody can tell what in it is
        foreign, and `foreign_processes` is None.
        """
        reasons = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons", self._card)
        return Telemetry(
            sm_clock_mhz=self._ask("nvmlDeviceGetClockInfo", self._card, _SM_CLOCK),
            memory_clock_mhz=self._ask("nvmlDeviceGetClockInfo", self._card, _MEMORY_CLOCK),
            temperature_c=self._ask("nvmlDeviceGetTemperature", self._card, _GPU_SENSOR),
            power_w=_watts(self._ask("nvmlDeviceGetPowerUsage", self._card)),
            throttle_reasons=None if reasons is None else _words(reasons),
            foreign_processes=self._foreign(_family() if own_pids is None else own_pids),
        )

    def describe(self) -> dict[str, Any]:
        """What the card is and how it is set: name, memory, driver, clocks, limits; None where unknown."""
        memory = self._ask("nvmlDeviceGetMemoryInfo", self._card)
        capability = self._ask("nvmlDeviceGetCudaComputeCapability", self._card)
        persistence = self._ask("nvmlDeviceGetPersistenceMode", self._card)
        ecc = self._ask("nvmlDeviceGetEccMode", self._card)
        mig = self._ask("nvmlDeviceGetMigMode", self._card)
        return {
            "device": self._ask("nvmlDeviceGetName", self._card),
            "device_memory_bytes": None if memory is None else memory.total,
            "compute_capability": None if capability is None else "{}.{}".format(*capability),
            "driver": self._ask("nvmlSystemGetDriverVersion"),
            "sm_clock_mhz": self._ask("nvmlDeviceGetClockInfo", self._card, _SM_CLOCK),
            "sm_clock_max_mhz": self._ask("nvmlDeviceGetMaxClockInfo", self._card, _SM_CLOCK),
            "memory_clock_mhz": self._ask("nvmlDeviceGetClockInfo", self._card, _MEMORY_CLOCK),
            "memory_clock_max_mhz": self._ask("nvmlDeviceGetMaxClockInfo", self._card, _MEMORY_CLOCK),
            "power_limit_w": _watts(self._ask("nvmlDeviceGetEnforcedPowerLimit", self._card)),
            "persistence_mode": None if persistence is None else bool(persistence),
            "ecc": None if ecc is None else bool(ecc[0]),
            "mig": None if mig is None else bool(mig[0]),
        }

    def _ask(self, function: str, *args: Any) -> Any:
        try:
            return getattr(self._nvml, function)(*args)
        except Exception:  # no NVML, not supported here, no permission, card lost: unknown, all of it
            return None

    def _foreign(self, own_pids: Collection[int]) -> list[int] | None:
        listed = self._ask("nvmlDeviceGetComputeRunningProcesses", self._card) or []
        # Under MIG the card lists the processes of all its instances; the others' do not use our part of it.
        ours = {_instance(process) for process in listed if process.pid in own_pids}
        if not ours:
            return None
        return sorted({p.pid for p in listed if p.pid not in own_pids and _instance(p) in ours})


def _find_card(nvml: Any, device_index: int) -> Any:
    """NVML's handle of the whole card: NVML, unlike CUDA, does not heed CUDA_VISIBLE_DEVICES.

    Nor does it number unlike cards as CUDA does, the fastest first (CUDA's documentation, CUDA_DEVICE_ORDER).
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    name = str(device_index) if visible is None else visible.split(",")[device_index].strip()
    if name.isdecimal():
        if os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" or _alike(nvml):
            return nvml.nvmlDeviceGetHandleByIndex(int(name))
        name = _uuid(device_index)
    handle = nvml.nvmlDeviceGetHandleByUUID(name)
    if name.startswith("MIG-"):
        handle = nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
    return handle


def _alike(nvml: Any) -> bool:
    count = nvml.nvmlDeviceGetCount()
    return len({nvml.nvmlDeviceGetName(nvml.nvmlDeviceGetHandleByIndex(index)) for index in range(count)}) == 1


def _uuid(device_index: int) -> str:
    """The UUID of CUDA's device, from the driver, which opens no context for that. Raises OSError where it cannot."""
    cuda = ctypes.CDLL("libcuda.so.1")
    device, uuid = ctypes.c_int(), (ctypes.c_ubyte * 16)()
    if (
        cuda.cuInit(0)
        or cuda.cuDeviceGet(ctypes.byref(device), device_index)
        or cuda.cuDeviceGetUuid(ctypes.byref(uuid), device)
    ):
        raise OSError(f"the CUDA driver tells nothing of device {device_index}")
    return f"GPU-{UUID(bytes=bytes(uuid))}"


def _watts(milliwatts: int | None) -> float | None:
    return None if milliwatts is None else milliwatts / 1000


def _words(bits: int) -> list[str]:
    known = [word for bit, word in _REASONS.items() if bits & bit]
    rest = bits & ~sum(_REASONS)
    return [*known, f"reason_{rest:#x}"] if rest else known


def _instance(process: Any) -> Any:
    return getattr(process, "gpuInstanceId", None)


def _family() -> set[int]:
    own = {os.getpid()}
    with contextlib.suppress(psutil.Error):
        own.update(child.pid for child in psutil.Process().children(recursive=True))
    return own
