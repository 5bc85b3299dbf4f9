"""Micro-benchmarks of the operations that the switches replace, on against off: `make bench`.

Shapes of qwen3-0.6b and qwen3-8b, on a CPU and where there is CUDA. Without --benchmark-only, as in `make test`, only
the tiny shape, to see that on and off agree.

An operation's share of the roofline (Williams, Waterman & Patterson, 2009) is the time that its least operations and
bytes take at the device's measured ceilings, over the time it took. Above 1: its data stayed in a cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from qwen3bench.config.choices import options_of
from qwen3bench.config.model_config import ModelConfig
from qwen3bench.model.attention import AdditiveMask, EagerAttention
from qwen3bench.model.layers import FeedForward, RMSNorm, SeparateResidual, separate_head, separate_rope
from qwen3bench.model.qwen3 import rope_tables
from qwen3bench.opt.flash import FlashAttention
from qwen3bench.opt.mask import BooleanMask
from qwen3bench.opt.mlp import FusedFeedForward, silu_mul
from qwen3bench.opt.norm import FusedRMSNorm
from qwen3bench.opt.residual import FusedResidual
from qwen3bench.opt.rope import fused_rope
from qwen3bench.opt.tie import tied_head
from qwen3bench.worker.ceilings import measure_ceilings
from qwen3bench.worker.costs import causal_pairs
from qwen3bench.worker.runtimes import make_runtime

LAUNCHES = 20  # in one CUDA graph, or the host could not launch short kernels as fast as the device runs them
DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float32}
TOKENS = {"cuda": 512, "cpu": 32}
VOCABULARY = {"cuda": 151_936, "cpu": 16_384}  # a whole head of 8b in float32 takes 2.5 GB
Operation = Callable[[], Tensor]


@dataclass(frozen=True)
class Pair:
    """An operation off and on, and the least that either asks of the device."""

    off: Operation
    on: Operation
    flops: int
    moved_bytes: int


@dataclass(frozen=True)
class Place:
    """Where and how large: makes the tensors."""

    config: ModelConfig
    tokens: int
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        return DTYPE[self.device.type]

    def random(self, *shape: int) -> Tensor:
        """Values of order 1 / √dim, so that sums over the last dimension are of order 1."""
        values = torch.empty(shape, device=self.device, dtype=self.dtype).uniform_(-1, 1)
        return values * (3 / shape[-1]) ** 0.5

    def fill(self, module: nn.Module) -> nn.Module:
        """A module made on the meta device, with random weights here."""
        module = module.to_empty(device=self.device).to(self.dtype).requires_grad_(False)
        for weight in module.parameters():
            weight.copy_(self.random(*weight.shape) + (weight.dim() == 1))
        return module


def attention(at: Place) -> Pair:
    """Separate operations against one kernel, both with the additive mask."""
    return _attention(at, off=EagerAttention(), on=FlashAttention(), on_mask=AdditiveMask())


def mask_beside_flash(at: Place) -> Pair:
    """The additive mask against no mask tensor at all, both in one kernel."""
    return _attention(at, off=FlashAttention(), on=FlashAttention(), on_mask=BooleanMask())


def _attention(at: Place, off: Any, on: Any, on_mask: Any) -> Pair:
    c, t = at.config, at.tokens
    q = at.random(1, c.num_heads, t, c.head_dim) * c.head_dim
    k, v = (at.random(1, c.num_kv_heads, t, c.head_dim) for _ in range(2))
    additive = AdditiveMask()
    off_tensor = off.mask(additive, t, 0, at.device, at.dtype)
    on_tensor = on.mask(on_mask, t, 0, at.device, at.dtype)
    return Pair(
        lambda: off(q, k, v, off_tensor, additive.apply),
        lambda: on(q, k, v, on_tensor, on_mask.apply),
        4 * c.head_dim * c.num_heads * causal_pairs(t, 0),
        2 * q.nbytes + k.nbytes + v.nbytes,
    )


def attention_of_one_query(at: Place) -> Pair:
    """PyTorch's kernel against `flash.decode=split` (on CUDA), without a mask tensor, over as many keys as tokens."""
    c = at.config
    q = at.random(1, c.num_heads, 1, c.head_dim) * c.head_dim
    k, v = (at.random(1, c.num_kv_heads, at.tokens, c.head_dim) for _ in range(2))
    off, on = FlashAttention(), FlashAttention(split=True)
    mask_scores = BooleanMask().apply
    return Pair(
        lambda: off(q, k, v, None, mask_scores),
        lambda: on(q, k, v, None, mask_scores),
        4 * c.head_dim * c.num_heads * at.tokens,
        2 * q.nbytes + k.nbytes + v.nbytes,
    )


