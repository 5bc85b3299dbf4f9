"""Where a checkpoint is: a local directory, or a repository of the Hugging Face hub, which is asked for its files."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from qwen3bench.config.model_config import ModelConfig
from qwen3bench.errors import UserError

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def find_checkpoint(source: str | Path) -> Path:
    """The local directory of a checkpoint; a hub id is fetched (JSON and safetensors files only).

    Raises `UserError` where `source` is neither, or the hub cannot be asked.
    """
    return _local(source) or _fetched(str(source), ["*.json", "*.safetensors"])


def checkpoint_shape(source: str | Path) -> ModelConfig:
    """The shape in a checkpoint's config.json; of a hub id no other file is fetched.

    Raises `UserError` as `find_checkpoint` does, and where that file is missing or no dense Qwen3's.
    """
    if directory := _local(source):
        return ModelConfig.from_pretrained(directory)
    model = ModelConfig.from_pretrained(_fetched(str(source), ["config.json"]))
    return replace(model, name=str(source).rpartition("/")[2])


def _local(source: str | Path) -> Path | None:
    """The directory that `source` names; None for a hub id."""
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            return path
        if path.exists():
            raise UserError(f"{path}: is a file; give the checkpoint's directory (config.json, *.safetensors)")
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"weights {str(source)!r}: cannot be looked up ({error}); give a directory") from error
    if not _HUB_ID.fullmatch(str(source)):
        raise UserError(
            f"weights {str(source)!r}: no such directory; give a checkpoint's directory, a hub id or random"
        )
    return None


def _fetched(hub_id: str, patterns: list[str]) -> Path:
    """The local directory of a repository's files of these names."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UserError(
            f"weights {hub_id}: no such directory, and the hub needs pip install huggingface_hub"
        ) from error
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except Exception as error:  # its own, its HTTP client's and the system's errors share no base class
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(
            f"weights {hub_id}: no such directory, and the hub did not give it ({reason}); "
            "check the name and the network, or give a directory"
        ) from error
