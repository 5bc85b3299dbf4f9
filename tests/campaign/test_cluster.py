"""Whole runs of a tiny model on a Ray cluster of two raylets, in namespaces of their own: loopback is all they see.

One raylet pretends two cards, so that a run has two actors on a machine; the other has another machine's name.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from qwen3bench.analysis.run import Run, load_run
from qwen3bench.record.lines import BlockLine, FailureLine

pytestmark = pytest.mark.slow
pytest.importorskip("ray")

REPOSITORY = Path(__file__).parents[2]
DRIVER = (sys.executable, str(Path(__file__).with_name("run_cluster.py")))
PORT = 6399
TINY = (
    "model=tiny",
    "workload=prefill",
    "prompt_tokens=16",
    "design=full",
    "opt=flash",
    "measure.target=0.00001",
    "measure.min_blocks=6",
    "measure.max_blocks=6",
    "measure.min_processes=2",
    "measure.repeats=50",  # a fifth of a second a block: time to kill something
    "cluster=ray",
)
TIMING, A_BLOCK = '"purpose":"time"', '"type":"block"'
JOINED = f"cluster.address=127.0.0.1:{PORT}"
# The address that Ray would take for its own, by the route out.
OUTSIDE = "ip addr add 10.9.9.9/32 dev lo && ip route add default dev lo src 10.9.9.9"


@dataclass(frozen=True)
class Namespace:
    """Processes that see each other alone, and loopback; all of them end with this one."""

    init: psutil.Process
    variables: dict[str, str]

    def start(self, *command: str, before: Sequence[str] = (), **variables: str) -> subprocess.Popen[str]:
        """Start a command here."""
        inside = ["nsenter", "-t", str(self.init.pid), "-n", "-p", "-m", *before, *command]
        return subprocess.Popen(
            inside,
            env={**os.environ, **self.variables, **variables},
            cwd=self.variables["TMPDIR"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def processes(self, name: str) -> list[psutil.Process]:
        """The processes here whose command line holds `name`."""
        inside = Path(f"/proc/{self.init.pid}/ns/pid").readlink()
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if Path(f"/proc/{process.pid}/ns/pid").readlink() == inside and name in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def wait_for(self, count: int, name: str) -> list[psutil.Process]:
        """The processes here whose command line holds `name`, once there are so many."""
        deadline = time.monotonic() + 20
        while len(found := self.processes(name)) != count:
            assert time.monotonic() < deadline, found
            time.sleep(0.1)
        return found

    def send(self, number: int, name: str) -> None:
        """Send a signal to the processes here whose command line holds `name`."""
        for process in self.processes(name):
            process.send_signal(number)

    def wait_until_none(self, name: str) -> None:
        deadline = time.monotonic() + 30
        while left := self.processes(name):
            assert time.monotonic() < deadline, left
            time.sleep(0.1)


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A directory with a short name, as sockets lie in it."""
    with tempfile.TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as path:
        yield Path(path)


