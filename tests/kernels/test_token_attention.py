"""Attention of a single query, split among programs, on CUDA."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3bench.kernels import token_attention
from qwen3bench.opt import flash

HEADS = [(16, 8), (5, 1), (3, 3)]
DTYPES = [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)]


def cached(heads: int, kv_heads: int, length: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A query, keys and values: slices of a cache with NaN behind them; the query is transposed as the model's is."""
    q = torch.randn(1, 1, heads, dim, device="cuda", dtype=dtype).transpose(1, 2)
    stored = torch.full((2, 1, kv_heads, length + 5, dim), float("nan"), device="cuda", dtype=dtype)
    stored[..., :length, :].normal_()
    k, v = stored[..., :length, :]
    return q, k, v


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.double(), k.double(), v.double(), enable_gqa=True)


@pytest.mark.cuda
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("length", [1, 31, 32, 33, 513, 2049, 9001])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_it_is_attention(heads: int, kv_heads: int, length: int, dtype: torch.dtype, tolerance: float) -> None:
    for dim in (16, 128):
        q, k, v = cached(heads, kv_heads, length, dim, dtype)
        assert token_attention.takes_query(q)
        contexts = [
            token_attention.split_attention(q, k, v) for _ in range(3)
        ]  # the counters are zero again after each
        assert contexts[0].shape == q.shape
        assert contexts[0].dtype is dtype
        torch.testing.assert_close(contexts[0].double(), reference(q, k, v), rtol=tolerance, atol=tolerance)
        assert all(torch.equal(context, contexts[0]) for context in contexts[1:])


@pytest.mark.cuda
def test_heads_may_lie_in_any_order() -> None:
    q, k, v = cached(4, 2, 70, 32, torch.float32)
    expected = token_attention.split_attention(q, k, v)
    by_position = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    by_dim = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (k, v)]
    assert torch.equal(token_attention.split_attention(q, *by_position), expected)
    assert torch.equal(token_attention.split_attention(q, *by_dim), expected)


def query(*shape: int, dtype: torch.dtype = torch.bfloat16, is_cuda: bool = True) -> Any:
    return SimpleNamespace(shape=shape, dtype=dtype, is_cuda=is_cuda)


def test_it_takes_one_tokens_query_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_attention, "HAS_TRITON", True)
    assert token_attention.takes_query(query(1, 4, 1, 16))
    assert not token_attention.takes_query(query(2, 4, 1, 16))
    assert not token_attention.takes_query(query(1, 4, 2, 16))
    assert not token_attention.takes_query(query(1, 4, 1, 12))
    assert not token_attention.takes_query(query(1, 4, 1, 16, dtype=torch.float64))
    assert not token_attention.takes_query(query(1, 4, 1, 16, is_cuda=False))
    monkeypatch.setattr(token_attention, "HAS_TRITON", False)
    assert not token_attention.takes_query(query(1, 4, 1, 16))


@pytest.mark.cuda
def test_the_compiler_is_told_what_comes_of_it() -> None:
    arguments = cached(4, 2, 33, 16, torch.float32)
    operation = flash.compiled_split_attention
    torch.library.opcheck(operation, arguments, test_utils=("test_schema", "test_faketensor"))
