"""Findings as data: what came out, under which condition, how sure it is, and what would settle it.

They hold numbers, names and states; `wording` alone makes sentences of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from qwen3bench.record.states import Verdict
from qwen3bench.reporting.lookup import AVERAGE


class Kind(StrEnum):
    """What a finding is about; the order is that in which findings are read."""

    MISSING = "missing"
    FAILURE = "failure"
    CONTROL = "control"
    ANSWER = "answer"
    SCREEN = "screen"
    TOGETHER = "together"
    IDLE = "idle"
    SWITCH = "switch"
    UNTOLD = "untold"
    INTERACTION = "interaction"
    MEMORY = "memory"
    PEER = "peer"
    UNDECIDED = "undecided"
    REGIME = "regime"
    DEPENDENT = "dependent"


class Level(StrEnum):
    """A warning limits what the other findings are worth."""

    PLAIN = "plain"
    WARNING = "warning"


class NoVerdict(StrEnum):
    """What is said where the analysis has no verdict: no interval, or two copies of the baseline as far apart.

    `IDLE`: of a switch that changes nothing that runs, where no difference is shown.
    """

    MISSING = "missing"
    NOISE = "noise"
    IDLE = "changes nothing"


class NoAnswer(StrEnum):
    """Why no cell is recommended."""

    NO_BASELINE = "no_baseline"
    NOISY = "noisy"
    NO_BLOCK = "no_block"
    NOTHING_FITS = "nothing_fits"
    MEMORY_UNKNOWN = "memory_unknown"
    NOTHING_FASTER = "nothing_faster"


class Lack(StrEnum):
    """What a run does not hold."""

    END = "end"
    LATENCY = "latency"
    CELLS = "cells"
    LINES = "lines"
    EFFECTS = "effects"
    ONE_BAND = "one_band"


@dataclass(frozen=True)
class Effect:
    """One term's effect on latency with its interval and verdict."""

    term: str
    estimate: float
    lo: float
    hi: float
    verdict: str


@dataclass(frozen=True)
class Advice:
    """What to add to the command for an answer, and how long that run takes; None where the record cannot tell.

    No settings where it takes too long for anybody to wait. `reach`: the half-width, as a part of the estimate, that a
    run of ten minutes gives instead; None where the run has taken longer.
    """

    settings: tuple[str, ...]
    seconds: float | None = None
    reach: float | None = None


@dataclass(frozen=True)
class Times:
    """A cell's latency beside the baseline's."""

    latency_s: float
    baseline_s: float = math.nan
    tokens_per_s: float = math.nan
    peak_bytes: float = math.nan
    parameter_bytes: float = math.nan


@dataclass(frozen=True)
class Choice:
    """Of a recommendation: which cells are as fast, and of which more that is not known; or why there is none.

    `by_memory`: of those as fast, the one with the least memory was chosen; else that with the fewest switches, as some
    cell's memory is not known. `more_bytes`: what the others take more at least. `smallest` and its `smallest_bytes`:
    of cells that do not fit within `limit_gib`.
    """

    none: NoAnswer | None = None
    times: Times | None = None
    alike: tuple[str, ...] = ()
    by_memory: bool = False
    more_bytes: float = math.nan
    unsure: tuple[str, ...] = ()
    limit_gib: float | None = None
    smallest: str = ""
    smallest_bytes: float = math.nan


@dataclass(frozen=True)
class Beside:
    """Of a main effect: what the other switches do, and what the estimate takes for granted or why there is none."""

    others: str = AVERAGE
    reason: str = ""


@dataclass(frozen=True)
class Fitted:
    """Of a screen: cells measured, of how many, and what main effects and pairs leave over (`rms`, of log latency).

    `matters`: whether it is shown, and large enough to act on; None where there is no test.
    """

    cells: int
    every: int
    rms: float
    p: float
    matters: bool | None


@dataclass(frozen=True)
class BestCell:
    """The cell that a screen predicts to be fastest of all, and that as measured: in the screen itself or since.

    `missed`: cells that read otherwise than predicted; `still_missed`: the last of the `rounds` had some, or
    this cell is one. `tested`: whether the intervals of the cell are narrow enough to tell.
    """

    every: int
    predicted: Effect
    measured: Effect | None
    in_screen: bool
    rounds: int
    missed: tuple[str, ...] = ()
    still_missed: bool = False
    tested: bool = True

    @property
    def held(self) -> bool | None:
        """Whether the last predictions hold; None where that cannot be told."""
        if self.measured is None or not (self.tested or self.still_missed):
            return None
        return not self.still_missed


@dataclass(frozen=True)
class Pair:
    """The switch of a pair that is worth less, with the other one on and off."""

    small: str
    large: str
    with_it: Effect
    without: Effect


