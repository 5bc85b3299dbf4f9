"""What all entries share: text that the output cannot encode is escaped, and the exit status stays."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from qwen3bench import __main__, aa, compare, describe, report, verify
from qwen3bench.config.entry import guarded
from qwen3bench.errors import UserError

ROOT = Path(__file__).parents[2]
RUN, OTHER = (str(ROOT / "results" / "reference" / f"h200-ablate-1x2048-{name}") for name in "bc")
Main = Callable[[list[str]], int]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def told(action: Callable[[], int], encoding: str) -> tuple[int, str, str]:
    """Exit status, standard output and error of `action` where these know few characters."""
    held = io.BytesIO(), io.BytesIO()
    out, err = (io.TextIOWrapper(each, encoding=encoding, write_through=True) for each in held)
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = action()
        except SystemExit as stop:  # of argparse, after a page of usage
            status = int(stop.code or 0)
    said, error = (each.getvalue().decode(encoding) for each in held)
    return status, said, error


KNOWN = pytest.mark.parametrize("encoding", ["latin-1", "ascii"])


@KNOWN
@pytest.mark.parametrize(
    ("main", "arguments", "part"),
    [
        (__main__.main, ["--help"], r"\u2026  workload=prefill"),
        (__main__.main, ["--cfg", "job", "-p", "run", "run.dir='\u03a9'"], "dir: "),
        (aa.main, ["--help"], r"[KEY=VALUE \u2026]"),
        (verify.main, ["--help"], r"[+opt=\u2026]"),
        (describe.main, ["--help"], r"NAME,\u2026"),
        (report.main, ["--help"], "usage"),
        (compare.main, [RUN, OTHER], r"\u2192"),
    ],
    ids=["help", "config", "aa", "verify", "describe", "report", "compare"],
)
def test_every_entry_escapes_what_its_output_cannot_encode(
    encoding: str, main: Main, arguments: list[str], part: str
) -> None:
    status, out, err = told(lambda: main(arguments), encoding)
    assert (status, err) == (0, "")
    assert part in out


@KNOWN
@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (__main__.main, ["opt=[\u03a9]"]),
        (aa.main, ["\u03a9=1"]),
        (verify.main, ["\u03a9=1"]),
        (describe.main, ["\u03a9=1"]),
        (report.main, ["\u03a9"]),
        (compare.main, ["\u03a9", "\u03a9"]),
    ],
    ids=["run", "aa", "verify", "describe", "report", "compare"],
)
def test_every_entry_escapes_its_errors(encoding: str, main: Main, arguments: list[str]) -> None:
    status, _, error = told(lambda: main(arguments), encoding)
    assert status == 1
    assert error.startswith("qwen3bench: error: ")
    assert r"\u03a9" in error
    assert len(error.splitlines()) <= 2


@KNOWN
@pytest.mark.parametrize("status", [0, 3])
def test_the_exit_status_is_the_same(encoding: str, status: int) -> None:
    def action() -> int:
        print("1.3\u00d7 \u2192 \u2212\u03a9")
        return status

    found, out, _ = told(lambda: guarded(action), encoding)
    assert found == status
    assert out.endswith("\\u2192 \\u2212\\u03a9\n")


def test_a_stream_that_cannot_be_told_is_left_alone() -> None:
    err = io.StringIO()

    def action() -> int:
        raise UserError("\u00d7")

    with redirect_stderr(err):
        assert guarded(action) == 1
    assert err.getvalue() == "qwen3bench: error: \u00d7\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    ],
    ids=["ascii", "C"],
)
def test_a_run_ends_as_it_would_anywhere(tmp_path: Path, setting: dict[str, str]) -> None:
    small = ["model=tiny", "workload=prefill", "prompt_tokens=8", "measure=quick", "measure.max_blocks=6"]
    done = subprocess.run(
        [sys.executable, "-m", "qwen3bench", "+opt=norm", "device=cpu", "run.dir=here", *small],
        env={**os.environ, "PYTHONPATH": str(ROOT), **setting},
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert rb"\xd7" in done.stdout or b"\xd7" in done.stdout
    assert b"Traceback" not in done.stderr
    assert "\u00d7" in (tmp_path / "here" / "report.md").read_text("utf-8")
