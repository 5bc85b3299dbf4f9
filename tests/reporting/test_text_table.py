"""Plain tables and paragraphs never break a value."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qwen3bench.reporting.text_table import narrow_table, packed, text_table, wrapped
from qwen3bench.reporting.units import FIXED

FIELDS = {"flash": ["1.203×", "1.05× ?"], "tie": ["1.0×", "not known"]}


def test_a_head_breaks_between_words_above_its_column() -> None:
    assert text_table(FIELDS, ["decode 1×1", "prefill"]) == [
        "       decode",
        "       1×1     prefill",
        "flash  1.203×  1.05× ?",
        "tie    1.0×    not known",
    ]


def test_columns_that_do_not_fit_are_left_out_and_counted() -> None:
    assert narrow_table(FIELDS, ["a", "b"], 24) == text_table(FIELDS, ["a", "b"])
    assert narrow_table(FIELDS, ["a", "b"], 15) == [
        "       a",
        "flash  1.203×",
        "tie    1.0×",
        "1 more column in a wider window",
    ]


@given(st.lists(st.sampled_from(["1.27× [1.26, 1.28]", "4.5 ms", "a"]), min_size=1), st.integers(24, 100))
def test_pieces_are_whole_and_lines_fit(pieces: list[str], width: int) -> None:
    lines = packed("where:", pieces, width)
    assert max(map(len, lines)) <= width
    assert "".join(lines[0].partition(":")[2:] + tuple(lines[1:])).replace(" ", "") == ",".join(pieces).replace(" ", "")
    assert sum(line.count(piece) for line in lines for piece in {"4.5 ms", "1.27× [1.26, 1.28]"}) == sum(
        piece != "a" for piece in pieces
    )


def test_a_number_stays_with_its_unit() -> None:
    assert wrapped(f"differ by 2.0{FIXED}% here", 14) == ["differ by", "  2.0 % here"]
