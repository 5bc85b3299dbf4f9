"""Findings on a screen: whether its model describes the cells, and whether what it predicts to be best is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from qwen3bench.analysis.confirm import MeasuredSpeedup, Prediction
from qwen3bench.analysis.screen_results import ScreenResult
from qwen3bench.analysis.significance import ALPHA
from qwen3bench.reporting.conditions import Condition
from qwen3bench.reporting.finding import BestCell, Effect, Finding, Fitted, Kind, verdict_of
from qwen3bench.reporting.lookup import band

if TYPE_CHECKING:
    from qwen3bench.analysis.run import Run


def screen_of(run: Run, condition: Condition) -> ScreenResult | None:
    """What the screen of a condition tells; None where there is none."""
    where = condition.workload, condition.runtime
    return next((each for each in run.screens if (each.workload, each.runtime) == where), None)


def screened(run: Run, condition: Condition) -> Iterator[Finding]:
    """How far main effects and pairs describe the cells, and what was measured of the predicted best."""
    result = screen_of(run, condition)
    if result is None:
        return
    lack = result.lack
    large = lack.rms >= band(run) / 4  # an interaction of half the band leaves as much
    matters = None if math.isnan(lack.p) else large and lack.p < ALPHA
    fitted = Fitted(result.cells, result.every, lack.rms, lack.p, matters)
    yield Finding(Kind.SCREEN, condition=str(condition), detail=fitted, width=band(run))
    if result.confirmed:
        yield _confirmation(run, condition, result)


def _confirmation(run: Run, condition: Condition, result: ScreenResult) -> Finding:
    rounds = max(each.round for each in result.confirmed)
    best = [each for each in result.confirmed if each.best][-1]
    missed = tuple(dict.fromkeys(each.prediction.cell for each in result.confirmed if each.agrees is False))
    latest = [each for each in result.confirmed if each.round == rounds]
    detail = BestCell(
        every=result.every,
        predicted=_effect(best.prediction.cell, best.prediction, run),
        measured=_effect(best.prediction.cell, best.measured, run) if best.measured else None,
        in_screen=best.round == 0,
        rounds=rounds,
        missed=missed,
        still_missed=any(each.agrees is False for each in latest) or best.prediction.cell in missed,
        tested=best.tested,
    )
    noisy = any(each.noisy and each.round for each in result.confirmed)
    return Finding(Kind.SCREEN, best.prediction.cell, str(condition), detail=detail, width=band(run), noisy=noisy)


def noisy_cells(run: Run, condition: Condition) -> set[str]:
    """Cells that were measured since, in blocks where two copies of the baseline differ too much."""
    result = screen_of(run, condition)
    return {each.prediction.cell for each in result.confirmed if each.noisy and each.round} if result else set()


def _effect(cell: str, found: Prediction | MeasuredSpeedup, run: Run) -> Effect:
    return Effect(cell, found.speedup, found.lo, found.hi, verdict_of(found.lo, found.hi, band(run)))
