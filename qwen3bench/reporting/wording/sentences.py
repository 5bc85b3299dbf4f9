"""All sentences of a report: what a finding says in words.

One claim a sentence, and no more than its verdict supports.
"""

from __future__ import annotations

from qwen3bench.record.design import cell_of
from qwen3bench.record.states import Verdict
from qwen3bench.reporting.finding import (
    Advice,
    Against,
    Beside,
    BestCell,
    Choice,
    Control,
    Effect,
    Failed,
    Finding,
    Fitted,
    Idle,
    Kind,
    Lack,
    LogitsAtPeak,
    Missing,
    NoAnswer,
    NoVerdict,
    OpenEffects,
    Pair,
    Passed,
    Regime,
    Saving,
    Times,
)
from qwen3bench.reporting.lookup import AVERAGE, BASELINE
from qwen3bench.reporting.units import (
    LEAST_P,
    count,
    duration_words,
    is_number,
    listing,
    p_value,
    percent,
    seconds,
    significant,
    size,
    times,
)
from qwen3bench.reporting.wording.control_words import control_words
from qwen3bench.reporting.wording.ratio_words import band_words, interval, where_words

# Kind → heading, in the order in which they are read.
HEADINGS = {
    Kind.ANSWER: "What to switch on",
    Kind.SCREEN: "What the screen tells",
    Kind.TOGETHER: "All together",
    Kind.IDLE: "Each switch",
    Kind.SWITCH: "Each switch",
    Kind.UNTOLD: "Each switch",
    Kind.INTERACTION: "Do they stack?",
    Kind.MEMORY: "Memory",
    Kind.PEER: "Other implementations",
    Kind.UNDECIDED: "Undecided",
    Kind.REGIME: "Each switch",
    Kind.DEPENDENT: "Do they stack?",
    Kind.CONTROL: "Controls",
}
OPENING = (
    "qwen3bench builds one Qwen3 model with optimizations switched on or off. A cell is one combination of switches. "
    "Each cell is checked to compute what the baseline does, with all of them off. Then it is timed beside it. "
    "To begin, run make ablate in a checkout of its code: it sets itself up and measures your machine."
)
METHOD = (
    "Cells are timed in blocks. A block visits every cell once, in a fresh random order, and a second copy of the "
    "baseline. A visit is one untimed value, then one or more timed ones. Blocks are spread over fresh processes. An "
    "effect is the textbook 2^k contrast of log latency within a block. It is published as a ratio: above 1 is "
    "faster. Where cells are missing, least squares or the difference of two cells stands in, and the reason says "
    "which. Intervals hold {level} and count blocks and processes, not repeats. p values are Holm's over the "
    "terms of one order. “Same” means that the whole interval lies inside the band around 1. “Undecided” means that "
    "the data support neither that nor a difference. Peak memory is taken in a pass of its own, with one cell alone on "
    "the device."
)
FLASH_AND_MASK = (
    "Why flash and mask belong together: a fused kernel that is told of causality skips the blocked half of a prompt's "
    "scores. One that is given a mask tensor computes them all, and FlashAttention's takes none. With mask on there is "
    "no tensor."
)


def sentence(finding: Finding) -> str:
    """A finding in words: one sentence or a few, each with one claim."""
    text = _said(finding)
    if finding.noisy:
        screen = finding.kind == Kind.SCREEN
        text += " What was measured since is noisy, and not recommended." if screen else " This condition is noisy."
    if finding.advice:
        text += f" {_advised(finding.advice, finding)}"
    return f"Run {finding.run}: {text}" if finding.run else text


def _said(finding: Finding) -> str:
    match finding.detail:
        case Choice() as choice:
            return _chosen(finding, choice)
        case Times() as taken:
            return _together(finding, taken)
        case Beside() as beside:
            return _switch(finding, beside)
        case Fitted() as fitted:
            return _fitted(finding, fitted)
        case BestCell() as confirmation:
            return _confirmed(finding, confirmation)
        case Pair() as pair:
            return _pair(finding, pair)
        case Saving() as saving:
            free = f" and leaves latency the same within {band_words(finding.width)}" if saving.free else ""
            meanwhile = f" {saving.others}" if saving.others else ""
            saved = f"{size(saving.saved_bytes)} of peak memory{meanwhile}"
            return f"{finding.subject} saves {saved}{free}{where_words(finding)}."
        case LogitsAtPeak(logits_bytes, beside_parameters):
            many = f"{size(logits_bytes)} of {size(beside_parameters)} beside the parameters{where_words(finding)}"
            text = f"Every cell peaks at the logits of all positions, batch × tokens × vocabulary: {many}."
            return f"{text} No switch changes these; prefill.logits_to_keep=1 leaves them out."
        case Against(other, best_of):
            text = f"{finding.subject} {_fast(finding, other)}{where_words(finding)}."
            return text + (f" {other} is the fastest of {best_of} other implementations here." if best_of > 1 else "")
        case OpenEffects() as unsure:
            return _open(finding, unsure)
        case Failed() as failed:
            return _failed(finding, failed)
        case Missing() as missing:
            return _missing(finding, missing)
        case Idle(pairs):
            return f"{idle_words(finding.subject, finding.condition, pairs)} {IDLE_MEANS}"
        case Passed(passed, held, unsure):
            text = f"{passed} of {count(held, 'control')} passed."
            return text + (f" The interval of {count(unsure, 'control')} reaches beyond its limit." if unsure else "")
        case Control() as control:
            return control_words(finding, control)
        case Regime() as regime:
            return _regime(finding, regime)
    return _other(finding)


