"""A training step: forward, cross-entropy of the next token, backward, AdamW; and the state that cells share.

Every visit begins from the same weights and from empty moments, which are restored outside what is timed. So all cells
train on one set of weights with one set of moments, at the same addresses, and as many fit as where nothing is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qwen3bench.model.decoder import Decoder, Forward
from qwen3bench.worker.workloads import Step, Workload, WorkloadSize

LEARNING_RATE = 1e-5  # of fine-tuning: in the few steps of a visit no weight runs away
FORWARD, LOSS, BACKWARD, OPTIMIZER = PARTS = ("forward", "loss", "backward", "optimizer")
WEIGHTS_DTYPE = {"amp": torch.float32, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class ParameterState:
    """AdamW's state of one stored parameter, and the values that it is restored to."""

    values: Tensor  # what is trained; kept, so that its address stays its own
    moments: dict[str, Tensor]
    initial: Tensor | None


class TrainingState:
    """What training changes: the stored parameters of all cells on one set of weights, and AdamW's state of each.

    Moments have the weights' dtype, as PyTorch's fused AdamW keeps them. `restorable` holds a second copy of the
    weights.
    """

    def __init__(self, restorable: bool = True) -> None:
        self._restorable = restorable
        self._states: dict[tuple[int, int], ParameterState] = {}

    def of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """AdamW's state of a parameter; that of another one with the same storage, where there is one."""
        key = parameter.data_ptr(), parameter.numel()
        if key not in self._states:
            values = parameter.detach()
            step = torch.zeros((), dtype=torch.float32, device=values.device)
            moments = {"step": step, "exp_avg": torch.zeros_like(values), "exp_avg_sq": torch.zeros_like(values)}
            self._states[key] = ParameterState(values, moments, values.clone() if self._restorable else None)
        return self._states[key].moments

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
        """AdamW over these parameters, its state the shared one."""
        optimizer = adamw(parameters)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter] = self.of(parameter)
        return optimizer

    @property
    def num_bytes(self) -> int:
        """What AdamW's state occupies, in bytes."""
        return sum(tensor.nbytes for state in self._states.values() for tensor in state.moments.values())

    def restore(self) -> None:
        """The weights as they were, and moments of zero."""
        pairs = [(state.values, state.initial) for state in self._states.values() if state.initial is not None]
        if pairs:
            torch._foreach_copy_([values for values, _ in pairs], [initial for _, initial in pairs])
        self.empty_moments()

    def empty_moments(self) -> None:
        """Moments of zero, so that the first one is a tenth of the next step's gradient."""
        if moments := [tensor for state in self._states.values() for tensor in state.moments.values()]:
            torch._foreach_zero_(moments)

    @property
    def first_moments(self) -> list[Tensor]:
        """All first moments, in an order of their own; a step changes them."""
        return [state.moments["exp_avg"] for state in self._states.values()]


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
    """PyTorch's AdamW: fused, and on CUDA such that a graph can hold it."""
    parameters = list(parameters)
    on_cuda = parameters[0].is_cuda
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True, capturable=on_cuda)


class TrainingWorkload(Workload):
    """One training step over seeded random tokens (b, t), each to tell the next.

    A step returns its loss, and leaves no gradients: what they take is free for the next cell.
    """

    output = "loss is"

    def __init__(self, size: WorkloadSize, model: Decoder, seed: int = 0, state: TrainingState | None = None) -> None:
        self.size = size
        self.state = TrainingState() if state is None else state
        generator = torch.Generator().manual_seed(seed)
        shape = (size.batch_size, size.prompt_tokens + 1)
        ids = torch.randint(model.config.vocab_size, shape, generator=generator).to(model.tok_emb.weight.device)
        self.prompt, self.targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        self.token = self.prompt[:, -1:].clone()
        self.cache = None

    def steps(self, model: Forward) -> list[Step]:
        assert isinstance(model, Decoder)
        parameters = _trained(model)
        optimizer = self.state.optimizer(parameters)

        def step() -> Tensor:
            with torch.enable_grad(), self.precision():
                loss = model.loss(self.prompt, self.targets)
            loss.backward()
            self._update(optimizer, parameters)
            return loss.detach()

        return [step]

    def restore(self) -> None:
        self.state.restore()

    def forwards(self, model: Forward) -> list[Step]:
        def forward() -> Tensor:
            with self.precision():
                logits: Tensor = model(self.prompt)
            return logits

        return [forward]

    def precision(self) -> AbstractContextManager[Any]:
        """The context of a forward: automatic mixed precision where that is the workload's."""
        if self.size.precision != "amp":
            return nullcontext()
        return torch.autocast(self.prompt.device.type, torch.bfloat16)

    def step_in_parts(self, model: Decoder, done: Callable[[str], None], of_gradient: str = "") -> None:
        """One step that calls `done` behind each of `PARTS`, and with `of_gradient` behind each parameter's gradient.

        `of_gradient` is empty where that is not asked for.
        """
        parameters = _trained(model)
        optimizer = self.state.optimizer(parameters)
        with _watched(parameters, lambda: done(of_gradient)) if of_gradient else nullcontext():
            with torch.enable_grad(), self.precision():
                states = model.states(self.prompt)
                done(FORWARD)
                loss = model.loss_of(states, self.targets)
            del states
            done(LOSS)
            loss.backward()
        del loss
        done(BACKWARD)
        self._update(optimizer, parameters)
        done(OPTIMIZER)

    def _update(self, optimizer: torch.optim.AdamW, parameters: list[nn.Parameter]) -> None:
        if self.size.clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, self.size.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def gradient_bytes(parameters: Iterable[nn.Parameter]) -> int:
    """What the gradients that there are now occupy, in bytes."""
    return sum(p.grad.nbytes for p in parameters if p.grad is not None)


def _trained(model: Decoder) -> list[nn.Parameter]:
    """The parameters, each stored one once; from now on they ask for gradients."""
    return list(model.original.requires_grad_(True).parameters())


@contextmanager
def _watched(parameters: Iterable[nn.Parameter], done: Callable[[], None]) -> Iterator[None]:
    """Calls `done` behind each parameter's gradient."""
    handles = [p.register_post_accumulate_grad_hook(lambda _: done()) for p in parameters]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
