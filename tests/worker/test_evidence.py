"""Evidence names what ran, and says so where it cannot tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from qwen3bench.analysis.effective import compare_effective, idle_switches
from qwen3bench.config.model_config import ModelConfig
from qwen3bench.model.build import build_model
from qwen3bench.model.compiled import CompiledModel
from qwen3bench.model.qwen3 import Qwen3Model
from qwen3bench.model.weights import load_weights
from qwen3bench.opt import flash
from qwen3bench.record.design import design_cells, label
from qwen3bench.record.messages import Evidence
from qwen3bench.worker.compile_counters import forget_compilations
from qwen3bench.worker.evidence import (
    OWN,
    SEPARATE,
    UNKNOWN,
    Span,
    asked_note,
    attention_backend,
    collect,
    computing_operations,
    operations_of,
    operations_of_a_forward,
    output_hash,
    split_note,
)
from qwen3bench.worker.runtimes import GraphRuntime, InvalidCell, Runtime
from qwen3bench.worker.training import TrainingWorkload
from qwen3bench.worker.workloads import Workload, WorkloadSize

SMALL = ModelConfig(
    num_layers=1, emb_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, hidden_dim=48, vocab_size=97, context_length=64
)
PREFILL, DECODE = WorkloadSize("prefill", 2, 9, 0), WorkloadSize("decode", 2, 9, 1)
FIVE = ("flash", "tie", "mlp", "mask", "norm")


def evidence(
    opts: Any = (), size: WorkloadSize = PREFILL, config: ModelConfig = SMALL, runtime: str = "eager"
) -> Evidence:
    model = build_model(config, opts)
    return collect(model, Workload(size, model), runtime)


@pytest.mark.parametrize(
    ("opts", "backend"),
    [
        ((), SEPARATE),
        (("mask", "norm"), SEPARATE),
        (("flash",), "FlashAttention"),
        (("flash", "mask"), "FlashAttention"),
        ({"flash": {"backend": "math"}}, "math"),
    ],
)
@pytest.mark.parametrize("size", [PREFILL, DECODE], ids=["prefill", "decode"])
def test_the_backend_that_ran_on_a_cpu(opts: Any, backend: str, size: WorkloadSize) -> None:
    assert evidence(opts, size).attention_backend == backend


@pytest.mark.parametrize("backend", ["cudnn", "efficient"])
def test_a_forced_backend_that_is_not_there_raises(backend: str) -> None:
    with pytest.raises(RuntimeError, match="scaled_dot_product_attention"):
        evidence({"flash": {"backend": backend}})


def test_a_cpus_kernels_are_the_operations_that_compute() -> None:
    found = evidence()
    kernels = found.kernels
    # q, k, v, out, gate, up, down, head; scores and context; embedding; five norms of one reciprocal root each
    wanted = {"mm": 8, "bmm": 2, "index_select": 1, "rsqrt": 5, "_softmax": 1, "silu": 1}
    assert {name: kernels.get(name) for name in wanted} == wanted
    assert not set(kernels) & {"view", "transpose", "as_strided", "empty", "linear", "matmul", "to", "add_"}
    assert found.kernel_launches == sum(kernels.values())
    assert found.graph_breaks is found.recompiles is None
    assert found.notes == ()


@pytest.mark.parametrize(
    ("opts", "note"),
    [
        (("flash",), ["fused attention is given a mask tensor"]),
        (("flash", "mask"), ["fused attention without a mask tensor"]),
        (("mask",), []),
    ],
)
def test_it_says_whether_fused_attention_is_given_a_mask(opts: tuple[str, ...], note: list[str]) -> None:
    assert evidence(opts).notes == tuple(note)


def test_operations_count_where_they_compute_and_call_none_that_does() -> None:
    spans = [
        Span(0, 100, "aten::linear"),
        Span(1, 2, "aten::t"),  # a view
        Span(3, 99, "aten::matmul"),
        Span(4, 98, "aten::mm"),
        Span(110, 120, "aten::add_"),
        Span(120, 130, "aten::add"),  # after it, not in it
        Span(121, 122, "aten::empty"),
        Span(200, 300, "aten::_scaled_dot_product_flash_attention_for_cpu"),
        Span(210, 220, "aten::mul"),
        Span(300, 310, "mine::product"),
        Span(301, 309, "aten::mul"),
        Span(310, 320, "mine::nothing"),
        Span(0, 400, "aten::silu", thread=2),  # while the others run
    ]
    found = computing_operations(reversed(spans))
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    assert found == {"mm": 1, "add": 2, attention: 1, "mul": 1, "silu": 1}


def test_each_layer_adds_the_same_operations() -> None:
    one, two, three = (evidence(config=replace(SMALL, num_layers=n)).kernel_launches for n in (1, 2, 3))
    assert three - two == two - one > 20


@pytest.mark.parametrize("opts", [(), ("flash",), {"flash": {"backend": "math"}}, FIVE])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_first_block_alone_tells_of_the_same_attention(opts: Any, compiled: bool) -> None:
    original = build_model(replace(SMALL, num_layers=3), opts)
    model = original.compiled(lambda forward: forward) if compiled else original
    workload = Workload(PREFILL, model)
    (whole,), (part,) = (
        [operations_of(step) for step in workload.steps(run)] for run in (model, model.first_block_alone())
    )
    assert sum(part.values()) < sum(whole.values()) / 2
    assert attention_backend((), part) == attention_backend((), whole)
    assert len(original.trf_blocks) == 3
    assert [operations_of(step) for step in workload.steps(model)] == [whole]


def test_one_gate_up_product_is_one_product_less() -> None:
    assert evidence(("mlp",)).kernels["mm"] == evidence().kernels["mm"] - 1


@pytest.mark.parametrize(("opts", "tied"), [((), False), (("tie",), True), (("flash", "tie"), True)])
def test_tied_storage_is_one_address(opts: tuple[str, ...], tied: bool) -> None:
    assert evidence(opts).tied_storage is tied


class _Steps:
    """A workload of three steps made by hand, of which only the outer two are looked at."""

    size = WorkloadSize("generate", 2, 9, 3)
    output = "logits are"

    def steps(self, model: Qwen3Model) -> list[Callable[[], Tensor]]:
        x = torch.ones(1, 4, 4, 8)

        def prefill() -> Tensor:
            with sdpa_kernel(SDPBackend.MATH):
                return F.scaled_dot_product_attention(x, x, x)

        return [prefill, x.tanh, lambda: F.scaled_dot_product_attention(x, x, x).cos()]


def test_generation_names_the_backends_of_prefill_and_step_and_counts_the_step() -> None:
    found = collect(build_model(SMALL), _Steps())  # type: ignore[arg-type]
    assert found.attention_backend == "math, FlashAttention"
    assert found.kernels == {"_scaled_dot_product_flash_attention_for_cpu": 1, "cos": 1}
    assert found.kernel_launches == 2


def test_a_prefill_of_generation_that_is_not_finite_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    work = _Steps()
    prefill, *later = work.steps(build_model(SMALL))
    monkeypatch.setattr(work, "steps", lambda model: [lambda: torch.nan * prefill(), *later])
    with pytest.raises(InvalidCell, match="not finite"):
        collect(build_model(SMALL), work)  # type: ignore[arg-type]


def test_generation_has_one_argmax_a_step() -> None:
    assert evidence(("flash",), WorkloadSize("generate", 2, 9, 3)).kernels["argmax"] == 1


# Compiled


def compiled(size: WorkloadSize) -> tuple[Qwen3Model, Workload]:
    torch.compiler.reset()
    forget_compilations()
    model = build_model(SMALL)
    work = Workload(size, model)
    for block in model.trf_blocks:
        block.compile(backend="eager")  # dynamo's part, without a C++ compiler
    return model, work


def test_warm_compiled_code_recompiles_nothing() -> None:
    model, work = compiled(PREFILL)
    with torch.no_grad():
        work.steps(model)[0]()
    found = collect(model, work, "compile")
    assert (found.graph_breaks, found.recompiles) == (0, 0)
    assert (found.kernels, found.kernel_launches) == ({}, None)
    assert found.notes == ("compiled code on a CPU shows no kernels in a profile",)


def test_a_compilation_while_looking_is_counted() -> None:
    model, work = compiled(PREFILL)
    assert collect(model, work, "compile").recompiles == 1


def test_graph_breaks_are_counted() -> None:
    model, work = compiled(PREFILL)
    block = model.trf_blocks[0]
    forward = type(block).forward

    def broken(self, *args):
        torch._dynamo.graph_break()
        return forward(self, *args)

    block.forward = broken.__get__(block)
    block.compile(backend="eager")
    with torch.no_grad():
        work.steps(model)[0]()
    assert collect(model, work, "compile").graph_breaks >= 1


# Names of kernels


@pytest.mark.parametrize(
    ("kernel", "backend"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1", "cuDNN"),
        (
            "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<128, 128, 64, 4>>",
            "FlashAttention",
        ),
        ("void pytorch_flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<128, 64, 128, 4>>", "FlashAttention"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<>", "FlashAttention"),
        (
            "fmha_cutlassF_f32_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<float>::Params)",
            "memory-efficient",
        ),
        ("_split_attention_kernel", "Triton"),
        ("_token_attention_kernel", "Triton"),
        ("nvjet_sm90_tst_64x80_64x11_4x2_h_bz_TNT", UNKNOWN),
        ("cudnn_infer_ampere_scudnn_128x64_relu_small_nn_v1", UNKNOWN),
    ],
)
def test_backends_by_kernel_name(kernel: str, backend: str) -> None:
    assert attention_backend(["some_gemm", kernel], []) == backend


def test_operations_tell_where_kernels_do_not() -> None:
    assert attention_backend([], ["mm", "_scaled_dot_product_attention_math"]) == "math"
    assert attention_backend([], ["mm", "_scaled_dot_product_flash_attention_for_cpu"]) == "FlashAttention"
    assert attention_backend(["gemm"], ["bmm", "_softmax"]) == SEPARATE
    assert attention_backend(["triton_poi_fused_0"], [], compiled=True) == SEPARATE
    assert attention_backend(["gemm"], ["mm"]) == UNKNOWN


def test_a_forward_of_compiled_training_is_eagers_as_compiled_code_has_none_without_gradients() -> None:
    def compiled_anew(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError

    model = build_model(SMALL)
    compiled = CompiledModel(model, compiled_anew, compiled_anew)
    trained = TrainingWorkload(WorkloadSize("train", 2, 9, 0, "fp32"), model)
    assert operations_of_a_forward(compiled, trained, 0)["_softmax"] == 1
    with pytest.raises(RuntimeError):
        operations_of_a_forward(compiled, Workload(PREFILL, model), 0)


def test_all_that_ran_is_named() -> None:
    kernels = ["void pytorch_flash::flash_fwd_kernel<>", "void cunn_SoftMaxForward<4>"]
    assert attention_backend(kernels, []) == "FlashAttention and separate operations"
    operations = ["_scaled_dot_product_attention_math", "_scaled_dot_product_flash_attention_for_cpu", "_softmax"]
    assert attention_backend([], operations) == "FlashAttention and math and separate operations"


def test_the_softmax_of_a_training_steps_loss_is_not_attentions() -> None:
    kernels = ["void pytorch_flash::flash_fwd_kernel<>", "void cunn_SoftMaxForward<4>", "void cunn_SoftMaxBackward<4>"]
    assert attention_backend(kernels, [], trained=True) == "FlashAttention"
    assert attention_backend(kernels[1:], ["_softmax"], trained=True) == SEPARATE


@pytest.mark.parametrize(
    ("asked", "ran", "compiled", "note"),
    [
        ("math", "math", False, ""),
        ("math", SEPARATE, True, ""),
        ("math", "FlashAttention", False, "math was asked for, FlashAttention ran"),
        ("cudnn", "FlashAttention", False, "cuDNN was asked for, FlashAttention ran"),
        ("auto", f"cuDNN and {SEPARATE}", False, "separate operations ran where fused attention was asked for"),
        ("auto", "cuDNN", False, ""),
    ],
)
def test_another_backend_than_the_one_asked_for_is_named(asked: str, ran: str, compiled: bool, note: str) -> None:
    model = build_model(SMALL, {"flash": {"backend": asked}})
    assert " ".join(asked_note(model, [ran], compiled)) == note
    assert not asked_note(build_model(SMALL), [SEPARATE], compiled)


@pytest.mark.parametrize(
    ("opts", "size", "ran", "note"),
    [
        ({"flash": {"decode": "split"}, "mask": {}}, DECODE, OWN, []),
        ({"flash": {"decode": "split"}, "mask": {}}, DECODE, "cuDNN", ["flash.decode=split was asked for, cuDNN ran"]),
        ({"flash": {"decode": "split"}, "mask": {}}, PREFILL, "cuDNN", []),
        ({"flash": {}, "mask": {}}, DECODE, "cuDNN", []),
        ({}, DECODE, SEPARATE, []),
    ],
)
def test_it_says_whether_our_kernel_ran_where_it_was_asked_for(
    opts: Any, size: WorkloadSize, ran: str, note: list[str]
) -> None:
    model = build_model(SMALL, opts)
    notes = split_note(model, size, ran)
    assert [said.partition(":")[0] for said in notes] == note


def test_our_kernel_beside_a_forced_backend_was_asked_for_too() -> None:
    model = build_model(SMALL, {"flash": {"backend": "cudnn", "decode": "split"}, "mask": {}})
    assert not asked_note(model, ["cuDNN", OWN], False)
    assert asked_note(model, ["FlashAttention", OWN], False) == ["cuDNN was asked for, FlashAttention ran"]


@pytest.mark.parametrize("taken", [True, False])
def test_it_says_whether_heads_were_repeated(taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "takes_grouped", lambda *_: taken)
    notes = [note for note in evidence(("flash", "mask")).notes if "repeated for all heads" in note]
    assert len(notes) == (not taken)
    assert not [note for note in evidence().notes if "repeated" in note]


# Requested against effective


def ran(kernels: Mapping[str, int], backend: str = SEPARATE, tied: bool = False) -> Evidence:
    return Evidence(kernels=dict(kernels), attention_backend=backend, tied_storage=tied)


def test_a_switch_without_effect_is_named() -> None:
    notes = compare_effective(
        {
            "baseline": ran({"mm": 8}),
            "norm": ran({"mm": 8}),
            "flash": ran({"mm": 6}, "math"),
            "flash+norm": ran({"mm": 6}, "FlashAttention"),
            "tie": ran({"mm": 8}, tied=True),
            "tie+mask": ran({"mm": 7}, tied=True),
            "mlp": ran({}),
            "flash+mlp": ran({}),
            "transformers:sdpa": ran({"mm": 8}),
        }
    )
    assert notes == {"norm": ["norm changed nothing that ran: same kernels as baseline"]}


def test_on_a_cpu_only_norm_is_without_effect() -> None:
    notes = compare_effective({label(cell): evidence(cell) for cell in design_cells("full", FIVE)})
    assert set(notes) == {label(cell) for cell in design_cells("full", FIVE) if "norm" in cell}
    assert all(len(note) == 1 and note[0].startswith("norm changed nothing") for note in notes.values())


def gave(output: str | None, kernels: Mapping[str, int], tied: bool = False) -> Evidence:
    return replace(ran(kernels, tied=tied), output=output)


def test_a_switch_is_idle_where_kernels_and_every_bit_are_as_without_it_in_all_cells() -> None:
    same = {"mm": 8}
    seen = {
        "baseline": gave("a", same),
        "norm": gave("a", same),  # idle in both
        "mask": gave("a", same),  # and here not with norm
        "norm+mask": gave("a", same),
        "tie": gave("a", same, tied=True),  # which shares storage
        "mlp": gave("b", same),  # another rounding
        "flash": gave("a", {"mm": 6}),
        "transformers:sdpa": gave("a", same),
    }
    assert idle_switches(seen) == {"norm": 2, "mask": 2}
    assert idle_switches({**seen, "norm+mask": gave("b", same)}) == {}
    assert idle_switches({**seen, "mask": gave("b", same)}) == {}
    assert idle_switches({"baseline": gave(None, same), "norm": gave(None, same)}) == {}
    assert idle_switches({"baseline": gave("a", {}), "norm": gave("a", {})}) == {}  # where no profile sees kernels
    assert idle_switches({"baseline": gave("a", same), "norm+mask": gave("a", same)}) == {}


@pytest.mark.parametrize("size", [PREFILL, DECODE], ids=["prefill", "decode"])
def test_the_hash_is_of_every_bit_that_comes_out(size: WorkloadSize) -> None:
    assert evidence(size=size).output == evidence(size=size).output is not None
    assert evidence(("flash",), size).output != evidence(size=size).output
    logits = torch.randn(2, 20, 5)
    first = output_hash(logits)
    assert output_hash(logits.clone()) == first
    logits[1, 19, 3] = torch.nextafter(logits[1, 19, 3], torch.tensor(9.0))
    assert output_hash(logits) != first
    assert output_hash(torch.tensor(1.5)) == output_hash(torch.tensor(1.5)) != output_hash(torch.tensor(1.25))


def test_what_a_decode_step_reads_is_the_same_whichever_model_filled_the_cache() -> None:
    found = []
    for opts in ((), ("flash",)):
        work = Workload(DECODE, build_model(SMALL, opts))
        assert work.cache is not None
        written = work.cache.values.clone()
        work.refill()
        assert not torch.equal(written, work.cache.values)
        found.append((work.cache.keys, work.cache.values))
    assert all(map(torch.equal, *found))


# On a GPU

CUDA = replace(
    SMALL,
    context_length=512,
    num_layers=2,
    emb_dim=512,
    num_heads=8,
    num_kv_heads=4,
    head_dim=128,
    hidden_dim=1024,
    vocab_size=4096,
)
LARGE = [WorkloadSize("prefill", 2, 200, 0), WorkloadSize("decode", 2, 200, 1)]


def on_cuda(opts: Any, size: WorkloadSize, runtime: str = "eager", config: ModelConfig = CUDA) -> Evidence:
    device = torch.device("cuda")
    model = build_model(config, opts, load_weights("random", config, device=device, dtype=torch.bfloat16))
    work = Workload(size, model)
    launcher = {"eager": Runtime, "graph": GraphRuntime}[runtime](device)
    with torch.no_grad():
        for step in work.steps(model):  # a library's first call in a process may launch more
            step()
        launches = [launcher.prepare(step).launch for step in work.steps(model)]
        return collect(model, work, runtime, launches)


@pytest.mark.cuda
@pytest.mark.parametrize("size", LARGE, ids=["prefill", "decode"])
@pytest.mark.parametrize("cell", design_cells("full", FIVE), ids=label)
def test_a_replay_shows_the_kernels_of_the_step(cell: tuple[str, ...], size: WorkloadSize) -> None:
    eager, graph = (on_cuda(cell, size, runtime) for runtime in ("eager", "graph"))
    assert eager.attention_backend == graph.attention_backend != UNKNOWN
    assert (eager.attention_backend == SEPARATE) == ("flash" not in cell)
    assert eager.kernel_launches == graph.kernel_launches > 20
    assert eager.notes == graph.notes
    assert graph.tied_storage == ("tie" in cell)


@pytest.mark.cuda
@pytest.mark.parametrize("size", LARGE, ids=["prefill", "decode"])
def test_every_switch_changes_what_runs_on_cuda(size: WorkloadSize) -> None:
    alone = [(name,) for name in (*FIVE, "rope", "residual", "qkv")]
    ran_by_cell = {label(cell): on_cuda(cell, size) for cell in [(), *alone, ("flash", "mask")]}
    assert compare_effective(ran_by_cell) == {}


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("backend", "name"),
    [("flash", "FlashAttention"), ("cudnn", "cuDNN"), ("efficient", "memory-efficient"), ("math", "math")],
)
def test_a_forced_backend_is_recognized_on_cuda(backend: str, name: str) -> None:
    if backend == "cudnn" and torch.cuda.get_device_capability()[0] < 8:
        pytest.skip("cuDNN's attention needs compute capability 8.0")
    config = replace(CUDA, num_kv_heads=CUDA.num_heads)  # memory-efficient attention refuses grouped heads
    opts = {"flash": {"backend": backend}, "mask": {}}
    assert on_cuda(opts, LARGE[0], config=config).attention_backend == name


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:.*(not used because|runtime disabled)")
def test_flash_attention_refuses_an_explicit_mask_on_cuda() -> None:
    with pytest.raises(RuntimeError, match="No available kernel"), pytest.warns(UserWarning, match="attn_mask"):
        on_cuda({"flash": {"backend": "flash"}}, LARGE[0])