def _other(finding: Finding) -> str:
    """What needs no detail: an untold effect, a pair without halves, a dependence over runs."""
    if finding.kind == Kind.UNTOLD:
        return "The measured cells do not tell what a single switch is worth."
    if finding.kind == Kind.INTERACTION:
        a, b = finding.subject.split(":")
        much = "more" if finding.estimate > 1 else "less"
        return f"{a} and {b} are worth {much} together: joint effect {interval(finding)}{where_words(finding)}."
    raise ValueError(f"no words for {finding}")


# Speed


def _fast(finding: Finding, other: str) -> str:
    """`is 1.27× [1.26, 1.28] as fast as …`, or what else the verdict supports."""
    gain = interval(finding)
    words: dict[str, str] = {
        Verdict.FASTER: f"is {gain} as fast as {other}",
        Verdict.SLOWER: f"is {gain} as fast as {other}",
        Verdict.SAME: f"is as fast as {other} within {band_words(finding.width)}: {gain}",
        Verdict.UNDECIDED: f"against {other} is undecided: {gain}",
        NoVerdict.NOISE: f"against {other} shows no more than the noise: {gain}",
    }
    return words.get(finding.verdict, f"reads {gain} as fast as {other}, without an interval")


def _together(finding: Finding, taken: Times) -> str:
    if finding.subject == BASELINE:
        rate = f", {significant(taken.tokens_per_s)} tokens/s" if is_number(taken.tokens_per_s) else ""
        return f"The baseline takes {seconds(taken.latency_s)}{rate}{where_words(finding)}."
    if not is_number(taken.baseline_s):
        return f"{finding.subject} takes {seconds(taken.latency_s)}{where_words(finding)}. The baseline has no latency."
    text = f"{finding.subject} {_fast(finding, 'the baseline')}{where_words(finding)}."
    text += f" Latency goes from {seconds(taken.baseline_s)} to {seconds(taken.latency_s)}."
    return text


def _chosen(finding: Finding, choice: Choice) -> str:
    within = f" within {choice.limit_gib:g} GiB" if choice.limit_gib is not None else ""
    where = finding.condition
    nothing = {
        NoAnswer.NO_BASELINE: f"No recommendation for {where}: the baseline has no latency.",
        NoAnswer.NOISY: f"No recommendation for {where}: two copies of the baseline differ too much.",
        NoAnswer.NO_BLOCK: f"No speed-up is known, as no block holds every cell and the baseline's copy ({where}).",
        NoAnswer.NOTHING_FITS: f"No cell fits{within} ({where}). The smallest is {choice.smallest}: "
        f"{size(choice.smallest_bytes) if is_number(choice.smallest_bytes) else 'unknown'}.",
        NoAnswer.MEMORY_UNKNOWN: f"What fits{within} is unknown, as peak memory was not measured ({where}).",
        NoAnswer.NOTHING_FASTER: f"No cell{within} is shown to be faster than the baseline ({where}).",
    }
    if choice.none:
        return nothing[choice.none]
    text = f"Switch on {finding.subject}{within}: {interval(finding)} as fast as the baseline ({where})."
    return " ".join([text, *choice_notes(finding, choice)])


