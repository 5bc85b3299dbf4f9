"""No sentence may claim what a verdict does not support."""

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
from qwen3bench.reporting.conditions import conditions
from qwen3bench.reporting.findings import findings, grouped
from qwen3bench.reporting.findings_cells import shown_faster
from qwen3bench.reporting.findings_undecided import Judged, allowed_variance, processes_needed, would_decide
from qwen3bench.reporting.over_runs import effects_over, over_findings
from qwen3bench.reporting.plot_across import regimes
from qwen3bench.reporting.plot_effects import by_condition, forest
from qwen3bench.reporting.units import ratio
from qwen3bench.reporting.wording import Finding, verdict_of, worth

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


def of_kind(found: list[Finding], kind: str) -> list[str]:
    return [finding.text for finding in found if finding.kind == kind]


def texts(run: Run, kind: str) -> list[str]:
    return of_kind(findings(run), kind)


def about(found: list[Finding], name: str) -> str:
    return next(text for text in of_kind(found, "switch") if text.startswith(f"{name}:"))


def of_switch(run: Run, name: str) -> str:
    return about(findings(run), name)


def test_a_quiet_run_says_what_was_planted(full_findings: list[Finding]) -> None:
    together = of_kind(full_findings, "together")
    assert any("All 5 switches together: 1.57" in text or "together: 1.58" in text for text in together)
    assert all("on NVIDIA H100" in text for text in together)
    assert "the same within ±1 %" in about(full_findings, "tie")
    assert "faster" not in about(full_findings, "tie")
    assert "1.271" in about(full_findings, "norm")
    assert "faster (prefill 1×512 graph)" in about(full_findings, "norm")
    memory = next(text for text in of_kind(full_findings, "memory") if text.startswith("tie "))
    assert "costs no latency beyond ±1 %" in memory
    assert "−296.8 MiB" in memory
    assert not [finding for finding in full_findings if finding.level == "warning"]


def test_a_cell_that_failed_explains_no_interaction(full_run: Run) -> None:
    run = with_cell(full_run, "flash+mask", status="not_equivalent")
    found = [text for text in texts(run, "interaction") if text.startswith("flash and mask")]
    assert found
    assert not any("What ran" in text for text in found)


def test_an_interaction_names_what_ran_and_where_the_switch_pays(full_findings: list[Finding]) -> None:
    text = of_kind(full_findings, "interaction")[0]
    assert text.startswith("flash and mask: each is worth more with the other on, joint effect 1.020")
    assert "mask pays only with flash: with it 1.0" in text
    assert "faster; without it the same within ±1 %" in text
    backends = "none (baseline), cudnn (flash), none (mask), flash_attention (flash+mask)"
    assert f"attention backend {backends}" in text
    assert "; fused attention is given a mask tensor (flash); " in text
    assert "; fused attention without a mask tensor (flash+mask)." in text
    again = [
        text for text in of_kind(full_findings, "interaction") if text.startswith("flash and mask") and "decode" in text
    ]
    assert all("What ran: as in prefill 1×512 graph." in text for text in again)
    assert again
    norms = [text for text in of_kind(full_findings, "interaction") if "norm" in text]
    assert not any("mask tensor" in text for text in norms)  # what two of the four cells share explains no difference


def test_every_number_has_its_condition(full_findings: list[Finding]) -> None:
    for kind in ("together", "recommended", "switch", "interaction", "memory"):
        for text in of_kind(full_findings, kind):
            assert "(prefill 1×512" in text or "(decode 1×512" in text


@pytest.mark.parametrize("verdict", ["same", "undecided"])
def test_no_direction_is_claimed_without_a_verdict(small_run: Run, verdict: str) -> None:
    run = with_effect(small_run, "flash", verdict=verdict, estimate=1.004, lo=0.998, hi=1.03)
    text = of_switch(run, "flash")
    assert verdict in text
    assert "faster" not in text
    assert "slower" not in text


