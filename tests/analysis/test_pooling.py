from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from qwen3bench.analysis.pooling import Pool, pool
from qwen3bench.analysis.run import Run, load_run
from qwen3bench.errors import UserError

FACTORS = ("flash", "tie")
Write = Callable[..., Path]


def on(host: str | None, *cards: str | None) -> list[dict[str, Any]]:
    """Lines of processes on a machine, one after another on these cards."""
    return [{"type": "process", "process": n, "host": host, "card": card} for n, card in enumerate(cards)]


@pytest.fixture
def make(write_run: Write) -> Callable[..., Run]:
    """A run of two switches on a card; `flash` is what it is worth there."""

    def go(
        name: str,
        host: str | None,
        card: str | None,
        flash: float = 1.2,
        seed: int = 0,
        second: str | None = None,
        **more: Any,
    ) -> Run:
        lines = on(host, card, second or card)
        worth = {"flash": flash, "flash:tie": 1.01}
        return load_run(write_run(name, factors=FACTORS, worth=worth, seed=seed, extra=lines, **more))

    return go


def row(pooled: Pool, kind: str, term: str) -> Any:
    table = pooled.effects
    return next(table[(table["kind"] == kind) & (table["term"] == term)].itertuples())


def test_effects_and_ratios_are_means_of_machines_with_their_scatter_as_error(make: Callable[..., Run]) -> None:
    runs = [make(f"r{n}", f"m{n}", f"GPU-{n}", flash, n) for n, flash in enumerate((1.20, 1.22, 1.25))]
    pooled = pool(runs)
    assert pooled.machine_names == ["m0", "m1", "m2"]
    assert pooled.cards == [("m0", "GPU-0"), ("m1", "GPU-1"), ("m2", "GPU-2")]
    for kind, table, term, column in (
        ("main", "effects", "flash", "estimate"),
        ("speedup", "cells", "flash+tie", "speedup"),
    ):
        name = "term" if table == "effects" else "cell"
        own = [getattr(run, table) for run in runs]
        logs = np.log([float(each.loc[each[name] == term, column].iloc[0]) for each in own])
        found = row(pooled, kind, term)
        assert found.estimate == pytest.approx(np.exp(logs.mean()))
        assert np.log([found.lo, found.hi]) == pytest.approx(stats.t.interval(0.95, 2, logs.mean(), stats.sem(logs)))
        assert (found.df, found.machines, found.cards) == (2, 3, 3)
        assert found.sd_machines == pytest.approx(logs.std(ddof=1), rel=0.01)
    assert row(pooled, "main", "flash").verdict == "faster"
    assert row(pooled, "main", "tie").verdict == "same"


def test_one_machine_cannot_tell(make: Callable[..., Run]) -> None:
    pooled = pool([make("a", "m", "GPU-1"), make("b", "m", "GPU-2", seed=1), make("c", "m", "GPU-2", seed=2)])
    found = row(pooled, "main", "flash")
    assert found.estimate > 1.1
    assert np.isnan([found.lo, found.hi, found.p_holm, found.sd_machines]).all()
    assert found.verdict == "undecided"
    assert found.df == 0
    assert (found.machines, found.cards) == (1, 2)
    assert np.isfinite(found.sd_cards)


def test_a_run_over_two_cards_is_taken_apart(make: Callable[..., Run]) -> None:
    both = make("a", "m", "GPU-1", second="GPU-2")
    pooled = pool([both, make("b", "n", "GPU-3", seed=1)])
    assert pooled.cards == [("m", "GPU-1"), ("m", "GPU-2"), ("n", "GPU-3")]
    assert [part.number for part in pooled.parts] == [1, 1, 2]
    first = pooled.latencies[pooled.latencies["card"] == "GPU-1"]
    used = both.samples[both.samples["card"] == "GPU-1"]
    assert first.loc[first["cell"] == "baseline", "latency_s"].iloc[0] == pytest.approx(
        used.loc[(used["cell"] == "baseline") & (used["copy"] == 0), "latency_s"].median(), rel=1e-3
    )