def choice_notes(finding: Finding, choice: Choice) -> list[str]:
    """What is to be known beside a recommendation: cells as fast, cells of which that is not known."""
    notes = []
    if choice.alike:
        other, *more = choice.alike
        alike = f"as fast within {band_words(finding.width)}"
        kept = "None saves memory" if more else "It saves no memory"
        if not choice.by_memory:
            kept = "None has fewer switches" if more else "It has no fewer switches"
        if choice.more_bytes > 0:
            kept = f"{'Each takes at least' if more else 'It takes'} {size(choice.more_bytes)} more memory"
        cells = f"{count(len(choice.alike), 'other cell')} are {alike}{_named(finding, choice)}"
        notes.append(f"{cells if more else f'{other} is {alike}'}. {kept}.")
    if choice.unsure:
        verb = "is" if len(choice.unsure) == 1 else "are"
        notes.append(f"Whether {listing(list(choice.unsure), 3)} {verb} slower is not known.")
    return notes


def _named(finding: Finding, choice: Choice) -> str:
    """Of cells as fast as the recommended one: that with the fewest switches where it has fewer, else the first few."""
    least = min(choice.alike, key=lambda cell: len(cell_of(cell)))
    if len(cell_of(least)) < len(cell_of(finding.subject)):
        return f", {least} with the fewest switches"
    return f": {listing(list(choice.alike), 3)}"


def _switch(finding: Finding, beside: Beside) -> str:
    if not is_number(finding.estimate):
        because = f": {beside.reason}" if beside.reason else ""
        return f"{finding.subject} is not known{where_words(finding)}{because}."
    gain, name = interval(finding), finding.subject
    words: dict[str, str] = {
        Verdict.FASTER: f"{name} on is {gain} as fast as off",
        Verdict.SLOWER: f"{name} on is {gain} as fast as off",
        Verdict.SAME: f"{name} changes latency by less than {band_words(finding.width)}: {gain}",
        Verdict.UNDECIDED: f"{name} is undecided: {gain}",
        NoVerdict.NOISE: f"{name} shows no more than the noise: {gain}",
        NoVerdict.IDLE: f"{name} changes nothing that runs: {gain}",
    }
    text = words.get(finding.verdict, f"{name} reads {gain}, without a verdict")
    text += f"{beside.others and f', {beside.others}'}{where_words(finding)}."
    return f"{text} Taken for granted: {beside.reason}." if beside.reason else text


# Screens


def _fitted(finding: Finding, fitted: Fitted) -> str:
    text = f"{fitted.cells} of {fitted.every:,} cells were screened{where_words(finding)}."
    off = f"off by {100 * fitted.rms:.2g} % of a latency"
    if fitted.matters is None:
        return f"{text} Whether main effects and pairs describe them is not known: too few cells or blocks tell."
    p = p_value(fitted.p) if fitted.p < LEAST_P else f"= {p_value(fitted.p)}"
    if fitted.matters:
        text += f" Interactions of three switches matter: main effects and pairs are {off} (p {p})."
        return f"{text} The intervals hold what these may do."
    return f"{text} Main effects and pairs describe them, {off} (p {p})."


def _confirmed(finding: Finding, found: BestCell) -> str:
    text = f"Predicted to be fastest of all {found.every:,}: {finding.subject}, {interval(found.predicted)}"
    text += f" as fast as the baseline{where_words(finding)}."
    if found.measured is None:
        return f"{text} It has no measured speed-up, so it is not recommended."
    where = "Measured in the screen" if found.in_screen else "Measured since"
    text += f" {where}: {interval(found.measured)}."
    if not found.missed and not found.tested:
        if finding.noisy:
            return f"{text} The intervals are too wide to tell whether that holds."
        return f"{text} Rely on the measured number: the intervals are too wide to tell whether another cell is faster."
    if not found.missed:
        return f"{text} The prediction holds."
    if not found.still_missed:
        return f"{text} The prediction holds, after one round that missed {listing(list(found.missed))}."
    again = " after two rounds" if found.rounds > 1 else ""
    return f"{text} Predictions miss{again}: {listing(list(found.missed))}. Only measured cells are recommended."


IDLE_MEANS = "Any effect on its latency is noise, or what Python costs the host with it or without."


def idle_words(name: str, condition: str, pairs: int) -> str:
    """That a switch changes neither kernels nor output, as was seen in so many pairs of cells."""
    seen = {1: "the only pair", 2: "both pairs"}.get(pairs, f"all {pairs} pairs")
    return f"{name} changes neither the kernels that run nor the output ({condition}), in {seen} of cells."


# Pairs, what is open


def _pair(finding: Finding, pair: Pair) -> str:
    with_it, without = (times(half.estimate, half.lo, half.hi) for half in (pair.with_it, pair.without))
    numbers = f"{with_it} with it, {without} without{where_words(finding)}."
    pays = pair.with_it.verdict, pair.without.verdict
    if only_with(pair):
        return f"{pair.small} helps only with {pair.large}: {numbers}"
    if pays[1] == Verdict.FASTER and pays[0] in (Verdict.SAME, Verdict.SLOWER):
        return f"{pair.small} helps only without {pair.large}: {numbers}"
    much = "more" if finding.verdict == Verdict.FASTER else "less"
    return f"{pair.small} is worth {much} with {pair.large}: {numbers}"


