"""The weights of a model: seeded random ones, or a checkpoint's, as one bank that every cell shares."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qwen3bench.config.checkpoint_source import find_checkpoint
from qwen3bench.config.choices import choices, options_of
from qwen3bench.config.model_config import ModelConfig
from qwen3bench.errors import UserError
from qwen3bench.model.checkpoint import (
    EMBEDDING,
    HEAD,
    StoredTensor,
    check_config,
    index_path,
    locate_tensors,
    tensor_shapes,
    weight_files,
)
from qwen3bench.record.host import available_memory_bytes

# Projections of the same input, stored as row slices of one tensor so that a fused layout is a view.
_STACKS = (
    ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
)
_INITIALIZER_RANGE = 0.02  # transformers' Qwen3Config.initializer_range


def load_weights(
    source: str | Path,
    config: ModelConfig,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Tensor]:
    """A state dict with Hugging Face names, on `device` in `dtype`, nothing in it stored twice.

    `source` is "random" (seeded: on one device the same values in every dtype, rounded), a directory in
    Hugging Face's layout, or a hub id such as "Qwen/Qwen3-0.6B". In each layer q, k, v and gate, up are
    consecutive rows of one tensor (see `stacked`). A tied head, and the random one, IS the embedding tensor.
    Raises `UserError` where the checkpoint is malformed or not of `config`, or memory does not suffice.
    """
    device = torch.device(device)
    if str(source) == "random":
        return _random_weights(config, device, dtype, seed)
    return _read_weights(find_checkpoint(source), config, device, dtype)


def judge_weights(source: str, config: ModelConfig, dtype: torch.dtype, memory_bytes: int | None) -> None:
    """Raise `UserError` where these weights are malformed, not of `config`, or larger than `memory_bytes`.

    Counted as a run holds them, with a head of their own. Reads the headers of a checkpoint only.
    """
    shapes = tensor_shapes(config)
    if source != "random":
        directory = find_checkpoint(source)
        locate_tensors(directory, config, tied=check_config(directory, config))
    _refuse_too_large(config.name, shapes, dtype, memory_bytes)


def _refuse_too_large(
    name: str, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, memory_bytes: int | None
) -> None:
    needed = sum(map(math.prod, shapes.values())) * dtype.itemsize
    if memory_bytes is not None and needed > memory_bytes:
        fits = largest_that_fits(dtype, memory_bytes)
        raise UserError(
            f"{name} needs {needed / 1e9:.1f} GB in {str(dtype).removeprefix('torch.')} for its weights alone, and the "
            f"memory here has {memory_bytes / 1e9:.1f} GB; "
            + (f"{fits} fits" if fits else "name a smaller model or another device")
        )


def largest_that_fits(dtype: torch.dtype, memory_bytes: int) -> str | None:
    """The largest of the models in configs/ that a run has memory for; None where there is none.

    Counted are the weights with a head of their own, as the baseline holds them, and half as much again but at least
    1 GB for all else: what libraries keep, the cache, activations.
    """
    found: dict[int, str] = {}
    for name in choices("model"):
        shapes = tensor_shapes(ModelConfig(**options_of("model", name)))
        needed = sum(map(math.prod, shapes.values())) * dtype.itemsize
        if needed + max(needed / 2, 1e9) <= memory_bytes:
            found[needed] = name
    return found[max(found)] if found else None


def _memory_bytes(device: torch.device) -> int | None:
    """What weights on `device` may take: a card's whole memory, or what a program may still ask the host for."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return available_memory_bytes() if device.type == "cpu" else None


def weights_fingerprint(source: str | Path, seed: int = 0) -> str:
    """What tells one set of weights from another: "random:seed=0", or "sha256:…" of a checkpoint's files.

    The digest is over the name, size and full contents of config.json, the index and the safetensors files in
    use: a sample of the contents would miss a fine-tuned layer. Raises `UserError` where one cannot be read.
    """
    if str(source) == "random":
        return f"random:seed={seed}"
    directory = find_checkpoint(source)
    digest = hashlib.sha256()
    try:
        shards = weight_files(directory)
        index = [index_path(directory)] if None not in shards.values() else []
        for path in sorted([directory / "config.json", *index, *shards]):
            with path.open("rb") as file:
                contents = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{path.relative_to(directory)}\0{path.stat().st_size}\0{contents}\n".encode())
    except OSError as error:
        raise UserError(f"{directory}: cannot be read ({error}); is the checkpoint complete?") from error
    return f"sha256:{digest.hexdigest()}"


