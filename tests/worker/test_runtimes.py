"""Whatever launches a step does the same work."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen3bench.config.choices import options_of
from qwen3bench.config.model_config import ModelConfig
from qwen3bench.errors import UserError
from qwen3bench.model.build import build_model
from qwen3bench.model.cache import KVCache
from qwen3bench.model.qwen3 import Qwen3Model
from qwen3bench.worker.compile_counters import compiled_graphs, forget_compilations, graph_breaks
from qwen3bench.worker.runtimes import CompileRuntime, PreparedModel, PreparedStep, dotted, make_runtime
from qwen3bench.worker.workloads import Workload, WorkloadSize

CPU = torch.device("cpu")


@pytest.fixture
def model(tiny: ModelConfig, tiny_weights: dict[str, Tensor]) -> Qwen3Model:
    return build_model(tiny, ("flash",), tiny_weights).requires_grad_(False)


@pytest.fixture
def dynamo() -> Iterator[None]:
    """What a runtime sets for its process, set back."""
    import torch._dynamo

    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=False):
        yield


def test_eager_is_the_step_itself(model: Qwen3Model) -> None:
    (step,) = Workload(WorkloadSize("prefill", 1, 4, 0), model).steps(model)
    runtime = make_runtime("eager", CPU)
    assert runtime.prepare_model(model) == PreparedModel(model)
    assert runtime.prepare(step) == PreparedStep(step)
    assert not runtime.on_device_clock


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_unknown_runtime_is_refused_with_those_that_exist(device: str) -> None:
    with pytest.raises(UserError, match=r"unknown runtime 'compiled'; there are eager, graph, compile"):
        make_runtime("compiled", torch.device(device))


def test_graphs_are_refused_on_a_cpu() -> None:
    with pytest.raises(UserError, match="runtime=graph needs a CUDA device; use runtime=eager"):
        make_runtime("graph", CPU)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
@pytest.mark.usefixtures("dynamo")
def test_compiled_generation_matches_eager_and_compiles_nothing_when_warm(model: Qwen3Model) -> None:
    torch.compiler.reset()
    forget_compilations()
    workload = Workload(WorkloadSize("generate", 1, 6, 4), model)
    with torch.no_grad():
        expected = [step().clone() for step in workload.steps(model)]
        runtime = make_runtime("compile", CPU)
        prepared = [runtime.prepare(step) for step in workload.steps(runtime.prepare_model(model).model)]
        compiled = compiled_graphs()
        assert runtime.compilations() == compiled > 0
        assert all(step.compile_s is not None and step.compile_s > 0 for step in prepared)
        for _ in range(2):
            for step, logits in zip(prepared, expected, strict=True):
                torch.testing.assert_close(step.launch(), logits, rtol=1e-4, atol=1e-4)
        assert compiled_graphs() == compiled
        for step, logits in zip(workload.steps(model), expected, strict=True):  # the original, in eager
            assert torch.equal(step(), logits)
        assert compiled_graphs() == compiled
    assert graph_breaks() == 0


@pytest.mark.usefixtures("dynamo")
def test_without_a_compiler_compile_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(UserError, match=r"needs a C\+\+ compiler .* install g\+\+ or clang, or use runtime=eager"):
        make_runtime("compile", CPU)


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["graph", "compile"])
@pytest.mark.parametrize("workload", ["prefill", "decode", "generate"])
def test_replayed_graphs_match_eager(
    tiny: ModelConfig, tiny_weights: dict[str, Tensor], name: str, workload: str
) -> None:
    device = torch.device("cuda")
    weights = {key: tensor.to(device) for key, tensor in tiny_weights.items()}
    model = build_model(tiny, ("flash", "mask"), weights).requires_grad_(False)
    inputs = Workload(WorkloadSize(workload, 2, 16, 3), model)
    with torch.no_grad():
        expected = [step().argmax(-1).clone() for step in inputs.steps(model)]
        token = inputs.token.clone()
        runtime = make_runtime(name, device, **options_of("runtime", name))
        prepared = runtime.prepare_model(model).model
        launches = [runtime.prepare(step).launch for step in inputs.steps(prepared)]
        assert runtime.on_device_clock
        inputs.token.zero_()
        for launch in launches:
            launch()
        torch.cuda.synchronize()
    if workload == "generate":
        assert torch.equal(inputs.token, expected[-1])
    else:
        assert torch.equal(inputs.token, torch.zeros_like(token))


@pytest.mark.cuda
@pytest.mark.parametrize("opts", [(), ("flash", "tie", "mlp", "mask", "norm")])
def test_kernels_that_start_early_read_what_those_before_them_wrote(
    tiny: ModelConfig, tiny_weights: dict[str, Tensor], opts: tuple[str, ...]
) -> None:
    device, count = torch.device("cuda"), 64
    weights = {key: tensor.to(device) for key, tensor in tiny_weights.items()}
    options: dict[str, Any] = {name: {"decode": "split"} if name == "flash" else {} for name in opts}
    model = build_model(tiny, options, weights).requires_grad_(False)
    tokens = torch.randint(tiny.vocab_size, (1, 33), device=device)
    caches = [KVCache(tiny, 1, 33, device, torch.float32) for _ in range(2)]
    token = tokens[:, -1:].clone()
    outputs: list[Tensor] = []

    def step() -> Tensor:
        outputs[:] = [prepared(token, caches[1], start=32)]
        return outputs[0]

    with torch.no_grad():
        for cache in caches:
            model(tokens[:, :32], cache)
        others = torch.randint(tiny.vocab_size, (count, 1, 1), device=device)
        expected = [model(other, caches[0], start=32).clone() for other in others]
        runtime = make_runtime("compile", device, **options_of("runtime", "compile"))
        prepared = runtime.prepare_model(model).model
        step()
        launch = runtime.prepare(step).launch
        for other, logits in zip(others, expected, strict=True):
            token.copy_(other)
            launch()  # once: a second time it could read what the first had written too late
            torch.testing.assert_close(outputs[0], logits, rtol=1e-4, atol=1e-4)


@pytest.mark.cuda
def test_what_a_process_chose_by_timing_is_not_kept_for_the_next(
    model: Qwen3Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    model.cuda()
    runtime = make_runtime("compile", torch.device("cuda"), inductor={"combo_kernels": False})
    (step,) = Workload(WorkloadSize("prefill", 1, 64, 0), model).steps(runtime.prepare_model(model).model)
    with torch.no_grad():
        runtime.prepare(step)
    assert list(tmp_path.rglob("*.py"))
    assert not list(tmp_path.rglob("*.best_config"))


@pytest.fixture
def compiled_with(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options that each compiled function is called with, call by call."""
    called: list[dict[str, Any]] = []

    def compile_(function: Callable[..., Any], *, options: dict[str, Any], **_: Any) -> Callable[..., Any]:
        def compiled(*arguments: Any) -> Any:
            called.append(options)
            return function(*arguments)

        return compiled

    monkeypatch.setattr(torch, "compile", compile_)
    return called