def mask_on_scores(at: Place) -> Pair:
    """A sum against `masked_fill`, over the scores of all heads."""
    t = at.tokens
    scores = at.random(1, at.config.num_heads, t, t)
    additive, boolean = AdditiveMask(), BooleanMask()
    numbers, blocked = (mask.dense(t, 0, at.device, at.dtype) for mask in (additive, boolean))
    return Pair(
        lambda: additive.apply(scores, numbers),
        lambda: boolean.apply(scores, blocked),
        scores.numel(),
        2 * scores.nbytes + blocked.nbytes,
    )


def norm_wide(at: Place) -> Pair:
    """The norm of the residual stream."""
    return _norm(at, at.random(1, at.tokens, at.config.emb_dim))


def norm_heads(at: Place) -> Pair:
    """The norm of each query head."""
    return _norm(at, at.random(1, at.tokens, at.config.num_heads, at.config.head_dim))


def _norm(at: Place, x: Tensor) -> Pair:
    with torch.device("meta"):
        off, on = (kind(x.shape[-1], at.config.rms_norm_eps) for kind in (RMSNorm, FusedRMSNorm))
    off = at.fill(off)
    on.weight = off.weight
    return Pair(lambda: off(x), lambda: on(x), 4 * x.numel(), 2 * x.nbytes + off.weight.nbytes)


def rope_with_norms(at: Place) -> Pair:
    """Norms and rotation of queries and keys, where these are slices of one product."""
    c, sizes = at.config, (at.config.num_heads, at.config.num_kv_heads, at.config.num_kv_heads)
    product = at.random(1, at.tokens, sum(sizes) * c.head_dim) * c.head_dim
    q, k, v = (x.unflatten(-1, (-1, c.head_dim)) for x in product.split([n * c.head_dim for n in sizes], dim=-1))
    with torch.device("meta"):
        norms = FusedRMSNorm(c.head_dim, c.rms_norm_eps), FusedRMSNorm(c.head_dim, c.rms_norm_eps)
    norms = at.fill(norms[0]), at.fill(norms[1])
    cos, sin = (table[: at.tokens] for table in rope_tables(c, at.device, at.dtype))
    return Pair(
        lambda: separate_rope((q, k, v), norms, (cos, sin), None, 0)[0],
        lambda: fused_rope((q, k, v), norms, (cos, sin), None, 0)[0],
        10 * (q.numel() + k.numel()),
        2 * (q.nbytes + k.nbytes) + cos.nbytes + sin.nbytes,
    )


def residual_with_norm(at: Place) -> Pair:
    """The residual sum and the norm after it."""
    x, change = (at.random(1, at.tokens, at.config.emb_dim) for _ in range(2))
    with torch.device("meta"):
        empty = FusedRMSNorm(at.config.emb_dim, at.config.rms_norm_eps)
    norm = at.fill(empty)
    separate, fused = SeparateResidual(), FusedResidual()
    return Pair(
        lambda: separate.norm(separate.add(x, change), norm)[1],
        lambda: fused.norm(fused.add(x, change), norm)[1],
        5 * x.numel(),
        4 * x.nbytes,
    )


def swiglu(at: Place) -> Pair:
    """SiLU and product: two kernels on two tensors against one on the two halves of one."""
    gate_up = at.random(1, at.tokens, 2 * at.config.hidden_dim) * at.config.hidden_dim**0.5
    gate, up = (half.contiguous() for half in gate_up.chunk(2, dim=-1))
    return Pair(lambda: F.silu(gate) * up, lambda: silu_mul(gate_up), 5 * up.numel(), 3 * up.nbytes)


def feed_forward(at: Place) -> Pair:
    """The whole feed-forward."""
    c = at.config
    with torch.device("meta"):
        off, on = FeedForward(c), FusedFeedForward(c)
    off = at.fill(off)
    for name in ("fc1", "fc2", "fc3"):
        on.get_submodule(name).weight = off.get_submodule(name).weight
    on.pack()
    x = at.random(1, at.tokens, c.emb_dim) * c.emb_dim**0.5
    weights = sum(weight.numel() for weight in off.parameters())
    return Pair(lambda: off(x), lambda: on(x), 2 * at.tokens * weights, weights * at.dtype.itemsize + 2 * x.nbytes)


def embedding_and_head(at: Place) -> Pair:
    """Embedding and output head: two matrices against one. Their times must not differ."""
    c = at.config
    with torch.device("meta"):
        tok_emb = nn.Embedding(c.vocab_size, c.emb_dim)
    tok_emb = at.fill(tok_emb)
    with torch.device("meta"):
        head = separate_head(tok_emb)
    head.weight = nn.Parameter(tok_emb.weight.clone(), requires_grad=False)
    tied = tied_head(tok_emb)
    ids = torch.randint(c.vocab_size, (1, at.tokens), device=at.device)
    logits = at.tokens * c.vocab_size * at.dtype.itemsize
    return Pair(
        lambda: head(tok_emb(ids)),
        lambda: tied(tok_emb(ids)),
        2 * at.tokens * tok_emb.weight.numel(),
        tok_emb.weight.nbytes + logits,
    )