def stacked(*tensors: Tensor) -> Tensor:
    """The tensor whose row slices `tensors` are: a view where one follows the other in storage, else a copy.

    Each is (rows, …), equal in other dimensions and dtype; the result has all the rows, and no gradient.
    """
    first, *rest = tensors = tuple(tensor.detach() for tensor in tensors)
    storage = first.untyped_storage()
    end = first.storage_offset() + first.numel()
    in_place = first.is_contiguous()
    for tensor in rest:
        in_place = (
            in_place
            and tensor.untyped_storage() is storage  # on `meta` all addresses are 0
            and tensor.storage_offset() == end
            and tensor.is_contiguous()
            and (tensor.dtype, tensor.shape[1:]) == (first.dtype, first.shape[1:])
        )
        end += tensor.numel()
    rows = sum(tensor.shape[0] for tensor in tensors)
    if not in_place and first.is_meta:  # to concatenate there PyTorch would import its compiler, which takes seconds
        return first.new_empty((rows, *first.shape[1:]))
    if not in_place:
        return torch.cat(tensors)
    return first.as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())


def head_is_tied(weights: Mapping[str, Tensor]) -> bool:
    """Whether the head is, or equals value for value, the embedding."""
    head, embedding = weights[HEAD], weights[EMBEDDING]
    return head is embedding or torch.equal(head, embedding)


def refuse_untied(weights: Mapping[str, Tensor]) -> None:
    """Raise `UserError` unless the head equals the embedding: only then does `tie` keep the function."""
    if not head_is_tied(weights):
        raise UserError(
            "tie: this checkpoint's head differs from its embedding, so tying would change the function; "
            "leave tie out, or use a checkpoint that ties"
        )


def _bank(
    model: str, shapes: dict[str, tuple[int, ...]], device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Empty tensors of `shapes`, the `_STACKS` of each layer as row slices of one allocation.

    Raises `UserError` where memory does not suffice, before any is asked for.
    """
    _refuse_too_large(model, shapes, dtype, _memory_bytes(device))
    bank: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        if name in bank:
            continue
        layer, part = _split(name)
        names = next(([f"{layer}{other}" for other in stack] for stack in _STACKS if part in stack), [name])
        rows = [shapes[other][0] for other in names]
        whole = torch.empty(sum(rows), *shape[1:], device=device, dtype=dtype)
        bank |= zip(names, whole.split(rows), strict=True)
    return {name: bank[name] for name in shapes}


def _split(name: str) -> tuple[str, str]:
    match = re.match(r"(model\.layers\.\d+\.)(.*)", name)
    return (match[1], match[2]) if match else ("", name)


def with_head(weights: Mapping[str, Tensor], tied: bool) -> dict[str, Tensor]:
    """The weights, the head a copy where it is the embedding and is not to be."""
    embedding, head = weights[EMBEDDING], weights[HEAD]
    copied = not tied and head.data_ptr() == embedding.data_ptr()
    return {**weights, HEAD: head.clone() if copied else head}


def _random_weights(config: ModelConfig, device: torch.device, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    shapes = tensor_shapes(config)
    del shapes[HEAD]
    weights = _bank(config.name, shapes, device, dtype)
    root = torch.Generator().manual_seed(seed)
    seeds = torch.randint(2**32, (len(weights),), generator=root, device="cpu").tolist()

    def fill(name: str, tensor: Tensor, seed: int) -> None:
        if name.endswith("norm.weight"):
            tensor.fill_(1)
            return
        drawn = tensor if dtype == torch.float32 else torch.empty_like(tensor, dtype=torch.float32)
        drawn.normal_(0, _INITIALIZER_RANGE, generator=torch.Generator(device).manual_seed(seed))
        if drawn is not tensor:
            tensor.copy_(drawn)

    # A CPU draws normals on one core: a seed for each tensor lets the others help, the values unchanged.
    with ThreadPoolExecutor(torch.get_num_threads() if device.type == "cpu" else 1) as pool:
        list(pool.map(fill, weights.keys(), weights.values(), seeds))
    weights[HEAD] = weights[EMBEDDING]
    return weights


def _read_weights(directory: Path, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    tied = check_config(directory, config)
    files = locate_tensors(directory, config, tied=tied)
    shapes = tensor_shapes(config)
    weights = _bank(config.name, {name: shapes[name] for name in files}, device, dtype)
    for name, tensor in weights.items():
        _read_tensor(files[name], tensor)
    # A head stored beside a config that ties counts by its values, as in transformers.
    if HEAD not in weights or (tied and head_is_tied(weights)):
        weights[HEAD] = weights[EMBEDDING]
    return weights


def _read_tensor(stored: StoredTensor, tensor: Tensor) -> None:
    """Fill `tensor` from its file. Raises `UserError` where it cannot be read or holds NaN or infinity."""
    path, name = stored.path, stored.name
    try:
        # Opened anew for each tensor: what is mapped stays resident until the file is closed.
        with safe_open(path, framework="pt", device=str(tensor.device)) as file:
            tensor.copy_(file.get_tensor(name))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: {name} cannot be read ({error}); get the file again") from error
    low, high = tensor.aminmax()  # unlike isfinite, allocates nothing; NaN carries through
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise UserError(f"{path}: {name} holds NaN, infinity or a value beyond {tensor.dtype}; use another checkpoint")
