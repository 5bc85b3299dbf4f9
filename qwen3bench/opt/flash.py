"""`flash`: fused attention, which never writes the scores to memory.

FlashAttention (arXiv:2205.14135, 2307.08691) through `torch.nn.functional.scaled_dot_product_attention`, with
grouped heads served natively where a fused kernel does so. Which kernel runs is PyTorch's choice unless `backend`
forces one. With `decode=split` a single sequence's token takes a kernel of ours, made for it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from qwen3bench.errors import UserError
from qwen3bench.kernels import token_attention
from qwen3bench.model.attention import Mask, MaskScores
from qwen3bench.model.gradients import asked_for
from qwen3bench.model.parts import Parts

# To torch.compile it is one operation: a Triton kernel of ours that it launches itself is not launched early.
compiled_split_attention = torch.library.custom_op(
    "qwen3bench::split_attention", token_attention.split_attention, mutates_args=()
)
compiled_split_attention.register_fake(lambda q, k, v: q.new_empty(q.shape))

SDPA, SPLIT = "sdpa", "split"
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


_PREFERS_CUDNN = (9, 10)  # major compute capabilities; elsewhere PyTorch takes math before cuDNN (its sdp_utils.cpp)


@cache
def takes_grouped(device: torch.device, dtype: torch.dtype, masked: bool, single: bool) -> bool:
    """Whether PyTorch has a fused kernel there for grouped heads as they are, with a mask tensor, for a single query.

    FlashAttention and cuDNN are such kernels; the memory-efficient one is none, and without either PyTorch falls to
    separate operations. It is left to do so in float32, in which no card has either, and on a CPU.
    """
    if device.type != "cuda" or dtype.itemsize != 2:
        return True
    queries, keys = (1, 64) if single else (64, 64)
    q = torch.empty(1, 2, queries, 64, device=device, dtype=dtype)
    kv = torch.empty(1, 1, keys, 64, device=device, dtype=dtype)
    mask = torch.zeros(queries, keys, device=device, dtype=dtype) if masked else None
    asked = SDPAParams(q, kv, kv, mask, 0.0, not (masked or single), True)
    prefers_cudnn = torch.cuda.get_device_capability(device)[0] in _PREFERS_CUDNN
    return can_use_flash_attention(asked) or (prefers_cudnn and can_use_cudnn_attention(asked))


@dataclass(unsafe_hash=True)
class FlashAttention:
    """Attention in one kernel. Shapes as in `model.attention`.

    With a mask that may stay implicit there is no mask tensor at all: `is_causal`, or nothing for a single query, which
    attends every key (`is_causal` aligns the diagonal top left, so a lone query would see only key 0). A chunk
    against a cache needs an explicit one, for the same reason; PyTorch's boolean mask is True where a query attends.

    Grouped heads go in as they are where a fused kernel takes them so (`grouped`, found once a forward); else each key
    and value head is repeated for the memory-efficient kernel.
    """

    backend: SDPBackend | None = None
    split: bool = False  # one sequence's query without a mask is for `kernels.attention`, where that takes it
    grouped: bool = field(default=True, compare=False)

    def mask(self, mask: Mask, queries: int, start: int, device: torch.device, dtype: torch.dtype) -> Tensor | None:
        implicit = mask.implicit and (queries == 1 or start == 0)
        self.grouped = self.backend is not SDPBackend.EFFICIENT_ATTENTION
        if self.backend is None:
            autocast = torch.is_autocast_enabled(device.type)
            computed = torch.get_autocast_dtype(device.type) if autocast else dtype
            self.grouped = takes_grouped(device, computed, not implicit, queries == 1)
        if implicit:
            return None
        dense = mask.dense(queries, start, device, dtype)
        return ~dense if dense.dtype is torch.bool else dense

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, mask_scores: MaskScores) -> Tensor:
        if self.split and mask is None and not asked_for(q, k, v) and token_attention.takes_query(q):
            split = compiled_split_attention if torch.compiler.is_compiling() else token_attention.split_attention
            return split(q, k, v)
        is_causal = False
        if mask is None and q.shape[-2] > 1:  # a branch, as torch.compile may see a symbol, which SDPA does not take
            is_causal = True
        if not self.grouped:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        with self._forced():
            return F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=is_causal,
                enable_gqa=q.shape[1] != k.shape[1],
            )

    def _forced(self) -> AbstractContextManager[None]:
        return nullcontext() if self.backend is None else sdpa_kernel(self.backend)


def apply(parts: Parts, backend: str = "auto", decode: str = SDPA) -> Parts:
    """The parts with fused attention.

    `backend` is auto, flash, cudnn, efficient or math; one that PyTorch cannot use for a cell raises RuntimeError when
    the cell runs. `decode` is sdpa, or split: one sequence's token on CUDA, with `mask` on, takes `kernels.attention`.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise UserError(f"flash.backend={backend!r} is unknown; choose one of auto, {', '.join(BACKENDS)}")
    if decode not in (SDPA, SPLIT):
        raise UserError(f"flash.decode={decode!r} is unknown; choose {SDPA} or {SPLIT}")
    return replace(parts, attend=FlashAttention(BACKENDS.get(backend), decode == SPLIT))
