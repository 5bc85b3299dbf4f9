"""The builder: one bank of weights under every cell, one function in every cell, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen3bench import ModelConfig, build_model, load_weights
from qwen3bench.errors import UserError
from qwen3bench.model.baseline import BASELINE_PARTS
from qwen3bench.model.build import forget_rope_tables, hf_names
from qwen3bench.model.checkpoint import tensor_shapes
from qwen3bench.model.layers import Embedding, FeedForward, Linear, RMSNorm

TOKENS = (2, 13)


def test_every_tensor_of_a_checkpoint_has_one_module(tiny: ModelConfig) -> None:
    model = build_model(tiny, device="meta")
    names = hf_names(tiny)
    shapes = {theirs: tuple(model.get_submodule(path).weight.shape) for path, theirs in names.items()}
    assert shapes == tensor_shapes(tiny)
    assert {f"{path}.weight" for path in names} == set(model.state_dict())


def test_parameters_are_the_banks_tensors(
    tiny: ModelConfig, tiny_weights: dict[str, Tensor], each_cell: tuple[str, ...]
) -> None:
    model = build_model(tiny, each_cell, tiny_weights)
    for path, theirs in hf_names(tiny).items():
        ours = model.get_submodule(path).weight
        assert torch.equal(ours, tiny_weights[theirs]), path
        own_head = path == "out_head" and "tie" not in each_cell
        assert (ours.data_ptr() == tiny_weights[theirs].data_ptr()) != own_head, path


def test_a_stored_head_is_used_where_it_lies(tiny: ModelConfig, tiny_weights: dict[str, Tensor]) -> None:
    weights = tiny_weights | {"lm_head.weight": torch.randn(tiny.vocab_size, tiny.emb_dim)}
    model = build_model(tiny, (), weights)
    assert model.out_head.weight.data_ptr() == weights["lm_head.weight"].data_ptr()
    assert model.num_unique_parameters == model.num_parameters - tiny.vocab_size * tiny.emb_dim


def test_every_cell_computes_the_baselines_function(
    tiny: ModelConfig, tiny_weights: dict[str, Tensor], each_cell: tuple[str, ...]
) -> None:
    weights = {name: tensor.double() for name, tensor in tiny_weights.items()}
    tokens = torch.randint(0, tiny.vocab_size, TOKENS)
    baseline = build_model(tiny, (), weights)(tokens)
    assert 0.5 < baseline.std() < 5
    torch.testing.assert_close(build_model(tiny, each_cell, weights)(tokens), baseline, rtol=0, atol=1e-12)


def test_every_weight_matters(tiny: ModelConfig, tiny_weights: dict[str, Tensor]) -> None:
    """Else the comparisons of cells would miss a part that reads the wrong one."""
    tokens = torch.randint(0, tiny.vocab_size, TOKENS)
    expected = build_model(tiny, (), tiny_weights)(tokens)
    for theirs in hf_names(tiny).values():
        changed = build_model(tiny, (), tiny_weights | {theirs: tiny_weights[theirs].roll(1, 0)})(tokens)
        assert (changed - expected).abs().max() > 1e-2, theirs


def test_names_and_shapes_are_the_same_in_every_cell(tiny: ModelConfig, each_cell: tuple[str, ...]) -> None:
    def shapes(opts: tuple[str, ...]) -> list[tuple[str, torch.Size]]:
        state = build_model(tiny, opts, device="meta").state_dict()
        return [(name, tensor.shape) for name, tensor in state.items()]

    assert shapes(each_cell) == shapes(())


def test_the_tree_is_the_same_in_every_cell(tiny: ModelConfig, each_cell: tuple[str, ...]) -> None:
    assert str(build_model(tiny, each_cell, device="meta")) == str(build_model(tiny, device="meta"))


def test_weights_are_random_by_default_and_the_same_for_all(tiny: ModelConfig, all_opts: tuple[str, ...]) -> None:
    expected = load_weights("random", tiny)
    for opts in ((), all_opts):
        model = build_model(tiny, opts)
        for path, theirs in hf_names(tiny).items():
            assert torch.equal(model.get_submodule(path).weight, expected[theirs])


def test_model_is_for_inference(tiny: ModelConfig, all_opts: tuple[str, ...]) -> None:
    for opts in ((), all_opts):
        model = build_model(tiny, opts)
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not model(torch.zeros(1, 2, dtype=torch.long)).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype(
    tiny: ModelConfig, tiny_weights: dict[str, Tensor], all_opts: tuple[str, ...], dtype: torch.dtype
) -> None:
    for opts in ((), all_opts):
        model = build_model(tiny, opts, tiny_weights, dtype=dtype)
        tensors = [*model.parameters(), *model.buffers()]
        assert {tensor.dtype for tensor in tensors} == {dtype}
        assert model(torch.zeros(1, 3, dtype=torch.long)).dtype is dtype
        assert torch.equal(
            model.trf_blocks[1].ff.fc2.weight, tiny_weights["model.layers.1.mlp.up_proj.weight"].to(dtype)
        )


def test_meta_allocates_nothing(tiny: ModelConfig, each_cell: tuple[str, ...]) -> None:
    for dtype in (None, torch.bfloat16):
        model = build_model(tiny, each_cell, device="meta", dtype=dtype)
        tensors = [*model.parameters(), *model.buffers()]
        assert all(tensor.is_meta for tensor in tensors)
        assert {tensor.dtype for tensor in tensors} == {dtype or torch.float32}


def test_order_and_repeats_of_names_do_not_matter(
    tiny: ModelConfig, tiny_weights: dict[str, Tensor], all_opts: tuple[str, ...]
) -> None:
    expected = build_model(tiny, ("flash", "mask", "tie"), tiny_weights).parts
    for names in permutations(("flash", "mask", "tie")):
        assert type(build_model(tiny, names, tiny_weights).parts.mask) is type(expected.mask)
        assert build_model(tiny, [*names, *names], tiny_weights).parts.attend == expected.attend
        assert build_model(tiny, names, tiny_weights).parts.head is expected.head
    assert build_model(tiny, "tie", tiny_weights).parts.head is expected.head


@pytest.mark.parametrize(
    ("opts", "said"),
    [
        (
            ("flsh",),
            "unknown optimization 'flsh'; there are flash, tie, mlp, mask, norm",
        ),
        (("flash", "Tie"), "unknown optimization 'Tie'"),
        ({"flash": {"bakend": "math"}}, "flash has no option bakend; it has: backend"),
        ({"tie": {"head": 1}}, "tie has no option head"),
        ({"flash": {"backend": "fast"}}, "flash.backend='fast' is unknown; choose one of auto, flash"),
    ],
)
def test_mistakes_in_opts(tiny: ModelConfig, opts: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        build_model(tiny, opts, device="meta")


class Scaled(torch.nn.Module):
    """A norm whose parameter has another name."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.empty(dim))


