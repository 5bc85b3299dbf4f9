"""How much is measured of a workload in a runtime: when it is known well enough, and what it takes until then."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from qwen3bench.analysis.stopping import half_widths
from qwen3bench.campaign.forecast import Shortfall, processes_for
from qwen3bench.campaign.state import Timing, Where
from qwen3bench.config.settings import Settings
from qwen3bench.record.lines import StopLine
from qwen3bench.record.states import StopReason

MEASURED_PER_SETUP = 1.0  # of the time that a process takes to be ready, so much again is measured in it at least
QUICK_S = 0.5  # of judging whether enough is known: after each block where it takes no longer
_JUDGING_SHARE = 0.05  # of the time that may go to it, else: 10^6 samples take seconds


@dataclass(frozen=True)
class Replication:
    """How many processes and blocks one workload and runtime takes, by its `timing` so far."""

    settings: Settings
    where: Where
    timing: Timing

    @property
    def least_processes(self) -> int:
        """How many processes a run takes at least."""
        return self.settings.min_processes(self.where[1])

    @property
    def has_the_least(self) -> bool:
        """Whether as many processes and blocks are measured as a run takes at least."""
        enough = self.timing.blocks >= self.settings.measure.min_blocks
        return enough and len(self.timing.processes) >= self.least_processes

    @property
    def processes_needed(self) -> int:
        """How many processes come next: one, or as many as lack to the least that a run takes.

        Where these were not enough, as many more as the least blocks or the target take, and at most as many again:
        what a few processes tell of the scatter between them is not to be relied on further.
        """
        processes, blocks, more = len(self.timing.processes), self.timing.blocks, 0
        if 0 < blocks < self.settings.measure.min_blocks:
            more = math.ceil((self.settings.measure.min_blocks - blocks) * processes / blocks)
        elif self.has_the_least:
            more = processes_for(self._known_least()[1], processes)
        return max(1, self.least_processes - processes, min(processes, more))

    def reason_to_stop(self) -> StopReason | None:
        """Why measuring ends now; None while it goes on.

        Noise below a limit after a minimum of samples, or a time-out (NVIDIA nvbench's stdrel criterion). Unless
        somebody asked for the time, the least is measured however long it takes.
        """
        timing, measure = self.timing, self.settings.measure
        if not timing.blocks:
            return None
        _, over = self._known_least()
        if self.has_the_least and over <= 1:
            return StopReason.TARGET
        limited = self.has_the_least or measure.max_seconds is not None
        if limited and timing.measured_s >= self.settings.time_allowed_s:
            return StopReason.MAX_SECONDS
        return StopReason.MAX_BLOCKS if timing.blocks >= measure.max_blocks else None

    def shortfall(self) -> Shortfall | None:
        """What the target takes, once the least is measured."""
        if not self.has_the_least:
            return None
        timing, processes = self.timing, len(self.timing.processes)
        name, over = self._known_least()
        return Shortfall(
            term=name,
            over=over,
            target=self.settings.target(self.where[1]),
            more=processes_for(over, processes),
            measured_s=timing.measured_s / processes,
            setup_s=timing.setup_s,
            spent_s=timing.measured_s,
            left_s=self.settings.time_allowed_s - timing.measured_s,
        )

    def is_process_done(self, blocks: int, measured_s: float, setup_s: float) -> bool:
        """Whether a process that took `setup_s` to be ready makes way for the next, by what is measured in it.

        The dearer it is to set up, the more is measured in it (Kalibera & Jones, ISMM 2013, section 6), and never more
        than its share of the blocks and of the time that somebody asked for, or there might be no second one.
        """
        measure, share_s = self.settings.measure, self.settings.time_allowed_s / self.least_processes
        return (
            (blocks >= self.settings.blocks_per_process and measured_s >= min(share_s, MEASURED_PER_SETUP * setup_s))
            or (measure.max_seconds is not None and measured_s >= share_s)
            or blocks >= measure.max_blocks / self.least_processes
        )

    def left_s(self, setup_s: float) -> float:
        """About how long it still takes: halfway between the least and the most, and to get processes ready.

        `setup_s`: what one takes to be ready, where none of its own has been yet.
        """
        timing, measure = self.timing, self.settings.measure
        most = self.settings.time_allowed_s - timing.measured_s
        block_s = timing.measured_s / timing.blocks if timing.blocks else 0.0
        least = max(0, measure.min_blocks - timing.blocks) * block_s
        if measure.max_seconds is not None:
            least = min(least, most)
        processes = max(0, self.least_processes - len(timing.processes))
        return processes * (timing.setup_s or setup_s) + max(0.0, least + max(least, most)) / 2

    def stop(self, reason: StopReason) -> StopLine:
        """End measuring, and say so for the record: an effect that is not known yet has no half-width there."""
        self.timing.stopped = True
        workload, runtime = self.where
        widths = half_widths(self.timing.samples, self.settings.factors)
        return StopLine(
            workload=workload,
            runtime=runtime,
            reason=reason,
            half_width={name: width if math.isfinite(width) else None for name, width in widths.items()},
            blocks=self.timing.blocks,
            processes=len(self.timing.processes),
            measured_s=self.timing.measured_s,
            more_s=self.timing.more_s,
        )

    def _known_least(self) -> tuple[str, float]:
        """The effect that is known least, and its half-width over the target; infinite where none is known.

        Of a run so large that working this out takes long, as it was a while ago.
        """
        timing, started = self.timing, time.monotonic()
        if started >= timing.judged_until:
            timing.widths = half_widths(timing.samples, self.settings.factors)
            took_s = time.monotonic() - started
            if took_s > QUICK_S:
                timing.judged_until = started + took_s / _JUDGING_SHARE
        name, width = max(timing.widths.items(), key=lambda item: item[1], default=("", math.inf))
        return name, width / self.settings.target(self.where[1])
