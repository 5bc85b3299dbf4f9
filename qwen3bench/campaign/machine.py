"""What a run is measured with: the cards, and how a worker is started on each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qwen3bench.campaign.cluster import HostedCard
from qwen3bench.campaign.worker_pool import StartWorker
from qwen3bench.campaign.worker_process import WorkerProcess
from qwen3bench.config.settings import Settings
from qwen3bench.errors import Refused
from qwen3bench.record.card import Card
from qwen3bench.record.card_choice import chosen_cards


@dataclass(frozen=True)
class UsedCard:
    """A card that a run uses: how a worker is started on it, its state, UUID, kind and the processor beside it.

    `host` is the name of its machine, where that may be another one.
    """

    start: StartWorker
    monitor: Card
    uuid: str | None = None
    kind: str = ""
    socket: int = 0
    host: str | None = None

    @property
    def title(self) -> str:
        """What a person calls it."""
        return " of ".join([f"card {self.uuid}" if self.uuid else "the CPU", *([self.host] if self.host else [])])


@dataclass(frozen=True)
class Machine:
    """What a run is measured with: how a worker is started, and the card, found by the device's name where None.

    `cards`: several instead, in place of those that `devices` names.
    """

    start_worker: StartWorker = WorkerProcess
    card: Card | None = None
    cards: tuple[UsedCard, ...] = ()

    def used(self, settings: Settings) -> tuple[UsedCard, ...]:
        """The cards of a run. Raises `Refused` where it names one that is not there, or names them twice."""
        if self.cards:
            return self.cards
        if not settings.devices:
            return (UsedCard(self.start_worker, self.card or Card.of(settings.device)),)
        if settings.device not in ("auto", "cuda"):
            raise Refused(f"devices and device={settings.device} both say where to measure; leave one out")
        return tuple(
            UsedCard(_starts_on(card.uuid), Card(uuid=card.uuid), card.uuid, card.name, card.socket)
            for card in chosen_cards(settings.devices)
        )


def _starts_on(uuid: str) -> StartWorker:
    """Starts workers that see one card alone: CUDA and NVML number cards unlike, and know them by UUID both."""
    return lambda log: WorkerProcess(log, variables={"CUDA_VISIBLE_DEVICES": uuid})


def of_cluster(cards: Sequence[HostedCard]) -> tuple[UsedCard, ...]:
    """The cards of a cluster, the processors beside them numbered over all machines; on a CPU each is its own."""
    beside = [(each.seen.host, each.seen.socket if each.seen.uuid else place) for place, each in enumerate(cards)]
    numbers = {processor: number for number, processor in enumerate(dict.fromkeys(beside))}
    return tuple(
        UsedCard(each.start, each, each.seen.uuid, socket=numbers[processor], host=each.seen.host)
        for each, processor in zip(cards, beside, strict=True)
    )
