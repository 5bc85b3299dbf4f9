"""Which cards of this machine a run uses: all, or those named by their numbers or UUIDs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3bench.errors import Refused

ALL = "all"
PCI = Path("/sys/bus/pci/devices")


@dataclass(frozen=True)
class PresentCard:
    """A card of this machine, or a part of one (MIG).

    `number` is nvidia-smi's, that of the whole card; `socket` the processor beside it, 0 where that is unknown.
    """

    number: int
    uuid: str
    name: str
    socket: int = 0


def present_cards() -> list[PresentCard]:
    """The cards that this process may use, by CUDA_VISIBLE_DEVICES; a card in parts by its parts. None without NVML."""
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            found = [*_present(pynvml)]
        finally:
            pynvml.nvmlShutdown()
    except Exception:  # no NVML, no driver
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return found
    names = {name.strip() for name in visible.split(",")}
    return [card for card in found if card.uuid in names or str(card.number) in names]


def chosen_cards(asked: Sequence[str]) -> list[PresentCard]:
    """The cards that are asked for (`all`, numbers, UUIDs), each once, in that order.

    Raises `Refused` where there is none, or one that is named is not there.
    """
    present = present_cards()
    known = ", ".join(f"{card.number} ({card.uuid})" for card in present)
    chosen: dict[PresentCard, None] = {}
    for name in asked:
        named = [card for card in present if name in (ALL, card.uuid, str(card.number))]
        if not named:
            if not known:
                raise Refused(f"devices={name}: NVML finds no card here; leave devices out to run where PyTorch can")
            raise Refused(f"devices={name}: there is no such card; there are {known}")
        chosen |= dict.fromkeys(named)
    return [*chosen]


def _present(nvml: Any) -> Iterator[PresentCard]:
    for number in range(nvml.nvmlDeviceGetCount()):
        whole = nvml.nvmlDeviceGetHandleByIndex(number)
        socket = _socket(nvml, whole)
        for handle in _parts(nvml, whole) or [whole]:
            yield PresentCard(number, nvml.nvmlDeviceGetUUID(handle), nvml.nvmlDeviceGetName(handle), socket)


def _parts(nvml: Any, whole: Any) -> list[Any]:
    """The parts of a card under MIG."""
    parts = []
    try:
        for place in range(nvml.nvmlDeviceGetMaxMigDeviceCount(whole)):
            parts.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(whole, place))
    except Exception:  # no MIG here, or no part in this place
        return parts
    return parts


def _socket(nvml: Any, card: Any) -> int:
    """The number of the memory node beside a card, by the kernel; 0 where it is unknown."""
    try:
        bus = nvml.nvmlDeviceGetPciInfo(card).busId
        bus = (bus.decode() if isinstance(bus, bytes) else bus).lower()
        return max(0, int((PCI / bus[-12:] / "numa_node").read_text()))
    except Exception:  # unknown: all are taken to be beside one
        return 0
