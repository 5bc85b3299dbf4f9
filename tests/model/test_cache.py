"""The cache of keys and values: decoding through it is the full forward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwen3bench import ModelConfig, build_model
from qwen3bench.model.cache import KVCache


def test_shape_and_bytes(tiny: ModelConfig) -> None:
    cache = KVCache(tiny, batch_size=3, capacity=7, device="cpu", dtype=torch.bfloat16)
    assert cache.keys.shape == cache.values.shape == (2, 3, 2, 7, 16)
    assert cache.num_bytes == 2 * (2 * 3 * 2 * 7 * 16) * 2
    for index in range(2):
        keys, values = cache.layer(index)
        keys.fill_(index + 1)
        values.fill_(-index - 1)
    assert (cache.keys[0] == 1).all()
    assert (cache.keys[1] == 2).all()
    assert (cache.values[1] == -2).all()


@pytest.mark.parametrize("prompt_tokens", [1, 6, 12])
def test_decoding_is_the_full_forward(
    tiny: ModelConfig, tiny_weights: dict[str, Tensor], each_cell: tuple[str, ...], prompt_tokens: int
) -> None:
    """Prefill, then one token at a time; what lies behind the filled positions is never read."""
    model = build_model(tiny, each_cell, tiny_weights)
    tokens = torch.randint(0, tiny.vocab_size, (2, 13))
    cache = KVCache(tiny, 2, 20, "cpu", torch.float32)
    cache.keys.fill_(float("nan"))
    cache.values.fill_(float("nan"))
    steps = [model(tokens[:, :prompt_tokens], cache)]
    steps += [model(tokens[:, i : i + 1], cache, start=i) for i in range(prompt_tokens, 13)]
    torch.testing.assert_close(torch.cat(steps, dim=1), model(tokens), rtol=0, atol=1e-4)
    assert cache.keys[..., :13, :].isfinite().all()
    assert cache.values[..., 13:, :].isnan().all()


def test_a_chunk_against_a_cache_sees_it_and_its_own_past(
    tiny: ModelConfig, tiny_weights: dict[str, Tensor], each_cell: tuple[str, ...]
) -> None:
    model = build_model(tiny, each_cell, tiny_weights)
    tokens = torch.randint(0, tiny.vocab_size, (2, 13))
    cache = KVCache(tiny, 2, 13, "cpu", torch.float32)
    model(tokens[:, :5], cache)
    torch.testing.assert_close(model(tokens[:, 5:], cache, start=5), model(tokens)[:, 5:], rtol=0, atol=1e-4)


def test_a_step_can_be_taken_again(
    tiny: ModelConfig, tiny_weights: dict[str, Tensor], all_opts: tuple[str, ...]
) -> None:
    """A decode workload repeats one step over the same cache: the step must not depend on the last one."""
    for opts in ((), all_opts):
        model = build_model(tiny, opts, tiny_weights)
        tokens = torch.randint(0, tiny.vocab_size, (2, 9))
        cache = KVCache(tiny, 2, 9, "cpu", torch.float32)
        model(tokens[:, :8], cache)
        first = model(tokens[:, 8:], cache, start=8)
        assert torch.equal(model(tokens[:, 8:], cache, start=8), first)


def test_a_full_cache_is_an_error(tiny: ModelConfig, tiny_weights: dict[str, Tensor]) -> None:
    model = build_model(tiny, (), tiny_weights)
    cache = KVCache(tiny, 1, 4, "cpu", torch.float32)
    with pytest.raises(RuntimeError):
        model(torch.zeros(1, 5, dtype=torch.long), cache)
