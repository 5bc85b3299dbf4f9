"""A card tells throttling from harmless states, and empty from zero."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import astuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qwen3bench.campaign.monitor import disturbances, flags
from qwen3bench.record import card as module
from qwen3bench.record.card import GPU_SENSOR, MEMORY_CLOCK, REASONS, SM_CLOCK, Card
from qwen3bench.record.lines import Telemetry


class FakeNvml:
    """A pynvml with two cards; `refused` are the functions that this driver does not support."""

    def __init__(self) -> None:
        self.refused: set[str] = set()
        self.reasons = 0x1
        self.pids: list[tuple[int, int]] = []
        self.shut = 0

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvml") and name in object.__getattribute__(self, "refused"):
            raise RuntimeError("NVML: Not Supported")
        return object.__getattribute__(self, name)

    def nvmlInit(self) -> None:  # noqa: N802
        pass

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.shut += 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802
        return ["first", "second"][index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        return {"GPU-b": "second", "MIG-a1": "part of first"}[uuid]

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: str) -> str:  # noqa: N802
        return handle.removeprefix("part of ")

    def nvmlDeviceGetClockInfo(self, card: str, clock: int) -> int:  # noqa: N802
        return {"first": {1: 1755, 2: 2619}, "second": {1: 345, 2: 1593}}[card][clock]

    def nvmlDeviceGetMaxClockInfo(self, card: str, clock: int) -> int:  # noqa: N802
        return {1: 1980, 2: 2619}[clock]

    def nvmlDeviceGetTemperature(self, card: str, sensor: int) -> int:  # noqa: N802
        return 61

    def nvmlDeviceGetPowerUsage(self, card: str) -> int:  # noqa: N802
        return 412_345

    def nvmlDeviceGetEnforcedPowerLimit(self, card: str) -> int:  # noqa: N802
        return 700_000

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, card: str) -> int:  # noqa: N802
        return self.reasons

    def nvmlDeviceGetComputeRunningProcesses(self, card: str) -> list[SimpleNamespace]:  # noqa: N802
        return [SimpleNamespace(pid=pid, gpuInstanceId=instance) for pid, instance in self.pids]

    def nvmlDeviceGetName(self, card: str) -> str:  # noqa: N802
        return f"NVIDIA {card}"

    def nvmlDeviceGetUUID(self, card: str) -> str:  # noqa: N802
        return f"GPU-{card}"

    def nvmlDeviceGetMemoryInfo(self, card: str) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(total=85_520_809_984)

    def nvmlDeviceGetCudaComputeCapability(self, card: str) -> tuple[int, int]:  # noqa: N802
        return (9, 0)

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "580.95.05"

    def nvmlDeviceGetPersistenceMode(self, card: str) -> int:  # noqa: N802
        return 1

    def nvmlDeviceGetEccMode(self, card: str) -> list[int]:  # noqa: N802
        return [1, 1]

    def nvmlDeviceGetMigMode(self, card: str) -> list[int]:  # noqa: N802
        return [0, 0]


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    return fake


def test_reads_the_card(nvml: FakeNvml) -> None:
    nvml.reasons = 0x4 | 0x40
    nvml.pids = [(os.getpid(), 7), (4321, 7)]
    with Card(0) as card:
        telemetry = card.sample()
    assert telemetry == Telemetry(
        sm_clock_mhz=1755,
        memory_clock_mhz=2619,
        temperature_c=61,
        power_w=412.345,
        throttle_reasons=["sw_power_cap", "hw_thermal_slowdown"],
        foreign_processes=[4321],
    )
    assert nvml.shut == 1
    assert card.sample() == Telemetry()


def test_describes_the_card(nvml: FakeNvml) -> None:
    assert Card(1).describe() == {
        "device": "NVIDIA second",
        "card": "GPU-second",
        "device_memory_bytes": 85_520_809_984,
        "compute_capability": "9.0",
        "driver": "580.95.05",
        "sm_clock_mhz": 345,
        "sm_clock_max_mhz": 1980,
        "memory_clock_mhz": 1593,
        "memory_clock_max_mhz": 2619,
        "power_limit_w": 700.0,
        "persistence_mode": True,
        "ecc": True,
        "mig": False,
    }


def test_knows_the_names_and_bits_of_nvml() -> None:
    pynvml = pytest.importorskip("pynvml")

    names = {
        0x1: "GpuIdle",
        0x2: "ApplicationsClocksSetting",
        0x4: "SwPowerCap",
        0x8: "HwSlowdown",
        0x10: "SyncBoost",
        0x20: "SwThermalSlowdown",
        0x40: "HwThermalSlowdown",
        0x80: "HwPowerBrakeSlowdown",
        0x100: "DisplayClockSetting",
    }
    assert REASONS.keys() == names.keys()
    for bit, name in names.items():
        assert getattr(pynvml, f"nvmlClocksThrottleReason{name}") == bit
        assert REASONS[bit].replace("_", "") == name.lower()
    clocks = (pynvml.NVML_CLOCK_SM, pynvml.NVML_CLOCK_MEM, pynvml.NVML_TEMPERATURE_GPU)
    assert clocks == (SM_CLOCK, MEMORY_CLOCK, GPU_SENSOR)


@pytest.mark.parametrize(
    ("bits", "words", "slowed"),
    [
        (0x0, [], []),
        (0x1, ["gpu_idle"], []),
        (0x2, ["applications_clocks_setting"], []),
        (0x4, ["sw_power_cap"], []),
        (0x8, ["hw_slowdown"], ["hw_slowdown"]),
        (0x10, ["sync_boost"], []),
        (0x20, ["sw_thermal_slowdown"], ["sw_thermal_slowdown"]),
        (0x40, ["hw_thermal_slowdown"], ["hw_thermal_slowdown"]),
        (0x88, ["hw_slowdown", "hw_power_brake_slowdown"], ["hw_slowdown", "hw_power_brake_slowdown"]),
        (0x100, ["display_clock_setting"], []),
        (0x1201, ["gpu_idle", "reason_0x1200"], []),
    ],
)
def test_a_card_slowed_by_heat_is_throttled(nvml: FakeNvml, bits: int, words: list[str], slowed: list[str]) -> None:
    nvml.reasons = bits
    telemetry = Card(0).sample()
    assert telemetry.throttle_reasons == tuple(words)
    assert disturbances(telemetry) == slowed
    assert flags(telemetry) == (["sw_power_cap"] if bits == 0x4 else slowed)


@pytest.mark.parametrize(
    ("listed", "foreign"),
    [
        ([(10, 0), (11, 0)], []),
        ([(10, 0), (99, 0), (98, 0), (99, 0)], [98, 99]),
        ([], None),  # a container that sees no process
        ([(99, 0)], None),  # or only the host's ids: ours may be among them
        ([(10, 1), (99, 2), (98, 1)], [98]),  # MIG: 99 is on another part of the card
    ],
)
def test_foreign_processes_are_named_only_where_ours_are_seen(
    nvml: FakeNvml, listed: list[tuple[int, int]], foreign: list[int] | None
) -> None:
    nvml.pids = listed
    telemetry = Card(0).sample(own_pids={10, 11})
    assert telemetry.foreign_processes == (None if foreign is None else tuple(foreign))
    assert disturbances(telemetry) == [f"foreign process {pid}" for pid in foreign or []]


def test_own_processes_are_by_default_this_one_and_its_children(nvml: FakeNvml) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        nvml.pids = [(child.pid, 0), (os.getppid(), 0)]
        assert Card(0).sample().foreign_processes == (os.getppid(),)
    finally:
        child.communicate(b"\n")


@pytest.mark.parametrize(
    ("visible", "index", "name"),
    [
        (None, 1, "NVIDIA second"),
        ("1,0", 0, "NVIDIA second"),
        ("1,0", 1, "NVIDIA first"),
        ("GPU-b", 0, "NVIDIA second"),
        ("MIG-a1", 0, "NVIDIA first"),
        ("", 0, None),
        ("-1", 0, None),
        ("0", 1, None),
        ("GPU-none", 0, None),
        (None, 7, None),
    ],
)
def test_finds_the_card_that_cuda_sees(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, visible: str | None, index: int, name: str | None
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    described = Card(index).describe()
    assert described["device"] == name
    own = {"NVIDIA first": "GPU-first", "NVIDIA second": "GPU-second"}
    assert described["card"] == (visible if visible and visible.startswith("MIG-") else own.get(str(name)))


def test_unlike_cards_are_told_apart_as_cuda_numbers_them(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_DEVICE_ORDER")
    monkeypatch.setattr(module, "cuda_uuid", {0: "GPU-b"}.get)
    assert Card(0).describe()["device"] == "NVIDIA second"
    monkeypatch.setattr(nvml, "nvmlDeviceGetName", lambda card: "both", raising=False)
    assert Card(0).handle == "first"


def test_where_the_driver_does_not_tell_unlike_cards_apart_all_is_empty(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(index: int) -> str:
        raise OSError

    monkeypatch.delenv("CUDA_DEVICE_ORDER")
    monkeypatch.setattr(module, "cuda_uuid", unknown)
    assert set(Card(0).describe().values()) == {None}


@pytest.mark.cuda
def test_the_driver_and_pytorch_mean_the_same_card() -> None:
    assert module.cuda_uuid(0) == f"GPU-{torch.cuda.get_device_properties(0).uuid}"


def test_each_unsupported_query_is_empty_and_spoils_no_other(nvml: FakeNvml) -> None:
    nvml.pids = [(os.getpid(), 0)]
    whole, described = Card(0).sample(), Card(0).describe()
    assert None not in astuple(whole)
    assert None not in described.values()
    for query in [name for name in dir(nvml) if name.startswith(("nvmlDeviceGet", "nvmlSystemGet"))]:
        nvml.refused = {query}
        sample, description = Card(0).sample(), Card(0).describe()
        assert all(new in (old, None) for new, old in zip(astuple(sample), astuple(whole), strict=True))
        assert all(description[key] in (described[key], None) for key in described)
        if "Handle" not in query and "Count" not in query:
            lost = [*astuple(sample), *description.values()].count(None)
            two = "MaxClock" in query or "RunningProcesses" in query  # who else is there, and how much they take
            assert lost == (4 if query == "nvmlDeviceGetClockInfo" else 1 + two), query


def test_without_nvml_all_is_empty(monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml) -> None:
    nvml.refused = {"nvmlInit"}
    assert Card(0).sample() == Telemetry()
    assert set(Card(0).describe().values()) == {None}
    monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it fails
    assert Card(0).sample() == Telemetry()
    assert disturbances(Telemetry()) == flags(Telemetry()) == []


@pytest.mark.cuda
def test_reads_a_real_card() -> None:
    with Card(0) as card:
        telemetry, described = card.sample(), card.describe()
    assert described["device"]
    assert telemetry.sm_clock_mhz
    assert telemetry.sm_clock_mhz <= described["sm_clock_max_mhz"]
    assert telemetry.temperature_c
    assert telemetry.throttle_reasons is not None


def test_how_much_of_the_sms_others_take_is_told_where_nvml_does(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the newest sample of each process since the last look."""
    nvml.pids = [(os.getpid(), 0)]
    assert Card(0).sample().foreign_sm_percent == 0
    nvml.pids = [(os.getpid(), 0), (2**22 + 1, 0), (2**22 + 2, 0)]
    assert Card(0).sample().foreign_sm_percent is None  # as NVML does not tell
    asked = []

    def used(card: str, since: int) -> list[SimpleNamespace]:
        asked.append(since)
        rows = [(os.getpid(), 90, 7), (2**22 + 1, 10, 5), (2**22 + 1, 40, 6), (2**22 + 2, 5, 6)]
        return [SimpleNamespace(pid=pid, smUtil=share, timeStamp=at) for pid, share, at in rows]

    monkeypatch.setattr(nvml, "nvmlDeviceGetProcessUtilization", used, raising=False)
    card = Card(0)
    assert card.sample().foreign_sm_percent == 45
    card.sample()
    assert asked == [0, 7]
