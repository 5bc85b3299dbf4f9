"""The gate accepts every right cell, whatever the seed, and says of the others what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qwen3bench.config.model_config import ModelConfig
from qwen3bench.model.build import build_model
from qwen3bench.model.layers import TransformerBlock
from qwen3bench.model.parts import Parts
from qwen3bench.model.qwen3 import Qwen3Model
from qwen3bench.opt import gemv
from qwen3bench.record.design import design_cells, label
from qwen3bench.record.messages import Judgment
from qwen3bench.worker.equivalence.candidate import Candidate, kv_cache
from qwen3bench.worker.equivalence.gate import Gate
from qwen3bench.worker.equivalence.judged_weights import sensitized
from qwen3bench.worker.equivalence.reference import exact_float32
from qwen3bench.worker.workloads import WorkloadSize

TINY = ModelConfig(
    num_layers=2,
    emb_dim=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    hidden_dim=96,
    vocab_size=256,
    context_length=512,
)
FIVE = ("flash", "tie", "mlp", "mask", "norm")
CELLS = design_cells("full", FIVE)


def gate_of(config: ModelConfig = TINY, dtype: torch.dtype = torch.float32, **options: Any) -> Gate:
    return Gate(config, device="cpu", dtype=dtype, **options)


@pytest.fixture(scope="module")
def gate() -> Gate:
    return gate_of()


# Right cells


def rejected(gate: Gate, cells: list[tuple[str, ...]]) -> dict[str, str | None]:
    """The cells that the gate rejects, and why."""
    verdicts = {label(cell): gate.judge_cell(cell) for cell in cells}
    return {cell: verdict.reason for cell, verdict in verdicts.items() if not verdict.equivalent}


OWN = [WorkloadSize("prefill", 1, 16, 0), WorkloadSize("decode", 2, 20, 1), WorkloadSize("generate", 1, 9, 7)]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_no_right_cell_is_rejected(seed: int) -> None:
    cells = [*CELLS, ("rope",), ("residual",), (*FIVE, "rope", "residual", "qkv")]
    assert rejected(gate_of(seed=seed, workloads=OWN), cells) == {}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_right_cell_is_rejected_in_16_bits(dtype: torch.dtype, seed: int, all_cells: list[tuple[str, ...]]) -> None:
    assert rejected(gate_of(dtype=dtype, seed=seed, workloads=OWN), all_cells) == {}


@pytest.mark.slow
def test_no_right_cell_is_rejected_in_bfloat16(all_cells: list[tuple[str, ...]]) -> None:
    gate = gate_of(dtype=torch.bfloat16, workloads=OWN)
    for cell in all_cells:
        verdict = gate.judge_cell(cell)
        assert verdict.reason is None
        assert 0 < verdict.max_abs_error < 1e-3  # float32's
        assert 1e-6 < verdict.kl_mean < 1e-2  # bfloat16's
        assert verdict.top1_agreement >= 0.99
        assert verdict.checks["bfloat16_rms_error"] > 100 * verdict.checks["float32_rms_error"]


def test_the_baseline_is_its_own_measure(gate: Gate) -> None:
    checks = gate.judge_cell(()).checks
    assert checks["float32_max_ratio"] == checks["float32_rms_ratio"] == 1.0
    assert checks["layers"] == 2
    assert checks["vocabulary"] == 256


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_workload_is_judged_as_it_is_timed(dtype: torch.dtype) -> None:
    gate = gate_of(dtype=dtype, workloads=OWN)
    own = {case.name: case for case in gate.reference.cases if case.own}
    assert list(own) == ["prefill of 1 × 16", "decode of 2 × 20", "generate of 1 × 9 + 7"]
    assert [case.capacity for case in own.values()] == [0, 21, 16]
    assert [len(case.passes) for case in own.values()] == [3, 4, 3]
    assert rejected(gate, [(), ("flash", "mask"), ("flash", "tie", "mlp", "mask", "norm", "qkv")]) == {}


def test_of_a_prefill_that_gives_the_last_logits_alone_these_are_judged() -> None:
    gate = gate_of(workloads=[WorkloadSize("prefill", 2, 16, 0, logits_to_keep=1)])
    (case,) = (case for case in gate.reference.cases if case.own)
    assert [each.judged for each in case.passes] == [range(15, 16)] * 3
    assert rejected(gate, [(), ("flash", "mask")]) == {}


def test_of_many_generated_tokens_the_first_and_the_last_are_judged() -> None:
    gate = gate_of(workloads=[WorkloadSize("generate", 1, 9, 100)])
    (case,) = (case for case in gate.reference.cases if case.own)
    positions = [each.judged for each in case.passes]
    assert positions == [range(8, 9), range(9, 57), range(91, 108), range(8, 11)]
    assert rejected(gate, [(), ("flash", "mask")]) == {}


class Measured:
    """A model that keeps how it was called."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.tok_emb, self.config = model, model.tok_emb, model.config
        self.calls: list[tuple[tuple[int, ...], int, int]] = []
        self.tokens: dict[tuple[int, ...], list[Tensor]] = {}

    def __call__(self, tokens: Tensor, cache: Any = None, start: int = 0, keep: int = 0) -> Tensor:
        self.calls.append((tuple(tokens.shape), start, 0 if cache is None else cache.keys.shape[3]))
        self.tokens.setdefault(tuple(tokens.shape), []).append(tokens.clone())
        return self.model(tokens, cache, start, keep)


