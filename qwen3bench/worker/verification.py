"""The equivalence gate alone: the cells of a command, judged on the device here without a run."""

from __future__ import annotations

from dataclasses import replace

import torch

from qwen3bench.config.settings import Settings
from qwen3bench.record.design import cell_of, is_peer
from qwen3bench.record.messages import Judgment
from qwen3bench.worker.bank import Bank
from qwen3bench.worker.device import device_here, emulates_bfloat16, is_out_of_memory, use_device
from qwen3bench.worker.equivalence.gate import Gate
from qwen3bench.worker.equivalence.gradient_gate import GradientGate
from qwen3bench.worker.peers import gradients_of_peer, judge_peer, require_peer
from qwen3bench.worker.session import take_threads
from qwen3bench.worker.workloads import workload_sizes


class Verification:
    """The gate for the cells of `settings`, whose `device` is then the one present.

    Judges on random weights of the gate's own, whatever `weights` says: what is compared are functions. Raises
    `UserError` where these weights cannot be loaded, or a cell cannot be built on them, and where there are fewer CPUs
    than threads.
    """

    def __init__(self, settings: Settings) -> None:
        here = device_here(settings.device)
        self.settings = settings = settings.resolved(here, emulates_bfloat16=emulates_bfloat16(here))
        for cell in filter(is_peer, settings.labels):
            require_peer(cell, settings.device)
        device, dtype = use_device(settings.device), getattr(torch, settings.dtype)
        take_threads(settings)
        if settings.weights != "random":  # what a run of these weights would refuse
            bank = Bank(settings.model, settings.weights, device, dtype, settings.seed, settings.opts)
            for cell in settings.labels:
                if not is_peer(cell):
                    bank.build(cell_of(cell))
            del bank
        self._gate = Gate(
            settings.model,
            device=device,
            dtype=dtype,
            seed=settings.seed,
            opts=settings.opts,
            workloads=workload_sizes(settings),
        )
        trained = next((sizes.precision for sizes in settings.workloads.values() if sizes.precision), None)
        self._gradients = trained and GradientGate(settings.model, device, trained, settings.seed, settings.opts)
        self.config = self._gate.config  # of the model judged: fewer layers

    def judge(self, cell: str) -> Judgment:
        """The verdict on the cell of that label, on its gradients too where a workload trains.

        One for which memory does not suffice did not run.
        """
        try:
            judged = judge_peer(self._gate, cell) if is_peer(cell) else self._gate.judge_cell(cell_of(cell))
            if not (self._gradients and judged.equivalent):
                return judged
            gradients = (
                gradients_of_peer(self._gradients, cell) if is_peer(cell) else self._gradients.judge_cell(cell_of(cell))
            )
            return replace(judged, equivalent=gradients.equivalent, ran=gradients.ran, reason=gradients.reason)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        reason = "out of memory; free some or name a smaller model"
        return Judgment(equivalent=False, ran=False, reason=reason)
