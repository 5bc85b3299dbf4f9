"""The answer's cards: for each workload and runtime the switches to turn on, what that gives, and how sure it is."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qwen3bench.config.choices import OWN_FOLDER
from qwen3bench.record.design import BASELINE, cell_of
from qwen3bench.record.lines import PromptLine, SessionLine
from qwen3bench.reporting.conditions import Condition, conditions
from qwen3bench.reporting.control_findings import control_list, many_left_out, outcome_of, tally
from qwen3bench.reporting.finding import Advice, BestCell, Choice, ControlOutcome, Finding, Kind, Times
from qwen3bench.reporting.lookup import blocks_of, ended_early, level, of_peers, rows
from qwen3bench.reporting.units import is_number, seconds, significant, size, times
from qwen3bench.reporting.wording.answer_words import (
    NOTHING_HERE,
    cut_short,
    how_sure,
    interval_words,
    limits_of_answers,
    measured_of,
    without_graph,
    would_tell,
)
from qwen3bench.reporting.wording.sentences import choice_notes, sentence

if TYPE_CHECKING:
    from qwen3bench.analysis.run import Run

# Of the command that measured: what says which cells are measured, how long, and where results go.
_NOT_KEPT = (  # of a run's command: what another run chooses anew, and which cards of its machine it had
    *("design", "opt", "workload", "runtime", "peer", "measure", "run", "resume", "hydra", "report", "analysis"),
    *("devices", "cluster"),
)
_MULTIRUN = ("-m", "--multirun")


@dataclass(frozen=True)
class AnswerCard:
    """What is shown of one workload under one runtime: an answer with its numbers, or why there is none."""

    condition: Condition
    gain: str = ""
    interval: str = ""
    switches: tuple[str, ...] = ()
    said: str = ""
    command: str = ""
    python: str = ""
    of: str = ""  # what the facts are of, where no switches are named above them
    facts: tuple[tuple[str, str, str], ...] = ()  # what, in this cell, in the baseline
    notes: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    sure: str = ""
    warnings: tuple[str, ...] = ()
    advice: str = ""
    advice_label: str = ""


def cards(run: Run, found: Sequence[Finding]) -> list[AnswerCard]:
    """A card for each condition of the run, in its order."""
    outcome = control_list(run)
    return [_card(run, condition, found, outcome) for condition in conditions(run)]


def _card(run: Run, condition: Condition, found: Sequence[Finding], outcome: Sequence[Finding]) -> AnswerCard:
    here = {kind: [f for f in found if f.kind == kind and f.condition == str(condition)] for kind in Kind}
    about = [f for f in outcome if f.condition in ("", str(condition))]
    failed = [f for f in about if outcome_of(f) == ControlOutcome.FAILED]
    early = [cut_short(*blocks)] if (blocks := ended_early(run, condition)) else []
    screen = [finding for finding in here[Kind.SCREEN] if isinstance(finding.detail, BestCell)]
    told = [each for each in about if outcome_of(each) == ControlOutcome.UNSURE or many_left_out(each)]
    notes = [*early, *map(_plain, (*screen, *told))]
    card = AnswerCard(
        condition,
        notes=tuple(notes),
        peers=tuple(_plain(replace(finding, noisy=False)) for finding in here[Kind.PEER]),
        sure=_sure(run, condition, about, outcome),
        warnings=tuple(_plain(finding) for finding in (*here[Kind.MISSING], *(f for f in failed if f.condition))),
    )
    answers, whole = here[Kind.ANSWER], here[Kind.TOGETHER]
    if answers and isinstance(choice := answers[0].detail, Choice):
        answer = answers[0]
        if choice.none is None and choice.times:
            card = _chosen(run, card, answer, choice.times)
            return replace(card, notes=(*_without_graph(run, condition, answer), *choice_notes(answer, choice), *notes))
        asked = _asked(run, answer.advice)
        label = would_tell(answer.advice.seconds) if answer.advice else ""
        plain = replace(answer, advice=None) if asked else answer  # why there is nothing to ask for, too
        card = replace(card, said=sentence(plain), advice=asked, advice_label=label)
    if whole and isinstance(taken := whole[0].detail, Times):
        of = measured_of(cell_of(whole[0].subject))
        return replace(card, said=card.said or _plain(whole[0]), of=of, facts=_facts(taken))
    return card if card.said else replace(card, said=NOTHING_HERE, sure="")


def _chosen(run: Run, card: AnswerCard, answer: Finding, taken: Times) -> AnswerCard:
    switches = cell_of(answer.subject)
    quoted = ", ".join(f'"{name}"' for name in switches) + ("," if len(switches) == 1 else "")
    folders = [word.removeprefix(OWN_FOLDER) for word in _measured_with(run) if word.startswith(OWN_FOLDER)]
    own = "".join(f"use_config_dir({folder!r}); " for folder in folders)
    return replace(
        card,
        gain=times(answer.estimate, answer.lo, answer.hi),
        interval=interval_words(level(run), answer.estimate, answer.lo, answer.hi),
        switches=switches,
        command=command_for(run, card.condition, switches),
        python=f"{own}build_model(config, opts=({quoted}))",
        facts=_facts(taken),
    )


def _without_graph(run: Run, condition: Condition, answer: Finding) -> list[str]:
    """What the recommended cell gains in eager, where a graph was measured and eager was looked at."""
    host = run.controls.host
    eager_s = {row.cell: row.eager_s for row in rows(host[host["workload"] == condition.workload])}
    if (
        condition.runtime != "graph"
        or "eager" in set(run.cells["runtime"])
        or not {BASELINE, answer.subject} <= set(eager_s)
    ):
        return []
    return [without_graph(eager_s[BASELINE] / eager_s[answer.subject])]


def _plain(finding: Finding) -> str:
    """A finding's sentence where its condition is clear."""
    return sentence(replace(finding, condition=""))


