"""On a CPU the prompt is as long as the time of a run allows; a run that goes on keeps it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from qwen3bench.campaign.forecast import seconds_ahead
from qwen3bench.campaign.launch import finished_status
from qwen3bench.campaign.prompt import choose_prompt, limit_s, said
from qwen3bench.config.cli import compose
from qwen3bench.record.lines import PromptLine
from qwen3bench.record.messages import CellFailure, ForwardTime, TimeForward
from qwen3bench.record.states import CellStatus

Measure = Callable[..., Any]


class Machine:
    """A worker whose forward takes so many seconds a token; it fails from `fails` tokens on.

    The first `disturbed` forwards take seven times as long.
    """

    def __init__(self, token_s: float, fails: int = 10**9, disturbed: int = 0) -> None:
        self.token_s = token_s
        self.disturbed = disturbed
        self.fails = fails
        self.asked: list[int] = []

    def ask(self, request: TimeForward, timeout_s: float) -> ForwardTime:
        self.asked.append(request.prompt_tokens)
        if request.prompt_tokens >= self.fails:
            raise CellFailure(CellStatus.OOM, "out of memory")
        slower = 7.0 if len(self.asked) <= self.disturbed else 1.0
        return ForwardTime(seconds=slower * self.token_s * request.prompt_tokens)


FULL = ("design=full", "device=cpu")


@pytest.mark.parametrize(
    ("token_s", "tokens", "asked"),
    [
        (1.0, 16, [16]),  # too slow for any, and to be timed again
        (0.1, 16, [16, 16]),
        (0.3 / 20, 16, [16, 32, 32]),
        (0.3 / 70, 64, [16, 32, 64, 128, 128]),
        (1e-5, 128, [16, 32, 64, 128]),
    ],
)
def test_the_prompt_is_the_longest_that_the_time_allows(token_s: float, tokens: int, asked: list[int]) -> None:
    settings = compose(FULL).resolved("cpu")
    assert limit_s(settings) == pytest.approx(0.413, abs=0.001)
    machine = Machine(token_s)
    choice = choose_prompt(settings, machine)  # type: ignore[arg-type]
    assert choice is not None
    assert choice.prompt_tokens == tokens
    assert machine.asked == asked
    assert said(choice).startswith(f"the prompt has {tokens} tokens here. A forward of ")
    assert all(len(sentence.split()) <= 25 for sentence in said(choice).split(". "))
    assert ("are allowed" in said(choice)) == (tokens < 128)


def test_a_disturbed_forward_sets_neither_the_prompt_nor_the_forecast() -> None:
    """The first forward of a busy moment: it took 2.8 s where 0.4 is usual."""
    settings = compose(FULL).resolved("cpu")
    calm, busy = (choose_prompt(settings, Machine(0.4 / 64, disturbed=n)) for n in (0, 1))  # type: ignore[arg-type]
    assert calm is not None
    assert busy is not None
    assert busy.prompt_tokens == calm.prompt_tokens == 64
    slow = replace(calm, forward_s={**calm.forward_s, "16": 0.35})  # not shown to be by its own, as within the limit
    ahead_s = [seconds_ahead(settings, 3.0, each) for each in (None, calm, slow)]
    assert ahead_s[1] - ahead_s[0] > 100
    assert ahead_s[2] - ahead_s[1] < 0.35 * (ahead_s[1] - ahead_s[0])


def test_few_cells_leave_time_for_a_longer_prompt() -> None:
    machine = Machine(0.3 / 20)
    assert choose_prompt(compose(["+opt=flash", "device=cpu"]).resolved("cpu"), machine).prompt_tokens == 128  # type: ignore[arg-type,union-attr]


def test_it_fits_the_context_and_a_failure_leaves_what_was_measured() -> None:
    settings = compose(FULL).resolved("cpu")
    short = replace(settings, model=replace(settings.model, context_length=52), new_tokens=32)
    machine = Machine(1e-5)
    assert choose_prompt(short, machine).prompt_tokens == 20  # type: ignore[arg-type,union-attr]
    assert machine.asked == [16, 20]
    assert choose_prompt(settings, Machine(1e-5, fails=64)).prompt_tokens == 32  # type: ignore[arg-type,union-attr]
    assert choose_prompt(settings, Machine(1e-5, fails=1)) is None  # type: ignore[arg-type]


QUICK = {"does": "answer", "op": "forward", "fields": {"seconds": 1e-4}}


def test_a_run_records_its_choice(measure: Measure) -> None:
    begun = measure(faults=[QUICK])
    (line,) = begun.record.of(PromptLine)
    assert line.prompt_tokens == 128
    assert line.forward_s == {"16": 1e-4, "32": 1e-4, "64": 1e-4, "128": 1e-4}
    assert begun.run.config["prompt_tokens"] == 128
    assert set(begun.run.cells["prompt_tokens"]) == {128}
    assert "the prompt has 128 tokens here" in begun.err


def test_a_run_that_goes_on_keeps_the_prompt(measure: Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the same command as by its directory alone, on a machine that has become slow."""
    from qwen3bench.campaign import launch, passes

    with monkeypatch.context() as patched:
        patched.setattr(passes.Campaign, "run", lambda _: (_ for _ in ()).throw(launch.Interrupted(2)))
        begun = measure(faults=[QUICK])
    assert begun.status == 130
    assert len(begun.record.of(PromptLine)) == 1
    done = measure()  # whose forward takes hours
    assert done.status == 0, done.err
    assert len(done.record.of(PromptLine)) == 1
    assert done.run.config["prompt_tokens"] == 128
    asked = replace(compose(["model=tiny", "workload=prefill", "device=cpu"]), dir=done.directory)
    settings = replace(asked, measure=done_measure(done))
    assert finished_status(settings) == 0


def done_measure(done: Any) -> Any:
    from qwen3bench.config.settings import settings_from

    return settings_from(done.run.config).measure


def test_whoever_names_the_length_gets_it(measure: Measure) -> None:
    done = measure("prompt_tokens=24", faults=[QUICK])
    assert not done.record.of(PromptLine)
    assert done.run.config["prompt_tokens"] == 24