def test_a_slower_switch_is_called_slower(small_run: Run) -> None:
    run = with_effect(small_run, "flash", verdict="slower", estimate=0.95, lo=0.94, hi=0.96)
    assert "slower, 0.95× [0.94, 0.96]" in of_switch(run, "flash")


def test_memory_is_not_called_free_when_latency_is_undecided(small_run: Run) -> None:
    run = with_effect(small_run, "tie", verdict="undecided", estimate=1.0, lo=0.95, hi=1.05)
    text = next(text for text in texts(run, "memory") if text.startswith("tie "))
    assert "costs no latency" not in text
    assert "−296.8 MiB" in text


def test_memory_is_called_free_just_where_latency_is_the_same(full_run: Run) -> None:
    effects = full_run.effects.copy()
    eager = (effects["term"] == "tie") & (effects["metric"] == "latency_s") & (effects["runtime"] == "eager")
    effects.loc[eager, "verdict"] = "undecided"
    text = next(t for t in texts(replace(full_run, effects=effects), "memory") if t.startswith("tie "))
    assert text.startswith("tie lowers peak memory: −296.8 MiB (")
    assert text.endswith("It costs no latency beyond ±1 % in prefill 1×512 graph and decode 1×512 graph.")


def test_an_undecided_effect_says_what_would_decide(small_run: Run) -> None:
    run = with_effect(small_run, "flash", verdict="undecided", estimate=1.002, lo=0.982, hi=1.0224)
    (text,) = texts(run, "undecided")
    assert text.startswith("flash 1.00× [0.98, 1.02] (prefill 1×512 graph).")
    needed = int(text.split("about ")[1].split(" blocks instead of 6 would decide.")[0])
    half_width = math.log(1.0224 / 0.982) / 2
    assert needed == math.ceil(6 * (half_width / (0.01 - math.log(1.002))) ** 2) + 1


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
    text = next(text for text in texts(run, "undecided") if text.startswith("tie 1.00× [0.98, 1.02]"))
    assert re.search(rf" about \d+ {limit} instead of {6 if limit == 'blocks' else 2} would decide", text), text
    assert ("more blocks in the same ones do not lessen" in text) == (limit == "processes")


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
    said = would_decide(small_run, condition, [replace(effect, process_share=share)])
    assert f" {limit} instead of " in said
    if limit == "blocks":
        needed = int(said.split()[1])
        assert (1 - share) * 6 / needed + share <= allowed
        assert (1 - share) * 6 / (needed - 2) + share > allowed


def test_an_undecided_pair_says_what_would_decide(small_run: Run) -> None:
    run = with_effect(small_run, "flash:tie", verdict="undecided", estimate=1.002, lo=0.982, hi=1.0224)
    (text,) = texts(run, "undecided")
    assert text.startswith("Interactions: flash:tie 1.00× [0.98, 1.02] (prefill 1×512 graph). If the estimates stay")
    assert not texts(run, "interaction")


def test_an_interval_beside_one_without_significance_asks_for_processes(small_run: Run) -> None:
    run = with_effect(small_run, "flash", verdict="undecided", estimate=1.06, lo=1.05, hi=1.07, p_holm=0.3)
    (text,) = texts(run, "undecided")
    assert "More processes would decide" in text