def test_a_process_whose_line_is_lost_is_no_card_of_its_own(make: Callable[..., Run]) -> None:
    def without(run: Run, process: int) -> Run:
        lost = run.samples["process"] == process
        return replace(run, samples=run.samples.assign(**{k: run.samples[k].mask(lost) for k in ("host", "card")}))

    one, other = without(make("a", "m", "GPU-1"), 0), make("b", "n", "GPU-2", seed=1)
    assert pool([one, other]).cards == [("m", "GPU-1"), ("n", "GPU-2")]
    both = without(make("c", "l", "GPU-3", second="GPU-4", seed=2, blocks=18), 2)
    pooled = pool([both, other])
    assert pooled.cards == [("l", "GPU-3"), ("l", "GPU-4"), ("n", "GPU-2")]
    assert {*pooled.parts[0].run.samples["process"]} == {0}
    assert {*pooled.parts[1].run.samples["process"]} == {1}


def test_one_card_under_two_names_of_a_machine_is_one_machine(make: Callable[..., Run]) -> None:
    assert pool([make("a", "m", "GPU-1"), make("b", "renamed", "GPU-1", seed=1)]).machine_names == ["m"]
    a = make("c", "left", "GPU-1", seed=2)
    both = make("d", "renamed", "GPU-1", second="GPU-2", seed=3)
    again = make("e", "third", "GPU-2", seed=4)
    pooled = pool([a, both, again])
    assert pooled.machine_names == ["left"], "its other card is no other machine's"
    assert pooled.cards == [("left", "GPU-1"), ("left", "GPU-2")]
    apart = pool([make("f", "other", "GPU-3", seed=5), a, both])
    assert apart.machine_names == ["other", "left"]


def test_machines_can_be_named_where_the_record_does_not(make: Callable[..., Run]) -> None:
    runs = [make("a", None, None), make("b", None, None, seed=1)]
    with pytest.raises(UserError, match=r"a: does not say on which machine.*\n.*--machines"):
        pool(runs)
    assert pool(runs, ["x", "y"]).machine_names == ["x", "y"]
    with pytest.raises(UserError, match="names 1 machine for 2 runs"):
        pool(runs, ["x"])


def test_a_run_in_which_nothing_was_timed_is_named(make: Callable[..., Run]) -> None:
    runs = [make("a", "m", "GPU-1"), make("b", "n", "GPU-2", seed=1, baseline_s={("prefill", "graph"): 0.01}, blocks=0)]
    with pytest.raises(UserError, match=r"b: no complete block was timed in it; leave it out"):
        pool(runs)


def test_kinds_of_cards_are_a_comparison(make: Callable[..., Run]) -> None:
    runs = [make("a", "m", "GPU-1"), make("b", "n", "GPU-2", seed=1)]
    runs[1].record.run = replace(runs[1].record.run, device="Another")
    with pytest.raises(UserError, match=r"Simulated, Another.*a comparison, not a pool\n.*report .*compare"):
        pool(runs)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"config": {"batch_size": 7}}, "batch_size: 2 and 7"),
        ({"config": {"seed": 1}}, "seed: None and 1"),
        ({"fingerprint": {"code": "1"}}, "code: '0' and '1'"),
        ({"fingerprint": {"code": "0", "torch": "9"}}, "torch: None and '9'"),
        ({"fingerprint": {"code": "0", "device": "a CPU, 1 threads"}}, "device: None and 'a CPU, 1 threads'"),
        ({"config": {"workload": {"prefill": {"logits_to_keep": 1}}}}, "workload.prefill.logits_to_keep: None and 1"),
    ],
)
def test_another_question_is_refused(make: Callable[..., Run], changed: dict[str, Any], said: str) -> None:
    a, b = make("a", "m", "GPU-1"), make("b", "n", "GPU-2", seed=1, config=changed.get("config"))
    b.record.run = replace(b.record.run, fingerprint=changed.get("fingerprint", b.record.run.fingerprint))
    with pytest.raises(UserError, match="do not ask the same question") as refused:
        pool([a, b])
    assert said in str(refused.value)


