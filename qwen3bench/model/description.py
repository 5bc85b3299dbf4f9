"""A model's tree, its parameter counts and its memory as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from qwen3bench.config.model_config import ModelConfig
from qwen3bench.model.build import build_model

_RULE = "=" * 50  # as wide as the seed document's
_GIB = 2**30
_UNITS = (("GiB", _GIB), ("MiB", 2**20), ("KiB", 2**10))
_FLOAT32_BYTES = 4
_BFLOAT16_BYTES = 2
_TRAINED = 4  # times the weights: they, their gradients and AdamW's two moments, all in one dtype


def description(config: ModelConfig, opts: Iterable[str] | Mapping[str, Mapping[str, Any]]) -> str:
    """Tree, parameter counts and memory of the model with `opts` on, in the layout of the seed document.

    Built on `meta`, so any size prints at once. Raises `UserError` for an unknown optimization or a conflict.
    """
    model = build_model(config, opts, device="meta")
    parameters = model.num_parameters
    trained = 2 * parameters + model.cos.numel() + model.sin.numel()  # with gradients and RoPE buffers
    return "\n".join(
        (
            _RULE,
            str(model),
            _RULE,
            f"Total number of parameters: {parameters:,}",
            "",
            f"Total number of unique parameters: {model.num_unique_parameters:,}",
            _RULE,
            f"float32 (PyTorch default): {trained * _FLOAT32_BYTES / _GIB:.2f} GB",
            f"bfloat16: {trained * _BFLOAT16_BYTES / _GIB:.2f} GB",
            _RULE,
            "Memory is (parameters + gradients + RoPE buffers) × element size; its GB are GiB (2^30 bytes).",
            f"Weights alone: {_size(parameters * _FLOAT32_BYTES)} in float32, "
            f"{_size(parameters * _BFLOAT16_BYTES)} in bfloat16.",
            f"Non-embedding parameters: {model.num_non_embedding_parameters:,}",
            f"Training holds weights, gradients and AdamW's two moments, {_TRAINED} × the weights: "
            f"{_size(_TRAINED * parameters * _FLOAT32_BYTES)} in amp or fp32, "
            f"{_size(_TRAINED * parameters * _BFLOAT16_BYTES)} in bf16; activations besides.",
        )
    )


def _size(number: int) -> str:
    """Bytes in the largest unit of which there is one, as in 1.40 GiB."""
    unit, size = next((each for each in _UNITS if number >= each[1]), _UNITS[-1])
    return f"{number / size:.2f} {unit}"
