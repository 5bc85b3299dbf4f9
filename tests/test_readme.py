"""The documents say what is so: commands work, links lead somewhere, shown files are the real ones."""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from own_project import write_own_project

from qwen3bench import __version__, aa, compare, describe, load_run, pool, report, verify
from qwen3bench.analysis.cells import columns
from qwen3bench.analysis.frames import block_matrix
from qwen3bench.analysis.run import EFFECT_COLUMNS
from qwen3bench.config.cli import main
from qwen3bench.config.settings import Settings
from qwen3bench.record.design import is_peer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "results" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
RATIO = re.compile(r"(\d+\.\d+)×\s\[(\d+\.\d+),\s(\d+\.\d+)\]")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FIRST_RUN = "+opt=flash,tie model=tiny measure=quick measure.max_seconds=1 measure.min_blocks=1"


def fences(text: str, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(text) if kind == language]


def spans(text: str) -> list[str]:
    """The code inside lines."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", FENCE.sub("", text))]


def commands() -> list[str]:
    """Every command that a document shows, once."""
    found = []
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        found += [line for body in fences(text, "sh") for line in body.splitlines() if line.strip()]
        found += [code for code in spans(text) if code.startswith(("make ", "python -m "))]
    return list(dict.fromkeys(shlex.join(shlex.split(line, comments=True)) for line in found))


def reads_a_run(command: str) -> bool:
    return command.startswith(tuple(f"python -m qwen3bench.{entry} " for entry in ("report", "compare", "pool")))


@pytest.fixture
def make() -> Callable[[list[str]], None]:
    """Asks make what it would do."""
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}

    def ask(words: list[str]) -> None:
        if shutil.which("make") is None:
            pytest.skip("make is not installed")
        subprocess.run(["make", "-n", *words], cwd=ROOT, env=environment, check=True, capture_output=True, timeout=60)

    return ask


@pytest.mark.parametrize("command", [command for command in commands() if not reads_a_run(command)])
def test_a_command_works(
    command: str, make: Callable[[list[str]], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Make's targets exist, runs compose and fit the device, and what is quick on a tiny model is done."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    write_own_project(tmp_path)
    words = shlex.split(command)
    runs: list[Settings] = []

    def note(settings: Settings, count: int = 0) -> int:
        runs.append(settings.resolved("cuda"))
        return 0

    if words[0] == "make":
        make(words[1:])
        return
    assert words[:2] == ["python", "-m"], "a test of this kind of command is missing"
    module, arguments = words[2], words[3:]
    if module == "qwen3bench":
        assert main(arguments, run=note) == 0
        assert bool(runs) != bool({"--help", "--cfg"} & set(arguments))
    elif not arguments:
        assert find_spec(module) is not None
    elif module == "qwen3bench.aa":
        monkeypatch.setattr(aa, "measure", note)
        assert aa.main(arguments) == 0
        assert len(runs) == 1
    else:
        assert {"qwen3bench.describe": describe, "qwen3bench.verify": verify}[module].main(arguments) == 0


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in which the first command of the README has run, on a tiny model and briefly."""
    assert "python -m qwen3bench +opt=flash,tie" in commands()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "qwen3bench", *FIRST_RUN.split()]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    results = tmp_path / "results"
    run = (results / "latest").resolve()
    for name in ("before", "after", "reference/NAME"):
        shutil.copytree(run, results / name)
    monkeypatch.chdir(tmp_path)
    return run


