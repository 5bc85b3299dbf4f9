"""Tables and paragraphs of plain text that break between values, never within one."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from qwen3bench.reporting.units import FIXED
from qwen3bench.reporting.wording.terminal_words import more_columns


def text_table(fields: Mapping[str, Sequence[str]], heads: Sequence[str], columns: int | None = None) -> list[str]:
    """Lines of a table: a row for each name, and the first `columns` under heads that break between words."""
    heads = heads[:columns]
    names = max(map(len, fields), default=0)
    widths = [max((len(row[c]) for row in fields.values()), default=0) for c in range(len(heads))]
    stacks = [textwrap.wrap(head, max(w, *map(len, head.split()))) for head, w in zip(heads, widths, strict=True)]
    widths = [max(width, *map(len, stack)) for width, stack in zip(widths, stacks, strict=True)]
    height = max(map(len, stacks), default=0)
    stacks = [[""] * (height - len(stack)) + stack for stack in stacks]  # their last words stand above the values
    rows = [("", *(stack[level] for stack in stacks)) for level in range(height)]
    rows += [(name, *row[: len(heads)]) for name, row in fields.items()]
    padded = ([text.ljust(width) for text, width in zip(row, (names, *widths), strict=True)] for row in rows)
    return ["  ".join(parts).rstrip() for parts in padded]


def narrow_table(fields: Mapping[str, Sequence[str]], heads: Sequence[str], width: int) -> list[str]:
    """`text_table` without the last columns where these do not fit, one column at least; a line counts them."""
    shown = len(heads)
    while shown > 1 and max(map(len, text_table(fields, heads, shown))) > width:
        shown -= 1
    left = len(heads) - shown
    return text_table(fields, heads, shown) + [more_columns(left)] * (left > 0)


def packed(head: str, pieces: Sequence[str], width: int) -> list[str]:
    """`head`, then the pieces with commas between them, as many to an indented line as fit; none is broken."""
    lines = [head] if head else [" "]
    for number, piece in enumerate(pieces):
        text = f"{piece}," if number < len(pieces) - 1 else piece
        fits = len(lines[-1]) + 1 + len(text) <= width
        lines = [*lines[:-1], f"{lines[-1]} {text}"] if fits else [*lines, f"  {text}"]
    return lines


def wrapped(text: str, width: int) -> list[str]:
    """A paragraph with its next lines indented; a word that is too long, such as a path, stays whole."""
    lines = textwrap.wrap(text, width, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)
    return [line.replace(FIXED, " ") for line in lines]