OPTIONS = {
    "inductor": {"combo_kernels": True, "triton": {"autotune_pointwise": False}},
    "single_token": {"coordinate_descent_tuning": True},
    "peers": {"freezing": True},
}


@pytest.mark.parametrize(("tokens", "single"), [((1, 1), True), ((1, 3), False), ((2, 1), False)])
def test_code_for_a_single_token_has_options_of_its_own(
    model: Qwen3Model, compiled_with: list[dict[str, Any]], tokens: tuple[int, int], single: bool
) -> None:
    runtime = CompileRuntime(torch.device("meta"), **OPTIONS)
    prepared = runtime.prepare_model(model)
    prepared.model(torch.zeros(tokens, dtype=torch.long))
    ours = {"autotune_local_cache": False, "combo_kernels": True, "triton.autotune_pointwise": False}
    more = {"coordinate_descent_tuning": True}
    assert compiled_with == [ours | more if single else ours] * model.config.num_layers
    assert prepared.compile_options == ours | {"single_token": more}


def test_a_peer_is_compiled_with_options_of_its_own(
    model: Qwen3Model, compiled_with: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "is_peer", True)
    runtime = CompileRuntime(torch.device("meta"), **OPTIONS)
    prepared = runtime.prepare_model(model)
    prepared.model(torch.zeros((1, 1), dtype=torch.long))
    theirs = {"autotune_local_cache": False, "freezing": True}
    assert compiled_with == [theirs] * model.config.num_layers
    assert prepared.compile_options == theirs


def test_nothing_of_ours_is_chosen_by_timing_and_inductor_knows_the_options() -> None:
    configured = options_of("runtime", "compile")
    ours, single, peers = (dict(dotted(configured[name])) for name in ("inductor", "single_token", "peers"))
    assert set(ours) | set(single) | set(peers) <= set(torch._inductor.list_options())
    assert ours["deterministic"] is True
    assert ours["triton.autotune_pointwise"] is False
    assert single == {"coordinate_descent_tuning": True, "triton.enable_pdl": True}
    defaults = torch._inductor.config.get_config_copy()
    assert all(value == defaults[name] for name, value in peers.items())


def test_blocks_that_do_not_run_the_same_code_are_not_compiled_as_if_they_did(model: Qwen3Model) -> None:
    model.trf_blocks[-1] = build_model(model.config, ("gemv",)).trf_blocks[-1]
    with pytest.raises(ValueError, match="do not all run the same code"):
        CompileRuntime(torch.device("meta")).prepare_model(model)


def test_a_compiled_model_can_be_run_as_it_was(model: Qwen3Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda *_, **__: lambda region, x, normed, *rest: (2 * x, 2 * normed))
    tokens = torch.arange(5)[None]
    before = model(tokens)
    prepared = CompileRuntime(torch.device("meta")).prepare_model(model).model
    compiled = prepared(tokens)
    assert not torch.allclose(compiled, before)
    assert prepared.original is model
    assert torch.equal(model(tokens), before)
    assert torch.equal(prepared(tokens), compiled)
