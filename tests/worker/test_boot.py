"""A worker runs the code that started it, whatever the directory that it is started in holds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from qwen3bench.campaign import worker_process
from qwen3bench.errors import UserError
from qwen3bench.record.environment import PACKAGE, code_hash, refuse_other_code, running_code

BOOT = PACKAGE / "worker" / "boot.py"
SERVE = """
import sys, qwen3bench, mine
def main(): print(qwen3bench.__file__, __name__, mine.__file__, sys.path[0])
"""
CONSOLE = "import sys; from qwen3bench.__main__ import main; sys.exit(main())"
RUN = ("model=tiny", "workload=prefill", "device=cpu", "measure=quick", "measure.max_seconds=1", "run.dir=run")


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A directory with another qwen3bench, which leaves a file where it is imported, and a package of the user's."""
    planted = tmp_path / "elsewhere"
    for name in ("qwen3bench", "qwen3bench/worker", "mine", "random"):
        (planted / name).mkdir(parents=True)
        (planted / name / "__init__.py").touch()
    for name in ("__init__", "worker/serve", "worker/boot"):
        spoil = f"open({str(planted / 'imported')!r}, 'w').close()\n"
        (planted / "qwen3bench" / f"{name}.py").write_text(spoil)
    return planted


def test_it_imports_its_own_package_and_the_users_from_the_current_directory(tmp_path: Path, elsewhere: Path) -> None:
    package = tmp_path / "installed" / "qwen3bench"
    (package / "worker").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "worker" / "__init__.py").touch()
    (package / "worker" / "serve.py").write_text(SERVE)
    boot = shutil.copy(BOOT, package / "worker")
    for path in ("", str(elsewhere)):
        command = [sys.executable, "-P", boot]
        ran = subprocess.run(
            command, cwd=elsewhere, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=True
        )
        imported, name, mine, first = ran.stdout.split()
        assert (imported, name) == (str(package / "__init__.py"), "qwen3bench.worker.serve")
        assert mine == str(elsewhere / "mine" / "__init__.py")
        assert (first == str(elsewhere)) == bool(path)  # else it would hide the standard library's `random`
    assert not (elsewhere / "imported").exists()


def test_a_campaign_starts_its_workers_so() -> None:
    command = worker_process.WORKER
    assert command == (sys.executable, "-P", str(BOOT))


def test_other_code_is_refused() -> None:
    ours = running_code()
    assert (ours.package, ours.code) == (str(PACKAGE), code_hash())
    refuse_other_code(ours)
    with pytest.raises(UserError, match=r"/other/qwen3bench: a worker runs this qwen3bench, and the run that of /"):
        refuse_other_code(replace(ours, package="/other/qwen3bench"))
    with pytest.raises(UserError, match="its code has changed since this run began"):
        refuse_other_code(replace(ours, code="0"))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["module", "console script"])
def test_a_run_in_a_directory_with_another_package_is_measured_by_its_own(
    elsewhere: Path, tmp_path: Path, how: str
) -> None:
    script = tmp_path / "bin" / "qwen3bench"
    script.parent.mkdir()
    script.write_text(CONSOLE)
    started = ["-P", "-m", "qwen3bench"] if how == "module" else [str(script)]
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    shutil.rmtree(elsewhere / "random")
    ran = subprocess.run(
        [sys.executable, *started, *RUN], cwd=elsewhere, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert (elsewhere / "run" / "report.html").exists()
    assert not (elsewhere / "imported").exists()
