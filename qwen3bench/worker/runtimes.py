"""How a step is launched: eager, CUDA graph replay, or compiled.

A runtime takes a step, a function that launches one forward, and returns one that does the same work again.
"""

from __future__ import annotations

import itertools
import time
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qwen3bench.errors import UserError
from qwen3bench.model.decoder import Decoder
from qwen3bench.worker.workloads import Step

Launch = Callable[[], object]

_copies = itertools.count()


@dataclass
class Runtime:
    """`eager`: as PyTorch launches it."""

    device: torch.device
    name: str = "eager"
    compile_s: float | None = field(default=None, init=False)  # of the last `prepare`
    compile_options: dict[str, Any] | None = field(default=None, init=False)  # of the last model

    @property
    def on_device_clock(self) -> bool:
        """Whether CUDA events time it; else the host clock around a synchronize does."""
        return False

    def prepare_model(self, model: Decoder) -> None:
        """Whatever the runtime does to a model before its first step."""

    def prepare(self, step: Step) -> Launch:
        """A function that launches the work of a step that has run before."""
        return step


@dataclass
class GraphRuntime(Runtime):
    """`graph`: CUDA graph replay (torch.cuda.CUDAGraph), device time free of the host's launches.

    All graphs of a process share one memory pool, as only one replays at a time and none's output is read after
    another's replay; so 32 cells need the working memory of the largest.
    """

    name: str = "graph"
    warm_ups: int = 1  # on the stream of the capture, where libraries set up what they need for it

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
        return graph.replay


@dataclass
class CompileRuntime(Runtime):
    """`compile`: torch.compile of a `Region`, launched from Python; on CUDA `CompiledGraphRuntime` captures it.

    All regions of a model are alike, so one is compiled and serves all (PyTorch's "regional compilation"). Each model
    compiles a code object of its own: dynamo counts recompilations by code object, and past its limit it would
    silently run eager.

    `inductor` holds options of torch._inductor.config, nested as there; `single_token` those that code for a single
    token takes besides; `peers` those of peers, in place of both. Inductor times variants of some kernels to
    choose one, as far as its options let it. Each process chooses for itself: with the choice kept on disk
    all processes of a run would share one throw of the dice, which a second run does not confirm (Kalibera & Jones,
    ISMM 2013: replicate at the level where the variance lives).
    """

    name: str = "compile"
    inductor: dict[str, Any] = field(default_factory=dict)
    single_token: dict[str, Any] = field(default_factory=dict)
    peers: dict[str, Any] = field(default_factory=dict)
    warm_ups: int = 3  # the first compiles; in `generate` a second length makes lengths symbolic

    def __post_init__(self) -> None:
        import torch._dynamo  # seconds, which the other runtimes need not wait for

        torch._dynamo.config.fail_on_recompile_limit_hit = True
        if self.device.type == "cpu":
            _require_cpp_compiler()

    def prepare_model(self, model: Decoder) -> None:
        """Raises ValueError where one compilation cannot serve the whole model."""
        regions = model.split()
        if len({type(region) for region in regions}) > 1 or any("forward" in vars(region) for region in regions):
            raise ValueError(
                "its blocks do not all run the same code, and runtime=compile compiles one for all: "
                "give them one class, and that a forward"
            )
        forward = type(regions[0]).forward
        options = {"autotune_local_cache": False} | dict(_dotted(self.peers if model.is_peer else self.inductor))
        self.compile_options = options
        compiled = _compiled(forward, options)
        if not model.is_peer and (more := dict(_dotted(self.single_token))):
            self.compile_options = options | {"single_token": more}
            compiled = _by_tokens(_compiled(forward, options | more), compiled)
        for region in regions:
            region.forward = types.MethodType(compiled, region)
        model.compiled = regions

    def prepare(self, step: Step) -> Launch:
        started = time.perf_counter()
        for _ in range(self.warm_ups):
            step()
        self.compile_s = (self.compile_s or 0.0) + time.perf_counter() - started
        return step


@dataclass
class CompiledGraphRuntime(CompileRuntime):
    """`compile` on CUDA: the compiled model, captured in a graph."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._graphs = GraphRuntime(self.device)

    @property
    def on_device_clock(self) -> bool:
        return True

    def prepare(self, step: Step) -> Launch:
        super().prepare(step)
        return self._graphs.prepare(step)


@contextmanager
def uncompiled(model: Decoder) -> Iterator[None]:
    """Within, the model runs as it did before `prepare_model`."""
    regions, forwards = model.regions, [vars(each).pop("forward") for each in model.compiled]
    model.regions = ()
    try:
        yield
    finally:
        model.regions = regions
        for each, forward in zip(model.compiled, forwards, strict=True):
            each.forward = forward


def make_runtime(name: str, device: torch.device, **options: Any) -> Runtime:
    """The runtime of that name on `device`, with the options of its YAML file.

    Raises `UserError` where it does not exist there.
    """
    kinds: dict[str, type[Runtime]] = {"eager": Runtime, "graph": GraphRuntime}
    compiled = CompiledGraphRuntime if device.type == "cuda" else CompileRuntime
    return kinds.get(name, compiled)(device, **options)


def _dotted(options: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """The options with the names that torch.compile knows them by: `triton.autotune_pointwise`."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{above}{name}.")
        else:
            yield above + name, value


def _compiled(forward: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    return torch.compile(_own_copy(forward), fullgraph=True, options=options)


def _by_tokens(single: Callable[..., Any], several: Callable[..., Any]) -> Callable[..., Any]:
    def forward(region: nn.Module, x: Tensor, *rest: Any) -> Any:
        return (single if x.numel() == x.shape[-1] else several)(region, x, *rest)

    return forward


def _own_copy(function: Any) -> types.FunctionType:
    """The same function with a code object of its own."""
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_copies)}")
    return types.FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)


def _require_cpp_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise UserError(
            "runtime=compile needs a C++ compiler on a CPU and there is none; install g++ or clang, "
            "or use runtime=eager"
        ) from None
