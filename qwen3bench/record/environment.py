"""What a run was measured on and with, and whether it may be continued here."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

import qwen3bench
from qwen3bench.errors import UserError
from qwen3bench.record.card import Monitor

_PACKAGE = Path(qwen3bench.__file__).resolve().parent
_CHECKOUT = _PACKAGE.parent
CHANGES_NO_NUMBER = ("run", "resume", "report", "hydra")


def environment(device: str | None = None) -> dict[str, Any]:
    """The machine and the software of a run, for environment.json; what is unknown is None.

    device: as PyTorch writes it ("cuda", "cuda:1", "cpu"); None takes CUDA where it is. The host's name stays
    private. Raises `UserError` where there is no such device.
    """
    import torch

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with Monitor(_index(device)) as monitor:
        card = monitor.describe()
    return {
        **(card if device.startswith("cuda") else dict.fromkeys(card)),
        "device": device_name(device),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "torch": torch.__version__,
        **{name: _version(name) for name in ("triton", "numpy", "pandas", "scipy", "transformers")},
        "qwen3bench": qwen3bench.__version__,
        "python": platform.python_version(),
        "os": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_cores": psutil.cpu_count(logical=False),
        "cpu_threads": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None if (status := _git("status", "--porcelain")) is None else bool(status),
        "code": code_hash(),
    }


def device_name(device: str) -> str:
    """The name of the card or, for "cpu", of the processor.

    Raises `UserError` where there is no such card.
    """
    if not device.startswith("cuda"):
        return _cpu_name() or platform.machine()
    with Monitor(_index(device)) as monitor:  # PyTorch would start CUDA in this process
        name = monitor.describe()["device"]
    if name:
        return name
    import torch

    try:
        return torch.cuda.get_device_name(_index(device))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(f"device={device}: PyTorch finds no such card; use device=cpu or mend the driver") from error


def code_hash() -> str:
    """The sha256 of what decides how it is measured: the package's Python and the YAML files of configs/."""
    configs = next((path for path in (_PACKAGE / "configs", _CHECKOUT / "configs") if path.is_dir()), None)
    files = {f"qwen3bench/{path.relative_to(_PACKAGE).as_posix()}": path for path in _PACKAGE.rglob("*.py")}
    if configs:
        files |= {f"configs/{path.relative_to(configs).as_posix()}": path for path in configs.rglob("*.yaml")}
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        content = path.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def fingerprint(config: dict[str, Any], weights_fingerprint: str) -> dict[str, str]:
    """What must not change between a run's sessions: config, weights, code, what compiles and runs kernels, device.

    config: the resolved configuration; where the run is written and how it is reported are not part of it.
    """
    import torch

    device = str(config.get("device") or "cpu")
    name = device_name(device)
    measured = {key: value for key, value in config.items() if key not in CHANGES_NO_NUMBER}
    text = json.dumps(measured, sort_keys=True, default=str)
    packages = ["triton"] * device.startswith("cuda") + sorted(config.get("peer") or ())
    return {
        "config": hashlib.sha256(text.encode()).hexdigest(),
        "weights": weights_fingerprint,
        "code": code_hash(),
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}" if torch.version.cuda else torch.__version__,
        **{package: version for package in packages if (version := _version(package))},
        "device": name if device.startswith("cuda") else f"{name}, {torch.get_num_threads()} threads",
    }


def differences(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """Which parts of two fingerprints differ, in words."""
    words = {"config": "the configuration", "weights": "the weights", "code": "the code of qwen3bench"}
    changed = [key for key in dict.fromkeys((*old, *new)) if old.get(key) != new.get(key)]
    return [words.get(key) or f"{key} ({old.get(key)} then, {new.get(key)} now)" for key in changed]


def _index(device: str) -> int:
    return int(device.partition(":")[2] or 0)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, None) or platform.processor() or None


def _git(*command: str) -> str | None:
    """What git says of the source tree; None where the package is no checkout or git cannot tell."""
    if not (_CHECKOUT / ".git").exists():  # else git would answer for whatever repository lies around
        return None
    try:
        return subprocess.run(
            ["git", *command],
            cwd=_CHECKOUT,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
