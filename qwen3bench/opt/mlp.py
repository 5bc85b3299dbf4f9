"""`mlp`: one gate-up product over one stored weight, SiLU and product fused into it or in one kernel after it.

The idea of Liger-Kernel's SwiGLU (arXiv:2410.10989) and of gpt-fast's stacked projections. Where that is faster the
product is never written: for many tokens on cards since Hopper by tiles, and for a single one, where reading the
weights is all the work, by a kernel that reads gate's and up's together, and one for the down projection.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen3bench.config.model_config import ModelConfig
from qwen3bench.kernels import matvec
from qwen3bench.kernels.swiglu import SwiGLUDown, best_tile, multiprocessors_for_tiles, silu_mul, swiglu_tiles
from qwen3bench.model.gradients import asked_for
from qwen3bench.model.layers import FeedForward
from qwen3bench.model.parts import Parts
from qwen3bench.model.stack import StackedLinears


def token_feed_forward(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """down (SiLU(gate x) · up x) of a single token x (…, dim), on CUDA: to (…, dim), in two Triton kernels.

    `gate_up` (2·width, dim) holds the gate's rows, then the up's; `down` (dim, width).
    """
    gate, up = gate_up.chunk(2)
    dependent = matvec.dependent_launch_on(x.device)
    return matvec.product(matvec.swiglu(x, gate, up, dependent), down, dependent)


# To torch.compile it is one operation: of Triton kernels of ours that it launches itself none is launched early.
compiled_token_feed_forward = torch.library.custom_op(
    "qwen3bench::token_feed_forward", token_feed_forward, mutates_args=()
)
compiled_token_feed_forward.register_fake(lambda x, *rest: torch.empty_like(x))


class FusedFeedForward(FeedForward, StackedLinears):
    """SwiGLU with one gate-up product; fc1 and fc2 are the two halves of one stored weight."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.stack("fc1", "fc2")

    def pack(self) -> None:
        super().pack()
        self._multiprocessors = multiprocessors_for_tiles(self.stacked_weight)

    def forward(self, x: Tensor) -> Tensor:
        weight, tokens = self.stacked_weight, x.numel() // x.shape[-1]
        if torch.is_grad_enabled() and asked_for(x, self.fc1.weight, self.fc2.weight, self.fc3.weight):
            return self._with_gradient(x)
        if matvec.takes_token(x):
            feed_forward = compiled_token_feed_forward if torch.compiler.is_compiling() else token_feed_forward
            return feed_forward(x, weight, self.fc3.weight)
        if tile := best_tile(tokens, weight.shape[0] // 2, weight.shape[1], self._multiprocessors):
            return self.fc3(swiglu_tiles(x, weight, tile))
        return self.fc3(silu_mul(self.product(x)))

    def _with_gradient(self, x: Tensor) -> Tensor:
        """The product is written, as backward needs it; compilers fuse the plain operations, backward's too."""
        gate_up = self.product(x)
        if torch.compiler.is_compiling():
            gate, up = gate_up.chunk(2, dim=-1)
            return self.fc3(F.silu(gate) * up)
        out: Tensor = SwiGLUDown.apply(gate_up, self.fc3.weight)
        return out


def apply(parts: Parts) -> Parts:
    """The parts with the fused feed-forward."""
    return replace(parts, mlp=FusedFeedForward)
