"""About how long a run takes on a GPU: processes that start, looks at cells, compiling, blocks. All times in seconds.

Constants are of Qwen3-0.6B on one NVIDIA H200 with 16 cores, PyTorch 2.11, read off the times in the records of four
runs: 32 cells in a graph (twice), two cells beside two peers compiled, two cells beside three peers in training. Of
fifteen committed runs on H100s they tell the whole time to between 0.8 and 1.25 times. What a run finds out takes their
place (`CardPace`), and what its processes took (`SoFar`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from qwen3bench.campaign.looks import MAX_AT_ONCE, compared, looks, shared_out
from qwen3bench.config.model_config import ModelConfig
from qwen3bench.config.settings import Settings
from qwen3bench.record.design import is_peer
from qwen3bench.record.messages import CollectEvidence, MeasureMemory, Request, Verify, VerifyGradients
from qwen3bench.record.vendor import vendor_of

REPORT_S = 5.0  # to analyze and to draw

# Once in each process: imports, kernels compiled or loaded, the reference that cells are judged by.
_GATE_ONCE_S, _LOOK_ONCE_S, _GRADIENTS_ONCE_S = 10.0, 10.0, 6.0
_LOOK_S = 0.5  # one verdict, peak or piece of evidence after that: eight processes took 41 s, 20 looks each
_GRADIENTS_S = 2.0  # the gradient gate's verdict on a cell: five in 16 s
_TRAINED = 4  # steps in a look at training
_LAUNCHED = 3  # times that another look launches what is timed from Python: it counts where that is many forwards
BUILD_S = 0.04  # to build a cell on weights that are loaded
_COUNT_S = 0.075  # to count a cell's parameters: 32 in 2.4 s
_CEILINGS_S = 3.0  # a copy, a product and a few passes in eager

# torch.compile, first with nothing cached, in the looks; then with its code on disk, in each process that times.
_COMPILER_S, _REGION_S, _LAYER_S = 5.0, 3.0, 1.0  # the first in a process; of ours one region; of a peer each layer
_COMPILER_WARM_S, _REGION_WARM_S, _LAYER_WARM_S = 3.5, 0.4, 0.33  # 33 of ours 12 to 15 s; two peers 12 to 31 s
_BACKWARD = 2.0  # times as much where backward is compiled, too: a guess, as nobody has measured it

_ENTER_S = 3.0  # a process takes the settings, loads the weights, fills a cache
_PEER_S = 3.0  # more for each of the processes side by side, which import another implementation at once
_CAPTURE_S = 0.06  # of a cell in each of the processes side by side: ten took 19 s for 33 cells, five took 9 s

_REACHED = 0.8  # of the vendor's figure in a large product
_MEAN_SHARE = 0.3  # of that, in the mean over cells: 14 ms a prefill of 2048 tokens, 0.3 s a training step of 8 × 2048
_FLOAT32 = 12.0  # times as long as in 16 bit: 67 TFLOP/s of an H100 without TF32
_LAYER_LEAST_S = {"eager": 1.2e-3}  # of a forward, where launching it from Python takes longer than computing it
_LAYER_LEAST_GRAPH_S = 0.15e-3  # of a token
_VISIT_S = 20e-3  # that the values of a visit fill, behind one launch that is not timed
_CONFIRMED = 5  # cells of a round that confirms a screen, the baseline among them
_H100 = "NVIDIA H100 80GB HBM3"
_SLOWER = (0.5, 4.0)  # what one pass may say of the next ones


@dataclass(frozen=True)
class CardPace:
    """What a run knows of its machine, else that of one H200 with 16 cores.

    `start_s`: until a process has imported PyTorch and taken the settings. `load_s`: to load the weights.
    `flops_per_s`: of a large product in 16 bit. `slower`: times as long as said, which the looks at cells took.
    """

    start_s: float = 11.0
    load_s: float = 0.5
    flops_per_s: float = field(default_factory=lambda: reached_by(_H100))
    slower: float = 1.0

    def after(self, took_s: float, said_s: float) -> CardPace:
        """The pace, once looks at cells took so long where `said_s` was said; the same where that says little."""
        if said_s < _GATE_ONCE_S:
            return self
        least, most = _SLOWER
        return replace(self, slower=min(most, max(least, self.slower * took_s / said_s)))


def reached_by(device: str) -> float:
    """Operations a second of a large 16-bit product on a device of this name; of one that is not known an H100's."""
    vendor = vendor_of(device) or vendor_of(_H100)
    assert vendor is not None
    return _REACHED * vendor.flops_per_s


@dataclass(frozen=True)
class SoFar:
    """What is measured of a workload and runtime: processes, blocks, their time, and that to get the last one ready."""

    processes: int = 0
    blocks: int = 0
    measured_s: float = 0.0
    setup_s: float = 0.0


