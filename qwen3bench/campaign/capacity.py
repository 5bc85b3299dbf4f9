"""How many processes work side by side on the cards of a run: as many as cores and memory have room for."""

from __future__ import annotations

from dataclasses import dataclass

from qwen3bench.campaign.context import RunContext
from qwen3bench.campaign.looks import MAX_AT_ONCE, most_at_once
from qwen3bench.campaign.room import needs, room_of, too_many
from qwen3bench.record.design import BASELINE
from qwen3bench.record.host import usable_cpus

CONTEXT_BYTES = 2**30  # what a process needs of a card beside its tensors (CUDA's context, libraries), rounded up
_GATE_BYTES = 50  # of a card for each number of the embedding: 7.9 GB were seen of qwen3-0.6b at 1 × 2048
_MAX_READY = 10  # processes that get ready to time side by side: five of each of two workloads
_CORES_EACH_READY = 1.5  # of these: launching, capturing and the driver's thread
_ALONE = 3  # times its weights: what a cell that is looked at alone may need
_SLACK = 1.5  # times the peak of a cell alone: what the allocator's gaps may need
_TRAINED = 2  # times it: a graph's step, and beside it the step that goes before the next cell's capture
_KEPT = 1.5  # times AdamW's two moments: copies of them and of the weights, from which visits begin


@dataclass(frozen=True)
class Capacity:
    """The room on the cards of a run, by what is known of its cells so far.

    `card_bytes`: the memory of one card, where it is known.
    """

    context: RunContext
    card_bytes: int | None = None

    @property
    def cards(self) -> int:
        """How many cards there are to work on."""
        return self.context.cards()

    @property
    def on_gpus(self) -> bool:
        """Whether these cards are GPUs; a CPU is shared by all processes, so that one works at a time."""
        return self.context.settings.device.startswith("cuda")

    @property
    def looking(self) -> int:
        """How many processes may look at cells."""
        if not self.on_gpus:
            return self.cards
        model = self.context.settings.model
        gate_bytes = _GATE_BYTES * model.vocab_size * model.emb_dim
        fit = int(self.card_bytes / gate_bytes) if self.card_bytes else MAX_AT_ONCE
        return most_at_once(usable_cores(), self.cards, fit)

    @property
    def cells(self) -> int:
        """How many cells with weights of their own the cards hold."""
        each = self.context.state.parameter_bytes
        if not (self.card_bytes and each):
            return self.looking
        return int(self.card_bytes / (_ALONE * each + CONTEXT_BYTES)) * self.cards

    @property
    def ready_by_cores(self) -> int:
        """How many processes the cores have time for that get ready to time."""
        most = min(_MAX_READY * self.cards, int(usable_cores() / _CORES_EACH_READY)) if self.on_gpus else 0
        return max(self.cards, most)

    @property
    def ready(self) -> int:
        """How many processes may get ready on each card, which then holds all cells of a workload for each."""
        state = self.context.state
        peak = state.peak_reserved_bytes
        if not (self.card_bytes and peak):
            return 1
        most = self.ready_by_cores // self.cards
        rooms = ((room_of(known, list(known)), len(known)) for known in state.memory.values())
        graphs = max((room.graph_bytes * cells for room, cells in rooms if room), default=0)
        moments = state.optimizer_bytes
        each = (_TRAINED if moments else _SLACK) * peak + _KEPT * moments + graphs + CONTEXT_BYTES
        return max(1, min(most, int(self.card_bytes / each)))

    def refuse_what_does_not_fit(self) -> None:
        """Raise `UserError` where a card cannot hold all cells of a workload ready at once, with how many it can."""
        state, settings = self.context.state, self.context.settings
        for where in state.timings:
            cells = [each for each in self.context.cells(where) if each in state.memory.get(where, {})]
            room = room_of(state.memory.get(where, {}), cells)
            if room and self.card_bytes:
                ready = len(cells) + (BASELINE in cells)
                needed = room.needed_bytes(ready)
                if needed > self.card_bytes:
                    fitting = room.fitting(self.card_bytes, CONTEXT_BYTES)
                    raise too_many(settings, where, ready, fitting, needs(needed, self.card_bytes))


def usable_cores() -> int:
    """How many cores this process may run on."""
    return len(usable_cpus())
