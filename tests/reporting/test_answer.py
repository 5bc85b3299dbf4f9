import io
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qwen3bench.analysis.run import Run, load_run
from qwen3bench.config.cli import main
from qwen3bench.config.settings import Settings
from qwen3bench.reporting.answer import AnswerCard, cards, command_for, not_told
from qwen3bench.reporting.conditions import conditions
from qwen3bench.reporting.control_findings import control_list, outcome_of
from qwen3bench.reporting.finding import ControlOutcome
from qwen3bench.reporting.findings import findings
from qwen3bench.reporting.terminal import terminal_summary
from qwen3bench.reporting.units import ratio, seconds, size
from qwen3bench.reporting.wording.answer_words import would_tell

Lines = list[dict[str, Any]]
REFERENCE = Path(__file__).parents[2] / "results" / "reference"


def card_of(run: Run) -> AnswerCard:
    (card,) = cards(run, findings(run))
    return card


@pytest.fixture
def small(record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]) -> Callable[..., Run]:
    return lambda **options: run_of(record_lines(factors=("flash", "tie"), **options))


def test_every_condition_has_a_card_with_its_switches(full_run: Run) -> None:
    found = cards(full_run, findings(full_run))
    assert [str(card.condition) for card in found] == [str(condition) for condition in conditions(full_run)]
    assert {"flash", "mask", "norm"} <= set(found[0].switches)
    assert found[0].gain.startswith("1.58")


def test_a_card_shows_the_numbers_of_its_cell(small: Callable[..., Run]) -> None:
    run = small()
    card, cells = card_of(run), run.cells.set_index("cell")
    facts = {name: (here, beside) for name, here, beside in card.facts}
    assert card.of == ""  # the switches stand above
    chosen = cells.loc["+".join(card.switches)]
    assert facts["latency"] == (seconds(chosen["latency_s"]), f"baseline {seconds(cells.loc['baseline', 'latency_s'])}")
    assert facts["peak memory"][0] == size(chosen["peak_allocated_bytes"])
    (aa,) = run.controls.aa.itertuples()
    copies = f"Two copies of the baseline read {ratio(aa.ratio, aa.lo, aa.hi)}."
    assert card.sure == f"All 4 controls passed. {copies} Measured in 6 blocks in 2 processes."
    assert card.python == 'build_model(config, opts=("flash", "tie"))'


def test_controls_of_a_card_and_of_other_answers_are_the_ticks_of_the_list(full_run: Run) -> None:
    ticks = sum(outcome_of(control) == ControlOutcome.PASSED for control in control_list(full_run))
    for card in cards(full_run, findings(full_run)):
        found = re.match(r"All (\d+) controls passed; (\d+) more concern other answers\.", card.sure)
        assert found, card.sure
        assert int(found[1]) + int(found[2]) == ticks


@pytest.mark.slow
def test_a_card_says_what_is_left_of_its_gain_without_a_graph() -> None:
    """On an H200 all on takes 8.3 ms of the 24 ms that eager takes, the baseline 27 of 31 ms."""
    run = load_run(REFERENCE / "h200-ablate-1x2048")
    left = (
        "That takes a CUDA graph: launched from Python it reads about 1.3×, by one to ten passes of each cell and "
        "without an interval. To measure it, add runtime=eager,graph."
    )
    assert left in cards(run, findings(run))[0].notes
    eager = replace(run, cells=run.cells.assign(runtime=["eager", *run.cells["runtime"][1:]]))
    assert all(left not in card.notes for card in cards(eager, findings(run)))


