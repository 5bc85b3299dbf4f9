"""What torch.compile is given of a model: from behind a block's first norm to behind the next block's."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from qwen3bench.model.layers import TransformerBlock


class Region(nn.Module):
    """A block without its first norm, and the norm that follows the block.

    A block ends with a sum and the next begins with a norm of it. Compiled block by block these take two kernels; a
    region that ends with the norm fuses them, as a compiler that is given the whole model does.
    """

    def __init__(self, block: TransformerBlock, next_norm: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.next_norm = next_norm

    def forward(
        self,
        x: Tensor,
        normed: Tensor,
        mask: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        cache: tuple[Tensor, Tensor] | None = None,
        start: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """The block's output and its norm, both (b, t, e); `normed` is x after the block's first norm."""
        x = self.block.after_norm1(x, normed, mask, cos, sin, cache, start)
        return x, self.next_norm(x)


def regions_of(blocks: Sequence[nn.Module], final_norm: nn.Module) -> list[Region]:
    """The regions of these blocks, in order; none where a block has a forward or a hook of its own, to be passed by."""
    plain = [block for block in blocks if isinstance(block, TransformerBlock) and _is_plain(block)]
    if len(plain) < len(blocks):
        return []
    following = [block.norm1 for block in plain[1:]] + [final_norm]
    return [Region(block, norm) for block, norm in zip(plain, following, strict=True)]


def _is_plain(block: TransformerBlock) -> bool:
    hooked = block._forward_hooks or block._forward_pre_hooks  # which a region would not call
    return not hooked and getattr(block.forward, "__func__", None) is TransformerBlock.forward
