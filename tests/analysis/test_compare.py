"""`compare` as a command: what it says of two runs, and the exit status that a CI job goes by."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from qwen3bench.analysis.comparison import compare
from qwen3bench.analysis.run import load_run
from qwen3bench.compare import main
from qwen3bench.config.cli import main as compose_and
from qwen3bench.config.settings import Settings

Write = Callable[..., Path]
GATE = ("--fail-on", "slower")
PREFILL = ("prefill", "graph")
FEW = {"factors": ("flash", "norm"), "blocks": 9}


def output(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str]:
    status = main([str(a) for a in argv])
    return status, capsys.readouterr().out


def section(text: str, title: str) -> str:
    return re.split(rf"^## {title}$", text, flags=re.M)[1].split("\n## ")[0]


def test_two_runs_of_the_same_show_nothing(write_run: Write, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write_run("a", seed=1), write_run("b", seed=2)
    status, text = output(capsys, a, b, *GATE)
    assert status == 0
    assert "Nothing got slower by 3 %: all 36 that are compared are shown to have lost less." in text
    assert "Warning" not in text
    assert "No difference." in section(text, "Configuration")
    assert "31 compared: 0 slower, 0 faster, 31 shown to have lost less than 3 %" in section(text, "Effects")
    assert "31 compared: 0 slower, 0 faster, 31 shown" in section(text, "Ratios within a run")


@pytest.mark.parametrize("drift", [0.7, 1.3])
def test_a_machine_that_became_slower_is_no_regression(
    drift: float, write_run: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = write_run("a", seed=1, **FEW), write_run("b", seed=2, baseline_s={PREFILL: 0.01 / drift}, **FEW)
    assert output(capsys, a, b, *GATE)[0] == 0
    status, text = output(capsys, a, b, *GATE, "--latency")
    assert status == (3 if drift < 1 else 0)
    assert "4 compared" in section(text, "Latency")


@pytest.mark.slow
@pytest.mark.parametrize("copy_ratio", [1.3, 0.7])
def test_runs_whose_copies_differ_cannot_tell(
    copy_ratio: float, write_run: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = (write_run(name, seed=seed, copy_ratio=copy_ratio, **FEW) for seed, name in enumerate("ab"))
    status, text = output(capsys, a, b, *GATE)
    assert status == 4
    assert "These runs cannot tell whether something got slower by 3 %." in section(text, "Verdict")
    apart = r"(29|30|31)"
    assert re.search(
        rf"Two copies of the baseline are {apart} % and {apart} % apart in A and B", section(text, "Verdict")
    )
    assert output(capsys, a, b)[0] == 0  # told, not failed


def test_copies_apart_by_less_than_the_tolerance_do_not_silence(
    write_run: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = (write_run(name, seed=seed, copy_ratio=1.008, **FEW) for seed, name in enumerate("ab"))
    assert output(capsys, a, b, *GATE)[0] == 0
    assert output(capsys, a, b, *GATE, "--tolerance", 0.01)[0] == 4


def test_a_loss_no_larger_than_the_copies_are_apart_is_none(
    write_run: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write_run("a", seed=1, copy_ratio=1.3, worth={"flash": 1.2}, **FEW)
    b = write_run("b", seed=2, copy_ratio=1.3, worth={"flash": 1.1}, **FEW)
    assert output(capsys, a, b, *GATE)[0] == 4
    huge = write_run("huge", seed=3, copy_ratio=1.3, worth={"flash": 0.5}, **FEW)
    assert output(capsys, a, huge, *GATE)[0] == 3


@pytest.mark.slow
def test_wide_intervals_ask_for_so_many_processes(write_run: Write, capsys: pytest.CaptureFixture[str]) -> None:
    loud: dict[str, Any] = {"factors": ("flash", "norm"), "noise": 0.03}
    a, b = (write_run(name, seed=seed, blocks=9, **loud) for seed, name in ((5, "a"), (6, "b")))
    status, text = output(capsys, a, b, *GATE)
    assert status == 4
    verdict = section(text, "Verdict")
    assert re.search(r"No loss is shown, and none of 3 % is ruled out, for .*flash.* \(prefill, graph\)", verdict)
    processes = [int(n) for n in re.findall(r"measure\.min_processes=(\d+)", verdict)]
    (settled,) = re.findall(r"--tolerance=(0\.\d+)", verdict)
    assert output(capsys, a, b, *GATE, "--tolerance", settled)[0] == 0
    assert output(capsys, a, b, *GATE, "--tolerance", float(settled) - 0.01)[0] == 4
    blocks = 3 * max(processes)
    assert 9 < blocks < 3 * 64
    enough = [write_run(f"{seed}", seed=seed, blocks=blocks, **loud) for seed in (7, 8)]
    assert output(capsys, *enough, *GATE)[0] == 0


def test_one_block_has_no_interval_and_tells_nothing(write_run: Write, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (write_run(name, seed=seed, factors=("flash", "norm"), blocks=1) for seed, name in enumerate("ab"))
    status, text = output(capsys, a, b, *GATE, "--latency")
    assert status == 4
    assert "measure.min_processes=3" in text
    assert "nan" not in text


@pytest.mark.slow
def test_the_baseline_by_itself_is_judged_by_latency_alone(
    write_run: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = (write_run(name, seed=seed, cells=["baseline"], blocks=9) for seed, name in enumerate("ab"))
    status, text = output(capsys, a, b, *GATE)
    assert status == 4
    assert "baseline: no ratio within a run is in both runs (prefill, graph)." in section(text, "Verdict")
    assert output(capsys, a, b, *GATE, "--latency")[0] == 0


@pytest.mark.slow
def test_two_cards_of_one_kind_are_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    """Committed runs of all 32 cells on two H200s: of 72 ratios none lost 3 %, and three are not known to 1 %."""
    a, b = (Path(__file__).parents[2] / "results" / "reference" / f"h200-ablate-1x2048{end}" for end in ("-b", ""))
    unknown = "flash+mlp+mask+norm (decode, graph)"
    for tolerance, expected, said in ((0.03, 0, "all 72 that are compared"), (0.01, 4, unknown)):
        status, text = output(capsys, a, b, *GATE, "--tolerance", tolerance)
        assert status == expected
        assert said in section(text, "Verdict")


@pytest.mark.slow
def test_an_effect_that_lost_half_its_gain_fails(write_run: Write, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_run("a", seed=1, worth={"flash": 1.2, "norm": 1.3})
    b = write_run("b", seed=2, worth={"flash": 1.1, "norm": 1.3})
    status, text = output(capsys, a, b, *GATE)
    assert status == 3
    said = r"flash is worth 1\.2\d+× on average, and was|flash is worth 1\.1\d+× on average, and was 1\.2\d+×: 0\.91"
    assert re.search(said, section(text, "Verdict"))
    effects = section(text, "Effects")
    assert re.search(r"\| flash \| main \| prefill \| graph \| 1\.2\d*× \| 1\.1\d*× \| 0\.91", effects)
    assert "shapley" not in text
    assert "| norm | main" not in effects
    assert output(capsys, a, b)[0] == 0  # told, not failed
    assert output(capsys, a, b, *GATE, "--tolerance", 0.2)[0] == 0
    back, text = output(capsys, b, a, *GATE)
    assert back == 0
    assert "faster" in section(text, "Effects")


def test_a_cell_that_lost_to_the_baseline_fails(write_run: Write, capsys: pytest.CaptureFixture[str]) -> None:
    """Of one cell alone: no main effect of the five moves by the tolerance."""
    a = write_run("a", seed=1, worth={"flash": 1.2}, blocks=9)
    b = write_run("b", seed=2, worth={"flash": 1.2, "flash:tie:mlp:mask:norm": 0.95}, blocks=9)
    status, text = output(capsys, a, b, *GATE)
    assert status == 3
    verdict = section(text, "Verdict")
    assert re.search(r"flash\+tie\+mlp\+mask\+norm is 1\.1\d+× as fast as the baseline, and was 1\.\d+×: 0\.9", verdict)
    assert "on average" not in verdict


def test_a_better_switch_costs_an_interaction_and_is_no_loss(
    write_run: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write_run("a", seed=1, worth={"flash": 1.2, "flash:norm": 1.3}, **FEW)
    b = write_run("b", seed=2, worth={"flash": 1.56, "norm": 1.3, "flash:norm": 0.8}, **FEW)
    status, text = output(capsys, a, b, *GATE)
    assert status == 0
    assert "| flash:norm | interaction |" in section(text, "Effects")


@pytest.mark.slow
def test_raw_latency_is_judged_where_it_is_asked_for(write_run: Write, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_run("a", seed=1, blocks=12)
    b = write_run("b", seed=2, blocks=12, baseline_s={PREFILL: 0.0115})
    status, text = output(capsys, a, b, *GATE)
    assert status == 0
    assert "Not judged without" in section(text, "Latency")
    status, text = output(capsys, a, b, *GATE, "--latency")
    assert status == 3
    assert re.search(r"\| baseline \| prefill \| graph \| 10\.\d+ \| 11\.\d+ \| 0\.8[67].* \| slower \|", text)
    assert "baseline takes 11." in section(text, "Verdict")


def test_latencies_are_those_of_the_tables(write_run: Write, capsys: pytest.CaptureFixture[str]) -> None:
    paths = write_run("a", seed=1), write_run("b", seed=2, baseline_s={PREFILL: 0.0115})
    text = section(output(capsys, *paths, "--latency")[1], "Latency")
    assert "| cell | workload | runtime | a (ms) | b (ms) |" in text
    shown = {row[0]: row[1:] for row in re.findall(r"\| (\S+) \| prefill \| graph \| (\S+) \| (\S+) \|", text)}
    assert len(shown) == 32
    for i, path in enumerate(paths):
        cells = load_run(path).cells.set_index("cell")["latency_s"]
        assert {cell: float(values[i]) for cell, values in shown.items()} == pytest.approx(
            (1e3 * cells).to_dict(), rel=1e-3
        )


def test_a_cell_that_broke_fails(write_run: Write, capsys: pytest.CaptureFixture[str]) -> None:
    failure = {"type": "failure", "cell": "mlp", "status": "oom", "reason": "out of memory"}
    status, text = output(capsys, write_run("a"), write_run("b", extra=[failure]), *GATE)
    assert status == 3
    assert "| mlp | prefill | graph | ok | oom |" in section(text, "Status")
    assert "mlp is oom (prefill, graph)." in section(text, "Verdict")
    assert "Something is no longer ok." in section(text, "Verdict")


@pytest.mark.slow
def test_a_cell_that_is_no_longer_measured_fails(write_run: Write, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write_run("a", factors=("flash",)), write_run("b", factors=("flash",), cells=["baseline"])
    status, text = output(capsys, a, b, *GATE)
    assert status == 3
    assert "flash (prefill, graph) is no longer measured." in section(text, "Verdict")
    assert "Something is no longer measured." in section(text, "Verdict")
    assert output(capsys, b, a, *GATE)[0] == 4  # nothing to compare but the baseline
    assert output(capsys, a, b)[0] == 0


@pytest.mark.slow
def test_runs_of_different_sizes_pass_no_gate(write_run: Write, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write_run("a"), write_run("b", config={"prompt_tokens": 512})
    assert main([str(a), str(b), *GATE]) == 1
    assert "measure different things: prompt_tokens 128 and 512" in capsys.readouterr().err
    status, text = output(capsys, a, b)
    assert status == 0
    assert "Warning: A and B measure different things: prompt_tokens 128 and 512." in section(text, "Verdict")


def test_runs_of_other_logits_or_threads_measure_different_things(write_run: Write) -> None:
    """Beside other work a run on the same CPU takes fewer threads. Another CPU is told as the environment's."""
    run = load_run(write_run("run", **FEW))
    last = replace(run, config={**run.config, "workload": {"prefill": {"logits_to_keep": 1}}})
    assert compare(run, last).unlike == ["logits_to_keep 0 and 1"]
    trained = [
        load_run(write_run(f"train{clip}", baseline_s={("train", "eager"): 0.01}, **FEW)) for clip in (None, 1.0)
    ]
    for each, clip in zip(trained, (None, 1.0), strict=True):
        config = {**each.config, "workload": {"train": {"clip": clip}}}
        each.record.run = replace(each.record.run, config=config)
    assert compare(*trained).unlike == ["clip none and 1.0"]
    one, two = (replace(run, config={"device": "cpu"}, environment={"torch_threads": n}) for n in (1, 2))
    assert compare(two, one).unlike == ["threads 2 and 1"]
    assert compare(one, replace(one)).unlike == compare(two, replace(one, environment={})).unlike == []
    assert compare(two, replace(one, config={"device": "cuda"})).unlike == []
    other_cpu = load_run(write_run("other", **FEW))
    other_cpu.record.run = replace(other_cpu.record.run, device="another CPU")
    assert compare(two, replace(other_cpu, config=one.config, environment=one.environment)).unlike == []