@pytest.mark.slow
def test_the_first_command_and_all_that_reads_a_run(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    promised = re.findall(r"^\| (`.*?) \| ", COMMANDS.partition("## A run's directory")[2], re.MULTILINE)
    names = [name for line in promised for name in spans(line)]
    assert names[0] == "samples.jsonl"
    assert len(names) >= 8
    for name in names:
        assert any(measured.glob(name)), name
    done = [command for command in commands() if reads_a_run(command)]
    assert len(done) >= 3
    for command in done:
        module, *arguments = shlex.split(command)[2:]
        entries = {"qwen3bench.report": report.main, "qwen3bench.compare": compare.main, "qwen3bench.pool": pool.main}
        allowed = {0, 4} if "--fail-on" in arguments else {0}  # a second of measuring may be too little for a gate
        if module == "qwen3bench.pool":  # which does not count one run twice
            allowed = {1}
        assert entries[module](arguments) in allowed, command
    assert (measured.parent / "both" / "report.html").is_file()
    (snippet,) = fences(COMMANDS, "python")
    capsys.readouterr()
    exec(compile(snippet, "commands.md", "exec"), {})
    said = capsys.readouterr().out
    assert "flash+tie" in said
    assert "verdict" in said
    assert "too few cells, without flash, tie: it cannot be told from tie" in said


@pytest.mark.slow
def test_the_page_over_the_committed_regimes_is_what_their_records_give(tmp_path: Path) -> None:
    committed = ROOT / "results" / "reference" / "h100-regimes"
    home = tmp_path / "regimes"
    shutil.copytree(committed, home, ignore=shutil.ignore_patterns("report.*", "plots"))
    # the last command of `make regimes`
    assert report.main([str(home / "single"), str(home / "batched"), "--out", str(home)]) == 0
    pages = [(place / "report.md").read_text("utf-8") for place in (committed, home)]
    assert RATIO.findall(pages[0]) == RATIO.findall(pages[1]) != []


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_and_paths_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link
    for code in spans(text):
        if re.fullmatch(r"(qwen3bench|configs|tests|docs|notebooks|\.ci)/[\w./-]*", code):
            assert (ROOT / code).exists(), code


def test_the_rooms_are_the_trees() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = fences(text, "")[0]
    package = False
    seen = []
    for line in tree.splitlines():
        name = line.split()[0]
        package = package if line.startswith(" ") else name == "qwen3bench/"
        seen.append(f"qwen3bench/{name}" if package and line.startswith(" ") else name)
        more = re.findall(r"\b\w+\.py\b", line.partition(name)[2])
        seen += [f"qwen3bench/{other}" for other in more]
    assert len(seen) >= 15
    assert [name for name in seen if not (ROOT / name).exists()] == []
    packages = {f"qwen3bench/{init.parent.name}/" for init in (ROOT / "qwen3bench").glob("*/__init__.py")}
    assert packages <= set(seen)
    assert len(re.findall(r"^\d\. \[", text, re.MULTILINE)) == 6


def test_shown_files_are_the_real_ones() -> None:
    text = (ROOT / "docs" / "add-an-optimization.md").read_text(encoding="utf-8")
    shown = re.findall(r"^`([\w./-]+)`:\n\n```\w+\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert [name for name, _ in shown] == ["qwen3bench/opt/qkv.py", "configs/opt/qkv.yaml", "tests/opt/test_qkv.py"]
    for name, body in shown:
        assert body == (ROOT / name).read_text(encoding="utf-8"), f"{name} changed; show it as it is"


def test_named_tests_of_the_snippets_exist() -> None:
    source = (ROOT / "tests" / "test_seed_snippets.py").read_text(encoding="utf-8")
    text = (ROOT / "docs" / "seed-snippets.md").read_text(encoding="utf-8")
    named = [code for code in spans(text) if code.startswith("test_")]
    assert len(named) >= 9
    assert [name for name in named if f"def {name}(" not in source] == []


def test_listed_columns_are_those_of_the_tables() -> None:
    text = (ROOT / "docs" / "reading-the-numbers.md").read_text(encoding="utf-8").partition("## Columns")[2]
    cells, effects = (text.partition(f"`{name}`: ")[2].partition("\n\n")[0] for name in ("cells.csv", "effects.csv"))
    assert set(spans(cells.partition(". A peer")[0])) == set(columns([]))
    assert set(spans(re.sub(r"\([^)]*\)", "", effects))) == set(EFFECT_COLUMNS)


def test_the_readme_is_read_in_one_minute() -> None:
    assert len(README.split()) <= 900
    before, picture, after = README.partition("![")
    assert picture
    assert len(before.split()) <= 60
    alt, _, after = after.partition("](")
    assert alt
    assert after.partition(")")[0] == "results/reference/h200-ablate-1x2048/plots/effects-by-condition.svg"


def test_a_line_of_the_readme_holds_one_interval_at_most() -> None:
    intervals = re.compile(r"\[−?\d[\d.]*,\s*−?\d[\d.]*\]")
    assert len(intervals.findall(README)) >= 10
    assert [line for line in README.splitlines() if len(intervals.findall(line)) > 1] == []
    assert len(intervals.findall(README)) == sum(len(intervals.findall(line)) for line in README.splitlines())


@pytest.mark.slow
def test_the_shown_output_is_what_the_run_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "54")
    block = README.partition("<!-- terminal -->")[2].partition("<!-- /terminal -->")[0]
    (shown,) = fences(block.strip() + "\n", "text")
    assert len(shown.splitlines()) == 10
    run = tmp_path / "run"
    shutil.copytree(ROOT / "results" / "reference" / "h200-ablate-1x2048", run)
    assert report.main([str(run)]) == 0
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    start = printed.index(shown.splitlines()[0])
    assert printed[start : start + 10] == shown.splitlines()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_ratio_is_said_plainly(document: Path) -> None:
    """Four digits at most, and "as fast", as "1.43× faster" may mean 2.43 times as fast."""
    text = document.read_text(encoding="utf-8")
    assert re.findall(r"\d×(?:\s\[[^\]]*\])?\s(?:faster|slower)[^|]{,20}", text) == []
    estimates = [parts[0] for parts in RATIO.findall(text)]
    assert [each for each in estimates if len(each.replace(".", "").lstrip("0")) > 4] == []


def test_version_and_license_are_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == __version__
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert citation["license"] == project["license"] == "MIT"
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").startswith("MIT License\n")


POOL = ROOT / "results" / "reference" / "h200-pool-1x2048"
RECORDS = [path.parent for path in sorted((ROOT / "results" / "reference").rglob("samples.jsonl.xz"))]
HISTORY = pd.read_csv(ROOT / "results" / "history.csv", dtype=str)  # of runs that `commit` holds


def measured_ratios(place: Path) -> np.ndarray:
    """Every ratio of a run with the ends of its interval: effects, speed-ups, peers to our cells, those of its page."""
    found = []
    for name, fields in (("effects", ["estimate", "lo", "hi"]), ("cells", ["speedup", "speedup_lo", "speedup_hi"])):
        found += pd.read_csv(place / f"{name}.csv")[fields].dropna().to_numpy().tolist()
    if (place / "report.md").exists():
        found += [[float(part) for part in parts] for parts in RATIO.findall((place / "report.md").read_text("utf-8"))]
    if "peers" in place.name:
        for _, samples in load_run(place).samples.groupby(["workload", "runtime"]):
            blocks = block_matrix(samples)
            cells = [cell for cell in blocks.log_s if not is_peer(cell)]
            for peer in set(blocks.log_s) - set(cells):
                to_ours = blocks.log_ratios(peer, cells)
                half = to_ours.half_width(0.95)
                ends = to_ours.estimate, to_ours.estimate - half, to_ours.estimate + half
                found += np.exp(np.array(ends)).T.tolist()
    return np.array(found)


def pooled_ratios(place: Path) -> np.ndarray:
    """Every effect of a pool, with its interval."""
    return pd.read_csv(place / "effects.csv")[["estimate", "lo", "hi"]].dropna().to_numpy()


def holds(ratios: np.ndarray, parts: Sequence[str]) -> bool:
    """Whether one of the ratios reads as these digits do."""
    half_a_digit = [0.5 * 10 ** -len(part.partition(".")[2]) * 1.001 for part in parts]
    apart = np.abs(ratios - [float(part) for part in parts])
    return bool((apart <= half_a_digit).all(axis=1).any())


@pytest.fixture(scope="module")
def ratios() -> np.ndarray:
    """Every ratio of the committed runs and of their pool, and those that are cited of runs in the history."""
    cited = HISTORY[["estimate", "lo", "hi"]].to_numpy(float)
    return np.concatenate([*map(measured_ratios, RECORDS), pooled_ratios(POOL), cited])


@pytest.mark.parametrize(
    "name", ["README.md", "docs/results.md", "docs/peers.md", "docs/log.md", "docs/how-we-measure.md"]
)
def test_every_ratio_with_an_interval_was_measured(name: str, ratios: np.ndarray) -> None:
    shown = RATIO.findall((ROOT / name).read_text("utf-8"))
    assert shown
    assert [parts for parts in shown if not holds(ratios, parts)] == []


def test_a_ratio_of_the_readme_without_an_interval_was_measured(ratios: np.ndarray) -> None:
    shown = re.findall(r"(\d+\.\d+)×(?!\s\[)", README)
    assert len(shown) >= 4
    assert [each for each in shown if float(each) != 1 and not holds(ratios[:, :1], [each])] == []


@pytest.mark.parametrize(("run", "commit"), sorted(set(HISTORY[["run", "commit"]].itertuples(index=False, name=None))))
def test_a_ratio_of_the_history_was_measured(run: str, commit: str, tmp_path: Path) -> None:
    path = f"results/reference/{run}"
    archive = subprocess.run(["git", "archive", commit, path], cwd=ROOT, capture_output=True, timeout=60)
    if archive.returncode:
        pytest.skip("this clone does not hold the commit")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(tmp_path, filter="data")
    found = measured_ratios(tmp_path / path)
    cited = HISTORY.loc[HISTORY["run"] == run, ["estimate", "lo", "hi"]].to_numpy()
    assert [parts for parts in cited.tolist() if not holds(found, parts)] == []
