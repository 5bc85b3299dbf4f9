"""`python -m qwen3bench.verify`: a line for each cell, exit status 0, 3 or 1."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qwen3bench import ModelConfig, verify
from qwen3bench.config.choices import options_of
from qwen3bench.errors import UserError
from qwen3bench.model.weights import load_weights
from qwen3bench.opt import norm
from qwen3bench.worker.equivalence import gate as equivalence

TINY = ["model=tiny", "device=cpu"]
HF_NAMES = {
    "num_layers": "num_hidden_layers",
    "emb_dim": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "hidden_dim": "intermediate_size",
    "context_length": "max_position_embeddings",
    "rope_base": "rope_theta",
}


@pytest.mark.slow
def test_all_cells_of_the_five_are_judged(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main(TINY) == 0
    out, err = capsys.readouterr()
    assert len(re.findall(r"^\S+ +ok ", out, re.MULTILINE)) == 32
    assert "32 of 32 cells compute the baseline's function" in out
    assert err == ""  # progress is for terminals


def test_a_named_cell_is_judged_beside_the_baseline(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main([*TINY, "+opt=mask,flash"]) == 0
    out = capsys.readouterr().out
    assert re.findall(r"^(\S+) +ok ", out, re.MULTILINE) == ["baseline", "flash+mask"]
    assert "2 of 2 cells compute the baseline's function (" in out


@pytest.mark.slow
def test_what_is_trained_is_judged_by_its_gradients_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main([*TINY, "workload=train", "+opt=flash"]) == 0
    assert "2 of 2 cells compute the baseline's function and train as it does" in capsys.readouterr().out


def test_it_judges_with_the_threads_that_are_asked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_to: list[int] = []
    monkeypatch.setattr("qwen3bench.worker.session.usable_cpus", lambda: (0, 1, 2))
    monkeypatch.setattr("qwen3bench.worker.session.torch.set_num_threads", set_to.append)
    assert verify.main([*TINY, "+opt=tie", "threads=3"]) == 0
    assert set_to[0] == 3
    assert verify.main([*TINY, "+opt=tie", "threads=4"]) == 1
    assert "threads=4: 3 CPUs may be used here" in capsys.readouterr().err


@pytest.mark.slow
def test_a_narrow_terminal_breaks_no_number(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = []
    for columns in ("200", "40"):
        monkeypatch.setenv("COLUMNS", columns)
        assert verify.main([*TINY, "+opt=tie"]) == 0
        lines = capsys.readouterr().out.splitlines()
        table.append([line for line in lines if re.match(r"(baseline|tie) +ok ", line)])
    wide, narrow = table
    assert max(map(len, wide)) > 40
    assert max(map(len, narrow)) <= 40
    assert all(long.split()[: len(short.split())] == short.split() for long, short in zip(wide, narrow, strict=True))
    assert "in a wider window" in "\n".join(lines)


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_many_short_prompts_are_judged(tokens: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main([*TINY, "+opt=tie", "batch_size=4", f"prompt_tokens={tokens}"]) == 0
    assert "2 of 2 cells" in capsys.readouterr().out


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

    judge = equivalence.Gate.judge_cell

    def short_of_memory(gate: equivalence.Gate, cell: tuple[str, ...]):
        if cell == ("mlp",):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return judge(gate, cell)

    monkeypatch.setattr(equivalence.Gate, "judge_cell", short_of_memory)
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


def test_weights_that_a_run_would_refuse_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main([*TINY, "+opt=flash", f"weights={tmp_path / 'none'}"]) == 1
    capsys.readouterr()
    tiny = options_of("model", "tiny")
    weights = {name: tensor.clone() for name, tensor in load_weights("random", ModelConfig(**tiny)).items()}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    save_file(weights, tmp_path / "model.safetensors")
    theirs = {HF_NAMES.get(name, name): value for name, value in tiny.items()}
    told = {**theirs, "tie_word_embeddings": False, "model_type": "qwen3"}
    (tmp_path / "config.json").write_text(json.dumps(told))
    assert verify.main(["+opt=flash,tie", f"weights={tmp_path}"]) == 1
    assert "tie: this checkpoint's head differs" in capsys.readouterr().err
    assert verify.main(["+opt=flash", f"weights={tmp_path}"]) == 0


def test_a_gpu_that_is_not_there(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert verify.main(["model=tiny", "device=cuda"]) == 1
    assert "use device=cpu" in capsys.readouterr().err


@pytest.mark.parametrize(("named", "index"), [("auto", 0), ("cuda", 0), ("cuda:1", 1)])
def test_the_card_that_is_named_is_made_pytorchs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, named: str, index: int
) -> None:
    def chosen(device: torch.device) -> None:
        raise UserError(f"card {device.index} is chosen")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "set_device", chosen)
    assert verify.main(["model=tiny", f"device={named}"]) == 1
    assert f"card {index} is chosen" in capsys.readouterr().err


def test_a_card_that_is_not_there(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert verify.main(["model=tiny", "device=cuda:2"]) == 1
    assert "device=cuda:2: PyTorch sees 2 CUDA devices;" in capsys.readouterr().err


@pytest.mark.cuda
def test_cells_are_judged_on_a_card(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main(["+opt=flash,tie", "model=tiny"]) == 0
    assert "tiny on cuda" in capsys.readouterr().out


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert "python -m qwen3bench.verify" in said
    assert not any(line.startswith(" ") for line in said.splitlines())
