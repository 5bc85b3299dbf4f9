from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from records import write_record

from qwen3bench.analysis.pooling import pool
from qwen3bench.analysis.run import load_run
from qwen3bench.pool import main
from qwen3bench.reporting.pool_page import pool_sentences
from qwen3bench.reporting.wording.pool_words import pool_scope, spread_words

Lines = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def run_on(tmp_path: Path, record_lines: Lines) -> Callable[..., str]:
    """Writes a run of three switches that one card of a machine measured; gives its directory."""

    def write(name: str, host: str, card: str, seed: int, **options: Any) -> str:
        finished, failed = options.pop("finished", True), options.pop("failed", ())
        lines = record_lines(**{"factors": ("flash", "tie", "norm"), "seed": seed, **options})
        for line in lines:
            if line["type"] == "process":
                line |= {"host": host, "card": card}
        lines[-1:-1] = [{"type": "failure", "cell": cell, "status": "crashed", "reason": "as told"} for cell in failed]
        return str(write_record(tmp_path / name, lines if finished else lines[:-1]))

    return write


def text_of(page: Path) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page.read_text("utf-8")))


def test_the_page_and_the_terminal_say_for_what_the_intervals_hold(
    run_on: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [run_on(f"run{n}", f"left-{n}", f"GPU-{n}", n) for n in range(3)]
    out = tmp_path / "pool"
    assert main([*runs, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    scope = "Intervals hold for NVIDIA H100 80GB HBM3. They stand on 3 cards in 3 machines: 2 degrees of freedom."
    assert scope in said
    assert re.search(r"flash is faster: 1\.1\d+× \[1\.1\d+, 1\.1\d+\] as fast \(prefill 1×512 graph\)", said)
    assert "tie changes latency by less than ±1 %: 1.000" in said
    assert "No switch is shown to be worth more on one machine than on another" in said
    assert str(out / "report.html") in said
    for name in ("report.md", "report.html"):
        text = text_of(out / name)
        assert scope in text
        assert "left-2, GPU-2" in text
        assert "Warning" not in text
    table = pd.read_csv(out / "effects.csv")
    assert set(table["kind"]) == {"main", "interaction", "shapley", "speedup"}
    assert set(table["df"]) == {2}
    each = pd.read_csv(out / "machines.csv")
    assert set(each["machine"]) == {"left-0", "left-1", "left-2"}
    assert 'id="machines-prefill-graph' in (out / "report.html").read_text("utf-8")
    assert (out / "plots" / "machines-prefill-graph.svg").is_file()
    rows = re.findall(r"^\| \d \|.*ms.*|^\| \d \| left-\d .*", (out / "report.md").read_text("utf-8"), re.MULTILINE)
    assert len(rows) == 6, "each card's latency of the baseline and of all switches"


def test_with_one_machine_it_says_that_it_cannot_tell(
    run_on: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [run_on(f"run{n}", "left", f"GPU-{n}", n) for n in range(2)]
    assert main([*runs, "--out", str(tmp_path / "pool")]) == 0
    said = capsys.readouterr().out
    assert "All is of one machine (2 cards). What another would show, these runs cannot tell." in said
    assert re.search(r"flash reads 1\.\d+× as fast \(.*\) on this machine, without an interval", said)
    assert "[" not in said
    assert "faster" not in said
    assert not (tmp_path / "pool" / "plots").exists()


def test_two_machines_are_said_to_be_few_and_weak_runs_are_named(
    run_on: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [run_on("a", "left", "GPU-1", 0, finished=False), run_on("b", "right", "GPU-2", 1, copy_shift=0.05)]
    assert main([*runs, "--out", str(tmp_path / "pool")]) == 0
    said = capsys.readouterr().out
    assert "2 machines are few" in said
    assert said.startswith("Warning: Run 1: This run has not finished.")
    assert "Warning: Run 2: It is noisy" in said
    text = text_of(tmp_path / "pool" / "report.md")
    assert "Run 1: This run has not finished." in text
    assert "Run 2: It is noisy: two copies of its baseline differ." in text


def test_what_a_run_lacks_is_said_beside_what_is_not_pooled_for_it(
    run_on: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [run_on(f"run{n}", f"m{n}", f"GPU-{n}", n, failed=["norm"] * n) for n in range(2)]
    record = Path(runs[0]) / "samples.jsonl"
    lines = record.read_bytes().splitlines(keepends=True)
    record.write_bytes(b"".join([*lines[:-2], b"torn\n", *lines[-2:]]))
    assert main([*runs, "--out", str(tmp_path / "pool")]) == 0
    said = capsys.readouterr().out
    assert "Warning: Run 1: The record is damaged" in said
    assert "Warning: Run 2: norm has status crashed" in said
    assert "Nothing is pooled of flash, tie and norm: not all runs tell that" in said


def test_what_differs_between_machines_is_corrected_for_the_number_of_switches(run_on: Callable[..., str]) -> None:
    pooled = pool([load_run(run_on(f"run{n}", f"left-{n}", f"GPU-{n}", n)) for n in range(3)])

    def said(p: tuple[float, float, float], hi: tuple[float, float, float] = (0.03, 0.02, 0.04)) -> str:
        table = pooled.effects.copy()
        mains = table["kind"] == "main"
        for name, values in (("p_machines", p), ("sd_machines", (0.02, 0.01, 0.001)), ("sd_machines_hi", hi)):
            table.loc[mains, name] = values
        table.loc[mains, "sd_machines_lo"] = 0.0005
        return "\n".join(pool_sentences(replace(pooled, effects=table)))

    none = said((0.03, 1.0, 1.0))
    assert "No switch is shown to be worth more on one machine than on another" in none
    assert "Most it could be norm: standard deviation 0.10 % [0.050 %, 4.0 %]" in none
    assert "tie differs most between machines: standard deviation 1.0 %" in said((0.03, 0.02, 1.0))
    assert "flash differs most between machines" in said((0.02, 0.02, 0.001))


def test_an_undecided_effect_beside_an_interval_without_1_is_explained(run_on: Callable[..., str]) -> None:
    pooled = pool([load_run(run_on(f"run{n}", f"left-{n}", f"GPU-{n}", n)) for n in range(3)])
    reason = "verdicts are corrected for the number of effects (Holm), intervals are not."
    table = pooled.effects.assign(verdict="undecided")
    assert not any(reason in text for text in pool_sentences(replace(pooled, effects=table.assign(lo=0.9, hi=1.1))))
    assert sum(reason in text for text in pool_sentences(replace(pooled, effects=table.assign(lo=1.01, hi=1.1)))) == 1
    told = table.assign(lo=0.9, hi=1.1)
    told.loc[told["kind"] == "interaction", "lo"] = 1.01
    assert not any(reason in text for text in pool_sentences(replace(pooled, effects=told))), "of what is not said here"


def test_the_name_that_machines_share_is_not_that_of_all(run_on: Callable[..., str], tmp_path: Path) -> None:
    runs = [run_on(f"run{n}", "vm", f"GPU-{n}", n) for n in range(2)]
    for run in runs:
        (Path(run) / "environment.json").write_text('{"host": "vm", "device": "NVIDIA H100 80GB HBM3"}')
    assert main([*runs, "--out", str(tmp_path / "pool"), "--machines=left,right"]) == 0
    text = text_of(tmp_path / "pool" / "report.md")
    assert "device: NVIDIA H100 80GB HBM3" in text
    assert "machine: vm" not in text


def test_two_names_of_one_machine_are_said_to_be_one(
    run_on: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [run_on(f"run{n}", "vm", "GPU-1", n) for n in range(2)]
    assert main([*runs, "--out", str(tmp_path / "pool"), "--machines=left,right"]) == 0
    said = capsys.readouterr().out
    assert "Warning: right and left count as one machine, left: one card was measured under both names." in said
    assert main([*runs, "--out", str(tmp_path / "pool")]) == 0
    assert "Warning" not in capsys.readouterr().out


def test_of_a_single_switch_its_effect_is_told_once(
    run_on: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [run_on(f"run{n}", f"left-{n}", f"GPU-{n}", n, factors=("flash",)) for n in range(2)]
    assert main([*runs, "--out", str(tmp_path / "pool")]) == 0
    assert len(re.findall("^flash is ", capsys.readouterr().out, re.MULTILINE)) == 1


def test_processors_are_no_cards() -> None:
    assert pool_scope(2, 0, "AMD EPYC") == "Intervals hold for AMD EPYC. They stand on 2 machines: 1 degree of freedom."


def test_a_large_spread_is_a_plain_number() -> None:
    assert spread_words(0.25, 0.0, 9.64) == "25 % [0 %, 964 %]"


def test_it_refuses_what_it_cannot_pool_and_where_it_cannot_write(
    run_on: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, c = (run_on(name, f"m-{name}", f"GPU-{name}", seed) for seed, name in enumerate("abc"))
    (tmp_path / "file").write_text("")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "plots").write_text("")
    for out, said in (
        (a, "holds a run"),
        (c, "holds a run"),
        (str(tmp_path / "file" / "x"), "cannot be made"),
        (str(tmp_path / "half"), f"{tmp_path / 'half' / 'plots'}: cannot be made (File exists); check"),
    ):
        assert main([a, b, "--out", out]) == 1
        assert said in capsys.readouterr().err
    assert main([a, a, "--out", str(tmp_path / "pool")]) == 0, "a directory named twice is one run"
    assert "one machine" in capsys.readouterr().out
    assert main([a, b, "--out", str(tmp_path / "pool"), "--machines", "left"]) == 1
    assert "--machines names 1 machine for 2 runs" in capsys.readouterr().err
    for names in (",", "left,"):
        assert main([a, b, "--out", str(tmp_path / "pool"), "--machines", names]) == 1
        assert f"'{names}' has an empty name" in capsys.readouterr().err