def test_each_call_of_a_workload_has_other_tokens_and_their_own_logits_are_compared() -> None:
    gate = gate_of(workloads=[WorkloadSize("prefill", 4, 16, 0), WorkloadSize("decode", 4, 16, 1)])
    models: list[Measured] = []

    def factory(weights: dict[str, Tensor], dtype: torch.dtype) -> Any:
        models.append(Measured(build_model(gate.config, (), weights)))
        return models[-1]

    assert gate.judge(Candidate(factory, kv_cache)).equivalent
    own = [call for model in models for call in model.calls if call[0][0] == 4]
    assert own == [((4, 16), 0, 0)] * 3 + [((4, 16), 0, 17)] + [((4, 1), 16, 17)] * 3
    prompts = next(model.tokens[4, 16] for model in models if (4, 16) in model.tokens)
    assert not torch.equal(prompts[0], prompts[1])
    assert not torch.equal(prompts[1], prompts[2])


@pytest.mark.slow
def test_the_whole_vocabulary_is_judged_where_a_workload_is() -> None:
    gate = gate_of(replace(TINY, vocab_size=9000), workloads=OWN[:1])
    widths: set[int] = set()

    def factory(weights: dict[str, Tensor], dtype: torch.dtype) -> Any:
        widths.add(len(weights["lm_head.weight"]))
        return build_model(gate.config, (), weights)

    assert gate.judge(Candidate(factory, kv_cache)).equivalent
    assert widths == {4096, 9000}
    assert gate.judge_cell(("tie",)).checks["vocabulary"] == 9000


def no_memory_for(gate: Gate, sequences: int, dtypes: set[torch.dtype]) -> Judgment:
    """The verdict on the baseline, which has no memory for a prefill of so many sequences or more."""

    def factory(weights: dict[str, Tensor], dtype: torch.dtype) -> Any:
        model = build_model(gate.config, (), weights)

        def forward(tokens: Tensor, cache: Any = None, start: int = 0, keep: int = 0) -> Tensor:
            if tokens.shape[0] >= sequences and tokens.shape[1] == 16 and dtype in dtypes:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return Qwen3Model.forward(model, tokens, cache, start, keep)

        model.forward = forward
        return model

    return gate.judge(Candidate(factory, kv_cache))


def test_where_memory_lacks_in_float32_alone_a_cell_is_judged_by_sequences_or_in_the_runs_dtype() -> None:
    gate = gate_of(dtype=torch.bfloat16, workloads=[WorkloadSize("prefill", 4, 16, 0)])
    by_sequences = no_memory_for(gate, 2, {torch.float32})
    assert by_sequences.equivalent
    assert "float32_left_out" not in by_sequences.checks
    left_out = no_memory_for(gate, 1, {torch.float32})
    assert left_out.equivalent
    assert left_out.checks["float32_left_out"] == 1
    with pytest.raises(torch.cuda.OutOfMemoryError):
        no_memory_for(gate, 2, {torch.bfloat16})


def test_a_context_shorter_than_the_prompts_cuts_them() -> None:
    gate = gate_of(replace(TINY, context_length=20))
    assert [prompt.shape[1] for prompt in gate.reference.prompts] == [1, 7, 20, 7, 7, 20]
    assert gate.judge_cell(("flash", "mask")).equivalent


