"""What a run was measured on and with, and whether it may be continued here."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

import qwen3bench
from qwen3bench.errors import UserError
from qwen3bench.record.card import Card
from qwen3bench.record.host import Host, ranges
from qwen3bench.record.messages import RunningCode

PACKAGE = Path(qwen3bench.__file__).resolve().parent
CHANGES_NO_NUMBER = ("run", "resume", "report", "hydra", "devices", "cluster")
HOST_KEYS = (
    "usable CPUs",
    "CPU quota",
    "CPU governor",
    "threads",
    "variables",
)  # of a fingerprint; older ones lack them
_PEERS = ("transformers", "liger-kernel", "torchtitan")  # the packages of other implementations
_PACKAGES = {"liger": ("transformers", "liger-kernel")}  # of a peer that is not a package by its own name
MEASURING = ("worker", "campaign", "model", "opt", "kernels", "record")  # packages whose code may change a number


@dataclass(frozen=True)
class TorchFacts:
    """What PyTorch alone can tell: its version, CUDA's and cuDNN's, its threads, and the device's name.

    `threads` share one operation; `interop_threads` run operations beside each other.
    """

    version: str
    cuda: str | None
    cudnn: int | None
    threads: int
    interop_threads: int
    device_name: str


def environment(device: str, torch: TorchFacts, host: Host) -> dict[str, Any]:
    """The machine and the software of a run, for environment.json; what is unknown is None.

    device: as PyTorch writes it ("cuda", "cuda:1", "cpu"). `host` is the machine's name, `card` the card's UUID.
    """
    with Card.of(device) as card:
        described = card.describe()
    return {
        **(described if device.startswith("cuda") else dict.fromkeys(described)),
        "device": torch.device_name,
        "host": socket.gethostname(),
        "cuda": torch.cuda,
        "cudnn": torch.cudnn,
        "torch": torch.version,
        **{name: version_of(name) for name in ("triton", "numpy", "pandas", "scipy", *_PEERS)},
        "qwen3bench": qwen3bench.__version__,
        "python": platform.python_version(),
        "os": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_cores": psutil.cpu_count(logical=False),
        "cpu_threads": os.cpu_count(),
        "usable_cpus": ranges(host.cpus),
        "usable_cores": host.cores,
        "cpu_quota": _limit(host.cpu_quota),
        "cpu_governor": host.governor,
        "torch_threads": torch.threads,
        "torch_interop_threads": torch.interop_threads,
        "variables": _assignments(host.variables),
        "memory_bytes": psutil.virtual_memory().total,
        "memory_limit_bytes": _limit(host.memory_limit_bytes),
        **git_state(),
        "code": code_hash(),
    }


def system_device_name(device: str) -> str | None:
    """The name of the processor for "cpu", else NVML's of the card; None where NVML knows no such card."""
    if not device.startswith("cuda"):
        return _cpu_name() or platform.machine()
    with Card.of(device) as card:
        name: str | None = card.describe()["device"]
    return name


