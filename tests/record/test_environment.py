"""The environment says what there is; the fingerprint changes exactly when the numbers may."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import qwen3bench
from qwen3bench.errors import UserError
from qwen3bench.record import environment as module
from qwen3bench.record.environment import code_hash, device_name, differences, environment, fingerprint

CONFIG: dict[str, Any] = {
    "device": "cpu",
    "batch_size": 1,
    "opt": {"flash": {}},
    "measure": {"target": 0.01},
    "run": {"dir": "results/a"},
    "report": {"memory_limit_gib": None},
}


def test_says_what_it_is_measured_on() -> None:
    found = environment("cpu")
    assert found["torch"] == torch.__version__
    assert found["torch_threads"] == torch.get_num_threads()
    assert found["device"] == found["cpu"] == device_name("cpu")
    assert found["memory_bytes"] > 2**28
    assert found["cpu_threads"] >= 1
    assert found["power_limit_w"] is found["compute_capability"] is None
    assert found["code"] == code_hash()
    assert found["qwen3bench"] == qwen3bench.__version__
    assert 0 not in [value for value in found.values() if not isinstance(value, bool)]


def test_is_json_without_the_name_of_the_host() -> None:
    found = environment()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert socket.gethostname() not in [*found.values(), *str(found["os"]).split("-")]


def test_unknown_card_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError, match="device=cuda:9: PyTorch finds no such card"):
        environment("cuda:9")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small source tree of its own that takes the place of this one."""
    (tmp_path / "qwen3bench" / "opt").mkdir(parents=True)
    (tmp_path / "configs").mkdir()
    (tmp_path / "qwen3bench" / "opt" / "tie.py").write_text("a = 1\n")
    (tmp_path / "configs" / "config.yaml").write_text("a: 1\n")
    monkeypatch.setattr(module, "_PACKAGE", tmp_path / "qwen3bench")
    monkeypatch.setattr(module, "_CHECKOUT", tmp_path)
    return tmp_path


def test_code_hash_changes_with_code_and_configs_alone(checkout: Path) -> None:
    seen = [code_hash()]
    (checkout / "README.md").write_text("words")
    (checkout / "qwen3bench" / "opt" / "tie.pyc").write_text("compiled")
    assert code_hash() == seen[0]

    for path, text in [
        ("qwen3bench/opt/tie.py", "a = 2\n"),
        ("configs/config.yaml", "a: 2\n"),
        ("configs/more.yaml", ""),
        ("qwen3bench/new.py", ""),
    ]:
        (checkout / path).write_text(text)
        seen.append(code_hash())
    (checkout / "qwen3bench/new.py").rename(checkout / "qwen3bench/newer.py")
    seen.append(code_hash())
    assert len(set(seen)) == 6


def test_code_hash_is_the_same_for_a_checkout_and_an_installed_package(checkout: Path) -> None:
    before = code_hash()
    shutil.move(checkout / "configs", checkout / "qwen3bench" / "configs")
    assert code_hash() == before


def test_git_commit_and_dirty_flag(checkout: Path) -> None:
    def state() -> tuple[object, object]:
        found = environment("cpu")
        return found["git_commit"], found["git_dirty"]

    def git(*command: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        return subprocess.run(
            ["git", *identity, *command], cwd=checkout, check=True, capture_output=True, text=True
        ).stdout.strip()

    assert state() == (None, None)
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    assert state() == (git("rev-parse", "HEAD"), False)
    (checkout / "configs" / "config.yaml").write_text("a: 3\n")
    assert state() == (git("rev-parse", "HEAD"), True)


def test_fingerprint_ignores_where_a_run_is_written_and_reported() -> None:
    old = fingerprint(CONFIG, "w")
    moved = {**CONFIG, "run": {"dir": "elsewhere"}, "report": {"memory_limit_gib": 24}, "resume": "elsewhere"}
    assert fingerprint(dict(reversed(moved.items())), "w") == old
    assert list(old) == ["config", "weights", "code", "torch", "device"]
    assert differences(old, old) == []


def test_the_version_of_another_implementation_counts_where_it_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    beside = {**CONFIG, "peer": {"transformers": {"attention": ["sdpa"]}}}
    monkeypatch.setattr(module, "_version", lambda package: "5.0")
    old = fingerprint(beside, "w")
    monkeypatch.setattr(module, "_version", lambda package: "5.1")
    assert differences(old, fingerprint(beside, "w")) == ["transformers (5.0 then, 5.1 now)"]
    assert "transformers" not in fingerprint(CONFIG, "w")


@pytest.mark.parametrize("change", [{"batch_size": 2}, {"opt": {}}, {"measure": {"target": 0.02}}])
def test_another_config_differs(change: dict[str, Any]) -> None:
    assert differences(fingerprint(CONFIG, "w"), fingerprint({**CONFIG, **change}, "w")) == ["the configuration"]


def test_differences_name_each_part(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = fingerprint(CONFIG, "w")
    (checkout / "qwen3bench" / "opt" / "tie.py").write_text("a = 2\n")
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    monkeypatch.setattr(module, "device_name", lambda _: "abacus")

    found = differences(old, fingerprint({**CONFIG, "batch_size": 3}, "x"))

    assert found[:3] == ["the configuration", "the weights", "the code of qwen3bench"]
    assert found[3] == f"torch ({old['torch']} then, 9.9.9 now)".replace("9.9.9", new_torch())
    assert found[4].startswith(f"device ({old['device']} then, abacus")
    assert differences({}, {"code": "a"}) == ["the code of qwen3bench"]


def new_torch() -> str:
    return f"9.9.9, CUDA {torch.version.cuda}" if torch.version.cuda else "9.9.9"


@pytest.mark.cuda
def test_describes_a_real_card() -> None:
    found = environment("cuda")
    properties = torch.cuda.get_device_properties(0)
    assert found["device"] == properties.name
    assert found["compute_capability"] == f"{properties.major}.{properties.minor}"
    assert found["device_memory_bytes"] >= properties.total_memory
    assert found["driver"]
    assert found["cuda"]