def test_a_deep_model_is_judged_on_a_shallow_one_of_its_shapes() -> None:
    gate = gate_of(replace(TINY, num_layers=40, vocab_size=50_000))
    assert gate.config == replace(TINY, num_layers=3, vocab_size=50_000, context_length=135)
    checks = gate.judge_cell(("norm",)).checks
    assert (checks["layers"], checks["vocabulary"]) == (3, 50_000)


def test_the_weights_are_exact_in_both_dtypes_and_no_gain_is_one() -> None:
    weights = sensitized(TINY, torch.device("cpu"), torch.bfloat16, seed=3)
    for name, tensor in weights.items():
        assert torch.equal(tensor, tensor.bfloat16().float()), name
        if name.endswith("norm.weight"):
            assert tensor.std() > 0.05 * tensor.mean(), name
    assert weights["model.layers.0.self_attn.q_norm.weight"].mean() == pytest.approx(3, rel=0.3)


# What cannot be judged, and what must not leak in


def wrapped(gate: Gate, forward: Any) -> Judgment:
    """The verdict on the baseline with `forward(its own, tokens, cache, start)` in place of its own."""

    def factory(weights: dict[str, Tensor], dtype: torch.dtype) -> Any:
        model = build_model(gate.config, (), weights)
        own = model.forward
        model.forward = lambda tokens, cache=None, start=0, keep=0: forward(own, tokens, cache, start)[:, -keep:]
        return model

    return gate.judge(Candidate(factory, kv_cache))


def test_nan_in_one_logit_is_rejected(gate: Gate) -> None:
    def forward(own, tokens, cache, start):
        logits = own(tokens, cache, start).clone()
        logits[0, -1, 3] = float("nan")
        return logits

    verdict = wrapped(gate, forward)
    assert verdict.reason == "float32: logits hold NaN or infinity"
    assert not verdict.equivalent


def test_logits_of_the_last_token_alone_are_rejected(gate: Gate) -> None:
    verdict = wrapped(gate, lambda own, tokens, cache, start: own(tokens, cache, start)[:, -1:])
    assert not verdict.equivalent
    assert "shape" in verdict.reason
    assert verdict.ran


def test_a_cell_that_raises_is_rejected_with_its_reason(gate: Gate) -> None:
    def forward(own, tokens, cache, start):
        raise RuntimeError("No available kernel. Aborting execution.\nmore")

    verdict = wrapped(gate, forward)
    assert verdict.reason == "float32: it does not run: No available kernel. Aborting execution"
    assert not verdict.ran
    assert not verdict.equivalent


class Idle(TransformerBlock):
    """A block that leaves its attention and feed-forward out."""

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        return x


class Halved(TransformerBlock):
    """A block that may count its feed-forward half."""

    share = 1.0

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        out = super().forward(x, *rest)
        return out if self.share == 1.0 else x + self.share * (out - x)


def with_layers(monkeypatch: pytest.MonkeyPatch, depth: int, make: Callable[..., nn.Module]) -> Judgment:
    """The verdict on a switch whose block at layer i of `depth` is `make(i, config, parts)`."""
    made: list[int] = []

    def block(config: ModelConfig, parts: Parts) -> nn.Module:
        made.append(1)
        return make((len(made) - 1) % config.num_layers, config, parts)

    monkeypatch.setattr(gemv, "apply", lambda parts, **options: replace(parts, block=block))  # it may change blocks
    verdict = Gate(replace(TINY, num_layers=depth), device="cpu", dtype=torch.float32).judge_cell(("gemv",))
    monkeypatch.undo()
    return verdict


@pytest.mark.slow
@pytest.mark.parametrize("layer", [0, 3, 5, 6, 9])
def test_a_layer_that_is_made_otherwise_is_judged(monkeypatch: pytest.MonkeyPatch, layer: int) -> None:
    def block(index: int, *given: Any) -> nn.Module:
        return (Idle if index == layer else TransformerBlock)(*given)

    verdict = with_layers(monkeypatch, 10, block)
    assert not verdict.equivalent
    assert verdict.checks["float32_max_ratio"] > 1000


@pytest.mark.slow
@pytest.mark.parametrize("layer", [0, 3, 9])
def test_a_layer_of_the_same_class_with_another_attribute_is_judged(
    monkeypatch: pytest.MonkeyPatch, layer: int
) -> None:
    def block(index: int, *given: Any) -> nn.Module:
        made = Halved(*given)
        made.share = 0.5 if index == layer else 1.0
        made.index = index  # which differs in all of them, and tells nothing
        return made

    assert with_layers(monkeypatch, 10, block).checks["float32_max_ratio"] > 1000
    layer = -1
    assert with_layers(monkeypatch, 10, block).equivalent


