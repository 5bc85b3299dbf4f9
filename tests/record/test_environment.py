"""The environment says what there is; the fingerprint changes exactly when the numbers may. Without PyTorch."""

from __future__ import annotations

import json
import math
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import qwen3bench
from qwen3bench.record import environment as module
from qwen3bench.record.environment import (
    HOST_KEYS,
    MEASURING,
    PACKAGE,
    TorchFacts,
    code_hash,
    differences,
    environment,
    fingerprint,
    git_state,
    system_device_name,
)
from qwen3bench.record.host import Host

CONFIG: dict[str, Any] = {
    "device": "cpu",
    "batch_size": 1,
    "opt": {"flash": {}},
    "measure": {"target": 0.01},
    "run": {"dir": "results/a"},
    "report": {"memory_limit_gib": None},
}


TORCH = TorchFacts(version="2.99", cuda=None, cudnn=None, threads=3, interop_threads=2, device_name="abacus")
HOST = Host(
    cpus=(0, 1, 2, 3),
    cores=2,
    cpu_quota=1.5,
    memory_limit_bytes=2**30,
    governor="performance",
    variables={"OMP_NUM_THREADS": "3"},
)


def test_says_what_it_is_measured_on() -> None:
    found = environment("cpu", TORCH, HOST)
    assert (found["torch"], found["torch_threads"], found["cuda"], found["cudnn"]) == ("2.99", 3, None, None)
    assert found["device"] == "abacus"
    assert found["cpu"] == system_device_name("cpu")
    assert found["memory_bytes"] > 2**28
    assert found["cpu_threads"] >= 1
    assert found["power_limit_w"] is found["compute_capability"] is None
    assert found["code"] == code_hash()
    assert found["qwen3bench"] == qwen3bench.__version__
    assert 0 not in [value for value in found.values() if not isinstance(value, bool)]


def test_is_json_that_names_the_host_in_one_place() -> None:
    found = environment("cuda", TORCH, HOST)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found.pop("host") == socket.gethostname()
    assert socket.gethostname() not in [*found.values(), *str(found["os"]).split("-")]


def test_needs_no_torch() -> None:
    code = "import sys; from qwen3bench.record.environment import code_hash; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A small package of the same rooms, in a source tree of its own."""
    root = tmp_path / "qwen3bench"
    for name in (*MEASURING, "reporting", "analysis", "config", "worker/equivalence"):
        (root / name).mkdir(parents=True)
        (root / name / "part.py").write_text("a = 1\n")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "config.yaml").write_text("a: 1\n")
    return root


def test_what_measures_is_there() -> None:
    assert MEASURING == ("worker", "campaign", "model", "opt", "kernels", "record")
    assert all(list((PACKAGE / name).glob("*.py")) for name in MEASURING)


@pytest.mark.parametrize("room", [*MEASURING, "worker/equivalence"])
def test_code_hash_changes_with_the_code_that_measures(package: Path, room: str) -> None:
    seen = [code_hash(package)]
    (package / room / "part.py").write_text("a = 2\n")
    seen.append(code_hash(package))
    (package / room / "new.py").write_text("")
    seen.append(code_hash(package))
    (package / room / "new.py").rename(package / room / "newer.py")
    seen.append(code_hash(package))
    assert len(set(seen)) == 4


@pytest.mark.parametrize(
    "path",
    [
        "reporting/part.py",
        "analysis/part.py",
        "config/part.py",
        "report.py",
        "opt/part.pyc",
        "../README.md",
        "../configs/config.yaml",  # the composed configuration has a hash of its own
    ],
)
def test_code_hash_stays_where_another_word_stops_nobody(package: Path, path: str) -> None:
    before = code_hash(package)
    (package / path).write_text("words = 2\n")
    assert code_hash(package) == before


def test_code_hash_is_the_same_for_a_checkout_and_an_installed_package(package: Path, tmp_path: Path) -> None:
    before = code_hash(package)
    installed = shutil.copytree(package, tmp_path / "site-packages" / "qwen3bench")
    shutil.copytree(tmp_path / "configs", installed / "configs")
    assert code_hash(installed) == before


