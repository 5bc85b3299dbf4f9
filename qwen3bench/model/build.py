"""The one builder: a configuration, the names of the optimizations and weights become a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from qwen3bench.config.catalogue import resolve
from qwen3bench.config.model_config import ModelConfig
from qwen3bench.errors import UserError
from qwen3bench.model.baseline import assemble
from qwen3bench.model.checkpoint import EMBEDDING, HEAD
from qwen3bench.model.qwen3 import Qwen3Model, rope_tables
from qwen3bench.model.weights import load_weights, refuse_untied

_BLOCK_NAMES = {
    "att.W_query": "self_attn.q_proj",
    "att.W_key": "self_attn.k_proj",
    "att.W_value": "self_attn.v_proj",
    "att.out_proj": "self_attn.o_proj",
    "att.q_norm": "self_attn.q_norm",
    "att.k_norm": "self_attn.k_norm",
    "ff.fc1": "mlp.gate_proj",
    "ff.fc2": "mlp.up_proj",
    "ff.fc3": "mlp.down_proj",
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
}
_MEND = "leave out the optimization whose module this is, or mend the module"


def hf_names(config: ModelConfig) -> dict[str, str]:
    """Hugging Face's tensor name for each module of the model that holds a weight."""
    names = {"tok_emb": EMBEDDING, "final_norm": "model.norm.weight", "out_head": HEAD}
    for layer in range(config.num_layers):
        for module, theirs in _BLOCK_NAMES.items():
            names[f"trf_blocks.{layer}.{module}"] = f"model.layers.{layer}.{theirs}.weight"
    return names


def build_model(
    config: ModelConfig,
    opts: Iterable[str] | Mapping[str, Mapping[str, Any]] = (),
    weights: dict[str, Tensor] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Qwen3Model:
    """A Qwen3 model with the named optimizations on; call it with token ids (b, t) for logits (b, t, vocabulary).

    `opts` are names, or a mapping of names to options. `weights` is a state dict with Hugging Face's names, by
    default seeded random. The model's parameters ARE these tensors wherever device, dtype and layout allow, so
    many models can share one set; without `tie` the head gets a copy where the weights share it with the embedding.
    `device` and `dtype` default to the weights' own, else CPU and float32; device "meta" allocates nothing.

    Raises `UserError` for an unknown optimization, two that claim one part, one whose modules hold what no checkpoint
    has a value for, and `tie` on weights that are not tied.
    """
    model = skeleton(config, opts)
    if weights is None and torch.device(device or "cpu").type != "meta":
        weights = load_weights("random", config, device=device or "cpu", dtype=dtype or torch.float32)
    return filled(model, weights, device, dtype)


def skeleton(config: ModelConfig, opts: Iterable[str] | Mapping[str, Mapping[str, Any]]) -> Qwen3Model:
    """The model on `meta`, made of the parts that the optimizations leave, without weights."""
    parts = assemble(resolve(opts))
    with torch.device("meta"):
        model = Qwen3Model(config, parts)
    _refuse_unnamed(model)
    return model


def filled(
    model: Qwen3Model,
    weights: dict[str, Tensor] | None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Qwen3Model:
    """The skeleton, its parameters these tensors as in `build_model`; without weights still on `meta`, in `dtype`."""
    if weights is not None:
        _assign(model, weights, device, dtype)
    else:
        model.to(dtype=dtype)
    embedding = model.tok_emb.weight
    rotary = replace(model.config, num_layers=1, vocab_size=1)  # models that differ in no more have the same tables
    model.cos, model.sin = _shared_rope_tables(rotary, embedding.device, embedding.dtype)
    if not embedding.is_meta:
        _refuse_without_value(model)
    return model.eval().requires_grad_(False)


def _assign(
    model: Qwen3Model, weights: dict[str, Tensor], device: torch.device | str | None, dtype: torch.dtype | None
) -> None:
    tied = model.out_head.weight is model.tok_emb.weight
    if tied:
        refuse_untied(weights)
    for path, theirs in hf_names(model.config).items():
        if path == "out_head" and tied:
            continue
        module = model.get_submodule(path)
        module.weight = nn.Parameter(weights[theirs].to(device, dtype), requires_grad=False)
    if tied:
        model.out_head.weight = model.tok_emb.weight
    elif model.out_head.weight.data_ptr() == model.tok_emb.weight.data_ptr():
        model.out_head.weight = nn.Parameter(model.tok_emb.weight.detach().clone(), requires_grad=False)
    for module in model.modules():
        if callable(pack := getattr(module, "pack", None)):
            pack()


def _refuse_unnamed(model: Qwen3Model) -> None:
    """Raise `UserError` where the checkpoint names a module that `model` lacks, or lacks a parameter that it holds."""
    paths = hf_names(model.config)
    modules = dict(model.named_modules())
    for path in paths:
        if path not in modules:
            raise UserError(f"{path} is no module of this model, and the checkpoint names its weight; {_MEND}")
    for name, _ in model.named_parameters(remove_duplicate=False):
        if name.rpartition(".")[0] not in paths or not name.endswith(".weight"):
            raise _without_value(name, paths)


def _refuse_without_value(model: Qwen3Model) -> None:
    """Raise `UserError` where a module was given a buffer or a tensor on `meta`, and nothing has filled it in."""
    for path, module in model.named_modules():
        held = {**dict(module.named_buffers(recurse=False)), **vars(module)}
        for name, value in held.items():
            if isinstance(value, Tensor) and value.is_meta:
                raise _without_value(f"{path}.{name}", hf_names(model.config))


def _without_value(name: str, paths: Mapping[str, str]) -> UserError:
    named = "weight" if name.rpartition(".")[0] in paths else "nothing there"
    return UserError(f"{name} has no value: the checkpoint names {named}; {_MEND}")


@lru_cache(maxsize=2)
def _shared_rope_tables(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return rope_tables(config, device, dtype)


def forget_rope_tables() -> None:
    """Let go of the tables that models on one device share, so that the next model's memory is its own."""
    _shared_rope_tables.cache_clear()