def test_layers_of_two_kinds_that_compute_the_same_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    def block(index: int, *given: Any) -> nn.Module:
        return (Halved if index % 3 else TransformerBlock)(*given)

    assert with_layers(monkeypatch, 10, block).equivalent


def test_layers_of_more_kinds_than_are_judged_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def block(index: int, *given: Any) -> nn.Module:
        made = Halved(*given)
        made.kind = min(index, 3)
        return made

    verdict = with_layers(monkeypatch, 10, block)
    assert not verdict.equivalent
    assert verdict.reason == "its 10 blocks are of more than 3 different kinds, so that no 3 of them tell of all"


def test_any_error_of_a_model_is_a_verdict(gate: Gate) -> None:
    def forward(own, tokens, cache, start):
        raise TypeError("unexpected argument")

    assert wrapped(gate, forward).reason == "float32: it does not run: unexpected argument"


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError, torch.AcceleratorError])
def test_want_of_memory_and_device_faults_are_the_callers(gate: Gate, error: type[Exception]) -> None:
    def forward(own, tokens, cache, start):
        raise error("from the device")

    with pytest.raises(error):
        wrapped(gate, forward)


def test_one_sequence_reading_anothers_is_rejected(gate: Gate) -> None:
    def forward(own, tokens, cache, start):
        return own(tokens.roll(1, 0), cache, start).roll(-1, 0) if tokens.shape[1] == 1 else own(tokens, cache, start)

    verdict = wrapped(gate, forward)
    assert not verdict.equivalent
    assert "decode" in verdict.reason


def test_float32_is_exact_inside_and_as_before_outside(gate: Gate) -> None:
    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    seen = set()

    def forward(own, tokens, cache, start):
        seen.add((cuda.fp32_precision, cpu.fp32_precision))
        return own(tokens, cache, start)

    before = cuda.fp32_precision, cpu.fp32_precision
    try:
        cuda.fp32_precision, cpu.fp32_precision = "tf32", "bf16"
        assert wrapped(gate, forward).equivalent
        assert (cuda.fp32_precision, cpu.fp32_precision) == ("tf32", "bf16")
    finally:
        cuda.fp32_precision, cpu.fp32_precision = before
    assert seen == {("ieee", "ieee")}


def test_exact_float32_is_undone_after_an_error() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        with pytest.raises(ZeroDivisionError), exact_float32():
            raise ZeroDivisionError
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def test_the_callers_threads_come_back(gate: Gate) -> None:
    before = torch.get_num_threads()
    gate.judge_cell(("norm",))
    assert torch.get_num_threads() == before


# Options that allow less than the default ones


class Refusing(nn.Module):
    """The baseline, but it refuses some calls, as a forced attention backend does."""

    def __init__(self, model: nn.Module, refuses: Any) -> None:
        super().__init__()
        self.inner = model
        self.refuses = refuses
        self.tok_emb, self.config = model.tok_emb, model.config

    def forward(self, tokens: Tensor, cache: Any = None, start: int = 0, keep: int = 0) -> Tensor:
        if self.refuses(self.tok_emb.weight.dtype, tokens.shape[1], start):
            raise RuntimeError("No available kernel")
        return self.inner(tokens, cache, start, keep)


def refusing(gate: Gate, refuses: Any, fallback: bool = True) -> Judgment:
    def plain(weights: dict[str, Tensor], dtype: torch.dtype) -> Any:
        return build_model(gate.config, (), weights)

    return gate.judge(
        Candidate(
            lambda weights, dtype: Refusing(plain(weights, dtype), refuses), kv_cache, plain if fallback else None
        )
    )


def test_float32_and_chunks_may_be_refused_where_the_default_options_run_them() -> None:
    gate = gate_of(dtype=torch.bfloat16)

    def refuses(dtype, tokens, start):
        return dtype is torch.float32 or (start > 0 and tokens > 1)

    verdict = refusing(gate, refuses)
    assert verdict.equivalent
    assert verdict.checks["float32_stood_in"] == len(gate.reference.cases)
    assert verdict.checks["bfloat16_stood_in"] == 2  # chunks of two prompts
    assert "No available kernel" in refusing(gate, refuses, fallback=False).reason


