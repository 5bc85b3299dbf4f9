"""`rope`: head norms, rotation and the write into the cache in one kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qwen3bench import ModelConfig, build_model
from qwen3bench.kernels.norm_rope import heads_tile, norm_rope
from qwen3bench.model.cache import KVCache
from qwen3bench.model.layers import RMSNorm, separate_rope
from qwen3bench.model.parts import Heads
from qwen3bench.opt import rope
from qwen3bench.opt.rope import fused_rope

DTYPES = [(torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)]
# Sequences, tokens, query heads, key heads, head size.
SHAPES = [
    (1, 1, 16, 8, 128),
    (3, 1, 4, 2, 16),
    (2, 33, 16, 8, 128),
    (1, 512, 40, 8, 128),
    (3, 5, 5, 1, 24),
    (1, 7, 3, 3, 80),
]


def projected(shape: tuple[int, ...], side_by_side: bool, **where: Any) -> Heads:
    """Queries, keys and values (b, t, heads, d), tensors of their own or slices of one product."""
    batch, length, q_heads, kv_heads, dim = shape
    product = torch.randn(batch, length, (q_heads + 2 * kv_heads) * dim, **where)
    queries, keys, values = product.split([q_heads * dim, kv_heads * dim, kv_heads * dim], dim=-1)
    if not side_by_side:
        queries, keys, values = queries.contiguous(), keys.contiguous(), values.contiguous()
    queries, keys, values = (x.unflatten(-1, (-1, dim)) for x in (queries, keys, values))
    return queries, keys, values


def head_norms(dim: int, **where: Any) -> tuple[RMSNorm, RMSNorm]:
    """Of queries and keys: other gains, other eps."""
    norms = RMSNorm(dim, 1e-6), RMSNorm(dim, 1e-2)
    for norm in norms:
        nn.init.normal_(norm.weight, 1, 0.5)
        norm.requires_grad_(False).to(**where)
    return norms


def angles_from(start: int, length: int, dim: int, **where: Any) -> tuple[Tensor, Tensor]:
    """Rows of longer tables, as the model hands them over."""
    angles = torch.randn(start + length, dim // 2, dtype=torch.float64).repeat(1, 2)
    return angles.cos().to(**where)[start:], angles.sin().to(**where)[start:]


def prefill_and_decode(model: nn.Module, tokens: Tensor) -> list[Tensor]:
    """Logits without a cache, with one, of a later chunk and of a single token, and what the cache holds."""
    weight, length = model.tok_emb.weight, tokens.shape[1]
    cache = KVCache(model.config, len(tokens), length + 6, weight.device, weight.dtype)
    plain, cached = model(tokens), model(tokens, cache)
    chunk = model(tokens[:, :4], cache, start=length)
    single = model(tokens[:, -1:], cache, start=length + 4)
    return [plain, cached, chunk, single, cache.keys, cache.values]


@pytest.mark.parametrize("beside", [(), ("qkv",), ("flash", "tie", "mlp", "mask", "norm", "residual", "qkv")])
def test_without_triton_it_is_the_baseline(
    tiny: ModelConfig, tiny_weights: dict[str, Tensor], beside: tuple[str, ...]
) -> None:
    tokens = torch.randint(tiny.vocab_size, (2, 9))
    off, on = (
        prefill_and_decode(build_model(tiny, opts, tiny_weights, dtype=torch.float64), tokens)
        for opts in (beside, (*beside, "rope"))
    )
    assert all(map(torch.equal, off, on))


class Called(Exception):
    pass


@pytest.fixture
def with_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the kernel could run here; a call of it raises `Called`."""

    def called(*_: Any, **__: Any) -> None:
        raise Called

    monkeypatch.setattr(rope, "takes_heads", lambda x: True)
    monkeypatch.setattr(rope, "norm_rope", called)


@pytest.mark.usefixtures("with_kernel")
def test_other_norms_take_the_baselines_operations() -> None:
    heads, norms, angles = projected((2, 5, 4, 2, 16), False), head_norms(16), angles_from(3, 5, 16)
    with pytest.raises(Called):
        fused_rope(heads, norms, angles, None, 3)
    identity = nn.Identity(), nn.Identity()
    for other in (identity, (norms[0], nn.Identity())):
        with torch.enable_grad():
            expected = separate_rope(heads, other, angles, None, 3)  # type: ignore[arg-type]
            assert all(map(torch.equal, fused_rope(heads, other, angles, None, 3), expected))  # type: ignore[arg-type]
    for norm in norms:
        norm.requires_grad_(True)
    with pytest.raises(Called), torch.no_grad():
        fused_rope(heads, norms, angles, None, 3)
    with pytest.raises(Called), torch.enable_grad():  # which has gradients of its own
        fused_rope(heads, norms, angles, None, 3)
    cache = torch.zeros(2, 2, 8, 16), torch.zeros(2, 2, 8, 16)
    with torch.enable_grad():  # into a cache nobody trains
        fused_rope(heads, norms, angles, cache, 3)


