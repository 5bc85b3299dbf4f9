"""Which switches changed nothing of what ran."""

from __future__ import annotations

from collections.abc import Mapping

from qwen3bench.record.design import cell_of, is_peer, label
from qwen3bench.record.messages import Evidence

PARTLY_SEEN = ("generate",)  # workloads of whose steps the last alone was looked at


def compare_effective(evidence_by_cell: Mapping[str, Evidence]) -> dict[str, list[str]]:
    """Notes on switches without effect on what ran, by cell label, for one workload and runtime.

    A switch is without effect in a cell that ran the same kernels as often, over the same storage, as the
    cell without it. Cells whose kernels no profile shows, and cells without such a neighbor, get no note.
    """
    notes: dict[str, list[str]] = {}
    for name, evidence in evidence_by_cell.items():
        if is_peer(name) or not evidence.kernels:
            continue
        cell = cell_of(name)
        for factor in cell:
            without = label(tuple(other for other in cell if other != factor))
            if without in evidence_by_cell and _same_work(evidence, evidence_by_cell[without]):
                notes.setdefault(name, []).append(f"{factor} changed nothing that ran: same kernels as {without}")
    return notes


def idle_switches(evidence_by_cell: Mapping[str, Evidence]) -> dict[str, int]:
    """Switches that change nothing that runs wherever it can be seen: in how many pairs of cells, in one condition.

    The two cells of a pair differ in the switch alone. They ran the same kernels as often, over the same storage, and
    what came out is equal bit for bit. A switch without such a pair is not among them.
    """
    pairs: dict[str, list[bool]] = {}
    for name, evidence in evidence_by_cell.items():
        cell = () if is_peer(name) else cell_of(name)
        for factor in cell:
            other = evidence_by_cell.get(label(tuple(each for each in cell if each != factor)))
            if other is not None:
                seen = bool(evidence.kernels) and evidence.output is not None and evidence.output == other.output
                pairs.setdefault(factor, []).append(seen and _same_work(evidence, other))
    return {factor: len(alike) for factor, alike in pairs.items() if all(alike)}


def by_switch(idle: Mapping[str, Mapping[str, int]]) -> dict[tuple[str, int], list[str]]:
    """The conditions in which a switch changes nothing in so many pairs of cells; `idle`: switches by condition."""
    places: dict[tuple[str, int], list[str]] = {}
    for condition, switches in idle.items():
        for told in switches.items():
            places.setdefault(told, []).append(condition)
    return places


def _same_work(one: Evidence, other: Evidence) -> bool:
    return (one.kernels, one.attention_backend, one.tied_storage) == (
        other.kernels,
        other.attention_backend,
        other.tied_storage,
    )
