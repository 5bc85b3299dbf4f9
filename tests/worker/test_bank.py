"""One set of weights for all cells: what is shared, and what it costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qwen3bench.config.choices import options_of
from qwen3bench.config.model_config import ModelConfig
from qwen3bench.model.checkpoint import EMBEDDING, HEAD
from qwen3bench.model.weights import load_weights
from qwen3bench.worker import bank as bank_module
from qwen3bench.worker.bank import Bank


@pytest.fixture(scope="module")
def bank() -> Bank:
    config = ModelConfig(**options_of("model", "tiny"))
    return Bank(config, "random", torch.device("cpu"), torch.float32, 0, {})


def _storages(tensors: object) -> dict[int, int]:
    """Bytes of each storage, by its address."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}  # type: ignore[attr-defined]


def test_all_cells_are_views_on_it(bank: Bank, all_cells: list[tuple[str, ...]]) -> None:
    owned = _storages(bank.weights.values())
    for cell in all_cells:
        parameters = dict(bank.build(cell).named_parameters())
        assert set(_storages(parameters.values())) <= set(owned), cell


def test_every_combination_costs_the_weights_once_and_one_head_more(
    bank: Bank, all_cells: list[tuple[str, ...]]
) -> None:
    models = [bank.build(cell) for cell in all_cells]
    held = _storages(p for model in models for p in model.parameters())
    tied = bank.build(("tie",))
    head_bytes = bank.weights[HEAD].nbytes
    assert sum(held.values()) == tied.parameter_bytes + head_bytes


def test_the_head_is_a_copy_of_the_embedding_for_cells_without_tie(bank: Bank) -> None:
    plain, tied = bank.build(()), bank.build(("tie",))
    assert torch.equal(plain.out_head.weight, plain.tok_emb.weight)
    assert plain.out_head.weight.data_ptr() != plain.tok_emb.weight.data_ptr()
    assert tied.out_head.weight is tied.tok_emb.weight
    assert bank.weights[HEAD].data_ptr() != bank.weights[EMBEDDING].data_ptr()


def test_on_a_cpu_the_embedding_is_a_copy_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else products with the one that threads drew take longer than those with the other."""
    drawn: list[torch.Tensor] = []

    def load(*given: Any, **named: Any) -> dict[str, torch.Tensor]:
        weights = load_weights(*given, **named)
        drawn.append(weights[EMBEDDING])
        return weights

    monkeypatch.setattr(bank_module, "load_weights", load)
    config = ModelConfig(**options_of("model", "tiny"))
    bank = Bank(config, "random", torch.device("cpu"), torch.float32, 0, {})
    tied = bank.build(("tie",)).tok_emb.weight
    assert torch.equal(tied, drawn[0])
    assert tied.data_ptr() == bank.weights[EMBEDDING].data_ptr() != drawn[0].data_ptr()


def test_of_a_head_that_is_the_embedding_nothing_is_compared(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "equal", lambda *_: pytest.fail("seconds, for a matrix of 600 MB in each cell"))
    model = bank.build(("tie",))
    assert model.out_head.weight is model.tok_emb.weight


def test_every_cell_reads_the_same_addresses(bank: Bank) -> None:
    one, other = (dict(bank.build(cell).named_parameters()) for cell in ((), ("flash", "norm")))
    assert {name: p.data_ptr() for name, p in one.items()} == {name: p.data_ptr() for name, p in other.items()}
