"""What a run of 10^6 samples on 1,024 cards takes, told from two smaller ones: more than linear growth shows too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from large_record import write_large

GIB = 2**30
BLOCKS = 10_102  # of 99 samples
SMALLER = (400, 2_000)
_USED = """
import json, time
from pathlib import Path
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(json.dumps({"cpu_s": time.process_time(), "peak_bytes": int(status["VmHWM"].split()[0]) * 1024}))
"""
_REPORT = """
import sys
from qwen3bench.report import main
assert main(sys.argv[1:]) == 0
"""
_DRIVER = """
import sys
sys.path.insert(0, sys.argv[3])
from pathlib import Path
from large_record import blocks_of, cells_of
from qwen3bench.analysis.stopping import half_widths
from qwen3bench.campaign.live_effects import LiveEffects
from qwen3bench.campaign.state import RunState
from qwen3bench.config.cli import compose
from qwen3bench.record.lines import SampleLine
from qwen3bench.record.writer import RecordWriter
settings = compose(["model=tiny", "design=full", "workload=prefill"]).resolved("cpu")
state = RunState(settings)
timing = state.timings["prefill", "eager"]
effects = LiveEffects(settings, state)
with RecordWriter(Path(sys.argv[1])) as writer:
    for block, lines in enumerate(blocks_of(cells_of(5), "prefill", int(sys.argv[2]))):
        writer.append(*lines)
        timing.samples += [each for each in lines if isinstance(each, SampleLine) and each.attempt == lines[-1].attempt]
        if block % 200 == 0:
            effects.lines(100)
assert effects.lines(100) and half_widths(timing.samples, settings.factors)
"""


def costs(program: str, *arguments: str) -> dict[str, Any]:
    """CPU time and peak memory of a process (`VmHWM`, as a child inherits `ru_maxrss` from the test's process)."""
    command = [sys.executable, "-c", program + _USED, *arguments]
    answer = subprocess.run(command, capture_output=True, check=True, text=True)
    found: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return found


def at_full_size(small: float, large: float) -> float:
    return large + (BLOCKS - SMALLER[1]) * (large - small) / (SMALLER[1] - SMALLER[0])


@pytest.mark.slow
def test_a_million_samples_are_reported_in_a_minute_and_2_gib(tmp_path: Path) -> None:
    runs = [write_large(tmp_path / str(blocks), blocks=blocks) for blocks in SMALLER]
    found = [costs(_REPORT, str(run)) for run in runs]
    assert at_full_size(*(each["cpu_s"] for each in found)) < 60
    assert at_full_size(*(each["peak_bytes"] for each in found)) < 2 * GIB


@pytest.mark.slow
def test_the_driver_of_a_million_samples_stays_under_2_gib(tmp_path: Path) -> None:
    """It writes the record and holds what the stopping rule and the effects so far are told from."""
    here = str(Path(__file__).parent)
    found = [costs(_DRIVER, str(tmp_path / str(blocks)), str(blocks), here) for blocks in SMALLER]
    assert at_full_size(*(each["peak_bytes"] for each in found)) < 2 * GIB
