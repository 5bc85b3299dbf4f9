"""A Hugging Face checkpoint's files, judged before any tensor is allocated.

Layout: config.json and model.safetensors, or model.safetensors.index.json and its shards. The safetensors library
judges a header's layout; what it lets pass and what the config asks for are judged here, without torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from qwen3bench.config.model_config import ModelConfig
from qwen3bench.config.strict_json import JSON_LIMIT_BYTES, json_object, parse_json, read_json_object, shortened
from qwen3bench.errors import UserError

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
_BACKBONE = "model."  # how the names of a backbone's tensors begin inside a whole model

_DTYPES = ("F64", "F32", "F16", "BF16")
# Rotary frequencies that older transformers stored; they follow from the config.
_IGNORED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_PICKLE_MAGICS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x04")
_PICKLE = "a pickle can run any code when opened and is never read; save the checkpoint as safetensors"


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a checkpoint, by its Hugging Face name, head included, in order."""
    width, ff, head = config.emb_dim, config.hidden_dim, config.head_dim
    queries, keys = config.num_heads * head, config.num_kv_heads * head
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (width,),
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.q_norm": (head,),
        "self_attn.k_norm": (head,),
        "self_attn.o_proj": (width, queries),
        "post_attention_layernorm": (width,),
        "mlp.gate_proj": (ff, width),
        "mlp.up_proj": (ff, width),
        "mlp.down_proj": (width, ff),
    }
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, width)}
    for i in range(config.num_layers):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return shapes | {"model.norm.weight": (width,), HEAD: (config.vocab_size, width)}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is stored: its file, and its name there."""

    path: Path
    name: str


def locate_tensors(directory: Path, config: ModelConfig, *, tied: bool) -> dict[str, StoredTensor]:
    """Where each of `tensor_shapes(config)` is stored, in order.

    A backbone (an embedding or reranking model) has the same names without `model.`. It may lack the head, and so may a
    `tied` checkpoint. Reads headers only. Raises `UserError` naming the file where one is malformed, or a tensor is
    missing, extra or misshapen.
    """
    headers = {}
    for path, listed in weight_files(directory).items():
        headers[path] = _read_header(path)
        if listed is not None:
            _check_listed(path, headers[path].keys(), listed)
    stored_names = {name for header in headers.values() for name in header}
    backbone = not any(name.startswith(_BACKBONE) for name in stored_names)
    found = {
        _BACKBONE * (backbone and name != HEAD) + name: StoredTensor(path, name)
        for path, header in headers.items()
        for name in header
    }
    found = {name: stored for name, stored in found.items() if not _IGNORED.fullmatch(name)}
    if config.num_layers > len(found):  # before a hostile config.json makes the list of names long
        raise UserError(
            f"{directory}: {len(found)} tensors are too few for {config.num_layers} layers; is it complete?"
        )
    shapes = tensor_shapes(config)
    if (tied or backbone) and HEAD not in found:
        del shapes[HEAD]
    if missing := [name for name in shapes if name not in found]:
        raise UserError(f"{directory}: {_some(missing)} missing from the checkpoint; is it complete?")
    if extra := [stored for name, stored in found.items() if name not in shapes]:
        names = _some([stored.name for stored in extra])
        raise UserError(f"{extra[0].path}: {names} no part of a Qwen3 model of this config; use another")
    for name, shape in shapes.items():
        path, own = found[name].path, found[name].name
        if headers[path][own] != shape:
            raise UserError(
                f"{path}: {own} has shape {shortened(headers[path][own])}, config.json asks for {shape}; "
                "use the config.json that belongs to this checkpoint"
            )
    return {name: found[name] for name in shapes}


def check_config(directory: Path, config: ModelConfig) -> bool:
    """Whether the checkpoint in `directory` ties its head, by its config.json.

    Raises `UserError` where that file describes another shape than `config`. `tie_word_embeddings` may
    differ: the checkpoint knows.
    """
    found = ModelConfig.from_pretrained(directory)
    for field, value in vars(config).items():
        if field not in ("name", "tie_word_embeddings") and getattr(found, field) != value:
            raise UserError(
                f"{directory / 'config.json'}: {field} is {getattr(found, field)!r}, not {value!r} as asked; "
                "choose the model that belongs to this checkpoint"
            )
    return found.tie_word_embeddings


def weight_files(directory: Path) -> dict[Path, set[str] | None]:
    """The files that hold a checkpoint's tensors: model.safetensors, else the shards that the index names.

    Each with the names that the index has for it, None without an index. Raises `UserError` where there are
    none, only pickles (never opened), or the index is malformed or points outside.
    """
    single = directory / "model.safetensors"
    if single.exists():
        return {single: None}
    if index_path(directory).exists():
        return _indexed(directory)
    if pickles := sorted(path.name for path in directory.glob("*") if path.suffix in _PICKLES):
        raise UserError(f"{directory / pickles[0]}: {_PICKLE}")
    raise UserError(f"{directory}: holds no model.safetensors and no index of shards; is it a checkpoint?")


def index_path(directory: Path) -> Path:
    """Where a sharded checkpoint keeps its index."""
    return directory / "model.safetensors.index.json"


def _indexed(directory: Path) -> dict[Path, set[str] | None]:
    path = index_path(directory)
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path}: holds no weight_map; get the file again")
    names: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str):
            raise UserError(f"{path}: maps {shortened(tensor)} to {shortened(shard)}, no file name; get the file again")
        names.setdefault(shard, set()).add(tensor)
    return {_shard(directory, shard): tensors for shard, tensors in names.items()}


def _shard(directory: Path, name: str) -> Path:
    path = directory / name
    what = f"{index_path(directory)}: {shortened(name)}"
    try:
        target, there = path.resolve(), path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # NUL, a lone surrogate, a loop of links
        raise UserError(f"{what} is no file's name; get the checkpoint again") from error
    plain = not Path(name).is_absolute() and ".." not in Path(name).parts
    if not plain or not any(target.is_relative_to(root) for root in _roots(directory)):
        raise UserError(f"{what} points outside its directory; get the checkpoint again")
    if path.suffix != ".safetensors":
        raise UserError(f"{what} is no safetensors file, and nothing else is read; save it as safetensors")
    if not there:
        raise UserError(f"{what} is not there; is the checkpoint complete?")
    return path


def _roots(directory: Path) -> list[Path]:
    """Where a shard may lie: the directory, and for a snapshot in the hub's cache where its links lead."""
    directory = directory.resolve()
    repository = directory.parent.parent
    if directory.parent.name != "snapshots" or not repository.name.startswith("models--"):
        return [directory]
    # A repository's blob may itself be a link, to the one that all repositories of the cache share.
    return [directory, repository / "blobs", repository.parent / "blobs"]


