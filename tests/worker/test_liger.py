"""Liger's kernels in a copy of transformers' module: transformers itself stays as it is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.qwen3 import modeling_qwen3

from qwen3bench.config.cli import compose
from qwen3bench.config.model_config import ModelConfig
from qwen3bench.errors import UserError
from qwen3bench.model.build import build_model
from qwen3bench.record.environment import fingerprint
from qwen3bench.worker.bank import Bank
from qwen3bench.worker.equivalence.gate import Gate
from qwen3bench.worker.equivalence.gradient_gate import GradientGate
from qwen3bench.worker.evidence import collect
from qwen3bench.worker.peer_modules import patched_by_liger
from qwen3bench.worker.peers import build_peer, gradients_of_peer, judge_peer, require_peer
from qwen3bench.worker.runtimes import make_runtime
from qwen3bench.worker.training import TrainingWorkload
from qwen3bench.worker.workloads import Workload, WorkloadSize

PATCHED = ("apply_rotary_pos_emb", "Qwen3RMSNorm", "Qwen3MLP")
ORIGINALS = {name: getattr(modeling_qwen3, name) for name in PATCHED}
MODULE = "liger_kernel.transformers"


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    patched_by_liger.cache_clear()
    with torch.no_grad():
        yield
    patched_by_liger.cache_clear()


@pytest.fixture
def calls() -> list[str]:
    """What of the stand-in for Liger ran."""
    return []


@pytest.fixture
def leave_out() -> set[str]:
    """What the stand-in does not patch, as older versions do not patch everything."""
    return set()


@pytest.fixture
def stand_in(calls: list[str], leave_out: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that patches as Liger does, found as Liger is, with transformers' own arithmetic."""

    def noted(name: str) -> type[nn.Module]:
        class Noted(ORIGINALS[name]):  # type: ignore[misc]
            def forward(self, x: Tensor) -> Tensor:
                calls.append(name)
                result: Tensor = super().forward(x)
                return result

        return Noted

    def rotated(*given: Any, **named: Any) -> Any:
        calls.append("apply_rotary_pos_emb")
        return ORIGINALS["apply_rotary_pos_emb"](*given, **named)

    replacements: dict[str, Any] = {"apply_rotary_pos_emb": rotated}
    replacements |= {name: noted(name) for name in PATCHED[1:]}
    for each in replacements.values():
        each.__module__ = MODULE

    def apply_liger_kernel_to_qwen3(**options: bool) -> None:
        from transformers.models.qwen3 import modeling_qwen3 as module  # found as Liger finds it

        assert options == {
            "rope": True,
            "rms_norm": True,
            "swiglu": True,
            "cross_entropy": False,
            "fused_linear_cross_entropy": False,
        }
        for name, each in replacements.items():
            if name not in leave_out:
                setattr(module, name, each)

    package = ModuleType(MODULE)
    package.apply_liger_kernel_to_qwen3 = apply_liger_kernel_to_qwen3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, MODULE, package)


def untouched() -> bool:
    from transformers.models.qwen3 import modeling_qwen3 as imported

    here = imported is modeling_qwen3 is sys.modules["transformers.models.qwen3.modeling_qwen3"]
    return here and all(getattr(modeling_qwen3, name) is original for name, original in ORIGINALS.items())


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("first", ["transformers:sdpa", "liger:sdpa"])
def test_each_runs_its_own_whichever_is_built_first(
    tiny: ModelConfig, tiny_weights: dict[str, Tensor], calls: list[str], first: str
) -> None:
    labels = sorted(("transformers:sdpa", "liger:sdpa"), key=lambda label: label != first)
    models = {label: build_peer(label, tiny, tiny_weights) for label in labels}
    assert untouched()
    tokens = torch.randint(tiny.vocab_size, (2, 11))
    expected = build_model(tiny, (), tiny_weights)(tokens)
    for label in (*labels, *labels):
        calls.clear()
        assert (models[label](tokens) - expected).abs().max() <= 1e-4
        assert set(calls) == (set(PATCHED) if label == "liger:sdpa" else set())
    layers = tiny.num_layers
    calls.clear()
    models["liger:sdpa"](tokens)
    assert {name: calls.count(name) for name in PATCHED} == dict(
        zip(PATCHED, (layers, 4 * layers + 1, layers), strict=True)  # the head norms too
    )


@pytest.mark.usefixtures("stand_in")
def test_the_gate_accepts_it(tiny: ModelConfig) -> None:
    verdict = judge_peer(Gate(tiny, device="cpu", dtype=torch.float32), "liger:sdpa")
    assert verdict.equivalent, verdict.reason


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("name", PATCHED)
def test_a_version_that_leaves_something_as_it_is_is_refused(leave_out: set[str], name: str) -> None:
    leave_out.add(name)
    with pytest.raises(UserError, match=f"leaves {name} as it is; install liger-kernel 0.8.5 or newer"):
        require_peer("liger:sdpa")
    assert untouched()


@pytest.mark.usefixtures("stand_in")
def test_a_patch_that_fails_leaves_transformers_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: bool) -> None:
        raise RuntimeError("not for this transformers")

    monkeypatch.setattr(sys.modules[MODULE], "apply_liger_kernel_to_qwen3", fail)
    with pytest.raises(RuntimeError, match="not for this"):
        require_peer("liger:sdpa")
    assert untouched()


