"""No finding may claim what a verdict does not support; `wording` is tested beside this."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.text import Text
from scipy import special

from qwen3bench.analysis.frames import block_matrix
from qwen3bench.analysis.run import Run
from qwen3bench.reporting import figures, findings_cells
from qwen3bench.reporting.answer import cards
from qwen3bench.reporting.conditions import conditions
from qwen3bench.reporting.control_findings import outcome_of
from qwen3bench.reporting.finding import (
    Against,
    Beside,
    Choice,
    ControlOutcome,
    Failed,
    Finding,
    Idle,
    Kind,
    Lack,
    Level,
    LogitsAtPeak,
    Missing,
    NoAnswer,
    OpenEffects,
    Pair,
    Saving,
    Times,
    verdict_of,
)
from qwen3bench.reporting.findings import findings, grouped
from qwen3bench.reporting.findings_cells import shown_faster
from qwen3bench.reporting.findings_undecided import Judged, allowed_variance, processes_needed, would_decide
from qwen3bench.reporting.over_runs import effects_over, over_findings
from qwen3bench.reporting.pages import write_report
from qwen3bench.reporting.plot_across import regimes
from qwen3bench.reporting.plot_effects import by_condition, forest
from qwen3bench.reporting.switch_table import switch_table
from qwen3bench.reporting.wording.sentences import sentence

Lines = list[dict[str, Any]]
TWO = ("flash", "tie")


@pytest.fixture
def small_run(record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]) -> Run:
    """Four cells of flash and tie, quiet and finished."""
    return run_of(record_lines(factors=TWO))


def with_effect(run: Run, term: str, **values: Any) -> Run:
    """The run with other values in the main effect or interaction of a term on latency."""
    effects = run.effects.copy()
    row = (effects["term"] == term) & (effects["metric"] == "latency_s") & (effects["kind"] != "shapley")
    for name, value in values.items():
        effects.loc[row, name] = value
    return replace(run, effects=effects)


def with_cell(run: Run, cell: str, **values: Any) -> Run:
    """The run with other values in one row of its cells."""
    cells = run.cells.astype({"equivalent": object, "reason": object})
    for name, value in values.items():
        cells.loc[cells["cell"] == cell, name] = value
    return replace(run, cells=cells)


@pytest.fixture(scope="module")
def full_findings(full_run: Run) -> list[Finding]:
    return findings(full_run)


def of_kind(found: list[Finding], kind: Kind) -> list[Finding]:
    return [finding for finding in found if finding.kind == kind]


def only(run: Run, kind: Kind) -> Finding:
    (finding,) = of_kind(findings(run), kind)
    return finding


def choice(finding: Finding) -> Choice:
    assert isinstance(finding.detail, Choice)
    return finding.detail


def of_switch(run: Run, name: str) -> Finding:
    (finding,) = [finding for finding in of_kind(findings(run), Kind.SWITCH) if finding.subject == name]
    return finding


def test_a_quiet_run_finds_what_was_planted(full_findings: list[Finding]) -> None:
    gains = {finding.condition: finding for finding in of_kind(full_findings, Kind.TOGETHER)}
    assert gains["prefill 1×512 graph"].estimate == pytest.approx(math.exp(0.457), rel=0.002)
    main = {(f.subject, f.condition): f for f in of_kind(full_findings, Kind.SWITCH)}
    assert len(main) == 5 * 4
    norm, tie = (main[name, "prefill 1×512 graph"] for name in ("norm", "tie"))
    assert (norm.verdict, tie.verdict) == ("faster", "same")
    assert norm.estimate == pytest.approx(math.exp(0.24), rel=0.002)
    (memory,) = [f for f in of_kind(full_findings, Kind.MEMORY) if f.subject == "tie"]
    assert memory.detail == Saving(311_164_928, free=True)
    assert not [finding for finding in full_findings if finding.level == Level.WARNING]


def test_an_interaction_tells_where_the_switch_pays(full_findings: list[Finding]) -> None:
    first = of_kind(full_findings, Kind.INTERACTION)[0]
    assert (first.subject, first.condition, first.verdict) == ("flash:mask", "prefill 1×512 graph", "faster")
    assert first.estimate == pytest.approx(math.exp(0.02), rel=0.002)
    pair = first.detail
    assert isinstance(pair, Pair)
    assert (pair.small, pair.large, pair.with_it.verdict, pair.without.verdict) == ("mask", "flash", "faster", "same")
    assert pair.with_it.estimate == pytest.approx(math.exp(0.04), rel=0.002)


def test_every_number_has_its_condition(full_findings: list[Finding]) -> None:
    for finding in full_findings:
        if finding.kind in (Kind.TOGETHER, Kind.ANSWER, Kind.SWITCH, Kind.INTERACTION, Kind.MEMORY, Kind.UNDECIDED):
            assert finding.condition.startswith(("prefill 1×512", "decode 1×512"))


@pytest.mark.parametrize("verdict", ["same", "undecided", "slower"])
def test_a_switch_has_the_verdict_of_its_effect(small_run: Run, verdict: str) -> None:
    run = with_effect(small_run, "flash", verdict=verdict, estimate=1.004, lo=0.998, hi=1.03)
    assert of_switch(run, "flash").verdict == verdict


LOGITS = 512 * 151_936 * 2


@pytest.mark.parametrize(
    ("flash_saves", "beside", "kept", "factors", "told"),
    [
        (0, LOGITS * 5 // 4, 0, ("flash", "tie"), True),
        (0, LOGITS * 5 // 4, 1, ("flash", "tie"), False),  # only the last token's are made
        (0, LOGITS * 5 // 4, 0, ("tie", "norm"), False),  # both may peak in attention
        (0, LOGITS * 4 // 3, 0, ("flash", "tie"), False),  # much else is held
        (0, LOGITS - 1, 0, ("flash", "tie"), False),
        (LOGITS // 500, LOGITS * 5 // 4, 0, ("flash", "tie"), False),  # without it attention peaks
    ],
)
def test_a_peak_that_no_switch_changes_is_that_of_the_logits(
    run_of: Callable[[Lines], Run],
    record_lines: Callable[..., Lines],
    flash_saves: int,
    beside: int,
    kept: int,
    factors: tuple[str, ...],
    told: bool,
) -> None:
    lines = record_lines(factors=factors, workloads=("prefill", "decode"))
    lines[0]["config"]["workload"]["prefill"]["logits_to_keep"] = kept
    parameters = {line["cell"]: line["parameter_bytes"] for line in lines if line["type"] == "parameters"}
    for line in lines:
        if line["type"] == "memory":
            saved = flash_saves if "flash" in line["cell"] else 0
            line["peak_allocated_bytes"] = parameters[line["cell"]] + beside - saved
    found = [f for f in of_kind(findings(run_of(lines)), Kind.MEMORY) if isinstance(f.detail, LogitsAtPeak)]
    assert [f.condition for f in found] == ["prefill 1×512 graph"] * told
    assert [f.detail for f in found] == [LogitsAtPeak(LOGITS, beside)] * told


def saving(run: Run, name: str) -> list[tuple[float, bool, str]]:
    found = [finding for finding in of_kind(findings(run), Kind.MEMORY) if finding.subject == name]
    return [(f.detail.saved_bytes, f.detail.free, f.condition) for f in found if isinstance(f.detail, Saving)]


def test_memory_is_not_called_free_when_latency_is_undecided(small_run: Run) -> None:
    run = with_effect(small_run, "tie", verdict="undecided", estimate=1.0, lo=0.95, hi=1.05)
    assert saving(run, "tie") == [(311_164_928, False, "prefill 1×512 graph")]


def test_memory_is_called_free_just_where_latency_is_the_same(full_run: Run) -> None:
    effects = full_run.effects.copy()
    eager = (effects["term"] == "tie") & (effects["metric"] == "latency_s") & (effects["runtime"] == "eager")
    effects.loc[eager, "verdict"] = "undecided"
    free = {where: free for _, free, where in saving(replace(full_run, effects=effects), "tie")}
    assert free == {
        "prefill 1×512 graph and decode 1×512 graph": True,
        "prefill 1×512 eager and decode 1×512 eager": False,
    }


def settings(finding: Finding) -> dict[str, int]:
    """What its advice asks for, by the name of the setting."""
    assert finding.advice
    pairs = (setting.partition("=") for setting in finding.advice.settings)
    return {key.removeprefix("measure."): int(value) for key, _, value in pairs if value.isdigit()}


def opened(finding: Finding) -> tuple[list[str], bool]:
    assert isinstance(finding.detail, OpenEffects)
    return [effect.term for effect in finding.detail.effects], finding.detail.pairs


def test_an_undecided_effect_has_the_settings_that_would_decide(small_run: Run) -> None:
    run = with_effect(small_run, "flash", verdict="undecided", estimate=1.002, lo=0.982, hi=1.0224)
    finding = only(run, Kind.UNDECIDED)
    assert opened(finding) == (["flash"], False)
    half_width = math.log(1.0224 / 0.982) / 2
    assert settings(finding)["min_blocks"] == math.ceil(6 * (half_width / (0.01 - math.log(1.002))) ** 2) + 1


@pytest.mark.parametrize(("in_process", "limit"), [(0.0, "blocks"), (0.02, "processes")])
def test_processes_are_asked_for_where_they_limit(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run], in_process: float, limit: str
) -> None:
    """Cells that scatter by 1 % from block to block, and by 2 % from process to process or not at all."""
    lines = record_lines(factors=TWO, noise=0.01)
    shift = np.random.default_rng(5)
    levels = {(cell, process): shift.normal(0, in_process) for cell in lines[0]["cells"] for process in (0, 1)}
    for line in lines:
        if line["type"] == "sample":
            line["latency_s"] *= math.exp(levels[line["cell"], line["process"]])
    run = with_effect(run_of(lines), "tie", verdict="undecided", estimate=1.002, lo=0.982, hi=1.0224)
    (finding,) = [each for each in of_kind(findings(run), Kind.UNDECIDED) if "tie" in opened(each)[0]]
    assert settings(finding)[f"min_{limit}"] > (6 if limit == "blocks" else 2)


@pytest.mark.parametrize("estimate", [1.0, 1.002, 1.03])
def test_as_many_processes_as_are_asked_for_decide(full_run: Run, estimate: float) -> None:
    """By the interval that so many would give: its degrees of freedom grow with them, so it shrinks by more than √n."""
    condition, se = conditions(full_run)[0], 0.02
    half = se * special.stdtrit(2, 0.975)
    effect = Judged("flash", estimate, estimate * math.exp(-half), estimate * math.exp(half), 2, "undecided")
    needed = processes_needed(full_run, condition, effect, 3)

    def decided(processes: int) -> bool:
        df, error = processes - 1, se * math.sqrt(3 / processes)
        inside = math.log(estimate) + error * special.stdtrit(df, 0.975) <= 0.01
        return inside or 5 * 2 * special.stdtr(df, -math.log(estimate) / error) <= 0.05

    assert decided(needed)
    assert not decided(needed - 1)


@pytest.mark.parametrize(("of_allowed", "limit"), [(0.0, "blocks"), (0.4, "blocks"), (0.6, "processes")])
def test_processes_limit_where_they_make_half_of_what_a_verdict_allows(
    small_run: Run, of_allowed: float, limit: str
) -> None:
    """Blocks lessen only what processes do not make of the error's variance."""
    condition = conditions(small_run)[0]
    effect = Judged("flash", 1.002, 1.002 * math.exp(-0.02), 1.002 * math.exp(0.02), 5, "undecided")
    allowed = allowed_variance(small_run, condition, effect, effect.df)
    share = of_allowed * allowed
    advice = would_decide(small_run, condition, [replace(effect, process_share=share)])
    key, _, value = advice.settings[0].partition("=")
    assert key == f"measure.min_{limit}"
    if limit == "blocks":
        needed = int(value)
        assert (1 - share) * 6 / needed + share <= allowed
        assert (1 - share) * 6 / (needed - 2) + share > allowed