@contextlib.contextmanager
def namespace(home: Path, also: str = "true") -> Iterator[Namespace]:
    script = f"ip link set lo up && {also} && echo up && cat"
    unshared = ("unshare", "--net", "--pid", "--mount", "--mount-proc", "--fork", "sh", "-c", script)
    holder = subprocess.Popen(
        unshared, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    assert holder.stderr is not None
    try:
        if holder.stdout.readline() != "up\n":
            pytest.skip(f"no network namespace can be made here: {holder.stderr.read().strip()}")
        (init,) = psutil.Process(holder.pid).children()
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a-token-of-these-tests-alone", "RAY_worker_niceness": "0"}
        paths = {"TMPDIR": str(home), "PYTHONPATH": str(REPOSITORY), "HOME": str(home)}
        yield Namespace(init, {**token, **paths})
    finally:  # the first process here reads its input to the end; with it all others end
        holder.stdin.close()
        holder.wait(20)


@pytest.fixture(scope="module")
def cluster(home: Path) -> Iterator[Namespace]:
    """Two raylets, `node-a` with two pretended cards and `node-b` with none."""
    ray = (str(Path(sys.executable).with_name("ray")), "start", "--num-cpus=1", "--object-store-memory=80000000")
    named = ("unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"')
    with namespace(home) as here:
        head = ("--head", f"--port={PORT}", "--num-gpus=2", "--include-dashboard=false", f"--temp-dir={home}/r")
        first = here.start(*ray, *head, before=(*named, "node-a"))
        out, _ = first.communicate(timeout=60)
        assert first.returncode == 0, out
        second = here.start(*ray, f"--address=127.0.0.1:{PORT}", "--num-gpus=0", before=(*named, "node-b"))
        out, _ = second.communicate(timeout=60)
        assert second.returncode == 0, out
        yield here


@pytest.fixture
def begin(cluster: Namespace) -> Callable[..., subprocess.Popen[str]]:
    """Starts a run on the cluster."""
    return lambda *arguments, **variables: cluster.start(*DRIVER, *arguments, **variables)


def finished(driver: subprocess.Popen[str], status: int = 0) -> str:
    """What a driver said, after it has ended with this status."""
    out, _ = driver.communicate(timeout=200)
    assert driver.returncode == status, out
    return out


def wait_for(driver: subprocess.Popen[str], directory: Path, what: str) -> None:
    """Wait until the record holds this."""
    record = directory / "samples.jsonl"
    while not record.exists() or what.encode() not in record.read_bytes():
        assert driver.poll() is None, driver.communicate()[0]
        time.sleep(0.05)


def whole(directory: Path) -> Run:
    """The run there, of which every cell is ok and every block was closed once."""
    run = load_run(directory)
    assert run.finished
    assert set(run.cells["status"]) == {"ok"}
    assert not run.record.of(FailureLine)
    closed = Counter(line.block for line in run.record.of(BlockLine) if line.state != "repeat")
    assert sorted(closed) == [*range(len(closed))]
    assert len(closed) >= 6
    assert set(closed.values()) == {1}
    assert set(run.samples.groupby("block")["process"].nunique()) == {1}
    return run


def test_two_actors_on_one_machine_of_which_one_is_killed(
    cluster: Namespace, begin: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    driver = begin(*TINY, JOINED, f"run.dir={tmp_path}/run")
    wait_for(driver, tmp_path / "run", TIMING)
    actors = cluster.wait_for(2, "ray::CardHost")  # what one of them starts bears its name until it is itself
    assert all(actor.children(recursive=True) for actor in actors)
    wait_for(driver, tmp_path / "run", A_BLOCK)
    actors[0].kill()
    said = finished(driver)
    assert said.count("the CPU of node-a is left out") == 1
    run = whole(tmp_path / "run")
    assert set(run.samples["host"]) == {"node-a"}
    cluster.wait_until_none("worker/boot.py")


def test_a_run_on_two_nodes_is_continued_after_its_driver_was_killed(
    cluster: Namespace, begin: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    driver = begin(*TINY, JOINED, "device=cpu", f"run.dir={tmp_path}/run")
    wait_for(driver, tmp_path / "run", TIMING)
    drivers = cluster.processes(f"run.dir={tmp_path}/run")
    wait_for(driver, tmp_path / "run", A_BLOCK)
    for process in drivers:
        process.kill()
    driver.communicate(timeout=20)
    assert not load_run(tmp_path / "run").finished
    cluster.wait_until_none("worker/boot.py")
    finished(begin(f"resume={tmp_path}/run"))
    run = whole(tmp_path / "run")
    assert set(run.samples["host"]) == {"node-a", "node-b"}
    assert run.environment["hosts"] == ["node-a", "node-b"]


def test_nodes_with_other_code_are_refused(begin: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    other = tmp_path / "other"
    for folder in ("qwen3bench", "configs"):
        shutil.copytree(REPOSITORY / folder, other / folder, ignore=shutil.ignore_patterns("__pycache__"))
    with (other / "qwen3bench" / "worker" / "clock.py").open("a") as changed:
        changed.write("# changed\n")
    said = finished(begin(*TINY, JOINED, f"run.dir={tmp_path}/run", PYTHONPATH=str(other)), 1)
    assert "differs from this process: the code of qwen3bench" in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_a_ray_of_its_own_listens_on_loopback_alone_and_ends_with_the_run(home: Path, tmp_path: Path) -> None:
    """And leaves no directory behind."""
    before = {*home.glob("ray/session_*")} - {home / "ray/session_latest"}
    with namespace(home, also=OUTSIDE) as here:
        driver = here.start(*DRIVER, *TINY, f"run.dir={tmp_path}/run")
        wait_for(driver, tmp_path / "run", A_BLOCK)
        tables = "".join(Path(f"/proc/{here.init.pid}/net/{name}").read_text() for name in ("tcp", "tcp6"))
        listening = {line.split()[1].rpartition(":")[0] for line in tables.splitlines() if " 0A " in line}
        began = {*home.glob("ray/session_*")} - before
        here.send(signal.SIGTERM, f"run.dir={tmp_path}/run")
        assert "nothing measured is lost" in finished(driver, 143)
        here.wait_until_none("worker/boot.py")
        here.wait_until_none("raylet")
    assert len(began) == 2  # and the link to it
    assert {*home.glob("ray/session_*")} == before
    assert listening == {"0000000000000000FFFF00000100007F", "0100007F"}  # 127.0.0.1, of version 6 and 4
