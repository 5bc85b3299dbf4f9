"""A run's campaign put together: its first workers, the settings on this device, the record's first line."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from qwen3bench.campaign import continuation
from qwen3bench.campaign.capacity import usable_cores
from qwen3bench.campaign.card_costs import CardPace, reached_by
from qwen3bench.campaign.cluster import cluster_cards, refuse_unlike_workers
from qwen3bench.campaign.context import RunContext
from qwen3bench.campaign.lanes import Lane, Lanes
from qwen3bench.campaign.looks import most_at_once, processes
from qwen3bench.campaign.machine import Machine, UsedCard, of_cluster
from qwen3bench.campaign.neighbors import Neighbors
from qwen3bench.campaign.passes import Campaign
from qwen3bench.campaign.progress import Reporter
from qwen3bench.campaign.prompt import as_recorded, choose_prompt, is_open, said
from qwen3bench.campaign.state import RunState
from qwen3bench.campaign.threads import FewerThreads, fewer_threads, recorded_threads, threads_line, with_fewer
from qwen3bench.campaign.worker_pool import ProcessNumbers, Seat, WorkerPool
from qwen3bench.campaign.worker_process import WorkerHandle
from qwen3bench.config.choices import OWN_FOLDER
from qwen3bench.config.settings import Settings
from qwen3bench.errors import UserError
from qwen3bench.record.files import clean_stale
from qwen3bench.record.lines import PromptLine, SessionLine
from qwen3bench.record.messages import Identity
from qwen3bench.record.reader import Record, read_record
from qwen3bench.record.writer import RecordWriter


@dataclass(frozen=True)
class _Begin:
    """What a run begins with: the settings on the device that is there, and what the first worker tells.

    `fewer`: why it measures with fewer threads than PyTorch takes, where it does. `choice`: how the prompt was chosen.
    """

    settings: Settings
    identity: Identity
    fewer: FewerThreads | None = None
    choice: PromptLine | None = None


def assembled(
    settings: Settings, writer: RecordWriter, reporter: Reporter, ends: ExitStack, machine: Machine
) -> Campaign:
    """The campaign of a run: a new record's first line written, or an old record checked and taken up.

    Its workers end with `ends`. Raises `UserError` where the run cannot begin, or cannot be continued.
    """
    directory = writer.directory
    clean_stale(directory)
    done = None if writer.empty else read_record(directory)
    if done is not None:
        settings = _taken_up(done, settings, directory, reporter)
    elif settings.resume:
        raise UserError(f"resume={directory}: nothing is recorded there yet; begin again with run.dir={directory}")
    cards = machine.used(settings)
    if settings.cluster and not machine.cards:
        with reporter.stage("starting or joining Ray", 1):
            cards = of_cluster(ends.enter_context(cluster_cards(settings)))

    def start(card: UsedCard) -> WorkerHandle:
        return ends.enter_context(card.start(directory / "worker.log"))

    neighbors = Neighbors()
    with reporter.stage("starting a worker", 1):
        worker = start(cards[0])
        beside = [(place, start(cards[place])) for place in (_looking(settings, cards) if done is None else ())]
        settled, identity = continuation.identified(settings, worker, directory)
        if not settled.device.startswith("cuda"):  # PyTorch cannot use the cards that are there
            while beside:
                beside.pop()[1].end()
    ready = [[worker], *([] for _ in cards[1:])]
    for place, each in beside:
        ready[place].append(each)
    begin = _suited(settings, _Begin(settled, identity), worker, reporter, neighbors, done, directory)
    settings, identity = begin.settings, begin.identity
    if len(cards) > 1:
        if settings.cluster:
            with reporter.stage("starting a worker beside each card", 1):
                ready = [mine or [start(card)] for card, mine in zip(cards, ready, strict=True)]
                hosts = {mine[0]: card.host or "" for card, mine in zip(cards, ready, strict=True)}
                refuse_unlike_workers(settings, identity, hosts)
        identity = replace(identity, environment=_with_all(cards, identity.environment, settings))
    if done is None:
        continuation.begin(settings, writer, identity, begin.choice)
    else:
        continuation.refuse_changed(done, settings, identity, directory)
    command = ("python", "-m", "qwen3bench", *sys.argv[1:])
    writer.append(SessionLine(command=command, time=time.time(), started=psutil.Process().create_time()))
    state, found = RunState(settings, done), identity.environment
    state.prompt = begin.choice or state.prompt
    lanes, numbers = Lanes(()), ProcessNumbers(state.process)
    for card, mine in zip(cards, ready, strict=True):
        seat = Seat(card.start, card.host or found.get("host"), card.uuid or found.get("card"))
        pool = ends.enter_context(WorkerPool(settings, writer, seat, mine, numbers))
        context = RunContext(settings, writer, reporter, state, pool, cards=lanes.__len__)
        lanes.add(Lane(context, card.monitor, card.title, card.socket))
    card_bytes = None if found.get("mig") else found.get("device_memory_bytes")  # of a part nothing is known
    pace = CardPace(reached_by(found.get("device") or ""))
    told = begin.fewer is not None and begin.fewer.quota is None  # what else works here
    return Campaign(lanes, card_bytes, pace, None if told else neighbors)


def _taken_up(done: Record, settings: Settings, directory: Path, reporter: Reporter) -> Settings:
    """The settings that a record is continued with. Raises `UserError` where it cannot be."""
    continuation.refuse_finished(done, directory)
    for warning in done.warnings:
        reporter.note(f"warning: {warning}")
    typed = [argument for argument in sys.argv[1:] if not argument.startswith(OWN_FOLDER)]
    if len(typed) == 1 and typed[0].startswith("resume="):  # the command says nothing but which run
        settings = continuation.recorded_settings(done, directory)
    return recorded_threads(as_recorded(settings, done), done)


def _looking(settings: Settings, cards: Sequence[UsedCard]) -> Iterator[int]:
    """The cards' places of the workers that look at cells beside the first one, where the run is on GPUs here.

    They start with it, as each takes seconds to import PyTorch. What device the run is on the first one tells later.
    """
    if settings.cluster or settings.device == "cpu" or cards[0].monitor.handle is None:
        return
    for place in range(1, processes(len(settings.labels), most_at_once(usable_cores(), len(cards)))):
        yield place % len(cards)


def _suited(
    settings: Settings,
    begin: _Begin,
    worker: WorkerHandle,
    reporter: Reporter,
    neighbors: Neighbors,
    done: Record | None,
    directory: Path,
) -> _Begin:
    """On a CPU, fewer threads where others work beside the run, and a prompt that its forwards have time for.

    `settings` are those that are asked for, of which `begin` tells what they are here.
    """
    fewer = choice = None
    if _may_spare_cores(begin.settings, done):
        with reporter.stage("looking for what else works on this machine", 1):
            fewer = fewer_threads(neighbors, begin.identity.environment.get("torch_threads") or 1)
        if fewer is not None:
            reporter.note(threads_line(fewer))
            settings = with_fewer(settings, fewer)
            begin = _Begin(*continuation.identified(settings, worker, directory), fewer)
    if is_open(settings) and begin.settings.device == "cpu":
        with reporter.stage("choosing the prompt's length by what a forward takes", 1):
            choice = choose_prompt(begin.settings, worker)
        if choice is not None:
            reporter.note(said(choice))
            settings = replace(settings, prompt_tokens=choice.prompt_tokens)
            begin = _Begin(*continuation.identified(settings, worker, directory), fewer, choice)
    return begin


def _may_spare_cores(settings: Settings, done: Record | None) -> bool:
    """Whether a run may leave cores to others: it begins, on the CPU of this machine, and nobody says how many."""
    return done is None and settings.device == "cpu" and settings.cluster is None and settings.threads == "auto"


def _with_all(cards: Sequence[UsedCard], environment: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """The environment with all cards, and of a cluster all hosts, in place of the first one's."""
    named = {**environment, "card": None, "cards": [card.uuid for card in cards if card.uuid]}
    if settings.cluster:
        named["hosts"] = [card.host for card in cards]
        named["host"] = named["host"] if len({*named["hosts"]}) == 1 else None
    return named