@dataclass(frozen=True)
class Saving:
    """Bytes of peak memory that a switch saves, and whether latency is shown to stay the same.

    `others`: what the other switches do meanwhile, in words; empty where it is an average over them.
    """

    saved_bytes: float
    free: bool
    others: str = ""


@dataclass(frozen=True)
class LogitsAtPeak:
    """Of the peak memory that every cell has at the logits of all positions: their bytes, and what is no parameters."""

    logits_bytes: float
    beside_parameters: float


@dataclass(frozen=True)
class Against:
    """What a cell is compared with: the fastest of `best_of` other implementations, or what is the only one."""

    other: str
    best_of: int = 1


@dataclass(frozen=True)
class OpenEffects:
    """Effects without a verdict, `pairs` where they are interactions; `blind` where one block gives no interval."""

    effects: tuple[Effect, ...]
    pairs: bool = False
    blind: bool = False


@dataclass(frozen=True)
class Failed:
    """Cells that failed alike, where, and the reason of the first; `reasons` counts the different ones."""

    cells: tuple[str, ...]
    where: tuple[str, ...] = ()
    reason: str = ""
    reasons: int = 1


@dataclass(frozen=True)
class Missing:
    """What is missing: `names` of it, out of `total`."""

    lack: Lack
    names: tuple[str, ...] = ()
    total: int = 0


@dataclass(frozen=True)
class Idle:
    """Of a switch that changes nothing that runs: in how many pairs of cells that was seen."""

    pairs: int


class Check(StrEnum):
    """A control of a run."""

    EQUIVALENCE = "equivalence"
    GRADIENTS = "gradients"
    VERIFIED = "verified"
    AA = "aa"
    TIE_LATENCY = "tie_latency"
    TIE_MEMORY = "tie_memory"
    DRIFT = "drift"
    PROCESSES = "processes"
    ONE_PROCESS = "one_process"
    FLAGGED = "flagged"
    LEFT_OUT = "left_out"
    POWER_CAP = "power_cap"
    HOST = "host"
    NOISY_RUNS = "noisy_runs"


class ControlOutcome(StrEnum):
    """What a control came to; `UNSURE`: no interval, or one that reaches beyond the limit; `TOLD`: it has no limit."""

    PASSED = "passed"
    FAILED = "failed"
    UNSURE = "unsure"
    TOLD = "told"
    ABSENT = "absent"


@dataclass(frozen=True)
class Control:
    """A control's outcome, with what it is about: a limit, a number out of a total, names, or shares of them."""

    check: Check
    outcome: ControlOutcome
    limit: float = math.nan
    number: int = 0
    total: int = 0
    names: tuple[str, ...] = ()
    shares: tuple[float, ...] = ()
    runtime: str = ""


@dataclass(frozen=True)
class Passed:
    """How many controls passed, of how many that have a limit, and how many of these are unsure."""

    passed: int
    held: int
    unsure: int = 0


@dataclass(frozen=True)
class Regime:
    """A switch over the conditions of several runs: how many there are by verdict, and the ends of those decided."""

    total: int
    faster: tuple[Effect, ...] = ()
    slower: tuple[Effect, ...] = ()
    same: int = 0
    undecided: int = 0
    noise: int = 0
    idle: int = 0
    others: str = AVERAGE


Detail = (
    Times
    | Choice
    | Beside
    | Fitted
    | BestCell
    | Pair
    | Saving
    | LogitsAtPeak
    | Against
    | OpenEffects
    | Failed
    | Missing
    | Idle
    | Control
    | Passed
    | Regime
    | None
)


@dataclass(frozen=True)
class Finding:
    """One finding: of a term or cell (`subject`), under a condition, with its estimate, interval and verdict.

    `detail` is what else its sentence needs; `width` the half-width of the band that its verdict knows; `run` the run's
    number on a page over several.
    """

    kind: Kind
    subject: str = ""
    condition: str = ""
    estimate: float = math.nan
    lo: float = math.nan
    hi: float = math.nan
    verdict: str = ""
    detail: Detail = None
    advice: Advice | None = None
    level: Level = Level.PLAIN
    width: float = 0.01
    noisy: bool = False
    run: int = 0


def undecided_by_holm(effect: Finding | Effect) -> bool:
    """Whether an effect is undecided though its interval leaves out 1: verdicts are corrected, intervals are not."""
    return effect.verdict == Verdict.UNDECIDED and (effect.lo > 1 or effect.hi < 1)


def verdict_of(lo: float, hi: float, width: float) -> Verdict | NoVerdict:
    """Verdict on a cell's speed-up from its interval: same inside 1 ± width, faster above 1, slower below."""
    if not lo <= hi:  # there is no interval
        return NoVerdict.MISSING
    if 1 - width <= lo and hi <= 1 + width:
        return Verdict.SAME
    return Verdict.FASTER if lo > 1 else Verdict.SLOWER if hi < 1 else Verdict.UNDECIDED