class Buffered(RMSNorm):
    """A norm with a constant that is made on `meta`, as the whole model is."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__(dim, eps)
        self.register_buffer("ones", torch.ones(dim), persistent=False)


class Wider(FeedForward):
    """An MLP with one projection more."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.fc4 = Linear(config.hidden_dim, config.emb_dim)


class Narrower(FeedForward):
    """An MLP with one projection less."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        del self.fc2


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"norm": Scaled}, r"trf_blocks\.0\.\S*norm\.scale has no value: the checkpoint names weight; leave out"),
        ({"norm": Buffered}, r"trf_blocks\.0\.\S*norm\.ones has no value: the checkpoint names weight; leave out"),
        ({"mlp": Wider}, r"trf_blocks\.0\.ff\.fc4\.weight has no value: the checkpoint names nothing there"),
        ({"mlp": Narrower}, r"trf_blocks\.0\.ff\.fc2 is no module of this model, and the checkpoint names its weight"),
    ],
)
def test_what_the_checkpoint_has_no_value_for_is_one_error(
    tiny: ModelConfig, monkeypatch: pytest.MonkeyPatch, part: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr("qwen3bench.model.build.assemble", lambda _: replace(BASELINE_PARTS, **part))
    with pytest.raises(UserError, match=said) as caught:
        build_model(tiny)
    assert "\n" not in str(caught.value)


def test_tie_is_refused_where_it_would_change_the_function(tiny: ModelConfig, tiny_weights: dict[str, Tensor]) -> None:
    head = tiny_weights["lm_head.weight"].clone()
    build_model(tiny, ("tie",), tiny_weights | {"lm_head.weight": head})  # equal, though stored twice
    head[-1, -1] += 1e-3
    with pytest.raises(UserError, match="tying would change the function"):
        build_model(tiny, ("tie",), tiny_weights | {"lm_head.weight": head})


def test_on_meta_nothing_is_filled(tiny: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("filled")

    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", refuse)
    monkeypatch.setattr(torch.nn.init, "normal_", refuse)
    build_model(tiny, device="meta")
    for layer in (Linear, Embedding):  # elsewhere they are
        with pytest.raises(AssertionError, match="filled"):
            layer(2, 3)


def test_rope_tables_are_shared_until_they_are_forgotten(tiny: ModelConfig, tiny_weights: dict[str, Tensor]) -> None:
    one, same = (build_model(tiny, (), tiny_weights) for _ in range(2))
    assert one.cos.data_ptr() == same.cos.data_ptr()
    few = replace(tiny, num_layers=1)  # of other weights, of the same heads and positions
    assert build_model(few, (), tiny_weights).cos.data_ptr() == one.cos.data_ptr()
    forget_rope_tables()
    assert build_model(tiny, (), tiny_weights).cos.data_ptr() != one.cos.data_ptr()
