import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qwen3bench.analysis.run import Run
from qwen3bench.reporting.whatif import as_script, whatif

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
