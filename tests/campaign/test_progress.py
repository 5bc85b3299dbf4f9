"""What a run says where its output is no terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from qwen3bench.campaign import progress
from qwen3bench.campaign.progress import Reporter


@pytest.mark.parametrize(("elapsed_s", "said"), [(4.0, ["judging"]), (40.0, ["judging", "  took 40 s"])])
def test_a_long_stage_says_how_long_it_took(monkeypatch: pytest.MonkeyPatch, elapsed_s: float, said: list[str]) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    with Reporter(Console(file=out)).stage("judging", 3):
        now[0] = elapsed_s
    assert out.getvalue().splitlines() == said
