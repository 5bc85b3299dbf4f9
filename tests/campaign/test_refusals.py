"""What cannot be measured as it was asked leaves nothing behind, and a worker that crashes leaves its log."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen3bench.config.settings import settings_from

Measure = Callable[..., Any]
FULL = ("design=full", "opt=flash,tie")
REFUSES = {"does": "error", "status": "refused", "reason": "flash.backend='nonsense' is unknown; choose one of auto"}


def tree(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


@pytest.mark.parametrize("op", ["probe", "open", "identify", "load"])
def test_a_refusal_leaves_no_directory(measure: Measure, tmp_path: Path, op: str) -> None:
    done = measure(*FULL, faults=[{**REFUSES, "op": op}], to=tmp_path / "new" / "run")
    assert done.error == f"{REFUSES['reason']}\n"
    assert tree(tmp_path) == []
    assert done.alive == []


def test_a_refusal_does_not_move_the_latest_run(measure: Measure, tmp_path: Path) -> None:
    assert measure(*FULL, dir=None).status == 0
    before = tree(tmp_path)
    latest = (tmp_path / "results" / "latest").resolve()
    for op in ("open", "load"):
        assert measure(*FULL, faults=[{**REFUSES, "op": op}], dir=None).status == 1
    assert (tmp_path / "results" / "latest").resolve() == latest
    assert tree(tmp_path) == before


def test_a_directory_of_the_users_stays_with_what_it_held(measure: Measure, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert measure(*FULL, faults=[{**REFUSES, "op": "open"}]).status == 1
    assert tree(tmp_path) == ["run"]


def test_what_is_measured_stays(measure: Measure) -> None:
    late = measure(*FULL, faults=[{**REFUSES, "op": "open"}], since=2)
    assert REFUSES["reason"] in late.error
    begun = (late.directory / "samples.jsonl").read_bytes()
    again = measure(resume=late.directory, faults=[{**REFUSES, "op": "open"}])
    assert REFUSES["reason"] in again.error
    assert (late.directory / "samples.jsonl").read_bytes().startswith(begun)


def test_a_worker_that_crashes_leaves_its_log(measure: Measure, tmp_path: Path) -> None:
    done = measure(*FULL, faults=[{"does": "die", "op": "open"}])
    assert f"see {tmp_path / 'run' / 'worker.log'}" in done.error
    assert (tmp_path / "run" / "worker.log").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"opt": {"flsh": {"_target_": "a.b"}}}, "there is no optimization 'flsh'; did you mean flash?"),
        ({"opt": {"flash": {"_target_": "a.b", "nosuch": 1}}}, "flash has no option nosuch; it has: backend, decode"),
        ({"peer": {"vllm": {"attention": ["sdpa"]}}}, "there is no peer 'vllm'"),
    ],
)
def test_names_and_options_are_refused_before_a_run_begins(
    small_settings: Callable[..., Any], changes: dict[str, Any], said: str
) -> None:
    config = json.loads(json.dumps(small_settings().to_dict())) | changes
    with pytest.raises(Exception, match=said.replace("?", r"\?")):
        settings_from(config)
