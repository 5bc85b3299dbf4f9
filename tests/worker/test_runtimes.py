"""Whatever launches a step does the same work."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qwen3bench.config.choices import options_of
from qwen3bench.config.model_config import ModelConfig
from qwen3bench.errors import UserError
from qwen3bench.model.build import build_model
from qwen3bench.model.cache import KVCache
from qwen3bench.model.decoder import Decoder
from qwen3bench.model.qwen3 import Qwen3Model
from qwen3bench.worker.compile_counters import compiled_graphs, forget_compilations, graph_breaks
from qwen3bench.worker.peers import build_peer
from qwen3bench.worker.runtimes import (
    CompileRuntime,
    InvalidCell,
    PreparedModel,
    PreparedStep,
    dotted,
    make_runtime,
    require_finite,
    require_replay,
    written_by,
)
from qwen3bench.worker.workloads import Workload, WorkloadSize

CPU = torch.device("cpu")


@pytest.fixture
def model(tiny: ModelConfig, tiny_weights: dict[str, Tensor]) -> Qwen3Model:
    return build_model(tiny, ("flash",), tiny_weights).requires_grad_(False)


@pytest.fixture
def dynamo() -> Iterator[None]:
    """What a runtime sets for its process, set back."""
    import torch._dynamo

    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=False, suppress_errors=False):
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


# What a runtime claims


needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler"
)
CLAIM = """
import sys, torch
from qwen3bench.config.choices import options_of
from qwen3bench.config.model_config import ModelConfig
from qwen3bench.model.build import build_model
from qwen3bench.worker.runtimes import InvalidCell, make_runtime
from qwen3bench.worker.workloads import Workload, WorkloadSize
torch.set_grad_enabled(False)
model = build_model(ModelConfig(**options_of("model", "tiny") | {"num_layers": 1}))
runtime = make_runtime("compile", torch.device("cpu"))
(step,) = Workload(WorkloadSize("prefill", 1, 4, 0), model).steps(runtime.prepare_model(model).model)
try:
    runtime.prepare(step)
except InvalidCell as error:
    print(error)
else:
    print("compiled")
