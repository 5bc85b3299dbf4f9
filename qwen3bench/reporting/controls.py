"""Controls in words: is the machine quiet enough, and does the negative control read as nothing?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwen3bench.reporting.conditions import Condition

if TYPE_CHECKING:
    from qwen3bench.analysis.run import Run


@dataclass(frozen=True)
class Control:
    """One control's outcome in words."""

    text: str
    failed: bool


def sentences(run: Run) -> list[Control]:
    """Outcome of every control that the run holds."""
    return []


def caveat(run: Run, condition: Condition) -> str:
    """What limits every number of a condition, to be set behind a sentence; empty where nothing does."""
    return ""
