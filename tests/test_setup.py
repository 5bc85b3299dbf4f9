"""What a fresh machine meets first: the Makefile, the pinned versions, the package's files."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
TARGETS = ("help", "setup", "test", "test-slow", "test-all", "lint", "type", "format")
TARGETS += ("ablate", "regimes", "report", "bench", "aa", "clean")


def _make(*arguments: str) -> str:
    """What make prints, also when the tests themselves run under make."""
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    command = ["make", "--no-print-directory", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def _pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_the_installed_command_starts() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    module, _, function = scripts["qwen3bench"].partition(":")
    code = f"import sys; from {module} import {function} as main; sys.exit(main())"  # as pip writes it
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("qwen3bench measures")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_help_is_the_default_and_lists_every_target() -> None:
    shown = _make()
    assert _make("help") == shown
    assert set(TARGETS) <= set(re.findall(r"^  make (\S+) +\S", shown, re.MULTILINE))


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_ablate_is_the_command_of_the_contract() -> None:
    assert _make("-n", "-W", "pyproject.toml", "ablate", "ARGS=model=tiny").splitlines()[-1] == (
        ".venv/bin/python -m qwen3bench design=full model=tiny"
    )


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(("target", "what"), [("ablate", "."), ("test", "'.[dev]'")])
def test_make_says_that_it_sets_up_and_shows_progress(target: str, what: str) -> None:
    planned = _make("-n", "-W", "pyproject.toml", target)
    said, install = planned.index("setting up .venv (a minute or two)"), planned.index("-m pip install")
    assert said < install
    line = planned[install:].splitlines()[0]
    assert "--quiet" not in line
    assert "--progress-bar on" in line
    assert line.endswith(f"-c constraints.txt -e {what}")


def test_every_direct_dependency_is_pinned_within_its_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(r for extra in project["optional-dependencies"].values() for r in extra),
    ]
    pins = {canonicalize_name(name): version for name, version in _pins().items()}
    for requirement in map(Requirement, wanted):
        if requirement.name != project["name"]:
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_no_pin_holds_on_one_platform_only() -> None:
    for name, version in _pins().items():
        assert "+" not in version, name  # torch==2.13.0+cpu is in no public index
        assert not re.match(r"nvidia-(?!ml-py)|triton", name), name  # torch asks for its own


def test_ci_script_is_valid_bash() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.slow
def test_the_wheel_holds_every_module_config_and_template(tmp_path: Path) -> None:
    source = tmp_path / "source"
    unwanted = shutil.ignore_patterns(".*", "*.egg-info", "build", "results", "tests", "notebooks", "__pycache__")
    shutil.copytree(ROOT, source, ignore=unwanted)
    (source / "README.md").touch()
    code = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    kinds = (".py", ".yaml", ".jinja", ".mplstyle", ".css", ".js")
    wanted = [p for p in (source / "qwen3bench").rglob("*") if p.suffix in kinds]
    assert {p.relative_to(source).as_posix() for p in wanted} <= held
    configs = {p.relative_to(source / "configs").as_posix() for p in (source / "configs").rglob("*.yaml")}
    assert {f"qwen3bench/configs/{name}" for name in configs} <= held

    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    shown = subprocess.run(
        [sys.executable, "-m", "qwen3bench", "--cfg", "job", "-p", "opt", "opt=norm"],
        env={**os.environ, "PYTHONPATH": str(site)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "_target_: qwen3bench.opt.norm.apply" in shown.stdout
    info = subprocess.run(
        [sys.executable, "-m", "qwen3bench", "--info", "searchpath"],
        env={**os.environ, "PYTHONPATH": str(site)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(site / "qwen3bench" / "configs") in info.stdout


def test_the_source_tree_alone_works_from_any_directory(tmp_path: Path) -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "qwen3bench", "--cfg", "job", "-p", "model", "model=tiny"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "name: tiny" in shown.stdout
    assert list(tmp_path.iterdir()) == []
