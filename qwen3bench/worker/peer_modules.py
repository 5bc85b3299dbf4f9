"""The module of transformers that a peer's model is made of: transformers' own, or a copy that Liger-Kernel patched.

Liger's patch puts functions and classes of its own into the module, for the whole process. Rotation is looked up there
at every call, so restoring the module after a model is built would undo it. A copy of the module keeps the two apart.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType
from typing import Any

import torch

from qwen3bench.errors import UserError
from qwen3bench.worker.error_text import both_ends, error_text

PEERS = ("transformers", "liger", "torchtitan")
_PATCHED = ("apply_rotary_pos_emb", "Qwen3RMSNorm", "Qwen3MLP")  # what Liger has a kernel for


def modeling(peer: str) -> ModuleType:
    """The module with the classes of Qwen3 that this peer is made of. Raises `UserError` where it is not installed."""
    own: ModuleType = transformers().models.qwen3.modeling_qwen3
    return own if peer == "transformers" else patched_by_liger(own)


def transformers() -> Any:
    """The package, whose own types do not say enough. Raises `UserError` where it is not installed, or older than 5."""
    try:
        import transformers
        from transformers import Qwen3Config, StaticCache  # noqa: F401
    except ImportError as error:
        raise not_installed("peer=transformers needs the package transformers, 5 or newer", error) from error
    return transformers


@cache
def patched_by_liger(own: ModuleType) -> ModuleType:
    """A copy of transformers' module with Liger's kernels in it. Raises `UserError` as `modeling` does."""
    apply_liger_kernel_to_qwen3 = _liger().apply_liger_kernel_to_qwen3
    copy = _copy(own)
    with _in_place_of(own, copy):
        # The loss is the training step's own, and not the model's.
        apply_liger_kernel_to_qwen3(
            rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False
        )
    for name in _PATCHED:
        if not getattr(copy, name).__module__.startswith("liger_kernel"):
            raise UserError(
                f"peer=liger: this liger-kernel leaves {name} as it is; install liger-kernel 0.8.5 or newer"
            )
    copy.apply_rotary_pos_emb = _open_to_the_compiler(copy.apply_rotary_pos_emb)  # type: ignore[attr-defined]
    return copy


def fused_loss() -> Any:
    """Liger's cross-entropy from states and the head's weight. Raises `UserError` as `modeling` does."""
    return _liger().LigerFusedLinearCrossEntropyLoss()


def _liger() -> Any:
    try:
        return import_module("liger_kernel.transformers")
    except ImportError as error:
        raise not_installed("peer=liger needs the package liger-kernel, 0.8.5 or newer, and Triton", error) from error


def _open_to_the_compiler(rotate: Callable[..., Any]) -> Callable[..., Any]:
    """Liger's rotation, for compiled code by its kernel itself.

    Liger 0.8.5 chooses among kernels in a function that is closed to torch.compile, which would cut the model at every
    rotation. On a card that Liger has one kernel for, in Triton, that is the one chosen.
    """

    def rotated(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
        if not torch.compiler.is_compiling():
            return rotate(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        from liger_kernel.ops import LigerRopeFunction

        return LigerRopeFunction.apply(q, k, cos, sin, None, unsqueeze_dim)

    return rotated


def _copy(module: ModuleType) -> ModuleType:
    """The same source as a module of its own, which the compiler can import by its name too."""
    name = f"{module.__name__}_liger"
    assert module.__file__ is not None
    spec = spec_from_file_location(name, module.__file__)
    assert spec is not None
    assert spec.loader is not None
    copy = module_from_spec(spec)
    sys.modules[name] = copy
    spec.loader.exec_module(copy)
    return copy


@contextmanager
def _in_place_of(module: ModuleType, copy: ModuleType) -> Iterator[None]:
    """Importing `module` gives `copy`."""
    package, _, name = module.__name__.rpartition(".")
    sys.modules[module.__name__] = copy
    setattr(sys.modules[package], name, copy)
    try:
        yield
    finally:
        sys.modules[module.__name__] = module
        setattr(sys.modules[package], name, module)


def not_installed(needs: str, error: ImportError, extra: str = "peers") -> UserError:
    """The error where a peer's package cannot be imported; `extra`: of ours, that installs it."""
    why = both_ends(error_text(error), 200)
    return UserError(f"{needs} ({why}); pip install 'qwen3bench[{extra}]', or leave the peer out")
