"""About how long a run takes on a GPU: processes that start, looks at cells, compiling, blocks. All times in seconds.

Constants are of Qwen3-0.6B on one NVIDIA H200 with 16 cores, PyTorch 2.11, read off the times in committed records,
whose whole time they tell within 1.5 times. What a run finds out takes their place (`CardPace`), and what its processes
took (`SoFar`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from qwen3bench.campaign.looks import MAX_AT_ONCE, compared, looks, shared_out
from qwen3bench.config.settings import Settings
from qwen3bench.record.design import is_peer
from qwen3bench.record.messages import CollectEvidence, MeasureMemory, Request, Verify, VerifyGradients
from qwen3bench.record.vendor import vendor_of

START_S = 7.0  # from the command until every cell has been built
REPORT_S = 6.0  # to analyze and to draw

# Looks at cells, and getting ready to time them
_LOOKS_S = 20.0  # before a process's first look: imports, kernels compiled or loaded, the reference of the gate
_LOOK_S = 0.5  # a verdict, a peak or a piece of evidence: eight processes took 41 s, 20 looks each
_READY_S = 13.0  # of processes side by side before their first cell: five or ten took 14 to 22 s, for 5 to 65 cells
_PEER_S = 4.0  # more for each of the processes side by side, which import another implementation at once
_LAUNCHES = 3  # from Python: to look at what is timed, to make a cell ready
_REGION_S, _LAYER_S = 3.0, 1.0  # to compile ours, by its one region, and each layer of a peer
_LAYER_CACHED_S = 0.33  # with its code on disk: two peers of 28 layers took 12 to 31 s; ours then loads at once

# Blocks
_MEAN_SHARE = 0.24  # of the vendor's figure, in the mean over cells: 14 ms a prefill of 2048 tokens
_LAYER_EAGER_S = 1.2e-3  # a layer's least, where launching it from Python takes longer than computing it
_LAYER_GRAPH_S = 0.15e-3  # the same of a graph, for a single token
_VISIT_S = 20e-3  # that the values of a visit fill, behind one launch that is not timed
_BEYOND = 0.125  # of the time that is allowed beyond the least: a prefill took none, decoding up to a quarter
_H100 = "NVIDIA H100 80GB HBM3"
_SLOWER = (0.5, 4.0)  # what the looks may say of what comes


@dataclass(frozen=True)
class CardPace:
    """What a run knows of its machine, else that of one H200 with 16 cores.

    `flops_per_s`: of a large product in 16 bit. `slower`: times as long as said, which the looks at cells took.
    """

    flops_per_s: float = field(default_factory=lambda: reached_by(_H100))
    slower: float = 1.0

    def after(self, took_s: float, said_s: float) -> CardPace:
        """The pace, once looks at cells took so long where `said_s` was said; the same where none was left."""
        if not said_s:
            return self
        least, most = _SLOWER
        return replace(self, slower=min(most, max(least, self.slower * took_s / said_s)))


def reached_by(device: str) -> float:
    """Operations a second of a large 16-bit product on a device of this name; of one that is not known an H100's."""
    vendor = vendor_of(device) or vendor_of(_H100)
    assert vendor is not None
    return vendor.flops_per_s


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
        """The looks at cells: shares side by side, `then` one by one."""
        return max(map(self._looks_s, shares), default=0.0) + self._looks_s([*then])

    def _looks_s(self, steps: Sequence[Request[Any]]) -> float:
        """What one process takes for these steps."""
        took_s = _LOOKS_S * bool(steps) + _LOOK_S * len(steps)
        for step in steps:
            if isinstance(step, MeasureMemory | CollectEvidence):
                took_s += _LAUNCHES * self._launch_s(step.workload, "eager")
            if isinstance(step, MeasureMemory) and step.runtime == "compile":  # evidence finds it compiled
                took_s += _LAYER_S * self.settings.model.num_layers if is_peer(step.cell) else _REGION_S
        return self.pace.slower * took_s

    # The pass that times

    def timing_s(self, known: Mapping[tuple[str, str], SoFar]) -> float:
        """The pass that times, of each workload and runtime that is not known well enough, and what comes then."""
        of_all_s = sum(self.left_s(*where, so_far) for where, so_far in known.items())
        return of_all_s / self.cards + self.after_s()

    def after_s(self) -> float:
        """What comes after that pass: the report, and of a screen a round that confirms it, whose blocks are short."""
        settings = self.settings
        if settings.design != "screen" or not settings.factors:
            return REPORT_S
        wheres = product(settings.workloads, settings.runtimes)
        ready_s = sum(settings.min_processes(where[1]) * self.setup_s(*where) for where in wheres)
        return self.pace.slower * _LOOKS_S + ready_s / self.cards + REPORT_S

    def left_s(self, workload: str, runtime: str, known: SoFar) -> float:
        """What a workload and runtime still takes: to get ready, the least, and a part of what is allowed beyond it."""
        settings, measure = self.settings, self.settings.measure
        setup_s = known.setup_s or self.setup_s(workload, runtime)
        block_s = known.measured_s / known.blocks if known.blocks else self.block_s(workload, runtime)
        allowed_s = max(0.0, settings.time_allowed_s - known.measured_s)
        share_s = settings.time_allowed_s / settings.min_processes(runtime)
        each_s = max(settings.blocks_per_process * block_s, min(share_s, setup_s))  # measured in a process
        least_s = (settings.min_processes(runtime) - known.processes) * each_s
        least_s = max(least_s, (measure.min_blocks - known.blocks) * block_s, 0.0)
        if measure.max_seconds is not None:  # no process has more than its share, and they have no more in all
            each_s, least_s = max(block_s, min(each_s, share_s)), min(least_s, allowed_s)
        measured_s = least_s + _BEYOND * max(0.0, allowed_s - least_s)
        return measured_s * (1 + setup_s / each_s)

    def setup_s(self, workload: str, runtime: str) -> float:
        """What one process takes to be ready; of several side by side its part of the time that all take."""
        settings = self.settings
        peers, together = sum(map(is_peer, settings.labels)), 1
        ready_s = _READY_S + (len(settings.labels) + 1) * _LAUNCHES * self._launch_s(workload, "eager")
        if runtime == "compile":
            ready_s += peers * _LAYER_CACHED_S * settings.model.num_layers
        else:
            others = [name for name in settings.runtimes if name != "compile"]
            wanted = len(settings.workloads) * sum(map(settings.min_processes, others))
            together = min(self.at_once * self.cards, wanted)
        return self.pace.slower * (ready_s / together + _PEER_S * bool(peers))

    def block_s(self, workload: str, runtime: str) -> float:
        """A block: a visit of each cell and of the baseline's copy."""
        launch_s = self._launch_s(workload, runtime)
        return (len(self.settings.labels) + 1) * (launch_s + max(_VISIT_S, launch_s))

    def _launch_s(self, workload: str, runtime: str) -> float:
        """One timed value, in the mean over cells: from its operations, and the least that a launch takes."""
        sizes, model = self.settings.workloads[workload], self.settings.model
        prompt, new = sizes.prompt_tokens or 1, sizes.new_tokens
        tokens = {"decode": 1, "generate": prompt + new}.get(workload, prompt)
        logits = {"decode": 1, "generate": new}.get(workload, sizes.logits_to_keep or prompt)
        attention = 2 * model.num_heads * model.head_dim * (prompt + new)  # masked pairs, too
        products = model.num_layers * tokens * (model.block_weights + attention)
        products += logits * model.vocab_size * model.emb_dim
        forwards = 1 + new if workload == "generate" else 1
        if sizes.precision is not None:  # it trains: backward's products are twice the forward's
            products, forwards = 3 * products, 3
        least_s = forwards * model.num_layers * (_LAYER_EAGER_S if runtime == "eager" else _LAYER_GRAPH_S)
        return max(least_s, 2 * sizes.batch_size * products / (_MEAN_SHARE * self.pace.flops_per_s))


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
    return START_S + forecast.looking_s(shares, then) + forecast.timing_s(wheres)
