"""A worker tells of the machine, PyTorch and the device that it runs on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from qwen3bench.config.settings import Settings
from qwen3bench.errors import UserError
from qwen3bench.record.environment import HOST_KEYS, environment
from qwen3bench.record.host import Host
from qwen3bench.worker.identity import device_name, identify, torch_facts


def test_it_tells_what_pytorch_says() -> None:
    facts = torch_facts("cpu")
    found = environment("cpu", facts, Host.here())
    assert found["torch"] == torch.__version__
    assert found["torch_threads"] == torch.get_num_threads()
    assert found["device"] == found["cpu"] == device_name("cpu")


def test_it_identifies_a_run(small_settings: Callable[..., Settings]) -> None:
    identity = identify(small_settings().resolved("cpu"))
    assert identity.environment["code"] == identity.fingerprint["code"]
    assert identity.fingerprint["weights"] == "random:seed=0"
    assert set(HOST_KEYS) - set(identity.fingerprint) <= {"CPU quota", "CPU governor"}  # which are not known everywhere


def test_weights_beyond_memory_are_refused_before_they_are_hashed(
    small_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen3bench.worker.identity.available_memory_bytes", lambda: 1000)
    monkeypatch.setattr("qwen3bench.worker.identity.weights_fingerprint", lambda *_: pytest.fail("hashed them"))
    with pytest.raises(UserError, match=r"tiny needs .* for its weights alone"):
        identify(small_settings().resolved("cpu"))


@pytest.mark.parametrize(
    ("overrides", "mend"),
    [
        (("batch_size=1000000", "prompt_tokens=16"), "batch_size=5086 fits"),
        (("prompt_tokens=20000", "model.context_length=32768"), "batch_size=1 prompt_tokens=1250 fits"),
        (("batch_size=1000000", "prompt_tokens=16", "workload=decode"), "batch_size=9864 fits"),
    ],
)
def test_a_workload_beyond_the_hosts_memory_is_refused_with_the_size_that_fits(
    small_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], mend: str
) -> None:
    monkeypatch.setattr("qwen3bench.worker.identity.available_memory_bytes", lambda: 2_000_000_000)
    with pytest.raises(UserError, match=rf"needs at least .* GB with tiny, and the memory here has 2\.0 GB; {mend}$"):
        identify(small_settings(*overrides).resolved("cpu"))
    said = dict(word.split("=") for word in mend.split() if "=" in word)
    assert identify(small_settings(*overrides, *(f"{name}={value}" for name, value in said.items())).resolved("cpu"))


def test_unknown_card_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UserError, match="device=cuda:9: PyTorch finds no such card"):
        torch_facts("cuda:9")


@pytest.mark.cuda
def test_describes_a_real_card() -> None:
    found = environment("cuda", torch_facts("cuda"), Host.here())
    properties = torch.cuda.get_device_properties(0)
    assert found["device"] == properties.name
    assert found["compute_capability"] == f"{properties.major}.{properties.minor}"
    assert found["device_memory_bytes"] >= properties.total_memory
    assert found["driver"]
    assert found["cuda"]
