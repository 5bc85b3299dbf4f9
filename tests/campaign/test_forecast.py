"""What a run is said to measure before it does."""

from __future__ import annotations

from qwen3bench.campaign.forecast import about_design
from qwen3bench.config.cli import compose

SEVEN = "opt=flash,tie,mlp,mask,norm,qkv,gemv"


def test_a_screen_says_how_many_cells_how_good_and_how_long() -> None:
    text = "\n".join(about_design(compose(["design=screen", SEVEN])))
    assert "64 cells of 128" in text
    assert "7 main effects" in text
    assert "21 pairs" in text
    assert "2^(7-1) G=ABCDEF; the baseline and all on among the cells" in text
    assert "D-efficiency 0.994; variance of a main effect up to 1.03 times" in text
    assert "6 minutes on an H100" in text
    assert "told only together" not in text


def test_a_smaller_fraction_says_what_is_told_only_together() -> None:
    text = "\n".join(about_design(compose(["design=screen", SEVEN, "design.resolution=4"])))
    assert "16 cells of 128" in text
    assert "told only together: flash:tie = mlp:norm = mask:qkv; " in text
    assert "D-efficiency" not in text


def test_a_minute_is_one() -> None:
    text = about_design(compose(["model=tiny"]))[-1]
    assert text.endswith("in one runtime: 1 minute on an H100, 1 minute on two CPU cores")


def test_nothing_is_foretold_of_training() -> None:
    said = about_design(compose(["design=full", "workload=train"]))[-1]
    assert said.startswith("expected time: not known of training")
