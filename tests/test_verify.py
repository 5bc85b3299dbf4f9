"""`python -m qwen3bench.verify`: a line for each cell, exit status 0, 3 or 1."""

from __future__ import annotations

import re

import pytest

from qwen3bench import verify
from qwen3bench.bench import equivalence
from qwen3bench.opt import norm

TINY = ["model=tiny", "device=cpu"]


def test_all_cells_of_the_five_are_judged(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main(TINY) == 0
    out, err = capsys.readouterr()
    assert len(re.findall(r"^\S+ +ok ", out, re.MULTILINE)) == 32
    assert "32 of 32 cells compute the baseline's function" in out
    assert err == ""  # progress is for terminals


def test_a_named_cell_is_judged_beside_the_baseline(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main([*TINY, "+opt=mask,flash"]) == 0
    assert re.findall(r"^(\S+) +ok ", capsys.readouterr().out, re.MULTILINE) == ["baseline", "flash+mask"]


def test_a_design_over_named_optimizations(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main([*TINY, "design=each", "+opt=norm,mlp"]) == 0
    assert re.findall(r"^(\S+) +ok ", capsys.readouterr().out, re.MULTILINE) == ["baseline", "mlp", "norm"]


def test_a_cell_that_does_not_run_gives_3_and_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main([*TINY, "+opt=flash", "flash.backend=cudnn"]) == 3
    out = capsys.readouterr().out
    assert re.search(r"^flash +FAILS", out, re.MULTILINE)
    assert "float32: it does not run: " in out
    assert "1 of 2 cells" in out


def test_a_cell_that_differs_gives_3_and_its_reason(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = norm.rms_norm
    monkeypatch.setattr(norm, "rms_norm", lambda x, weight, eps: right(x, weight, eps) * 1.01)
    assert verify.main([*TINY, "+opt=norm"]) == 3
    out = capsys.readouterr().out
    assert re.search(r"^norm +DIFFERS", out, re.MULTILINE)
    assert "float32: " in out
    assert "does not run" not in out


def test_a_cell_for_which_memory_does_not_suffice_does_not_end_the_others(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    check = equivalence.Gate.check

    def short_of_memory(gate: equivalence.Gate, cell: tuple[str, ...]):
        if cell == ("mlp",):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return check(gate, cell)

    monkeypatch.setattr(equivalence.Gate, "check", short_of_memory)
    assert verify.main([*TINY, "design=each", "+opt=mlp,norm"]) == 3
    out = capsys.readouterr().out
    assert "out of memory" in out
    assert "2 of 3 cells" in out


@pytest.mark.parametrize("arguments", [["model=tinny"], ["+opt=flahs"], ["device=cuda:7x"], ["--nonsense"]])
def test_mistakes_are_told_in_a_line_or_two(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main(arguments) == 1
    err = capsys.readouterr().err
    assert 1 <= len(err.strip().splitlines()) <= 2
    assert "Traceback" not in err


def test_a_gpu_that_is_not_there(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert verify.main(["model=tiny", "device=cuda"]) == 1
    assert "use device=cpu" in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main(["--help"]) == 0
    assert "python -m qwen3bench.verify" in capsys.readouterr().out
