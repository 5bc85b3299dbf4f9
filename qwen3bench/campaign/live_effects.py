"""The effects of a run so far, for the terminal while it measures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np
import pandas as pd

from qwen3bench.analysis.effects import effects
from qwen3bench.analysis.frames import block_matrix, factor_columns
from qwen3bench.campaign.state import Timing, Where
from qwen3bench.config.settings import Settings
from qwen3bench.record.design import BASELINE, is_peer
from qwen3bench.record.lines import SampleLine
from qwen3bench.reporting.lookup import rows
from qwen3bench.reporting.terminal import Estimate, effect_lines

_COLUMNS = ["cell", "copy", "block", "process", "latency_s"]
_Told = dict[str, Estimate | None]


class LiveEffects:
    """A table of main effects, or of speed-ups where the cells tell no main effect; one column for each condition."""

    def __init__(self, settings: Settings, timings: Mapping[Where, Timing]) -> None:
        self._settings = settings
        self._timings = timings
        self._known = {where: _Known() for where in timings}

    def lines(self, width: int) -> list[str]:
        """The table as it stands."""
        for where, timing in self._timings.items():
            known = self._known[where]
            if known.taken < len(timing.samples):
                known.visits += _visits(timing.samples[known.taken :])
                known.taken = len(timing.samples)
                known.told = estimates(pd.DataFrame(known.visits, columns=_COLUMNS), self._settings)
        told = {" ".join(where): known.told for where, known in self._known.items()}
        names = dict.fromkeys(name for of_where in told.values() for name in of_where)
        table = {name: [of_where.get(name) for of_where in told.values()] for name in names}
        return effect_lines(table, list(told), width, unknown="not known yet") if table else []


@dataclass
class _Known:
    """What the first `taken` samples of a workload and runtime tell."""

    taken: int = 0
    visits: list[tuple[str, int, int, int, float]] = field(default_factory=list)
    told: _Told = field(default_factory=dict)


def _visits(samples: Sequence[SampleLine]) -> list[tuple[str, int, int, int, float]]:
    """One median for each visit."""
    values: dict[tuple[str, int, int, int], list[float]] = {}
    for each in samples:
        values.setdefault((each.cell, each.copy, each.block, each.process), []).append(each.latency_s)
    return [(*key, median(latencies)) for key, latencies in values.items()]


def estimates(visits: pd.DataFrame, settings: Settings) -> _Told:
    """Each switch's main effect with its interval, else each cell's speed-up; None while there is no interval.

    `visits` has the columns `cell`, `copy`, `block`, `process` and `latency_s`.
    """
    factors = settings.factors
    ours = visits[~visits["cell"].map(is_peer).astype(bool)]
    if factors:
        codes = factor_columns(ours["cell"].tolist(), factors)
        coded = ours.assign(**{name: codes[name].to_numpy() for name in factors})
        found = effects(coded, factors, block="block", band=settings.band, confidence=settings.confidence)
        main = found[found["kind"] == "main"]
        if main["estimate"].notna().any():
            return {row.term: _estimate(row.estimate, row.lo, row.hi) for row in rows(main)}
    blocks = block_matrix(visits)
    others = [cell for cell in settings.labels if cell in blocks.log_s and cell != BASELINE]
    if not others or BASELINE not in blocks.log_s:
        return {}
    ratios = blocks.log_ratios(BASELINE, others)
    half = ratios.half_width(settings.confidence)
    bounds = zip(others, ratios.estimate, ratios.estimate - half, ratios.estimate + half, strict=True)
    return {cell: _estimate(*(float(np.exp(value)) for value in logs)) for cell, *logs in bounds}


def _estimate(value: float, lo: float, hi: float) -> Estimate | None:
    """Without a verdict, which only the whole run has."""
    return (float(value), float(lo), float(hi), "") if all(map(math.isfinite, (value, lo, hi))) else None
