import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from records import write_record

from qwen3bench.analysis.run import Run, load_run
from qwen3bench.record.files import COMPRESSED, RECORD, find_runs
from qwen3bench.reporting import figures
from qwen3bench.reporting.across import write_overview
from qwen3bench.reporting.finding import Control, Kind, Level, Regime
from qwen3bench.reporting.over_runs import dependent, effects_over, over_findings, over_table
from qwen3bench.reporting.plot_across import regimes, trends

Lines = list[dict[str, Any]]
NAMES = ("flash", "tie")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> list[Run]:
    """Three runs over the prompt's length; the last one is noisy."""
    lines: Callable[..., Lines] = request.getfixturevalue("record_lines")
    found = []
    for place, tokens in enumerate((128, 512, 2048)):
        directory = tmp_path_factory.getbasetemp() / "multirun" / str(place)
        of_run = lines(factors=NAMES, prompt_tokens=tokens, copy_shift=0.02 * (place == 2))
        found.append(load_run(write_record(directory, of_run)))
    return found


def effects(**verdicts: list[str]) -> pd.DataFrame:
    """Effects over runs with these verdicts per switch, one condition each."""
    estimate = {"faster": 1.2, "slower": 0.9, "same": 1.0, "undecided": 1.02}
    return pd.DataFrame(
        {
            "run": place,
            "condition": f"prefill 1×{2**place} graph",
            "others": "on average over the others",
            "noisy": False,
            "term": term,
            "estimate": estimate[verdict],
            "lo": estimate[verdict] - 0.01,
            "hi": estimate[verdict] + 0.01,
            "verdict": verdict,
        }
        for term, row in verdicts.items()
        for place, verdict in enumerate(row)
    )


def regime(frame: pd.DataFrame, name: str) -> Regime:
    (finding,) = over_findings(frame, [name], 0.01)
    assert isinstance(finding.detail, Regime)
    return finding.detail


def test_conditions_are_counted_by_verdict_with_the_effects_that_are_decided() -> None:
    found = regime(effects(flash=["faster", "slower", "same", "undecided"]), "flash")
    assert (found.total, found.same, found.undecided) == (4, 1, 1)
    assert [effect.estimate for effect in found.faster] == [1.2]
    assert [effect.estimate for effect in found.slower] == [0.9]


def test_what_is_no_more_than_the_noise_does_not_count() -> None:
    frame = effects(flash=["faster", "slower"])
    frame.loc[1, ["noisy", "verdict"]] = True, "noise"
    warning, plain = over_findings(frame, ["flash"], 0.01)
    assert [warning.level, plain.level] == [Level.WARNING, Level.PLAIN]
    assert isinstance(plain.detail, Regime)
    assert (plain.detail.total, plain.detail.slower, plain.detail.noise) == (2, (), 1)
    frame["noisy"] = True
    control = next(over_findings(frame, ["flash"], 0.01)).detail
    assert isinstance(control, Control)
    assert control.names == ("prefill 1×1 graph", "prefill 1×2 graph")


def test_effects_of_runs_stand_side_by_side(runs: list[Run]) -> None:
    frame = effects_over(runs)
    assert len(frame) == len(runs) * len(NAMES)
    assert frame["noisy"].tolist() == [False] * 4 + [True] * 2
    assert frame["condition"].unique().tolist() == [f"prefill 1×{n} graph" for n in (128, 512, 2048)]
    table = over_table(frame, NAMES)
    assert table.headings == ["run", "condition", "blocks", "processes", "control", "flash", "tie"]
    assert [row[0].text for row in table.rows] == ["1", "2", "3"]
    assert [row[4].text for row in table.rows] == ["", "", "noisy"]
    counts = [(run.samples["block"].nunique(), run.samples["process"].nunique()) for run in runs]
    assert [(row[2].text, row[3].text) for row in table.rows] == [tuple(map(str, each)) for each in counts]


@pytest.mark.parametrize(("lo", "said"), [(0.96, "copies agree within 16 %"), (math.nan, "no interval")])
def test_a_control_that_cannot_tell_is_said_beside_its_condition(runs: list[Run], lo: float, said: str) -> None:
    aa = runs[0].controls.aa.assign(ratio=1.054, lo=lo, hi=1.157)
    unsure = replace(runs[0], controls=replace(runs[0].controls, aa=aa))
    table = over_table(effects_over([unsure, runs[2]]), NAMES)
    assert [row[4].text for row in table.rows] == [said, "noisy"]


def test_what_differs_between_runs_becomes_part_of_the_condition(runs: list[Run]) -> None:
    runs[0].cells["device"] = "another card"
    try:
        assert effects_over(runs)["condition"].iloc[0] == "prefill 1×128 graph (another card)"
    finally:
        runs[0].cells["device"] = runs[1].cells["device"].iloc[0]


