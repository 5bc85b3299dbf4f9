"""SwiGLU of many tokens: in one kernel behind the product, and in tiles that never write the product."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwen3bench.kernels.swiglu import (
    SIDE_BY_SIDE,
    TILES,
    Tile,
    best_tile,
    multiprocessors_for_tiles,
    silu_mul,
    swiglu_tiles,
)


def plain(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.double().chunk(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up


@pytest.mark.parametrize("shape", [(2, 3, 14), (1, 256), (5, 1, 2)])
def test_silu_mul(shape: tuple[int, ...]) -> None:
    for dtype, rtol in ((torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 2**-7)):
        gate_up = (4 * torch.randn(shape)).to(dtype)
        out = silu_mul(gate_up)
        assert out.shape == (*shape[:-1], shape[-1] // 2)
        assert out.dtype is dtype
        torch.testing.assert_close(out.double(), plain(gate_up), rtol=rtol, atol=0)


def test_silu_is_of_the_gate_and_not_of_the_up_half() -> None:
    assert silu_mul(torch.tensor([-30.0, 5.0])).abs() < 1e-10
    assert silu_mul(torch.tensor([5.0, -30.0])) == pytest.approx(-149.0, abs=0.1)


@pytest.mark.cuda
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-8), (torch.float16, 2**-10)])
@pytest.mark.parametrize("shape", [(1, 1, 6144), (2, 511, 51200), (3, 7, 2 * 77), (1, 2048, 6144)])
def test_silu_mul_on_cuda_is_one_kernel_and_right(shape: tuple[int, ...], dtype: torch.dtype, rtol: float) -> None:
    gate_up = 4 * torch.randn(shape, device="cuda", dtype=dtype)
    expected = plain(gate_up)
    torch.testing.assert_close(silu_mul(gate_up).double(), expected, rtol=rtol, atol=1e-7)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        silu_mul(gate_up)
        torch.cuda.synchronize()
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert [kernel.name for kernel in kernels] == ["_silu_mul_kernel"]


needs_tiles = pytest.mark.skipif(
    not (torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9),
    reason="needs a Hopper card or a later one",
)


@needs_tiles
@pytest.mark.cuda
@pytest.mark.parametrize("tile", [*TILES, SIDE_BY_SIDE])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize(("rows", "width", "dim"), [(512, 3072, 1024), (2049, 3072, 1024), (1, 77, 200), (300, 136, 8)])
def test_tiles_are_swiglu(rows: int, width: int, dim: int, dtype: torch.dtype, tolerance: float, tile: Tile) -> None:
    weight = torch.randn(2 * width, dim, device="cuda", dtype=dtype) * dim**-0.5
    x = torch.randn(2, rows, dim, device="cuda", dtype=dtype)[1:]
    assert multiprocessors_for_tiles(weight) == torch.cuda.get_device_properties().multi_processor_count
    out = swiglu_tiles(x, weight, tile)
    assert out.shape == (1, rows, width)
    assert out.dtype is dtype
    torch.testing.assert_close(out.double(), plain(x.double() @ weight.double().T), rtol=tolerance, atol=1e-3)


@pytest.mark.parametrize(
    ("tokens", "width", "dim", "expected"),
    [
        (8192, 3072, 1024, SIDE_BY_SIDE),
        (8192, 3072, 2048, TILES[0]),
        (2048, 3072, 1024, SIDE_BY_SIDE),
        (1536, 3072, 1024, None),  # 576 tiles: two waves of 264, and a third with 48
        (1024, 3072, 1024, None),  # the small ones would take two waves
        (512, 3072, 1024, TILES[1]),
        (256, 3072, 1024, TILES[2]),
        (8, 12288, 4096, None),  # a tile would be empty for the most part
        (512, 12288, 4096, TILES[0]),
    ],
)
def test_tiles_where_the_last_wave_is_full(tokens: int, width: int, dim: int, expected: Tile | None) -> None:
    assert best_tile(tokens, width, dim, multiprocessors=132) == expected


def test_a_cpu_has_no_tiles() -> None:
    weight = torch.zeros(16, 8, dtype=torch.bfloat16)
    assert multiprocessors_for_tiles(weight) == 0
    assert best_tile(8192, 3072, 1024, multiprocessors=0) is None