def only_with(pair: Pair) -> bool:
    """Whether the smaller switch of a pair is shown to help with the other on, and not to with it off."""
    return pair.with_it.verdict == Verdict.FASTER and pair.without.verdict in (Verdict.SAME, Verdict.SLOWER)


def only_with_note(pair: Pair) -> str:
    """What the table of switches adds to an average that hides it."""
    with_it, without = (times(half.estimate, half.lo, half.hi) for half in (pair.with_it, pair.without))
    return f"only with {pair.large}: {with_it}, without {without}"


def _open(finding: Finding, unsure: OpenEffects) -> str:
    named = listing([f"{e.term} {times(e.estimate, e.lo, e.hi)}" for e in unsure.effects])
    what = "Undecided interactions" if unsure.pairs else "Undecided"
    return f"{what}: {named}{where_words(finding)}." + (" One block gives no interval." if unsure.blind else "")


def command_of(advice: Advice) -> str:
    """What to add to the command."""
    return " ".join(advice.settings)


def _advised(advice: Advice, finding: Finding) -> str:
    if not advice.settings and advice.seconds is not None:
        text = f"This machine cannot tell in reasonable time, as it takes about {duration_words(advice.seconds)}."
        return text if advice.reach is None else f"{text} Ten minutes tell it to about ±{percent(advice.reach)}."
    how_long = f", in about {duration_words(advice.seconds)}" if advice.seconds is not None else ""
    if finding.kind == Kind.UNDECIDED:
        return f"If the estimates hold, {command_of(advice)} decides{how_long}."
    return f"To tell: {command_of(advice)}{how_long}."


# What failed, what is missing


def _failed(finding: Finding, failed: Failed) -> str:
    verb = "has" if len(failed.cells) == 1 else "have"
    where = f" ({listing(list(failed.where), 12)})" if failed.where else ""
    text = f"{listing(list(failed.cells))} {verb} status {finding.verdict} and no speed-up{where}."
    if failed.reason:
        text += f" Reason: {failed.reason}."
    return text + (" The others' reasons stand under What went wrong." if failed.reasons > 1 else "")


def _missing(finding: Finding, missing: Missing) -> str:
    named = list(missing.names)
    said = listing(named, 12)
    return {
        Lack.END: "This run has not finished. The page shows what was measured until now.",
        Lack.LATENCY: f"Without any latency: {listing(named) or 'every workload'}.",
        Lack.CELLS: f"{count(len(named), 'cell')} of {missing.total} without a latency: {said}{where_words(finding)}.",
        Lack.LINES: f"The record is damaged: {'; '.join(named)}.",
        Lack.EFFECTS: "No run holds an effect on latency that could be estimated.",
        Lack.ONE_BAND: f"Verdicts are by different bands and intervals ({said}). The page shows the first run's.",
    }[missing.lack]


# Over several runs


def _regime(finding: Finding, regime: Regime) -> str:
    if finding.kind == Kind.DEPENDENT:
        small, large = finding.subject.split(":")
        return (
            f"{small} helps only with {large} in {count(regime.total, 'condition')}. An average over both hides that."
        )
    beside = "" if regime.others == AVERAGE else f", {regime.others or 'the only switch of its run'},"
    parts = []
    for verdict, effects in ((Verdict.FASTER, regime.faster), (Verdict.SLOWER, regime.slower)):
        if effects:
            everywhere = len(effects) == regime.total
            many = f"all {regime.total} conditions" if everywhere else f"{len(effects)} of {regime.total}"
            parts.append(f"{verdict} in {many}{_ends(effects)}")
    if regime.same:
        parts.append(f"the same in {regime.same}")
    if regime.undecided:
        parts.append(f"undecided in {regime.undecided}")
    if regime.noise:
        parts.append(f"within the noise in {regime.noise}")
    if regime.idle:
        parts.append(f"without any effect on what runs in {regime.idle}")
    return f"{finding.subject}{beside} is {listing(parts)}."


def _ends(effects: tuple[Effect, ...]) -> str:
    said = [times(e.estimate, e.lo, e.hi) for e in sorted(effects, key=lambda e: e.estimate)]
    return f" ({said[0] if said[0] == said[-1] else f'{said[0]} to {said[-1]}'} as fast)"