def test_git_commit_and_dirty_flag(tmp_path: Path) -> None:
    def git(*command: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        return subprocess.run(
            ["git", *identity, *command], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    (tmp_path / "file").write_text("a: 1\n")
    assert git_state(tmp_path) == {"git_commit": None, "git_dirty": None}
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    assert git_state(tmp_path) == {"git_commit": git("rev-parse", "HEAD"), "git_dirty": False}
    (tmp_path / "file").write_text("a: 3\n")
    assert git_state(tmp_path) == {"git_commit": git("rev-parse", "HEAD"), "git_dirty": True}
    assert {key: environment("cpu", TORCH, HOST)[key] for key in git_state()} == git_state()


def test_fingerprint_ignores_where_a_run_is_written_and_reported() -> None:
    old = fingerprint(CONFIG, "w", TORCH, HOST)
    moved = {**CONFIG, "run": {"dir": "elsewhere"}, "report": {"memory_limit_gib": 24}, "resume": "elsewhere"}
    assert fingerprint(dict(reversed(moved.items())), "w", TORCH, HOST) == old
    assert list(old) == ["config", "weights", "code", "torch", "device", *HOST_KEYS]
    assert differences(old, old) == []


def test_the_version_of_another_implementation_counts_where_it_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    beside = {**CONFIG, "peer": {"transformers": {"attention": ["sdpa"]}}}
    monkeypatch.setattr(module, "version_of", lambda package: "5.0")
    old = fingerprint(beside, "w", TORCH, HOST)
    monkeypatch.setattr(module, "version_of", lambda package: "5.1")
    assert differences(old, fingerprint(beside, "w", TORCH, HOST)) == ["transformers (5.0 then, 5.1 now)"]
    assert "transformers" not in fingerprint(CONFIG, "w", TORCH, HOST)


@pytest.mark.parametrize("change", [{"batch_size": 2}, {"opt": {}}, {"measure": {"target": 0.02}}])
def test_another_config_differs(change: dict[str, Any]) -> None:
    old, new = fingerprint(CONFIG, "w", TORCH, HOST), fingerprint({**CONFIG, **change}, "w", TORCH, HOST)
    assert differences(old, new) == ["the configuration"]


def test_the_threads_of_a_cpu_and_cuda_count() -> None:
    assert fingerprint(CONFIG, "w", TORCH, HOST)["device"] == "abacus, 3 threads"
    on_card = fingerprint({**CONFIG, "device": "cuda"}, "w", replace(TORCH, cuda="13.0"), HOST)
    assert on_card["device"] == "abacus"
    assert on_card["torch"] == "2.99, CUDA 13.0"


def test_differences_name_each_part(monkeypatch: pytest.MonkeyPatch) -> None:
    old = fingerprint(CONFIG, "w", TORCH, HOST)
    monkeypatch.setattr(module, "code_hash", lambda: "other")
    newer = replace(TORCH, version="9.9.9", device_name="sliderule")
    found = differences(old, fingerprint({**CONFIG, "batch_size": 3}, "x", newer, HOST))
    assert found[:3] == ["the configuration", "the weights", "the code of qwen3bench"]
    assert found[3] == "torch (2.99 then, 9.9.9 now)"
    assert found[4] == "device (abacus, 3 threads then, sliderule, 3 threads now)"
    assert differences({}, {"code": "a"}) == ["the code of qwen3bench"]


def test_what_a_run_may_use_of_its_machine_is_written_down() -> None:
    found = environment("cpu", TORCH, HOST)
    assert (found["usable_cpus"], found["usable_cores"], found["cpu_quota"]) == ("0-3", 2, 1.5)
    assert (found["cpu_governor"], found["memory_limit_bytes"]) == ("performance", 2**30)
    assert (found["torch_threads"], found["torch_interop_threads"]) == (3, 2)
    assert found["variables"] == "OMP_NUM_THREADS=3"
    free = environment("cpu", TORCH, replace(HOST, cpu_quota=math.inf, memory_limit_bytes=math.inf, variables={}))
    assert (free["cpu_quota"], free["memory_limit_bytes"], free["variables"]) == ("no limit", "no limit", "none")
    assert json.loads(json.dumps(free, allow_nan=False)) == free


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("host", "said"),
    [
        ({"cpus": (0,), "cores": 1}, "usable CPUs (4 on 2 cores then, 1 on 1 cores now)"),
        ({"cores": 4}, "usable CPUs (4 on 2 cores then, 4 on 4 cores now)"),
        ({"cpu_quota": math.inf}, "CPU quota (1.5 then, no limit now)"),
        ({"governor": "powersave"}, "CPU governor (performance then, powersave now)"),
        ({"variables": {}}, "variables (OMP_NUM_THREADS=3 then, none now)"),
    ],
)
def test_another_host_differs(device: str, host: dict[str, Any], said: str) -> None:
    config = {**CONFIG, "device": device}
    old, new = (fingerprint(config, "w", TORCH, each) for each in (HOST, replace(HOST, **host)))
    assert differences(old, new) == [said]


def test_threads_between_operations_count() -> None:
    old, new = (fingerprint(CONFIG, "w", each, HOST) for each in (TORCH, replace(TORCH, interop_threads=1)))
    said = "threads (3 in an operation, 2 between operations then, 3 in an operation, 1 between operations now)"
    assert differences(old, new) == [said]


def test_other_cpus_of_the_same_kind_and_another_memory_limit_are_no_difference() -> None:
    moved = replace(HOST, cpus=(4, 5, 6, 7), memory_limit_bytes=2**31)
    assert differences(fingerprint(CONFIG, "w", TORCH, HOST), fingerprint(CONFIG, "w", TORCH, moved)) == []


def test_what_was_not_known_then_is_no_difference() -> None:
    new = fingerprint(CONFIG, "w", TORCH, HOST)
    older = {key: value for key, value in new.items() if key not in HOST_KEYS}
    assert differences(older, new) == differences(new, older) == []
    unknown = fingerprint(CONFIG, "w", TORCH, replace(HOST, cpu_quota=None, governor=None))
    assert differences(new, unknown) == differences(unknown, new) == []
