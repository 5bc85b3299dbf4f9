import pandas as pd
import pytest

from qwen3bench.analysis.run import Run
from qwen3bench.record.lines import EvidenceLine
from qwen3bench.reporting.conditions import conditions
from qwen3bench.reporting.tables import (
    Entry,
    Table,
    drop_empty,
    effects_table,
    equivalence_table,
    evidence_table,
    mapping_table,
    ranking_table,
    signed_bytes,
)


def column(table: Table, heading: str) -> list[str]:
    return [row[table.headings.index(heading)].text for row in table.rows]


@pytest.fixture
def cells(full_run: Run) -> pd.DataFrame:
    return conditions(full_run)[0].select(full_run.cells)


def test_cells_come_fastest_first_with_one_unit_per_column(cells: pd.DataFrame) -> None:
    table = ranking_table(cells)
    latency = [float(text) for text in column(table, "latency (ms)")]
    assert latency == sorted(latency)
    assert set(column(table, "cell")[-4:]) == {"baseline", "tie", "mask", "tie+mask"}  # none of which gains anything
    assert "1.110" in column(table, "parameters (GiB)")


def test_what_never_varies_is_said_once(cells: pd.DataFrame) -> None:
    table = ranking_table(cells)
    assert ("samples", "18") in table.constants
    assert ("status", "ok") in table.constants
    assert "samples" not in table.headings


def test_a_single_cell_keeps_its_columns(cells: pd.DataFrame) -> None:
    table = ranking_table(cells[cells["cell"] == "baseline"])
    assert column(table, "status") == ["ok"]
    assert not table.constants


def test_a_table_that_is_cut_keeps_the_rows_that_are_asked_for(cells: pd.DataFrame) -> None:
    table = ranking_table(cells)
    names = column(table, "cell")
    shown = [row[0].text for row in table.cut(5, ["baseline", names[0]])]
    assert shown == [*names[:5], "baseline"]
    assert table.cut(len(names), ["baseline"]) == table.rows


def test_missing_values_are_empty_and_sort_last(cells: pd.DataFrame) -> None:
    lost = cells.copy()
    lost.loc[lost["cell"] == "flash", ["latency_s", "speedup", "status"]] = [None, None, "oom"]
    table = ranking_table(lost)
    assert column(table, "cell")[-1] == "flash"
    row = table.rows[-1]
    assert [row[table.headings.index(name)] for name in ("latency (ms)", "× as fast as the baseline")] == [
        Entry("")
    ] * 2
    assert column(table, "status")[-1] == "oom"


def test_a_column_without_any_value_is_left_out(cells: pd.DataFrame) -> None:
    table = ranking_table(cells.assign(peak_allocated_bytes=pd.NA))
    assert not [name for name in (*table.headings, *dict(table.constants)) if name.startswith("peak allocated")]


def test_ttft_of_prefill_does_not_repeat_the_latency(cells: pd.DataFrame) -> None:
    assert not [name for name in ranking_table(cells).headings if "TTFT" in name]


def test_high_interactions_without_a_direction_are_counted_not_listed(full_run: Run) -> None:
    effects = conditions(full_run)[0].select(full_run.effects)
    table = effects_table(effects[effects["metric"] == "latency_s"])
    assert {"flash:mask", "tie:norm"} <= set(column(table, "term"))
    assert not [term for term in column(table, "term") if term.count(":") >= 2]
    assert table.note == "Left out here: interactions of three and more switches, 16 same."


def test_what_the_cells_do_not_tell_is_counted_not_listed(full_run: Run) -> None:
    effects = conditions(full_run)[0].select(full_run.effects)
    unknown = effects["kind"] != "main"
    effects = effects.assign(estimate=effects["estimate"].mask(unknown), verdict=effects["verdict"].mask(unknown, ""))
    table = effects_table(effects[effects["metric"] == "latency_s"])
    assert column(table, "term") == ["flash", "tie", "mlp", "mask", "norm"]
    assert table.note == (
        "Left out here: 26 interactions that the cells do not tell; 5 Shapley shares that the cells do not tell."
    )


def test_a_p_value_that_is_tiny_has_a_bound_and_still_sorts(full_run: Run) -> None:
    effects = conditions(full_run)[0].select(full_run.effects).head(2)
    table = effects_table(effects.assign(p_holm=[1e-114, 0.04]))
    assert column(table, "p (Holm)") == ["< 1e-16", "0.04"]
    assert [row[table.headings.index("p (Holm)")].key for row in table.rows] == [1e-114, 0.04]


def test_the_reason_of_an_empty_effect_is_shown(full_run: Run) -> None:
    effects = conditions(full_run)[0].select(full_run.effects).head(1)
    table = effects_table(effects.assign(estimate=float("nan"), verdict="", reason="cell flash is missing"))
    assert column(table, "reason") == ["cell flash is missing"]
    assert "effect" not in table.headings


def test_evidence_shows_what_differs(full_run: Run) -> None:
    table = evidence_table(full_run.record.of(EvidenceLine))
    assert set(column(table, "attention")) == {"none", "cudnn", "flash_attention"}
    assert ("recompiles", "0") in table.constants


def test_a_mean_of_ones_reads_as_one(cells: pd.DataFrame) -> None:
    table = equivalence_table(cells.assign(top1_agreement=[1 - 1e-16, 1.0] * (len(cells) // 2), kl_mean=1e-13))
    assert ("top-1 agreement", "1") in table.constants
    assert ("KL", "1e-13") in table.constants


def test_changes_of_memory_carry_their_sign() -> None:
    assert [signed_bytes(value) for value in (-311_164_928, 2**20, 0)] == ["−296.8 MiB", "+1.000 MiB", "0 B"]


def test_a_mapping_is_flattened_and_its_empty_values_dropped() -> None:
    table = mapping_table({"a": {"b": 1, "c": None}, "d": [1, 2], "e": True})
    assert [[entry.text for entry in row] for row in table.rows] == [
        ["a.b", "1"],
        ["d", "1, 2"],
        ["e", "yes"],
    ]


def test_drop_empty_keeps_rows_aligned() -> None:
    table = drop_empty(
        Table(["a", "b", "c"], [[Entry("1"), Entry(""), Entry("2")], [Entry(""), Entry(""), Entry("3")]])
    )
    assert table.headings == ["a", "c"]
    assert [[entry.text for entry in row] for row in table.rows] == [["1", "2"], ["", "3"]]


def test_a_cell_that_failed_has_no_rank(full_run: Run) -> None:
    cells = conditions(full_run)[0].select(full_run.cells).astype({"status": object})
    fastest = cells["latency_s"].idxmin()
    cells.loc[fastest, "status"] = "not_equivalent"
    order = [row[0].text for row in ranking_table(cells).rows]
    assert order[-1] == cells.loc[fastest, "cell"]
    assert order[:-1] == list(cells.drop(fastest).sort_values("latency_s")["cell"])
