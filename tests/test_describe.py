"""`python -m qwen3bench.describe` prints the block of the document that the project starts from."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from qwen3bench.config.model_config import ModelConfig
from qwen3bench.describe import main
from qwen3bench.model.description import description

BLOCK = """\
==================================================
Qwen3Model(
  (tok_emb): Embedding(151936, 1024)
  (trf_blocks): ModuleList(
    (0-27): 28 x TransformerBlock(
      (att): GroupedQueryAttention(
        (W_query): Linear(in_features=1024, out_features=2048, bias=False)
        (W_key): Linear(in_features=1024, out_features=1024, bias=False)
        (W_value): Linear(in_features=1024, out_features=1024, bias=False)
        (out_proj): Linear(in_features=2048, out_features=1024, bias=False)
        (q_norm): RMSNorm()
        (k_norm): RMSNorm()
      )
      (ff): FeedForward(
        (fc1): Linear(in_features=1024, out_features=3072, bias=False)
        (fc2): Linear(in_features=1024, out_features=3072, bias=False)
        (fc3): Linear(in_features=3072, out_features=1024, bias=False)
      )
      (norm1): RMSNorm()
      (norm2): RMSNorm()
    )
  )
  (final_norm): RMSNorm()
  (out_head): Linear(in_features=1024, out_features=151936, bias=False)
)
==================================================
Total number of parameters: {parameters}

Total number of unique parameters: {unique}
==================================================
float32 (PyTorch default): {float32} GB
bfloat16: {bfloat16} GB
==================================================
"""
BASELINE = BLOCK.format(parameters="751,632,384", unique="596,049,920", float32="5.64", bfloat16="2.82")
# The document has 440,467,456 in the unique line: it subtracts the tied embedding a second time.
ALL_ON = BLOCK.format(parameters="596,049,920", unique="596,049,920", float32="4.48", bfloat16="2.24")


def test_baseline_is_the_documents_block(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out.startswith(BASELINE)


@pytest.mark.parametrize(
    "argument",
    ["+opt=flash,tie,mlp,mask,norm", "opt=[norm,mask,mlp,tie,flash]", "+opt=tie,tie,flash,mlp,mask,norm"],
)
def test_all_five_are_one_model(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([argument]) == 0
    out = capsys.readouterr().out
    assert out.startswith(ALL_ON)
    assert out.count("Qwen3Model(") == 1


def test_every_cell_prints_one_of_the_two_blocks(all_cells: list[tuple[str, ...]]) -> None:
    config = ModelConfig(num_layers=28, emb_dim=1024, num_heads=16, num_kv_heads=8, head_dim=128, hidden_dim=3072)
    for cell in all_cells:
        assert description(config, cell).startswith(ALL_ON if "tie" in cell else BASELINE), cell


def test_what_stands_underneath(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    assert capsys.readouterr().out.removeprefix(BASELINE) == (
        "Memory is (parameters + gradients + RoPE buffers) × element size; its GB are GiB (2^30 bytes).\n"
        "Weights alone: 2.80 GiB in float32, 1.40 GiB in bfloat16.\n"
        "Non-embedding parameters: 440,467,456\n"
        "Training holds weights, gradients and AdamW's two moments, 4 × the weights: "
        "11.20 GiB in amp or fp32, 5.60 GiB in bf16; activations besides.\n"
    )


def test_what_a_small_model_needs_is_told_in_units_that_show_it(capsys: pytest.CaptureFixture[str]) -> None:
    main(["model=tiny", "workload=train"])
    out = capsys.readouterr().out
    assert "Weights alone: 545.50 KiB in float32, 272.75 KiB in bfloat16.\n" in out
    assert "4 × the weights: 2.13 MiB in amp or fp32, 1.07 MiB in bf16;" in out


def test_weights_alone_count_a_tied_head_once(capsys: pytest.CaptureFixture[str]) -> None:
    main(["+opt=tie"])
    assert "Weights alone: 2.22 GiB in float32, 1.11 GiB in bfloat16." in capsys.readouterr().out


def allocated_bytes(action: Callable[[], object]) -> int:
    """The bytes that PyTorch's operations take on the CPU while `action` runs; what they free again counts too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        action()
    return sum(max(0, event.self_cpu_memory_usage) for event in profiled.events() or ())


@pytest.mark.parametrize("opts", ["", "flash,tie,mlp,mask,norm"])
def test_the_largest_allocates_nothing(opts: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert allocated_bytes(lambda: torch.zeros(1024)) >= 4096
    assert allocated_bytes(lambda: main(["model=32b", f"opt=[{opts}]"])) < 1024
    assert "Total number of unique parameters: 31,984,210,944\n" in capsys.readouterr().out


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "qwen3",
                "vocab_size": 999,
                "num_hidden_layers": 3,
                "hidden_size": 24,
                "num_attention_heads": 4,
                "num_key_value_heads": 1,
                "head_dim": 10,
                "intermediate_size": 56,
                "max_position_embeddings": 64,
                "rms_norm_eps": 1e-6,
                "rope_theta": 1e6,
            }
        )
    )
    return tmp_path


def test_a_hub_id_gives_the_shape(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(checkpoint))
    assert main(["weights=Qwen/Qwen3-Tiny"]) == 0
    assert "(tok_emb): Embedding(999, 24)" in capsys.readouterr().out
    assert main(["weights=Qwen/Qwen3-Tiny", "model=8b"]) == 1
    assert "leave model=qwen3-8b out" in capsys.readouterr().err


def test_a_hub_that_cannot_be_asked_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert main(["weights=Qwen/Qwen3-0.6B"]) == 1
    told = capsys.readouterr().err
    assert "the hub did not give it" in told
    assert told.count("\n") == 1


def test_a_checkpoints_directory_gives_the_shape(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"weights={checkpoint}"]) == 0
    out = capsys.readouterr().out
    assert "(tok_emb): Embedding(999, 24)" in out
    assert "(W_key): Linear(in_features=24, out_features=10, bias=False)" in out
    assert main([f"weights={checkpoint}", "model.num_layers=3"]) == 0
    assert capsys.readouterr().out == out
    for override, said in (("model=8b", "num_layers is 3, not 36"), ("model.head_dim=12", "head_dim is 10, not 12")):
        assert main([f"weights={checkpoint}", override]) == 1
        captured = capsys.readouterr()
        assert said in captured.err
        assert f"leave {override.replace('8b', 'qwen3-8b')} out" in captured.err
        assert captured.out == ""


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "usage: python -m qwen3bench.describe" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("+opt=flsh", "did you mean flash?"),
        ("model=9b", "qwen3-8b"),
        ("weights=/no/such/directory", "no such directory"),
        ("model.num_heads=7", "no multiple of num_kv_heads"),
        ("--multirun", "not an option here"),
        ("opt.flash.backend=quick", "add opt=flash"),
    ],
)
def test_mistakes_are_told_in_two_lines(argument: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([argument]) == 1
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""
    assert captured.err.count("\n") <= 2
    assert "Traceback" not in captured.err


@pytest.mark.slow
def test_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qwen3bench.describe", "model=tiny", "+opt=tie"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stderr == ""
    assert "(out_head): Linear(in_features=64, out_features=512, bias=False)" in done.stdout


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    shell = f"{sys.executable} -m qwen3bench.describe model=tiny | head -n 1"
    ended = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=120)
    assert ended.stdout.count("\n") == 1
    assert ended.stderr == ""
