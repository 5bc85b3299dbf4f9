"""The prompts that the gate gives to models, and the ways in which their logits are computed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum

from qwen3bench.worker.workloads import WorkloadSize

LENGTHS = (1, 7, 37, 130)  # one row, and multiples of no tile
BATCH_SIZE = 3
AGAIN = 7  # the length of a second and a third prompt, which a result kept from the first would not fit
LOUD = 37  # the length of the prompt that meets large activations
CALLS = 3  # of each forward of a workload, each with other tokens
STEPS = 64  # of `generate` that are judged, a kernel's usual tile; of more the first three quarters, and the last
SPARE = 5  # positions of a cache that are never filled: what reads them is wrong


class WeightSet(StrEnum):
    """Which weights a model is given: `reference` says how they are made."""

    CUT = "cut"  # the first rows of the vocabulary alone, for many positions
    WHOLE = "whole"  # the whole vocabulary, for what a workload asks
    LOUD = "loud"  # the activations are larger than float16 holds, or as large as it holds where it is judged


@dataclass(frozen=True)
class Prompt:
    """Random tokens (sequences, tokens) for the models of one weight set.

    Logits are compared from position `judged_from` on. Before it the tokens are those of the prompt `after`.
    """

    weights: WeightSet
    sequences: int
    tokens: int
    judged_from: int = 0
    after: int | None = None


@dataclass(frozen=True)
class Pass:
    """Forwards over one prompt, in chunks of tokens from position `start` on.

    With `last`, only the last token's logits of the first chunk are asked for.
    """

    prompt: int
    chunks: tuple[int, ...]
    start: int = 0
    last: bool = False

    @property
    def judged(self) -> range:
        """The positions whose logits are asked for."""
        return range(self.start + (self.chunks[0] - 1 if self.last else 0), self.start + sum(self.chunks))


@dataclass(frozen=True)
class Case:
    """One way to compute logits: passes one after another, against one cache of `capacity` positions if above 0.

    `usual` are those that a workload asks for: a prefill, and single tokens after one; `own` are a workload's own
    size. The prompts' first `sequences` take part.
    """

    name: str
    weights: WeightSet
    passes: tuple[Pass, ...]
    capacity: int = 0
    usual: bool = False
    own: bool = False
    sequences: int | None = None


@dataclass
class JudgedCases:
    """The prompts, and the cases over them; `weights` of neighbors are alike as far as possible."""

    prompts: list[Prompt] = field(default_factory=list)
    cases: list[Case] = field(default_factory=list)

    def prompt(
        self, weights: WeightSet, sequences: int, tokens: int, judged_from: int = 0, after: int | None = None
    ) -> int:
        """The index of a new prompt with these fields."""
        self.prompts.append(Prompt(weights, sequences, tokens, judged_from, after))
        return len(self.prompts) - 1


def judged_cases(context: int, workloads: Iterable[WorkloadSize]) -> JudgedCases:
    """What is judged of models with so long a context that are asked to do these workloads."""
    found = JudgedCases()
    lengths = sorted({min(n, context) for n in LENGTHS})
    for n in lengths:
        _add_length(found, n)
    for count in range(1, CALLS) if lengths[-1] >= AGAIN else ():
        index = found.prompt(WeightSet.CUT, BATCH_SIZE, AGAIN)
        name = f"prompt {count + 1} of length {AGAIN}"
        found.cases.append(Case(f"a prefill of {name}", WeightSet.CUT, (Pass(index, (AGAIN,)),), usual=True))
        found.cases.append(_decode(f"a decode of {name}", WeightSet.CUT, index, (AGAIN - 2, 1, 1)))
    _add_loud(found, min(LOUD, context))
    own: dict[tuple[int, int], list[int]] = {}
    for size in dict.fromkeys(workloads):
        if size.name != "train":  # whose function is judged at the gate's own sizes, its gradients by themselves
            _add_own(found, size, own.setdefault((size.batch_size, size.prompt_tokens), []))
    return found


def _decode(name: str, weights: WeightSet, index: int, chunks: tuple[int, ...], sequences: int | None = None) -> Case:
    return Case(name, weights, (Pass(index, chunks),), sum(chunks) + SPARE, usual=chunks[0] > 1, sequences=sequences)


def _add_length(found: JudgedCases, n: int) -> None:
    """A prompt in one forward, a long one in chunks too, a short one token by token, also alone."""
    index = found.prompt(WeightSet.CUT, BATCH_SIZE, n)
    cut, add = WeightSet.CUT, found.cases.append
    add(Case(f"a prefill of length {n}", cut, (Pass(index, (n,)),), usual=n > 1))
    if n <= 64:
        singles = min(n, AGAIN)
        filled = (n - singles,) if n > singles else ()
        add(replace(_decode(f"a decode of length {n}", cut, index, (*filled, *[1] * singles)), usual=n > singles))
    if 7 <= n <= 64:  # a lone token may have a kernel of its own
        add(_decode(f"a decode of one sequence of length {n}", cut, index, (n - 3, 1, 1, 1), sequences=1))
    if n > 64:  # whose kernel may split so many keys
        add(_decode(f"a decode of one sequence of length {n}", cut, index, (n - 2, 1, 1), sequences=1))
        add(Case(f"the last logits of length {n}", cut, (Pass(index, (n,), last=True),), usual=True))
    if n > 7:
        first = n // 2
        chunks = (first, 1, 3, n - first - 4)
        add(replace(_decode(f"chunks of length {n}", cut, index, chunks), usual=False))


def _add_loud(found: JudgedCases, n: int) -> None:
    loud = WeightSet.LOUD
    index = found.prompt(loud, BATCH_SIZE, n)
    found.cases.append(Case(f"a prefill of length {n} with large activations", loud, (Pass(index, (n,)),), usual=n > 1))
    if n > 7:
        chunks = (n - 2, 1, 1)
        found.cases.append(_decode(f"a decode of length {n} with large activations", loud, index, chunks))
        name = f"a decode of one sequence of length {n} with large activations"
        found.cases.append(_decode(name, loud, index, chunks, sequences=1))


def _add_own(found: JudgedCases, size: WorkloadSize, shared: list[int]) -> None:
    """A workload as it is timed; `shared` are the prompts of its size that there are already."""
    b, n, whole = size.batch_size, size.prompt_tokens, WeightSet.WHOLE
    if not shared:
        shared.append(found.prompt(whole, b, n, n - 1))
    base = shared[0]
    name = f"{size.name} of {b} × {n}"
    if size.name == "prefill":
        last = size.logits_to_keep == 1
        judged_from = n - 1 if last else 0
        if not last:
            found.prompts[base] = replace(found.prompts[base], judged_from=0)
        indices = [base, *(found.prompt(whole, b, n, judged_from) for _ in range(1, CALLS))]
        passes = [Pass(index, (n,), last=last) for index in indices]
    elif size.name == "decode":
        after = [found.prompt(whole, b, n + 1, n, base) for _ in range(CALLS)]
        passes = [Pass(base, (n,), last=True), *(Pass(index, (1,), n) for index in after)]
    else:
        name += f" + {size.new_tokens}"
        steps = size.new_tokens - 1
        passes = [Pass(base, (n,), last=True)]
        if steps:
            index = found.prompt(whole, b, n + steps, n, base)
            late = 0 if steps <= STEPS else STEPS // 4
            early = min(steps, STEPS - late)
            passes.append(Pass(index, (1,) * early, n))
            if late:
                passes.append(Pass(index, (n + steps - late, *[1] * late), last=True))
        few = min(steps, CALLS - 1)  # of other tokens, where these stood
        passes.append(Pass(found.prompt(whole, b, n + few, n - 1), (n, *[1] * few), last=True))
    found.cases.append(Case(name, whole, tuple(passes), size.cache_capacity, usual=True, own=True))
