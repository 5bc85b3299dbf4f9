"""A card through NVML: what it is, its clocks, temperature and power, why it is throttled, who else uses it."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Collection
from typing import Any, Self
from uuid import UUID

import psutil

from qwen3bench.record.lines import Telemetry

# NVML's bits of "clocks event reasons" (nvml.h, nvmlClocksEventReasons) and their names there.
REASONS = {
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
# nvml.h, nvmlClockType_t and nvmlTemperatureSensors_t.
SM_CLOCK, MEMORY_CLOCK, GPU_SENSOR = 1, 2, 0


class Card:
    """Reads the card that PyTorch calls `cuda:<device_index>`; a context manager.

    Nothing here raises: without NVML, a card or a permission, what cannot be read is None. Under MIG, clocks,
    power and temperature are the whole card's.
    """

    handle: Any = None  # NVML's; None where there is no such card

    def __init__(self, device_index: int = 0, uuid: str | None = None) -> None:
        """The card of this index, or of this UUID, which may be that of a part (MIG)."""
        self._nvml: Any = None
        self._mig_uuid: str | None = None
        self._looked_us = 0  # as NVML counts
        try:
            import pynvml

            self._nvml = pynvml
            pynvml.nvmlInit()
            self.handle, self._mig_uuid = _find(pynvml, device_index) if uuid is None else _by_uuid(pynvml, uuid)
        except Exception:  # no driver, no card, no such card
            self.close()

    @classmethod
    def of(cls, device: str) -> Card:
        """The card that a device's name means (`cuda`, `cuda:1`); the first where it means none."""
        return cls(int(device.partition(":")[2] or 0))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets NVML go; what is read afterwards is None."""
        self._ask("nvmlShutdown")
        self._nvml = self.handle = None

    def sample(self, own_pids: Collection[int] | None = None) -> Telemetry:
        """The state of the card now.

        own_pids: the processes of this run; None means this one and all that it started. In a container NVML
        may list the host's process ids, or none. Then ours are not in the list, nobody can tell what in it is
        foreign, and `foreign_processes` is None.
        """
        reasons = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons", self.handle)
        foreign = self._foreign(_family() if own_pids is None else own_pids)
        return Telemetry(
            sm_clock_mhz=self._ask("nvmlDeviceGetClockInfo", self.handle, SM_CLOCK),
            memory_clock_mhz=self._ask("nvmlDeviceGetClockInfo", self.handle, MEMORY_CLOCK),
            temperature_c=self._ask("nvmlDeviceGetTemperature", self.handle, GPU_SENSOR),
            power_w=_watts(self._ask("nvmlDeviceGetPowerUsage", self.handle)),
            throttle_reasons=None if reasons is None else tuple(_words(reasons)),
            foreign_processes=foreign,
            foreign_sm_percent=None if foreign is None else self._sm_percent(foreign),
        )

    def describe(self) -> dict[str, Any]:
        """What the card is and how it is set: name, UUID (`card`), memory, driver, clocks, limits; None where unknown.

        Of a part of a card (MIG) the UUID is its own.
        """
        memory = self._ask("nvmlDeviceGetMemoryInfo", self.handle)
        capability = self._ask("nvmlDeviceGetCudaComputeCapability", self.handle)
        persistence = self._ask("nvmlDeviceGetPersistenceMode", self.handle)
        ecc = self._ask("nvmlDeviceGetEccMode", self.handle)
        mig = self._ask("nvmlDeviceGetMigMode", self.handle)
        return {
            "device": self._ask("nvmlDeviceGetName", self.handle),
            "card": self._mig_uuid or self._ask("nvmlDeviceGetUUID", self.handle),
            "device_memory_bytes": None if memory is None else memory.total,
            "compute_capability": None if capability is None else "{}.{}".format(*capability),
            "driver": self._ask("nvmlSystemGetDriverVersion"),
            "sm_clock_mhz": self._ask("nvmlDeviceGetClockInfo", self.handle, SM_CLOCK),
            "sm_clock_max_mhz": self._ask("nvmlDeviceGetMaxClockInfo", self.handle, SM_CLOCK),
            "memory_clock_mhz": self._ask("nvmlDeviceGetClockInfo", self.handle, MEMORY_CLOCK),
            "memory_clock_max_mhz": self._ask("nvmlDeviceGetMaxClockInfo", self.handle, MEMORY_CLOCK),
            "power_limit_w": _watts(self._ask("nvmlDeviceGetEnforcedPowerLimit", self.handle)),
            "persistence_mode": None if persistence is None else bool(persistence),
            "ecc": None if ecc is None else bool(ecc[0]),
            "mig": None if mig is None else bool(mig[0]),
        }

    def _ask(self, function: str, *args: Any) -> Any:
        try:
            return getattr(self._nvml, function)(*args)
        except Exception:  # no NVML, not supported here, no permission, card lost: unknown, all of it
            return None

    def _foreign(self, own_pids: Collection[int]) -> tuple[int, ...] | None:
        listed = self._ask("nvmlDeviceGetComputeRunningProcesses", self.handle) or []
        # Under MIG the card lists the processes of all its instances; the others' do not use our part of it.
        ours = {_instance(process) for process in listed if process.pid in own_pids}
        if not ours:
            return None
        return tuple(sorted({p.pid for p in listed if p.pid not in own_pids and _instance(p) in ours}))

    def _sm_percent(self, pids: Collection[int]) -> float | None:
        """How much of the SMs these processes took since the last look, in percent; None where NVML does not tell."""
        if not pids:
            return 0.0
        samples = self._ask("nvmlDeviceGetProcessUtilization", self.handle, self._looked_us)
        if samples is None:
            return None
        self._looked_us = max((sample.timeStamp for sample in samples), default=self._looked_us)
        newest = {each.pid: each.smUtil for each in sorted(samples, key=lambda each: each.timeStamp)}
        return float(sum(newest.get(pid, 0) for pid in pids))


def _find(nvml: Any, device_index: int) -> tuple[Any, str | None]:
    """NVML's handle of the whole card, and the UUID of the part of it that is meant, under MIG.

    NVML, unlike CUDA, does not heed CUDA_VISIBLE_DEVICES.

    Nor does it number unlike cards as CUDA does, the fastest first (CUDA's documentation, CUDA_DEVICE_ORDER).
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    name = str(device_index) if visible is None else visible.split(",")[device_index].strip()
    if name.isdecimal():
        if os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" or _alike(nvml):
            return nvml.nvmlDeviceGetHandleByIndex(int(name)), None
        name = cuda_uuid(device_index)
    return _by_uuid(nvml, name)


def _by_uuid(nvml: Any, name: str) -> tuple[Any, str | None]:
    handle = nvml.nvmlDeviceGetHandleByUUID(name)
    if name.startswith("MIG-"):
        return nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle), name
    return handle, None


def _alike(nvml: Any) -> bool:
    count = nvml.nvmlDeviceGetCount()
    return len({nvml.nvmlDeviceGetName(nvml.nvmlDeviceGetHandleByIndex(index)) for index in range(count)}) == 1


def cuda_uuid(device_index: int) -> str:
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
    known = [word for bit, word in REASONS.items() if bits & bit]
    rest = bits & ~sum(REASONS)
    return [*known, f"reason_{rest:#x}"] if rest else known


def _instance(process: Any) -> Any:
    return getattr(process, "gpuInstanceId", None)


def _family() -> set[int]:
    own = {os.getpid()}
    with contextlib.suppress(psutil.Error):
        own.update(child.pid for child in psutil.Process().children(recursive=True))
    return own
