"""How a step is launched: eager, CUDA graph replay, or compiled.

A runtime prepares a model, then that model's steps: functions that launch one forward each. Of a step it makes a
launch, which does the same work again.
"""

from __future__ import annotations

import itertools
import os
import time
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from qwen3bench.errors import UserError
from qwen3bench.model.decoder import Compile, Decoder, Forward
from qwen3bench.worker.compile_counters import compiled_graphs
from qwen3bench.worker.workloads import Step

Launch = Callable[[], object]

_NOTHING_COMPILED = "found no compiled frames"
_UNTOUCHED = 12_288.0  # no logit, and a number of every dtype

_copies = itertools.count()


class InvalidCell(Exception):
    """A cell that runs and must not be measured, with the reason."""


@dataclass(frozen=True)
class PreparedModel:
    """The model that a runtime launches, and the options of its compiler where there is one."""

    model: Decoder
    compile_options: dict[str, Any] | None = None


@dataclass(frozen=True)
class PreparedStep:
    """How to launch a step's work again, and the seconds that compiling it took where it was compiled.

    `graph_bytes`: what its graph takes of the card outside the allocator, where it is one. `written`: where a launch
    returns nothing, what it writes, as `written_by` reads it: to be read before anything else is launched.
    """

    launch: Launch
    compile_s: float | None = None
    graph_bytes: int | None = None
    written: Tensor | None = None


@dataclass
class Runtime:
    """`eager`: as PyTorch launches it."""

    device: torch.device
    name: str = "eager"

    @property
    def on_device_clock(self) -> bool:
        """Whether CUDA events time it; else the host clock around a synchronize does."""
        return False

    def compilations(self) -> int:
        """How many graphs torch.compile has made so far in this process; 0 where the runtime uses none.

        A call that it let run in eager counts too: either has no place in a timed value.
        """
        return 0

    def prepare_model(self, model: Decoder) -> PreparedModel:
        """The model whose steps the runtime launches; the given one stays as it is."""
        return PreparedModel(model)

    def prepare(self, step: Step) -> PreparedStep:
        """What launches the work of a step of the model that was prepared last.

        Raises InvalidCell where that is not what the runtime claims.
        """
        return PreparedStep(step)


@dataclass
class GraphRuntime(Runtime):
    """`graph`: CUDA graph replay (torch.cuda.CUDAGraph), device time free of the host's launches.

    All graphs of a process share one memory pool, as only one replays at a time and none's output is read after
    another's replay (`written_by`); so 32 cells need the working memory of the largest.
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

    def prepare(self, step: Step) -> PreparedStep:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(self.warm_ups):
                step()
        torch.cuda.current_stream().wait_stream(self._stream)
        torch.cuda.synchronize()
        before = _outside_allocator(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            logits = step()
        require_replay(graph.replay, logits)
        graph_bytes = max(0, _outside_allocator(self.device) - before)
        return PreparedStep(graph.replay, graph_bytes=graph_bytes, written=written_by(logits))


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

        torch._dynamo.config.suppress_errors = False  # where compiling fails it would run eager
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        if self.device.type == "cpu":
            _require_cpp_compiler()
        self._eager_calls = EagerCalls()
        self._graphs_before = self._eager_before = 0

    def compilations(self) -> int:
        return compiled_graphs() + self._eager_calls.count

    def prepare_model(self, model: Decoder) -> PreparedModel:
        """Raises ValueError where one compilation cannot serve the whole model."""
        self._graphs_before, self._eager_before = compiled_graphs(), self._eager_calls.count
        options = {"autotune_local_cache": False} | dict(dotted(self.peers if model.is_peer else self.inductor))
        more = {} if model.is_peer else dict(dotted(self.single_token))
        if not more:
            return PreparedModel(model.compiled(self._compiler(options)), options)
        compiled = model.compiled(_compiler_by_tokens(self._compiler(options | more), self._compiler(options)))
        return PreparedModel(compiled, options | {"single_token": more})

    def prepare(self, step: Step) -> PreparedStep:
        started = time.perf_counter()
        try:
            for _ in range(self.warm_ups):
                step()
        except RuntimeError as error:  # newer versions of PyTorch say by themselves that there was nothing to run
            if _NOTHING_COMPILED not in str(error):
                raise
            raise InvalidCell(f"torch.compile made no code of it, it would run in eager; {_what_to_unset()}") from error
        compile_s = time.perf_counter() - started
        self._require_compiled()
        return PreparedStep(step, compile_s)

    def _compiler(self, options: dict[str, Any]) -> Compile:
        def compile_(forward: Forward) -> Forward:
            return torch.compile(_own_copy(self._eager_calls.counted(forward)), fullgraph=True, options=options)

        return compile_

    def _require_compiled(self) -> None:
        """Raise InvalidCell unless Inductor made code of the model that was prepared last, and all calls ran it."""
        if others := overridden():
            raise InvalidCell(f"torch.compile was told to make something else than is claimed: unset {others}")
        in_eager = self._eager_calls.count - self._eager_before
        if in_eager:
            raise InvalidCell(
                f"torch.compile let {in_eager} calls of its code run in eager, so its latency would be eager's; "
                f"{_what_to_unset()}"
            )
        if compiled_graphs() == self._graphs_before:
            raise InvalidCell(f"torch.compile made no code of it, it would run in eager; {_what_to_unset()}")


@dataclass
class CompiledGraphRuntime(CompileRuntime):
    """`compile` on CUDA: the compiled model, captured in a graph."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._graphs = GraphRuntime(self.device)

    @property
    def on_device_clock(self) -> bool:
        return True

    def prepare(self, step: Step) -> PreparedStep:
        compile_s = super().prepare(step).compile_s
        return replace(self._graphs.prepare(step), compile_s=compile_s)


