"""Where a worker runs: what PyTorch tells of itself and the device, in the run's environment and fingerprint."""

from __future__ import annotations

import torch

from qwen3bench.config.settings import Settings
from qwen3bench.config.sources import own_code
from qwen3bench.errors import UserError
from qwen3bench.model.weights import judge_weights, weights_fingerprint
from qwen3bench.record.environment import TorchFacts, environment, fingerprint, system_device_name
from qwen3bench.record.host import Host, available_memory_bytes
from qwen3bench.record.messages import Identity
from qwen3bench.worker.host_room import refuse_beyond_host


def identify(settings: Settings) -> Identity:
    """The `environment` of a run, and the `fingerprint` that must not change when it is continued.

    Raises `UserError` where there is no such device, the weights cannot be read or are larger than its memory, or a
    workload is larger than the host's.
    """
    facts, host = torch_facts(settings.device), Host.here()
    found = environment(settings.device, facts, host)
    on_card = settings.device.startswith("cuda")
    memory_bytes = found["device_memory_bytes"] if on_card else available_memory_bytes()
    judge_weights(settings.weights, settings.model, getattr(torch, settings.dtype), memory_bytes)  # sooner than hashed
    if settings.device == "cpu":  # of a card the memory pass tells, cell by cell
        refuse_beyond_host(settings, memory_bytes)
    weights = weights_fingerprint(settings.weights, settings.seed)
    own = own_code(settings.opts)
    return Identity(
        environment=found | own,
        fingerprint=fingerprint(settings.to_dict(), weights, facts, host) | own,
    )


def torch_facts(device: str) -> TorchFacts:
    """What PyTorch tells of itself and of `device`. Raises `UserError` where there is no such device."""
    return TorchFacts(
        version=torch.__version__,
        cuda=torch.version.cuda,
        cudnn=torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        threads=torch.get_num_threads(),
        interop_threads=torch.get_num_interop_threads(),
        device_name=device_name(device),
    )


def device_name(device: str) -> str:
    """The name of the card or, for "cpu", of the processor. Raises `UserError` where there is no such card."""
    if name := system_device_name(device):  # PyTorch would start CUDA in this process
        return name
    try:
        return torch.cuda.get_device_name(int(device.partition(":")[2] or 0))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(f"device={device}: PyTorch finds no such card; use device=cpu or mend the driver") from error
