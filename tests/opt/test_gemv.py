"""`gemv`: a decoder block in five kernels, where it is given a single token."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen3bench import ModelConfig, build_model
from qwen3bench.model.cache import KVCache
from qwen3bench.model.decoder import Decoder
from qwen3bench.model.qwen3 import Qwen3Model
from qwen3bench.opt import gemv
from qwen3bench.opt.gemv import FusedTokenBlock

FIVE_KERNELS = ["_project_kernel", "_token_attention_kernel", "_product_kernel", "_swiglu_kernel", "_product_kernel"]


def decode(model: Qwen3Model, tokens: Tensor, filled: KVCache, spare: int = 3) -> tuple[Tensor, KVCache]:
    """Logits of the last token after a cache that holds the others, and the cache; what is empty in it is NaN."""
    weight, n = model.tok_emb.weight, tokens.shape[1] - 1
    cache = KVCache(model.config, tokens.shape[0], n + 1 + spare, weight.device, weight.dtype)
    for mine, theirs in ((cache.keys, filled.keys), (cache.values, filled.values)):
        mine.fill_(float("nan"))
        mine[..., :n, :] = theirs[..., :n, :]
    return model(tokens[:, -1:], cache, start=n), cache


def reference(config: ModelConfig, weights: dict[str, Tensor], tokens: Tensor) -> tuple[Tensor, KVCache]:
    """The baseline's logits of the last token in float64 and its cache, prefilled in one forward."""
    model = build_model(config, (), weights, dtype=torch.float64)
    cache = KVCache(config, tokens.shape[0], tokens.shape[1], tokens.device, torch.float64)
    return model(tokens, cache, logits_to_keep=1), cache


def blocks(model: Qwen3Model) -> list[FusedTokenBlock]:
    return [module for module in model.modules() if isinstance(module, FusedTokenBlock)]


def error(x: Tensor, expected: Tensor) -> float:
    return float((x.double() - expected).norm() / expected.norm())


def on_cuda(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    moved = {name: tensor.cuda() for name, tensor in weights.items()}
    return moved | {"lm_head.weight": moved["model.embed_tokens.weight"]}


def random_tokens(config: ModelConfig, batch: int, length: int) -> Tensor:
    return torch.randint(config.vocab_size, (batch, length))


def test_every_block_is_replaced(tiny: ModelConfig) -> None:
    assert len(blocks(build_model(tiny, ("gemv",), device="meta"))) == tiny.num_layers


def test_without_cuda_it_is_the_stock_block(tiny: ModelConfig, tiny_weights: dict[str, Tensor]) -> None:
    tokens = random_tokens(tiny, 1, 7)
    _, filled = reference(tiny, tiny_weights, tokens)
    logits = [decode(build_model(tiny, opts, tiny_weights), tokens, filled)[0] for opts in ((), ("gemv",))]
    assert torch.equal(*logits)


def test_counters_are_zero_whatever_happens_to_the_module(tiny: ModelConfig, tiny_weights: dict[str, Tensor]) -> None:
    model = build_model(tiny, ("gemv",), tiny_weights)
    for changed in (model, copy.deepcopy(model), copy.deepcopy(model).to(torch.bfloat16)):
        for block in blocks(changed):
            assert block.arrivals.dtype is torch.int32
            assert block.arrivals.tolist() == [0] * tiny.num_heads
    assert all("arrivals" not in name for name in model.state_dict())


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [2, 32, 33, 70, 512, 2500])
@pytest.mark.parametrize("shape", [{}, {"emb_dim": 80, "num_heads": 5, "num_kv_heads": 1, "hidden_dim": 176}])
def test_a_single_token_on_cuda(
    tiny: ModelConfig, tiny_weights: dict[str, Tensor], shape: dict[str, Any], length: int, dtype: torch.dtype
) -> None:
    from qwen3bench.worker.equivalence.judged_weights import sensitized

    config = replace(tiny, context_length=4096, **shape)
    weights = sensitized(config, torch.device("cuda"), dtype, seed=0)
    tokens = random_tokens(config, 1, length).cuda()
    expected, filled = reference(config, weights, tokens)
    plain, _ = decode(build_model(config, (), weights, dtype=dtype), tokens, filled)
    model = build_model(config, ("gemv",), weights, dtype=dtype)
    logits, cache = decode(model, tokens, filled)
    assert error(logits, expected) <= 2 * error(plain, expected)
    for mine, theirs in ((cache.keys, filled.keys), (cache.values, filled.values)):
        assert error(mine[..., length - 1, :], theirs[..., length - 1, :]) < (1e-4 if dtype is torch.float32 else 5e-2)
        assert bool(mine[..., length:, :].isnan().all())
    assert not any(block.arrivals.any() for block in blocks(model))
    assert torch.equal(decode(model, tokens, filled)[0], logits)