def test_threads_of_a_cpu_that_differ_become_part_of_the_condition(runs: list[Run]) -> None:
    """A multirun beside other work: some points have all threads, some fewer. Old records do not say."""
    config = {**runs[0].config, "device": "cpu"}
    two, one, old = (
        replace(run, config=config, environment={"torch_threads": threads})
        for run, threads in zip(runs, (2, 1, None), strict=True)
    )
    told = [f"prefill 1×{n} graph{more}" for n, more in ((128, " (2 threads)"), (512, " (1 thread)"), (2048, ""))]
    assert effects_over([two, one, old])["condition"].unique().tolist() == told
    assert effects_over([two, replace(one, environment=two.environment)])["condition"].iloc[0] == "prefill 1×128 graph"


def test_another_number_of_threads_and_other_logits_are_lines_of_their_own(runs: list[Run]) -> None:
    last = {"device": "cpu", "workload": {"prefill": {"logits_to_keep": 1}}}
    threads = [replace(run, config={"device": "cpu"}, environment={"torch_threads": n}) for n in (1, 2) for run in runs]
    logits = [*runs, *(replace(run, config={**run.config, **last}) for run in runs)]
    for several, names in (
        (threads, ["prefill graph 1 thread", "prefill graph 2 threads"]),
        (logits, ["prefill graph", "prefill last logits graph"]),
    ):
        with figures.style():
            plot = trends(effects_over(several), NAMES, 0.01)
        assert plot is not None
        (legend,) = [found for axes in plot.figure.axes if (found := axes.get_legend())]
        assert sorted(text.get_text() for text in legend.get_texts()) == names


def test_trends_need_three_lengths(runs: list[Run]) -> None:
    frame = effects_over(runs)
    with figures.style():
        whole = trends(frame, NAMES, 0.01)
        assert whole is not None
        assert whole.title.startswith("Effects from 128 to 2048 prompt tokens")
        assert len(whole.figure.axes) == 3  # two switches and a place for the legend
        assert trends(frame[frame["run"] < 3], NAMES, 0.01) is None
        plot = regimes(frame, NAMES, 0.01)
        assert plot is not None
        assert plot.title == "Faster on average wherever it is not noisy: flash"
        plot = regimes(frame[~frame["noisy"]], NAMES, 0.01)
        assert plot is not None
        assert plot.title == "Faster on average everywhere: flash"


def test_a_map_of_too_many_rows_says_so(runs: list[Run]) -> None:
    frame = effects_over(runs)
    conditions = len(frame[["run", "condition"]].drop_duplicates())
    said = f"the first {conditions - 1} of {conditions} conditions"
    for most in (conditions, conditions - 1):
        with figures.style():
            plot = regimes(frame, NAMES, 0.01, most)
        assert plot is not None
        assert any(said in text.get_text() for text in plot.figure.texts) is (most < conditions)


def test_the_map_marks_noise_otherwise_than_undecided(runs: list[Run]) -> None:
    """And its legend names each mark that is on it, and no other."""
    frame = effects_over(runs)
    verdicts = ["faster", "same", "undecided", "noise"]
    frame = frame.head(4).assign(verdict=verdicts)
    said = ("* faster or slower", "= same within ±1 %", "? undecided", "~ within the noise")
    for number in range(1, 5):
        shown = frame.head(number)
        with figures.style():
            plot = regimes(shown, NAMES, 0.01)
        assert plot is not None
        note = " ".join(plot.figure.texts[-1].get_text().split())
        assert [each in note for each in said] == [place < number for place in range(4)]
        marks = [text.get_text()[-1] for text in plot.figure.axes[0].texts]
        assert marks == ["*", "=", "?", "~"][:number]


def test_a_trend_is_told_along_one_line_and_not_across_them(runs: list[Run]) -> None:
    """Eager was measured at the short prompts alone; graph, which does not change, at all."""
    frame = effects_over(runs)
    frame = frame[frame["term"] == "flash"].assign(noisy=False, estimate=1.2, lo=1.19, hi=1.21)
    eager = frame.iloc[:2].assign(runtime="eager", estimate=[1.05, 1.06], lo=1.0, hi=1.1)
    with figures.style():
        still = trends(pd.concat([frame, eager]), ["flash"], 0.01)
        frame.loc[frame["run"] == 3, ["estimate", "lo", "hi"]] = 1.4, 1.39, 1.41
        moved = trends(pd.concat([frame, eager]), ["flash"], 0.01)
    assert still is not None
    assert moved is not None
    assert still.title == "Effects from 128 to 2048 prompt tokens"
    assert moved.title.endswith(": flash 1.20× at 128 → 1.40× at 2048 (prefill graph)")


