"""`norm`: each RMSNorm in one kernel (`torch.nn.functional.rms_norm`), the query and key norms too.

On CUDA PyTorch has a fused kernel; on a CPU the same call is made of elementary operations.
"""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from qwen3bench.model.layers import RMSNorm
from qwen3bench.model.parts import Parts


class FusedRMSNorm(RMSNorm):
    """RMSNorm as one call; input and output (…, dim)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def apply(parts: Parts) -> Parts:
    """The parts with fused norms."""
    return replace(parts, norm=FusedRMSNorm)