def test_an_effect_without_an_interval_asks_for_blocks(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    run = run_of(record_lines(factors=("flash",), blocks=1))
    (text,) = texts(run, "undecided")
    assert text.startswith("flash 1.1")
    assert text.endswith("1 block gives no interval; more would.")
    (text,) = texts(run, "only switch")
    assert "faster" not in text


def test_an_undecided_interaction_is_not_told(full_run: Run) -> None:
    run = with_effect(full_run, "flash:mask", verdict="undecided")
    assert not [text for text in texts(run, "interaction") if "flash and mask" in text]


def test_of_more_than_three_pairs_the_smaller_ones_are_told_by_their_size(full_run: Run) -> None:
    run = full_run
    for n, term in enumerate(("flash:mask", "flash:norm", "mlp:mask", "tie:norm", "mlp:norm")):
        run = with_effect(run, term, verdict="faster", estimate=1.5 - n / 10, lo=1.49 - n / 10, hi=1.51 - n / 10)
    told = [text for text in texts(run, "interaction") if "(prefill 1×512 graph)" in text]
    assert [text.partition(":")[0] for text in told] == [
        "flash and mask", "flash and norm", "mlp and mask", "Smaller joint effects"
    ]  # fmt: skip
    assert "tie:norm 1.20× [1.19, 1.21]" in told[-1]
    assert "mlp:norm 1.10× [1.09, 1.11]" in told[-1]


def test_an_effect_that_cannot_be_estimated_gives_its_reason(small_run: Run) -> None:
    gone = {"verdict": "", "estimate": np.nan, "lo": np.nan, "hi": np.nan, "reason": "aliased with tie"}
    text = of_switch(with_effect(small_run, "flash", **gone), "flash")
    assert text == "flash: not known (prefill 1×512 graph: aliased with tie)."


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
    found = findings(run)
    assert f"Each switch, {others}" in dict(grouped(found))
    (text,) = [finding.text for finding in found if finding.text.startswith("mlp: ")]
    on, off = ("mlp", "baseline") if "mlp" in names else ("flash+mlp+mask", "flash+mask")
    latency = run.cells.set_index("cell")["latency_s"].astype(float)
    effect = run.effects.query("metric == 'latency_s' and kind == 'main' and term == 'mlp'").iloc[0]
    assert effect["estimate"] == pytest.approx(latency[off] / latency[on], rel=0.002)
    assert text.startswith(f"mlp: {ratio(effect['estimate'], effect['lo'], effect['hi'])} faster (")
    assert "average" not in " ".join(finding.text for finding in found)


def test_what_is_told_beside_the_others_off_is_so_without_an_interval_too(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    lines = record_lines(factors=("flash", "mlp", "mask"), blocks=1)
    found = findings(run_of(of_design(lines, ["baseline", "flash", "mlp", "mask"])))
    (text,) = [finding.text for finding in found if finding.text.startswith("mlp: ")]
    assert text.endswith("(prefill 1×512 graph: no interval: one block).")
    assert "Each switch, with the others off" in dict(grouped(found))


def decode_whole_prefill_alone(record_lines: Callable[..., Lines]) -> Lines:
    """A run whose prefill lost the cells with two switches and more."""
    lines = record_lines(factors=("flash", "mlp", "mask"), workloads=("prefill", "decode"))
    kept = (None, "baseline", "flash", "mlp", "mask")
    return [line for line in lines if line.get("workload") != "prefill" or line.get("cell") in kept]


def test_where_conditions_tell_different_things_each_says_which(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    run = run_of(decode_whole_prefill_alone(record_lines))
    found = findings(run)
    (group,) = [group for heading, group in grouped(found) if heading == "Each switch, beside others that differ"]
    assert [finding.text.split(":")[0] for finding in group] == ["flash", "mlp", "mask"]
    for finding in group:
        assert "(prefill 1×512 graph: with the others off" in finding.text
        assert "(decode 1×512 graph: on average over the others)" in finding.text
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
    assert "each switch" not in noted(whole.figure)
    frame = effects_over([run])
    assert sorted(frame["others"].unique()) == ["on average over the others", "with the others off"]
    told = [finding.text for finding in over_findings(frame, ["flash"], 0.01)]
    assert len(told) == 2
    for text in told:
        assert ("prefill" in text) == ("decode" not in text) == ("with the others off" in text)
    with figures.style():
        plot = regimes(frame, ["flash", "mlp", "mask"], 0.01)
    assert plot is not None
    assert plot.title == "What the other switches do differs from run to run"


def noted(figure: Figure) -> str:
    return " ".join(text.get_text() for text in figure.findobj(Text))


@pytest.mark.parametrize("lost", [False, True])
def test_a_half_that_lacks_a_cell_tells_nothing_of_a_pair(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run], lost: bool
) -> None:
    """Without the baseline the half without flash tells mask beside norm alone, the half with it an average."""
    lines = record_lines(factors=("flash", "mask", "norm"))
    pairs = texts(run_of(without_baseline(lines) if lost else lines), "interaction")
    (text,) = [text for text in pairs if text.startswith("flash and mask")]
    assert ("mask pays only with flash" in text) == (not lost)
    assert ("without it" in text) == (not lost)


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
    (text,) = [text for text in texts(run_of(lines), "undecided") if "cannot be told" in text]
    assert ("design=full" in text) == advised


def test_of_a_pair_of_cells_one_sentence_says_that_no_switch_can_be_told(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    run = run_of(of_design(record_lines(factors=("flash", "mlp", "mask")), ["baseline", "flash+mlp+mask"]))
    assert not texts(run, "switch")
    (text,) = texts(run, "undecided")
    assert "cannot be told from the cells measured" in text


@pytest.mark.parametrize("status", ["oom", "not_equivalent", "crashed", "timeout", "invalid"])
def test_a_failed_cell_is_named_and_never_praised(small_run: Run, status: str) -> None:
    run = with_cell(small_run, "flash+tie", status=status, reason="it did not work\nsecond line")
    (text,) = texts(run, "failure")
    assert text == f"flash+tie has status {status} and no speed-up: it did not work."
    praised = [finding.text for finding in findings(run) if finding.kind in ("together", "recommended")]
    assert not [text for text in praised if "flash+tie" in text or "together" in text]


def test_a_noisy_run_warns_recommends_nothing_and_tells_noise_from_gain(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    run = run_of(record_lines(factors=("flash", "mlp"), copy_shift=0.02))
    assert any(
        text.startswith("Noisy: two copies of the baseline differ by more than 0.5 %") for text in texts(run, "control")
    )
    assert texts(run, "recommended") == ["No recommendation for prefill 1×512 graph: it is noisy."]
    assert "no more than the noise" in of_switch(run, "mlp")  # 1.2 %, but the copies are 2 % apart
    assert "faster (prefill 1×512 graph, noisy)" in of_switch(run, "flash")


def test_nothing_is_recommended_when_nothing_is_shown_to_be_faster(small_run: Run) -> None:
    cells = small_run.cells.assign(speedup=1.001, speedup_lo=0.98, speedup_hi=1.022)
    run = replace(small_run, cells=cells)
    assert texts(run, "recommended") == ["No cell is shown to be faster than the baseline (prefill 1×512 graph)."]
    assert all("undecided" in text for text in texts(run, "together"))


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


def limited(run: Run, gib: float) -> Run:
    return replace(run, config=run.config | {"report": {"memory_limit_gib": gib}})


def test_a_recommendation_without_memory_claims_none(small_run: Run) -> None:
    run = replace(small_run, cells=small_run.cells.assign(peak_allocated_bytes=pd.NA))
    (text,) = texts(run, "recommended")
    assert text.startswith("flash: ")
    assert text.endswith("of these it has the fewest switches.")


@pytest.mark.filterwarnings("error")
def test_a_baseline_whose_fellows_all_failed_is_quiet(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    lines = record_lines(factors=TWO)
    failed = [{"type": "failure", "cell": cell, "status": "oom", "reason": "no room"} for cell in lines[0]["cells"][1:]]
    found = findings(run_of([*lines[:-1], *failed, lines[-1]]))
    assert not [finding.text for finding in found if "faster" in finding.text]


def test_the_recommendation_keeps_the_memory_limit(small_run: Run) -> None:
    (free,) = texts(small_run, "recommended")
    assert free.startswith("flash+tie: ")
    need = small_run.cells.set_index("cell")["peak_allocated_bytes"] / 2**30
    (none,) = texts(limited(small_run, float(need.min()) - 0.01), "recommended")
    assert none.startswith("No cell fits within ")
    (fits,) = texts(limited(with_cell(small_run, "flash+tie", peak_allocated_bytes=2**40), 4), "recommended")
    assert fits.startswith("flash within 4 GiB: ")


def test_a_memory_limit_without_measured_memory_is_said_to_be_unknown(small_run: Run) -> None:
    run = replace(small_run, cells=small_run.cells.assign(peak_allocated_bytes=pd.NA))
    (text,) = texts(limited(run, 4), "recommended")
    assert "unknown: peak memory was not measured" in text


def test_equal_cells_are_settled_by_memory(small_run: Run) -> None:
    (text,) = texts(small_run, "recommended")
    assert "It and 1 other cell are as fast within ±1 %, as far as can be told" in text


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
    (text,) = texts(run, "recommended")
    assert text.startswith("flash+mlp: ")
    assert "as far as can be told" not in text


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
    (text,) = texts(run_of(lines), "recommended")
    assert text.startswith("flash+mlp: ")
    assert "Of 1 more cell it is not shown" in text


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
    (text,) = texts(run, "recommended")
    assert ("it is not shown" in text) == (not shown)


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
    given: list[float] = []

    def shown(cells: pd.DataFrame, freedom: float, *rest: float) -> pd.Series:
        given.append(freedom)
        return shown_faster(cells, freedom, *rest)

    monkeypatch.setattr(findings_cells, "shown_faster", shown)
    assert texts(small_run, "recommended")
    others = [cell for cell in small_run.cells["cell"] if cell != "baseline"]
    assert given == [block_matrix(small_run.samples).log_ratios("baseline", others).df.min()]
    assert 2 < given[0] <= 3  # a prior is worth at most two beside the one of two processes


def without_baseline(lines: Lines) -> Lines:
    return [line for line in lines if not (line["type"] in ("sample", "visit") and line["cell"] == "baseline")]


def test_without_a_baseline_nothing_is_compared_with_it(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    run = run_of(without_baseline(record_lines(factors=("flash", "tie", "norm"))))
    (text,) = texts(run, "together")
    assert text.startswith("All 3 switches together: 4.8")
    assert "the baseline has no latency to compare with" in text
    (text,) = texts(run, "recommended")
    assert text.endswith("the baseline has no latency to compare with.")
    assert all(
        "without baseline, interactions of more than 2 factors taken for nil)" in t for t in texts(run, "memory")
    )


def test_a_failure_names_where_it_failed(record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]) -> None:
    lines = record_lines(factors=TWO, workloads=("prefill", "decode"))
    where = {"cell": "flash", "workload": "decode", "runtime": "graph", "status": "oom", "pass": "time"}
    run = run_of([*lines[:-1], {"type": "failure", **where, "reason": "no room"}, lines[-1]])
    assert texts(run, "failure") == ["flash has status oom and no speed-up: no room (decode 1×512 graph)."]


def test_a_pair_that_is_undecided_says_what_would_decide(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    pair = (None, "baseline", "tie+mlp")
    lines = [line for line in record_lines(factors=("tie", "mlp")) if line.get("cell") in pair]
    lines[0]["cells"] = list(pair[1:])
    run = with_cell(run_of(lines), "tie+mlp", speedup=1.004, speedup_lo=0.99, speedup_hi=1.02)
    _, text = texts(run, "undecided")
    assert text.startswith("tie+mlp 1.00× [0.99, 1.02] (prefill 1×512 graph).")
    assert "would decide" in text


def test_a_single_cell_compares_nothing(record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]) -> None:
    run = run_of(record_lines(factors=()))
    (text,) = texts(run, "together")
    assert text.startswith("The baseline takes 7.")
    assert "tokens/s" in text
    assert not [finding for finding in findings(run) if finding.kind in ("switch", "recommended", "interaction")]


def test_a_partial_run_says_so(record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]) -> None:
    lines = record_lines(factors=TWO, workloads=("prefill", "decode"))
    cut = [
        line for line in lines if line["type"] != "end" and not (line.get("workload") == "decode" and "block" in line)
    ]
    run = run_of(cut)
    assert any("has not finished" in text for text in texts(run, "missing"))
    assert any(text.startswith("Without any latency: decode 1×512 graph") for text in texts(run, "missing"))


def test_a_run_with_nothing_measured_has_only_warnings(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    run = run_of([line for line in record_lines(factors=TWO) if line["type"] in ("run", "session")])
    assert {finding.level for finding in findings(run)} == {"warning"}


def test_cells_without_a_latency_are_named(small_run: Run) -> None:
    run = with_cell(small_run, "flash", latency_s=np.nan, speedup=np.nan)
    assert "1 cell of 4 without a latency: flash (prefill 1×512 graph)." in texts(run, "missing")


def test_unverified_cells_are_named(small_run: Run) -> None:
    run = with_cell(small_run, "flash", equivalent=None)
    assert "Not verified to compute the baseline's function: flash." in texts(run, "control")


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
    assert texts(run, "peer") == [
        "transformers:sdpa takes 1.000 ms; against the baseline 3.00× [2.90, 3.10] faster (prefill 1×512 graph)."
    ]
    assert not [text for text in texts(run, "recommended") if "transformers" in text]


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
    (text,) = texts(run, "peer")
    assert "flash+tie against it no more than the noise, 1.0" in text
    assert text.endswith(" Noisy.")


def test_against_a_peer_one_block_gives_a_number(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    (text,) = texts(run_of(with_peer(record_lines(factors=TWO, blocks=1), 1.2)), "peer")
    assert "not measured" not in text
    assert "against it 1.20" in text


@pytest.mark.parametrize(
    ("slower", "said"), [(1.2, "1.20"), (1.0, "the same within ±1 %, 1.00"), (0.9, "slower, 0.90")]
)
def test_all_on_is_measured_against_a_peer(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run], slower: float, said: str
) -> None:
    lines = with_peer(record_lines(factors=TWO), slower)
    (text,) = texts(run_of(lines), "peer")
    assert re.search(rf"; flash\+tie against it {said}\d*× \[.*\](| faster) \(prefill", text), text


def against(text: str) -> dict[str, float]:
    """The cells that a sentence sets against a peer, with their ratios."""
    found = re.findall(r"; (\S+?(?:, the fastest,)?) against it (?:[^;]*?, )?([\d.]+)×", text)
    return {cell: float(gain) for cell, gain in found}


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
    (text,) = texts(run_of(with_peer(lines, 1.2, kept[2])), "peer")
    assert against(text) == pytest.approx({kept[2]: 1.2, kept[3]: 1.56}, abs=0.01)


@pytest.mark.parametrize(("faster", "told"), [(1.1, True), (1.005, False)])
def test_the_fastest_cell_is_set_against_a_peer_where_it_is_not_all_on(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run], faster: float, told: bool
) -> None:
    lines = record_lines(factors=TWO)
    for line in lines:
        if line["type"] == "sample" and line["cell"] == "flash":
            line["latency_s"] /= faster
    (text,) = texts(run_of(with_peer(lines, 1.2)), "peer")
    expected = {"flash+tie": 1.2} | ({"flash, the fastest,": 1.2 * faster} if told else {})
    assert against(text) == pytest.approx(expected, abs=0.01)


def test_a_failed_all_on_leaves_the_fastest_against_a_peer(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    run = with_cell(run_of(with_peer(record_lines(factors=TWO), 1.2)), "flash+tie", status="not_equivalent")
    (text,) = texts(run, "peer")
    assert list(against(text)) == ["flash, the fastest,"]


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


def test_words_without_a_verdict_claim_nothing() -> None:
    assert worth("", 1.2, 1.1, 1.3, 0.01) == "1.20× [1.10, 1.30] without a verdict"
    assert worth("missing", math.nan, math.nan, math.nan, 0.01) == "not measured"


def test_every_plain_finding_has_a_heading(full_findings: list[Finding]) -> None:
    plain = [finding for finding in full_findings if finding.level == "plain"]
    assert sum(len(group) for _, group in grouped(plain)) == len(plain)
    x = Finding("x", "switch")
    assert grouped([x]) == [("Each switch, on average over the others", [x])]
