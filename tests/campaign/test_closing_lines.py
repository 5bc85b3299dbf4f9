"""Everything that a run says after it has measured takes one screen, to a pipe and on a terminal."""

from __future__ import annotations

import fcntl
import json
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen3bench.campaign import launch
from qwen3bench.reporting.terminal import MAX_LINES

Measure = Callable[..., Any]
MEASURED = "=== measured"
MOST = (
    "design=screen",
    "opt=all",
    "workload=prefill,decode,generate",
    "runtime=eager,compile",
    "peer=transformers,liger",
)
WIDTH, HEIGHT = 100, 25


def failures(*cells: str) -> list[dict[str, Any]]:
    """Faults: some cells that run out of memory, one that computes something else, one that breaks the worker."""
    told = [{"does": "error", "op": "visit", "cell": cell, "status": "oom"} for cell in cells[:-2]]
    wrong = {"equivalent": False, "ran": True, "reason": "its logits differ"}
    return [
        *told,
        {"does": "answer", "op": "verify", "cell": cells[-2], "fields": wrong},
        {"does": "die", "op": "visit", "cell": cells[-1]},
    ]


CASES = [
    (MOST, failures("flash+tie+mlp+mask+norm+rope+residual+qkv+gemv", "transformers:sdpa", "liger:sdpa")),
    (("design=full", "workload=prefill,decode"), failures("flash", "tie", "mask")),
    (("design=pair", "opt=flash"), [{"does": "error", "op": "load", "status": "oom"}]),
]


@pytest.fixture
def marked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both streams say where measuring ended, which is when the run is read again."""
    read = launch.load_run

    def load_run(path: Path) -> Any:
        for stream in (sys.stdout, sys.stderr):
            print(MEASURED, file=stream)
        return read(path)

    monkeypatch.setattr(launch, "load_run", load_run)


@pytest.mark.slow
@pytest.mark.usefixtures("marked")
@pytest.mark.parametrize(("overrides", "faults"), CASES)
def test_to_a_pipe_it_takes_25_lines(measure: Measure, overrides: tuple[str, ...], faults: list[Any]) -> None:
    done = measure(*overrides, faults=faults)
    closing = [line for text in (done.out, done.err) for line in text.split(MEASURED)[1].splitlines()[1:]]
    assert len(closing) <= MAX_LINES, "\n".join(closing)
    assert sum(line.startswith("Report: ") for line in closing) == 1
    assert closing[-1].startswith(("the run took ", "qwen3bench: error: no cell"))


@pytest.mark.slow
@pytest.mark.parametrize(("overrides", "faults"), CASES)
def test_on_a_terminal_it_takes_one_screen(tmp_path: Path, overrides: tuple[str, ...], faults: list[Any]) -> None:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", HEIGHT, WIDTH, 0, 0))
    root = Path(__file__).parents[2]
    few = ["measure.target=0.00001", "measure.min_blocks=3", "measure.max_blocks=3", "measure.min_processes=1"]
    command = [sys.executable, str(Path(__file__).with_name("run_fake.py")), "run", json.dumps(faults)]
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
    with subprocess.Popen(
        [*command, "model=tiny", "device=cpu", *overrides, *few, "run.dir=here"],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(root), "TERM": "xterm"},
        stdin=slave,
        stdout=slave,
        stderr=slave,
    ):
        os.close(slave)
        sent = b""
        while piece := _read(master):
            sent += piece
    os.close(master)
    closing = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sent.decode().split("\x1b[?25h")[-1]).strip().splitlines()
    rows = sum(max(1, math.ceil(len(line) / WIDTH)) for line in closing)
    assert rows <= MAX_LINES, "\n".join(closing)
    assert sum(line.startswith("Report: ") for line in closing) == 1


def _read(master: int) -> bytes:
    try:
        return os.read(master, 65536)
    except OSError:  # Linux, once nobody holds the other end
        return b""
