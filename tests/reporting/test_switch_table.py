from dataclasses import replace

import pytest

from qwen3bench.analysis.run import Run
from qwen3bench.reporting.finding import Beside, Finding, Kind
from qwen3bench.reporting.findings import findings
from qwen3bench.reporting.switch_table import Field, SwitchTable, switch_table

BIG = Finding(Kind.SWITCH, "flash", "prefill", 2.4, 2.39, 2.41, "faster", Beside())
SMALL = Finding(Kind.SWITCH, "mlp", "prefill", 1.02, 1.015, 1.025, "faster", Beside())


def fields(*found: Finding) -> dict[str, Field]:
    table = switch_table(found)
    assert table
    return {name: places[0] for name, places in table.rows}


def test_rows_are_switches_and_columns_conditions(full_run: Run) -> None:
    table = switch_table(findings(full_run))
    assert isinstance(table, SwitchTable)
    assert [name for name, _ in table.rows] == ["flash", "tie", "mlp", "mask", "norm"]
    assert len(table.conditions) == 4
    assert {len(places) for _, places in table.rows} == {4}
    by_name = dict(table.rows)
    assert [field.look for field in by_name["tie"]] == ["same"] * 4
    assert by_name["norm"][0].gain == "1.271×"
    assert "only with flash: 1." in by_name["mask"][0].text


def test_a_field_is_shaded_by_the_size_of_its_effect() -> None:
    shown = fields(BIG, SMALL, replace(SMALL, subject="mask", estimate=0.9, verdict="slower"))
    assert shown["flash"].shade > shown["mask"].shade > shown["mlp"].shade > 0
    assert [shown[name].look for name in ("flash", "mlp", "mask")] == ["gain", "gain", "loss"]


@pytest.mark.parametrize(
    ("verdict", "look", "word"),
    [("same", "same", "same"), ("undecided", "open", "undecided"), ("noise", "open", "within the noise")],
)
def test_what_is_no_direction_has_no_shade_and_a_word(verdict: str, look: str, word: str) -> None:
    field = fields(replace(BIG, verdict=verdict))["flash"]
    assert (field.look, field.word, field.shade) == (look, word, 0)


def test_what_cannot_be_told_gives_its_reason() -> None:
    unknown = Finding(Kind.SWITCH, "flash", "prefill", detail=Beside(reason="no cell without it"))
    assert fields(unknown)["flash"].text == "no cell without it"


def test_a_run_without_effects_has_no_table() -> None:
    assert switch_table([Finding(Kind.UNTOLD)]) is None