def _check_listed(path: Path, held: Iterable[str], listed: set[str]) -> None:
    """Raise `UserError` unless a shard holds exactly the tensors that the index says it does."""
    if wrong := sorted(listed.symmetric_difference(held)):
        raise UserError(
            f"{path}: {_some(wrong)} in the index or in this shard, not in both; get index and shards again"
        )


def _read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in a safetensors file, its header judged and its data unread. Raises `UserError`."""
    again = "get the file again"
    try:
        if not path.is_file():
            raise UserError(f"{path}: is no regular file; {again}")
        with path.open("rb") as file:
            start = file.read(8)
            header_bytes = int.from_bytes(start, "little")
            if header_bytes > JSON_LIMIT_BYTES and start.startswith(_PICKLE_MAGICS):
                raise UserError(f"{path}: {_PICKLE}")
            if header_bytes > JSON_LIMIT_BYTES:
                raise UserError(f"{path}: announces an oversized header of {header_bytes} bytes; {again}")
            text = file.read(header_bytes)
        with safe_open(path, framework="np") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (it is no mapping)
            dtypes = {name: part.get_dtype() for name, part in slices.items()}
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({shortened(str(error))}); {again}") from error
    # safetensors takes the last of two equal keys, and ignores keys that it does not know.
    for name, entry in json_object(parse_json(text, f"{path} (header)"), str(path)).items():
        if name != "__metadata__" and set(entry) != {"dtype", "shape", "data_offsets"}:
            raise UserError(f"{path}: {shortened(name)} has more than dtype, shape and data_offsets; {again}")
    for name, dtype in dtypes.items():
        if dtype not in _DTYPES:
            raise UserError(
                f"{path}: {shortened(name)} has dtype {dtype}, as in a quantized checkpoint; "
                f"use the unquantized one ({', '.join(_DTYPES)})"
            )
    return shapes


def _some(names: list[str]) -> str:
    """The first of `names`, how many more there are, and the verb."""
    first = shortened(names[0])
    return f"{first} is" if len(names) == 1 else f"{first} and {len(names) - 1} more are"
