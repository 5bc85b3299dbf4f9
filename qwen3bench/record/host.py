"""What a process may use of its machine: processors, their time and clock, memory, and variables that steer kernels."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")
_CPUS = Path("/sys/devices/system/cpu")
_NO_LIMIT = 2**60  # version 1 writes "no limit" as a number of about 2^63
# Variables that choose threads, kernels or how work is launched.
_STEERING = re.compile(
    r"(OMP|GOMP|KMP|MKL|OPENBLAS|DNNL|ONEDNN|ATEN_CPU|TORCHDYNAMO|TORCHINDUCTOR|TORCH_COMPILE|PYTORCH|CUBLAS)_\w+"
    r"|CUDA_(LAUNCH_BLOCKING|DEVICE_MAX_CONNECTIONS|MODULE_LOADING)|NVIDIA_TF32_OVERRIDE|TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"
)
_PLACES = ("_DIR", "_PATH", "_FILE", "_LIB", "_HOME", "_OUTPUT", "_URL")  # how such a variable's name ends: private


@dataclass(frozen=True)
class Host:
    """What this process may use of its machine; None is unknown.

    `cpus`: the numbers of its CPUs. `cores`: how many physical cores these are. `cpu_quota`: CPUs' worth of time,
    infinite without a quota. `memory_limit_bytes`: the control group's, infinite without one. `governor`: of these
    CPUs' clock. `variables`: those that choose threads, kernels or how work is launched.
    """

    cpus: tuple[int, ...]
    cores: int | None
    cpu_quota: float | None
    memory_limit_bytes: float | None
    governor: str | None
    variables: Mapping[str, str]

    @classmethod
    def here(cls) -> Host:
        """The host of this process, now."""
        cpus = usable_cpus()
        quota, memory = cgroup_limits()
        return cls(
            cpus=cpus,
            cores=_cores(cpus),
            cpu_quota=quota,
            memory_limit_bytes=memory,
            governor=_governor(cpus),
            variables=steering_variables(os.environ),
        )


def usable_cpus() -> tuple[int, ...]:
    """The numbers of the CPUs that this process may run on (affinity, cpuset)."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def cgroup_limits(root: Path = _CGROUP, groups: Path = Path("/proc/self/cgroup")) -> tuple[float | None, float | None]:
    """CPUs' worth of time and bytes of memory that the control groups of this process allow, version 1 or 2.

    A group has what the narrowest of those around it allows. Infinite where none limits, None where none can be read.
    """
    try:
        lines = groups.read_text("utf-8", "replace").splitlines()
    except OSError:
        return None, None
    homes: dict[str, list[Path]] = {}
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for controller in ("cpu", "memory") if number == "0" else controllers.split(","):
            place = root if number == "0" else root / controller
            homes.setdefault(controller, []).extend(_upward(place, path))
    quotas = [quota for home in homes.get("cpu", ()) if (quota := _quota(home)) is not None]
    limits = [limit for home in homes.get("memory", ()) if (limit := _memory_limit(home)) is not None]
    return min(quotas, default=None), min(limits, default=None)


def available_memory_bytes() -> int:
    """Bytes of memory that a program here may still ask for: what is available, and no more than the group's limit."""
    limit = cgroup_limits()[1]
    available: int = psutil.virtual_memory().available
    return available if limit is None else int(min(available, limit))


def ranges(numbers: tuple[int, ...]) -> str:
    """Numbers in order as the kernel writes them: `0-3,8`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)


def steering_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that choose threads, kernels or how work is launched; none that names a place."""
    found = sorted(name for name in environment if _STEERING.fullmatch(name) and not name.endswith(_PLACES))
    return {name: environment[name] for name in found if "/" not in environment[name]}


def _upward(mount: Path, path: str) -> Iterator[Path]:
    """A group's directory and those around it; in a container the mount may be the group itself."""
    home = mount / path.lstrip("/")
    yield from (place for place in (home, *home.parents) if place.is_relative_to(mount))


def _quota(home: Path) -> float | None:
    if (text := _text(home / "cpu.max")) is not None:
        quota, _, period = text.partition(" ")
    else:
        quota, period = _text(home / "cpu.cfs_quota_us") or "", _text(home / "cpu.cfs_period_us") or ""
    try:
        return float("inf") if quota in ("max", "-1") else int(quota) / int(period)
    except (ValueError, ZeroDivisionError):
        return None


def _memory_limit(home: Path) -> float | None:
    text = _text(home / "memory.max") or _text(home / "memory.limit_in_bytes") or ""
    try:
        limit = float("inf") if text == "max" else int(text)
    except ValueError:
        return None
    return limit if limit < _NO_LIMIT else float("inf")


def _cores(cpus: tuple[int, ...]) -> int | None:
    topologies = [_CPUS / f"cpu{cpu}" / "topology" for cpu in cpus]
    cores = {(_text(each / "physical_package_id"), _text(each / "core_id")) for each in topologies}
    return None if any(None in core for core in cores) else len(cores)


def _governor(cpus: tuple[int, ...]) -> str | None:
    found = {_text(_CPUS / f"cpu{cpu}" / "cpufreq" / "scaling_governor") for cpu in cpus}
    return ", ".join(sorted(filter(None, found))) or None


def _text(path: Path) -> str | None:
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return None
