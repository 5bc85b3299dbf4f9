"""The worker's process: set-up, failures, and faults on a real card at the end."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen3bench.campaign.worker_process import WorkerProcess
from qwen3bench.config.settings import Settings
from qwen3bench.config.sources import own_code
from qwen3bench.errors import Refused, UserError
from qwen3bench.record.environment import HOST_KEYS
from qwen3bench.record.host import Host
from qwen3bench.record.lines import FailureLine
from qwen3bench.record.messages import (
    REQUESTS,
    Ceilings,
    CellFailure,
    Done,
    Failure,
    MeasureCeilings,
    Probe,
    decode_reply,
    encode_request,
)
from qwen3bench.worker.serve import Worker, failure, serve

Ask = Callable[..., Any]


@pytest.mark.parametrize(("dim", "threads"), [(256, [1]), (257, [])])
def test_a_small_model_runs_on_one_thread(
    ask: Ask, settings: Settings, monkeypatch: pytest.MonkeyPatch, dim: int, threads: list[int]
) -> None:
    set_to: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    ask("open", config=replace(settings, model=replace(settings.model, emb_dim=dim), device="cpu").to_dict())
    assert set_to == threads


def test_it_takes_as_many_threads_as_are_asked_for(
    ask: Ask, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small model, too; but no more than there are CPUs."""
    set_to: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    monkeypatch.setattr("qwen3bench.worker.session.usable_cpus", lambda: (0, 1, 2, 3))
    ask("open", config=replace(settings, threads=4).to_dict())
    assert set_to == [4]
    with pytest.raises(UserError, match=r"threads=5: 4 CPUs may be used here"):
        ask("open", config=replace(settings, threads=5).to_dict())
    assert set_to == [4]


@pytest.mark.parametrize(("threads", "left"), [("auto", 0), (1, 3), (4, 0), (6, 0)])
def test_fewer_threads_leave_cores_to_others(
    ask: Ask, worker: Worker, settings: Settings, monkeypatch: pytest.MonkeyPatch, threads: Any, left: int
) -> None:
    """Of four cores with two CPUs each."""
    host = replace(Host.here(), cpus=tuple(range(8)), cores=4)
    monkeypatch.setattr(Host, "here", classmethod(lambda cls: host))
    monkeypatch.setattr("qwen3bench.worker.session.usable_cpus", lambda: host.cpus)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    ask("open", config=replace(settings, threads=threads).to_dict())
    assert worker.session.cores_left == left


def test_it_finds_the_device(ask: Ask) -> None:
    assert ask("probe", device="cpu").device == "cpu"
    assert ask("probe", device="auto").device == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(UserError, match=r"device=cuda:99: PyTorch sees .* CUDA device"):
        ask("probe", device="cuda:99")


def test_on_a_cpu_there_is_nothing_to_touch(opened: Ask) -> None:
    assert opened("touch") == Done()


@pytest.mark.cuda
def test_it_touches_a_card_with_a_kernel(ask: Ask, settings: Settings) -> None:
    ask("open", config=replace(settings, device="cuda").to_dict())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        ask("touch")
    assert [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]


def test_it_tells_what_must_not_change(opened: Ask) -> None:
    identity = opened("identify")
    assert set(identity.fingerprint) - set(HOST_KEYS) == {"config", "weights", "code", "torch", "device"}
    assert identity.environment["torch"] == torch.__version__


def test_code_of_the_users_own_that_changed_meanwhile_is_refused(
    ask: Ask, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "edited.py").write_text("def apply(parts):\n    return parts\n")
    target = {"tie": {"_target_": "edited.apply"}}
    config = replace(settings, opts=settings.opts | target).to_dict()
    begun = own_code(target)
    ask("open", config=config, own_code=begun)
    (tmp_path / "edited.py").write_text("def apply(parts):\n    return None\n")
    with pytest.raises(UserError, match="edited: its code has changed since this run began"):
        ask("open", config=config, own_code=begun)


