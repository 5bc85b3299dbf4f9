"""`tie`: one matrix serves as embedding and as output head, as published up to 4B (Press & Wolf, arXiv:1608.05859).

It saves the head's bytes. It cannot change latency: the same product reads the same number of bytes.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from qwen3bench.model.layers import separate_head
from qwen3bench.model.parts import Parts


def tied_head(tok_emb: nn.Embedding) -> nn.Linear:
    """An output projection whose weight IS the embedding's."""
    head = separate_head(tok_emb)
    head.weight = tok_emb.weight
    return head


def apply(parts: Parts) -> Parts:
    """The parts with the head tied to the embedding."""
    return replace(parts, head=tied_head)
