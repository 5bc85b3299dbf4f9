"""`residual`: the residual sum and the norm after it in one kernel."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qwen3bench import ModelConfig, build_model
from qwen3bench.kernels.add_norm import add_norm
from qwen3bench.model.layers import RMSNorm
from qwen3bench.opt import residual
from qwen3bench.opt.norm import FusedRMSNorm
from qwen3bench.opt.residual import FusedResidual, PendingSum


@pytest.mark.parametrize("beside", [(), ("norm",), ("gemv",), ("flash", "tie", "mlp", "mask", "norm", "rope", "qkv")])
def test_without_triton_it_is_the_baseline(
    tiny: ModelConfig, tiny_weights: dict[str, Tensor], beside: tuple[str, ...]
) -> None:
    tokens = torch.randint(tiny.vocab_size, (2, 9))
    off, on = (build_model(tiny, opts, tiny_weights, dtype=torch.float64) for opts in (beside, (*beside, "residual")))
    for keep in (0, 1, 4):
        assert torch.equal(off(tokens, logits_to_keep=keep), on(tokens, logits_to_keep=keep))


def test_a_block_leaves_its_last_sum_to_the_next_norm(tiny: ModelConfig, tiny_weights: dict[str, Tensor]) -> None:
    streams: list[Any] = []
    model = build_model(tiny, ("residual",), tiny_weights)
    for block in model.trf_blocks:
        block.register_forward_hook(lambda module, given, made: streams.append((given[0], made)))
    model(torch.zeros(1, 3, dtype=torch.long))
    assert isinstance(streams[0][0], Tensor)
    assert [type(made) for _, made in streams] == [PendingSum] * tiny.num_layers
    assert all(later[0] is earlier[1] for earlier, later in pairwise(streams))


class Called(Exception):
    pass


@pytest.fixture
def with_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the kernel could run here; a call of it raises `Called`."""

    def called(*_: Any, **__: Any) -> None:
        raise Called

    monkeypatch.setattr(residual, "takes_sum", lambda x, change: True)
    monkeypatch.setattr(residual, "add_norm", called)


@pytest.mark.usefixtures("with_kernel")
def test_other_norms_take_the_baselines_operations() -> None:
    stream, fused = PendingSum(torch.randn(2, 3, 8), torch.randn(2, 3, 8)), FusedResidual()
    for kind in (RMSNorm, FusedRMSNorm):
        with pytest.raises(Called):
            fused.norm(stream, kind(8, 1e-6).requires_grad_(False))
    total = stream.x + stream.change
    with torch.enable_grad():
        found = fused.norm(stream, norm := nn.LayerNorm(8))
        assert torch.equal(found[0], total)
        assert torch.equal(found[1], norm(total))
        with pytest.raises(Called):  # which has gradients of its own
            fused.norm(stream, RMSNorm(8, 1e-6))
    with pytest.raises(Called), torch.no_grad():
        fused.norm(stream, RMSNorm(8, 1e-6))


@pytest.mark.usefixtures("with_kernel")
def test_where_gradients_are_asked_for_nothing_is_written_over(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def plain(x: Tensor, change: Tensor, gain: Tensor, eps: float, in_place: bool) -> tuple[Tensor, Tensor]:
        asked.append(in_place)
        return x + change, (x + change) * gain

    monkeypatch.setattr(residual, "add_norm", plain)
    norm = RMSNorm(8, 1e-6)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            FusedResidual().norm(PendingSum(torch.randn(2, 8), torch.randn(2, 8)), norm)
    assert asked == [True, False]


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-8), (torch.float16, 2**-10)]
)
@pytest.mark.parametrize("shape", [(1, 1, 1024), (2, 511, 1024), (1, 2048, 5120), (3, 7, 80), (8, 4, 2560), (5, 1, 64)])
def test_the_kernel_is_right_and_writes_nothing_else(
    shape: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    gain = torch.randn(shape[-1], device="cuda").to(dtype)
    for last in (0, 1, 2):
        for in_place in (False, True):
            whole = torch.randn(2, *shape, device="cuda").to(dtype)
            before = whole.clone()
            x, change = whole[:, :, -last:]
            total = before[0][:, -last:] + before[1][:, -last:]
            wide = total.double()
            normed = wide / (wide.square().mean(-1, keepdim=True) + 1e-2).sqrt() * gain.double()
            found = add_norm(x, change, gain, 1e-2, in_place)
            assert torch.equal(found[0], total)
            torch.testing.assert_close(found[1].double(), normed, rtol=tolerance, atol=tolerance)
            assert found[1].dtype is dtype
            assert found[1].is_contiguous()  # of slices too: what is written over them would not be
            if not in_place:
                assert torch.equal(whole, before)
            elif last:
                assert torch.equal(whole[:, :, :-last], before[:, :, :-last])


@pytest.mark.cuda
def test_between_two_blocks_is_one_kernel(tiny: ModelConfig, tiny_weights: dict[str, Tensor]) -> None:
    model = build_model(tiny, ("residual", "norm", "rope"), tiny_weights, device="cuda")
    tokens = torch.randint(tiny.vocab_size, (2, 9), device="cuda")
    model(tokens)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        model(tokens)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert kernels.count("_add_norm_kernel") == 2 * tiny.num_layers
    assert kernels.count("_rms_norm_kernel") == 1  # of the embedded tokens