"""


def claimed(environment: dict[str, str]) -> str:
    """What a process with these variables says of a model that it is to compile."""
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", CLAIM],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": root} | environment,
        check=False,
    )
    return done.stdout.strip() or done.stderr


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TORCHDYNAMO_DISABLE", "1"),
        ("TORCH_COMPILE_DISABLE", "1"),
        ("TORCH_COMPILE_OVERRIDE_BACKENDS", ">=0:eager"),
        ("TORCH_COMPILE_OVERRIDE_BACKENDS", ">=0:aot_eager"),
    ],
)
def test_a_variable_that_switches_the_compiler_off_is_named(name: str, value: str) -> None:
    told = claimed({name: value})
    assert told.startswith("torch.compile")
    assert f"unset {name}" in told


@needs_compiler
@pytest.mark.slow
def test_a_failure_to_compile_is_never_suppressed(tmp_path: Path) -> None:
    broken = tmp_path / "g++"
    broken.write_text('#!/bin/sh\ncase "$*" in *" -o "*) echo "no space left" >&2; exit 1;; esac\nexec g++ "$@"\n')
    broken.chmod(0o755)
    environment = {"CXX": str(broken), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    assert "no space left" in claimed({**environment, "TORCHDYNAMO_SUPPRESS_ERRORS": "1"})
    assert claimed({"TORCHDYNAMO_SUPPRESS_ERRORS": "1"}) == "compiled"  # nothing failed


def prepared_steps(model: Decoder, size: WorkloadSize) -> list[PreparedStep]:
    runtime = make_runtime("compile", CPU)
    with torch.no_grad():
        return [runtime.prepare(step) for step in Workload(size, model).steps(runtime.prepare_model(model).model)]


@needs_compiler
@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("peer", [False, True])
def test_a_compiler_that_is_switched_off_is_told_of(
    tiny: ModelConfig, tiny_weights: dict[str, Tensor], model: Qwen3Model, peer: bool
) -> None:
    torch.compiler.reset()
    given: Decoder = build_peer("transformers:sdpa", tiny, tiny_weights) if peer else model
    size = WorkloadSize("prefill", 1, 4, 0)
    with torch._dynamo.config.patch(disable=True), pytest.raises(InvalidCell, match=r"config\.disable"):
        prepared_steps(given, size)
    with torch.compiler.set_stance("force_eager"), pytest.raises(InvalidCell, match="set_stance"):
        prepared_steps(given, size)


@needs_compiler
@pytest.mark.slow
@pytest.mark.usefixtures("dynamo")
def test_one_step_that_runs_in_eager_is_told_of(model: Qwen3Model) -> None:
    torch.compiler.reset()
    size = WorkloadSize("generate", 1, 6, 3)
    with torch.compiler.set_stance("eager_on_recompile"), pytest.raises(InvalidCell, match="run in eager"):
        prepared_steps(model, size)


@needs_compiler
@pytest.mark.slow
@pytest.mark.usefixtures("dynamo")
def test_a_compiler_that_falls_back_is_told_of(model: Qwen3Model) -> None:
    import torch._inductor.config

    torch.compiler.reset()
    fallback = torch._inductor.config.patch(fallback_by_default=True)
    with fallback, pytest.raises(InvalidCell, match="fallback_by_default=True"):
        prepared_steps(model, WorkloadSize("prefill", 1, 4, 0))


@needs_compiler
@pytest.mark.slow
@pytest.mark.usefixtures("dynamo")
def test_each_model_needs_a_compilation_of_its_own(model: Qwen3Model) -> None:
    torch.compiler.reset()
    size = WorkloadSize("prefill", 1, 4, 0)
    runtime = make_runtime("compile", CPU)
    with torch.no_grad():
        for _ in range(2):  # a copy of a cell, too
            (step,) = Workload(size, model).steps(runtime.prepare_model(model).model)
            runtime.prepare(step)
        runtime.prepare_model(model)
        with pytest.raises(InvalidCell, match="made no code of it"):
            runtime.prepare(step)  # another's


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_graph_that_holds_nothing_is_told_of(dtype: torch.dtype) -> None:
    logits = torch.randn(1, 2, 3).to(dtype)
    wanted = logits.clone()
    require_replay(lambda: logits.copy_(wanted), logits)
    assert torch.equal(logits, wanted)
    with pytest.raises(InvalidCell, match="writes no logits"):
        require_replay(lambda: None, logits)


@pytest.mark.cuda
def test_an_empty_capture_is_told_of_on_cuda() -> None:
    runtime = make_runtime("graph", torch.device("cuda"))
    logits = torch.zeros(1, 2, 3, device="cuda")
    with pytest.raises(InvalidCell, match="writes no logits"):
        runtime.prepare(lambda: logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_last_tokens_logits_are_read_where_they_lie(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """A CPU's tensors lie behind NumPy's interface of the same form."""

    def on_cpu(there: Any, device: torch.device) -> Tensor:
        return torch.from_numpy(
            np.asarray(SimpleNamespace(__array_interface__=vars(there)["__cuda_array_interface__"]))
        )

    monkeypatch.setattr(torch, "as_tensor", on_cpu)
    logits, loss = torch.arange(24.0).reshape(2, 3, 4).to(dtype), torch.tensor(3.0, dtype=dtype)
    last, alone = written_by(logits), written_by(loss)
    assert torch.equal(last, logits[:, -1])
    assert torch.equal(alone, loss.reshape(1))
    logits[0, 1, :] = torch.nan
    require_finite(last, "logits are")
    logits[1, 2, 3] = torch.nan
    with pytest.raises(InvalidCell, match="logits are not finite"):
        require_finite(last, "logits are")


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_a_graph_wrote_last_is_read_and_its_memory_left_to_others_on_cuda(dtype: torch.dtype) -> None:
    runtime, x = make_runtime("graph", torch.device("cuda")), torch.ones(2, 64, 2**16, device="cuda", dtype=dtype)
    loss = runtime.prepare(lambda: (x[0, -1, 0] * 3).detach())
    first = runtime.prepare(lambda: x + 1)
    held = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    others = [runtime.prepare(lambda: x * 5) for _ in range(8)]  # each writes where the first one does
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == held
    for prepared, value in ((first, 2), (others[-1], 5), (first, 2), (loss, 3)):
        prepared.launch()
        torch.cuda.synchronize()
        assert prepared.written is not None
        assert prepared.written.dtype == dtype
        assert prepared.written.shape == ((1,) if prepared is loss else (2, 2**16))
        assert bool((prepared.written == value).all())
    x[1, -1, 7] = torch.nan  # of the last token alone
    first.launch()
    assert first.written is not None
    with pytest.raises(InvalidCell, match="logits are not finite"):
        require_finite(first.written, "logits are")


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
