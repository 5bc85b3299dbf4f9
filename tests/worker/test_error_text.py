"""What is told of a long error: whose it is, and its cause."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qwen3bench.config.settings import Settings
from qwen3bench.record.messages import CellFailure
from qwen3bench.worker.error_text import both_ends, error_text
from qwen3bench.worker.serve import failure
from qwen3bench.worker.session import Session

COMPILER = f"""backend='inductor' raised:
CppCompileError: C++ compile error

Command:
g++ {"-I/a/long/path " * 100}

Output:
kernel.cpp:7: fatal: no space left on device

Set TORCHDYNAMO_VERBOSE=1 for the internal stack trace (please do this especially if you're reporting a bug).
For even more developer context, set TORCH_LOGS="+dynamo"
"""


def test_of_a_long_message_both_ends_are_kept() -> None:
    assert both_ends("short", 500) == "short"
    kept = both_ends("whose " + 1000 * "x" + " cause", 100)
    assert len(kept) == 100
    assert kept.startswith("whose ")
    assert kept.endswith(" cause")
    assert " … " in kept


def test_the_cause_that_a_compiler_names_last_is_the_reason() -> None:
    reason = failure(RuntimeError(COMPILER)).reason
    assert reason is not None
    assert reason.startswith("RuntimeError: backend='inductor' raised: CppCompileError")
    assert reason.endswith("Output: kernel.cpp:7: fatal: no space left on device")
    assert len(reason) <= 520
    assert error_text(RuntimeError("plain")) == "plain"


def test_the_whole_message_goes_to_the_log_of_the_worker(
    ask: Callable[..., Any],
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(session: Session, cell: str) -> None:
        raise RuntimeError(COMPILER)

    ask("open", config=settings.to_dict())
    monkeypatch.setattr(Session, "on_bank", fail)
    with pytest.raises(CellFailure, match="no space left on device"):
        ask("load", cells=["flash"])
    told = capsys.readouterr().err
    assert COMPILER.strip() in told
    assert "Traceback" in told


def test_the_gate_tells_the_cause_too(gradients: None) -> None:
    from qwen3bench.config.choices import options_of
    from qwen3bench.config.model_config import ModelConfig
    from qwen3bench.model.build import build_model
    from qwen3bench.worker.equivalence.candidate import Candidate, kv_cache
    from qwen3bench.worker.equivalence.gate import Gate

    gate = Gate(ModelConfig(**options_of("model", "tiny")), device="cpu", dtype=torch.float32)

    def factory(weights: dict[str, torch.Tensor], dtype: torch.dtype) -> Any:
        model = build_model(gate.config, (), weights)

        def forward(*given: Any) -> Any:
            raise RuntimeError(COMPILER)

        model.forward = forward
        return model

    reason = gate.judge(Candidate(factory, kv_cache)).reason
    assert reason is not None
    assert reason.endswith("no space left on device")
