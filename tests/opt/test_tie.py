"""`tie`: one matrix is embedding and head."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from qwen3bench import ModelConfig, build_model

TOKENS = torch.zeros(1, 3, dtype=torch.long)


def head_shares_storage(model: torch.nn.Module) -> bool:
    embedding, head = model.tok_emb.weight, model.out_head.weight
    return embedding.untyped_storage().data_ptr() == head.untyped_storage().data_ptr()


def test_head_is_the_embedding(tiny: ModelConfig, tiny_weights: dict[str, Tensor]) -> None:
    tied = build_model(tiny, ("tie",), tiny_weights)
    assert tied.out_head.weight is tied.tok_emb.weight
    assert head_shares_storage(tied)
    assert not head_shares_storage(build_model(tiny, ("flash", "mlp", "mask", "norm"), tiny_weights))


def test_it_saves_exactly_the_head(tiny: ModelConfig, tiny_weights: dict[str, Tensor]) -> None:
    baseline, tied = build_model(tiny, (), tiny_weights), build_model(tiny, ("tie",), tiny_weights)
    head_numel = tiny.vocab_size * tiny.emb_dim
    assert baseline.num_parameters - tied.num_parameters == head_numel
    assert baseline.parameter_bytes - tied.parameter_bytes == 4 * head_numel


def test_it_changes_no_bit_of_the_logits(tiny: ModelConfig, tiny_weights: dict[str, Tensor]) -> None:
    logits = [build_model(tiny, opts, tiny_weights)(TOKENS) for opts in ((), ("tie",))]
    assert torch.equal(*logits)


@pytest.mark.parametrize("change", ["to", "double", "deepcopy", "load_state_dict"])
def test_the_tie_survives(tiny: ModelConfig, tiny_weights: dict[str, Tensor], change: str) -> None:
    model = build_model(tiny, ("tie",), {name: tensor.clone() for name, tensor in tiny_weights.items()})
    if change == "to":
        model.to(torch.bfloat16)
    elif change == "double":
        model.double()
    elif change == "deepcopy":
        model = copy.deepcopy(model)
    else:
        model.load_state_dict(build_model(tiny, ("tie",)).state_dict())
    assert head_shares_storage(model)
    assert model.num_parameters == build_model(tiny, ("tie",), device="meta").num_parameters
