"""What the controls of a run came to, in sentences."""

from __future__ import annotations

from qwen3bench.reporting.finding import Check, Control, ControlOutcome, Finding
from qwen3bench.reporting.units import count, interval_decimals, is_number, listing, percent, size
from qwen3bench.reporting.wording.ratio_words import interval, where_words

FEW_PASSES = "one to ten passes of each cell"  # as the look at eager takes that a run in a graph has


def control_mark(control: Control) -> str:
    """For a list: passed, failed, or neither."""
    return {ControlOutcome.PASSED: "✓", ControlOutcome.FAILED: "✗"}.get(control.outcome, "–")


def control_words(finding: Finding, control: Control) -> str:
    """What a control came to."""
    words = {
        Check.EQUIVALENCE: _equivalence_words,
        Check.GRADIENTS: _gradient_words,
        Check.VERIFIED: _equivalence_words,
        Check.AA: _aa_words,
        Check.TIE_LATENCY: _tie_words,
        Check.TIE_MEMORY: _head_words,
        Check.DRIFT: _drift_words,
        Check.PROCESSES: _process_words,
        Check.ONE_PROCESS: _process_words,
        Check.FLAGGED: _block_words,
        Check.LEFT_OUT: _block_words,
        Check.POWER_CAP: _block_words,
        Check.HOST: _host_words,
        Check.NOISY_RUNS: _noisy_words,
    }
    return words[control.check](finding, control)


def _equivalence_words(_: Finding, control: Control) -> str:
    if control.outcome == ControlOutcome.FAILED:
        return f"Not verified to compute the baseline's function: {listing(list(control.names))}."
    return f"Equivalence: all {count(control.number, 'verified cell')} compute the baseline's function."


def _gradient_words(_: Finding, control: Control) -> str:
    return f"Gradients: all {count(control.number, 'verified cell')} train as the baseline does."


def _aa_words(finding: Finding, control: Control) -> str:
    if control.outcome == ControlOutcome.ABSENT:
        return "A/A: no second copy of the baseline was timed."
    limit, read = f"{100 * control.limit:g} %", f"{interval(finding)}{where_words(finding)}"
    if control.outcome == ControlOutcome.FAILED:
        mend = "Measure again in more processes, on a quiet machine."
        if control.runtime == "compile":
            mend = "Measure in more processes, as each compiled model chose its kernels for itself."
        text = f"Noisy: two copies of the baseline differ, and read {read}. The limit is ±{limit}."
        return f"{text} Differences of that size and less mean nothing. {mend}"
    text = f"A/A: two copies of the baseline read {read}. The limit is ±{limit}."
    if control.outcome == ControlOutcome.PASSED:
        return text
    if not is_number(finding.lo):
        return f"{text} One block gives no interval, so nothing shows whether they agree."
    return f"{text} As far as this run can tell, they agree within {_seen(finding)}."


def copies_words(finding: Finding) -> str:
    """What the A/A control of a condition came to, in a few words; none where it passed."""
    outcome = finding.detail.outcome if isinstance(finding.detail, Control) else None
    if outcome == ControlOutcome.UNSURE:
        return f"copies agree within {_seen(finding)}" if is_number(finding.lo) else "no interval"
    return "noisy" if outcome == ControlOutcome.FAILED else ""


def _seen(finding: Finding) -> str:
    """The farther end of the interval of a ratio that should be 1."""
    return percent(max(finding.hi - 1, 1 - finding.lo))


def _tie_words(finding: Finding, control: Control) -> str:
    if control.outcome == ControlOutcome.ABSENT:
        if control.number:
            return "Negative control: the effect of tie has no interval. More blocks give one."
        return "Negative control: this run has no effect of tie. design=full with tie among the switches has one."
    text = f"Negative control: tie cannot change latency, and reads {interval(finding)}{where_words(finding)}."
    outcome = (
        "Its interval holds 1."
        if control.outcome == ControlOutcome.PASSED
        else ("Its interval leaves out 1, so effects of that size mean nothing.")
    )
    return f"{text} {outcome}"


def _head_words(_: Finding, control: Control) -> str:
    what = f"the head's {size(control.limit)} ({int(control.limit):,} bytes) of parameters"
    if control.outcome == ControlOutcome.FAILED:
        return f"Positive control: tie should save {what}. It does not when added to {listing(list(control.names))}."
    return f"Positive control: tie saves exactly {what} in {count(control.number, 'pair')} of cells."


def drift_words(finding: Finding) -> str:
    """By how much latency moves while a process is timed, with its interval."""
    decimals = interval_decimals(100 * finding.lo, 100 * finding.hi)
    said = (f"{100 * value:+.{decimals}f}" for value in (finding.estimate, finding.lo, finding.hi))
    total, lo, hi = (text.replace("-", "−") for text in said)
    return f"from a process's first block to its last, latency moved by {total} % [{lo}, {hi}]"


def _drift_words(finding: Finding, _: Control) -> str:
    return f"Drift: {drift_words(finding)}{where_words(finding)}. Effects are taken within blocks."


def _process_words(finding: Finding, control: Control) -> str:
    if control.check == Check.ONE_PROCESS:
        text = f"Timed in one process: {listing(list(control.names))}."
        return f"{text} Intervals leave out what differs between processes, so a second run need not confirm them."
    text = f"Processes: the slowest takes {percent(finding.estimate)} more time than the fastest{where_words(finding)}."
    return f"{text} Effects are taken within blocks, and intervals count what processes do to them."


def _block_words(finding: Finding, control: Control) -> str:
    if control.check == Check.FLAGGED:
        reasons = listing(list(control.names)) or "no reason recorded"
        return f"{count(control.number, 'block')} measured under a disturbance that stayed: {reasons}."
    if control.check == Check.LEFT_OUT:
        text = f"Other work slowed {control.number} of {count(control.total, 'visit')}"
        return f"{text}, {100 * control.number / control.total:.2g} %, which no estimate counts{where_words(finding)}."
    text = f"{control.number} of {count(control.total, 'block')} ended at the card's power limit, with lower clocks."
    return f"{text} Cells that draw more power are slowed more there, as they would be in use."


def _host_words(finding: Finding, control: Control) -> str:
    if control.outcome == ControlOutcome.ABSENT:
        if control.runtime == "graph":
            return "Host: graph replays are device time. runtime=eager,graph shows how far the host holds them up."
        return "Host: eager latency holds the host's launches. On CUDA, runtime=eager,graph shows how much they are."
    shares = zip(control.names, control.shares, strict=True)
    said = listing([f"{percent(min(1.0, share))} of the time ({name})" for name, share in shares])
    few = f" (eager by {FEW_PASSES})" if control.runtime == "graph" else ""
    text = f"Under eager the GPU works {said} in {finding.subject}, by graph over eager latency{few}."
    if min(control.shares) < control.limit:
        text += " The rest is the host launching kernels, so eager effects are not kernel time."
    return text


def _noisy_words(_: Finding, control: Control) -> str:
    return f"Noisy, where only effects larger than the noise count: {'; '.join(control.names)}."
