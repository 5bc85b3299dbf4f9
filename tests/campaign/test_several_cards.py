"""Whole runs on two pretended cards, with fake workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwen3bench.analysis.run import load_run, of_each_card
from qwen3bench.analysis.stopping import half_widths
from qwen3bench.campaign import assembly, capacity, continuation, machine
from qwen3bench.campaign.machine import Machine, UsedCard
from qwen3bench.campaign.worker_process import WorkerProcess
from qwen3bench.record.card_choice import PresentCard
from qwen3bench.record.lines import (
    BlockLine,
    EvidenceLine,
    Line,
    MemoryLine,
    ParametersLine,
    ProcessLine,
    SampleLine,
    StopLine,
    Telemetry,
    VerifyLine,
)
from qwen3bench.record.states import Purpose

pytestmark = pytest.mark.slow

FULL = ("design=full", "opt=flash,tie,norm", "workload=prefill,decode")
LONG = ("measure.min_processes=6", "measure.min_blocks=12", "measure.max_blocks=12")
ON_CUDA = ("device=cuda", "runtime=graph")
QUIET = Telemetry()
Fault = dict[str, Any]


@pytest.fixture
def two(start_fake: Callable[..., Any], fake_card: Any) -> Callable[..., list[UsedCard]]:
    """Two cards of one kind, each with faults of its own; `looks` are at the second one after its blocks."""

    def make(
        *faults: Sequence[Fault],
        looks: Sequence[Telemetry] = (QUIET,),
        since: int = 0,
        kinds: Sequence[str] = ("a kind", "a kind"),
        sockets: Sequence[int] = (0, 1),
    ) -> list[UsedCard]:
        each = [*faults, *([()] * (2 - len(faults)))]
        monitors = [fake_card(QUIET), fake_card(*looks)]
        return [UsedCard(start_fake(each[n], since), monitors[n], f"GPU-{n}", kinds[n], sockets[n]) for n in range(2)]

    return make


def blocks_of(done: Any) -> dict[tuple[str, str], list[int]]:
    """The numbers of the closed blocks of each workload and runtime."""
    found: dict[tuple[str, str], list[int]] = {}
    for line in done.record.of(BlockLine):
        if line.state != "repeat":
            found.setdefault((line.workload, line.runtime), []).append(line.block)
    return found


def card_of(done: Any) -> dict[int, str | None]:
    return {line.process: line.card for line in done.record.of(ProcessLine)}


@pytest.mark.parametrize("where", [(), ON_CUDA], ids=["alone", "side by side"])
def test_both_cards_time_whole_blocks_and_none_is_lost_or_doubled(
    measure: Callable[..., Any], two: Callable[..., Any], where: tuple[str, ...]
) -> None:
    done = measure(*FULL, *LONG, *where, cards=two())
    assert (done.status, done.alive) == (0, [])
    for numbers in blocks_of(done).values():
        assert sorted(numbers) == list(range(len(numbers)))
        assert len(numbers) >= 12
    cards = card_of(done)
    used = done.run.samples
    assert set(used["card"]) == {"GPU-0", "GPU-1"}
    assert set(used["host"]) == {"here"}
    assert set(used.groupby(["workload", "runtime", "block"])["process"].nunique()) == {1}
    assert all(card == cards[process] for process, card in zip(used["process"], used["card"], strict=True))
    assert set(used.groupby("workload")["card"].nunique()) == {2}  # else a workload's numbers were those of one card
    share = used.drop_duplicates(["workload", "block"])["card"].value_counts(normalize=True)
    assert share.min() >= 0.35
    assert len(done.record.of(VerifyLine)) == len(done.record.of(ParametersLine)) == 8
    assert done.run.environment["cards"] == ["GPU-0", "GPU-1"]


def test_processes_that_look_start_on_all_cards_with_the_first_one(
    measure: Callable[..., Any], two: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    known: list[list[str]] = []  # when the first one is asked what device there is
    identified = continuation.identified

    def noted(card: UsedCard) -> UsedCard:
        card.monitor.handle = object()

        def start(log: Path) -> Any:
            started.append(str(card.uuid))
            return card.start(log)

        return replace(card, start=start)

    def asked(*of: Any) -> Any:
        known.append(started.copy())
        return identified(*of)

    monkeypatch.setattr(assembly, "usable_cores", lambda: 16)
    monkeypatch.setattr(continuation, "identified", asked)
    switches = ("design=full", "opt=flash,tie,mask,norm", "workload=prefill")
    assert measure(*switches, *ON_CUDA, cards=[noted(card) for card in two()]).status == 0
    assert known == [["GPU-0", "GPU-1", "GPU-0", "GPU-1"]]


@pytest.mark.parametrize("where", [(), ON_CUDA], ids=["alone", "side by side"])
def test_single_cells_are_shared_out_over_the_cards(
    measure: Callable[..., Any], two: Callable[..., Any], where: tuple[str, ...]
) -> None:
    told: list[tuple[type[Line], str, float]] = [  # by the second card, and otherwise by the first
        (ParametersLine, "num_parameters", 111),
        (VerifyLine, "kl_mean", 0.5),
        (MemoryLine, "peak_reserved_bytes", 3000),
        (EvidenceLine, "kernel_launches", 8),
    ]
    second = [{"op": kind.type, "does": "answer", "fields": {name: value}} for kind, name, value in told]
    done = measure(*FULL, *where, cards=two((), second))
    checks = {line.card for line in done.record.of(ProcessLine) if line.purpose != Purpose.TIME}
    assert checks == {"GPU-0", "GPU-1"}
    for kind, name, value in told:
        found = [getattr(line, name) == value for line in done.record.of(kind)]
        if where or kind is not MemoryLine:  # on a CPU no memory is measured
            assert 0 < sum(found) < len(found), kind.type


@pytest.mark.parametrize("where", [(), ON_CUDA], ids=["alone", "side by side"])
@pytest.mark.parametrize("lost", [0, 1])
def test_a_card_that_fails_is_left_out_and_its_steps_are_done_elsewhere(
    measure: Callable[..., Any], two: Callable[..., Any], lost: int, where: tuple[str, ...]
) -> None:
    faults: list[Sequence[Fault]] = [(), ()]
    faults[lost] = [
        {"op": "prepare", "does": "die", "cell": "tie"},
        {"op": "touch", "does": "die"},
    ]
    done = measure(*FULL, *LONG, *where, cards=two(*faults))
    assert done.status == 0
    assert f"card GPU-{lost} is left out: no kernel runs on it any more" in done.err
    for numbers in blocks_of(done).values():
        assert sorted(numbers) == list(range(len(numbers)))
    assert set(done.run.cells["status"]) == {"ok"}
    assert set(done.run.samples["card"]) == {f"GPU-{1 - lost}"}


def test_a_card_that_somebody_else_uses_is_left_out_and_its_finished_blocks_stay(
    measure: Callable[..., Any], two: Callable[..., Any]
) -> None:
    taken = [QUIET, QUIET, QUIET, Telemetry(foreign_processes=(4321,))]
    done = measure(*FULL, *LONG, cards=two(looks=taken))
    assert done.status == 0
    assert "card GPU-1 is left out: process 4321 uses it too" in done.err
    kept = done.run.samples.drop_duplicates(["workload", "block"])["card"].value_counts()
    assert kept["GPU-1"] == 3
    for stop in done.record.of(StopLine):  # what ended the measuring knew of them too
        there = done.run.samples[done.run.samples["workload"] == stop.workload]
        assert stop.half_width == pytest.approx(half_widths(there, done.run.factors))
    for numbers in blocks_of(done).values():
        assert sorted(numbers) == list(range(len(numbers)))


def test_a_cell_that_fails_on_a_sound_card_is_to_blame_itself(
    measure: Callable[..., Any], two: Callable[..., Any]
) -> None:
    fault = [{"op": "prepare", "cell": "tie", "does": "die"}]
    done = measure(*FULL, *ON_CUDA, cards=two(fault, fault))
    assert done.status == 3
    assert done.statuses["tie"] == "crashed"
    assert {status for cell, status in done.statuses.items() if cell != "tie"} == {"ok"}
    assert "is left out" not in done.err


def test_eager_on_a_gpu_is_timed_on_one_card_beside_each_processor(
    measure: Callable[..., Any], two: Callable[..., Any]
) -> None:
    done = measure(*FULL, *LONG, "device=cuda", "runtime=eager", cards=two(sockets=(0, 0)))
    assert set(done.run.samples["card"]) == {"GPU-0"}
    both = measure(*FULL, *LONG, "device=cuda", "runtime=eager", cards=two(), to=done.directory.parent / "both")
    assert set(both.run.samples["card"]) == {"GPU-0", "GPU-1"}


def test_a_worker_sees_the_card_alone_that_its_samples_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small_settings: Callable[..., Any]
) -> None:
    cards = [PresentCard(n, f"GPU-{n}", "a kind", socket=n) for n in range(2)]
    monkeypatch.setattr(machine, "chosen_cards", lambda asked: cards)
    monkeypatch.setattr(machine, "WorkerProcess", lambda log, variables: variables)
    monkeypatch.setattr(machine, "Card", lambda uuid: f"looks at {uuid}")
    used = Machine().used(replace(small_settings("device=auto"), devices=("all",)))
    assert [each.start(tmp_path / "worker.log") for each in used] == [
        {"CUDA_VISIBLE_DEVICES": "GPU-0"},
        {"CUDA_VISIBLE_DEVICES": "GPU-1"},
    ]
    assert [(each.uuid, each.monitor, each.kind, each.socket) for each in used] == [
        ("GPU-0", "looks at GPU-0", "a kind", 0),
        ("GPU-1", "looks at GPU-1", "a kind", 1),
    ]


def test_unlike_cards_are_strata_each_with_its_own_numbers(
    measure: Callable[..., Any], two: Callable[..., Any]
) -> None:
    done = measure(*FULL, cards=two(kinds=("a kind", "another/kind")), devices=("all",))
    assert done.status == 0
    for kind, card in (("a-kind", "GPU-0"), ("another-kind", "GPU-1")):
        run = load_run(done.directory / kind)
        assert run.finished
        assert set(run.samples["card"]) == {card}


def test_on_each_card_the_process_that_comes_next_starts_while_others_get_ready(
    measure: Callable[..., Any], two: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, ahead: list[int]
) -> None:
    monkeypatch.setattr(capacity, "usable_cores", lambda: 16)
    assert measure(*FULL, *ON_CUDA, cards=two()).status == 0
    assert len(ahead) >= 2
    assert all(ahead)


def test_a_run_of_two_cards_continues_where_it_was(measure: Callable[..., Any], two: Callable[..., Any]) -> None:
    whole = measure(*FULL, *LONG, cards=two())
    lines = (whole.directory / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (whole.directory / "samples.jsonl").write_bytes(b"".join(lines[: int(len(lines) * 0.6)]) + lines[-1][:20])
    begun = {(line.workload, line.block) for line in whole.record.of(SampleLine)}
    done = measure(cards=two(), resume=whole.directory)
    assert done.status == 0
    assert begun
    for numbers in blocks_of(done).values():
        assert sorted(numbers) == list(range(len(numbers)))
    assert "tell again" not in done.err
    assert done.record.warnings == []


def test_real_workers_on_two_pretended_cards_tell_one_run(measure: Callable[..., Any], fake_card: Any) -> None:
    cards = [UsedCard(WorkerProcess, fake_card(QUIET), f"GPU-{n}", "a kind", socket=n) for n in range(2)]
    done = measure("design=full", "opt=flash,tie", "measure.min_processes=4", "measure.max_blocks=8", cards=cards)
    assert done.status == 0
    assert set(done.run.samples["card"]) == {"GPU-0", "GPU-1"}
    for numbers in blocks_of(done).values():
        assert sorted(numbers) == list(range(len(numbers)))
        assert len(numbers) >= 4
    assert len(of_each_card(done.run)) == 2


def test_a_process_has_its_share_of_the_time_whatever_other_cards_measure_meanwhile(
    measure: Callable[..., Any], two: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen3bench.campaign.replication.MEASURED_PER_SETUP", 1e9)  # so that its share limits it
    share_s = 0.25
    limits = (f"measure.max_seconds={6 * share_s}", "measure.target=1e-9", "measure.max_blocks=100000")
    done = measure("design=full", "opt=flash,tie", *limits, "measure.min_processes=6", cards=two())
    measured_s = done.record.frame(BlockLine).groupby("process")["elapsed_s"].sum()
    assert (measured_s.iloc[:2] >= share_s).all()  # the last ones end with the time
    assert {line.card for line in done.record.of(ProcessLine)} == {"GPU-0", "GPU-1"}