def code_hash(package: Path = PACKAGE) -> str:
    """The sha256 of the Python files that decide how it is measured: those of the packages in `MEASURING`."""
    digest = hashlib.sha256()
    for path in sorted(path for name in MEASURING for path in (package / name).rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


@cache
def running_code() -> RunningCode:
    """The code that this process runs, as its files are when this is asked first."""
    return RunningCode(package=str(PACKAGE), code=code_hash())


def refuse_other_code(theirs: RunningCode) -> None:
    """Raise `UserError` where a worker runs other code than this process."""
    ours = running_code()
    if theirs.package != ours.package:
        raise UserError(
            f"{theirs.package}: a worker runs this qwen3bench, and the run that of {ours.package}; keep one of them"
        )
    if theirs.code != ours.code:
        raise _other_code(ours.package)


def refuse_other_own_code(begun: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raise `UserError` where a switch of the user's own is not what it was when the run began; both are hashes."""
    for name, code in now.items():
        if begun.get(name) != code:
            raise _other_code(name)


def _other_code(name: str) -> UserError:
    return UserError(
        f"{name}: its code has changed since this run began, and a new worker would measure with another\n"
        "restore it and continue with resume=DIR, or begin a new run"
    )


def fingerprint(config: dict[str, Any], weights_fingerprint: str, torch: TorchFacts, host: Host) -> dict[str, str]:
    """What must not change between a run's sessions: config, weights, code, what compiles and runs kernels, device.

    config: the resolved configuration; where the run is written and how it is reported are not part of it.

    The host is part of it on a card too: eager latency there is the time in which the host launches kernels, which
    fewer CPUs, a quota, another clock or other threads change. Which CPUs they are does not count, only how many on how
    many cores: a scheduler hands out others each time. The memory limit changes no latency. What of the host is unknown
    is left out.
    """
    device = str(config.get("device") or "cpu")
    measured = {key: value for key, value in config.items() if key not in CHANGES_NO_NUMBER}
    text = json.dumps(measured, sort_keys=True, default=str)
    on_cuda = device.startswith("cuda")
    peers = sorted({package for peer in config.get("peer") or () for package in _PACKAGES.get(peer, (peer,))})
    packages = ["triton"] * on_cuda + peers
    return {
        "config": hashlib.sha256(text.encode()).hexdigest(),
        "weights": weights_fingerprint,
        "code": code_hash(),
        "torch": f"{torch.version}, CUDA {torch.cuda}" if torch.cuda else torch.version,
        **{package: version for package in packages if (version := version_of(package))},
        "device": torch.device_name if on_cuda else f"{torch.device_name}, {torch.threads} threads",
        **_of_host(torch, host),
    }


def _of_host(torch: TorchFacts, host: Host) -> dict[str, str]:
    """The host's part of a fingerprint: `HOST_KEYS`, less what is unknown."""
    known = {
        "usable CPUs": f"{len(host.cpus)}" + ("" if host.cores is None else f" on {host.cores} cores"),
        "CPU quota": None if host.cpu_quota is None else str(_limit(host.cpu_quota)),
        "CPU governor": host.governor,
        "threads": f"{torch.threads} in an operation, {torch.interop_threads} between operations",
        "variables": _assignments(host.variables),
    }
    return {key: value for key, value in known.items() if value is not None}


def differences(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """Which parts of two fingerprints differ, in words; what of the host one of them does not know is no difference."""
    words = {"config": "the configuration", "weights": "the weights", "code": "the code of qwen3bench"}
    keys = [key for key in dict.fromkeys((*old, *new)) if key not in HOST_KEYS or (key in old and key in new)]
    changed = [key for key in keys if old.get(key) != new.get(key)]
    return [words.get(key) or _then_and_now(key, old.get(key), new.get(key)) for key in changed]


def _then_and_now(key: str, then: str | None, now: str | None) -> str:
    """What differs: for a hash, which says nothing to a reader, its name alone."""
    is_hash = any(value is not None and value.startswith("sha256:") for value in (then, now))
    return key if is_hash else f"{key} ({then} then, {now} now)"


def version_of(package: str) -> str | None:
    """The installed version of a package, None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _assignments(variables: Mapping[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in variables.items()) or "none"


def _limit(limit: float | None) -> float | str | None:
    """A limit as JSON has it, which knows no infinity."""
    return "no limit" if limit == float("inf") else limit


def _cpu_name() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, None) or platform.processor() or None


def git_state(checkout: Path = PACKAGE.parent) -> dict[str, Any]:
    """The commit of the source tree and whether files differ from it; None where the package is no checkout."""
    status = _git(checkout, "status", "--porcelain")
    return {
        "git_commit": _git(checkout, "rev-parse", "HEAD"),
        "git_dirty": None if status is None else bool(status),
    }


def _git(checkout: Path, *command: str) -> str | None:
    """What git says of the source tree; None where the package is no checkout or git cannot tell."""
    if not (checkout / ".git").exists():  # else git would answer for whatever repository lies around
        return None
    try:
        return subprocess.run(
            ["git", *command],
            cwd=checkout,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
