"""What a page over several machines says: for what its intervals hold, each switch, how far machines differ."""

from __future__ import annotations

from qwen3bench.record.states import Verdict
from qwen3bench.reporting.finding import Effect
from qwen3bench.reporting.units import count, is_number, listing, percent, ratio

POOL_METHOD = (
    "Each run is analyzed by itself, as its own report says. A card's effect is the mean of its runs', a machine's "
    "that of its cards. The pooled effect is the mean of the machines', each counting once. Its interval is "
    "Student's t on their scatter, with one degree of freedom less than machines. So it holds for machines drawn at "
    "random from one kind. Verdicts are corrected for the number of effects (Holm), and so is what is said to differ "
    "between machines. Intervals are not. Where there are two kinds of them, a few machines do not show it, and "
    "intervals are too narrow. What differs between machines, and between cards, is the standard deviation that the "
    "runs' own errors do not explain. Latencies are not pooled, as cards of one kind differ in them by more than in "
    "effects."
)


def pool_scope(machines: int, cards: int, device: str) -> str:
    """On what pooled intervals stand, and for what they hold; `cards` is 0 on CPUs."""
    if machines == 1:
        of_cards = f" ({count(cards, 'card')})" if cards else ""
        return f"All is of one machine{of_cards}. What another would show, these runs cannot tell."
    stand = f"{count(cards, 'card')} in {count(machines, 'machine')}" if cards else count(machines, "machine")
    return f"Intervals hold for {device}. They stand on {stand}: {count(machines - 1, 'degree')} of freedom."


def pooled_words(effect: Effect, where: str, band: str) -> str:
    """What a switch, or a cell, is worth on this kind of card, with its verdict; `band` is that of `same`."""
    shown = f"{ratio(effect.estimate, effect.lo, effect.hi)} as fast ({where})"
    if not is_number(effect.lo):
        return f"{effect.term} reads {shown} on this machine, without an interval for others."
    if effect.verdict == Verdict.SAME:
        return f"{effect.term} changes latency by less than {band}: {shown}."
    return f"{effect.term} is {effect.verdict}: {shown}."


def spread_words(sd: float, lo: float, hi: float) -> str:
    """A standard deviation with its interval; empty where nothing tells it."""
    if hi == 0:
        return "none seen"
    return f"{percent(sd)} [{percent(lo)}, {percent(hi)}]" if is_number(sd) and is_number(lo) else ""


def widest_words(term: str, where: str, spread: tuple[float, float, float], *, shown: bool) -> str:
    """What differs most between machines: the standard deviation of its effect, with its interval.

    `shown`: whether it does by Holm's p over all switches, which the interval is not corrected for.
    """
    if shown:
        return f"{term} differs most between machines: standard deviation {spread_words(*spread)} ({where})."
    text = f"No switch is shown to be worth more on one machine than on another ({where})."
    return f"{text} Most it could be {term}: standard deviation {spread_words(*spread)}."


def few_machines(machines: int) -> str:
    """What so few machines do to the intervals."""
    text = f"{count(machines, 'machine')} are few: whether they agree by chance decides how wide an interval is."
    return f"{text} Each machine more helps much."


def noisy_run(run: int) -> str:
    """What makes one run of a pool less than it should be."""
    return f"Run {run}: It is noisy: two copies of its baseline differ."


def one_machine(named: str, machine: str) -> str:
    """Why two names count as one machine."""
    return f"{named} and {machine} count as one machine, {machine}: one card was measured under both names."


def not_pooled(terms: list[str], where: str) -> str:
    """Of which switches nothing is pooled, why, and what would mend that."""
    text = f"Nothing is pooled of {listing(terms)}: not all runs tell that, or not over the same cells ({where})."
    return f"{text} Leave out runs that lack cells, or measure them again."


def machines_differ(keys: list[str]) -> str:
    """In what else the machines differ, which is then part of their spread."""
    return f"The machines also differ in {listing(keys)}. What that does to effects is part of their spread."


# Captions of tables, by the name that the templates use.
POOL = {
    "pooled": "How many times as fast with the switch on, over all machines",
    "pooled_ratios": "How many times as fast a cell is as another, over all machines",
    "of_cards": "Latency of each machine and card",
    "unlike": "What is not the same on all machines",
}


def machines_title(machines: int) -> str:
    """Title of a plot of each machine's effects."""
    return f"Each machine's effects beside those of all {machines}"


BESIDE_POOLED = "difference from the pooled effect (%); gray: pooled interval"
