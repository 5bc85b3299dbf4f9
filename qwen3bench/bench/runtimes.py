"""How a step is launched: eager, CUDA graph replay, or compiled.

A runtime takes a step, a function that launches one forward, and returns one that does the same work again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from qwen3bench.bench.workloads import Step
from qwen3bench.errors import UserError
from qwen3bench.model.qwen3 import Qwen3Model

Launch = Callable[[], object]


@dataclass
class Runtime:
    """`eager`: as PyTorch launches it."""

    device: torch.device
    name: str = "eager"
    compile_s: float | None = field(default=None, init=False)  # of the last `prepare`

    @property
    def on_device_clock(self) -> bool:
        """Whether CUDA events time it; else the host clock around a synchronize does."""
        return False

    def prepare_model(self, model: Qwen3Model) -> None:
        """Whatever the runtime does to a model before its first step."""

    def prepare(self, step: Step) -> Launch:
        """A function that launches the step's work again. Runs the step at least once, untimed."""
        step()
        return step


@dataclass
class GraphRuntime(Runtime):
    """`graph`: CUDA graph replay (torch.cuda.CUDAGraph), device time free of the host's launches.

    All graphs of a process share one memory pool, as only one replays at a time and none's output is read after
    another's replay; so 32 cells need the working memory of the largest.
    """

    name: str = "graph"
    warm_ups: int = 2

    def __post_init__(self) -> None:
        if self.device.type != "cuda":
            raise UserError(f"runtime={self.name} needs a CUDA device; use runtime=eager on {self.device.type}")
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(self.device)

    @property
    def on_device_clock(self) -> bool:
        return True

    def prepare(self, step: Step) -> Launch:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(self.warm_ups):
                step()
        torch.cuda.current_stream().wait_stream(self._stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            step()
        graph.replay()
        torch.cuda.synchronize()
        return graph.replay


RUNTIMES: dict[str, type[Runtime]] = {"eager": Runtime, "graph": GraphRuntime}


def make_runtime(name: str, device: torch.device) -> Runtime:
    """The runtime of that name on `device`. Raises `UserError` where it does not exist there."""
    return RUNTIMES[name](device)
