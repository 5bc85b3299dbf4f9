"""A run says before it measures whether the machine is busy, and with what."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from qwen3bench.campaign.neighbors import Neighbors, busy_line, busy_with, card_line
from qwen3bench.record.lines import Telemetry


def test_another_process_is_seen_by_its_name_and_our_own_is_not(tmp_path: Any) -> None:
    """A grandchild that was given up by its parent belongs to nobody here."""
    name = tmp_path / "hungry-process"
    name.symlink_to(sys.executable)
    script = "import os, subprocess, sys; print(subprocess.Popen(sys.argv[1:], stdout=2).pid)"
    parent = subprocess.run(
        [sys.executable, "-c", script, str(name), "-S", "-c", "while True: pass"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    )
    pid = int(parent.stdout)
    try:
        neighbors = Neighbors()
        end = time.process_time() + 0.3
        while time.process_time() < end:
            pass
        shares = neighbors.shares()
    finally:
        subprocess.run(["kill", "-9", str(pid)], check=True)
    assert shares["hungry-process"] > 0.05
    assert sum(shares.values()) < 1.2


@pytest.mark.parametrize("shares", [{}, {"cron": 0.05, "sshd": 0.04}])
def test_a_quiet_machine_is_not_mentioned(shares: dict[str, float]) -> None:
    assert busy_line(shares, timed_by_host=True) is None


def test_a_busy_machine_is_named_with_what_it_costs() -> None:
    shares = {"firefox": 0.4, "make": 0.1, "cron": 0.001}
    line = busy_line(shares, timed_by_host=True)
    assert line is not None
    assert line.startswith("this machine is busy (firefox 40% and make 10% of its ")
    assert line.endswith(" cores). A run takes up to 2.0 times as long here, and its intervals are wider")
    assert str(busy_line(shares, timed_by_host=False)).endswith(
        " cores). Getting ready takes up to 2.0 times as long here; times on the device are not affected"
    )


@pytest.mark.parametrize("shares", [{}, {"firefox": 0.004}])
def test_what_is_small_beside_many_cores_or_unseen_is_not_named(shares: dict[str, float]) -> None:
    """Half of a core of 128 is too much for a thread there, and no share of the machine to name."""
    assert busy_with(shares) == "this machine is busy"


def test_who_else_uses_the_card_is_said() -> None:
    assert card_line(Telemetry()) is None
    assert card_line(Telemetry(foreign_processes=())) is None
    line = card_line(Telemetry(foreign_processes=(2**22 + 1,), foreign_sm_percent=40.0))
    assert line is not None
    assert line.startswith("the card is used by a process (4194305) too, at 40 % of its SMs. Blocks beside others are ")
    known = Telemetry(foreign_processes=(os.getpid(),))
    assert psutil.Process().name() in str(card_line(known))
    assert f"a process ({os.getpid()})" in str(card_line(known, here=False))  # another machine's has the same number


def test_a_run_says_so_once(measure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, fake_card: Any) -> None:
    monkeypatch.setattr(Neighbors, "shares", lambda self: {"firefox": 0.5})
    looks = fake_card(Telemetry(foreign_processes=(2**22 + 1,)), Telemetry())
    done = measure("device=cuda", "runtime=eager", card=looks)
    assert done.err.count("this machine is busy (firefox 50%") == 1
    assert done.err.count("the card is used by a process") == 1