def test_the_lines_of_a_trend_differ_in_gray_and_are_named(runs: list[Run]) -> None:
    frame = effects_over(runs)
    many = pd.concat([frame.assign(device=f"card {n}") for n in range(21)])
    with figures.style():
        plot = trends(many[many["term"] == "flash"], ["flash"], 0.01)
    assert plot is not None
    (legend,) = [found for axes in plot.figure.axes if (found := axes.get_legend())]
    looks = {(line.get_marker(), line.get_linestyle()) for line in legend.get_lines()}
    assert len(looks) == len(legend.get_texts()) == 21


def test_no_label_leaves_the_picture(runs: list[Run], tmp_path: Path) -> None:
    """Text is as wide in the file as it was in the layout, whatever the resolution."""
    frame = effects_over(runs)
    frame["condition"] += " (NVIDIA H100 80GB HBM3, bfloat16)"
    with figures.style():
        plot = regimes(frame, NAMES, 0.01)
        assert plot is not None
        figures.save(plot, tmp_path)
        plot.figure.set_dpi(150)
        plot.figure.draw_without_rendering()
        assert all(axes.get_tightbbox().x0 >= 0 for axes in plot.figure.axes)  # type: ignore[union-attr]


def test_what_single_runs_lack_is_said_first(
    runs: list[Run], record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run], tmp_path: Path
) -> None:
    lines = record_lines(factors=NAMES, workloads=("prefill", "decode"))
    failure = {"type": "failure", "cell": "tie", "status": "oom", "reason": "no room"}
    cut = run_of([*(line for line in lines[:-1] if line.get("workload") != "decode"), failure])
    path = write_overview([runs[0], cut], tmp_path / "both")
    text = path.with_suffix(".md").read_text("utf-8")
    assert "**Warning:** Run 2: This run has not finished" in text
    assert "**Warning:** Run 2: tie has status oom and no speed-up. Reason: no room." in text
    assert "Run 2: Without any latency: decode" in text
    assert "Run 1:" not in text


def test_the_overview_is_written_with_links_to_its_runs(runs: list[Run], tmp_path: Path) -> None:
    home = runs[0].path.parent
    for name in ("report.md", "report.html"):
        (runs[0].path / name).touch()
    path = write_overview(runs, home)
    assert path == home / "report.html"
    assert 'href="0/report.html"' in path.read_text("utf-8")
    text = (home / "report.md").read_text("utf-8")
    assert "](0)" in text, "a page that may be kept without those of its runs"
    assert "](1)" in text  # a run whose report was not kept: its directory
    assert "3 runs together" in text
    assert text.count("- flash: fused attention") == 1
    assert "Noisy, where only effects larger than the noise count: prefill 1×2048 graph." in text
    assert (home / "plots" / "regimes.svg").is_file()


def test_what_holds_for_all_runs_is_said_once(runs: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    later = replace(runs[1].record.run, created="2025-02-03T04:05:06+00:00")
    monkeypatch.setattr(runs[1].record, "run", later)
    home = runs[0].path.parent
    page = write_overview(runs, home).read_text("utf-8")
    for text in (page, (home / "report.md").read_text("utf-8")):
        assert text.count("dtype: bfloat16") == 1
        assert "measured:" not in text


def test_runs_are_found_below_a_directory_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name, file in (("10", RECORD), ("2", COMPRESSED), ("1", RECORD)):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}\n")
    (tmp_path / "stopped").mkdir()
    (tmp_path / "stopped" / "samples.jsonl").touch()  # before anything was recorded
    (tmp_path / "latest").symlink_to("2")
    assert [path.name for path in find_runs([tmp_path])] == ["1", "2", "10"]
    assert find_runs([tmp_path / "2", tmp_path / "latest"]) == [tmp_path / "2"]


def test_what_is_no_run_is_left_to_be_named_when_it_is_read(tmp_path: Path) -> None:
    assert find_runs([tmp_path]) == [tmp_path]
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / RECORD)
    assert find_runs([tmp_path]) == [tmp_path / "pipe"]


def test_what_an_average_hides_is_told(record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]) -> None:
    run = run_of(record_lines(factors=("flash", "mask")))
    (finding,) = dependent([run, run])
    assert (finding.kind, finding.subject, finding.detail) == (Kind.DEPENDENT, "mask:flash", Regime(total=2))


def test_the_map_comes_first_and_then_one_sentence_a_switch(runs: list[Run], tmp_path: Path) -> None:
    path = write_overview(runs, tmp_path)
    page, text = path.read_text("utf-8"), path.with_suffix(".md").read_text("utf-8")
    for content in (page, text):
        assert content.count("flash is faster in all 3 conditions") == 1
        assert content.index("Effect of every switch under every condition") < content.index("flash is faster in")
