"""The hyperparameters of a Qwen3 model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import with_config

from qwen3bench.config.strict_json import read_json_object, shortened
from qwen3bench.config.validation import AnyCount, AnyText, Flag, PositiveAsIs, check_fields
from qwen3bench.errors import UserError

# Hugging Face's name for each field of ModelConfig.
_HF_NAMES = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "emb_dim": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "context_length": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
}
# Settings of a Hugging Face config.json that would change the function, and the only value each may have here.
_HF_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "use_sliding_window": False,
}
_QUANTIZED = ("quantization_config", "compression_config", "quantization")  # the last is MLX's


@with_config(extra="forbid")
@dataclass(frozen=True)
class ModelConfig:
    """The shape of a dense Qwen3 decoder (Qwen3 Technical Report, arXiv:2505.09388, table 1).

    Raises `UserError` where the shape is impossible.
    """

    num_layers: AnyCount
    emb_dim: AnyCount
    num_heads: AnyCount
    num_kv_heads: AnyCount
    head_dim: AnyCount
    hidden_dim: AnyCount
    vocab_size: AnyCount = 151_936
    context_length: AnyCount = 40_960
    rope_base: PositiveAsIs = 1_000_000.0
    rms_norm_eps: PositiveAsIs = 1e-6
    tie_word_embeddings: Flag = False  # what the published checkpoint does; the switch `tie` decides for a cell
    name: AnyText = "qwen3"

    def __post_init__(self) -> None:
        check_fields(self, "model")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model.num_heads={self.num_heads} is no multiple of num_kv_heads={self.num_kv_heads}; "
                "each key/value head must serve the same number of query heads"
            )
        if self.head_dim % 2:
            raise UserError(f"model.head_dim={self.head_dim} is odd; rotary embedding rotates pairs")

    @property
    def block_weights(self) -> int:
        """Elements of a block's weight matrices."""
        heads = 2 * self.num_heads + 2 * self.num_kv_heads  # q and out, k and v
        return self.emb_dim * (heads * self.head_dim + 3 * self.hidden_dim)

    @classmethod
    def from_hf(cls, hf: dict[str, Any], name: str = "qwen3", source: str = "config.json") -> ModelConfig:
        """The shape that a Hugging Face config.json describes.

        Raises `UserError` where it is no dense Qwen3's, or asks for something that would change the function.
        """
        if hf.get("model_type") != "qwen3":
            raise UserError(
                f"{source}: model_type is {hf.get('model_type')!r}, not 'qwen3'; only dense Qwen3 checkpoints load"
            )
        if any(hf.get(key) for key in _QUANTIZED):
            raise UserError(f"{source}: is of a quantized checkpoint, which does not load; use the unquantized one")
        for key, only in _HF_FIXED.items():
            if hf.get(key, only) != only:
                raise UserError(f"{source}: {key}={shortened(hf[key])} is not supported (only {only!r} is)")
        if others := sorted({str(kind) for kind in hf.get("layer_types") or ()} - {"full_attention"}):
            raise UserError(f"{source}: layer_types has {', '.join(others)}; only full_attention is supported")
        missing = [key for key in _HF_NAMES.values() if key not in hf and key != "tie_word_embeddings"]
        if missing:
            raise UserError(f"{source}: {', '.join(missing)} is missing; is the file complete?")
        return cls(
            **{field: hf[key] for field, key in _HF_NAMES.items() if key in hf},
            rope_base=_rope_base(hf, source),
            name=name,
        )

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> ModelConfig:
        """The shape of the checkpoint in `directory`, from its config.json.

        Raises `UserError` where the file is missing, no strict JSON (a key twice), or not Qwen3's.
        """
        path = Path(directory) / "config.json"
        hf = read_json_object(path)
        if not isinstance(hf.get("tie_word_embeddings", False), bool):
            raise UserError(f"{path}: tie_word_embeddings is neither true nor false; get the file again")
        return cls.from_hf(hf, name=Path(directory).resolve().name, source=str(path))


def _rope_base(hf: dict[str, Any], source: str) -> float:
    """The rotary base: `rope_theta`, at the top level or (transformers 5) inside `rope_parameters`."""
    bases = [hf.get("rope_theta")]
    for key in ("rope_scaling", "rope_parameters"):
        rope = hf.get(key) or {}
        if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type", "default")) != "default":
            raise UserError(f"{source}: rotary scaling {key}={shortened(rope)} is not supported (only the default is)")
        bases.append(rope.get("rope_theta", bases[-1]))
    base = bases[-1]
    if base is None:
        raise UserError(f"{source}: rope_theta is missing; is the file complete?")
    return base