OPERATIONS = (
    attention,
    mask_beside_flash,
    attention_of_one_query,
    mask_on_scores,
    norm_wide,
    norm_heads,
    rope_with_norms,
    residual_with_norm,
    swiglu,
    feed_forward,
    embedding_and_head,
)


def launch_clock() -> float:
    """The host clock after a synchronize, in units of which one launch out of a graph's takes one second."""
    torch.cuda.synchronize()
    return time.perf_counter() / LAUNCHES


MAX_S = 0.4  # of measuring one operation
_RULES: dict[str, Any] = {"min_rounds": 5, "warmup": True, "warmup_iterations": 3}
_ON_CUDA = pytest.mark.benchmark(timer=launch_clock, max_time=MAX_S / LAUNCHES, **_RULES)  # by that clock
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.benchmark(max_time=MAX_S, **_RULES)),
    pytest.param("cuda", marks=[pytest.mark.cuda, _ON_CUDA]),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    measures = metafunc.config.getoption("benchmark_only")
    metafunc.parametrize("shape", ["qwen3-0.6b", "qwen3-8b"] if measures else ["tiny"])


@pytest.mark.parametrize("switch", ["off", "on"])
@pytest.mark.parametrize("make", OPERATIONS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("device", DEVICES)
def test_operation(
    make: Callable[[Place], Pair],
    shape: str,
    device: str,
    switch: str,
    benchmark: BenchmarkFixture,
    request: pytest.FixtureRequest,
) -> None:
    """On computes what off does; how long each takes is for `make bench` to show."""
    pair = make(_place(shape, device))
    operation: Operation = getattr(pair, switch)
    expected = pair.off()
    tolerance = 0.05 if device == "cuda" else 1e-5  # bfloat16 keeps 8 bits
    spread = float(expected[expected.isfinite()].float().std())
    torch.testing.assert_close(operation(), expected, rtol=tolerance, atol=tolerance * spread)

    benchmark.group = f"{make.__name__}, {shape}, {device}"
    launch = _launch(operation, torch.device(device))
    benchmark(launch)
    if shape == "tiny":
        return
    ceilings: Ceilings = request.getfixturevalue("ceilings")
    roofline_s = ceilings.roofline_s(device, pair)
    median_s = benchmark.stats.stats.median
    benchmark.extra_info |= {"flops": pair.flops, "bytes": pair.moved_bytes, "roofline_share": roofline_s / median_s}
    ceilings.shown.setdefault(benchmark.group, {})[switch] = (median_s, roofline_s / median_s)


def _place(shape: str, device: str) -> Place:
    config = ModelConfig(**options_of("model", shape))
    if shape == "tiny":
        return Place(config, 16, torch.device(device))
    return Place(replace(config, vocab_size=VOCABULARY[device]), TOKENS[device], torch.device(device))


def _launch(operation: Operation, device: torch.device) -> Callable[[], object]:
    if device.type == "cpu":
        return operation

    def several() -> Tensor:
        for _ in range(LAUNCHES - 1):
            operation()
        return operation()

    return make_runtime("graph", device).prepare(several).launch


@dataclass
class Ceilings:
    """What the devices reach, measured once, and the table of what the operations took."""

    measured: dict[str, dict[str, Any]] = field(default_factory=dict)
    shown: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)

    def roofline_s(self, device: str, pair: Pair) -> float:
        """The least time that the pair's operations and bytes take."""
        if device not in self.measured:
            self.measured[device] = measure_ceilings(device, DTYPE[device])
        reached = self.measured[device]
        return max(pair.flops / reached["matmul_flops_per_s"], pair.moved_bytes / reached["copy_bytes_per_s"])

    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """One line for each pair, after pytest-benchmark's own tables."""
        terminalreporter.section("on against off: medians, shares of the roofline")
        head = ("operation, shape, device", "off", "on", "off / on", "share off", "share on")
        terminalreporter.write_line("{:36}{:>12}{:>12}{:>10}{:>11}{:>11}".format(*head))
        for group, both in self.shown.items():
            if both.keys() == {"off", "on"}:
                (off_s, off_share), (on_s, on_share) = both["off"], both["on"]
                terminalreporter.write_line(
                    f"{group:36}{off_s * 1e6:9.1f} µs{on_s * 1e6:9.1f} µs{off_s / on_s:9.2f}×"
                    f"{off_share:11.0%}{on_share:11.0%}"
                )


@pytest.fixture(scope="session")
def ceilings(request: pytest.FixtureRequest) -> Iterator[Ceilings]:
    found = Ceilings()
    request.config.pluginmanager.register(found)
    return found
