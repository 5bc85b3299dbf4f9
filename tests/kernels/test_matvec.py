"""Products of a matrix and a single token's vector, on CUDA."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3bench.kernels import HAS_TRITON, matvec

DTYPES = [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]
SHAPES = [(3072, 1024), (77, 130), (6, 2049), (12288, 4096)]


def vector(dim: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(1, 3, dim, device="cuda", dtype=dtype)[:, 1:2]  # a slice, as of a longer sequence


def matrix(width: int, dim: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(width, dim, device="cuda", dtype=dtype) * dim**-0.5


def normed(x: Tensor, gain: Tensor) -> Tensor:
    return F.rms_norm(x.double(), gain.shape, gain.double(), 1e-6)


@pytest.mark.cuda
@pytest.mark.parametrize("dependent", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(("width", "dim"), SHAPES)
def test_product(width: int, dim: int, dtype: torch.dtype, tolerance: float, dependent: bool) -> None:
    x, weight = vector(dim, dtype), matrix(width, dim, dtype)
    dependent = dependent and matvec.dependent_launch_on(x.device)
    expected = F.linear(x.double(), weight.double())
    out = matvec.product(x, weight, dependent)
    assert out.shape == (1, 1, width)
    assert out.dtype is dtype
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    residual = torch.randn(1, 1, width, device="cuda", dtype=dtype)
    out = matvec.product(x, weight, dependent, residual)
    torch.testing.assert_close(out.double(), expected + residual.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.cuda
@pytest.mark.parametrize("dependent", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(("width", "dim"), SHAPES)
def test_swiglu(width: int, dim: int, dtype: torch.dtype, tolerance: float, dependent: bool) -> None:
    x, gate, up = vector(dim, dtype), matrix(width, dim, dtype), matrix(width, dim, dtype)
    dependent = dependent and matvec.dependent_launch_on(x.device)
    gain = 1 + torch.randn(dim, device="cuda", dtype=dtype)
    for given, norm in ((x.double(), None), (normed(x, gain), gain)):
        expected = F.silu(F.linear(given, gate.double())) * F.linear(given, up.double())
        out = matvec.swiglu(x, gate, up, dependent, norm, 1e-6)
        assert out.shape == (1, 1, width)
        torch.testing.assert_close(out.double(), expected, rtol=4 * tolerance, atol=4 * tolerance)


@pytest.mark.cuda
@pytest.mark.parametrize("in_chain", [True, False])
def test_a_kernel_that_starts_early_reads_what_the_one_before_it_wrote(in_chain: bool) -> None:
    """A chain of them, each of which must wait for the one before: replayed, many times over."""
    if not matvec.dependent_launch_on(torch.device("cuda")):
        pytest.skip("needs a Hopper card or a later one")
    weights = [matrix(1024, 1024, torch.float32) for _ in range(16)]

    def chain(dependent: bool) -> Tensor:
        x = start
        for weight in weights:
            x = matvec.product(x, weight, dependent, residual=x, in_chain=in_chain)
        return x

    start = vector(1024, torch.float32).contiguous()
    chain(True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(True)
    for _ in range(50):
        start.normal_()
        graph.replay()
        assert torch.equal(out, chain(False))


def test_a_cpu_takes_none() -> None:
    assert not matvec.takes_token(torch.zeros(1, 1, 8))


@pytest.mark.cuda
def test_a_single_token_is_taken() -> None:
    x = torch.zeros(1, 2, 8, device="cuda")
    assert matvec.takes_token(x[:, :1]) is HAS_TRITON
    assert not matvec.takes_token(x)
    assert not matvec.takes_token(x[:, :1].double())


@pytest.mark.cuda
@pytest.mark.parametrize(("dim", "rows", "weights"), [(1024, 3072, 2), (3072, 1024, 1), (130, 77, 1), (25600, 5120, 2)])
def test_a_tile_covers_rows_that_others_do_not(dim: int, rows: int, weights: int) -> None:
    block, each = matvec.tile(dim, rows, weights)
    assert block >= dim
    assert rows % each == 0
