import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from qwen3bench.analysis.run import Run, load_run
from qwen3bench.reporting import figures
from qwen3bench.reporting.conditions import conditions
from qwen3bench.reporting.figures import Plot
from qwen3bench.reporting.plot_cells import memory_latency, pareto_front, ranked
from qwen3bench.reporting.plot_effects import by_condition, forest, interactions
from qwen3bench.reporting.plot_waterfall import waterfall
from qwen3bench.reporting.plots import closing_plots, condition_plots, effect_plots

Lines = list[dict[str, Any]]


REFERENCE = Path(__file__).parents[2] / "results" / "reference"


def drawn(run: Run) -> dict[str, Plot]:
    with figures.style():
        plots = [
            *effect_plots(run),
            *closing_plots(run),
            *(plot for c in conditions(run) for plot in condition_plots(run, c)),
            *(plot for c in conditions(run) if (plot := waterfall(run, c, "latency_s"))),
        ]
    assert len({plot.name for plot in plots}) == len(plots)  # none is drawn twice
    return {plot.name: plot for plot in plots}


@pytest.mark.slow
def test_of_a_single_condition_the_effects_stand_above_alone() -> None:
    assert "effects-train-eager" in drawn(load_run(REFERENCE / "h200-peers-train-8x2048"))


@pytest.mark.slow
def test_a_full_run_has_every_plot(full_run: Run) -> None:
    of_condition = {"effects", "cells", "memory", "waterfall-latency", "waterfall-memory", "interactions", "controls"}
    found = drawn(full_run)
    where = [f"{workload}-{runtime}" for workload in ("prefill", "decode") for runtime in ("graph", "eager")]
    names = {f"{name}-{place}" for name in of_condition for place in where}
    assert set(found) == names | {"effects-by-condition", "roofline"}
    assert all(plot.title and plot.alt for plot in found.values())


@pytest.mark.slow
def test_titles_state_what_is_seen(full_run: Run) -> None:
    found = drawn(full_run)
    assert found["effects-prefill-graph"].title == "Faster on average: norm, flash, mask and mlp; same within ±1 %: tie"
    assert re.match(r"32 cells take 4\.5\d+ ms to 7\.2\d+ ms; the baseline", found["cells-prefill-graph"].title)
    assert "interact; flash and mask are worth more together" in found["interactions-prefill-graph"].title
    assert "tie, −296.8 MiB" in found["waterfall-memory-prefill-graph"].title
    assert "flash and norm" in found["effects-by-condition"].title


@pytest.mark.slow
def test_axes_carry_units_and_counts(full_run: Run) -> None:
    condition = conditions(full_run)[0]
    plot = ranked(full_run, condition)
    assert plot is not None
    assert plot.figure.axes[1].get_xlabel() == "latency (ms), 95 % interval; n = 18 samples per cell"
    assert not re.search(r"\de[+-]?\d", " ".join(text.get_text() for text in drawn(full_run)["roofline"].figure.texts))
    cloud = memory_latency(full_run, condition)
    assert cloud is not None
    assert cloud.figure.axes[0].get_ylabel() == "peak allocated memory (GiB)"


def test_the_steps_of_the_waterfall_end_at_all_on(full_run: Run) -> None:
    plot = waterfall(full_run, conditions(full_run)[0], "peak_allocated_bytes")
    assert plot is not None
    bars = plot.figure.axes[0].patches
    steps, (start, end) = bars[:5], bars[5:]
    drop = sum(bar.get_height() for bar in steps)
    assert start.get_height() - drop == pytest.approx(end.get_height())


def test_plots_without_data_are_left_out(record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]) -> None:
    lines = record_lines(factors=("flash", "tie"), memory=False, evidence=False)
    run = run_of([line for line in lines if line["type"] not in ("cost", "ceiling")])
    assert set(drawn(run)) == {
        f"{name}-prefill-graph" for name in ("effects", "cells", "waterfall-latency", "controls")
    }


@pytest.mark.slow
def test_the_roofline_writes_its_numbers_out(full_run: Run) -> None:
    (plot,) = [plot for plot in drawn(full_run).values() if plot.name == "roofline"]
    plot.figure.draw_without_rendering()
    axes = plot.figure.axes[0]
    shown = [label.get_text() for label in (*axes.get_xticklabels(), *axes.get_yticklabels()) if label.get_text()]
    assert "0.1" in shown
    assert not [text for text in shown if "e" in text]


def test_one_cell_is_a_plot_too(record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]) -> None:
    found = drawn(run_of(record_lines(factors=())))
    assert found["cells-prefill-graph"].title.startswith("baseline: 7.")
    assert not [name for name in found if name.startswith(("effects", "waterfall", "interactions", "memory"))]


