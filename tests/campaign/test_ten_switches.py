"""Ten switches of a user's own over five parts, from a folder of their own, through the gate and a whole run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab_project import TEN, write_lab

from qwen3bench.analysis.run import load_run
from qwen3bench.config.choices import use_config_dir
from qwen3bench.config.cli import compose
from qwen3bench.errors import UserError

SOURCE = Path(__file__).parents[2]
ALL_TEN = f"opt={','.join(TEN)}"
SMALL = ["model=tiny", "device=cpu", "workload=prefill", "measure.min_processes=1", "measure.max_seconds=1"]
BLOCKS = ["measure.min_blocks=1", "measure.max_blocks=1", "run.dir=run"]


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    use_config_dir(None)


def _python(module: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", module, "--config-dir=own", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )


@pytest.mark.slow
def test_all_cells_of_their_screen_compute_the_baselines_function(tmp_path: Path) -> None:
    write_lab(tmp_path)
    verified = _python("qwen3bench.verify", ALL_TEN, "design=screen", "model=tiny", "device=cpu", cwd=tmp_path)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert "80 of 80 cells compute the baseline's function" in verified.stdout


@pytest.mark.slow
def test_they_are_measured_together_beside_one_of_ours(tmp_path: Path) -> None:
    write_lab(tmp_path)
    ran = _python("qwen3bench", f"{ALL_TEN},norm", *SMALL, *BLOCKS, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    run = load_run(tmp_path / "run")
    assert set(run.cells["cell"]) == {"baseline", "+".join(("norm", *TEN))}
    assert set(run.cells["equivalent"]) == {True}
    assert (run.cells["latency_s"] > 0).all()


@pytest.mark.slow
def test_every_combination_of_ten_is_refused_with_the_screen_that_would_do(tmp_path: Path) -> None:
    full = [f"--config-dir={write_lab(tmp_path)}", ALL_TEN, "design=full"]
    with pytest.raises(UserError) as refusal:
        compose(full)
    assert str(refusal.value).split("\n") == [
        "design=full would measure 2^10 = 1,024 cells; design=screen tells every main effect and pair of these 10 in "
        "80 cells",
        "design.force=true measures them all",
    ]
    assert len(compose([*full, "design.force=true"]).cells) == 2**10


@pytest.mark.slow
def test_two_that_do_not_commute_are_refused_by_every_command(tmp_path: Path) -> None:
    write_lab(tmp_path, {**TEN, "swapped_product": "part: mlp"})
    names = "opt=plain_silu,swapped_product"
    told = "optimizations plain_silu and swapped_product both replace the part 'mlp'; switch one of them off"
    for module, *arguments in (("qwen3bench", "--cfg=job"), ("qwen3bench.describe",), ("qwen3bench.verify",)):
        refused = _python(module, *arguments, names, "model=tiny", cwd=tmp_path)
        assert (refused.returncode, told in refused.stderr) == (1, True), refused.stdout + refused.stderr
