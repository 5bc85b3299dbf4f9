"""What a worker process holds: the settings, the device, one set of weights; and how it builds cells from them."""

from __future__ import annotations

import gc
from typing import Any

import torch

from qwen3bench.config.catalogue import resolve
from qwen3bench.config.settings import Settings
from qwen3bench.errors import UserError
from qwen3bench.kernels.token_attention import forget_counters
from qwen3bench.model.baseline import assemble
from qwen3bench.model.build import build_model, forget_rope_tables
from qwen3bench.model.decoder import Decoder
from qwen3bench.model.weights import load_weights
from qwen3bench.record.design import cell_of, is_peer
from qwen3bench.record.host import Host, usable_cpus
from qwen3bench.worker.bank import Bank
from qwen3bench.worker.device import synchronize, use_device
from qwen3bench.worker.equivalence.gate import Gate
from qwen3bench.worker.equivalence.gradient_gate import GradientGate
from qwen3bench.worker.equivalence.reference import SMALL_DIM
from qwen3bench.worker.peers import build_peer, require_peer
from qwen3bench.worker.runtimes import Runtime, make_runtime
from qwen3bench.worker.training import WEIGHTS_DTYPE, TrainingState, TrainingWorkload
from qwen3bench.worker.workloads import Workload, WorkloadSize, workload_sizes


class Session:
    """The resolved settings of a run on a device of this process. The weights are loaded when a cell needs them."""

    def __init__(self, settings: Settings, before: Session | None = None) -> None:
        """Raises `UserError` where a peer does not exist here, where the switches of a cell do not go together, and
        where there are fewer CPUs than threads.

        `before`: another session of this process, whose weights are kept where they are the same.
        """
        for cell in filter(is_peer, settings.labels):
            require_peer(cell, settings.device, settings.runtimes, settings.workloads)
        switches = resolve(settings.opts)
        for chosen in settings.cells:
            assemble({name: switches[name] for name in chosen})
        self.settings = settings
        self.device = use_device(settings.device)
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        same = before is not None and _weights_of(before.settings) == _weights_of(settings)
        self._bank: Bank | None = before._bank if before is not None and same else None
        self._gate: Gate | None = None
        self._gradient_gate: GradientGate | None = None
        take_threads(settings)
        self.cores_left = _cores_left(settings)
        torch.set_grad_enabled(False)

    def weights_dtype(self, workload: str) -> torch.dtype:
        """The dtype of a workload's weights: the run's; of training by its precision."""
        precision = self.settings.workloads[workload].precision
        return self.dtype if precision is None else WEIGHTS_DTYPE[precision]

    def bank(self, dtype: torch.dtype) -> Bank:
        """The weights that all cells share; loading them lets go of those in another dtype, and of the gate's."""
        if self._bank is None or self._bank.dtype is not dtype:
            s = self.settings
            self._gate = self._gradient_gate = self._bank = None
            self._bank = Bank(s.model, s.weights, self.device, dtype, s.seed, s.opts)
        return self._bank

    @property
    def gate(self) -> Gate:
        """The equivalence gate of forwards, with weights of its own."""
        if self._gate is None:
            s = self.settings
            sizes = workload_sizes(s)
            self._gate = Gate(s.model, device=self.device, dtype=self.dtype, seed=s.seed, opts=s.opts, workloads=sizes)
        return self._gate

    def gradient_gate(self, workload: str) -> GradientGate:
        """The gate of gradients in the precision of a workload, with weights of its own."""
        if self._gradient_gate is None:
            s = self.settings
            precision = s.workloads[workload].precision
            assert precision is not None
            self._gradient_gate = GradientGate(s.model, self.device, precision, s.seed, s.opts)
        return self._gradient_gate

    def on_bank(self, cell: str, workload: str | None = None) -> Decoder:
        """A cell's model, its parameters views on the bank in the dtype of the workload, or of the first.

        What was trained on the bank is put back: a trained head is no longer the embedding.
        """
        bank = self.bank(self.weights_dtype(workload or next(iter(self.settings.workloads))))
        bank.training.restore()
        return self.build(cell, bank.weights) if is_peer(cell) else bank.build(cell_of(cell))

    def alone(self, cell: str, workload: str) -> Decoder:
        """A cell's model on weights of its own."""
        s, dtype = self.settings, self.weights_dtype(workload)
        return self.build(cell, load_weights(s.weights, s.model, device=self.device, dtype=dtype, seed=s.seed))

    def build(self, cell: str, weights: dict[str, torch.Tensor] | None = None) -> Decoder:
        """A cell's model on `weights`, or on `meta`, where nothing is allocated."""
        if is_peer(cell):
            return build_peer(cell, self.settings.model, weights, self.dtype)
        opts: dict[str, dict[str, Any]] = {name: self.settings.opts.get(name, {}) for name in cell_of(cell)}
        if weights is None:
            return build_model(self.settings.model, opts, None, "meta", self.dtype)
        return build_model(self.settings.model, opts, weights)

    def runtime(self, name: str) -> Runtime:
        """A fresh runtime with the options of the settings."""
        return make_runtime(name, self.device, **self.settings.runtimes[name])

    def size(self, workload: str) -> WorkloadSize:
        """How large a workload is."""
        return next(size for size in workload_sizes(self.settings) if size.name == workload)

    def inputs(self, workload: str, model: Decoder) -> Workload:
        """A workload's inputs, its cache filled by `model`; in training its steps train what is on the bank."""
        size, seed = self.size(workload), self.settings.seed
        if size.precision is None:
            return Workload(size, model, seed)
        return TrainingWorkload(size, model, seed, self.bank(self.weights_dtype(workload)).training)

    def inputs_alone(self, workload: str, model: Decoder) -> Workload:
        """As `inputs`, for a model on weights of its own, which are trained without a copy to restore."""
        size, seed = self.size(workload), self.settings.seed
        return (
            Workload(size, model, seed)
            if size.precision is None
            else TrainingWorkload(size, model, seed, TrainingState(restorable=False))
        )

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        synchronize(self.device)

    def free(self) -> None:
        """Give back the memory of what nothing refers to any more."""
        gc.collect()
        gc.freeze()  # what lives now are imports and the bank: looking at them again would take 0.2 s a cell
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def forget_everything(self) -> None:
        """Let go of all weights, and of what models leave for the next."""
        self._bank = self._gate = self._gradient_gate = None
        forget_rope_tables()
        self.free()
        forget_counters()


def take_threads(settings: Settings) -> None:
    """Use as many threads in an operation as are asked for; where none are, one for a small model on a CPU.

    Raises `UserError` where they would share CPUs with each other.
    """
    if settings.threads == "auto":
        if settings.device == "cpu" and settings.model.emb_dim <= SMALL_DIM:
            torch.set_num_threads(1)
        return
    if settings.threads > (cpus := len(usable_cpus())):
        raise UserError(
            f"threads={settings.threads}: {cpus} CPU{'s' * (cpus > 1)} may be used here, and more threads wait "
            "for each other"
        )
    torch.set_num_threads(settings.threads)


def _cores_left(settings: Settings) -> int:
    """How many cores the threads that are asked for leave to others on a CPU; none where PyTorch decides."""
    if settings.threads == "auto" or settings.device != "cpu":
        return 0
    host = Host.here()
    return max(0, (host.cores or len(host.cpus)) - settings.threads)


def _weights_of(settings: Settings) -> tuple[object, ...]:
    """What decides the bank of a session."""
    s = settings
    return s.model, s.weights, s.device, s.dtype, s.seed, s.opts