def test_an_undecided_pair_is_told_beside_the_switches(small_run: Run) -> None:
    run = with_effect(small_run, "flash:tie", verdict="undecided", estimate=1.002, lo=0.982, hi=1.0224)
    assert opened(only(run, Kind.UNDECIDED)) == (["flash:tie"], True)
    assert not of_kind(findings(run), Kind.INTERACTION)


def test_an_interval_beside_one_without_significance_asks_for_more(small_run: Run) -> None:
    run = with_effect(small_run, "flash", verdict="undecided", estimate=1.06, lo=1.05, hi=1.07, p_holm=0.3)
    asked = settings(only(run, Kind.UNDECIDED))
    assert asked.get("min_processes", 0) > 2 or asked.get("min_blocks", 0) > 6


def test_an_effect_without_an_interval_asks_for_blocks(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    run = run_of(record_lines(factors=("flash",), blocks=1))
    finding = only(run, Kind.UNDECIDED)
    assert isinstance(finding.detail, OpenEffects)
    assert finding.detail.blind
    assert settings(finding)["min_blocks"] == 6
    assert of_switch(run, "flash").verdict == "undecided"


def test_an_undecided_interaction_is_not_told(full_run: Run) -> None:
    run = with_effect(full_run, "flash:mask", verdict="undecided")
    assert "flash:mask" not in [finding.subject for finding in of_kind(findings(run), Kind.INTERACTION)]


def test_the_three_largest_pairs_of_a_condition_are_told(full_run: Run) -> None:
    run = full_run
    for n, term in enumerate(("flash:mask", "flash:norm", "mlp:mask", "tie:norm", "mlp:norm")):
        run = with_effect(run, term, verdict="faster", estimate=1.5 - n / 10, lo=1.49 - n / 10, hi=1.51 - n / 10)
    told = [f.subject for f in of_kind(findings(run), Kind.INTERACTION) if f.condition == "prefill 1×512 graph"]
    assert told == ["flash:mask", "flash:norm", "mlp:mask"]


def test_an_effect_that_cannot_be_estimated_gives_its_reason(small_run: Run) -> None:
    gone = {"verdict": "", "estimate": np.nan, "lo": np.nan, "hi": np.nan, "reason": "aliased with tie"}
    finding = of_switch(with_effect(small_run, "flash", **gone), "flash")
    assert math.isnan(finding.estimate)
    assert isinstance(finding.detail, Beside)
    assert finding.detail.reason == "aliased with tie"


def of_design(lines: Lines, names: list[str]) -> Lines:
    """The lines of a run that measured only some cells."""
    lines = [line for line in lines if line.get("cell") in (None, *names)]
    lines[0]["cells"] = names
    return lines


@pytest.mark.parametrize(
    ("names", "others"),
    [
        (["baseline", "flash", "mlp", "mask"], "with the others off"),
        (["baseline", "mlp+mask", "flash+mask", "flash+mlp", "flash+mlp+mask"], "with the others on"),
    ],
)
def test_a_switch_is_told_beside_none_or_all_of_the_others_where_the_cells_tell_no_average(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run], names: list[str], others: str
) -> None:
    run = run_of(of_design(record_lines(factors=("flash", "mlp", "mask")), names))
    finding = of_switch(run, "mlp")
    on, off = ("mlp", "baseline") if "mlp" in names else ("flash+mlp+mask", "flash+mask")
    latency = run.cells.set_index("cell")["latency_s"].astype(float)
    assert finding.estimate == pytest.approx(latency[off] / latency[on], rel=0.002)
    assert (finding.verdict, finding.detail) == ("faster", Beside(others))


