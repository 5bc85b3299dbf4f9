"""What a cell is asked to do, held against the plain model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwen3bench.config.model_config import ModelConfig
from qwen3bench.model.build import build_model
from qwen3bench.model.qwen3 import Qwen3Model
from qwen3bench.worker.workloads import Workload, WorkloadSize


@pytest.fixture
def model(tiny: ModelConfig, tiny_weights: dict[str, Tensor]) -> Qwen3Model:
    return build_model(tiny, (), tiny_weights).requires_grad_(False)


@pytest.mark.parametrize(
    ("name", "steps", "capacity"),
    [("prefill", 1, 0), ("decode", 1, 8), ("generate", 4, 11)],
)
def test_sizes(model: Qwen3Model, tiny: ModelConfig, name: str, steps: int, capacity: int) -> None:
    size = WorkloadSize(name, batch_size=3, prompt_tokens=7, new_tokens=4)
    workload = Workload(size, model)
    assert len(workload.steps(model)) == steps
    assert size.cache_capacity == capacity
    keys_and_values = 2 * tiny.num_layers * tiny.num_kv_heads * tiny.head_dim
    assert workload.cache_bytes == 3 * capacity * keys_and_values * 4


def test_prompts_are_seeded_and_within_the_vocabulary(model: Qwen3Model) -> None:
    size = WorkloadSize("prefill", 4, 50, 0)
    one, same, other = (Workload(size, model, seed).prompt for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.shape == (4, 50)
    assert 0 <= int(one.min()) < int(one.max()) < model.config.vocab_size


def test_prefill_gives_the_logits_of_every_position(model: Qwen3Model) -> None:
    workload = Workload(WorkloadSize("prefill", 2, 9, 0), model)
    (step,) = workload.steps(model)
    assert torch.equal(step(), model(workload.prompt))


def test_a_prefill_may_give_the_last_logits_alone(model: Qwen3Model) -> None:
    workload = Workload(WorkloadSize("prefill", 2, 9, 0, logits_to_keep=1), model)
    (step,) = workload.steps(model)
    assert step().shape[1] == 1
    torch.testing.assert_close(step(), model(workload.prompt)[:, -1:])


def test_decode_is_the_next_token_after_the_prompt_however_often(model: Qwen3Model) -> None:
    workload = Workload(WorkloadSize("decode", 2, 9, 0), model)
    (step,) = workload.steps(model)
    expected = model(torch.cat([workload.prompt, workload.token], dim=1))[:, -1:]
    for _ in range(3):
        torch.testing.assert_close(step(), expected, rtol=1e-4, atol=1e-4)


def test_greedy_generation_is_the_argmax_loop_without_a_cache(model: Qwen3Model) -> None:
    size = WorkloadSize("generate", batch_size=2, prompt_tokens=6, new_tokens=8)
    workload = Workload(size, model)
    tokens = workload.prompt
    for _ in range(size.new_tokens):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(dim=-1)], dim=1)
    for _ in range(2):  # a second round starts from the prompt again
        generated = [step().argmax(dim=-1) for step in workload.steps(model)]
        assert torch.equal(torch.cat(generated, dim=1), tokens[:, size.prompt_tokens :])


def test_inputs_serve_every_cell(
    model: Qwen3Model, tiny: ModelConfig, tiny_weights: dict[str, Tensor], all_opts: tuple[str, ...]
) -> None:
    fast = build_model(tiny, all_opts, tiny_weights).requires_grad_(False)
    workload = Workload(WorkloadSize("generate", 2, 6, 5), model)
    (plain, other) = ([step().clone() for step in workload.steps(each)] for each in (model, fast))
    for a, b in zip(plain, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
