"""`flce`: head and cross-entropy in chunks of tokens, the logits of a batch never together."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen3bench import ModelConfig, build_model
from qwen3bench.errors import UserError
from qwen3bench.kernels.cross_entropy import cross_entropy_
from qwen3bench.model.loss import IGNORED
from qwen3bench.opt.flce import ChunkedCrossEntropy


def problem(dtype: torch.dtype, device: str = "cpu", vocabulary: int = 301) -> tuple[nn.Linear, Tensor, Tensor]:
    head = nn.Linear(24, vocabulary, bias=False, device=device, dtype=dtype)
    targets = torch.randint(vocabulary, (3, 37), device=device)
    targets[1, 20:] = IGNORED
    states = torch.randn(3, 37, 24, device=device, dtype=dtype, requires_grad=True)
    return head, states, targets


def plain(head: nn.Linear, states: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(states).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def taken(loss: Tensor, head: nn.Linear, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    of_states, of_head = torch.autograd.grad(0.7 * loss, (states, head.weight))
    return loss.detach(), of_states, of_head


@pytest.mark.parametrize("chunk", [1, 7, 37, 110, 111, 4096])
def test_value_and_gradients_are_those_of_the_whole(chunk: int) -> None:
    head, states, targets = problem(torch.float64)
    expected = taken(plain(head, states, targets), head, states)
    for found, right in zip(
        taken(ChunkedCrossEntropy(chunk)(head, states, targets), head, states), expected, strict=True
    ):
        torch.testing.assert_close(found, right, rtol=1e-11, atol=1e-14)


def test_chunks_of_bfloat16_add_up_in_float32() -> None:
    """With chunks of one token a sum in bfloat16 would lose most of it."""
    head, states, targets = problem(torch.bfloat16)
    double = nn.Linear(24, 301, bias=False, dtype=torch.float64)
    double.weight = nn.Parameter(head.weight.detach().double())
    wide = states.detach().double().requires_grad_(True)
    _, _, right = taken(plain(double, wide, targets), double, wide)
    errors = []
    for chunk in (1, 4096):
        _, _, found = taken(ChunkedCrossEntropy(chunk)(head, states, targets), head, states)
        errors.append(float((found.double() - right).norm() / right.norm()))
    assert errors[0] == pytest.approx(errors[1], rel=0.1)
    assert errors[0] < 6e-3


def test_a_tied_matrix_gets_both_gradients(tiny: ModelConfig, tiny_weights: dict[str, Tensor]) -> None:
    tokens = torch.randint(tiny.vocab_size, (2, 12))
    found = []
    for opts in (("tie",), {"tie": {}, "flce": {"chunk_tokens": 5}}):
        model = build_model(tiny, opts, {name: t.double() for name, t in tiny_weights.items()}).requires_grad_(True)
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        found.append(model.tok_emb.weight.grad)
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-14)


def test_no_more_than_a_chunk_of_logits_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    head, states, targets = problem(torch.float32)
    made: list[tuple[int, ...]] = []
    monkeypatch.setattr(
        "qwen3bench.opt.flce.cross_entropy_",
        lambda logits, *rest: made.append(tuple(logits.shape)) or cross_entropy_(logits, *rest),
    )
    ChunkedCrossEntropy(50)(head, states, targets)
    assert made == [(50, 301), (50, 301), (11, 301)]


def test_a_chunk_is_a_whole_number(tiny: ModelConfig) -> None:
    for chunk in (0, 2.5, True):
        with pytest.raises(UserError, match=r"flce\.chunk_tokens=.* must be a whole number from 1 on"):
            build_model(tiny, {"flce": {"chunk_tokens": chunk}}, device="meta")


@pytest.mark.cuda
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-6), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize("vocabulary", [301, 8192, 151936])
def test_the_kernel_on_cuda(dtype: torch.dtype, limit: float, vocabulary: int) -> None:
    logits = 3 * torch.randn(65, vocabulary, device="cuda", dtype=dtype)
    logits[5] -= 1e4  # far from 0
    targets = torch.randint(vocabulary, (65,), device="cuda")
    targets[::9] = IGNORED
    scale = torch.tensor(0.125, device="cuda")
    double = logits.double().requires_grad_(True)
    right = F.cross_entropy(double, targets, ignore_index=IGNORED, reduction="none")
    (wanted,) = torch.autograd.grad(0.125 * right.sum(), double)
    loss = cross_entropy_(logits, targets, scale, IGNORED)
    torch.testing.assert_close(loss.double(), right.detach(), rtol=1e-5, atol=1e-5)
    assert (logits.double() - wanted).norm() <= limit * wanted.norm()
    assert not logits[::9].any()


@pytest.mark.cuda
def test_chunks_on_cuda_add_up_in_float32() -> None:
    head, states, targets = problem(torch.bfloat16, "cuda", 1000)
    double = nn.Linear(24, 1000, bias=False, dtype=torch.float64, device="cuda")
    double.weight = nn.Parameter(head.weight.detach().double())
    wide = states.detach().double().requires_grad_(True)
    _, of_states, of_head = taken(plain(double, wide, targets), double, wide)
    for chunk in (1, 50, 4096):
        loss, here, found = taken(ChunkedCrossEntropy(chunk)(head, states, targets), head, states)
        assert loss.dtype is torch.float32
        assert (found.double() - of_head).norm() <= 6e-3 * of_head.norm()
        assert (here.double() - of_states).norm() <= 6e-3 * of_states.norm()
