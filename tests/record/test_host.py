"""What a process may use of its machine, read from the kernel's own files."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from qwen3bench.record.host import Host, available_memory_bytes, cgroup_limits, ranges, steering_variables

ROOT = Path(__file__).parents[2]


def grouped(tmp_path: Path, groups: str, files: dict[str, str]) -> tuple[float | None, float | None]:
    """The limits where /proc/self/cgroup is `groups` and /sys/fs/cgroup holds `files`."""
    for name, text in files.items():
        (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / name).write_text(f"{text}\n")
    (tmp_path / "self").write_text(groups)
    return cgroup_limits(tmp_path / "cgroup", tmp_path / "self")


def test_version_2_has_the_narrowest_of_the_groups_around(tmp_path: Path) -> None:
    files = {"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000", "a/b/memory.max": "4096", "a/memory.max": "max"}
    assert grouped(tmp_path, "0::/a/b\n", files) == (1.5, 4096)


def test_version_1(tmp_path: Path) -> None:
    files = {
        "cpu/job/cpu.cfs_quota_us": "50000",
        "cpu/job/cpu.cfs_period_us": "100000",
        "memory/memory.limit_in_bytes": "9223372036854771712",
    }
    assert grouped(tmp_path, "4:memory:/job\n3:cpu,cpuacct:/job\n0::/\n", files) == (0.5, math.inf)


def test_in_a_container_the_mount_is_the_group(tmp_path: Path) -> None:
    files = {"cpu.max": "200000 100000", "memory.max": "8192"}
    assert grouped(tmp_path, "0::/docker/0123\n", files) == (2.0, 8192)


@pytest.mark.parametrize("text", ["", "max", "100000 0", "many few"])
def test_no_group_or_one_that_says_nothing_is_unknown_or_no_limit(tmp_path: Path, text: str) -> None:
    expected = (math.inf if text == "max" else None, None)
    assert grouped(tmp_path, "0::/\n", {"cpu.max": text, "memory.max": ""}) == expected
    assert cgroup_limits(tmp_path, tmp_path / "none") == (None, None)


def test_cpus_are_written_as_the_kernel_does() -> None:
    assert [ranges(each) for each in ((), (3,), (0, 1, 2, 3, 8), (0, 2))] == ["", "3", "0-3,8", "0,2"]


def test_variables_that_steer_and_none_that_names_a_place() -> None:
    steering = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "2", "TORCHDYNAMO_DISABLE": "1", "CUDA_LAUNCH_BLOCKING": "1"}
    others = {"HOME": "/root", "TORCHINDUCTOR_CACHE_DIR": "/tmp", "CUDA_VISIBLE_DEVICES": "0", "KMP_X": "/a/b"}
    assert steering_variables(steering | others) == steering


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_a_process_held_on_one_cpu_says_so() -> None:
    first = min(os.sched_getaffinity(0))
    code = (
        f"import os, json; os.sched_setaffinity(0, [{first}]); from qwen3bench.record.host import Host; "
        "print(json.dumps(Host.here().cpus))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert json.loads(ran.stdout) == [first]


def test_here() -> None:
    host = Host.here()
    assert len(host.cpus) >= (host.cores or 1) >= 1
    assert 0 < available_memory_bytes() <= psutil.virtual_memory().total
