"""What is compiled computes what the blocks do, one after another."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from qwen3bench import ModelConfig, build_model
from qwen3bench.model.cache import KVCache
from qwen3bench.model.compiled import Region
from qwen3bench.model.layers import TransformerBlock
from qwen3bench.model.parts import Parts
from qwen3bench.model.qwen3 import Qwen3Model


def run(model: Qwen3Model, config: ModelConfig, tokens: Tensor) -> tuple[Tensor, ...]:
    """Logits of a prefill, of its last token alone, of the next token after it, and the cache."""
    cache = KVCache(config, len(tokens), 12, torch.device("cpu"), torch.float32)
    whole = model(tokens)
    last = model(tokens, cache, logits_to_keep=1)
    following = model(tokens[:, :1], cache, start=tokens.shape[1])
    return whole, last, following, cache.keys, cache.values


@torch.no_grad()
def test_regions_compute_what_the_blocks_do(
    tiny: ModelConfig, tiny_weights: dict[str, Tensor], each_cell: tuple[str, ...]
) -> None:
    model = build_model(tiny, each_cell, tiny_weights)
    tokens = torch.randint(0, tiny.vocab_size, (2, 11))
    by_blocks = run(model, tiny, tokens)
    names = list(model.state_dict())
    regions = model.split()
    assert len(regions) == tiny.num_layers
    for expected, found in zip(by_blocks, run(model, tiny, tokens), strict=True):
        torch.testing.assert_close(found, expected)
    assert list(model.state_dict()) == names


@torch.no_grad()
def test_a_region_ends_with_the_norm_after_its_block(tiny: ModelConfig, tiny_weights: dict[str, Tensor]) -> None:
    model = build_model(tiny, (), tiny_weights)
    regions = model.split()
    assert [type(region) for region in regions] == [Region] * tiny.num_layers
    norms = [region.next_norm for region in regions]
    assert norms == [*(block.norm1 for block in model.trf_blocks[1:]), model.final_norm]
    calls: list[nn.Module] = []
    for region in regions:
        region.register_forward_hook(lambda module, *_: calls.append(module))
    model(torch.zeros(1, 3, dtype=torch.long))
    assert calls == list(regions)


class DoublingBlock(TransformerBlock):
    """A block with a forward of its own."""

    def forward(self, x: Tensor, *rest: object, **named: object) -> Tensor:
        return 2 * super().forward(x, *rest, **named)  # type: ignore[arg-type]


@torch.no_grad()
def test_a_block_with_a_forward_of_its_own_stays_whole(tiny: ModelConfig, tiny_weights: dict[str, Tensor]) -> None:
    model = Qwen3Model(tiny, replace(Parts(), block=DoublingBlock))
    plain = build_model(tiny, (), tiny_weights)
    for each in (model, plain):
        each.load_state_dict(plain.state_dict())
        each.cos, each.sin = plain.cos, plain.sin
    tokens = torch.arange(5)[None]
    expected = model(tokens)
    assert list(model.split()) == list(model.trf_blocks)
    assert torch.equal(model(tokens), expected)
    assert not torch.equal(plain(tokens), expected)


def test_a_block_with_a_hook_stays_whole(tiny: ModelConfig, tiny_weights: dict[str, Tensor]) -> None:
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        model = build_model(tiny, (), tiny_weights)
        getattr(model.trf_blocks[1], register)(lambda *_: None)
        assert list(model.split()) == list(model.trf_blocks)


def test_one_such_block_is_enough(tiny: ModelConfig, tiny_weights: dict[str, Tensor]) -> None:
    model = build_model(tiny, (), tiny_weights)
    last = model.trf_blocks[-1]
    last.forward = DoublingBlock.forward.__get__(last)
    assert list(model.split()) == list(model.trf_blocks)
    assert not model.regions