@pytest.mark.usefixtures("stand_in")
def test_a_cpu_is_refused_before_anything_runs() -> None:
    with pytest.raises(UserError, match="peer=liger has kernels for CUDA alone, and the device is cpu"):
        require_peer("liger:sdpa", "cpu")
    require_peer("liger:sdpa", "cuda:1")


def test_without_liger_or_triton_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, MODULE, None)
    needs = r"needs the package liger-kernel, 0\.8\.5 or newer, and Triton .*pip install 'qwen3bench\[peers\]'"
    with pytest.raises(UserError, match=needs):
        require_peer("liger:sdpa")
    assert untouched()
    require_peer("transformers:sdpa")


def test_a_run_has_both_after_its_own_cells() -> None:
    settings = compose(["model=tiny", "peer=liger,transformers", "opt=flash"])
    assert settings.labels == ["baseline", "flash", "transformers:sdpa", "transformers:eager", "liger:sdpa"]


def test_a_continued_run_keeps_its_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen3bench.record import environment

    monkeypatch.setattr(environment, "version_of", lambda package: f"{package}-1")
    torch_facts = SimpleNamespace(version="2", cuda=None, device_name="a CPU", threads=1, interop_threads=1)
    host = SimpleNamespace(cpus=[0], cores=1, cpu_quota=None, governor=None, variables={})
    found = fingerprint({"device": "cpu", "peer": {"liger": {}}}, "random", torch_facts, host)  # type: ignore[arg-type]
    assert found["liger-kernel"] == "liger-kernel-1"
    assert found["transformers"] == "transformers-1"


# On a card


@pytest.mark.cuda
def test_liger_is_the_same_function_with_kernels_of_its_own(tiny: ModelConfig) -> None:
    pytest.importorskip(MODULE)
    device = torch.device("cuda", 0)
    bank = Bank(tiny, "random", device, torch.float32, 0, {})
    liger, plain = build_peer("liger:sdpa", tiny, bank.weights), build_peer("transformers:sdpa", tiny, bank.weights)
    tokens = torch.randint(tiny.vocab_size, (2, 37), device=device)
    assert (liger(tokens) - bank.build(())(tokens)).abs().max() <= 1e-3
    size = WorkloadSize("prefill", 2, 37, 0)
    ran = {name: collect(model, Workload(size, model)).kernels for name, model in (("l", liger), ("p", plain))}
    for part in ("triton_rope", "rms_norm_forward", "swiglu"):
        assert [name for name in ran["l"] if part in name], part
        assert not [name for name in ran["p"] if part in name], part
    assert sum(ran["l"].values()) < sum(ran["p"].values())
    assert untouched()


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_accepts_liger(tiny: ModelConfig, dtype: torch.dtype) -> None:
    pytest.importorskip(MODULE)
    verdict = judge_peer(Gate(tiny, device="cuda", dtype=dtype), "liger:sdpa")
    assert verdict.equivalent, verdict.reason


@pytest.mark.cuda
@pytest.mark.parametrize("workload", ["prefill", "decode", "generate"])
@pytest.mark.parametrize("runtime_name", ["graph", "compile"])
def test_liger_is_captured(tiny: ModelConfig, workload: str, runtime_name: str) -> None:
    pytest.importorskip(MODULE)
    device = torch.device("cuda", 0)
    bank = Bank(tiny, "random", device, torch.float32, 0, {})
    peer = build_peer("liger:sdpa", tiny, bank.weights)
    work = Workload(WorkloadSize(workload, 2, 9, 6), bank.build(()))
    for step in work.steps(bank.build(())):
        expected = step()
    runtime = make_runtime(runtime_name, device)
    prepared = runtime.prepare_model(peer).model
    outputs: list[Tensor] = []

    def kept(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            outputs.append(step())
            return outputs[-1]

        return run

    launches = [runtime.prepare(kept(step)).launch for step in work.steps(prepared)]
    captured = outputs[-1]
    captured.zero_()
    for launch in launches:
        launch()
    torch.cuda.synchronize()
    assert (captured - expected).abs().max() <= 1e-3


@pytest.mark.cuda
@pytest.mark.parametrize("label", ["liger:sdpa", "liger:sdpa_flce"])
def test_the_gate_accepts_its_gradients(tiny: ModelConfig, label: str) -> None:
    pytest.importorskip(MODULE)
    with torch.enable_grad():
        verdict = gradients_of_peer(GradientGate(tiny, torch.device("cuda"), "bf16"), label)
    assert verdict.equivalent, verdict.reason


def test_its_fused_loss_is_refused_where_a_graph_would_hold_it() -> None:
    with pytest.raises(UserError, match="leave out runtime=graph,compile"):
        require_peer("liger:sdpa_flce", "cuda", ["eager", "graph", "compile"])


@pytest.mark.cuda
def test_its_fused_loss_is_the_loss(tiny: ModelConfig) -> None:
    pytest.importorskip(MODULE)
    device, size = torch.device("cuda", 0), WorkloadSize("train", 2, 20, 0, "fp32")
    bank = Bank(tiny, "random", device, torch.float32, 0, {})
    losses = []
    for label in ("transformers:sdpa", "liger:sdpa_flce"):
        peer = build_peer(label, tiny, bank.weights)
        workload = TrainingWorkload(size, peer, state=bank.training)
        (step,) = workload.steps(peer)
        workload.restore()
        losses.append(step().clone())
        workload.restore()
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)