def test_of_long_values_the_part_that_differs_is_named(make: Callable[..., Run]) -> None:
    a, b = make("a", "m", "GPU-1"), make("b", "n", "GPU-2", seed=1)
    for run, threads in ((a, 2), (b, 1)):
        device = f"Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz, {threads} threads"
        run.record.run = replace(run.record.run, fingerprint={"code": "0", "device": device})
    with pytest.raises(UserError, match=r"device: ….{1,20}, 2 threads' and ….{1,20}, 1 threads'"):
        pool([a, b])


def test_where_it_was_measured_and_written_is_not_the_question(make: Callable[..., Run]) -> None:
    config = {"run": {"dir": "elsewhere"}, "device": "cuda:1", "threads": 4, "report": {"memory_limit_gib": 3}}
    a, b = make("a", "m", "GPU-1"), make("b", "n", "GPU-2", seed=1, config=config)
    b.record.run = replace(b.record.run, fingerprint={"code": "0", "config": "9", "CPU quota": "2"})
    assert pool([a, b]).machine_names == ["m", "n"]


def test_the_same_run_counts_once(make: Callable[..., Run]) -> None:
    with pytest.raises(UserError, match=r"a and .*b hold samples of the same run"):
        pool([make("a", "m", "GPU-1"), make("b", "n", "GPU-2")])


def test_a_damaged_or_shorter_copy_of_a_run_is_the_same_run(make: Callable[..., Run]) -> None:
    whole, copy = make("a", "m", "GPU-1"), make("b", "n", "GPU-2")
    for samples in (
        copy.samples.iloc[3:],
        copy.samples.drop(index=[0, 5]),
        copy.samples.iloc[: len(copy.samples) // 2],
    ):
        for runs in ([whole, replace(copy, samples=samples)], [replace(copy, samples=samples), whole]):
            with pytest.raises(UserError, match="hold samples of the same run"):
                pool(runs)


def test_runs_of_one_block_are_pooled_with_the_intervals_of_the_pool(make: Callable[..., Run]) -> None:
    short = [make(f"r{n}", f"m{n}", f"GPU-{n}", seed=n, blocks=1) for n in range(2)]
    pooled = pool([*short, make("r2", "m2", "GPU-2", seed=2)])
    found = row(pooled, "main", "flash")
    assert (np.isfinite([found.estimate, found.lo, found.hi]).all(), found.reason) == (True, "")
    assert np.isnan([found.sd_machines, found.p_machines]).all(), "the noise of one block is no spread of machines"


def test_what_a_machine_does_not_tell_is_not_pooled(make: Callable[..., Run]) -> None:
    lines = [make("a", "m", "GPU-1"), make("b", "n", "GPU-2", seed=1, skip=("flash+tie",))]
    pooled = pool(lines)
    gone = row(pooled, "speedup", "flash+tie")
    assert (np.isnan(gone.estimate), gone.reason, gone.verdict) == (True, "not told by every run", "")
    mixed = row(pooled, "main", "flash")
    assert (np.isnan(mixed.estimate), mixed.reason) == (True, "not told in the same way by every run")
    assert np.isnan([mixed.sd_machines, mixed.sd_machines_lo, mixed.sd_machines_hi]).all(), "of two different things"
    assert np.isfinite(row(pooled, "speedup", "flash").estimate)


def test_names_what_else_differs_between_the_machines(make: Callable[..., Run]) -> None:
    runs = [make("a", "m", "GPU-1"), make("b", "n", "GPU-2", seed=1)]
    runs = [replace(run, environment={"driver": str(n), "os": "same"}) for n, run in enumerate(runs)]
    assert pool(runs).unlike.to_dict("records") == [{"key": "driver", "m": "0", "n": "1"}]
