"""A switch from a folder of the user's own through a whole run: real workers, in a directory of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from own_project import write_own_project

from qwen3bench.analysis.run import load_run
from qwen3bench.record.lines import EndLine, StopLine
from qwen3bench.record.reader import read_record

SOURCE = Path(__file__).parents[2]
SIZES = ["model=tiny", "device=cpu", "workload=prefill", "measure.max_seconds=1", "measure.min_processes=1"]
RUN = ["+opt=mask,mine", "design=full", *SIZES, "measure.min_blocks=3", "measure.max_blocks=3", "run.dir=run"]


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    """A project of the user's: `own/opt/mine.yaml` and `mypackage/` beside it."""
    (tmp_path / "elsewhere").mkdir()
    write_own_project(tmp_path)
    return tmp_path


def _python(module: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", module, *arguments],  # as installed: the current directory is not on the path
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


def _unfinished(directory: Path) -> None:
    """The run as if it had been ended before its last lines."""
    record = directory / "samples.jsonl"
    ends = tuple(f'"type":"{line.type}"' for line in (EndLine, StopLine))
    lines = record.read_text().splitlines(keepends=True)
    record.write_text("".join(line for line in lines if not any(end in line for end in ends)))


@pytest.mark.slow
def test_it_is_measured_judged_and_reported_like_any_other(lab: Path) -> None:
    folder = f"--config-dir={lab / 'own'}"
    ran = _python("qwen3bench", folder, *RUN, cwd=lab / "elsewhere")
    assert ran.returncode == 0, ran.stderr
    directory = lab / "elsewhere" / "run"
    run = load_run(directory)
    assert list(run.factors) == ["mask", "mine"]
    assert set(run.cells["cell"]) == {"baseline", "mask", "mine", "mask+mine"}
    assert set(run.cells["equivalent"]) == {True}
    assert {"mine", "mask:mine"} <= set(run.effects["term"])
    assert read_record(directory).run.own_switches == {"mine": "each RMSNorm by PyTorch's own function"}
    assert {"mypackage", "opt/mine.yaml"} <= set(read_record(directory).run.fingerprint or {})

    (lab / "own").rename(lab / "gone")  # the record holds what a report needs
    assert _python("qwen3bench.report", "run", cwd=lab / "elsewhere").returncode == 0
    assert "- mine: each RMSNorm by PyTorch's own function." in (directory / "report.md").read_text()
    shutil.copytree(directory, lab / "elsewhere" / "again")
    compared = _python("qwen3bench.compare", "run", "again", cwd=lab / "elsewhere")
    assert (compared.returncode, "mine" in compared.stdout) == (0, True)
    (lab / "gone").rename(lab / "own")

    _unfinished(directory)
    alone = _python("qwen3bench", "resume=run", cwd=lab / "elsewhere")
    assert (alone.returncode, "its record asks for opt.mine._target_" in alone.stderr) == (1, True)
    module, file = lab / "mypackage/mymodule.py", lab / "own/opt/mine.yaml"
    source, declared = module.read_text(), file.read_text()
    module.write_text(f"{source}\n# a change\n")
    changed = _python("qwen3bench", folder, "resume=run", cwd=lab / "elsewhere")
    assert (changed.returncode, "cannot be continued, as mypackage changed" in changed.stderr) == (1, True)
    module.write_text(source)
    file.write_text(f"{declared}# more\n")
    changed = _python("qwen3bench", folder, *RUN, cwd=lab / "elsewhere")
    assert (changed.returncode, "cannot be continued, as opt/mine.yaml changed" in changed.stderr) == (1, True)
    file.write_text(declared)
    continued = _python("qwen3bench", folder, "resume=run", cwd=lab / "elsewhere")
    assert continued.returncode == 0, continued.stderr
    assert len(load_run(directory).samples) == len(run.samples)


@pytest.mark.slow
def test_describe_and_verify_know_it(lab: Path) -> None:
    arguments = ("--config-dir", "own", "+opt=mine", "model=tiny")
    described = _python("qwen3bench.describe", *arguments, cwd=lab)
    assert (described.returncode, "Qwen3Model" in described.stdout) == (0, True), described.stderr
    verified = _python("qwen3bench.verify", *arguments, cwd=lab)
    assert (verified.returncode, "2 of 2 cells compute the baseline's function" in verified.stdout) == (0, True)
    module = lab / "mypackage/mymodule.py"
    module.write_text(module.read_text().replace("self.eps)", "1e-2)"))
    wrong = _python("qwen3bench.verify", *arguments, cwd=lab)
    assert (wrong.returncode, "mine: " in wrong.stdout) == (3, True)
