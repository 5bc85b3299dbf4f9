"""qwen3bench: which optimization of a transformer pays, how much, where, and do they stack?

The public names are imported on first use, so that reading results does not need PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen3bench.analysis.effects import effects
    from qwen3bench.analysis.run import load_run, load_runs
    from qwen3bench.config.model_config import ModelConfig
    from qwen3bench.model.build import build_model
    from qwen3bench.model.weights import load_weights

__version__ = "0.1.0"
__all__ = ["ModelConfig", "build_model", "effects", "load_run", "load_runs", "load_weights"]

_HOMES = {
    "ModelConfig": "qwen3bench.config.model_config",
    "build_model": "qwen3bench.model.build",
    "effects": "qwen3bench.analysis.effects",
    "load_run": "qwen3bench.analysis.run",
    "load_runs": "qwen3bench.analysis.run",
    "load_weights": "qwen3bench.model.weights",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
