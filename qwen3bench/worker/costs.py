"""What a workload costs at least: floating-point operations and bytes moved, from the shapes.

The numerators of MFU (Chowdhery et al., arXiv:2204.02311, appendix B) and of MBU. Not counted are norms,
rotary embedding, softmax and SiLU, some 0.1 % of the operations.
"""

from __future__ import annotations

from typing import NamedTuple

from qwen3bench.config.model_config import ModelConfig
from qwen3bench.record.messages import Cost
from qwen3bench.worker.workloads import WorkloadSize

_TOKEN_ID_BYTES = 8  # int64


class ForwardShape(NamedTuple):
    """One forward: tokens of each sequence, position of the first, and logits computed."""

    queries: int
    start: int
    logits: int


def cell_cost(config: ModelConfig, tied: bool, size: WorkloadSize, dtype_bytes: int) -> Cost:
    """Operations and bytes of one timed value of a workload: the least that any cell can do with.

    A training step costs three forwards (Chowdhery et al., appendix B: backward's products are twice the forward's),
    each pair of query and key once, where PaLM's own convention counts all pairs. What is recomputed does not count,
    and its bytes are not known.
    The same for every cell but for the embedding's rows, which a `tied` model has read with the head.
    """
    flops = moved = 0
    for shape in forwards(size):
        pairs = causal_pairs(shape.queries, shape.start)
        flops += forward_flops(config, size.batch_size, shape.queries, pairs, shape.logits)
        moved += _forward_bytes(config, tied, size, shape, dtype_bytes)
    return Cost(flops=3 * flops) if size.name == "train" else Cost(flops=flops, bytes=moved)


def forwards(size: WorkloadSize) -> list[ForwardShape]:
    """The forwards of one timed value."""
    n = size.prompt_tokens
    if size.name in ("prefill", "train"):
        return [ForwardShape(n, 0, min(size.logits_to_keep or n, n))]
    if size.name == "decode":
        return [ForwardShape(1, n, 1)]
    return [ForwardShape(n, 0, 1)] + [ForwardShape(1, n + i, 1) for i in range(size.new_tokens - 1)]


def least_resident_bytes(config: ModelConfig, size: WorkloadSize, dtype_bytes: int) -> int:
    """Bytes of memory that the baseline needs for a workload beside its weights, at the least.

    Its KV cache, and of one forward what is largest: the scores of a block with their softmax, or the logits.
    """
    n = size.prompt_tokens
    shapes = [*forwards(size), *([ForwardShape(n, 0, 1)] if size.cache_capacity else [])]  # which fills the cache
    largest = max(
        max(2 * config.num_heads * each.queries * (each.start + each.queries), each.logits * config.vocab_size)
        for each in shapes
    )
    cache = config.num_layers * 2 * config.num_kv_heads * config.head_dim * size.cache_capacity
    return dtype_bytes * size.batch_size * (largest + cache)


def causal_pairs(queries: int, start: int) -> int:
    """Pairs of a query and a key that it may attend, in one head: t·(t + 1)/2 where nothing is cached."""
    return queries * start + queries * (queries + 1) // 2


def forward_flops(config: ModelConfig, batch_size: int, queries: int, pairs: int, logits: int) -> int:
    """Operations of the matrix products of one forward, a multiply-add as two.

    `pairs` of query and key meet in each head (`causal_pairs`: each once; an implementation that masks
    afterwards computes queries × keys), and the head computes `logits` positions of each sequence.
    """
    attention = 4 * config.head_dim * config.num_heads * pairs  # q kᵀ and its product with v
    per_sequence = config.num_layers * (2 * queries * config.block_weights + attention)
    return batch_size * (per_sequence + 2 * logits * config.emb_dim * config.vocab_size)


def _forward_bytes(config: ModelConfig, tied: bool, size: WorkloadSize, shape: ForwardShape, dtype_bytes: int) -> int:
    """Weights once, the residual stream into and out of each block, cached keys and values, the logits."""
    layers, width = config.num_layers, config.emb_dim
    norms = 2 * width + 2 * config.head_dim
    weights = layers * (config.block_weights + norms) + width + config.vocab_size * width
    tokens = size.batch_size * shape.queries
    rows = 0 if tied else min(tokens, config.vocab_size) * width
    stream = 2 * layers * tokens * width
    cached = shape.start + shape.queries if size.cache_capacity else 0  # those before are read, the new ones written
    cache = size.batch_size * layers * 2 * config.num_kv_heads * config.head_dim * cached
    out = size.batch_size * shape.logits * config.vocab_size
    return dtype_bytes * (weights + rows + stream + cache + out) + _TOKEN_ID_BYTES * tokens
