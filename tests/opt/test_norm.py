"""`norm`: every RMSNorm is one fused call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3bench import ModelConfig, build_model
from qwen3bench.model.layers import RMSNorm
from qwen3bench.opt.norm import FusedRMSNorm


def norms(config: ModelConfig, opts: tuple[str, ...]) -> list[RMSNorm]:
    return [module for module in build_model(config, opts, device="meta").modules() if isinstance(module, RMSNorm)]


def test_every_norm_is_fused_the_query_and_key_norms_too(tiny: ModelConfig) -> None:
    fused = norms(tiny, ("norm",))
    assert [type(norm) for norm in fused] == [FusedRMSNorm] * (4 * tiny.num_layers + 1)
    assert [type(norm) for norm in norms(tiny, ("flash", "tie", "mlp", "mask"))] == [RMSNorm] * len(fused)


def test_one_call_for_each_norm_with_its_weight_and_eps(
    tiny: ModelConfig, tiny_weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []
    real = F.rms_norm

    def spy(*args: Any) -> Tensor:
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(F, "rms_norm", spy)
    tokens = torch.zeros(2, 3, dtype=torch.long)
    build_model(tiny, (), tiny_weights)(tokens)
    assert calls == []
    build_model(tiny, ("norm",), tiny_weights)(tokens)
    assert len(calls) == 4 * tiny.num_layers + 1
    assert {eps for *_, eps in calls} == {tiny.rms_norm_eps}
    pointers = {weight.data_ptr() for _, _, weight, _ in calls}
    assert pointers == {t.data_ptr() for name, t in tiny_weights.items() if name.endswith("norm.weight")}


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x, weight = x.double(), weight.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


@pytest.mark.parametrize("kind", [RMSNorm, FusedRMSNorm])
@pytest.mark.parametrize(
    ("dtype", "rtol"),
    [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-10)],
)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])  # at the small one eps decides
def test_norm_is_exact_to_its_dtypes_rounding(
    kind: type[RMSNorm], dtype: torch.dtype, rtol: float, scale: float
) -> None:
    norm = kind(48, eps=1e-6).requires_grad_(False)
    norm.weight.normal_(1, 0.3)
    norm.to(dtype)
    x = (scale * torch.randn(2, 5, 48)).to(dtype)
    out = norm(x)
    assert out.dtype is dtype
    torch.testing.assert_close(out.double(), reference(x, norm.weight, 1e-6), rtol=rtol, atol=1e-7)


def test_eps_is_used() -> None:
    x = torch.full((1, 4), 1e-3)
    for kind in (RMSNorm, FusedRMSNorm):
        assert kind(4, eps=1e-6)(x)[0, 0].item() == pytest.approx(0.5**0.5, rel=1e-5)
        assert kind(4, eps=3e-6)(x)[0, 0].item() == pytest.approx(0.5, rel=1e-5)


@pytest.mark.cuda
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-8), (torch.float16, 2**-10)])
@pytest.mark.parametrize("shape", [(1, 1, 1024), (2, 511, 16, 128), (1, 2048, 5120), (3, 7, 77), (1, 1, 8, 128)])
def test_norm_on_cuda_is_one_kernel_and_right(shape: tuple[int, ...], dtype: torch.dtype, rtol: float) -> None:
    norm = FusedRMSNorm(shape[-1], eps=1e-6).requires_grad_(False)
    norm.weight.normal_(1, 0.3)
    norm.to("cuda", dtype)
    x = torch.randn(shape, device="cuda", dtype=dtype)
    expected = reference(x, norm.weight, 1e-6)
    torch.testing.assert_close(norm(x).double(), expected, rtol=rtol, atol=1e-7)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        norm(x)
        torch.cuda.synchronize()
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 1, [kernel.name for kernel in kernels]


@pytest.mark.cuda
def test_norm_on_cuda_reads_strided_rows() -> None:
    norm = FusedRMSNorm(128, eps=1e-6).to("cuda").requires_grad_(False)
    x = torch.randn(2, 5, 384, device="cuda")[..., 128:256]
    torch.testing.assert_close(norm(x).double(), reference(x, norm.weight, 1e-6), rtol=1e-5, atol=1e-7)
