"""What findings say: about ten snapshots, and rules that every sentence keeps."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwen3bench.analysis.run import Run, load_run
from qwen3bench.record.states import Verdict
from qwen3bench.reporting.control_findings import control_list
from qwen3bench.reporting.finding import (
    Advice,
    Against,
    Beside,
    Check,
    Choice,
    Control,
    ControlOutcome,
    Effect,
    Failed,
    Finding,
    Idle,
    Kind,
    Lack,
    LogitsAtPeak,
    Missing,
    NoAnswer,
    NoVerdict,
    OpenEffects,
    Pair,
    Regime,
    Saving,
    Times,
)
from qwen3bench.reporting.findings import findings
from qwen3bench.reporting.over_runs import dependent, effects_over, limits, over_findings
from qwen3bench.reporting.wording.ratio_words import worth, worth_said
from qwen3bench.reporting.wording.sentences import FLASH_AND_MASK, METHOD, choice_notes, sentence

REFERENCE = Path(__file__).parents[3] / "results" / "reference"
Lines = list[dict[str, Any]]
PREFILL = "prefill 1×2048 graph"
GAIN = {"estimate": 1.2712, "lo": 1.2653, "hi": 1.2771, "verdict": "faster"}
LOSS = {"estimate": 0.8982, "lo": 0.8965, "hi": 0.8994, "verdict": "slower"}
MORE = Advice(("measure.min_processes=8", "measure.max_seconds=120"), 530.0)


@pytest.mark.parametrize(
    ("alike", "said"),
    [
        (("a+b+c+d", "d", "b+c"), "3 other cells are as fast within ±1 %, d with the fewest switches."),
        (("a+b+c+d", "d+e+f", "b+c+d", "a+b+f"), "4 other cells are as fast within ±1 %: a+b+c+d, d+e+f and 2 more."),
        (("d",), "d is as fast within ±1 %."),
    ],
)
def test_of_cells_as_fast_that_with_the_fewest_switches_is_named(alike: tuple[str, ...], said: str) -> None:
    choice = Choice(times=Times(1.0), alike=alike, by_memory=True, more_bytes=0)
    (note,) = choice_notes(Finding(Kind.ANSWER, "a+b+c", PREFILL, detail=choice), choice)
    assert note == f"{said} {'None saves' if len(alike) > 1 else 'It saves no'} memory."


def half(verdict: str, estimate: float) -> Effect:
    return Effect("mask", estimate, estimate - 0.001, estimate + 0.001, verdict)


SNAPSHOTS = [
    (
        Finding(
            Kind.ANSWER,
            "flash+mask",
            PREFILL,
            **GAIN,
            detail=Choice(times=Times(1.0, peak_bytes=2.0), alike=("flash",), by_memory=True, more_bytes=2**20),
        ),
        "Switch on flash+mask: 1.271× [1.265, 1.277] as fast as the baseline (prefill 1×2048 graph). "
        "flash is as fast within ±1 %. It takes 1.000 MiB more memory.",
    ),
    (
        Finding(Kind.ANSWER, condition=PREFILL, detail=Choice(NoAnswer.NOTHING_FASTER), advice=MORE),
        "No cell is shown to be faster than the baseline (prefill 1×2048 graph). "
        "To tell: measure.min_processes=8 measure.max_seconds=120, in about 9 minutes.",
    ),
    (
        Finding(Kind.TOGETHER, "flash", PREFILL, **LOSS, detail=Times(8.8e-3, 7.9e-3)),
        "flash is 0.898× [0.896, 0.899] as fast as the baseline (prefill 1×2048 graph). "
        "Latency goes from 7.900 ms to 8.800 ms.",
    ),
    (
        Finding(Kind.SWITCH, "norm", PREFILL, **GAIN, detail=Beside()),
        "norm on is 1.271× [1.265, 1.277] as fast as off, on average over the others (prefill 1×2048 graph).",
    ),
    (
        Finding(Kind.SWITCH, "tie", PREFILL, 0.99963, 0.99901, 1.00031, Verdict.SAME, Beside()),
        "tie changes latency by less than ±1 %: 1.000× [0.999, 1.000], on average over the others "
        "(prefill 1×2048 graph).",
    ),
    (
        Finding(
            Kind.INTERACTION, "flash:mask", PREFILL, verdict="faster",
            detail=Pair("mask", "flash", half("faster", 1.155), half("slower", 0.898)),
        ),
        "mask helps only with flash: 1.155× with it, 0.898× without (prefill 1×2048 graph).",
    ),
    (
        Finding(Kind.IDLE, "gemv", PREFILL, detail=Idle(16)),
        "gemv changes neither the kernels that run nor the output (prefill 1×2048 graph), in all 16 pairs of cells. "
        "Any effect on its latency is noise, or what Python costs the host with it or without.",
    ),
    (
        Finding(Kind.MEMORY, "tie", PREFILL, detail=Saving(311_164_928, True)),
        "tie saves 296.8 MiB of peak memory and leaves latency the same within ±1 % (prefill 1×2048 graph).",
    ),
    (
        Finding(Kind.MEMORY, "tie", PREFILL, detail=Saving(311_164_928, False, "with the others on")),
        "tie saves 296.8 MiB of peak memory with the others on (prefill 1×2048 graph).",
    ),
    (
        Finding(Kind.MEMORY, condition=PREFILL, detail=LogitsAtPeak(622_329_856, 681_605_120)),
        "Every cell peaks at the logits of all positions, batch × tokens × vocabulary: 593.5 MiB of 650.0 MiB beside "
        "the parameters (prefill 1×2048 graph). No switch changes these; prefill.logits_to_keep=1 leaves them out.",
    ),
    (
        Finding(Kind.PEER, "flash", PREFILL, **GAIN, detail=Against("transformers:sdpa")),
        "flash is 1.271× [1.265, 1.277] as fast as transformers:sdpa (prefill 1×2048 graph).",
    ),
    (
        Finding(
            Kind.UNDECIDED, "mask", PREFILL, advice=MORE,
            detail=OpenEffects((Effect("mask", 1.018, 1.010, 1.026, "undecided"),)),
        ),
        "Undecided: mask 1.018× (prefill 1×2048 graph). "
        "If the estimates hold, measure.min_processes=8 measure.max_seconds=120 decides, in about 9 minutes.",
    ),
    (
        Finding(Kind.FAILURE, "tie", verdict="oom", detail=Failed(("tie",), (PREFILL,), "no room")),
        "tie has status oom and no speed-up (prefill 1×2048 graph). Reason: no room.",
    ),
    (
        Finding(
            Kind.CONTROL, condition=PREFILL, estimate=1.0213, lo=1.0181, hi=1.0248,
            detail=Control(Check.AA, ControlOutcome.FAILED, limit=0.005, runtime="graph"),
        ),
        "Noisy: two copies of the baseline differ, and read 1.021× [1.018, 1.025] (prefill 1×2048 graph). "
        "The limit is ±0.5 %. Differences of that size and less mean nothing. "
        "Measure again in more processes, on a quiet machine.",
    ),
    (
        Finding(
            Kind.CONTROL, condition=PREFILL, estimate=1.054, lo=0.96, hi=1.157,
            detail=Control(Check.AA, ControlOutcome.UNSURE, limit=0.02, runtime="eager"),
        ),
        "A/A: two copies of the baseline read 1.05× [0.96, 1.16] (prefill 1×2048 graph). The limit is ±2 %. "
        "As far as this run can tell, they agree within 16 %.",
    ),
    (
        Finding(
            Kind.CONTROL, condition=PREFILL, estimate=1.054,
            detail=Control(Check.AA, ControlOutcome.UNSURE, limit=0.02, runtime="eager"),
        ),
        "A/A: two copies of the baseline read 1.054× (prefill 1×2048 graph). The limit is ±2 %. "
        "One block gives no interval, so nothing shows whether they agree.",
    ),
    (
        Finding(
            Kind.REGIME, "mask",
            detail=Regime(14, tuple(half("faster", e) for e in (1.215, 1.023, 1.1, 1.2)), (), 6, 4),
        ),
        "mask is faster in 4 of 14 (1.023× to 1.215× as fast), the same in 6 and undecided in 4.",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("finding", "text"), SNAPSHOTS, ids=[finding.kind for finding, _ in SNAPSHOTS])
def test_a_finding_in_words(finding: Finding, text: str) -> None:
    assert sentence(finding) == text


def test_a_finding_of_one_of_several_runs_names_it() -> None:
    found = Finding(Kind.MISSING, detail=Missing(Lack.END), run=2)
    assert sentence(found).startswith("Run 2: This run has not finished.")


@pytest.mark.parametrize(
    ("verdict", "said"),
    [
        (Verdict.FASTER, ""),
        (Verdict.SLOWER, ""),
        (Verdict.UNDECIDED, "undecided"),
        (NoVerdict.NOISE, "within the noise"),
        ("", "no verdict"),
    ],
)
def test_what_an_effect_is_worth_says_its_verdict(verdict: str, said: str) -> None:
    effect, unknown = Effect("flash", 1.2, 1.1, 1.3, verdict), Effect("flash", math.nan, math.nan, math.nan, "")
    assert worth(effect) == f"1.20× [1.10, 1.30] {said}".rstrip()
    assert worth_said(effect) == f"1.20× as fast [1.10, 1.30]{', ' if said else ''}{said}"
    assert worth(unknown) == worth_said(unknown) == "not measured"


def sentences_of(text: str) -> list[str]:
    return [each for each in re.split(r"(?<=[.:])\s+(?=[A-Z“])", text) if each]


def ruled(text: str) -> None:
    """One interval, 25 words, and no word that was to go."""
    for each in sentences_of(text):
        words = re.sub(r"\([^)]*\)|\[[^]]*\]|measure\.\S+|\S+=\S+", "", each).split()
        assert len(words) <= 25, each
        assert each.count("[") <= 1, each
        assert not re.search(r"× (\[[^]]*\] )?(faster|slower)|pays|slower, \d", each), each


def test_every_sentence_of_a_run_keeps_the_rules(full_run: Run) -> None:
    for finding in (*findings(full_run), *control_list(full_run)):
        ruled(sentence(finding))
    for finding, _ in SNAPSHOTS:
        ruled(sentence(finding))
    for text in (METHOD, FLASH_AND_MASK):
        ruled(text)


@pytest.mark.slow
def test_every_sentence_of_the_reference_runs_keeps_the_rules() -> None:
    runs = [load_run(REFERENCE / "h100-regimes" / name) for name in ("single/1", "batched/1")]
    for run in (*runs, load_run(REFERENCE / "h200-peers-prefill-1x2048-last")):
        for finding in (*findings(run), *control_list(run)):
            ruled(sentence(finding))
    for finding in (*limits(runs), *over_findings(effects_over(runs), runs[0].factors, 0.01), *dependent(runs)):
        ruled(sentence(finding))


@pytest.mark.parametrize("copy_shift", [0.0, 0.02])
def test_a_direction_is_said_only_of_its_verdict(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run], copy_shift: float
) -> None:
    run = run_of(record_lines(factors=("flash", "tie"), copy_shift=copy_shift))
    for finding in findings(run):
        if finding.kind in (Kind.SWITCH, Kind.TOGETHER, Kind.PEER):
            for verdict in (Verdict.SAME, Verdict.UNDECIDED, NoVerdict.NOISE, NoVerdict.MISSING):
                said = sentence(replace(finding, verdict=verdict))
                assert not re.search(r"faster|slower|\bon is\b|\S+ is \d", said), said