@dataclass(frozen=True)
class CardForecast:
    """About how long the passes of a run take. `at_once`: processes that get ready side by side on one of `cards`."""

    settings: Settings
    pace: CardPace = field(default_factory=CardPace)
    at_once: int = 10
    cards: int = 1

    def looking_s(self, shares: Sequence[Sequence[Request[Any]]], then: Iterable[Request[Any]]) -> float:
        """The looks at cells: shares side by side, each but the first in a process that starts, `then` one by one."""
        beside = max(map(self._looks_s, shares), default=0.0)
        start_s = self.pace.start_s if len(shares) > 1 else 0.0
        return start_s + beside + self._looks_s([*then])

    def _looks_s(self, steps: Sequence[Request[Any]]) -> float:
        """What one process takes for these steps."""
        compiled = any(getattr(step, "runtime", None) == "compile" for step in steps)
        looks_at = any(isinstance(step, MeasureMemory | CollectEvidence) for step in steps)
        once_s = _GATE_ONCE_S * any(isinstance(step, Verify) for step in steps)
        once_s += _GRADIENTS_ONCE_S * any(isinstance(step, VerifyGradients) for step in steps)
        once_s += _LOOK_ONCE_S * looks_at + _COMPILER_S * compiled
        return self.pace.slower * (once_s + sum(map(self._step_s, steps)))

    def _step_s(self, step: Request[Any]) -> float:
        if isinstance(step, VerifyGradients):
            return _GRADIENTS_S
        took_s = _LOOK_S
        if isinstance(step, MeasureMemory | CollectEvidence):
            took_s = max(took_s, _LAUNCHED * self._host_s(step.workload))
            if self._trains(step.workload):
                took_s += _TRAINED * self._launch_s(step.workload, step.runtime)
            if isinstance(step, MeasureMemory):
                took_s += self.pace.load_s
            if step.runtime == "compile" and (isinstance(step, MeasureMemory) or self._trains(step.workload)):
                took_s += self._compile_s(step.cell, step.workload, cold=isinstance(step, MeasureMemory))
        return took_s

    def _compile_s(self, cell: str, workload: str, *, cold: bool) -> float:
        """What compiling a cell takes: ours by its region, a peer layer by layer."""
        region_s, layer_s = (_REGION_S, _LAYER_S) if cold else (_REGION_WARM_S, _LAYER_WARM_S)
        took_s = layer_s * self.settings.model.num_layers if is_peer(cell) else region_s
        return took_s * (_BACKWARD if self._trains(workload) else 1.0)

    def passes_s(self) -> float:
        """What else comes before the first block."""
        return _CEILINGS_S + _COUNT_S * len(self.settings.labels)

    # The pass that times

    def timing_s(self, known: Mapping[tuple[str, str], SoFar]) -> float:
        """The pass that times, of each workload and runtime that is not known well enough, and what comes then."""
        of_all_s = sum(self.left_s(*where, so_far) for where, so_far in known.items())
        return of_all_s / self.cards + self.after_s()

    def after_s(self) -> float:
        """What comes after that pass: of a screen the round that confirms it, and the report."""
        return self._confirmation_s() + REPORT_S

    def left_s(self, workload: str, runtime: str, known: SoFar) -> float:
        """What a workload and runtime still takes: halfway between the least and the most, and to get ready."""
        settings, measure = self.settings, self.settings.measure
        least_processes = settings.min_processes(runtime)
        share_s = settings.time_allowed_s / least_processes
        setup_s = known.setup_s or self.setup_s(workload, runtime)
        block_s = known.measured_s / known.blocks if known.blocks else self.block_s(workload, runtime)
        allowed_s = max(0.0, settings.time_allowed_s - known.measured_s)
        each_s = max(settings.blocks_per_process * block_s, min(share_s, setup_s))
        processes = max(0, least_processes - known.processes)
        blocks_s = max(0, measure.min_blocks - known.blocks) * block_s
        if measure.max_seconds is None:
            least_s = max(processes * each_s, blocks_s)
            return processes * setup_s + (least_s + max(least_s, allowed_s)) / 2
        each_s = max(block_s, min(each_s, share_s))
        processes = min(processes, math.ceil(allowed_s / each_s))
        return processes * setup_s + max(processes * each_s, min(allowed_s, blocks_s))

    def setup_s(self, workload: str, runtime: str) -> float:
        """What one process takes to be ready; of several side by side its part of the time that all take."""
        cells = [*self.settings.labels, self.settings.labels[0]]  # the baseline a second time
        beside_peers = any(map(is_peer, cells))
        enter_s = _ENTER_S + self.pace.load_s
        launch_s = 2 * len(cells) * self._launch_s(workload, runtime)  # one to warm up and one to look at
        if runtime == "compile":
            compiling_s = sum(self._compile_s(cell, workload, cold=False) for cell in cells)
            waiting_s = self.pace.start_s / self.settings.min_processes(runtime)  # the last waits until one has started
            return self.pace.slower * (enter_s + _COMPILER_WARM_S + compiling_s) + waiting_s + launch_s
        wanted = sum(self.settings.min_processes(name) for _, name in self._wheres if name != "compile")
        together = max(1, min(self.at_once * self.cards, wanted))
        rounds = math.ceil(wanted / together)
        capture_s = max(_CAPTURE_S * together, 2 * self._host_s(workload))  # a pass to warm up, and the one captured
        at_work_s = enter_s + _PEER_S * together * beside_peers + capture_s * len(cells)
        # Those of the first round were started while cells were looked at.
        starting_s = self.pace.start_s * (rounds - 1) / rounds
        return (self.pace.slower * at_work_s + starting_s) / together + launch_s / min(together, self.cards)

    def block_s(self, workload: str, runtime: str) -> float:
        """A block: a visit of each cell and of the baseline's copy."""
        launch_s = self._launch_s(workload, runtime)
        return (len(self.settings.labels) + 1) * (launch_s + max(_VISIT_S, launch_s))

    def _launch_s(self, workload: str, runtime: str) -> float:
        """One timed value, in the mean over cells: from its operations, and the least that a launch takes."""
        sizes, model = self.settings.workloads[workload], self.settings.model
        prompt, new = sizes.prompt_tokens or 1, sizes.new_tokens
        tokens = {"decode": 1, "generate": prompt + new}.get(workload, prompt)
        operations = sizes.batch_size * tokens * (2 * _matrices(model) + _attention(model) * (prompt + new))
        in_float32 = (sizes.precision or self.settings.dtype) in ("fp32", "float32")
        rate = _MEAN_SHARE * self.pace.flops_per_s / (_FLOAT32 if in_float32 else 1.0)
        if self._trains(workload):  # backward's products are twice the forward's
            operations *= 3
        least_s = self._forwards(workload) * model.num_layers * _LAYER_LEAST_S.get(runtime, _LAYER_LEAST_GRAPH_S)
        return max(least_s, operations / rate)

    def _host_s(self, workload: str) -> float:
        """To launch one timed value from Python."""
        return self._forwards(workload) * self.settings.model.num_layers * _LAYER_LEAST_S["eager"]

    def _forwards(self, workload: str) -> int:
        """Forwards of one timed value; backward is as long as two."""
        new_tokens = self.settings.workloads[workload].new_tokens
        return 3 if self._trains(workload) else 1 + new_tokens if workload == "generate" else 1

    def _confirmation_s(self) -> float:
        """A round that confirms a screen: its cells are judged, looked at and timed as those before."""
        if self.settings.design != "screen" or not self.settings.factors:
            return 0.0
        cells = tuple(self.settings.labels[:_CONFIRMED])
        settings = replace(self.settings, measured=cells, peers={}, design="screen")
        again = replace(self, settings=settings)
        steps = looks(settings, self._wheres, ())
        looking_s = again.looking_s([], [*(Verify(cell=cell) for cell in cells), *steps])
        timing_s = sum(again.left_s(workload, runtime, SoFar()) for workload, runtime in self._wheres)
        return self.pace.start_s + looking_s + timing_s / self.cards

    # Helpers

    @property
    def _wheres(self) -> list[tuple[str, str]]:
        return [*product(self.settings.workloads, self.settings.runtimes)]

    def _trains(self, workload: str) -> bool:
        return self.settings.workloads[workload].precision is not None


