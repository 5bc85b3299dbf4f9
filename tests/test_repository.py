"""The repository stays light: what is committed of results, and what a clone weighs."""

from __future__ import annotations

import json
import lzma
import re
import subprocess
from pathlib import Path
from urllib.parse import unquote

import pytest

from qwen3bench import pool
from qwen3bench.config.cli import main
from qwen3bench.config.settings import Settings

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "results" / "reference"
POOL = REFERENCE / "h200-pool-1x2048"
RUNS = sorted(path for path in REFERENCE.iterdir() if path.is_dir() and path != POOL)
RECORDS = sorted(REFERENCE.rglob("samples.jsonl.xz"))
SHOWN = {"h200-ablate-1x2048", "h100-regimes"}  # the runs whose pages README shows
MB = 10**6


def git(*arguments: str) -> str:
    """What git says; the test is skipped where this is no repository."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    if done.returncode:
        pytest.skip(f"no git repository here: {done.stderr.strip()}")
    return done.stdout


def weight(directory: Path) -> int:
    """Bytes of all files below a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def committed() -> list[Path]:
    """The committed files of results/."""
    return [ROOT / name for name in git("ls-files", "-z", "results").split("\0") if name]


def test_results_are_light(committed: list[Path]) -> None:
    assert sum(path.stat().st_size for path in committed) < 8 * MB


def test_at_most_ten_runs_are_kept() -> None:
    assert 0 < len(RUNS) <= 10


@pytest.mark.parametrize("run", RUNS, ids=lambda path: path.name)
def test_a_run_is_its_record_and_what_is_derived_from_it(run: Path, committed: list[Path]) -> None:
    files = [path for path in committed if path.is_relative_to(run)]
    assert sum(path.stat().st_size for path in files) < MB
    kept = {path.name for path in files if "plots" not in path.parts and path.name != "report.md"}
    assert kept == {"samples.jsonl.xz", "cells.csv", "effects.csv", "config.yaml", "environment.json"}
    pages = [path for path in files if path.name not in kept]
    assert {path.suffix for path in pages} == ({".md", ".svg"} if run.name in SHOWN else set())


def test_links_of_committed_pages_lead_to_what_is_committed(committed: list[Path]) -> None:
    files = {ROOT / name for name in git("ls-files", "-z").split("\0")}
    there = files | {folder for file in files for folder in file.parents}
    pages = [path for path in committed if path.suffix == ".md"]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)\s#]+)", page.read_text("utf-8"))]
    inside = [(page, unquote(link)) for page, link in links if not link.startswith(("http:", "https:"))]
    assert len(inside) > 10
    assert not [f"{page}: {link}" for page, link in inside if (page.parent / link).resolve() not in there]


@pytest.mark.slow
def test_the_pool_is_what_its_runs_give(tmp_path: Path) -> None:
    runs = [str(REFERENCE / f"h200-ablate-1x2048{end}") for end in ("", "-b", "-c")]
    assert pool.main([*runs, "--machines=K,L,J", "--out", str(tmp_path)]) == 0
    for name in ("effects.csv", "machines.csv"):
        assert (tmp_path / name).read_bytes() == (POOL / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.parent.relative_to(REFERENCE).as_posix())
def test_a_run_holds_a_command_that_works(record: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs: list[Settings] = []

    def note(settings: Settings, count: int = 0) -> int:
        runs.append(settings.resolved("cuda"))
        return 0

    with lzma.open(record, "rt", encoding="utf-8") as lines:
        command = next(line["command"] for line in map(json.loads, lines) if line["type"] == "session")
    assert command[:3] == ["python", "-m", "qwen3bench"]
    assert main(command[3:], run=note) == 0
    assert len(runs) == 1


def test_no_image_is_committed_but_as_svg() -> None:
    assert [name for name in git("ls-files").splitlines() if name.lower().endswith((".png", ".jpg", ".pdf"))] == []


def test_a_shallow_clone_is_light(tmp_path: Path) -> None:
    git("clone", "--quiet", "--depth", "1", f"file://{ROOT}", str(tmp_path / "clone"))
    assert weight(tmp_path / "clone" / ".git") < 6 * MB
