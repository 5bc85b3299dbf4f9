"""What a run of 10^6 samples on 1,024 cards takes, told from two smaller ones: more than linear growth shows too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from large_record import write_large

GIB = 2**30
BLOCKS = 10_102  # of 99 samples
SMALLER = (400, 2_000)
_COSTS = """
import json, resource, sys
from qwen3bench.report import main
status = main(sys.argv[1:])
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"status": status, "cpu_s": used.ru_utime + used.ru_stime, "peak_bytes": used.ru_maxrss * 1024}))
"""


def at_full_size(small: float, large: float) -> float:
    return large + (BLOCKS - SMALLER[1]) * (large - small) / (SMALLER[1] - SMALLER[0])


@pytest.mark.slow
def test_a_million_samples_are_reported_in_a_minute_and_2_gib(tmp_path: Path) -> None:
    costs = []
    for blocks in SMALLER:
        write_large(tmp_path / str(blocks), blocks=blocks)
        command = [sys.executable, "-c", _COSTS, str(tmp_path / str(blocks))]
        answer = subprocess.run(command, capture_output=True, check=True, text=True)
        costs.append(json.loads(answer.stdout.splitlines()[-1]))
    assert [each["status"] for each in costs] == [0, 0]
    assert at_full_size(*(each["cpu_s"] for each in costs)) < 60
    assert at_full_size(*(each["peak_bytes"] for each in costs)) < 2 * GIB
