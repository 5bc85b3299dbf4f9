"""Cross-entropy and its gradient in one pass over logits, written over them: the kernel of `flce`.

The maximum and the sum of a row are found together (online softmax, arXiv:1805.02867), then the row is read once more
and its gradient written in its place. Computed in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen3bench.kernels import HAS_TRITON

_BLOCK = 8192  # logits of one program at once: with 16 warps 16 a thread
if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _cross_entropy_kernel(logits, targets, scale, loss, vocabulary, ignored, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(0).to(tl.int64)
        start = logits + row * vocabulary
        target = tl.load(targets + row)
        column = tl.arange(0, BLOCK)
        counts = target != ignored
        highest = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for first in range(0, vocabulary, BLOCK):
            inside = first + column < vocabulary
            values = tl.load(start + first + column, mask=inside, other=float("-inf")).to(tl.float32)
            above = tl.maximum(highest, values)
            at = tl.where(above == float("-inf"), 0.0, above)  # where nothing has been read yet
            total = total * tl.exp(highest - at) + tl.exp(values - at)
            highest = above
        top = tl.max(highest, axis=0)
        total = tl.sum(total * tl.exp(highest - top), axis=0)
        own = tl.load(start + tl.where(counts, target, 0)).to(tl.float32)
        tl.store(loss + row, tl.where(counts, tl.log(total) + (top - own), 0.0))
        share = tl.where(counts, tl.load(scale), 0.0)
        tl.debug_barrier()  # the target's logit is read before it is written over
        for first in range(0, vocabulary, BLOCK):
            inside = first + column < vocabulary
            values = tl.load(start + first + column, mask=inside, other=float("-inf")).to(tl.float32)
            found = tl.exp(values - top) / total - tl.where(first + column == target, 1.0, 0.0)
            tl.store(start + first + column, (found * share).to(logits.dtype.element_ty), mask=inside)


def cross_entropy_(logits: Tensor, targets: Tensor, scale: Tensor, ignored: int) -> Tensor:
    """Each row's cross-entropy (n) of logits (n, vocabulary), which become the gradient of `scale` × their sum.

    Rows whose target is `ignored` count nothing. One Triton kernel on CUDA; plain operations elsewhere.
    """
    if not (HAS_TRITON and logits.is_cuda) or logits.dtype is torch.float64:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        counts = targets != ignored
        chosen = targets.clamp(min=0)[:, None]
        logs = wide.log_softmax(-1)
        loss = torch.where(counts, -logs.gather(1, chosen)[:, 0], 0.0)
        gradient = logs.exp_()
        gradient.scatter_add_(1, chosen, -torch.ones_like(chosen, dtype=gradient.dtype))
        logits.copy_(gradient * torch.where(counts, scale, 0.0)[:, None])
        return loss
    loss = torch.empty(len(logits), device=logits.device, dtype=torch.float32)
    _cross_entropy_kernel[(len(logits),)](
        logits, targets, scale, loss, logits.shape[1], ignored, BLOCK=_BLOCK, num_warps=16
    )
    return loss
