"""The prompts that the gate gives to models, and the ways in which their logits are computed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

LENGTHS = (1, 7, 37, 130)  # one row, and multiples of no tile
BATCH_SIZE = 3
LARGEST = (5, 700)  # sequences and tokens that are judged of a workload's larger prompt
WHOLE = 2048  # tokens in all that are judged of it as it is, on a GPU


@dataclass(frozen=True)
class Case:
    """One way to compute the logits of a prompt: in one forward, or in `chunks` of tokens against a cache.

    `usual` are those that a workload asks for: a prefill, and single tokens after one. The prompt's first
    `sequences` take part. `keep` > 0: only the last that many tokens' logits are asked for.
    """

    name: str
    prompt: int
    chunks: tuple[int, ...] = ()
    usual: bool = False
    sequences: int = max(BATCH_SIZE, LARGEST[0])
    keep: int = 0


@dataclass(frozen=True)
class JudgedPrompts:
    """The shapes (sequences, tokens) of the prompts, and the cases over them."""

    shapes: tuple[tuple[int, int], ...]
    cases: tuple[Case, ...]


def judged_prompts(context: int, sizes: Iterable[tuple[int, int]], device: torch.device) -> JudgedPrompts:
    """What is judged of models with so long a context.

    `sizes` are the sequences and tokens of the workloads' prompts: where one is larger than the gate's own prompts,
    such a one is judged as well, up to `LARGEST`, and on a GPU the largest as it is, up to `WHOLE` tokens.
    """
    lengths = sorted({min(n, context) for n in LENGTHS})
    shapes = [(BATCH_SIZE, n) for n in lengths]
    sizes = [(1, 1), *sizes]
    whole = whole_size([(n, min(t, context)) for n, t in sizes]) if chooses_by_size(device) else None
    sequences, tokens = (
        min(largest, max(given)) for largest, given in zip(LARGEST, zip(*sizes, strict=True), strict=True)
    )
    tokens = min(tokens, context)
    large = sequences > BATCH_SIZE or tokens > lengths[-1]
    if large:
        shapes.append((sequences, tokens))
    if whole is not None:
        shapes.append(whole)
    return JudgedPrompts(tuple(shapes), tuple(cases_over(lengths, tokens if large else None, whole)))


def whole_size(sizes: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Sequences and tokens of the largest prompt among `sizes`, as many of either as `WHOLE` tokens in all allow."""
    sequences, tokens = max(sizes, key=math.prod)
    tokens = min(tokens, WHOLE)
    return max(1, min(sequences, WHOLE // tokens)), tokens


def chooses_by_size(device: torch.device) -> bool:
    """Whether a device may have other kernels for other numbers of tokens."""
    return device.type != "cpu"


def cases_over(lengths: Sequence[int], large: int | None, whole: tuple[int, int] | None) -> list[Case]:
    """Each prompt in one forward, the long ones in chunks too, the short ones token by token, also alone.

    `large`: the length of one more prompt; `whole`: sequences and tokens of another, the last, in one forward alone.
    """
    found = [Case(f"a prefill of length {n}", i, usual=n > 1) for i, n in enumerate(lengths)]
    for i, n in enumerate(lengths):
        if n <= 64:
            singles = min(n, 12)
            filled = (n - singles,) if n > singles else ()
            found.append(Case(f"a decode of length {n}", i, (*filled, *[1] * singles), usual=n > singles))
        if 7 <= n <= 64:  # a lone token may have a kernel of its own
            chunks = (n - 5, *[1] * 5)
            found.append(Case(f"a decode of one sequence of length {n}", i, chunks, usual=True, sequences=1))
        if n > 64:  # whose kernel may split so many keys
            name = f"a decode of one sequence of length {n}"
            found.append(Case(name, i, (n - 2, 1, 1), usual=True, sequences=1))
        if n > 7:
            first = n // 2
            found.append(Case(f"chunks of length {n}", i, (first, 1, 3, n - first - 4)))
    found.append(Case(f"the last logits of length {lengths[-1]}", len(lengths) - 1, usual=True, keep=1))
    if large is not None:
        found.append(Case(f"a large prefill of length {large}", len(lengths), usual=True))
        if large > 2:
            chunks = (large - 2, 1, 1)
            found.append(Case(f"a decode after {large - 2} tokens", len(lengths), chunks, usual=True))
            if large > 64:  # whose kernel may split so many keys
                name = f"a decode of one sequence after {large - 2} tokens"
                found.append(Case(name, len(lengths), chunks, usual=True, sequences=1))
    if whole is not None:
        index = len(lengths) + (large is not None)
        found.append(Case(f"a prefill of {whole[0]} × {whole[1]}", index, usual=whole[1] > 1, sequences=whole[0]))
    return found
