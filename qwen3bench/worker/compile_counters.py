"""What torch.compile has made in this process, by its own counters."""

from __future__ import annotations

import torch


def forget_compilations() -> None:
    """Set the counters to zero: to be called before a cell is compiled."""
    torch._dynamo.utils.counters.clear()


def compiled_graphs() -> int:
    """How many graphs torch.compile has made since `forget_compilations`."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def graph_breaks() -> int:
    """How often it gave up on a graph since `forget_compilations`."""
    return sum(torch._dynamo.utils.counters["graph_break"].values())
