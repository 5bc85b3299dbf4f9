import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from qwen3bench.analysis.frames import block_matrix
from qwen3bench.analysis.run import Run
from qwen3bench.record.design import cell_of, label
from qwen3bench.reporting.findings_cells import ratios_over
from qwen3bench.reporting.whatif import as_script, whatif
from qwen3bench.reporting.wording.ratio_words import worth_said

Lines = list[dict[str, Any]]


@pytest.fixture
def run(record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]) -> Run:
    return run_of(record_lines(factors=("flash", "tie", "mask")))


def test_every_measured_cell_is_there_with_what_each_flip_gives(run: Run) -> None:
    data = whatif(run, {})
    assert data
    (here,) = data["conditions"]
    assert set(here["cells"]) == set(run.cells["cell"])
    assert {len(flips) for flips in here["flips"].values()} == {3}
    speedup = run.cells.set_index("cell")["speedup"]
    for cell, name, other in (("flash", "mask", "flash+mask"), ("flash+tie+mask", "flash", "tie+mask")):
        said = float(here["flips"][cell][name]["latency"].partition("×")[0])
        assert said == pytest.approx(speedup[other] / speedup[cell], rel=0.002)
    assert here["flips"]["tie"]["tie"]["memory"] == "+296.8 MiB"
    assert here["flips"]["baseline"]["tie"] == {
        "latency": here["flips"]["baseline"]["tie"]["latency"],
        "verdict": "same",
        "memory": "−296.8 MiB",
    }


@pytest.mark.parametrize("planted", [True, False])
def test_a_flip_of_what_changes_nothing_that_runs_says_so_unless_it_shows_a_difference(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run], planted: bool
) -> None:
    lines = record_lines(factors=("flash", "tie"))
    seen = {line["cell"]: line for line in lines if line["type"] == "evidence"}
    for cell, without in (("flash", "baseline"), ("flash+tie", "tie")):
        seen[without]["output"] = without
        seen[cell].update({**seen[without], "cell": cell})
    for line in [line for line in lines if line["type"] == "sample" and not planted]:
        line["latency_s"] = 1.0 + line["block"] % 2
    data = whatif(run_of(lines), {})
    assert data
    (here,) = data["conditions"]
    assert here["idle"] == ["flash"]
    verdicts = [here["flips"][cell]["flash"]["verdict"] for cell in ("baseline", "flash", "tie", "flash+tie")]
    assert verdicts == (["faster", "slower"] * 2 if planted else ["changes nothing"] * 4)
    assert here["flips"]["baseline"]["flash"]["latency"].endswith("]" if planted else "], changes nothing")
    assert here["flips"]["baseline"]["tie"]["verdict"] == "same"


def test_a_flip_and_its_way_back_are_each_others_inverse(run: Run) -> None:
    data = whatif(run, {})
    assert data
    flips = data["conditions"][0]["flips"]
    on, off = (float(flips[cell]["flash"]["latency"].partition("×")[0]) for cell in ("baseline", "flash"))
    assert on * off == pytest.approx(1, abs=1e-3)


def test_a_cell_that_failed_has_its_reason_and_no_flip(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    lines = record_lines(factors=("flash", "tie"))
    failure = {"type": "failure", "cell": "tie", "status": "oom", "reason": "no room"}
    data = whatif(run_of([*lines[:-1], failure, lines[-1]]), {})
    assert data
    (here,) = data["conditions"]
    assert here["cells"]["tie"]["status"] == "oom: no room"
    assert "latency" not in here["flips"].get("tie", {})
    assert set(here["flips"]["baseline"]) == {"flash"}


@pytest.mark.parametrize("names", [["baseline", "flash+tie"], ["baseline"]])
def test_where_no_two_cells_differ_in_one_switch_there_is_nothing_to_toggle(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run], names: list[str]
) -> None:
    lines = [line for line in record_lines(factors=("flash", "tie")) if line.get("cell") in (None, *names)]
    lines[0]["cells"] = names
    assert whatif(run_of(lines), {}) is None


def test_the_data_cannot_leave_its_script() -> None:
    data = {"a": "</script><script>alert(1)</script><!-- & \u2028", "b": [1.5, "×"]}
    text = as_script(data)
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == data
    with pytest.raises(ValueError, match="JSON"):
        as_script({"x": np.nan})


def test_cells_that_share_no_block_are_compared_by_their_speedups(screened_run: Run) -> None:
    data = whatif(screened_run, {})
    assert data
    (here,) = data["conditions"]
    row = screened_run.cells.set_index("cell")
    off, on = "flash+mlp+mask+norm", "flash+tie+mlp+mask+norm"  # both confirm the screen, in blocks of their own
    said = here["flips"][off]["tie"]["latency"]
    assert float(said.partition("×")[0]) == pytest.approx(row.loc[on, "speedup"] / row.loc[off, "speedup"], rel=0.01)
    assert here["flips"][on]["tie"]["verdict"] == "faster"
    measured = set(screened_run.cells["cell"])
    neighbors = [
        (cell, name)
        for cell in measured
        for name in screened_run.factors
        if label(tuple(each for each in screened_run.factors if (each in cell_of(cell)) != (each == name))) in measured
    ]
    assert len(neighbors) == 4
    assert [(cell, name) for cell, name in neighbors if name not in here["flips"].get(cell, {})] == []


def test_cells_that_confirm_a_screen_are_compared_in_their_own_blocks(screened_run: Run) -> None:
    data = whatif(screened_run, {})
    assert data
    off, on = "flash+mlp+mask+norm", "flash+tie+mlp+mask+norm"
    (samples,) = (samples for samples in screened_run.rounds if {off, on} <= {*samples["cell"]})
    blocks = block_matrix(samples, screened_run.cells["cell"].tolist())
    (effect,) = ratios_over(screened_run, blocks, off, [on])
    said = data["conditions"][0]["flips"][off]["tie"]
    assert said["latency"] == worth_said(replace(effect, verdict=said["verdict"]))


def test_each_step_of_a_screens_model_has_its_interval(screened_run: Run) -> None:
    data = whatif(screened_run, {})
    assert data
    (here,) = data["conditions"]
    for i, name in enumerate(screened_run.factors):
        steps = here["steps"][name]
        assert len(steps) == 2**8
        for place, (worth, off) in enumerate(steps):
            begin = (place >> i << (i + 1)) | (place & (2**i - 1))
            before, after = here["predicted"][begin], here["predicted"][begin | (1 << i)]
            assert worth == pytest.approx(after[0] / before[0], rel=2e-3)
            assert off >= 1  # four digits
    assert any(off > 1 for steps in here["steps"].values() for _, off in steps)
