from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen3bench.analysis.run import load_run
from qwen3bench.compare import main

Write = Callable[..., Path]


def output(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str]:
    status = main([str(a) for a in argv])
    return status, capsys.readouterr().out


def section(text: str, title: str) -> str:
    return re.split(rf"^## {title}$", text, flags=re.M)[1].split("\n## ")[0]


def test_two_runs_of_the_same_show_nothing(write_run: Write, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write_run("a", seed=1), write_run("b", seed=2)
    status, text = output(capsys, a, b, "--fail-on", "slower")
    assert status == 0
    assert "Nothing is shown to have got slower." in text
    assert "Warning" not in text
    assert "No difference." in section(text, "Configuration")
    assert "0 changed" in section(text, "Effects")


def test_an_effect_that_lost_half_its_gain_fails(write_run: Write, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_run("a", seed=1, worth={"flash": 1.2, "norm": 1.3})
    b = write_run("b", seed=2, worth={"flash": 1.1, "norm": 1.3})
    status, text = output(capsys, a, b, "--fail-on", "slower")
    assert status == 3
    assert re.search(r"Slower: effect of flash, main, 1\.2\d+× → 1\.1\d+× \(prefill, graph\)", section(text, "Verdict"))
    effects = section(text, "Effects")
    assert re.search(r"\| flash \| main \| prefill \| graph \| 1\.2\d* \| 1\.1\d* \| ×0\.91", effects)
    assert "| norm | main" not in effects
    assert output(capsys, a, b)[0] == 0  # told, not failed
    back, text = output(capsys, b, a, "--fail-on", "slower")
    assert back == 0
    assert "faster" in section(text, "Effects")


def test_raw_latency_alone_can_get_slower(write_run: Write, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_run("a", seed=1, blocks=12)
    b = write_run("b", seed=2, blocks=12, baseline_s={("prefill", "graph"): 0.0115})
    status, text = output(capsys, a, b, "--fail-on", "slower")
    assert status == 3
    cells = section(text, "Cells")
    assert re.search(
        r"\| baseline \| prefill \| graph \| latency_s \| [0-9.]+ \| 0\.011\d+ \| ×0\.8[67].* \| slower \|", cells
    )
    assert "0 changed" in section(text, "Effects")


def test_a_cell_that_broke_fails(write_run: Write, capsys: pytest.CaptureFixture[str]) -> None:
    failure = {"type": "failure", "cell": "mlp", "status": "oom", "reason": "out of memory"}
    status, text = output(capsys, write_run("a"), write_run("b", extra=[failure]), "--fail-on", "slower")
    assert status == 3
    assert "| mlp | prefill | graph | ok | oom |" in section(text, "Status")


def test_a_cell_that_is_no_longer_measured_fails(write_run: Write, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write_run("a", factors=("flash",)), write_run("b", factors=("flash",), cells=["baseline"])
    status, text = output(capsys, a, b, "--fail-on", "slower")
    assert status == 3
    assert "Warning: no longer measured: flash (prefill, graph)." in section(text, "Verdict")
    assert output(capsys, b, a, "--fail-on", "slower")[0] == 0
    assert output(capsys, a, b)[0] == 0


def test_runs_of_different_sizes_pass_no_gate(write_run: Write, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write_run("a"), write_run("b", config={"prompt_tokens": 512})
    assert main([str(a), str(b), "--fail-on", "slower"]) == 1
    assert "measure different things: prompt_tokens 128 and 512" in capsys.readouterr().err
    status, text = output(capsys, a, b)
    assert status == 0
    assert "Warning: A and B measure different things: prompt_tokens 128 and 512." in section(text, "Verdict")


def test_differences_of_settings_come_first(write_run: Write, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_run("a", config={"batch_size": 1, "run": {"dir": "a"}})
    b = write_run("b", config={"batch_size": 8, "run": {"dir": "b"}})
    (a / "environment.json").write_text('{"torch": "2.11", "cuda": {"driver": "570"}}')
    (b / "environment.json").write_text('{"torch": "2.13", "cuda": {"driver": "570"}}')
    _, text = output(capsys, a, b)
    assert "| batch_size | 1 | 8 |" in section(text, "Configuration")
    assert "run.dir" not in text
    assert "| torch | 2.11 | 2.13 |" in section(text, "Environment")
    assert "driver" not in text
    order = [text.index(f"## {t}") for t in ("Configuration", "Environment", "Verdict", "Cells", "Effects")]
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
    slow = {("prefill", "graph"): 0.02}
    runs = write_run("a", factors=("flash", "tie")), write_run("b", factors=("flash", "tie"), baseline_s=slow, seed=5)
    _, text = output(capsys, *runs)
    found = re.findall(r"^\| (\S+) \| prefill \| graph \| latency_s", section(text, "Cells"), flags=re.M)
    assert found == load_run(runs[1]).cells["cell"].tolist()


def test_memory_that_changed_is_told(write_run: Write, capsys: pytest.CaptureFixture[str]) -> None:
    where = {"cell": "flash", "workload": "prefill", "runtime": "graph"}
    more = {"type": "memory", **where, "peak_allocated_bytes": 1_800_000}
    status, text = output(capsys, write_run("a"), write_run("b", extra=[more]), "--fail-on", "slower")
    assert "| flash | prefill | graph | peak_allocated_bytes | 9e+05 | 1.8e+06 | ×0.5000 | — | more |" in text
    assert status == 0


def test_what_one_run_lacks_is_said(write_run: Write, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_run("a", factors=("flash", "tie"))
    b = write_run("b", factors=("flash", "tie"), cells=["baseline", "flash"])
    _, text = output(capsys, a, b)
    assert "cells in A alone: tie, flash+tie" in text


def test_an_average_is_not_compared_with_what_is_none(write_run: Write, capsys: pytest.CaptureFixture[str]) -> None:
    worth = {"flash": 1.2, "flash:norm": 1.2}
    factors, few = ("flash", "mask", "norm"), ["baseline", "flash", "mask", "norm"]
    whole = write_run("whole", factors=factors, worth=worth)
    each = [write_run(name, factors=factors, worth=worth, cells=few, seed=seed) for name, seed in (("b", 2), ("c", 3))]
    text = output(capsys, whole, each[0])[1]
    assert "0 changed, 0 the same, 0 undecided." in section(text, "Effects")
    said = "told as an average over the others in A and with the others off in B"
    assert f"not compared: flash, mask, norm, {said}" in section(text, "Not in both")
    assert "0 changed, 3 the same, 0 undecided." in section(output(capsys, *each)[1], "Effects")


def test_effects_over_other_switches_are_not_compared(write_run: Write, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write_run("a", factors=("flash", "tie")), write_run("b", factors=("flash", "mask"))
    _, text = output(capsys, a, b)
    said = "not both vary mask, tie: an effect is one over the others, and compared only where these are off"
    assert said in section(text, "Not in both")
    assert "0 changed, 0 the same, 0 undecided." in section(text, "Effects")
    few = [
        write_run(f"each {len(names)}", factors=names, cells=["baseline", *names], seed=len(names))
        for names in (("flash", "norm"), ("flash", "norm", "mask"))
    ]
    assert "0 changed, 2 the same, 0 undecided." in section(output(capsys, *few)[1], "Effects")


def test_the_page_is_written_where_it_is_asked_for(write_run: Write, tmp_path: Path) -> None:
    a, b, page = write_run("a"), write_run("b"), tmp_path / "page.html"
    assert main([str(a), str(b), "--html", str(page)]) == 0
    assert f"<h1>{a} → {b}</h1>" in page.read_text()


def test_runs_with_nothing_in_common_pass_no_gate(write_run: Write, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write_run("a"), write_run("b", baseline_s={("prefill", "eager"): 0.01})
    assert main([str(a), str(b), "--fail-on", "slower"]) == 1
    out, error = capsys.readouterr()
    assert out == ""
    assert "nothing to compare" in error
    assert error.count("\n") == 1


def test_no_run_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("qwen3bench: error:")
    assert error.count("\n") == 1


def test_a_reader_that_has_seen_enough_is_no_error(write_run: Write) -> None:
    runs = [str(write_run("a")), str(write_run("b"))]
    nobody_reads = "import os, sys; r, w = os.pipe(); os.dup2(w, 1); os.close(r); os.close(w)"
    command = f"{nobody_reads}; from qwen3bench.compare import main; sys.exit(main({runs!r}))"
    ran = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