@pytest.mark.parametrize("tokens_refused", ["prefill", "decode"])
def test_what_a_workload_does_must_run_in_the_runs_dtype(tokens_refused: str) -> None:
    gate = gate_of(dtype=torch.bfloat16)

    def refuses(dtype, tokens, start):
        return dtype is torch.bfloat16 and (tokens > 1 if tokens_refused == "prefill" else tokens == 1)

    verdict = refusing(gate, refuses)
    assert verdict.reason == "bfloat16: it does not run: No available kernel"


def test_a_backend_that_a_cpu_lacks_is_refused_with_pytorchs_words() -> None:
    gate = gate_of(opts={"flash": {"backend": "cudnn"}})
    assert gate.judge_cell(()).equivalent
    verdict = gate.judge_cell(("flash",))
    assert not verdict.equivalent
    assert "does not run" in verdict.reason
    assert "scaled_dot_product_attention" in verdict.reason


# Other models


def test_a_model_without_a_cache_is_judged_by_its_prefill(gate: Gate) -> None:
    def factory(weights: dict[str, Tensor], dtype: torch.dtype) -> Any:
        model = build_model(gate.config, ("flash", "mask"), weights)
        return lambda tokens: model(tokens)

    assert gate.judge(Candidate(factory)).equivalent
    worse = gate.judge(Candidate(lambda weights, dtype: lambda tokens: factory(weights, dtype)(tokens) * 1.001))
    assert not worse.equivalent


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_transformers_computes_the_same_function(gate: Gate, attention: str) -> None:
    transformers = pytest.importorskip("transformers")

    def factory(weights: dict[str, Tensor], dtype: torch.dtype) -> Any:
        config = gate.config
        theirs = transformers.Qwen3Config(
            vocab_size=config.vocab_size,
            hidden_size=config.emb_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            intermediate_size=config.hidden_dim,
            max_position_embeddings=config.context_length,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
            tie_word_embeddings=False,
            attn_implementation=attention,
        )
        model = transformers.Qwen3ForCausalLM(theirs).to(dtype).eval()
        model.load_state_dict(weights)

        def forward(tokens: Tensor, cache: Any = None, start: int = 0, keep: int = 0) -> Tensor:
            return model(tokens, past_key_values=cache, use_cache=cache is not None, logits_to_keep=keep).logits

        return forward

    verdict = gate.judge(Candidate(factory, lambda model, batch_size, capacity: transformers.DynamicCache()))
    assert verdict.reason is None
    assert verdict.equivalent


# On a GPU


@pytest.mark.cuda
@pytest.mark.parametrize("seed", range(3))
def test_no_right_cell_is_rejected_on_cuda(seed: int, all_cells: list[tuple[str, ...]]) -> None:
    config = replace(TINY, emb_dim=512, num_heads=8, num_kv_heads=4, head_dim=128, hidden_dim=1536, vocab_size=4096)
    gate = Gate(config, device="cuda", dtype=torch.bfloat16, seed=seed)
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"  # must not leak in
        assert rejected(gate, all_cells) == {}
    finally:
        matmul.fp32_precision = before


@pytest.mark.cuda
def test_tf32_products_are_rejected_on_cuda() -> None:
    config = replace(TINY, emb_dim=512, num_heads=8, num_kv_heads=4, head_dim=128, hidden_dim=1536, vocab_size=4096)
    gate = Gate(config, device="cuda", dtype=torch.float32)

    def forward(own, tokens, cache, start):
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        try:
            return own(tokens, cache, start)
        finally:
            torch.backends.cuda.matmul.fp32_precision = "ieee"

    verdict = wrapped(gate, forward)
    assert not verdict.equivalent
    assert verdict.checks["float32_rms_ratio"] > 10


@pytest.mark.cuda
def test_forced_backends_on_cuda() -> None:
    config = replace(TINY, emb_dim=512, num_heads=8, num_kv_heads=8, head_dim=128, hidden_dim=1536, vocab_size=4096)
    reasons = {
        (backend, label(cell)): Gate(config, device="cuda", dtype=torch.bfloat16, opts={"flash": {"backend": backend}})
        .judge_cell(cell)
        .reason
        for backend in ("flash", "efficient", "math")
        for cell in (("flash",), ("flash", "mask"))
    }
    refused = reasons.pop(("flash", "flash"))
    assert "non-null attn_mask" in refused  # FlashAttention takes no explicit mask
    assert set(reasons.values()) == {None}