@pytest.mark.parametrize("multiprocessors", [40, 80, 132])  # a T4, a V100, an H100
def test_a_card_is_filled_and_no_head_is_left_out(multiprocessors: int) -> None:
    for heads, kv_heads in ((16, 8), (64, 8), (5, 1), (24, 12)):
        for tokens in (1, 3, 512, 8192):
            group, chunk = heads_tile(tokens, heads + 2 * kv_heads, kv_heads, 64, multiprocessors)
            assert heads % chunk == kv_heads % chunk == 0
            programs = -(-tokens // group) * (heads + 2 * kv_heads) // chunk
            assert programs >= multiprocessors or group == chunk == 1
            assert group * chunk * 128 <= 4096


@pytest.mark.cuda
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_is_right_and_writes_nothing_else(
    shape: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    batch, length, _, kv_heads, dim = shape
    where: dict[str, Any] = {"device": "cuda", "dtype": dtype}
    for side_by_side in (False, True):
        for in_place in (False, True):
            for cached in (False, True):
                heads, norms, start = projected(shape, side_by_side, **where), head_norms(dim, **where), 3
                angles = angles_from(start, length, dim, **where)
                cache = None
                if cached:
                    capacity = start + length + 2
                    new = torch.full((2, batch, kv_heads, capacity, dim), float("nan"), **where)
                    cache = new[0], new[1]
                wide = tuple(x.double() for x in heads)
                wide_norms = tuple(RMSNorm(dim, norm.eps).to("cuda", torch.float64) for norm in norms)
                for norm, given in zip(wide_norms, norms, strict=True):
                    norm.weight.data.copy_(given.weight)
                wide_cache = None if cache is None else (cache[0].double(), cache[1].double())
                expected = separate_rope(wide, wide_norms, tuple(x.double() for x in angles), wide_cache, start)  # type: ignore[arg-type]
                before = [x.clone() for x in heads]
                stored = None if cache is None else tuple(x[:, :, start : start + length] for x in cache)
                q, k = norm_rope(
                    heads,
                    tuple(norm.weight for norm in norms),
                    tuple(norm.eps for norm in norms),
                    angles,
                    stored,
                    in_place,
                )  # type: ignore[arg-type]
                close: dict[str, Any] = {"rtol": tolerance, "atol": tolerance, "equal_nan": True}
                torch.testing.assert_close(q.transpose(1, 2).double(), expected[0], **close)
                torch.testing.assert_close(k.transpose(1, 2).double(), expected[1][:, :, -length:], **close)
                if cache is not None and wide_cache is not None:
                    for mine, theirs in zip(cache, wide_cache, strict=True):
                        torch.testing.assert_close(mine.double(), theirs, **close)
                assert (q.data_ptr() == heads[0].data_ptr()) == in_place
                untouched = (2,) if in_place and not cached else (1, 2) if in_place else (0, 1, 2)
                assert all(torch.equal(before[i], heads[i]) for i in untouched)


@pytest.mark.cuda
@pytest.mark.parametrize("cached", [False, True])
def test_a_block_has_one_such_kernel(tiny: ModelConfig, tiny_weights: dict[str, Tensor], cached: bool) -> None:
    model = build_model(tiny, ("rope", "norm"), tiny_weights, device="cuda")
    tokens = torch.randint(tiny.vocab_size, (2, 9), device="cuda")
    cache = KVCache(tiny, 2, 12, "cuda", torch.float32) if cached else None
    model(tokens, cache)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        model(tokens, cache)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert kernels.count("_norm_rope_kernel") == tiny.num_layers
    assert kernels.count("_rms_norm_kernel") == 2 * tiny.num_layers + 1


@pytest.mark.cuda
def test_the_compiler_is_told_what_it_writes() -> None:
    where: dict[str, Any] = {"device": "cuda", "dtype": torch.float32}
    q, k, v = projected((2, 5, 4, 2, 16), True, **where)
    norms = head_norms(16, **where)
    given = [norm.weight for norm in norms], [norm.eps for norm in norms], [*angles_from(3, 5, 16, **where)]
    stored = torch.zeros(2, 2, 2, 9, 16, **where)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(rope.compiled_rope, (q, k, v, *given), test_utils=tests)
    torch.library.opcheck(rope.compiled_rope_into_cache, (q, k, v, *given, *stored.unbind(), 3), test_utils=tests)


ALL = ("flash", "tie", "mlp", "mask", "norm", "rope", "residual", "qkv")


@pytest.mark.cuda
@pytest.mark.parametrize("opts", [("rope",), ("residual",), ("rope", "residual"), ALL, (*ALL, "gemv")], ids="+".join)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2.0), (torch.bfloat16, 2.0), (torch.float16, 2.0)])
def test_replayed_and_compiled_it_stays_within_the_baselines_rounding(
    tiny: ModelConfig, opts: tuple[str, ...], dtype: torch.dtype, limit: float
) -> None:
    from qwen3bench.worker.equivalence.judged_weights import sensitized
    from qwen3bench.worker.equivalence.reference import exact_float32
    from qwen3bench.worker.runtimes import make_runtime

    weights = sensitized(tiny, torch.device("cuda"), dtype, seed=0)
    for batch in (1, 3):
        tokens = torch.randint(tiny.vocab_size, (batch, 40), device="cuda")
        with exact_float32():
            expected = prefill_and_decode(build_model(tiny, (), weights, dtype=torch.float64), tokens)
            baseline = prefill_and_decode(build_model(tiny, (), weights, dtype=dtype), tokens)

            def error(found: Tensor, right: Tensor) -> float:
                kept = right.isfinite()
                return float((found.double() - right)[kept].norm() / right[kept].norm())

            compiled = ("compile",) if dtype is torch.bfloat16 and batch == 1 and len(opts) > 2 else ()  # it takes long
            for runtime_name in ("eager", "graph", *compiled):
                runtime = make_runtime(runtime_name, torch.device("cuda"))
                model = runtime.prepare_model(build_model(tiny, opts, weights, dtype=dtype)).model
                found: list[Tensor] = []

                def step(model: Any = model, found: list[Tensor] = found, tokens: Tensor = tokens) -> Tensor:
                    found[:] = prefill_and_decode(model, tokens)
                    return found[0]

                launch = runtime.prepare(step).launch
                launch()
                for mine, theirs, right in zip(found, baseline, expected, strict=True):
                    assert error(mine, right) <= limit * error(theirs, right) + 1e-7
