"""Costs from the shapes, against PyTorch's own counter and the tensors' own sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from qwen3bench.config.model_config import ModelConfig
from qwen3bench.model.build import build_model
from qwen3bench.record.messages import Cost
from qwen3bench.worker.costs import causal_pairs, cell_cost, forward_flops, forwards, least_resident_bytes
from qwen3bench.worker.workloads import Workload, WorkloadSize

SMALL = ModelConfig(
    num_layers=3, emb_dim=48, num_heads=6, num_kv_heads=2, head_dim=10, hidden_dim=80, vocab_size=97, context_length=64
)
QWEN3_06B = ModelConfig(
    num_layers=28, emb_dim=1024, num_heads=16, num_kv_heads=8, head_dim=128, hidden_dim=3072, tie_word_embeddings=True
)
SIZES = [
    WorkloadSize("prefill", 3, 17, 0),
    WorkloadSize("decode", 3, 17, 1),
    WorkloadSize("generate", 2, 11, 5),
    WorkloadSize("generate", 2, 11, 1),
]
IDS = ["prefill", "decode", "generate", "generate one token"]


@pytest.mark.parametrize("size", SIZES, ids=IDS)
def test_flops_are_those_that_pytorch_counts(size: WorkloadSize) -> None:
    model = build_model(SMALL)
    steps = Workload(size, model).steps(model)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        for step in steps:
            step()
    # The baseline computes every pair and masks afterwards; the counter sees that.
    ours = [forward_flops(SMALL, size.batch_size, t, t * (start + t), logits) for t, start, logits in forwards(size)]
    assert len(ours) == len(steps)
    assert counter.get_total_flops() == sum(ours)


class Softmaxes(TorchFunctionMode):
    """The bytes of the largest softmax's input and output."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.softmax:
            self.largest = max(self.largest, args[0].nbytes + result.nbytes)
        return result


@pytest.mark.parametrize("size", [*SIZES, WorkloadSize("prefill", 2, 60, 0)], ids=[*IDS, "long"])
def test_the_least_memory_is_that_of_tensors_that_exist(size: WorkloadSize) -> None:
    model = build_model(SMALL)
    with Softmaxes() as seen, torch.inference_mode():
        workload = Workload(size, model)
        logits = max(step().nbytes for step in workload.steps(model))
    assert least_resident_bytes(SMALL, size, 4) == max(seen.largest, logits) + workload.cache_bytes


@pytest.mark.parametrize("size", SIZES, ids=IDS)
def test_causal_attention_counts_each_pair_once(size: WorkloadSize) -> None:
    all_pairs = sum(
        forward_flops(SMALL, size.batch_size, t, t * (start + t), logits) for t, start, logits in forwards(size)
    )
    blocked = sum(t * (t - 1) // 2 for t, _, _ in forwards(size))
    per_pair = 4 * SMALL.head_dim * SMALL.num_heads * SMALL.num_layers * size.batch_size
    assert cell_cost(SMALL, False, size, 4).flops == all_pairs - per_pair * blocked


@pytest.mark.parametrize(("queries", "start"), [(1, 0), (1, 9), (5, 0), (4, 3)])
def test_pairs_are_those_that_the_mask_lets_through(queries: int, start: int) -> None:
    allowed = torch.ones(queries, start + queries).tril(diagonal=start)
    assert causal_pairs(queries, start) == allowed.sum()


def test_a_decode_step_reads_the_weights_and_the_cache_once() -> None:
    size = WorkloadSize("decode", 3, 17, 1)
    model = build_model(SMALL, ("tie",))
    work = Workload(size, model)
    stream = 2 * SMALL.num_layers * 3 * SMALL.emb_dim * 4
    logits = 3 * SMALL.vocab_size * 4
    expected = model.parameter_bytes + work.cache_bytes + stream + logits + work.token.nbytes
    assert cell_cost(SMALL, True, size, 4).bytes == expected


def test_an_untied_model_also_reads_the_rows_of_its_tokens() -> None:
    size = WorkloadSize("decode", 3, 17, 1)
    more = cell_cost(SMALL, False, size, 2).bytes - cell_cost(SMALL, True, size, 2).bytes
    assert more == 3 * SMALL.emb_dim * 2


def test_a_prefill_has_no_cache_and_all_logits() -> None:
    one, two = (cell_cost(SMALL, True, WorkloadSize("prefill", 1, n, 0), 2).bytes for n in (10, 11))
    assert two - one == 2 * (2 * SMALL.num_layers * SMALL.emb_dim + SMALL.vocab_size) + 8


def test_a_prefill_of_the_last_logits_costs_what_the_first_step_of_generation_does() -> None:
    last = WorkloadSize("prefill", 2, 11, 0, logits_to_keep=1)
    assert forwards(last) == forwards(WorkloadSize("generate", 2, 11, 1))
    less = cell_cost(SMALL, True, replace(last, logits_to_keep=0), 2).flops - cell_cost(SMALL, True, last, 2).flops
    assert less == 2 * 2 * 10 * SMALL.emb_dim * SMALL.vocab_size


def test_generation_is_its_prefill_and_its_steps() -> None:
    def cost(size: WorkloadSize) -> Cost:
        return cell_cost(SMALL, True, size, 2)

    generate = cost(WorkloadSize("generate", 2, 11, 4))
    first = cost(WorkloadSize("generate", 2, 11, 1))
    steps = [cost(WorkloadSize("decode", 2, 11 + i, 1)) for i in range(3)]
    for kind in ("flops", "bytes"):
        assert getattr(generate, kind) == getattr(first, kind) + sum(getattr(step, kind) for step in steps)


def test_the_floor_of_a_decode_step_of_the_small_qwen3() -> None:
    # 596 M weights of 2 bytes and 512 cached positions of 114,688 bytes: 1.25 GB, 0.42 ms at 2.98 TB/s.
    moved = cell_cost(QWEN3_06B, True, WorkloadSize("decode", 1, 512, 1), 2).bytes
    assert moved == pytest.approx(2 * 596_049_920 + 513 * 114_688, rel=1e-3)