def make_runtime(name: str, device: torch.device, **options: Any) -> Runtime:
    """The runtime of that name on `device`, with the options of its YAML file.

    Raises `UserError` where there is none of that name, or it does not exist on this device.
    """
    compiled = CompiledGraphRuntime if device.type == "cuda" else CompileRuntime
    kinds: dict[str, type[Runtime]] = {"eager": Runtime, "graph": GraphRuntime, "compile": compiled}
    if name not in kinds:
        raise UserError(f"unknown runtime {name!r}; there are {', '.join(kinds)}")
    return kinds[name](device, **options)


def dotted(options: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """The options with the names that torch.compile knows them by: `triton.autotune_pointwise`."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from dotted(value, f"{above}{name}.")
        else:
            yield above + name, value


@dataclass
class EagerCalls:
    """How often functions that were to be compiled ran in eager, whatever let them."""

    count: int = 0

    def counted(self, function: Forward) -> Forward:
        """The same function. Of the count nothing is left in compiled code, where the condition is a constant."""

        def run(*given: Any, **named: Any) -> Any:
            if not torch.compiler.is_compiling():
                self.count += 1
            return function(*given, **named)

        return run


def _outside_allocator(device: torch.device) -> int:
    """The bytes of the card that are taken and not the allocator's: contexts, code, graphs, what others have."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def require_replay(replay: Launch, logits: Tensor) -> None:
    """Raise InvalidCell unless replaying the graph writes the logits that its capture returned."""
    with torch.inference_mode():
        last = logits[(-1,) * logits.dim()]
        last.fill_(_UNTOUCHED)
        replay()
        written = last.item() != _UNTOUCHED
    if not written:
        raise InvalidCell("replaying its CUDA graph writes no logits, so its latency would be that of nothing")


def written_by(logits: Tensor) -> Tensor:
    """The last tokens' logits (b, vocabulary) of a graph, or its loss (1,), where its replays write them.

    It does not own that memory, which lies in the pool of all graphs: held, it would be lost to the graphs captured
    later, and each cell would take as much more. It is there as long as the graph is, and holds what this one
    wrote until another is replayed.
    """
    last = logits[:, -1] if logits.dim() > 1 else logits.reshape(-1)
    size = last.element_size()
    place = {
        "version": 3,
        "data": (last.data_ptr(), False),
        "shape": tuple(last.shape),
        "strides": tuple(size * stride for stride in last.stride()),
        "typestr": f"<i{size}",  # as the interface knows no bfloat16
    }
    return torch.as_tensor(types.SimpleNamespace(__cuda_array_interface__=place), device=last.device).view(last.dtype)


def require_finite(output: Tensor, named: str) -> None:
    """Raise InvalidCell unless all of a step's output is finite; `named`: what it is, in words."""
    if not bool(torch.isfinite(output).all()):
        raise InvalidCell(f"its {named} not finite (NaN or infinity), so its latency would mean nothing")


def overridden() -> str:
    """The settings that put something else in the place of Inductor's code, with their values; empty where none is."""
    import torch._dynamo
    import torch._inductor.config

    asked = {
        "TORCH_COMPILE_OVERRIDE_BACKENDS": getattr(torch._dynamo.config, "debug_backend_override", ""),
        "TORCH_COMPILE_OVERRIDE_INDUCTOR_CONFIGS": getattr(torch._dynamo.config, "debug_inductor_config_override", ""),
        "torch._inductor.config.fallback_by_default": getattr(torch._inductor.config, "fallback_by_default", False),
    }
    return ", ".join(f"{name}={value}" for name, value in asked.items() if value)


def _what_to_unset() -> str:
    """What may have switched the compiler off: variables that are set, or settings of the process."""
    names = [name for name in sorted(os.environ) if name.startswith(("TORCHDYNAMO_", "TORCH_COMPILE_"))]
    if torch._dynamo.config.disable:
        names.append("torch._dynamo.config.disable")
    return f"unset {', '.join(names)}" if names else "something sets torch.compiler.set_stance, or disables it in code"


def _compiler_by_tokens(for_single: Compile, for_several: Compile) -> Compile:
    def compile_(forward: Forward) -> Forward:
        several, single = for_several(forward), for_single(forward)

        def run(module: nn.Module, x: Tensor, *rest: Any) -> Any:
            return (single if x.numel() == x.shape[-1] else several)(module, x, *rest)

        return run

    return compile_


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
