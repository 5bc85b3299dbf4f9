"""Cards that people have: which arithmetic they do, told by their compute capability."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from qwen3bench.config.cli import compose
from qwen3bench.errors import Refused
from qwen3bench.kernels import matvec
from qwen3bench.worker.device import emulates_bfloat16

CARDS = {"V100": (7, 0), "T4": (7, 5), "A100": (8, 0), "RTX 4060": (8, 9), "H100": (9, 0), "RTX 5090": (12, 0)}
OLD = ("V100", "T4")


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """PyTorch tells of a card of this name, the second of two."""

    def make(card: str) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: CARDS[card])

    return make


@pytest.mark.parametrize("card", CARDS)
def test_a_dtype_is_one_that_the_card_computes_in(
    card: str, pretend: Callable[[str], None], ask: Callable[..., object]
) -> None:
    pretend(card)
    assert emulates_bfloat16("cuda:1") is (card in OLD)
    found = ask("probe", device="auto")
    assert (found.device, found.emulates_bfloat16) == ("cuda", card in OLD)  # type: ignore[attr-defined]
    settings = compose(["workload=prefill,train"]).resolved("cuda", emulates_bfloat16=card in OLD)
    assert settings.dtype == ("float16" if card in OLD else "bfloat16")
    assert settings.workloads["train"].precision == ("fp32" if card in OLD else "amp")


@pytest.mark.parametrize(
    "asked",
    [["dtype=bfloat16"], ["workload=train", "workload.train.precision=amp"], ["workload=train", "dtype=float32"]],
)
def test_bfloat16_is_refused_where_it_is_emulated(asked: list[str]) -> None:
    settings = compose(asked)
    if "dtype=float32" in asked:
        assert settings.resolved("cuda", emulates_bfloat16=True).dtype == "float32"
        return
    with pytest.raises(Refused, match="no arithmetic for bfloat16; use dtype=float16, and in training precision=fp32"):
        settings.resolved("cuda", emulates_bfloat16=True)


def test_a_cpu_emulates_nothing_that_matters() -> None:
    assert not emulates_bfloat16("cpu")


@pytest.mark.parametrize("card", CARDS)
def test_kernels_are_launched_early_where_the_card_can(card: str, pretend: Callable[[str], None]) -> None:
    pretend(card)
    assert matvec.dependent_launch_on(torch.device("cuda", 0)) is (card in ("H100", "RTX 5090"))
