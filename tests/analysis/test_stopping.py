from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qwen3bench.analysis.run import load_run
from qwen3bench.analysis.stopping import half_widths
from qwen3bench.record.lines import SampleLine
from qwen3bench.record.reader import read_record

Write = Callable[..., Path]


def test_half_widths_are_those_of_the_published_intervals(write_run: Write) -> None:
    run = load_run(write_run(blocks=12))
    widths = half_widths(run.samples, run.factors)
    main = run.effects[(run.effects["metric"] == "latency_s") & (run.effects["kind"] == "main")]
    published = np.where(main["df"] >= 5, np.sqrt(main["hi"] / main["lo"]) - 1, np.inf)
    assert widths == pytest.approx(dict(zip(main["term"], published, strict=True)))
    assert np.isfinite(list(widths.values())).any()


def test_sample_lines_do_as_well_as_a_table(write_run: Write) -> None:
    directory = write_run(factors=("flash", "tie"), blocks=12)
    lines = read_record(directory).of(SampleLine)
    assert half_widths(lines, ["flash", "tie"]) == half_widths(load_run(directory).samples, ["flash", "tie"])


def test_a_pair_that_differs_in_two_factors_is_judged_by_its_speedup(write_run: Write) -> None:
    run = load_run(write_run(factors=("flash", "tie"), cells=["baseline", "flash+tie"], blocks=18))
    assert list(half_widths(run.samples, run.factors)) == ["flash+tie"]


def test_the_baseline_alone_is_judged_by_its_latency(write_run: Write) -> None:
    run = load_run(write_run(factors=[], cells=["baseline"], blocks=18))
    widths = half_widths(run.samples, [])
    assert list(widths) == ["baseline"]
    assert 0 < widths["baseline"] < 0.01


def test_two_processes_of_one_factor_are_too_few_to_stop(write_run: Write) -> None:
    run = load_run(write_run(factors=["flash"], noise=0.0))
    assert half_widths(run.samples, ["flash"]) == {"flash": np.inf}


def test_peers_alone_give_no_half_width(write_run: Write) -> None:
    lines = read_record(write_run(factors=("flash",), blocks=12)).of(SampleLine)
    theirs = [replace(line, cell="transformers:sdpa") for line in lines if line.cell == "flash"]
    assert theirs
    assert half_widths(theirs, ["flash"]) == {}


def test_nothing_measured_has_no_half_width() -> None:
    assert half_widths([], ["flash"]) == {}