@pytest.mark.slow
def test_timing_does_not_wait_for_the_compiler_to_be_imported() -> None:
    code = """
import sys
from qwen3bench.record.messages import CountParameters, Enter, Load, Open, Prepare, Visit
from qwen3bench.worker.serve import Worker
from qwen3bench.config.cli import compose

settings = compose(["model=tiny", "opt=flash,tie,mlp,mask,norm,qkv", "workload=decode"]).resolved("cpu")
worker = Worker()
cell = settings.labels[-1]
for request in (
    Open(config=settings.to_dict()),
    Load(cells=settings.labels),
    CountParameters(cell=cell),
    Enter(workload="decode", runtime="eager", cell="baseline"),
    Prepare(cell=cell, copy=0),
    Visit(cell=cell, copy=0, repeats=1),
):
    worker.answer(request)
print(settings.labels, "torch._dynamo" in sys.modules)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["['baseline',", "'flash+tie+mlp+mask+norm+qkv']", "False"]


def test_what_cannot_be_loaded_is_refused_as_the_users(ask: Ask, settings: Settings, tmp_path: Path) -> None:
    ask("open", config=replace(settings, weights=str(tmp_path / "none")).to_dict())
    with pytest.raises(UserError, match="none"):
        ask("load", cells=["baseline"])


FLASH = "qwen3bench.opt.flash.apply"


@pytest.mark.parametrize(
    ("opts", "said"),
    [
        ({"flash": {"_target_": FLASH, "backend": "nonsense"}}, "flash.backend='nonsense' is unknown"),
        ({"flash": {"_target_": "no.such.module"}}, "flash: its _target_ no.such.module cannot be loaded"),
        ({"flash": {"_target_": FLASH}, "tie": {"_target_": FLASH}}, "flash and tie both replace the part"),
        ({"flash": {"_target_": FLASH}, "tie": {"_target_": "builtins.len"}}, "tie: its function raised TypeError"),
        ({"tie": {"_target_": "builtins.repr"}}, "tie: its function gives str and not Parts"),
    ],
)
def test_what_a_config_asks_for_is_refused_when_it_opens(ask: Ask, settings: Settings, opts: Any, said: str) -> None:
    with pytest.raises(Refused, match=said):
        ask("open", config=replace(settings, opts=opts, design="full").to_dict())


def test_switches_that_are_never_on_together_may_claim_one_part(ask: Ask, settings: Settings) -> None:
    opts = {"flash": {"_target_": FLASH}, "tie": {"_target_": FLASH}}
    ask("open", config=replace(settings, opts=opts, design="each").to_dict())


def test_errors_become_a_status_and_one_line() -> None:
    assert failure(UserError("name another")) == Failure(status="refused", reason="name another")
    assert failure(ValueError("two\n  lines")) == Failure(status="crashed", reason="ValueError: two lines")
    assert failure(MemoryError()).status == "oom"
    assert failure(torch.cuda.OutOfMemoryError("CUDA out of memory")).status == "oom"
    assert failure(RuntimeError("DefaultCPUAllocator: can't allocate")).status == "oom"
    assert failure(torch.AcceleratorError("CUDA error: out of memory\nSearch for it")).status == "oom"
    assert failure(torch.AcceleratorError("CUDA error: device-side assert triggered")).status == "crashed"
    assert len(failure(RuntimeError("x" * 10_000)).reason or "") < 600


def test_an_answer_that_is_no_json_is_a_failure_and_the_worker_lives_on(worker: Worker) -> None:
    worker.operations[MeasureCeilings] = lambda asked: Ceilings(vendor={"deep": float("nan")})
    replies, probe = io.BytesIO(), Probe(device="cpu")
    serve(io.BytesIO(encode_request(MeasureCeilings()) + encode_request(probe)), replies, worker)
    odd, fine = replies.getvalue().splitlines()
    with pytest.raises(CellFailure, match="JSON compliant"):
        decode_reply(odd, MeasureCeilings())
    assert decode_reply(fine, probe).device == "cpu"


# On a real card

FAULTY = """
import sys, torch
from qwen3bench.worker.serve import main
from qwen3bench.worker.timed_pass import TimedPass
real = TimedPass.prepare

def prepare(self, asked):
    if asked.cell == "flash":
        if sys.argv[1] == "assert":  # an index outside, noticed on the device
            table = torch.zeros(4, 4, device="cuda")
            torch.nn.functional.embedding(torch.tensor([10**6], device="cuda"), table).sum().item()
        torch.cuda.set_per_process_memory_fraction(0.05)  # what else runs on the card keeps the rest
        keep = [torch.empty(2**30, dtype=torch.uint8, device="cuda") for _ in range(10**6)]
    return real(self, asked)

TimedPass.prepare = prepare
main()
"""


@pytest.mark.cuda
@pytest.mark.parametrize(("fault", "status", "reason"), [("memory", "oom", "memory"), ("assert", "crashed", "assert")])
def test_a_fault_on_the_card_costs_its_cell_alone(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    small_settings: Callable[..., Settings],
    fault: str,
    status: str,
    reason: str,
) -> None:
    from qwen3bench.analysis.run import load_run
    from qwen3bench.campaign import launch
    from qwen3bench.campaign.machine import Machine

    monkeypatch.setattr(launch, "write_report", lambda run, found: None)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]), prepend=os.pathsep)
    settings = replace(small_settings("design=full", "opt=flash,tie"), device="cuda", dir=tmp_path / "run")
    command = (sys.executable, "-c", FAULTY, fault)
    assert launch.run(settings, Machine(lambda log: WorkerProcess(log, command))) == 3
    run = load_run(tmp_path / "run")
    assert dict(zip(run.cells["cell"], run.cells["status"], strict=True)) == {
        "baseline": "ok",
        "flash": status,
        "tie": "ok",
        "flash+tie": "ok",
    }
    (line,) = run.record.of(FailureLine)
    assert reason in (line.reason or "")
    if status == "oom":
        assert (line.peak_allocated_bytes or 0) > 2**30


def test_every_request_of_a_campaign_has_its_operation(worker: Worker) -> None:
    assert set(worker.operations) == set(REQUESTS.values())
