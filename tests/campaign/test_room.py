"""Cells that do not fit a card's memory together: refused with the size that fits, and none of them is left out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen3bench.campaign import capacity
from qwen3bench.campaign.room import Room, room_of, too_many
from qwen3bench.config.settings import Settings
from qwen3bench.record.lines import BlockLine, FailureLine, MemoryLine
from qwen3bench.record.messages import PeakMemory

pytestmark = pytest.mark.slow

Measure = Callable[..., Any]
GIB = 2**30
SCREEN = ("design=screen", "opt=flash,tie,mlp,mask,norm,qkv", "device=cuda", "runtime=graph")
FULL = ("design=full", "opt=flash,tie", "device=cuda", "runtime=graph")
ALL_ON = "flash+tie"


def takes(graph_gib: float, peak_gib: float = 20.0, **where: Any) -> dict[str, Any]:
    """What every cell takes of a card of 80 GiB, as the fake worker tells it."""
    fields = {"peak_allocated_bytes": int(peak_gib * GIB), "peak_reserved_bytes": int(peak_gib * GIB)}
    return {"does": "answer", "op": "memory", "fields": {**fields, "graph_bytes": int(graph_gib * GIB)}, **where}


def runs_out(ready: int, at: Path) -> list[dict[str, Any]]:
    """Memory is full in a process where so many cells are ready; only once, so that a cell alone finds room."""
    order = ["baseline", "flash", "tie", ALL_ON]
    return [{"does": "error", "op": "prepare", "cell": order[ready], "status": "oom", "once": str(at)}]


def test_a_size_that_does_not_fit_is_refused_before_anything_is_timed(measure: Measure) -> None:
    done = measure(*SCREEN, faults=[takes(2.0)])  # 33 × 2 and 20 GiB
    assert done.error == (
        "33 cells of tiny in prefill, graph need 86.00 GiB at once, and this card has 80.00 GiB\n"
        "about 29 fit: design=screen design.cells=28\n"
    )
    assert not done.record.of(BlockLine)
    assert not done.record.of(FailureLine)
    assert not done.alive
    resumed = measure(resume=done.directory)
    assert "33 cells of tiny in prefill, graph need 86.00 GiB" in resumed.error


def test_what_it_names_fits(measure: Measure) -> None:
    done = measure(*SCREEN, "design.cells=28", faults=[takes(2.0)])
    assert done.status == 0
    assert len(done.run.cells) >= 28
    assert set(done.run.cells["status"]) == {"ok"}


def test_without_graphs_and_without_a_card_nothing_is_refused(measure: Measure) -> None:
    assert measure(*FULL, faults=[takes(0.0, peak_gib=79.9)]).status == 0
    eager = takes(0.0, peak_gib=79.9)
    eager["fields"]["graph_bytes"] = None
    assert room_of({"a": PeakMemory(**eager["fields"])}, ["a", "b"]) is None


def test_training_keeps_the_weights_that_each_visit_starts_from() -> None:
    trained = PeakMemory(peak_allocated_bytes=10, optimizer_bytes=6, graph_bytes=2)
    assert room_of({"a": trained, "b": PeakMemory(peak_allocated_bytes=11, graph_bytes=4)}, ["a", "b"]) == Room(13, 2)


def test_what_processes_beside_took_or_left_meanwhile_refuses_no_size_that_fits() -> None:
    def room(*graphs: int) -> Room | None:
        memory = {str(i): PeakMemory(peak_allocated_bytes=9, graph_bytes=each) for i, each in enumerate(graphs)}
        return room_of(memory, list(memory))

    assert room(5, 5, 0, 5, 5, 900, 5, 5) == Room(9, 5)
    assert room(0, 900, 0, 5, 0, 900, 5, 5) is None


@pytest.mark.parametrize("ready", [1, 3])
def test_memory_that_runs_out_beside_others_is_not_the_cells_failure(
    measure: Measure, tmp_path: Path, ready: int
) -> None:
    done = measure(*FULL, faults=runs_out(ready, tmp_path / "struck"))
    first, second = done.error.splitlines()
    assert first == (
        f"5 cells of tiny in prefill, graph do not fit this card's memory at once: it was full after {ready}"
    )
    assert second.startswith(f"about {ready} fit" if ready > 1 else "about 1 fits")
    assert not done.record.of(FailureLine)
    assert not done.alive


def test_the_first_cell_and_one_that_fails_alone_too_are_out_of_memory_themselves(
    measure: Measure, tmp_path: Path
) -> None:
    first = measure(*FULL, faults=runs_out(0, tmp_path / "struck"))
    assert first.statuses == {"baseline": "oom", "flash": "ok", "tie": "ok", ALL_ON: "ok"}
    always = {"does": "error", "op": "prepare", "cell": "tie", "status": "oom"}
    done = measure(*FULL, faults=[always], to=tmp_path / "alone")
    assert done.status == 3
    assert done.statuses == {"baseline": "ok", "flash": "ok", "tie": "oom", ALL_ON: "ok"}


@pytest.mark.usefixtures("titles_told")
def test_fewer_processes_get_ready_side_by_side_where_graphs_take_their_room(
    measure: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capacity, "usable_cores", lambda: 16)
    asked = (*FULL, "workload=prefill,decode", "measure.min_processes=2", "measure.blocks_per_process=1")
    roomy = measure(*asked, faults=[takes(0.1, peak_gib=20.0)])
    tight = measure(*asked, faults=[takes(8.0, peak_gib=20.0)], to=roomy.directory.with_name("tight"))
    assert (roomy.status, tight.status) == (0, 0)
    assert {line.graph_bytes for line in tight.record.of(MemoryLine)} == {8 * GIB}
    assert "in 2 processes at a time" in roomy.err
    assert "processes at a time" not in tight.err


@pytest.mark.usefixtures("titles_told")
def test_processes_that_train_have_room_for_a_step_beside_the_graphs(
    measure: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three of 16 GiB were ready on a card of 80 until the second cell's step came beside the first one's graph."""
    monkeypatch.setattr(capacity, "usable_cores", lambda: 16)
    peak = takes(0.0, peak_gib=16.0)
    peak["fields"]["optimizer_bytes"] = 4 * GIB
    done = measure(*FULL, "workload=train", "measure.min_processes=3", "measure.blocks_per_process=1", faults=[peak])
    assert done.status == 0
    assert "preparing train graph in 2 processes at a time" in done.err


@pytest.mark.parametrize(
    ("design", "fitting", "mend"),
    [
        ("screen", 40, "design=screen"),
        ("full", 40, "design=screen"),
        ("full", 30, "design=screen design.cells=29"),
        ("full", 20, "design=screen design.resolution=4"),
        ("full", 9, "design=each, or name fewer switches with opt="),
        ("full", 4, "design=pair, or name fewer switches with opt="),
        ("pair", 1, "lower batch_size or prompt_tokens, or take a smaller model"),
    ],
)
def test_the_size_that_fits_is_named(
    small_settings: Callable[..., Settings], design: str, fitting: int, mend: str
) -> None:
    settings = small_settings(f"design={design}", SCREEN[1])
    error = str(too_many(settings, ("decode", "graph"), 65, fitting, "do not fit"))
    assert error.endswith(f": {mend}")
    assert error.startswith("65 cells of tiny in decode, graph do not fit\n")
