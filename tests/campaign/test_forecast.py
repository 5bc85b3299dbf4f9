"""What a run is said to measure before it does."""

from __future__ import annotations

import re
from dataclasses import replace

from qwen3bench.campaign.forecast import Shortfall, about_design, what_it_takes
from qwen3bench.config.cli import compose

SEVEN = "opt=flash,tie,mlp,mask,norm,qkv,gemv"


def test_a_screen_says_how_many_cells_how_good_and_how_long() -> None:
    text = "\n".join(about_design(compose(["design=screen", SEVEN])))
    assert "64 cells of 128" in text
    assert "7 main effects" in text
    assert "21 pairs" in text
    assert "2^(7-1) G=ABCDEF; the baseline and all on among the cells" in text
    assert "D-efficiency 0.994; variance of a main effect up to 1.03 times" in text
    assert "3 minutes on an H100" in text
    assert "told only together" not in text


def test_a_smaller_fraction_says_what_is_told_only_together() -> None:
    text = "\n".join(about_design(compose(["design=screen", SEVEN, "design.resolution=4"])))
    assert "16 cells of 128" in text
    assert "told only together: flash:tie = mlp:norm = mask:qkv; " in text
    assert "D-efficiency" not in text


def test_a_minute_is_one() -> None:
    text = about_design(compose(["model=tiny", "device=cpu"]))[-1]
    assert text == "expected time: 1 minute on two CPU cores (Qwen3-0.6B in one runtime)"


SEEN = Shortfall("mask", over=4.8, target=0.0025, more=163, measured_s=3.5, setup_s=5.3, spent_s=25.0, left_s=35.0)
WHERE = ("decode", "graph")


def test_what_an_answer_takes_says_how_much_of_it_is_measuring() -> None:
    """The time allowed counts that alone, so that 24 minutes and 750 s go together."""
    assert what_it_takes(WHERE, SEEN) == (
        "decode graph: mask is known to ±1.2 %, and ±0.25 % takes about 163 more processes (24 min, of which 10 min "
        "are measuring). The time allowed for measuring ends before; measure.max_seconds=750 would do"
    )
    assert what_it_takes(WHERE, replace(SEEN, left_s=600.0)).endswith("about 163 more processes (24 min)")


def test_what_takes_hours_is_said_to_be_out_of_reach_and_how_near_ten_minutes_come() -> None:
    said = what_it_takes(WHERE, replace(SEEN, over=40.0, more=11_000))
    assert said == (
        "decode graph: mask is known to ±10 %, and ±0.25 % takes about 27 hours: more than this machine can tell in "
        "reasonable time. Ten minutes tell it to about ±3.2 %"
    )
    allowed = replace(SEEN, over=40.0, more=11_000, left_s=40_000.0)
    assert "11,000 more processes" in what_it_takes(WHERE, allowed)  # somebody asked for that time
    long = replace(SEEN, over=40.0, more=11_000, measured_s=700.0, spent_s=700.0)
    assert what_it_takes(WHERE, long).endswith("in reasonable time")


def test_nothing_is_foretold_of_training_on_a_cpu() -> None:
    train = ["opt=flash", "workload=train"]
    assert re.fullmatch(
        r"expected time: not known on a CPU before .*", about_design(compose([*train, "device=cpu"]))[-1]
    )
    said = about_design(compose(train))[-1]
    assert re.fullmatch(r"expected time: \d minutes? on an H100 or H200, not known on a CPU before .*", said)


def test_a_graph_is_foretold_of_a_card_alone() -> None:
    said = about_design(compose(["runtime=graph"]))[-1]
    assert re.fullmatch(r"expected time: \d minutes? on an H100 or H200", said)
    assert "expected time" not in about_design(compose(["runtime=graph", "device=cpu"]))[-1]  # which is refused


def test_compiled_peers_and_longer_prompts_take_their_time_on_a_card() -> None:
    def minutes(*overrides: str) -> int:
        said = about_design(compose(["device=cuda", "workload=prefill", "opt=flash", *overrides]))[-1]
        return int(said.removeprefix("expected time: ").split()[0])

    assert minutes() < minutes("runtime=compile") < minutes("runtime=compile", "peer=transformers")
    assert minutes() < minutes("prompt_tokens=32768")
