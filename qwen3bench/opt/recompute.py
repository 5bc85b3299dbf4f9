"""`recompute`: a block's activations are not kept, backward computes the block again (arXiv:1604.06174).

For training alone. It saves memory and costs a second forward of the blocks that it is asked for.
"""

from __future__ import annotations

from dataclasses import replace

from qwen3bench.errors import UserError
from qwen3bench.model.parts import Parts


def apply(parts: Parts, every: int = 1) -> Parts:
    """The parts with every block computed again in backward, or every `every`-th."""
    if type(every) is not int or every < 1:
        raise UserError(f"recompute.every={every!r} must be a whole number from 1 on")
    return replace(parts, recomputed=lambda block: block % every == 0)
