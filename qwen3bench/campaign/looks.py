"""The steps that look at single cells of a run, and how they are shared out among processes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from qwen3bench.config.settings import Settings
from qwen3bench.record.design import Cell, design_cells, label, neighbours
from qwen3bench.record.messages import CollectEvidence, MeasureMemory, Request, Verify, VerifyGradients

_MIN_SHARE = 4  # cells; fewer are looked at before another process has started
MAX_AT_ONCE = 8  # processes that look at cells side by side: each computes the gate's reference anew
_CORES_EACH = 2  # of these: most of their time goes to compiling kernels on the CPU


def most_at_once(cores: int, cards: int, fit: int = MAX_AT_ONCE) -> int:
    """How many processes look at cells side by side on GPUs, each of which has memory for `fit`."""
    return max(cards, min(min(MAX_AT_ONCE, fit) * cards, cores // _CORES_EACH))


def processes(cells: int, at_once: int) -> int:
    """How many processes so many cells are shared out to."""
    return math.ceil(cells / _share(cells, at_once))


def _share(cells: int, at_once: int) -> int:
    return max(_MIN_SHARE, math.ceil(cells / at_once))


def compared(settings: Settings) -> list[Cell]:
    """Cells that are looked at though they are not measured: what a switch changed is told by the cell without it.

    Of a screen each switch alone, and all but each: enough to see one that changes nothing anywhere.
    """
    if settings.design != "screen":
        return neighbours(settings.cells)
    cells = settings.cells
    corners = [*design_cells("each", settings.factors), *design_cells("leave_one_out", settings.factors)]
    return [cell for cell in dict.fromkeys(corners) if cell not in cells and settings.rules.allow(cell)]


def looks(settings: Settings, wheres: Iterable[tuple[str, str]], beside: Iterable[Cell]) -> list[Request[Any]]:
    """Peak memory, then evidence of what has just run there, so that a cell is built and compiled once for both.

    `settings` are resolved. Of each workload and runtime; of the cells `beside` those measured, evidence alone.
    """
    steps: list[Request[Any]] = []
    others = [label(cell) for cell in beside]
    for workload, runtime in wheres:
        for cell in settings.labels:
            if settings.device.startswith("cuda"):
                steps.append(MeasureMemory(cell=cell, workload=workload, runtime=runtime))
            steps.append(CollectEvidence(cell=cell, workload=workload, runtime=runtime))
        if runtime != "compile":  # where a cell takes seconds to compile
            steps += [CollectEvidence(cell=cell, workload=workload, runtime=runtime) for cell in others]
    return steps


def shared_out(steps: Iterable[Request[Any]], factors: Sequence[str], at_once: int) -> list[list[Request[Any]]]:
    """The steps of each process: those of a cell together, cells that share the last switches together.

    The first switches are `flash`, on and off in each process: fused attention plans each shape when it first comes, so
    where half of the processes had it they took nearly twice as long as the others. The gates' verdicts come first, as
    their weights go before a cell is alone.
    """
    of_cells: dict[str, list[Request[Any]]] = {}
    for step in steps:
        of_cells.setdefault(step.cell, []).append(step)  # type: ignore[attr-defined]
    cells = list(of_cells)
    size = _share(len(cells), at_once)
    if len(cells) > size:
        cells.sort(key=lambda cell: [name not in cell.split("+") for name in reversed(factors)])
    shares = [cells[start : start + size] for start in range(0, len(cells), size)]
    gates = Verify | VerifyGradients
    return [
        sorted((step for cell in share for step in of_cells[cell]), key=lambda step: not isinstance(step, gates))
        for share in shares
    ]
