"""A compiled model computes what the original's blocks do, one after another, and leaves the original as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qwen3bench import ModelConfig, build_model
from qwen3bench.model.baseline import BASELINE_PARTS
from qwen3bench.model.cache import KVCache
from qwen3bench.model.compiled import Region, regions_of
from qwen3bench.model.decoder import Decoder
from qwen3bench.model.layers import TransformerBlock
from qwen3bench.model.qwen3 import Qwen3Model


class Recorder:
    """In place of torch.compile: what it was given, and which modules ran."""

    def __init__(self) -> None:
        self.compiled: list[Callable[..., Any]] = []
        self.ran: list[nn.Module] = []

    def __call__(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        self.compiled.append(forward)

        def run(module: nn.Module, *given: Any) -> Any:
            self.ran.append(module)
            return forward(module, *given)

        return run


def run(model: Decoder, config: ModelConfig, tokens: Tensor) -> tuple[Tensor, ...]:
    """Logits of a prefill, of its last token alone, of the next token after it, and the cache."""
    cache = KVCache(config, len(tokens), 12, torch.device("cpu"), torch.float32)
    whole = model(tokens)
    last = model(tokens, cache, logits_to_keep=1)
    following = model(tokens[:, :1], cache, start=tokens.shape[1])
    return whole, last, following, cache.keys, cache.values


def regions(model: Qwen3Model) -> list[Region]:
    return regions_of(list(model.trf_blocks), model.final_norm)


@torch.no_grad()
def test_regions_compute_what_the_blocks_do(
    tiny: ModelConfig, tiny_weights: dict[str, Tensor], each_cell: tuple[str, ...]
) -> None:
    model = build_model(tiny, each_cell, tiny_weights)
    tokens = torch.randint(0, tiny.vocab_size, (2, 11))
    by_blocks = run(model, tiny, tokens)
    names = list(model.state_dict())
    recorder = Recorder()
    compiled = model.compiled(recorder)
    for expected, found in zip(by_blocks, run(compiled, tiny, tokens), strict=True):
        torch.testing.assert_close(found, expected)
    assert len(recorder.compiled) == (2 if "gemv" in each_cell else 1)  # its blocks, for what they do as one
    assert {type(module) for module in recorder.ran} == {Region}
    assert len(recorder.ran) == 3 * tiny.num_layers
    assert list(model.state_dict()) == names


@torch.no_grad()
@pytest.mark.parametrize("opts", [(), ("residual",)])
def test_the_head_is_given_rows_that_lie_together(
    tiny: ModelConfig, tiny_weights: dict[str, Tensor], opts: tuple[str, ...]
) -> None:
    model = build_model(tiny, opts, tiny_weights)
    given: list[Tensor] = []
    model.out_head.register_forward_pre_hook(lambda module, args: given.extend(args))
    for each in (model, model.compiled(Recorder())):
        each(torch.zeros(3, 5, dtype=torch.long), logits_to_keep=1)
    assert [x.shape for x in given] == [(3, 1, tiny.emb_dim)] * 2
    assert all(x.is_contiguous() for x in given)


@torch.no_grad()
def test_the_original_stays_in_eager(tiny: ModelConfig, tiny_weights: dict[str, Tensor]) -> None:
    model = build_model(tiny, (), tiny_weights)
    tokens = torch.arange(5)[None]
    before = model(tokens)
    compiled = model.compiled(lambda forward: lambda region, x, normed, *rest: (2 * x, 2 * normed))
    assert not torch.allclose(compiled(tokens), before)
    assert compiled.original is model is model.original
    assert torch.equal(model(tokens), before)
    assert torch.equal(compiled.compiled(Recorder())(tokens), before)  # of the original, not once more


def test_it_has_the_originals_weights(tiny: ModelConfig, tiny_weights: dict[str, Tensor]) -> None:
    for opts in ((), ("tie",)):
        model = build_model(tiny, opts, tiny_weights)
        compiled = model.compiled(Recorder())
        assert compiled.config is model.config
        assert compiled.tok_emb is model.tok_emb
        assert compiled.out_head is model.out_head
        counts = ("num_parameters", "num_unique_parameters", "num_non_embedding_parameters", "parameter_bytes")
        assert [getattr(compiled, name) for name in counts] == [getattr(model, name) for name in counts]


@torch.no_grad()
def test_a_region_ends_with_the_norm_after_its_block(tiny: ModelConfig, tiny_weights: dict[str, Tensor]) -> None:
    model = build_model(tiny, (), tiny_weights)
    norms = [region.next_norm for region in regions(model)]
    assert norms == [*(block.norm1 for block in model.trf_blocks[1:]), model.final_norm]
    recorder = Recorder()
    model.compiled(recorder)(torch.zeros(1, 3, dtype=torch.long))
    assert recorder.compiled == [Region.forward]
    assert [type(module) for module in recorder.ran] == [Region] * tiny.num_layers
    assert [module.block for module in recorder.ran] == list(model.trf_blocks)


def test_the_loss_is_compiled_where_it_is_asked_for(tiny: ModelConfig, tiny_weights: dict[str, Tensor]) -> None:
    model = build_model(tiny, (), tiny_weights)
    recorder = Recorder()
    compiled = model.compiled(recorder)
    tokens = torch.randint(0, tiny.vocab_size, (2, 12))
    torch.testing.assert_close(compiled.loss(tokens[:, :-1], tokens[:, 1:]), model.loss(tokens[:, :-1], tokens[:, 1:]))
    assert recorder.compiled == [Region.forward, model.parts.loss.__call__]
    assert recorder.ran[-1] is model.out_head
    compiled.loss(tokens[:, :-1], tokens[:, 1:])
    assert len(recorder.compiled) == 2


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("opts", [(), ("gemv",)])
def test_the_first_block_alone(
    tiny: ModelConfig, tiny_weights: dict[str, Tensor], opts: tuple[str, ...], compiled: bool
) -> None:
    # A region ends with the norm of the block that follows, in place of the final one.
    weights = tiny_weights | {"model.layers.1.input_layernorm.weight": tiny_weights["model.norm.weight"]}
    model = build_model(tiny, opts, weights)
    tokens = torch.arange(5)[None]
    expected = build_model(replace(tiny, num_layers=1), opts, weights)(tokens)
    recorder = Recorder()
    shown = model.compiled(recorder) if compiled else model
    assert torch.equal(shown.first_block_alone()(tokens), expected)
    assert len(recorder.ran) == int(compiled)
    assert len(model.trf_blocks) == tiny.num_layers


class DoublingBlock(TransformerBlock):
    """A block with a forward of its own."""

    def forward(self, x: Tensor, *rest: object, **named: object) -> Tensor:
        return 2 * super().forward(x, *rest, **named)  # type: ignore[arg-type]


@torch.no_grad()
def test_a_block_with_a_forward_of_its_own_stays_whole(tiny: ModelConfig, tiny_weights: dict[str, Tensor]) -> None:
    model = Qwen3Model(tiny, replace(BASELINE_PARTS, block=DoublingBlock))
    plain = build_model(tiny, (), tiny_weights)
    for each in (model, plain):
        each.load_state_dict(plain.state_dict())
        each.cos, each.sin = plain.cos, plain.sin
    tokens = torch.arange(5)[None]
    expected = model(tokens)
    recorder = Recorder()
    assert torch.equal(model.compiled(recorder)(tokens), expected)
    assert recorder.ran == list(model.trf_blocks)
    assert not torch.equal(plain(tokens), expected)


class SometimesDoublingBlock(DoublingBlock):
    """One that says when its forward is its own: for a single token."""

    def forward(self, x: Tensor, *rest: object, **named: object) -> Tensor:
        return (
            super().forward(x, *rest, **named) if self.is_whole(x, None) else TransformerBlock.forward(self, x, *rest)
        )  # type: ignore[arg-type]

    def is_whole(self, stream: Tensor, cache: object) -> bool:
        return stream.shape[1] == 1


@torch.no_grad()
def test_a_block_that_says_which_calls_are_whole_is_cut_for_the_others(
    tiny: ModelConfig, tiny_weights: dict[str, Tensor]
) -> None:
    model = Qwen3Model(tiny, replace(BASELINE_PARTS, block=SometimesDoublingBlock))
    plain = build_model(tiny, (), tiny_weights)
    model.load_state_dict(plain.state_dict())
    model.cos, model.sin = plain.cos, plain.sin
    for tokens, kind in (
        (torch.arange(5)[None], Region),
        (torch.zeros(1, 1, dtype=torch.long), SometimesDoublingBlock),
    ):
        recorder = Recorder()
        torch.testing.assert_close(model.compiled(recorder)(tokens), model(tokens))
        assert [type(module) for module in recorder.ran] == [kind] * tiny.num_layers
        assert torch.equal(model(tokens), plain(tokens)) == (kind is Region)


@torch.no_grad()
def test_a_block_with_a_hook_stays_whole(tiny: ModelConfig, tiny_weights: dict[str, Tensor]) -> None:
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        model = build_model(tiny, (), tiny_weights)
        hooked: list[nn.Module] = []
        getattr(model.trf_blocks[1], register)(lambda module, *_, hooked=hooked: hooked.append(module))
        recorder = Recorder()
        model.compiled(recorder)(torch.arange(5)[None])
        assert recorder.ran == list(model.trf_blocks)
        assert hooked == [model.trf_blocks[1]]


def test_one_such_block_is_enough(tiny: ModelConfig, tiny_weights: dict[str, Tensor]) -> None:
    model = build_model(tiny, (), tiny_weights)
    assert len(regions(model)) == tiny.num_layers
    last = model.trf_blocks[-1]
    last.forward = DoublingBlock.forward.__get__(last)
    assert not regions(model)


def replaced(model: Qwen3Model) -> None:
    model.trf_blocks[-1] = DoublingBlock(model.config, model.parts)


def patched(model: Qwen3Model) -> None:
    last = model.trf_blocks[-1]
    last.forward = (lambda block, x, *rest: x).__get__(last)


@pytest.mark.parametrize("change", [replaced, patched])
def test_blocks_that_do_not_run_the_same_code_are_not_compiled_as_if_they_did(
    tiny: ModelConfig, tiny_weights: dict[str, Tensor], change: Callable[[Qwen3Model], None]
) -> None:
    model = build_model(tiny, (), tiny_weights)
    change(model)
    with pytest.raises(ValueError, match="do not all run the same code"):
        model.compiled(Recorder())
