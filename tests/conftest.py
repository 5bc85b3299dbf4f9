"""Fixtures that all tests share: seeds, the tiny model, all combinations of the optimizations."""

from __future__ import annotations

import random
import sys
from contextlib import suppress
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import pytest

from qwen3bench.config.choices import choices, options_of
from qwen3bench.config.cli import compose
from qwen3bench.config.model_config import ModelConfig
from qwen3bench.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def subsets() -> list[tuple[str, ...]]:
    """All combinations of the five, the baseline first; then each beyond them, and all these, without and with them."""
    five = compose(["design=full"]).factors
    cells = [
        tuple(name for name, on in zip(five, levels, strict=True) if on)
        for levels in product((False, True), repeat=len(five))
    ]
    others = [name for name in choices("opt") if name not in five]
    for beyond in [*((name,) for name in others), tuple(others)]:
        cells += [beyond, tuple(sorted((*five, *beyond), key=choices("opt").index))]
    return [cell for cell in cells if fit_together(cell)]


def fit_together(names: tuple[str, ...]) -> bool:
    """Whether no two of them replace the same part."""
    from qwen3bench.config.catalogue import resolve
    from qwen3bench.model.baseline import assemble

    with suppress(UserError):
        assemble(resolve(names))
        return True
    return False


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with `each_cell` runs once for each combination; one with `each_opt`, for each switch."""
    if "each_cell" in metafunc.fixturenames:
        cells = subsets()
        metafunc.parametrize("each_cell", cells, ids=["+".join(cell) or "baseline" for cell in cells])
    if "each_opt" in metafunc.fixturenames:
        metafunc.parametrize("each_opt", choices("opt"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs CUDA where there is none."""
    if "torch" not in sys.modules:  # no collected test needs it
        return
    import torch

    torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The same random numbers in each test, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        import torch

        torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny() -> ModelConfig:
    """The shape that `model=tiny` names: two layers, grouped heads."""
    return ModelConfig(**options_of("model", "tiny"))


@pytest.fixture(scope="session")
def tiny_weights(tiny: ModelConfig) -> dict[str, Tensor]:
    """Float32 weights of `tiny`, head tied, that no mistake hides behind: peaky attention, no gain at 1.

    Shared by all tests: clone before writing to them.
    """
    import torch

    from qwen3bench.model.weights import load_weights

    weights = load_weights("random", tiny)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in weights.items():
        if name.endswith("norm.weight"):
            peak = 3.0 if name.endswith(("q_norm.weight", "k_norm.weight")) else 1.0
            tensor.copy_(peak * (1 + 0.3 * torch.randn(tensor.shape, generator=generator)))
        elif name != "lm_head.weight":  # which is the embedding's tensor
            tensor.mul_(6)  # logits of order 1, and blocks that matter beside the embedding
    return weights


@pytest.fixture(scope="session")
def all_opts() -> tuple[str, ...]:
    """Every optimization that configs/opt declares, in the order of labels, but those that another leaves no part."""
    together: tuple[str, ...] = ()
    for name in choices("opt"):
        together += (name,) * fit_together((*together, name))
    return together


@pytest.fixture(scope="session")
def all_cells() -> list[tuple[str, ...]]:
    """The cells of `subsets`."""
    return subsets()
