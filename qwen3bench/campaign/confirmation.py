"""The pass that confirms: what a screen predicts to be best is measured in further blocks of the same run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pandas as pd

from qwen3bench.analysis.confirm import MeasuredSpeedup, Prediction, candidates, measured_speedups, within_memory
from qwen3bench.analysis.frames import factor_columns
from qwen3bench.campaign.context import RunContext
from qwen3bench.campaign.state import Place, RunState, Where
from qwen3bench.record.design import BASELINE, is_peer, label
from qwen3bench.record.lines import ConfirmLine, MemoryLine, SampleLine
from qwen3bench.record.reader import read_record
from qwen3bench.record.rounds import ROUNDS, RoundWriter, chosen_in, round_of
from qwen3bench.record.writer import RecordWriter
from qwen3bench.reporting.units import listing

GIB = 2**30
Measure = Callable[[RunContext], None]


class Confirmation:
    """Confirms the screen of a run; `measure` takes all passes over the cells of a context."""

    def __init__(self, context: RunContext, measure: Measure) -> None:
        self._context = context
        self._measure = measure
        self._record = read_record(context.writer.directory)

    def run(self) -> None:
        """One round, and where it missed its predictions in some workload and runtime, one more there.

        What is chosen goes to the record before it is measured, so that a run that stops continues with the same cells.
        """
        wheres = list(self._context.state.timings)
        for round_ in ROUNDS:
            recorded = {(line.workload, line.runtime): line for line in chosen_in(self._record, round_)}
            chosen = {where: recorded.get(where) or self._choose(where, round_) for where in wheres}
            self._record = read_record(self._context.writer.directory)
            asked = {where: line.cells for where, line in chosen.items() if line is not None and line.cells}
            if asked:
                self._measure_round(round_, asked)
            wheres = [where for where, line in chosen.items() if line is not None and self._missed(where, line)]

    def _choose(self, where: Where, round_: int) -> ConfirmLine | None:
        """What is to be measured next; None where the screen predicts nothing."""
        samples, factors = self._samples(where), list(self._context.settings.factors)
        if samples.empty:
            return None
        known = self._measured(where, round_)
        fits = self._within_memory(where)
        best = candidates(samples, factors, fits, known if round_ > 1 else None)
        if not best:
            return None
        there = {*samples["cell"], *known}
        unmeasured = [each.cell for each in best if each.cell not in there and self._runs(where, each.cell)]
        corners = [cell for cell in (BASELINE, label(self._context.settings.factors)) if cell in there]
        line = ConfirmLine(
            workload=where[0],
            runtime=where[1],
            round=round_,
            best=best[0].cell,
            predicted=tuple(each.cell for each in best),
            speedup=tuple(each.speedup for each in best),
            lo=tuple(each.lo for each in best),
            hi=tuple(each.hi for each in best),
            cells=(*corners, *unmeasured) if unmeasured else (),
        )
        self._context.writer.append(line)
        return line

    def _measure_round(self, round_: int, asked: Mapping[Where, tuple[str, ...]]) -> None:
        """All passes over the cells of a round: the gate, memory, evidence, and blocks of their own."""
        assert isinstance(self._context.writer, RecordWriter)
        settings = self._context.settings
        cells = tuple(dict.fromkeys(cell for of_where in asked.values() for cell in of_where))
        measure = settings.measure
        enough = max(
            measure.min_blocks,
            max(settings.min_processes(runtime) for runtime in settings.runtimes) * settings.blocks_per_process,
        )
        settings = replace(
            settings,
            design="screen",
            measured=cells,
            peers={},
            measure=replace(measure, max_blocks=min(enough, measure.max_blocks)),
        )
        before = self._context.state
        state = RunState(settings, round_of(self._record, round_))
        state.failures, state.steps = before.failures, before.steps
        state.ceilings_known, state.process = True, before.process
        state.timings = {where: timing for where, timing in state.timings.items() if where in asked}
        for where, timing in state.timings.items():
            timing.pace = timing.pace or before.timings[where].pace
        context = replace(
            self._context,
            settings=settings,
            writer=RoundWriter(self._context.writer, round_),
            state=state,
            chosen=dict(asked),
        )
        names = [cell for cell in cells if cell not in (BASELINE, label(settings.factors))]
        self._context.progress.note(f"measuring what is predicted to be best: {listing(names)}")
        self._measure(context)
        self._record = read_record(self._context.writer.directory)

    def _missed(self, where: Where, line: ConfirmLine) -> bool:
        """Whether a cell that was measured is further from its prediction than both intervals allow."""
        measured = self._measured(where, line.round + 1)
        predicted = [Prediction(*each) for each in zip(line.predicted, line.speedup, line.lo, line.hi, strict=True)]
        return any(not each.agrees(measured[each.cell]) for each in predicted if each.cell in measured)

    def _measured(self, where: Where, before: int) -> dict[str, MeasuredSpeedup]:
        """The speed-ups of all rounds before this one, of cells that compute the baseline's function."""
        found: dict[str, MeasuredSpeedup] = {}
        record = self._record
        for round_ in range(1, before):
            timing = RunState(self._context.settings, round_of(record, round_)).timings[where]
            frame = _frame(timing.samples, self._context.settings.factors)
            found |= measured_speedups(frame, self._context.settings.confidence)
        return {cell: each for cell, each in found.items() if self._runs(where, cell)}

    def _samples(self, where: Where) -> pd.DataFrame:
        """Of the screen itself, of cells that may be compared."""
        samples = self._context.state.timings[where].samples
        ours = [each for each in samples if not is_peer(each.cell) and self._runs(where, each.cell)]
        return _frame(ours, self._context.settings.factors)

    def _runs(self, where: Where, cell: str) -> bool:
        """Whether nothing is known to be wrong with a cell there."""
        failures = self._context.state.failures
        return not any(place in failures for place in (Place(cell), Place(cell, where[0]), Place(cell, *where)))

    def _within_memory(self, where: Where) -> dict[str, bool] | None:
        """Whether the memory of each cell is within the user's limit; None where there is none."""
        limit_gib, factors = self._context.settings.memory_limit_gib, list(self._context.settings.factors)
        if limit_gib is None:
            return None
        lines = [line for line in self._record.of(MemoryLine) if (line.workload, line.runtime) == where]
        ours = [line for line in lines if not is_peer(line.cell)]
        names = [line.cell for line in ours]
        peaks = [line.peak_allocated_bytes for line in ours]
        frame = pd.DataFrame({"cell": names, "peak_allocated_bytes": pd.array(peaks, dtype="Float64")})
        codes = factor_columns(names, factors)
        return within_memory(frame.assign(**{f: codes[f].to_numpy() for f in factors}), factors, limit_gib * GIB)


def _frame(samples: Sequence[SampleLine], factors: Sequence[str]) -> pd.DataFrame:
    """Samples in long form, with a 0/1 column per factor."""
    names = ("cell", "copy", "block", "process", "latency_s", "disturbed")
    frame = pd.DataFrame({name: [getattr(sample, name) for sample in samples] for name in names})
    codes = factor_columns(frame["cell"].tolist(), factors)
    return frame.assign(**{factor: codes[factor].to_numpy() for factor in factors})