@pytest.mark.parametrize("tolerance", ["3", "3%", "0", "-0.1", "nan", "1"])
def test_a_tolerance_is_a_fraction(tolerance: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["a", "b", f"--tolerance={tolerance}"]) == 1
    error = capsys.readouterr().err
    assert "is no fraction between 0 and 1; 3 % is 0.03" in error
    assert error.count("\n") == 1


def test_the_help_explains_the_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    assert [line.split()[0] for line in text.splitlines() if re.match(r"  [0-9] ", line)] == ["0", "3", "4", "1"]
    assert "(default 0.03)" in text


def test_the_recipe_for_ci_asks_what_can_be_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "ci.md").read_text("utf-8")
    job = yaml.safe_load(re.findall(r"^```yaml\n(.*?)^```", text, flags=re.M | re.S)[0])["jobs"]["gate"]
    commands = [line.strip(" ()") for step in job["steps"] for line in step.get("run", "").splitlines()]
    measured = [line.split("-m qwen3bench $QUESTION ")[1] for line in commands if "$QUESTION" in line]
    assert [shlex.split(rest)[0].rpartition("/")[2] for rest in measured] == ["before", "after"]
    monkeypatch.chdir(tmp_path)
    asked: list[Settings] = []

    def note(settings: Settings) -> int:
        asked.append(settings.resolved("cuda"))
        return 0

    assert compose_and(shlex.split(job["env"]["QUESTION"]), run=note) == 0
    assert asked[0].peers
    assert len(asked[0].cells) == 16
    (gate,) = [line for line in commands if "qwen3bench.compare" in line]
    options = shlex.split(gate.split("|")[0])[3:]
    assert "--fail-on" in options
    assert main(options) == 1  # no such runs, and nothing else to complain of


