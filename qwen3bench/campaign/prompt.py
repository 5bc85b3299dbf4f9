"""How long the prompt is on a CPU, where nobody says: as long as the time of a run allows."""

from __future__ import annotations

from dataclasses import replace

from qwen3bench.campaign.progress import duration
from qwen3bench.campaign.worker_process import WorkerHandle
from qwen3bench.config.settings import Settings
from qwen3bench.record.lines import PromptLine
from qwen3bench.record.messages import CellFailure, TimeForward
from qwen3bench.record.reader import Record

LENGTHS = (16, 32, 64, 128)  # tokens; more would not change which switch pays, and multiplies what the gate takes
FORWARDS = 11  # of a prompt, for each cell, in all passes of a run: gate and evidence 2, getting ready 1, eight blocks
BLOCKS = 8  # of these forwards, where a run has no more
RUN_S = 360.0  # that a full run of 32 cells takes, decoding too
ALLOWED_S = 150.0  # of these, for all forwards of the prompt

AGAIN_S = 5.0  # of a forward: it is timed again before a prompt is called too long, unless that takes as long


def is_open(settings: Settings) -> bool:
    """Whether the length of some prompt is left to the device."""
    return settings.prompt_tokens is None and any(sizes.prompt_tokens is None for sizes in settings.workloads.values())


def limit_s(settings: Settings) -> float:
    """How long one forward of a prompt may take."""
    return ALLOWED_S / (FORWARDS * (len(settings.labels) + 1))


def choose_prompt(settings: Settings, worker: WorkerHandle) -> PromptLine | None:
    """The longest prompt whose forward takes no longer than `limit_s`, and what was measured; None where nothing was.

    `settings` are resolved, and the worker has taken them.
    """
    limit, most = limit_s(settings), max(1, settings.model.context_length - settings.new_tokens)
    measured: dict[str, float] = {}
    chosen = 0
    for tokens in dict.fromkeys(min(length, most) for length in LENGTHS):
        try:
            seconds = _forward_s(worker, tokens, settings)
            if limit < seconds <= AGAIN_S:
                seconds = min(seconds, _forward_s(worker, tokens, settings))
        except CellFailure:  # the next step says why
            break
        measured[str(tokens)] = seconds
        if chosen and seconds > limit:
            break
        chosen = tokens
        if seconds > limit:  # the shortest, too
            break
    return PromptLine(prompt_tokens=chosen, limit_s=limit, forward_s=measured) if measured else None


def _forward_s(worker: WorkerHandle, tokens: int, settings: Settings) -> float:
    return worker.ask(TimeForward(prompt_tokens=tokens), settings.measure.step_timeout_s).seconds


def said(choice: PromptLine) -> str:
    """The choice and its reason, in a line."""
    tokens, forward_s = choice.prompt_tokens, choice.forward_s
    longest = max(forward_s, key=int)
    why = f"A forward of {longest} takes {forward_s[longest]:.2g} s"
    if int(longest) > tokens or forward_s[longest] > choice.limit_s:
        why += f", and {choice.limit_s:.2g} s are allowed for a run of about {duration(RUN_S)}"
    return f"the prompt has {tokens} tokens here. {why}. prompt_tokens=N sets another length"


def as_recorded(settings: Settings, done: Record) -> Settings:
    """The settings with the prompt of a run that goes on, where they leave it open."""
    recorded = done.run.setting("prompt_tokens")
    return replace(settings, prompt_tokens=recorded) if is_open(settings) and isinstance(recorded, int) else settings
