"""Print a model's tree, its parameter counts and its memory; nothing is allocated.

usage: python -m qwen3bench.describe [+opt=NAME,…] [model=NAME] [KEY=VALUE …]

  python -m qwen3bench.describe                       the baseline of Qwen3-0.6B
  python -m qwen3bench.describe +opt=flash,tie        ONE model with both on
  python -m qwen3bench.describe model=32b             another size; its shape: model.num_layers=2, …
  python -m qwen3bench.describe weights=DIR           the shape in DIR/config.json
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen3bench.config.cli import compose, guarded
from qwen3bench.config.model_config import ModelConfig
from qwen3bench.errors import UserError

_RULE = "=" * 50
_GIB = 2**30
_FLOAT32_BYTES = 4
_BFLOAT16_BYTES = 2


def describe(config: ModelConfig, opts: Iterable[str] | Mapping[str, Mapping[str, Any]] = ()) -> str:
    """Tree, parameter counts and memory of the model with `opts` on, in the layout of the seed document.

    Built on `meta`, so any size prints at once. Raises `UserError` for an unknown optimization or a conflict.
    """
    from qwen3bench.model.build import build_model  # late: --help and mistakes need no torch

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
            f"Weights alone: {parameters * _FLOAT32_BYTES / _GIB:.2f} GiB in float32, "
            f"{parameters * _BFLOAT16_BYTES / _GIB:.2f} GiB in bfloat16.",
            f"Non-embedding parameters: {model.num_non_embedding_parameters:,}",
        )
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status of `python -m qwen3bench.describe ARGV`: 0, or 1 with the error on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _run(arguments))


def _run(arguments: Sequence[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print((__doc__ or "").strip())
        return 0
    settings = compose(arguments)
    if settings.weights != "random" and not Path(settings.weights).expanduser().is_dir():
        raise UserError(f"weights={settings.weights}: no such directory; give a checkpoint's, or a size: model=8b")
    print(describe(settings.model, settings.opts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
