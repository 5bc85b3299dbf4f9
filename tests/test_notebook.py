"""notebooks/ablation.ipynb runs from the first cell to the last, and is committed without outputs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from records import write_record

from qwen3bench.analysis.run import load_run, write_derived

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "ablation.ipynb"
FACTORS = ["flash", "tie"]
LEVEL_S = {"baseline": 1.0, "flash": 0.8, "tie": 1.0, "flash+tie": 0.8}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run in which flash is worth 1.25× and tie nothing, with its tables."""
    rng = np.random.default_rng(0)
    where = {"workload": "prefill", "runtime": "eager", "attempt": 0}
    lines: list[dict[str, Any]] = [
        {
            "type": "run",
            "config": {"batch_size": 1, "prompt_tokens": 8, "analysis": {"band": 0.01, "confidence": 0.95}},
            "factors": FACTORS,
            "cells": list(LEVEL_S),
            "workloads": ["prefill"],
            "runtimes": ["eager"],
            "model": "tiny",
            "device": "a device",
            "dtype": "float32",
        }
    ]
    for block in range(6):
        here = {**where, "block": block, "process": block // 3}
        visits = [(cell, 0) for cell in LEVEL_S] + [("baseline", 1)]
        for position, i in enumerate(rng.permutation(len(visits))):
            cell, copy = visits[i]
            at = {**here, "cell": cell, "copy": copy, "position": position}
            for repeat in range(3):
                latency_s = LEVEL_S[cell] * (1 + 0.1 * block) * float(np.exp(rng.normal(scale=1e-3)))
                lines.append({"type": "sample", **at, "repeat": repeat, "latency_s": latency_s, "time": 10.0 * block})
            lines.append({"type": "visit", **at, "samples": 3})
        lines.append({"type": "block", **here, "state": "ok", "flags": [], "time": 10.0 * block + 9})
    lines.append({"type": "end", "status": "finished", "time": 99.0})
    write_derived(load_run(write_record(tmp_path / "run", lines)))
    return tmp_path / "run"


def execute(monkeypatch: pytest.MonkeyPatch, directory: Path, run: Path | None = None) -> str:
    """What the notebook prints when it is run in `directory`, on `run` where one is named."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.delenv("QWEN3BENCH_RUN", raising=False)
    if run is not None:
        monkeypatch.setenv("QWEN3BENCH_RUN", str(run))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    directory.mkdir(exist_ok=True)
    client = NotebookClient(notebook, timeout=120, kernel_name="python3")
    client.execute(cwd=str(directory))
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


@pytest.mark.slow
def test_it_goes_from_a_record_to_its_findings(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = execute(monkeypatch, tmp_path / "notebooks", run_dir)
    found = re.search(r"^flash: ([\d.]+)×, from 6 blocks", said, re.MULTILINE)
    assert found is not None
    assert float(found[1]) == pytest.approx(1.25, rel=3e-3)
    assert f"effects.csv: {found[1]}× [" in said
    product = re.search(r"of shares ([\d.]+), all on ([\d.]+)", said)
    assert product is not None
    assert product[1] == product[2]
    assert re.search(r"^Switch on flash: 1\.2[45]\d*× \[.*\] as fast as the baseline \(prefill", said, re.MULTILINE)
    assert re.search(r"^flash: a share of 1\.2", said, re.MULTILINE)


@pytest.mark.slow
def test_it_notices_an_effect_that_is_not_the_samples(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load_run(run_dir)
    run.effects["estimate"] *= 1.001
    write_derived(run)
    with pytest.raises(CellExecutionError, match="AssertionError"):
        execute(monkeypatch, tmp_path / "notebooks", run_dir)


@pytest.mark.slow
def test_without_a_run_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CellExecutionError, match="set QWEN3BENCH_RUN to the directory of one"):
        execute(monkeypatch, tmp_path / "notebooks")


@pytest.mark.slow
@pytest.mark.parametrize("place", ["notebooks", "."])
def test_it_finds_a_run_of_every_combination_by_itself(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    reference = tmp_path / "results" / "reference"
    reference.mkdir(parents=True)
    run_dir.rename(reference / "small")
    first = {"config": {}, "factors": FACTORS, "cells": ["baseline", "flash+tie"]}
    write_record(reference / "a-pair", [{"type": "run", **first, "workloads": ["prefill"], "runtimes": ["eager"]}])
    lines = (reference / "small" / "samples.jsonl").read_text().splitlines()
    (reference / "a-cut-off-one").mkdir()
    cut_off = [line for line in lines if '"end"' not in line]
    (reference / "a-cut-off-one" / "samples.jsonl").write_text("\n".join(cut_off) + "\n")
    said = execute(monkeypatch, tmp_path / place)
    assert said.startswith("small: tiny on a device")


@pytest.mark.slow
@pytest.mark.parametrize("directory", [ROOT, NOTEBOOK.parent], ids=["root", "notebooks"])
def test_it_reads_a_committed_run(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    said = execute(monkeypatch, directory)
    assert "h200-ablate-1x2048: qwen3-0.6b on NVIDIA H200, bfloat16" in said
    assert "Switch on flash+tie+mlp+mask+norm: 3.2" in said
    assert "mask: 1.15" in said


def test_it_is_committed_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(notebook.cells) == 10
    assert all(cell.outputs == [] and cell.execution_count is None and cell.metadata == {} for cell in code)