def _matrices(model: ModelConfig) -> int:
    """The elements of a model's weight matrices."""
    heads = 2 * model.num_heads + 2 * model.num_kv_heads  # queries and out, keys and values
    block = model.emb_dim * (heads * model.head_dim + 3 * model.hidden_dim)
    return model.num_layers * block + model.emb_dim * model.vocab_size


def _attention(model: ModelConfig) -> int:
    """Operations of attention's two products for each query and key, masked ones too."""
    return 4 * model.num_layers * model.num_heads * model.head_dim


def whole_run_s(settings: Settings) -> float:
    """About how long a whole run of resolved settings takes on an H100 or H200 with 16 cores, from the command on."""
    trained = [name for name, sizes in settings.workloads.items() if sizes.precision is not None]
    forecast = CardForecast(settings, at_once=1 if trained else 10)
    wheres = dict.fromkeys(product(settings.workloads, settings.runtimes), SoFar())
    steps = looks(settings, wheres, compared(settings))
    then = [step for step in steps if getattr(step, "workload", None) in trained]
    beside = [step for step in steps if getattr(step, "workload", None) not in trained]
    verify: list[Request[Any]] = [Verify(cell=cell) for cell in settings.labels]
    verify += [VerifyGradients(cell=cell, workload=name) for name in trained for cell in settings.labels]
    shares = shared_out([*verify, *beside], settings.factors, MAX_AT_ONCE)
    shares, then = (shares, then) if len(shares) > 1 else ([], [*verify, *beside, *then])
    return forecast.pace.start_s + forecast.looking_s(shares, then) + forecast.passes_s() + forecast.timing_s(wheres)
