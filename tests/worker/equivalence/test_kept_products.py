"""What the gate keeps of matrix products changes no verdict, and nothing is taken for what it is not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qwen3bench.config.choices import options_of
from qwen3bench.config.model_config import ModelConfig
from qwen3bench.record.design import design_cells
from qwen3bench.worker.equivalence.gate import Gate
from qwen3bench.worker.equivalence.kept_products import KeptProducts
from qwen3bench.worker.workloads import WorkloadSize

TINY = ModelConfig(**options_of("model", "tiny"))
WORKLOADS = [WorkloadSize("prefill", 1, 16, 0), WorkloadSize("decode", 2, 20, 1)]


def gate_of(dtype: torch.dtype = torch.float32) -> Gate:
    return Gate(TINY, device="cpu", dtype=dtype, workloads=WORKLOADS)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gate_that_keeps_products_says_the_same_and_computes_a_part(dtype: torch.dtype) -> None:
    keeping, plain = gate_of(dtype), gate_of(dtype)
    plain.reference.products = None
    for cell in design_cells("full", ("flash", "tie", "norm")):
        assert keeping.judge_cell(cell) == plain.judge_cell(cell)
    products = keeping.reference.products
    assert products is not None
    assert products.found > 3 * products.computed


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(6, 4)


@pytest.fixture
def products(weight: torch.Tensor) -> KeptProducts:
    products = KeptProducts()
    products.share([weight])
    return products


def counted(products: KeptProducts) -> tuple[int, int]:
    return products.computed, products.found


def test_the_same_numbers_by_the_same_weight_are_multiplied_once(products: KeptProducts, weight: torch.Tensor) -> None:
    given = torch.randn(3, 2, 4)
    expected = F.linear(given, weight)
    head = nn.Linear(4, 6, bias=False)
    head.weight = nn.Parameter(weight, requires_grad=False)
    with products:
        first, second = F.linear(given, weight), head(given.clone())
    assert counted(products) == (1, 1)
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)


def test_what_a_model_does_to_a_product_is_not_kept(products: KeptProducts, weight: torch.Tensor) -> None:
    given = torch.randn(2, 4)
    with products:
        expected = F.linear(given, weight).clone()
        for _ in range(3):
            found = F.linear(given, weight)
            assert torch.equal(found, expected)
            found.zero_()


def test_other_numbers_another_shape_or_another_weight_are_computed(
    products: KeptProducts, weight: torch.Tensor
) -> None:
    given = torch.randn(2, 4)
    with products:
        F.linear(given, weight)
        assert torch.equal(F.linear(given + 1, weight), (given + 1) @ weight.T)
        assert F.linear(given[None], weight).shape == (1, 2, 6)
        assert F.linear(given, weight[:3]).shape == (2, 3)
        assert torch.allclose(F.linear(given, weight.flip(0)), given @ weight.flip(0).T)
        assert torch.allclose(F.linear(given, weight, torch.ones(6)), given @ weight.T + 1)
    assert counted(products) == (4, 0)  # the last two are not with the weight that is shared, and alone


@pytest.mark.parametrize("inference", [False, True])
def test_a_weight_that_is_changed_in_place_is_another(
    products: KeptProducts, weight: torch.Tensor, inference: bool
) -> None:
    given = torch.randn(2, 4)
    with products, torch.inference_mode(inference):
        before = F.linear(given, weight)
        weight[0].mul_(2)
        assert torch.equal(F.linear(given, weight)[:, 0], 2 * before[:, 0])


def test_the_product_used_longest_ago_goes_where_they_need_too_much() -> None:
    weight, given = torch.randn(6, 4), [torch.randn(1, 4) for _ in range(3)]
    products = KeptProducts(most_bytes=2 * 6 * 4)
    products.share([weight])
    with products:
        for each in (0, 1, 0, 2, 0, 1):
            F.linear(given[each], weight)
    assert counted(products) == (4, 2)