def test_the_verdict_comes_first_then_differences_of_settings(
    write_run: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write_run("a", config={"batch_size": 1, "run": {"dir": "a"}})
    b = write_run("b", config={"batch_size": 8, "run": {"dir": "b"}})
    (a / "environment.json").write_text('{"torch": "2.11", "cuda": {"driver": "570"}, "affinity": [0, 1]}')
    (b / "environment.json").write_text('{"torch": "2.13", "cuda": {"driver": "570"}, "affinity": [0]}')
    _, text = output(capsys, a, b)
    assert "| batch_size | 1 | 8 |" in section(text, "Configuration")
    assert "run.dir" not in text
    assert "| torch | 2.11 | 2.13 |" in section(text, "Environment")
    assert "| affinity | [0, 1] | [0] |" in section(text, "Environment")
    assert "driver" not in text
    titles = ("Verdict", "Configuration", "Environment", "Effects", "Ratios within a run", "Latency")
    order = [text.index(f"## {t}") for t in titles]
    assert order == sorted(order)


def test_another_host_is_told_and_one_not_written_down_is_no_difference(
    write_run: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, older = write_run("a"), write_run("b"), write_run("older")
    (a / "environment.json").write_text('{"torch": "2.11", "usable_cpus": "0-1", "cpu_quota": "no limit"}')
    (b / "environment.json").write_text('{"torch": "2.11", "usable_cpus": "0", "cpu_quota": 0.5}')
    (older / "environment.json").write_text('{"torch": "2.11"}')
    told = section(output(capsys, a, b)[1], "Environment")
    assert "| usable_cpus | 0-1 | 0 |" in told
    assert "| cpu_quota | no limit | 0.5 |" in told
    for pair in ((older, b), (b, older)):
        assert "No difference." in section(output(capsys, *pair)[1], "Environment")


def test_a_noisy_or_partial_run_is_warned_of(write_run: Write, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write_run("a", copy_ratio=1.02), write_run("b", seed=2, finished=False)
    _, text = output(capsys, a, b)
    verdict = section(text, "Verdict")
    assert "Warning: A is noisy: two copies of the baseline are 2 % apart, more than 0.5 % (prefill, graph)." in verdict
    assert "Warning: B has not finished" in verdict


def test_what_changed_stands_in_the_order_of_the_cells(write_run: Write, capsys: pytest.CaptureFixture[str]) -> None:
    slow = {PREFILL: 0.02}
    runs = write_run("a", factors=("flash", "tie")), write_run("b", factors=("flash", "tie"), baseline_s=slow, seed=5)
    _, text = output(capsys, *runs, "--latency")
    found = re.findall(r"^\| (\S+) \| prefill \| graph", section(text, "Latency"), flags=re.M)
    assert found == load_run(runs[1]).cells["cell"].tolist()


def test_memory_that_changed_is_told(write_run: Write, capsys: pytest.CaptureFixture[str]) -> None:
    where = {"cell": "flash", "workload": "prefill", "runtime": "graph"}
    more = {"type": "memory", **where, "peak_allocated_bytes": 1_800_000}
    status, text = output(capsys, write_run("a"), write_run("b", extra=[more]), *GATE)
    memory = section(text, "Memory")
    assert "a (MiB) | b (MiB)" in memory
    assert "| flash | prefill | graph | 0.8583 | 1.717 | 2.000× |" in memory
    assert memory.count("prefill") == 1
    assert status == 0


def test_what_one_run_lacks_is_said(write_run: Write, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_run("a", factors=("flash", "tie"))
    b = write_run("b", factors=("flash", "tie"), cells=["baseline", "flash"])
    _, text = output(capsys, a, b)
    assert "cells in A alone: tie, flash+tie" in text


def test_the_cells_of_a_screen_are_counted_and_not_all_named(
    write_run: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"cell{number}" for number in range(64)]
    a, b = write_run("a", config={"design": {"measured": names}}), write_run("b", factors=("flash",))
    _, text = output(capsys, a, b)
    row = next(line for line in text.splitlines() if line.startswith("| design.measured |"))
    assert "cell4 and 59 more" in row
    assert "cell5" not in row
    (alone,) = re.findall(r"cells in A alone: (.*?);", section(text, "Not in both"))
    assert alone.endswith("more")
    assert len(alone.split(", ")) == 7


def test_an_average_is_not_compared_with_what_is_none(write_run: Write, capsys: pytest.CaptureFixture[str]) -> None:
    worth = {"flash": 1.2, "flash:norm": 1.2}
    factors, few = ("flash", "mask", "norm"), ["baseline", "flash", "mask", "norm"]
    whole = write_run("whole", factors=factors, worth=worth)
    each = [write_run(name, factors=factors, worth=worth, cells=few, seed=seed) for name, seed in (("b", 2), ("c", 3))]
    text = output(capsys, whole, each[0])[1]
    assert "0 compared" in section(text, "Effects")
    assert "3 compared" in section(text, "Ratios within a run")
    said = "told as an average over the others in A and with the others off in B"
    assert f"not compared: flash, mask, norm, {said}" in section(text, "Not in both")


@pytest.mark.slow
def test_a_main_effect_that_is_a_speed_up_is_listed_once(write_run: Write, capsys: pytest.CaptureFixture[str]) -> None:
    few: dict[str, Any] = {"factors": ("flash", "norm"), "cells": ["baseline", "flash", "norm"]}
    for runs in ([write_run(f"each{i}", seed=i, **few) for i in (1, 2)], [_one(write_run, i) for i in (1, 2)]):
        text = output(capsys, *runs)[1]
        assert "0 compared" in section(text, "Effects")
        assert f"{load_run(runs[0]).cells['cell'].nunique() - 1} compared" in section(text, "Ratios within a run")


def _one(write_run: Write, seed: int) -> Path:
    return write_run(f"one{seed}", factors=("flash",), seed=seed)


def test_effects_over_other_switches_are_not_compared(write_run: Write, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write_run("a", factors=("flash", "tie")), write_run("b", factors=("flash", "mask"))
    _, text = output(capsys, a, b)
    said = "not both vary mask, tie: an effect is an average over the others, so effects are not compared"
    assert said in section(text, "Not in both")
    assert "0 compared" in section(text, "Effects")
    assert "1 compared" in section(text, "Ratios within a run")  # flash alone


def test_a_peer_shows_what_every_cell_lost(write_run: Write, capsys: pytest.CaptureFixture[str]) -> None:
    """Shared code that got slower leaves every ratio to the baseline as it was, and each to the peer lower."""
    peer = "transformers:sdpa"
    cells = ["baseline", "flash", "norm", "flash+norm", peer]
    few: Mapping[str, Any] = {"factors": ("flash", "norm"), "cells": cells, "blocks": 9}
    a, b = (write_run(name, seed=seed, worth={"flash": 1.2}, **few) for seed, name in enumerate("ab"))
    assert output(capsys, a, b, *GATE)[0] == 0
    ours = {"baseline": 0.95, "flash": 1.2 * 0.95, "norm": 0.95, "flash:norm": 1 / 0.95}
    slower = write_run("slower", seed=3, worth=ours, **few)
    status, text = output(capsys, a, slower, *GATE)
    assert status == 3
    verdict = section(text, "Verdict")
    assert re.search(rf"baseline is 0\.9\d+× as fast as {peer}, and was", verdict)
    assert "as fast as the baseline" not in verdict
    assert f"| flash | {peer} | prefill | graph |" in section(text, "Ratios within a run")


def test_the_page_is_written_where_it_is_asked_for(write_run: Write, tmp_path: Path) -> None:
    a, b, page = write_run("a"), write_run("b"), tmp_path / "page.html"
    assert main([str(a), str(b), "--html", str(page)]) == 0
    assert f"<h1>A: {a} → B: {b}</h1>" in page.read_text()


def test_runs_with_nothing_in_common_pass_no_gate(write_run: Write, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write_run("a"), write_run("b", baseline_s={("prefill", "eager"): 0.01})
    assert main([str(a), str(b), *GATE]) == 1
    out, error = capsys.readouterr()
    assert out == ""
    assert "nothing to compare" in error
    assert error.count("\n") == 1


def test_a_run_is_not_compared_with_itself(
    write_run: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (link := tmp_path / "latest").symlink_to(write_run("a", **FEW))
    assert main([str(tmp_path / "a"), str(link), *GATE]) == 1
    out, error = capsys.readouterr()
    assert (out, "latest are the same run; name two" in error) == ("", True)


def test_no_run_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("qwen3bench: error:")
    assert error.count("\n") == 1


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_is_no_error(write_run: Write) -> None:
    runs = [str(write_run("a")), str(write_run("b"))]
    nobody_reads = "import os, sys; r, w = os.pipe(); os.dup2(w, 1); os.close(r); os.close(w)"
    command = f"{nobody_reads}; from qwen3bench.compare import main; sys.exit(main({runs!r}))"
    ran = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
