"""Whether all cells of a run are ready at once in a card's memory, and how many are where not all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from qwen3bench.config.settings import Settings
from qwen3bench.errors import UserError
from qwen3bench.record.messages import PeakMemory
from qwen3bench.record.screen import MOST, RESOLUTIONS, Wish, screen
from qwen3bench.reporting.units import count, size


@dataclass(frozen=True)
class Room:
    """What the graphs of all cells need of a card in one process, in bytes, and how many cells fit.

    `shared_bytes` is the peak of the largest cell, and what training restores weights from: weights, cache and working
    memory are the same for all. `graph_bytes` is what each further cell takes: its CUDA graphs.
    """

    shared_bytes: int
    graph_bytes: int

    def needed_bytes(self, cells: int) -> int:
        """What so many cells need at once."""
        return self.shared_bytes + cells * self.graph_bytes

    def fitting(self, card_bytes: int, context_bytes: int) -> int:
        """How many cells fit a card beside the process's context."""
        return max(0, int((card_bytes - context_bytes - self.shared_bytes) // self.graph_bytes))


def room_of(memory: Mapping[str, PeakMemory], cells: Sequence[str]) -> Room | None:
    """The least room that these cells need, by the memory of each alone; None where that is not known of graphs.

    Graphs are told by the card's free memory, which processes beside it change up and down. So the lower quartile
    counts: a size that would fit is not refused, and one that does not is seen when cells get ready.
    """
    known = [memory[cell] for cell in cells if cell in memory]
    graphs = sorted(each.graph_bytes for each in known if each.graph_bytes is not None)
    if not graphs or not graphs[len(graphs) // 4]:
        return None
    # AdamW's state is two copies of the weights; a run keeps a third, from which every visit starts.
    peaks = [(each.peak_allocated_bytes or 0) + (each.optimizer_bytes or 0) // 2 for each in known]
    return Room(max(peaks), graphs[len(graphs) // 4])


def too_many(settings: Settings, where: tuple[str, str], cells: int, fitting: int, why: str) -> UserError:
    """The error of a run whose cells are not ready at once, with the size that fits. `why` ends its first sentence."""
    many = f"{count(cells, 'cell')} of {settings.model.name} in {', '.join(where)}"
    fits = "none fits" if fitting < 1 else f"about {fitting} {'fits' if fitting == 1 else 'fit'}"
    return UserError(f"{many} {why}\n{fits}: {_mend(settings, fitting - 1)}")  # the baseline is ready twice


def needs(needed_bytes: int, card_bytes: int) -> str:
    """How much cells need, and what there is."""
    return f"need {size(needed_bytes)} at once, and this card has {size(card_bytes)}"


def _mend(settings: Settings, most: int) -> str:
    """What to ask for where at most so many different cells are ready at once."""
    factors = settings.factors
    if most < 2:
        return "lower batch_size or prompt_tokens, or take a smaller model"
    if len(factors) <= MOST:
        for resolution in RESOLUTIONS:
            with suppress(UserError):  # there is none for these switches
                if len(screen(factors, settings.rules, Wish(None, resolution)).cells) <= most:
                    wished = f" design.resolution={resolution}" if resolution != RESOLUTIONS[0] else ""
                    return f"design=screen{wished}"
                if resolution == RESOLUTIONS[0]:
                    screen(factors, settings.rules, Wish(most, resolution))
                    return f"design=screen design.cells={most}"
    if most > len(factors):
        return "design=each, or name fewer switches with opt="
    return "design=pair, or name fewer switches with opt="