@pytest.mark.parametrize(
    ("names", "others"),
    [
        (["baseline", "flash", "tie"], "with the others off"),
        (["baseline", "tie", "flash", "flash+tie"], ""),
        (["baseline", "tie+mlp", "flash+mlp", "flash+tie", "flash+tie+mlp"], "with the others on"),
    ],
)
def test_what_memory_a_switch_saves_is_said_beside_what(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run], names: list[str], others: str
) -> None:
    factors = ("flash", "tie", "mlp") if any("mlp" in name for name in names) else ("flash", "tie")
    found = of_kind(findings(run_of(of_design(record_lines(factors=factors), names))), Kind.MEMORY)
    (saving,) = [finding.detail for finding in found if finding.subject == "tie"]
    assert isinstance(saving, Saving)
    assert saving.others == others


def test_what_is_told_beside_the_others_off_is_so_without_an_interval_too(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    lines = record_lines(factors=("flash", "mlp", "mask"), blocks=1)
    finding = of_switch(run_of(of_design(lines, ["baseline", "flash", "mlp", "mask"])), "mlp")
    assert finding.detail == Beside("with the others off", "no interval: one block")


def decode_whole_prefill_alone(record_lines: Callable[..., Lines]) -> Lines:
    """A run whose prefill lost the cells with two switches and more."""
    lines = record_lines(factors=("flash", "mlp", "mask"), workloads=("prefill", "decode"))
    kept = (None, "baseline", "flash", "mlp", "mask")
    return [line for line in lines if line.get("workload") != "prefill" or line.get("cell") in kept]


def test_where_conditions_tell_different_things_each_says_which(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    run = run_of(decode_whole_prefill_alone(record_lines))
    found = of_kind(findings(run), Kind.SWITCH)
    others = {f.condition: f.detail.others for f in found if isinstance(f.detail, Beside)}
    assert others == {
        "prefill 1×512 graph": "with the others off",
        "decode 1×512 graph": "on average over the others",
    }
    with figures.style():
        together = by_condition(run)
        alone, whole = (forest(run, condition) for condition in conditions(run))
    assert together is not None
    assert alone is not None
    assert whole is not None
    assert together.title == "What the other switches do differs from condition to condition"
    together.figure.draw_without_rendering()
    (legend,) = together.figure.findobj(Legend)
    assert legend.get_window_extent().x1 <= together.figure.bbox.x1
    assert "each switch with the others off" in noted(alone.figure)
    assert "each switch on average over the others" in noted(whole.figure)
    assert whole.figure.axes[0].get_xlabel().startswith("× as fast when switched on (pairs: joint effect), 95 %")
    assert alone.figure.axes[0].get_xlabel().startswith("× as fast when switched on, 95 %")
    assert "on average" in whole.title
    assert "on average" not in alone.title
    frame = effects_over([run])
    assert sorted(frame["others"].unique()) == ["on average over the others", "with the others off"]
    assert len(list(over_findings(frame, ["flash"], 0.01))) == 2
    with figures.style():
        plot = regimes(frame, ["flash", "mlp", "mask"], 0.01)
    assert plot is not None
    assert plot.title == "What the other switches do differs from run to run"


def test_a_single_switch_has_no_others_to_average_over(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    run = run_of(record_lines(factors=("flash",), workloads=("prefill", "decode")))
    found = findings(run)
    (first, _) = of_kind(found, Kind.SWITCH)
    assert re.fullmatch(r"flash on is 1.18\d× \[.*\] as fast as off \(prefill 1×512 graph\)\.", sentence(first))
    table = switch_table(found)
    assert table is not None
    assert table.others == ""
    frame = effects_over([run])
    with figures.style():
        plots = [by_condition(run), forest(run, conditions(run)[0]), regimes(frame, ["flash"], 0.01)]
    assert plots[0]
    plots[0].figure.draw_without_rendering()
    (axes,) = plots[0].figure.axes
    assert axes.get_legend().get_window_extent().y1 < axes.xaxis.label.get_window_extent().y0
    assert [plot.title for plot in plots if plot] == [
        "Faster in every condition: flash",
        "Faster: flash",
        "Faster everywhere: flash",
    ]
    assert sentence(next(over_findings(frame, ["flash"], 0.01))).startswith(
        "flash, the only switch of its run, is faster in all 2 conditions"
    )


def noted(figure: Figure) -> str:
    return " ".join(text.get_text() for text in figure.findobj(Text))


@pytest.mark.parametrize("lost", [False, True])
def test_a_half_that_lacks_a_cell_tells_nothing_of_a_pair(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run], lost: bool
) -> None:
    """Without the baseline the half without flash tells mask beside norm alone, the half with it an average."""
    lines = record_lines(factors=("flash", "mask", "norm"))
    pairs = of_kind(findings(run_of(without_baseline(lines) if lost else lines)), Kind.INTERACTION)
    (pair,) = [finding for finding in pairs if finding.subject == "flash:mask"]
    assert isinstance(pair.detail, Pair) == (not lost)


@pytest.mark.parametrize(("factors", "names", "advised"), [(("flash",), ["baseline"], False), (TWO, None, True)])
def test_a_design_is_advised_only_where_it_measures_more(
    record_lines: Callable[..., Lines],
    run_of: Callable[[Lines], Run],
    factors: tuple[str, ...],
    names: list[str] | None,
    advised: bool,
) -> None:
    lines = record_lines(factors=factors)
    kept = names or ["baseline", "+".join(factors)]
    lines = [line for line in lines if line.get("cell") in (None, *kept)]
    lines[0]["cells"] = kept if advised else lines[0]["cells"]
    advice = only(run_of(lines), Kind.UNTOLD).advice
    assert (advice is not None and advice.settings == ("design=full",)) == advised


def test_of_a_pair_of_cells_one_finding_says_that_no_switch_can_be_told(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    run = run_of(of_design(record_lines(factors=("flash", "mlp", "mask")), ["baseline", "flash+mlp+mask"]))
    assert not of_kind(findings(run), Kind.SWITCH)
    assert only(run, Kind.UNTOLD).advice


@pytest.mark.parametrize("status", ["oom", "not_equivalent", "crashed", "timeout", "invalid"])
def test_a_failed_cell_is_named_and_never_praised(small_run: Run, status: str) -> None:
    run = with_cell(small_run, "flash+tie", status=status, reason="it did not work\nsecond line")
    found = findings(run)
    (finding,) = of_kind(found, Kind.FAILURE)
    assert (finding.verdict, finding.detail) == (status, Failed(("flash+tie",), (), "it did not work"))
    assert not [each for each in found if each.kind in (Kind.TOGETHER, Kind.ANSWER) and each.subject == "flash+tie"]


def test_a_noisy_run_warns_recommends_nothing_and_tells_noise_from_gain(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    run = run_of(record_lines(factors=("flash", "mlp"), copy_shift=0.02))
    found = findings(run)
    assert ControlOutcome.FAILED in [outcome_of(finding) for finding in of_kind(found, Kind.CONTROL)]
    answer = only(run, Kind.ANSWER)
    assert choice(answer).none == NoAnswer.NOISY
    assert settings(answer)["min_processes"] == 4  # twice as many as now
    assert of_switch(run, "mlp").verdict == "noise"  # 1.2 %, but the copies are 2 % apart
    assert (of_switch(run, "flash").verdict, of_switch(run, "flash").noisy) == ("faster", True)


def test_the_least_memory_is_claimed_only_where_all_is_known(small_run: Run) -> None:
    cells = small_run.cells.copy()
    answer = only(small_run, Kind.ANSWER)
    assert choice(answer).alike
    assert choice(answer).by_memory
    cells.loc[cells["cell"] == choice(answer).alike[0], "peak_allocated_bytes"] = pd.NA
    partly = only(replace(small_run, cells=cells), Kind.ANSWER)
    assert not choice(partly).by_memory
    assert math.isnan(choice(partly).more_bytes)
    assert sentence(partly).endswith("no fewer switches.")


def test_nothing_is_recommended_when_nothing_is_shown_to_be_faster(small_run: Run) -> None:
    cells = small_run.cells.assign(speedup=1.001, speedup_lo=0.98, speedup_hi=1.022)
    run = replace(small_run, cells=cells)
    assert choice(only(run, Kind.ANSWER)).none == NoAnswer.NOTHING_FASTER
    assert only(run, Kind.TOGETHER).verdict == "undecided"


@pytest.mark.slow
def test_no_command_is_given_that_nobody_would_wait_for(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    lines = record_lines(factors=TWO)
    for line in lines:
        if line["type"] == "block":
            line["elapsed_s"] = 2.0
    unsure = with_effect(run_of(lines), "flash", verdict="undecided", estimate=1.002, lo=0.7, hi=1.43)
    run = replace(unsure, cells=unsure.cells.assign(speedup=1.001, speedup_lo=0.7, speedup_hi=1.43))
    finding = only(run, Kind.UNDECIDED)
    said = (
        "This machine cannot tell in reasonable time, as it takes about 7 hours. Ten minutes tell it to about ±6.1 %."
    )
    assert sentence(finding).endswith(said)
    (card,) = cards(run, findings(run))
    assert card.said.endswith(said)
    assert not card.advice
    written = write_report(run, findings(run))
    for page in (written, written.with_suffix(".md")):
        text = page.read_text("utf-8")
        assert "in reasonable time" in text
        assert "measure.min_blocks=" not in text
        assert "<code></code>" not in text
        assert "these settings in the command decide" not in text


def test_an_answer_that_is_none_ends_with_what_would_give_it(small_run: Run) -> None:
    unsure = with_effect(small_run, "flash", verdict="undecided", estimate=1.002, lo=0.982, hi=1.0224)
    run = replace(unsure, cells=small_run.cells.assign(speedup=1.001, speedup_lo=0.98, speedup_hi=1.022))
    assert only(run, Kind.ANSWER).advice == only(run, Kind.UNDECIDED).advice


def test_the_best_of_many_needs_more_than_its_own_interval() -> None:
    rng = np.random.default_rng(1)
    chosen = 0
    for _ in range(300):
        blocks = rng.normal(0, 0.02, (6, 31))
        mean, error = blocks.mean(0), blocks.std(0, ddof=1) / math.sqrt(6)
        cells = pd.DataFrame({"cell": "x", "speedup": np.exp(mean)}, index=range(31))
        cells["speedup_lo"], cells["speedup_hi"] = np.exp(mean - 2.571 * error), np.exp(mean + 2.571 * error)
        chosen += bool(shown_faster(pd.concat([cells, cells.head(1)]), 6, 0.01).any())
    assert chosen <= 0.05 * 300


def test_a_cell_inside_the_band_is_not_recommended() -> None:
    cells = pd.DataFrame(
        {
            "speedup": [1.0, 1.005, 1.5],
            "speedup_lo": [np.nan, 1.004, 1.49],
            "speedup_hi": [np.nan, 1.006, 1.51],
        }
    )
    assert shown_faster(cells, 12, 0.01).tolist() == [False, False, True]


def test_a_recommended_cell_is_faster_than_both_copies_of_the_baseline(small_run: Run) -> None:
    assert choice(only(small_run, Kind.ANSWER)).none is None
    cells = small_run.cells.assign(speedup=1.06, speedup_lo=1.05, speedup_hi=1.07)
    aa = small_run.controls.aa.assign(ratio=0.94, lo=0.85, hi=1.04)
    slow = replace(small_run, cells=cells, controls=replace(small_run.controls, aa=aa))  # the baseline, by itself
    assert choice(only(slow, Kind.ANSWER)).none == NoAnswer.NOTHING_FASTER
    fast = replace(slow, controls=replace(small_run.controls, aa=aa.assign(ratio=1.06, lo=0.96, hi=1.17)))
    assert choice(only(fast, Kind.ANSWER)).none is None


@pytest.mark.parametrize("everywhere", [True, False])
def test_a_switch_that_changes_nothing_is_named_once_with_all_its_conditions(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run], everywhere: bool
) -> None:
    factors = ("flash", "tie", "norm")
    lines = record_lines(factors, workloads=("prefill", "decode"), runtimes=("graph", "eager"), memory=False)
    lines = [line | {"output": "a"} if line["type"] == "evidence" else line for line in lines]
    if not everywhere:  # of the four pairs of cells in decode two are left
        lines = [
            line
            for line in lines
            if not (line["type"] == "evidence" and line["workload"] == "decode" and "tie" in line["cell"])
        ]
    found = of_kind(findings(run_of(lines)), Kind.IDLE)
    prefill, decode = (f"{workload} 1×512 graph, {workload} 1×512 eager" for workload in ("prefill", "decode"))
    assert [(finding.subject, finding.condition, finding.detail) for finding in found] == (
        [("norm", f"{prefill}, {decode}", Idle(4))]
        if everywhere
        else [("norm", prefill, Idle(4)), ("norm", decode, Idle(2))]
    )


def limited(run: Run, gib: float) -> Run:
    return replace(run, config=run.config | {"report": {"memory_limit_gib": gib}})


def test_a_recommendation_without_memory_claims_none(small_run: Run) -> None:
    run = replace(small_run, cells=small_run.cells.assign(peak_allocated_bytes=pd.NA))
    answer = only(run, Kind.ANSWER)
    times = choice(answer).times
    assert answer.subject == "flash"  # of two as fast, that with fewer switches
    assert times
    assert math.isnan(times.peak_bytes)


@pytest.mark.filterwarnings("error")
def test_a_baseline_whose_fellows_all_failed_is_quiet(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    lines = record_lines(factors=TWO)
    failed = [{"type": "failure", "cell": cell, "status": "oom", "reason": "no room"} for cell in lines[0]["cells"][1:]]
    found = findings(run_of([*lines[:-1], *failed, lines[-1]]))
    assert not [finding for finding in found if finding.verdict == "faster"]


def test_the_recommendation_keeps_the_memory_limit(small_run: Run) -> None:
    assert only(small_run, Kind.ANSWER).subject == "flash+tie"
    need = small_run.cells.set_index("cell")["peak_allocated_bytes"] / 2**30
    none = choice(only(limited(small_run, float(need.min()) - 0.01), Kind.ANSWER))
    assert (none.none, none.smallest) == (NoAnswer.NOTHING_FITS, "flash+tie")
    fits = only(limited(with_cell(small_run, "flash+tie", peak_allocated_bytes=2**40), 4), Kind.ANSWER)
    assert (fits.subject, choice(fits).limit_gib) == ("flash", 4)


def test_a_memory_limit_without_measured_memory_is_said_to_be_unknown(small_run: Run) -> None:
    run = replace(small_run, cells=small_run.cells.assign(peak_allocated_bytes=pd.NA))
    answer = only(limited(run, 4), Kind.ANSWER)
    assert (choice(answer).none, answer.level) == (NoAnswer.MEMORY_UNKNOWN, Level.WARNING)


def test_equal_cells_are_settled_by_memory(small_run: Run) -> None:
    answer = only(small_run, Kind.ANSWER)
    assert (answer.subject, choice(answer).alike) == ("flash+tie", ("flash",))
    peaks = small_run.cells.set_index("cell")["peak_allocated_bytes"]
    assert choice(answer).more_bytes == peaks["flash"] - peaks["flash+tie"] > 0


def test_a_baseline_that_scatters_hides_no_difference_between_cells(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    """Speed-ups share the baseline, so their intervals overlap; within blocks mlp is worth its 1.2 %."""
    lines = record_lines(factors=("flash", "mlp"))
    jumps = np.random.default_rng(0).normal(0, 0.02, 6)
    for line in lines:
        if line["type"] == "sample" and line["cell"] == "baseline":
            line["latency_s"] *= float(np.exp(jumps[line["block"]]))
        if line["type"] == "memory" and line["cell"] == "flash":
            line["peak_allocated_bytes"] -= 2**20
    run = run_of(lines)
    flash, both = (run.cells.set_index("cell").loc[name] for name in ("flash", "flash+mlp"))
    assert flash["speedup_hi"] > both["speedup_lo"]
    answer = only(run, Kind.ANSWER)
    assert (answer.subject, choice(answer).alike) == ("flash+mlp", ())


def test_a_cell_that_reads_slower_is_not_recommended_because_it_is_noisy(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    """flash alone reads a seventh slower than flash+mlp, in blocks that scatter by a third; both are thrice as fast."""
    lines = record_lines(factors=("flash", "mlp"))
    jumps = np.random.default_rng(1).permutation([-0.4, -0.3, -0.1, 0.1, 0.3, 0.4])
    for line in lines:
        if line["type"] == "sample" and line["cell"].startswith("flash"):
            line["latency_s"] *= 0.3
        if line["type"] == "sample" and line["cell"] == "flash":
            line["latency_s"] *= float(np.exp(0.15 + jumps[line["block"]]))
    answer = only(run_of(lines), Kind.ANSWER)
    assert (answer.subject, choice(answer).unsure) == ("flash+mlp", ("flash",))


@pytest.mark.parametrize(("scatter", "shown"), [(0.36, False), (0.22, True)])
def test_of_several_cells_one_is_shown_to_be_slower_beyond_their_number(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run], scatter: float, shown: bool
) -> None:
    """flash alone reads 3.4 or 4.9 standard errors slower than the fastest of four; it takes 3.5 with 6 blocks."""
    lines = record_lines(factors=("flash", "tie", "mlp"))
    jumps = scatter * np.random.default_rng(1).permutation([-0.4, -0.3, -0.1, 0.1, 0.3, 0.4])
    for line in lines:
        if line["type"] == "sample" and line["cell"].startswith("flash"):
            line["latency_s"] *= 0.3
        if line["type"] == "sample" and line["cell"] == "flash":
            line["latency_s"] *= float(np.exp(0.15 + jumps[line["block"]]))
    run = run_of(lines)
    assert (choice(only(run, Kind.ANSWER)).unsure != ()) == (not shown)


@pytest.mark.parametrize("confidence", [0.95, 0.8, 0.5])
def test_what_is_shown_does_not_hang_on_the_confidence_of_the_intervals(confidence: float) -> None:
    """A gain of 3 standard errors with 31 cells: beyond one comparison, not beyond 31."""
    half = 0.01 * special.stdtrit(11, (1 + confidence) / 2)
    names = [f"cell{i}" for i in range(31)]
    cells = pd.DataFrame({"cell": ["baseline", *names], "speedup": 1.0, "speedup_lo": 1.0, "speedup_hi": 1.0})
    cells.loc[1, ["speedup", "speedup_lo", "speedup_hi"]] = np.exp([0.03, 0.03 - half, 0.03 + half])
    assert not shown_faster(cells, 12, 0.01, confidence).any()
    assert shown_faster(cells.head(2), 12, 0.01, confidence).tolist() == [False, True]


def test_what_is_recommended_is_shown_with_the_degrees_of_freedom_of_its_interval(
    small_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[pd.Series] = []

    def shown(cells: pd.DataFrame, freedom: pd.Series, *rest: float) -> pd.Series:
        given.append(freedom)
        return shown_faster(cells, freedom, *rest)

    monkeypatch.setattr(findings_cells, "shown_faster", shown)
    assert only(small_run, Kind.ANSWER)
    others = [cell for cell in small_run.cells["cell"] if cell != "baseline"]
    told = block_matrix(small_run.samples).log_ratios("baseline", others).df
    np.testing.assert_array_equal(given[0].dropna(), told)
    assert 2 < min(told) <= 3  # a prior is worth at most two beside the one of two processes
    given.clear()
    peaks = small_run.cells["peak_allocated_bytes"]
    limit = int(peaks[small_run.cells["cell"] == "baseline"].iloc[0]) - 1
    assert choice(only(limited(small_run, limit / 2**30), Kind.ANSWER)).limit_gib == limit / 2**30
    assert set(given[0]) <= set(told)  # though the baseline, which is too large, is none of the cells


def without_baseline(lines: Lines) -> Lines:
    return [line for line in lines if not (line["type"] in ("sample", "visit") and line["cell"] == "baseline")]


def test_without_a_baseline_nothing_is_compared_with_it(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    run = run_of(without_baseline(record_lines(factors=("flash", "tie", "norm"))))
    taken = only(run, Kind.TOGETHER).detail
    assert isinstance(taken, Times)
    assert taken.latency_s == pytest.approx(4.8e-3, rel=0.01)
    assert math.isnan(taken.baseline_s)
    assert choice(only(run, Kind.ANSWER)).none == NoAnswer.NO_BASELINE
    assumed = [f.detail.reason for f in of_kind(findings(run), Kind.SWITCH) if isinstance(f.detail, Beside)]
    assert set(assumed) == {"without baseline, interactions of more than 2 factors taken for nil"}


def test_a_failure_names_where_it_failed(record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]) -> None:
    lines = record_lines(factors=TWO, workloads=("prefill", "decode"))
    where = {"cell": "flash", "workload": "decode", "runtime": "graph", "status": "oom", "pass": "time"}
    run = run_of([*lines[:-1], {"type": "failure", **where, "reason": "no room"}, lines[-1]])
    assert only(run, Kind.FAILURE).detail == Failed(("flash",), ("decode 1×512 graph",), "no room")


def test_a_pair_that_is_undecided_says_what_would_decide(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    pair = (None, "baseline", "tie+mlp")
    lines = [line for line in record_lines(factors=("tie", "mlp")) if line.get("cell") in pair]
    lines[0]["cells"] = list(pair[1:])
    run = with_cell(run_of(lines), "tie+mlp", speedup=1.004, speedup_lo=0.99, speedup_hi=1.02)
    finding = only(run, Kind.UNDECIDED)
    assert opened(finding) == (["tie+mlp"], False)
    assert finding.advice


def test_a_single_cell_compares_nothing(record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]) -> None:
    run = run_of(record_lines(factors=()))
    finding = only(run, Kind.TOGETHER)
    assert isinstance(finding.detail, Times)
    assert finding.subject == "baseline"
    assert finding.detail.tokens_per_s == pytest.approx(512 / finding.detail.latency_s)
    assert not [finding for finding in findings(run) if finding.kind in (Kind.SWITCH, Kind.ANSWER, Kind.INTERACTION)]


def test_a_partial_run_says_so(record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]) -> None:
    lines = record_lines(factors=TWO, workloads=("prefill", "decode"))
    cut = [
        line for line in lines if line["type"] != "end" and not (line.get("workload") == "decode" and "block" in line)
    ]
    run = run_of(cut)
    lacks = [finding.detail.lack for finding in findings(run) if isinstance(finding.detail, Missing)]
    assert lacks == [Lack.END, Lack.LATENCY]


def test_a_run_with_nothing_measured_has_only_warnings(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    run = run_of([line for line in record_lines(factors=TWO) if line["type"] in ("run", "session")])
    assert {finding.level for finding in findings(run)} == {"warning"}


def test_cells_without_a_latency_are_named(small_run: Run) -> None:
    run = with_cell(small_run, "flash", latency_s=np.nan, speedup=np.nan)
    assert only(run, Kind.MISSING).detail == Missing(Lack.CELLS, ("flash",), 4)


def test_unverified_cells_are_named(small_run: Run) -> None:
    run = with_cell(small_run, "flash", equivalent=None)
    (finding,) = [f for f in of_kind(findings(run), Kind.CONTROL) if f.level == Level.WARNING]
    assert outcome_of(finding) == ControlOutcome.FAILED


def test_a_peer_is_measured_against_the_baseline_and_never_recommended(small_run: Run) -> None:
    peer = small_run.cells.tail(1).assign(
        cell="transformers:sdpa",
        flash=pd.NA,
        tie=pd.NA,
        speedup=3.0,
        speedup_lo=2.9,
        speedup_hi=3.1,
        latency_s=1e-3,
    )
    run = replace(small_run, cells=pd.concat([small_run.cells, peer], ignore_index=True))
    peer_finding = only(run, Kind.PEER)
    assert (peer_finding.subject, peer_finding.verdict) == ("transformers:sdpa", "faster")
    assert peer_finding.detail == Against("the baseline")
    assert only(run, Kind.ANSWER).subject != "transformers:sdpa"


def with_peer(lines: Lines, slower: float, ours: str = "flash+tie") -> Lines:
    """The lines with those of a peer that takes so many times what a cell of ours takes."""
    lines[0]["cells"].append("transformers:sdpa")
    for line in list(lines):
        if line.get("cell") == ours:
            theirs = line | {"cell": "transformers:sdpa"}
            if line["type"] == "sample":
                theirs |= {"latency_s": line["latency_s"] * slower * 1.0001 ** line["block"], "position": 9}
            lines.insert(lines.index(line), theirs)
    return lines


def test_against_a_peer_noise_is_noise(record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]) -> None:
    run = run_of(with_peer(record_lines(factors=TWO, copy_shift=0.1), 1.03))
    ours = over_peer(run)["flash+tie"]
    assert (ours.verdict, ours.noisy) == ("noise", True)


def test_against_a_peer_one_block_gives_a_number(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    ours = over_peer(run_of(with_peer(record_lines(factors=TWO, blocks=1), 1.2)))["flash+tie"]
    assert ours.estimate == pytest.approx(1.2, abs=0.01)
    assert ours.verdict == "missing"


@pytest.mark.filterwarnings("error")
def test_of_a_peer_that_no_block_holds_beside_ours_nothing_is_said(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    by_turns = ("flash+tie", "transformers:sdpa")
    lines = [
        line
        for line in with_peer(record_lines(factors=TWO), 1.2)
        if line["type"] != "sample" or line["cell"] != by_turns[line["block"] % 2]
    ]
    found = findings(run_of(lines))
    assert not of_kind(found, Kind.PEER)
    (answer,) = of_kind(found, Kind.ANSWER)
    assert answer.detail == Choice(NoAnswer.NO_BLOCK)


@pytest.mark.parametrize(("slower", "verdict"), [(1.2, "faster"), (1.0, "same"), (0.9, "slower")])
def test_all_on_is_measured_against_a_peer(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run], slower: float, verdict: str
) -> None:
    ours = over_peer(run_of(with_peer(record_lines(factors=TWO), slower)))["flash+tie"]
    assert ours.verdict == verdict
    assert ours.estimate == pytest.approx(slower, rel=0.005)


def over_peer(run: Run) -> dict[str, Finding]:
    """The cells that are set against a peer."""
    found = of_kind(findings(run), Kind.PEER)
    return {f.subject: f for f in found if f.detail == Against("transformers:sdpa")}


def gains(run: Run) -> dict[str, float]:
    return {cell: finding.estimate for cell, finding in over_peer(run).items()}


def test_where_more_than_the_five_is_on_they_are_set_against_a_peer_too(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    lines = record_lines(factors=("flash", "tie", "mlp", "mask", "norm", "gemv"))
    kept = (None, "baseline", "flash+tie+mlp+mask+norm", "flash+tie+mlp+mask+norm+gemv")
    lines = [line for line in lines if line.get("cell") in kept]
    lines[0]["cells"] = list(kept[1:])
    for line in lines:
        if line["type"] == "sample" and "gemv" in line["cell"]:
            line["latency_s"] /= 1.3
    assert gains(run_of(with_peer(lines, 1.2, kept[2]))) == pytest.approx({kept[2]: 1.2, kept[3]: 1.56}, abs=0.01)


@pytest.mark.parametrize(("faster", "told"), [(1.1, True), (1.005, False)])
def test_the_fastest_cell_is_set_against_a_peer_where_it_is_not_all_on(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run], faster: float, told: bool
) -> None:
    lines = record_lines(factors=TWO)
    for line in lines:
        if line["type"] == "sample" and line["cell"] == "flash":
            line["latency_s"] /= faster
    expected = {"flash+tie": 1.2} | ({"flash": 1.2 * faster} if told else {})
    assert gains(run_of(with_peer(lines, 1.2))) == pytest.approx(expected, abs=0.01)


def test_a_failed_all_on_leaves_the_fastest_against_a_peer(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    run = with_cell(run_of(with_peer(record_lines(factors=TWO), 1.2)), "flash+tie", status="not_equivalent")
    assert list(over_peer(run)) == ["flash"]


@pytest.mark.parametrize(
    ("lo", "hi", "verdict"),
    [
        (0.995, 1.005, "same"),
        (1.001, 1.2, "faster"),
        (0.8, 0.9, "slower"),
        (0.98, 1.2, "undecided"),
        (math.nan, math.nan, "missing"),
    ],
)
def test_verdict_of_a_speed_up(lo: float, hi: float, verdict: str) -> None:
    assert verdict_of(lo, hi, 0.01) == verdict


def test_every_plain_finding_has_a_heading(full_findings: list[Finding]) -> None:
    plain = [finding for finding in full_findings if finding.level == Level.PLAIN]
    assert sum(len(group) for _, group in grouped(plain)) == len(plain)
    x = Finding(Kind.SWITCH, "x")
    assert grouped([x]) == [("Each switch", [x])]


def test_of_several_peers_the_fastest_is_compared_with_and_named(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    lines = with_peer(record_lines(factors=TWO), 1.2)
    lines[0]["cells"].append("liger:sdpa")
    for line in list(lines):
        if line.get("cell") == "transformers:sdpa":
            theirs = line | {"cell": "liger:sdpa"}
            if line["type"] == "sample":
                theirs |= {"latency_s": line["latency_s"] / 1.1, "position": 10}
            lines.insert(lines.index(line), theirs)
    found = of_kind(findings(run_of(lines)), Kind.PEER)
    over = [finding for finding in found if finding.detail != Against("the baseline")]
    assert {finding.detail for finding in over} == {Against("liger:sdpa", best_of=2)}
    (ours,) = [finding for finding in over if finding.subject == "flash+tie"]
    assert ours.estimate == pytest.approx(1.2 / 1.1, abs=0.01)
    assert sentence(ours).endswith("liger:sdpa is the fastest of 2 other implementations here.")
    assert {finding.subject for finding in found} >= {"transformers:sdpa", "liger:sdpa"}