def test_no_waterfall_is_made_up_for_a_missing_cell(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    lines = [line for line in record_lines(factors=("flash", "tie", "mask")) if line.get("cell") != "flash"]
    run = run_of(lines)
    condition = conditions(run)[0]
    with figures.style():
        assert waterfall(run, condition, "latency_s") is None
        assert forest(run, condition) is not None


def test_a_direction_in_a_title_needs_its_verdict(full_run: Run) -> None:
    run = replace(full_run, effects=full_run.effects.assign(verdict="undecided"))
    condition = conditions(run)[0]
    with figures.style():
        plots = (forest(run, condition), interactions(run, condition), by_condition(run))
    for plot in plots:
        assert plot is not None
        assert "more" not in plot.title.replace("worth more or less", "")
        assert not plot.title.startswith("Faster")


@pytest.mark.parametrize(("hi", "named"), [(1.20, True), (1.35, False)])
def test_the_largest_share_is_named_where_it_is_apart_from_the_next(full_run: Run, hi: float, named: bool) -> None:
    effects = full_run.effects.copy()
    share = (effects["kind"] == "shapley") & (effects["metric"] == "latency_s") & (effects["term"] == "flash")
    effects.loc[share, "hi"] = hi
    plot = waterfall(replace(full_run, effects=effects), conditions(full_run)[0], "latency_s")
    assert plot is not None
    assert ("the largest share is that of norm" in plot.title) == named


@pytest.mark.slow
def test_no_title_names_one_of_cells_that_are_alike(full_run: Run) -> None:
    """Half of the cells differ from others in `tie` alone, which cannot change latency."""
    cells = [cell for cell in full_run.cells["cell"].unique() if "+" in cell]
    for plot in drawn(full_run).values():
        assert not [cell for cell in cells if cell in plot.title], plot.title


def boxes(figure: Figure) -> tuple[list[Any], list[Any]]:
    """Where annotations stand and where dots are, in pixels."""
    figure.draw_without_rendering()
    texts = [(text.get_text(), text.get_window_extent()) for text in figure.findobj(Annotation)]
    dots = []
    for axes in figure.axes:
        for marks in axes.collections:
            if isinstance(marks, PathCollection):
                radius = np.sqrt(max(marks.get_sizes(), default=0)) / 2 * figure.dpi / 72
                at = marks.get_offset_transform().transform(np.asarray(marks.get_offsets(), dtype=float))
                dots += [(x, y, radius) for x, y in at if np.isfinite((x, y)).all()]
    return texts, dots


@pytest.mark.parametrize("slow", [1.0, 0.62])
def test_the_baselines_label_touches_no_mark(full_run: Run, slow: float) -> None:
    """Where the baseline is as fast as the fastest cell, too."""
    cells = full_run.cells.copy()
    cells.loc[cells["cell"] == "baseline", ["latency_s", "latency_lo_s", "latency_hi_s"]] *= slow
    plot = ranked(replace(full_run, cells=cells), conditions(full_run)[0])
    assert plot is not None
    ((text, box),), dots = boxes(plot.figure)
    assert text == "baseline"
    assert len(dots) > 32
    for x, y, radius in dots:
        assert not (box.x0 - radius < x < box.x1 + radius and box.y0 - radius < y < box.y1 + radius)


def test_noise_tells_nothing_in_the_title_over_conditions(full_run: Run) -> None:
    aa = full_run.controls.aa.copy()
    aa.loc[aa["runtime"] == "graph", ["ratio", "noisy"]] = 1.03, True
    run = replace(full_run, controls=replace(full_run.controls, aa=aa))
    with figures.style():
        plot = by_condition(run)
        assert plot is not None
        assert plot.title == "Faster on average wherever it is not noisy: flash and norm"  # mlp and mask gain less
        labels = [text.get_text() for text in plot.figure.axes[0].get_legend().get_texts()]
        assert [label.startswith("Noisy: ") for label in labels] == [True, False, True, False]
        aa["ratio"], aa["noisy"] = 2.0, True
        plot = by_condition(replace(full_run, controls=replace(full_run.controls, aa=aa)))
    assert plot is not None
    assert plot.title.startswith("Noisy everywhere")


def test_marks_of_what_changes_nothing_are_hollow_and_the_axis_says_so(full_run: Run) -> None:
    run = replace(full_run)
    vars(run)["idle"] = {(condition.workload, condition.runtime): {"tie": 16} for condition in conditions(run)}
    with figures.style():
        plots = [by_condition(each) for each in (run, full_run)]
    marks = []
    for plot in plots:
        assert plot is not None
        (axes,) = plot.figure.axes
        dots = [dot for dot in axes.collections if isinstance(dot, PathCollection) and len(dot.get_offsets())]
        marks.append({to_hex(face) for dot in dots for face in dot.get_facecolor()})
        assert (
            ("hollow: " in axes.get_xlabel())
            == ("hollow: changes nothing; " in axes.get_xlabel())
            == (plot is plots[0])
        )
    assert marks[0] - marks[1] == {figures.PAPER}


@pytest.mark.slow
def test_a_switch_that_helps_only_beside_another_is_not_faster_everywhere() -> None:
    """`mask` on an H200: 1.153× with `flash`, 0.917× without, on average above 1 in both conditions."""
    with figures.style():
        plot = by_condition(load_run(REFERENCE / "h200-ablate-1x2048"))
    assert plot is not None
    assert plot.title == "Faster on average in every condition: flash, mlp and norm; only together: mask with flash"


def test_the_pareto_front_holds_what_nothing_equals_or_beats() -> None:
    rng = np.random.default_rng(0)
    cells = pd.DataFrame(rng.integers(1, 20, (200, 2)), columns=["latency_s", "peak_allocated_bytes"])
    front = pareto_front(cells, 0.0)
    for row in cells.itertuples():
        beaten = (front["latency_s"] <= row.latency_s) & (front["peak_allocated_bytes"] <= row.peak_allocated_bytes)
        assert beaten.any()
    assert front["latency_s"].is_monotonic_increasing
    assert (front["peak_allocated_bytes"].diff().dropna() < 0).all()


def test_what_is_within_the_band_puts_no_cell_on_the_pareto_front() -> None:
    """The first is faster by less, and the last smaller by less; the third gives memory for latency."""
    cells = pd.DataFrame({"latency_s": [0.995, 1.0, 1.5, 2.0], "peak_allocated_bytes": [120.0, 100.0, 80.0, 79.5]})
    assert list(pareto_front(cells, 0.0)["latency_s"]) == [0.995, 1.0, 1.5, 2.0]
    assert list(pareto_front(cells, 0.01)["latency_s"]) == [1.0, 1.5]


def test_no_line_of_a_title_ends_within_a_value() -> None:
    for words in range(12):
        title = f"{'word ' * words}takes 13.45 ms, 3.451× [3.443, 3.459], in 8 MiB and 9 of 10 blocks by 5 %"
        text = figures.new_figure(title, "", 2, 4).get_suptitle()
        lines = text.split("\n")
        assert len(lines) > 1
        assert not [line for line in lines if re.search(r"(13\.45|3\.451×|3\.443,|8|5)$", line)]


@pytest.mark.slow
def test_the_legend_of_processes_covers_none_of_them(full_run: Run) -> None:
    figure = drawn(full_run)["controls-prefill-graph"].figure
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["process 1", "process 2"]
    assert not [axes for axes in figure.axes if axes.get_window_extent().overlaps(legend.get_window_extent())]


def test_another_implementation_is_named_and_each_cell_drawn_once(full_run: Run) -> None:
    condition = conditions(full_run)[0]
    ours = condition.select(full_run.cells)
    off = dict.fromkeys(("flash", "tie", "mlp", "mask", "norm"), pd.NA)
    peer = ours.tail(1).assign(cell="transformers:sdpa", latency_s=1.0, **off)
    run = replace(full_run, cells=pd.concat([ours, peer], ignore_index=True))
    front = pareto_front(condition.select(run.cells), 0.01)
    assert "transformers:sdpa" not in list(front["cell"])  # as slow as none
    with figures.style():
        cloud, rows = memory_latency(run, condition), ranked(run, condition)
    assert cloud is not None
    assert rows is not None
    (axes,) = cloud.figure.axes
    entries = [text.get_text() for text in cloud.figure.legends[0].get_texts()]
    names = [*front["cell"], "transformers:sdpa"]
    assert entries[-len(names) :] == [f"{number}: {name}" for number, name in enumerate(names, 1)]
    numbered = {text.get_text(): text.xy[0] for text in axes.texts if isinstance(text, Annotation)}
    assert numbered[str(len(names))] == pytest.approx(1e3)  # ms
    _, right = rows.figure.axes
    dots = [[each for each in part.collections if isinstance(each, PathCollection)] for part in (axes, right)]
    points = [sum(len(each.get_offsets()) for each in kinds) for kinds in dots]
    assert points == [len(run.cells) + len(front), len(run.cells)]  # the front has rings around


def labels_of(plot: Plot) -> list[Any]:
    """The boxes of the texts within a drawn plot's axes, none of which may touch another."""
    plot.figure.draw_without_rendering()
    (axes,) = plot.figure.axes
    found = [text.get_window_extent() for text in axes.texts if text.get_text()]
    assert not [(a, b) for a, b in combinations(found, 2) if a.overlaps(b)]
    return found


def test_points_of_a_front_that_are_close_have_one_label(full_run: Run) -> None:
    condition = conditions(full_run)[0]
    cells = condition.select(full_run.cells).set_index("cell", drop=False)
    fastest, beside = "flash+tie+mlp+mask+norm", "flash+tie+mask+norm"
    cells.loc[fastest, "peak_allocated_bytes"] += 14_336
    cells.loc[beside, "latency_s"] = 1.002 * cells.loc[fastest, "latency_s"]
    with figures.style():
        plot = memory_latency(replace(full_run, cells=cells.reset_index(drop=True)), condition)
    assert plot is not None
    assert f"Pareto front: {fastest} and {beside}" in plot.alt
    assert len(labels_of(plot)) == 1


def test_small_shares_of_memory_of_nine_switches_have_labels_apart(
    run_of: Callable[[Any], Run], record_lines: Callable[..., Any], nine: tuple[str, ...]
) -> None:
    run = run_of(record_lines(nine, screen=True, evidence=False, blocks=2))
    small = run.effects["metric"].eq("peak_allocated_bytes") & run.effects["kind"].eq("shapley")
    run = replace(run, effects=run.effects.assign(estimate=run.effects["estimate"].mask(small, -7.96 * 2**20)))
    with figures.style():
        plot = waterfall(run, conditions(run)[0], "peak_allocated_bytes")
    assert plot is not None
    assert len(labels_of(plot)) == 9 + 2


@pytest.fixture
def plot() -> Plot:
    figure = Figure()
    axes = figure.subplots()
    axes.plot([1, 2], [3, 4], color=figures.BLUE)
    axes.set_title("a < b & $c$", color=figures.INK)
    return Plot("name", figure, "title", 'alt "quoted" <text>')


def test_files_are_the_same_every_time(tmp_path: Path, full_run: Run) -> None:
    files = []
    for place in ("a", "b"):
        with figures.style():
            plot = forest(full_run, conditions(full_run)[0])
            assert plot is not None
            figures.save(plot, tmp_path / place)
        files.append({path.name: path.read_bytes() for path in (tmp_path / place).iterdir()})
    assert files[0] == files[1]
    assert set(files[0]) == {"effects-prefill-graph.svg"}
    assert b"<text" in files[0]["effects-prefill-graph.svg"]  # text stays text: it can be searched and read aloud


def test_an_embedded_plot_is_well_formed_and_follows_the_theme(tmp_path: Path, plot: Plot) -> None:
    with figures.style():
        svg = figures.save(plot, tmp_path).svg
    root = ET.fromstring(svg)
    assert root.get("aria-label") == plot.alt
    assert root.get("role") == "img"
    assert f"var(--blue, {figures.BLUE})" in svg
    assert f"var(--ink, {figures.INK})" in svg
    assert "a &lt; b &amp; $c$" in svg
    identifiers = [element.get("id") for element in root.iter() if element.get("id")]
    assert all(str(identifier).startswith("name-") for identifier in identifiers)
    assert "<metadata" not in svg


def test_the_style_is_not_left_behind() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    with figures.style():
        assert matplotlib.rcParams["svg.fonttype"] == "none"
    assert dict(matplotlib.rcParams) == before


def test_an_interval_that_tells_nothing_does_not_set_the_axis(full_run: Run) -> None:
    cells, table = full_run.cells.copy(), full_run.effects.copy()
    cells.loc[cells["cell"] == "flash", "latency_hi_s"] = 1e12
    table.loc[table["term"] == "tie", ["lo", "hi"]] = 1e-9, 1e9
    run = replace(full_run, cells=cells, effects=table)
    condition = conditions(run)[0]
    most = 1e3 * condition.select(cells)["latency_s"].max()
    with figures.style():
        plots = [ranked(run, condition), memory_latency(run, condition), forest(run, condition), by_condition(run)]
    for plot, limit in zip(plots, (3 * most, 3 * most, 10, 10), strict=True):
        assert plot is not None
        low, high = plot.figure.axes[-1].get_xlim()
        assert 0 < low < high <= limit


def test_the_legend_over_conditions_stays_inside_however_long_their_names(full_run: Run, tmp_path: Path) -> None:
    cells = full_run.effects.assign(runtime=full_run.effects["runtime"].replace("graph", "graph, with the others off"))
    controls = replace(full_run.controls, aa=full_run.controls.aa.assign(noisy=True))
    run = replace(full_run, effects=cells, controls=controls)
    with figures.style():
        plot = by_condition(run)
        assert plot is not None
        plot.figure.draw_without_rendering()
        box = plot.figure.axes[0].get_legend().get_window_extent()
    assert box.x1 <= plot.figure.bbox.x1