def _asked(run: Run, advice: Advice | None) -> str:
    """The run's command with the settings that would give an answer, each in place of what it had."""
    if not (advice and advice.settings):
        return ""
    asked = {key: value.split(",") for key, _, value in (setting.partition("=") for setting in advice.settings)}
    kept = []
    for word in _measured_with(run):
        key = word.lstrip("+").partition("=")[0]
        group, *inner = key.split(".")
        of_another = group in ("workload", "runtime") and len(inner) > 1 and inner[0] not in asked.get(group, inner)
        if key not in asked and not of_another:
            kept.append(word)
    return shlex.join([*kept, *advice.settings])


def _facts(taken: Times) -> tuple[tuple[str, str, str], ...]:
    """Latency, rate and memory of a cell in words, latency beside the baseline's."""
    beside = f"baseline {seconds(taken.baseline_s)}" if is_number(taken.baseline_s) else ""
    return tuple(
        (name, text(value), extra)
        for name, value, text, extra in (
            ("latency", taken.latency_s, seconds, beside),
            ("tokens/s", taken.tokens_per_s, significant, ""),
            ("peak memory", taken.peak_bytes, size, ""),
            ("parameters", taken.parameter_bytes, size, ""),
        )
        if is_number(value)
    )


def _sure(run: Run, condition: Condition, about: Sequence[Finding], of_run: Sequence[Finding]) -> str:
    copies = [(row.ratio, row.lo, row.hi) for row in rows(condition.select(run.controls.aa))]
    return how_sure(tally(about), tally(of_run).held, copies, blocks_of(run, condition))


def not_told(run: Run) -> list[str]:
    """What the run's answers do not tell, in sentences."""
    return limits_of_answers(
        cpu=run.config.get("device") == "cpu",
        random=run.config.get("weights") == "random",
        graph="graph" in set(run.cells["runtime"]),
        memory=bool(run.cells["peak_allocated_bytes"].notna().any()),
        peers=bool(of_peers(run.cells).any()),
    )


def command_for(run: Run, condition: Condition, switches: Sequence[str]) -> str:
    """The command that measures these switches against the baseline, with the sizes and options of this run."""
    here = {"opt": switches, "workload": [condition.workload], "runtime": [condition.runtime]}
    words = _measured_with(run)
    kept = []
    for word in words:
        group, *inner = word.lstrip("+").partition("=")[0].split(".")
        of_here = len(inner) > 1 and inner[0] in here.get(group, ())
        if "=" in word and (of_here or group not in _NOT_KEPT) and not word.startswith("-"):
            kept.append(word)
    own = [word for word in words if word.startswith(OWN_FOLDER)]
    where = [f"workload={condition.workload}", f"runtime={condition.runtime}"]
    return shlex.join(["python", "-m", "qwen3bench", *own, f"+opt={','.join(switches)}", *where, *kept])


def _measured_with(run: Run) -> list[str]:
    """The run's first command, where the record holds one, without its directory: another run has another.

    Of a multirun, that of this point. The prompt's length stands in it where the run chose it, as other cells would
    have another.
    """
    sessions = [line.command for line in run.record.of(SessionLine) if line.command]
    command = sessions[0] if sessions else ("python", "-m", "qwen3bench")
    dropped = ("run.dir=", "resume=", "hydra.")
    words = [word for word in command[3:] if word not in _MULTIRUN and not word.startswith(dropped)]
    if not set(_MULTIRUN).isdisjoint(command[3:]):
        words = [_of_this_point(run, word) for word in words]
    chosen = [f"prompt_tokens={line.prompt_tokens}" for line in run.record.of(PromptLine)]
    return [*command[:3], *words, *chosen]


def _of_this_point(run: Run, word: str) -> str:
    """A setting of a multirun with the value that this run has of several."""
    key, _, value = word.partition("=")
    found = run.record.run.setting(*key.lstrip("+").split("."))
    swept = value[:1] not in ("[", "'", '"') and not set(value).isdisjoint(",(")
    if found is None or not swept:
        return word
    if isinstance(found, dict):
        found = found.get("name", f"[{','.join(found)}]")
    return f"{key}={found}"
