"""The effects of a run so far, for the terminal while it measures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import median

import numpy as np
import pandas as pd
from scipy import special

from qwen3bench.analysis.cell_table import NoWholeBlockError
from qwen3bench.analysis.contrasts import contrasts
from qwen3bench.analysis.effects import effects
from qwen3bench.analysis.frames import block_matrix, factor_columns
from qwen3bench.campaign.state import Place, RunState, Where
from qwen3bench.config.settings import Settings
from qwen3bench.record.design import BASELINE, is_peer, label
from qwen3bench.record.lines import SampleLine
from qwen3bench.reporting.lookup import rows
from qwen3bench.reporting.terminal import Estimate, effect_lines, effects_line

_COLUMNS = ["cell", "copy", "block", "process", "latency_s"]
_Told = dict[str, Estimate | None]


class LiveEffects:
    """A table of main effects, or of speed-ups where the cells tell no main effect; one column for each condition.

    A cell that failed, be it the gate alone, has no part in it.
    """

    def __init__(self, settings: Settings, state: RunState) -> None:
        self._settings = settings
        self._state = state
        self._known = {where: _Known() for where in state.timings}

    def decided(self, where: Where) -> bool:
        """Whether the interval of each effect there leaves out 1, or lies within the band of `same`."""
        self._take_in()
        told, band = self._known[where].told, self._settings.band
        return bool(told) and all(
            each is not None and (each[1] > 1 or each[2] < 1 or (each[1] >= 1 - band and each[2] <= 1 + band))
            for each in told.values()
        )

    def lines(self, width: int) -> list[str]:
        """The table as it stands."""
        self._take_in()
        told = {" ".join(where): known.told for where, known in self._known.items()}
        names = dict.fromkeys(name for of_where in told.values() for name in of_where)
        table = {name: [of_where.get(name) for of_where in told.values()] for name in names}
        return effect_lines(table, list(told), width, unknown="not known yet") if table else []

    def line(self, where: Where) -> str:
        """The effects in one workload and runtime, as they stand; empty where there is none to tell."""
        self._take_in()
        told = self._known[where].told
        return effects_line(" ".join(where), told) if any(told.values()) else ""

    def _take_in(self) -> None:
        for where, timing in self._state.timings.items():
            known = self._known[where]
            if known.taken < len(timing.samples):
                visits, disturbed = _visits(timing.samples[known.taken :])
                known.visits += visits
                known.disturbed |= disturbed
                known.taken = len(timing.samples)
                sound = [each for each in known.visits if self._state.is_sound(Place(each[0], *where))]
                known.told = estimates(pd.DataFrame(sound, columns=_COLUMNS), self._settings) if sound else {}
                if known.disturbed and len({block for _, _, block, *_ in sound}) == 1:  # the copies' noise is not its
                    known.told = dict.fromkeys(known.told)


@dataclass
class _Known:
    """What the first `taken` samples of a workload and runtime tell."""

    taken: int = 0
    visits: list[tuple[str, int, int, int, float]] = field(default_factory=list)
    disturbed: bool = False  # all values of some visit were
    told: _Told = field(default_factory=dict)


def _visits(samples: Sequence[SampleLine]) -> tuple[list[tuple[str, int, int, int, float]], bool]:
    """One median for each visit, of what was not disturbed where there is some; whether in a visit there was none."""
    values: dict[tuple[str, int, int, int], dict[bool, list[float]]] = {}
    for each in samples:
        of_visit = values.setdefault((each.cell, each.copy, each.block, each.process), {})
        of_visit.setdefault(bool(each.disturbed), []).append(each.latency_s)
    medians = [(*key, median(latencies.get(False) or latencies[True])) for key, latencies in values.items()]
    return medians, any(False not in latencies for latencies in values.values())


def estimates(visits: pd.DataFrame, settings: Settings) -> _Told:
    """Each switch's main effect with its interval, else each cell's speed-up; None while there is no interval.

    `visits` has the columns `cell`, `copy`, `block`, `process` and `latency_s`.
    """
    factors = settings.factors
    if visits["block"].nunique() == 1:
        return _of_one_block(visits, settings)
    ours = visits[~visits["cell"].map(is_peer).astype(bool)]
    if factors:
        codes = factor_columns(ours["cell"].tolist(), factors)
        coded = ours.assign(**{name: codes[name].to_numpy() for name in factors})
        with suppress(NoWholeBlockError):  # as of a damaged record that goes on
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


def _of_one_block(visits: pd.DataFrame, settings: Settings) -> _Told:
    """What a single block tells, where nothing is repeated but the baseline.

    Interactions of three and more are taken for noise, as is customary of an unreplicated factorial (Montgomery,
    Design and Analysis of Experiments, section 6.5). The two copies of the baseline differ by noise alone.
    """
    log_s = {(row.cell, row.copy): math.log(row.latency_s) for row in rows(visits)}
    cells = [cell for cell in settings.cells if (label(cell), 0) in log_s]
    factors = settings.factors
    noise: list[float] = []
    told: dict[str, tuple[float, float]] = {}
    if factors and cells:
        plan = contrasts(factors, tuple(tuple(int(name in cell) for name in factors) for cell in cells))
        size = np.sqrt((plan.matrix**2).sum(axis=1))
        found = plan.matrix @ np.array([log_s[label(cell), 0] for cell in cells])
        higher = [i for i, term in enumerate(plan.terms) if len(term) > 2 and np.isfinite(size[i])]
        noise = [(found[i] / size[i]) ** 2 for i in higher]
        mains = {factors[term[0]]: (-found[i], size[i]) for i, term in enumerate(plan.terms) if len(term) == 1}
        told = mains if np.isfinite([value for value, _ in mains.values()]).any() else {}
    copies = [log_s[BASELINE, copy] for copy in (0, 1) if (BASELINE, copy) in log_s]
    if len(copies) == 2:
        noise.append((copies[0] - copies[1]) ** 2 / 2)
    if not told and (BASELINE, 0) in log_s:
        others = [cell for cell in settings.labels if cell != BASELINE and (cell, 0) in log_s]
        told = {cell: (log_s[BASELINE, 0] - log_s[cell, 0], math.sqrt(2)) for cell in others}
    if not noise:
        return dict.fromkeys(told)
    half = special.stdtrit(len(noise), (1 + settings.confidence) / 2) * math.sqrt(sum(noise) / len(noise))
    return {
        name: _estimate(*(float(np.exp(log)) for log in (value, value - half * width, value + half * width)))
        for name, (value, width) in told.items()
    }


def _estimate(value: float, lo: float, hi: float) -> Estimate | None:
    """Without a verdict, which only the whole run has."""
    return (float(value), float(lo), float(hi), "") if all(map(math.isfinite, (value, lo, hi))) else None
