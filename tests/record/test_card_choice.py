from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from qwen3bench.errors import Refused
from qwen3bench.record import card_choice
from qwen3bench.record.card import Card
from qwen3bench.record.card_choice import PresentCard, chosen_cards, present_cards


class FakeNvml:
    """Three cards, the last one in two parts; the second sits beside the second processor."""

    handles = ("a", "b", "c")

    def nvmlInit(self) -> None:  # noqa: N802
        pass

    nvmlShutdown = nvmlInit  # noqa: N815

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 3

    def nvmlDeviceGetHandleByIndex(self, number: int) -> str:  # noqa: N802
        return self.handles[number]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        return uuid.partition("-")[2]

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, part: str) -> str:  # noqa: N802
        return part[0]

    def nvmlDeviceGetUUID(self, handle: str) -> str:  # noqa: N802
        return f"MIG-{handle}" if len(handle) > 1 else f"GPU-{handle}"

    def nvmlDeviceGetName(self, handle: str) -> str:  # noqa: N802
        return "a part" if len(handle) > 1 else "a card"

    def nvmlDeviceGetPciInfo(self, handle: str) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(busId=f"00000000:{handle.upper()}B:00.0")

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: str) -> int:  # noqa: N802
        return 2 if handle == "c" else 0

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: str, place: int) -> str:  # noqa: N802
        return f"{handle}{place + 1}"


A, B = PresentCard(0, "GPU-a", "a card"), PresentCard(1, "GPU-b", "a card", 1)
PARTS = [PresentCard(2, "MIG-c1", "a part"), PresentCard(2, "MIG-c2", "a part")]


@pytest.fixture(autouse=True)
def nvml(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(card_choice, "PCI", tmp_path)
    for bus, node in (("0000:ab:00.0", "-1"), ("0000:bb:00.0", "1")):
        (tmp_path / bus).mkdir()
        (tmp_path / bus / "numa_node").write_text(f"{node}\n")


def test_all_cards_are_there_and_one_in_parts_by_its_parts() -> None:
    assert present_cards() == [A, B, *PARTS]


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        (("all",), [A, B, *PARTS]),
        (("1", "0"), [B, A]),
        (("GPU-b", "1"), [B]),
        (("MIG-c2",), PARTS[1:]),
        (("2",), PARTS),
    ],
)
def test_cards_are_named_by_number_and_uuid(asked: tuple[str, ...], found: list[PresentCard]) -> None:
    assert chosen_cards(asked) == found


@pytest.mark.parametrize(("visible", "found"), [("1", [B]), ("GPU-a,MIG-c1", [A, PARTS[0]]), ("", [])])
def test_all_are_those_that_cuda_may_see(
    monkeypatch: pytest.MonkeyPatch, visible: str, found: list[PresentCard]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert present_cards() == found


def test_one_that_is_not_there_is_refused_with_those_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Refused, match=r"devices=7: there is no such card; there are 0 \(GPU-a\), 1 \(GPU-b\)"):
        chosen_cards(("0", "7"))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(Refused, match="devices=all: NVML finds no card here; leave devices out"):
        chosen_cards(("all",))


def test_a_card_is_read_by_its_uuid_whatever_cuda_may_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert Card(uuid="GPU-b").describe()["card"] == "GPU-b"
    assert Card(uuid="MIG-c1").describe()["card"] == "MIG-c1"
    assert Card(uuid="MIG-c1").handle == "c"