@pytest.mark.cuda
def test_a_block_is_five_kernels(tiny: ModelConfig, tiny_weights: dict[str, Tensor]) -> None:
    weights = on_cuda(tiny_weights)
    tokens = random_tokens(tiny, 1, 40).cuda()
    _, filled = reference(tiny, weights, tokens)
    model = build_model(tiny, ("gemv",), weights)
    decode(model, tokens, filled)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        decode(model, tokens, filled)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert [name for name in kernels if name in FIVE_KERNELS] == FIVE_KERNELS * tiny.num_layers


@pytest.mark.cuda
def test_the_compiler_is_told_what_the_block_writes(tiny: ModelConfig, tiny_weights: dict[str, Tensor]) -> None:
    model = build_model(tiny, ("gemv",), on_cuda(tiny_weights))
    given: list[tuple[Any, ...]] = []

    def look(*args: Any) -> Any:
        given.append(args)
        return args[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gemv, "token_block", look)
        cache = KVCache(tiny, 1, 8, torch.device("cuda"), torch.float32)
        model(random_tokens(tiny, 1, 1).cuda(), cache, start=4)
    operation = gemv.compiled_token_block
    torch.library.opcheck(operation, given[0], test_utils=("test_schema", "test_faketensor"))


@pytest.mark.cuda
def test_replayed_and_compiled_it_computes_the_same(tiny: ModelConfig, tiny_weights: dict[str, Tensor]) -> None:
    from qwen3bench.worker.runtimes import make_runtime

    weights = on_cuda(tiny_weights)
    tokens = random_tokens(tiny, 1, 40).cuda()
    _, filled = reference(tiny, weights, tokens)
    eager, cache = decode(build_model(tiny, ("gemv",), weights), tokens, filled)
    for name in ("graph", "compile"):
        runtime = make_runtime(name, torch.device("cuda"))
        model = runtime.prepare_model(build_model(tiny, ("gemv",), weights)).model
        outputs: list[Tensor] = []

        def step(model: Decoder = model, outputs: list[Tensor] = outputs) -> Tensor:
            outputs[:] = [model(tokens[:, -1:], cache, start=39)]
            return outputs[0]

        launch = runtime.prepare(step).launch
        for _ in range(3):
            launch()
        torch.testing.assert_close(outputs[0], eager, rtol=1e-4, atol=1e-4)


@pytest.mark.cuda
def test_more_than_one_token_takes_the_stock_block(tiny: ModelConfig, tiny_weights: dict[str, Tensor]) -> None:
    weights = on_cuda(tiny_weights)
    plain, fused = (build_model(tiny, opts, weights) for opts in ((), ("gemv",)))
    tokens = random_tokens(tiny, 3, 8).cuda()
    assert torch.equal(plain(tokens), fused(tokens))
    _, filled = reference(tiny, weights, tokens)
    assert torch.equal(decode(plain, tokens, filled)[0], decode(fused, tokens, filled)[0])