def test_the_command_of_a_card_measures_its_cell_at_the_sizes_of_the_run(
    small: Callable[..., Run], record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    lines = record_lines(factors=("flash", "tie"))
    words = ["design=full", "opt=[flash,tie]", "prompt_tokens=64", "measure=quick", "run.dir=results/x", "model=tiny"]
    lines[1]["command"] = ["python", "-m", "qwen3bench", *words, "opt.flash.backend=math", "workload=[prefill,decode]"]
    lines[1]["command"] += ["devices=[1]"]  # where it is read there may be one card
    run = run_of(lines)
    command = command_for(run, conditions(run)[0], ["flash"])
    assert command == (
        "python -m qwen3bench +opt=flash workload=prefill runtime=graph "
        "prompt_tokens=64 model=tiny opt.flash.backend=math"
    )
    asked: list[Settings] = []
    main(command.split()[3:], run=lambda settings, *_: asked.append(settings) or 0)
    assert (list(asked[0].opts), list(asked[0].workloads), asked[0].prompt_tokens) == (["flash"], ["prefill"], 64)
    assert "backend" not in command_for(run, conditions(run)[0], ["tie"])


def test_the_command_of_a_card_keeps_what_decides_its_numbers(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    """A folder of switches, training's precision, a runtime's options; not those of another workload or runtime."""
    lines = record_lines(factors=("flash", "tie"), workloads=("train",), runtimes=("graph",))
    of_train, of_graph = "workload.train.precision=bf16", "runtime.graph.warmup=7"
    words = ["--config-dir=own", of_train, "workload.decode.batch_size=8", of_graph, "runtime.compile.mode=x"]
    lines[1]["command"] = ["python", "-m", "qwen3bench", *words]
    run = run_of(lines)
    command = command_for(run, conditions(run)[0], ["flash"])
    assert command == (
        f"python -m qwen3bench --config-dir=own +opt=flash workload=train runtime=graph {of_train} {of_graph}"
    )
    assert card_of(run).python == """use_config_dir('own'); build_model(config, opts=("flash", "tie"))"""


def test_the_command_of_a_card_of_a_multirun_is_that_of_its_point(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    lines = record_lines(factors=("flash", "tie"), prompt_tokens=512, copy_shift=0.02)
    words = ["prompt_tokens=128,512", "model=tiny,qwen3-0.6b", "seed='1,2'", "opt=tie,[flash,tie]", "design=full"]
    lines[1]["command"] = ["python", "-m", "qwen3bench", "--multirun", *words, "hydra.sweep.dir='x'"]
    run = run_of(lines)
    command = command_for(run, conditions(run)[0], ["flash"])
    assert "prompt_tokens=512 model=qwen3-0.6b" in command
    asked = card_of(run).advice
    assert asked.startswith("python -m qwen3bench prompt_tokens=512 model=qwen3-0.6b")
    assert "'opt=[flash,tie]' design=full measure.min_processes=4" in asked


def test_the_command_of_a_card_has_the_prompt_that_the_run_chose(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    """Of fewer cells another length would be chosen: the same command would measure something else."""
    lines = record_lines(factors=("flash", "tie"), prompt_tokens=32)
    lines.insert(1, {"type": "prompt", "prompt_tokens": 32, "limit_s": 0.3, "forward_s": {"32": 0.2}})
    run = run_of(lines)
    assert command_for(run, conditions(run)[0], ["flash"]).endswith(" prompt_tokens=32")


def test_a_noisy_condition_has_a_plain_warning_and_what_would_tell(small: Callable[..., Run]) -> None:
    card = card_of(small(copy_shift=0.02))
    assert not card.switches
    assert "two copies of the baseline differ too much" in card.said
    assert card.warnings[0].startswith("Noisy: two copies of the baseline differ, and read 1.020×")
    assert card.advice == "python -m qwen3bench design=full measure.min_processes=4"
    assert card.advice_label == "This would tell:"  # the record does not know how long it takes
    assert would_tell(39600.0) == "This would tell, in about 11 hours:"
    assert "3 of 4 controls passed" in card.sure


def test_a_setting_in_an_advice_stands_once(record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]) -> None:
    lines = record_lines(factors=("flash", "tie"), copy_shift=0.02)
    lines[1]["command"] += ["measure.min_processes=2", "run.dir=results/x"]
    assert card_of(run_of(lines)).advice.split().count("measure.min_processes=4") == 1
    assert "min_processes=2" not in card_of(run_of(lines)).advice


def test_what_would_tell_of_one_workload_leaves_out_what_is_set_of_another(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    """Else the command is refused: it would set an option of a prefill that is not in it."""
    lines = record_lines(factors=("flash", "tie"), workloads=("prefill", "decode"), copy_shift=0.02)
    words = ["opt=[flash,tie]", "design=full", "workload=[prefill,decode]", "workload.prefill.logits_to_keep=1"]
    lines[1]["command"] = ["python", "-m", "qwen3bench", *words, "model=tiny"]
    run = run_of(lines)
    commands = {card.condition.workload: card.advice for card in cards(run, findings(run))}
    assert ["logits_to_keep=1" in commands[workload] for workload in ("prefill", "decode")] == [True, False]
    for workload, command in commands.items():
        asked: list[Settings] = []
        assert main(shlex.split(command)[3:], run=lambda settings, *_, asked=asked: asked.append(settings) or 0) == 0
        assert list(asked[0].workloads) == [workload]


def test_a_run_of_the_baseline_alone_says_what_it_takes(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    card = card_of(run_of(record_lines(factors=())))
    assert card.said.startswith("The baseline takes 7.")
    assert not card.command


def test_a_condition_without_a_latency_has_no_numbers(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run]
) -> None:
    card = card_of(run_of([line for line in record_lines(factors=("flash",)) if line["type"] in ("run", "end")]))
    assert (card.said, card.facts, card.sure) == ("No cell has a usable latency from a complete block here.", (), "")


def test_what_the_answers_do_not_tell_follows_the_run(small: Callable[..., Run]) -> None:
    run = small()
    said = " ".join(not_told(run))
    assert "random" in said
    assert "device time" in said
    checkpoint = replace(run, config=run.config | {"weights": "models/qwen"})
    assert "random" not in " ".join(not_told(checkpoint))
    assert said.startswith("They hold for this card,")
    on_cpu = replace(run, config=run.config | {"device": "cpu"})
    assert not_told(on_cpu)[0].startswith("They hold for this processor,")


def test_numbers_without_a_recommendation_say_of_which_cell_they_are(small: Callable[..., Run]) -> None:
    card = card_of(small(copy_shift=0.02))
    assert card.said.startswith("No recommendation")
    assert (card.of, bool(card.facts)) == ("With flash and tie on:", True)


@pytest.mark.parametrize(
    ("reason", "blocks", "told"), [("max_seconds", 2, True), ("max_seconds", 6, False), ("target", 2, False)]
)
def test_a_card_says_that_the_time_limit_came_before_enough_blocks(
    record_lines: Callable[..., Lines], run_of: Callable[[Lines], Run], reason: str, blocks: int, told: bool
) -> None:
    lines = record_lines(factors=("flash", "tie"))
    lines[0]["config"]["measure"] = {"min_blocks": 6}
    for line in lines:
        if line["type"] == "stop":
            line |= {"reason": reason, "blocks": blocks}
    run = run_of(lines)
    said = "The time limit ended measuring after 2 blocks, before the least number of 6."
    assert (said in card_of(run).notes) is told
    console = Console(width=100, record=True, file=io.StringIO())
    terminal_summary(run, console)
    warning = "the time limit ended measuring before its least number of blocks: prefill 1×512 graph (2 of 6 blocks)."
    assert (warning in " ".join(console.export_text().split())) is told
