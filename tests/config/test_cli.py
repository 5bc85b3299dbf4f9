"""What a person may type, what comes of it, and how mistakes are told."""

from __future__ import annotations

import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from qwen3bench.config.choices import choices
from qwen3bench.config.cli import compose, guarded, main, normalize
from qwen3bench.config.settings import Settings
from qwen3bench.errors import UserError
from qwen3bench.record.design import label

SOURCE = Path(__file__).parents[2]
Runs = list[Settings]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Multirun makes its directory under the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)


@pytest.fixture
def runs() -> Runs:
    """The settings that `run` was called with."""
    return []


@pytest.fixture
def run(runs: Runs) -> Callable[[Settings], int]:
    """A run that measures nothing."""

    def note(wanted: Settings) -> int:
        runs.append(wanted)
        return 0

    return note


def _python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qwen3bench", *arguments],
        env={**os.environ, "PYTHONPATH": str(SOURCE), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("form", ["+opt=flash,tie", "+opt=[flash,tie]", "opt=flash,tie", "opt=[flash,tie]"])
def test_the_forms_of_the_contract_mean_the_same(form: str) -> None:
    assert normalize([form]) == ["opt=[flash,tie]"]
    assert [label(cell) for cell in compose([form]).cells] == ["baseline", "flash+tie"]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["+opt=tie,flash,tie"], ["opt=[flash,tie]"]),
        (["opt=[ norm , mask ]"], ["opt=[mask,norm]"]),
        (["opt=flash", "opt=tie"], ["opt=[flash]", "opt=[tie]"]),  # a script's, and what overrides it
        (["+model=8b", "+design=full"], ["model=qwen3-8b", "design=full"]),
        (["opt=flash,"], ["opt=[flash]"]),
        (["opt="], ["opt=[]"]),
        (["opt=[]"], ["opt=[]"]),
        (["opt=none"], ["opt=[]"]),
        (["workload=generate,prefill"], ["workload=[prefill,generate]"]),
        (["runtime=graph,eager"], ["runtime=[eager,graph]"]),
        (["+peer=transformers"], ["peer=[transformers]"]),
        (["opt=zebra,norm,ape"], ["opt=[norm,zebra,ape]"]),
        (["opt=[flash"], ["opt=[flash"]),
        (["flash.backend=math"], ["opt.flash.backend=math"]),
        (["+flash.extra=1", "~mlp.order"], ["+opt.flash.extra=1", "~opt.mlp.order"]),
        (["model=8b"], ["model=qwen3-8b"]),
        (["model=0.6B"], ["model=qwen3-0.6b"]),
        (["model=nine"], ["model=nine"]),
        (["design=full", "--cfg", "job"], ["--cfg=job", "design=full"]),
        (
            ["opt=tie,mlp", "-c", "job", "seed=1", "-p", "opt"],
            ["--cfg=job", "--package=opt", "opt=[tie,mlp]", "seed=1"],
        ),
    ],
)
def test_normalize(typed: list[str], meant: list[str]) -> None:
    assert normalize(typed) == meant


def test_with_multirun_a_plus_adds_no_second_model_or_design() -> None:
    assert normalize(["-m", "+model=8b,tiny", "+design=full"])[-2:] == ["model=qwen3-8b,tiny", "design=full"]


@pytest.mark.parametrize("flag", ["-m", "--multirun", "hydra.mode=MULTIRUN"])
def test_multirun_keeps_the_commas_of_hydra(flag: str) -> None:
    typed = ["opt=tie,flash", "workload=decode,prefill", "opt=[tie,flash],[mlp]", "seed=1,2"]
    assert [word for word in normalize([flag, *typed]) if word in typed] == typed


@pytest.mark.parametrize(
    ("typed", "factors"),
    [
        ("+opt=flash", [("flash",)]),
        ("+opt=[flash,tie]", [("flash", "tie")]),
        ("+opt=flash,tie", [("flash",), ("tie",)]),
    ],
)
def test_with_multirun_a_design_is_of_the_named_ones_too(
    run: Callable[[Settings], int], runs: Runs, typed: str, factors: list[tuple[str, ...]]
) -> None:
    assert main(["-m", "model=tiny", "design=full", typed], run=run) == 0
    assert [s.factors for s in runs] == factors


@given(st.permutations(["flash", "tie", "mlp", "mask", "norm"]), st.data())
def test_order_and_repeats_do_not_matter(names: list[str], data: st.DataObject) -> None:
    some = data.draw(st.lists(st.sampled_from(names), min_size=1))
    ordered = [name for name in choices("opt") if name in some]
    assert normalize([f"+opt={','.join(some)}"]) == [f"opt=[{','.join(ordered)}]"]


@pytest.mark.slow
@given(st.lists(st.text(max_size=20), max_size=4))
def test_normalize_is_idempotent_on_what_it_accepts(argv: list[str]) -> None:
    try:
        once = normalize(argv)
    except (UserError, SystemExit):  # --version
        return
    assert normalize(once) == once


_WORDS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["opt", "flash", "seed", "model", "tiny", "batch_size", "measure", "run.dir", "8b", "1", "null"]),
    st.sampled_from(["=", "+", "~", ",", "[", "]", "{", "}", "${", "'", '"', "\\", ".", "???", "@", "\n", "-", "--"]),
)
_ARGUMENTS = st.one_of(
    st.text(max_size=30),
    st.lists(_WORDS, max_size=6).map("".join),
    st.tuples(st.sampled_from(["opt=", "+opt=", "opt.flash.backend=", "model=", "seed=", "+x=", "~"]), _WORDS).map(
        "".join
    ),
    st.sampled_from(
        ["-m", "-h", "-c", "-p", "-i", "-r", "-cn", "-sc", "--resolve", "--info", "--hydra-help", "--package"]
    ),
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(argv=st.lists(_ARGUMENTS, max_size=4))
def test_no_argument_gives_a_traceback(
    argv: list[str], capfd: pytest.CaptureFixture[str], run: Callable[[Settings], int]
) -> None:
    handlers = list(logging.getLogger().handlers)
    status = main(argv, run=run)
    logging.getLogger().handlers = handlers  # --info adds one of its own, on a stream that this test will close
    error = capfd.readouterr().err
    assert status in (0, 1), error
    assert "Traceback" not in error
    if status == 1 and not {"-m", "-h"} & set(argv):
        assert error.startswith("qwen3bench: error: ")
        assert len(error.splitlines()) <= 2


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["+opt=falsh"], ["'falsh'", "did you mean flash?", "flash, tie, mlp, mask, norm"]),
        (["opt=tie,falsh"], ["'falsh'", "did you mean flash?"]),
        (["-m", "opt=tie,falsh"], ["'falsh'", "did you mean flash?"]),
        (["workload=prefil"], ["'prefil'", "did you mean prefill?", "prefill, decode, generate"]),
        (["runtime=grph"], ["'grph'", "did you mean graph?"]),
        (["peer=transformer"], ["'transformer'", "did you mean transformers?"]),
        (["design=ful"], ["'ful'", "did you mean full?"]),
        (["measure=fast"], ["there is no measure 'fast'"]),
        (["measure=3"], ["a group is set to the name of an option"]),
        (["opt=3"], ["a group is set to the name of an option"]),
        (["model=null"], ["a group is set to the name of an option"]),
        (["model=qwen3-8"], ["'qwen3-8'", "did you mean qwen3-8b?"]),
        (["opt.flash.backend=math"], ["opt.flash.backend", "add opt=flash"]),
        (["flash.backend=math", "opt=tie"], ["opt.flash.backend", "add opt=flash"]),
        (["-m", "opt=tie,mlp", "flash.backend=math"], ["opt.flash.backend", "add opt=flash"]),
        (["opt.falsh.backend=math"], ["'falsh'", "did you mean flash?"]),
        (["opt=flash", "flash.bakend=math"], ["'opt.flash.bakend'", "did you mean backend?"]),
        (["sed=1"], ["'sed'", "did you mean seed?"]),
        (["zzzzz=1"], ["'zzzzz'", "--cfg job"]),
        (["~sed"], ["'sed'"]),
        (["+opt=flash", "+opt=tie"], ["opt is given more than once", "opt=flash,tie"]),
        (["opt=[flash]", "+opt=tie"], ["opt is given more than once"]),
        (["seed=1,2"], ["seed takes one value", "-m"]),
        (["devices=0,1"], ["devices takes one value", "-m", "several cards in one run: devices=[0,1]"]),
        (["seed"], ["'seed' is no override"]),
        (["+opt=flash,", "tie"], ["'tie' is no override", "without spaces", "`opt=[flash,tie]`"]),
        (["resume=one", "run.dir=two"], ["resume=one and run.dir=two", "give one of them"]),
        (["seed=[1"], ["'seed=[1' is no override"]),
        (["weights=/a=b/c"], ["weights=/a=b/c", "needs quotes; type \"weights='/a=b/c'\""]),
        (["run.dir=a[1]"], ["needs quotes; type \"run.dir='a[1]'\""]),
        (["run.dir={a}"], ["needs quotes; type \"run.dir='{a}'\""]),
        (["run.dir=a\u03a9"], ["needs quotes; type \"run.dir='a\u03a9'\""]),
        (["run.dir=it's"], ["needs quotes; type", "it\\'"]),
        (["run.dir=[a,b]"], ["without quotes the value is no text; type \"run.dir='[a,b]'\""]),
        (["resume=2025"], ["type \"resume='2025'\""]),
        (["run.dir=a,b"], ["run.dir takes one value", "-m", "one value with a comma: \"run.dir='a,b'\""]),
        (["-m", "run.dir=a=b"], ["type \"run.dir='a=b'\""]),
        (["weights=~nobody-of-that-name/x"], ["~nobody-of-that-name/x: no home directory is known"]),
        (["hydra.run.dir=x"], ["hydra.run.dir is not for this program: name the directory with run.dir"]),
        (["hydra.run={dir: x}"], ["hydra.run.dir is not for this program"]),
        (["hydra.job.chdir=true"], ["hydra.job.chdir", "name its directory with run.dir"]),
        (["-m", "hydra.job.chdir=true"], ["hydra.job.chdir"]),
        (["hydra.output_subdir=.hydra"], ["hydra.output_subdir", "config.yaml in run.dir holds"]),
        (["hydra.sweep.dir=x"], ["hydra.sweep.dir is for a multirun (-m)", "with run.dir"]),
        (["-m", "hydra.sweep.dir=x", "run.dir=y"], ["both name the multirun's directory"]),
        (["--sed=1"], ["unrecognized arguments: --sed=1", "--help"]),
        (["-\x1b[2J\n"], [r"unrecognized arguments: -\x1b[2J\n"]),
        (["--", "-x"], ["unrecognized arguments: -x"]),
        (["--cfg", "jobs"], ["--cfg", "'jobs'"]),
        (["--cfg", "job", "-m"], ["--multirun", "--cfg"]),
        (["--resolve"], ["--resolve", "--cfg"]),
        (["--config-name=other"], ["'other'"]),
        (["--config-dir=/no/such"], ["'/no/such'"]),
        (["--experimental-rerun=config.pickle"], ["--experimental-rerun reads a pickle"]),
        (["-sc", "=="], ["'=='"]),
        (["hydra/launcher=joblib"], ["there is no hydra/launcher 'joblib'", "there are: basic"]),
        (["hydra/help=own"], ["there is no hydra/help 'own'", "there are: qwen3bench, default"]),
        (["hydra.mode=often"], ["'often'", "RUN, MULTIRUN"]),
        (["model.width=3"], ["'model.width'", "there are: name, num_layers", "context_length"]),
        (["opt=flash", "+opt.flash.nosuch=1"], ["flash has no option nosuch"]),
        (["+opt.flsh._target_=a.b"], ["'flsh'", "did you mean flash?"]),
        (["+peer.vllm.attention=[sdpa]"], ["'vllm'", "there are: transformers"]),
        (["batch_size=many"], ["batch_size must be a whole number", "'many'"]),
    ],
)
def test_a_mistake_is_told_in_two_lines(
    argv: list[str],
    named: list[str],
    run: Callable[[Settings], int],
    runs: Runs,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(argv, run=run) == 1
    output = capsys.readouterr()
    assert output.err.startswith("qwen3bench: error: ")
    assert [part for part in named if part not in output.err] == []
    assert len(output.err.splitlines()) <= 2
    assert (output.out, runs) == ("", [])


def test_a_folder_of_ones_own_adds_choices(run: Callable[[Settings], int], runs: Runs, tmp_path: Path) -> None:
    own = tmp_path / "own" / "measure"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text("defaults: [default]\nname: mine\nmin_blocks: 7\n", encoding="utf-8")
    assert main(["--config-dir=own", "measure=mine"], run=run) == 0
    assert [(s.measure.name, s.measure.min_blocks) for s in runs] == [("mine", 7)]


def test_choices_of_ones_own_are_listed_too(
    run: Callable[[Settings], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own" / "measure"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text("defaults: [default]\nname: mine\n", encoding="utf-8")
    assert main(["--config-dir=own", "measure=brief"], run=run) == 1
    assert "there are: default, mine, quick, thorough" in capsys.readouterr().err


@pytest.mark.parametrize("typed", ["~/a b", "~/a=b", "'~/x'", "~"])
@pytest.mark.parametrize("key", ["run.dir", "resume"])
def test_a_tilde_is_the_home_directory(key: str, typed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/it's [me]")
    settings = compose([f"{key}={typed}"])
    home = Path("/home/it's [me]")
    assert (settings.dir or settings.resume) == home / typed.strip("'").removeprefix("~").removeprefix("/")


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(st.text(st.characters(exclude_categories=["C"], exclude_characters="$"), min_size=1).filter(str.isprintable))
def test_what_an_error_says_to_type_is_understood(name: str) -> None:
    """A shell splits what is said; Hydra reads the path that was meant."""
    with pytest.raises(UserError) as refused:
        compose([f"run.dir=/{name}="])
    ((_, typed),) = [shlex.split(line[line.index(" type ") :]) for line in str(refused.value).splitlines()]
    assert compose([typed]).dir == Path(f"/{name}=")


def test_nothing_is_written_but_by_the_run(run: Callable[[Settings], int], runs: Runs, tmp_path: Path) -> None:
    assert main(["model=tiny", "+opt=norm"], run=run) == 0
    assert [s.factors for s in runs] == [("norm",)]
    assert list(tmp_path.iterdir()) == []


def test_multirun_runs_each_point_in_a_directory_of_its_own(
    run: Callable[[Settings], int], runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["-m", "model=tiny", "+opt=flash,tie", "seed=1,2"], run=run) == 0
    assert [(s.factors, s.seed) for s in runs] == [
        (("flash",), 1),
        (("flash",), 2),
        (("tie",), 1),
        (("tie",), 2),
    ]
    parents = {s.dir.parent for s in runs if s.dir}
    assert len(parents) == 1
    assert parents.pop().parent == Path("results")  # from here, as the other runs
    assert [s.dir.name for s in runs if s.dir] == ["0", "1", "2", "3"]
    *_, last, page = capsys.readouterr().out.splitlines()
    assert last == "#3: model=tiny opt=tie seed=2"
    assert page == f"One page over these runs: python -m qwen3bench.report {runs[0].dir.parent if runs[0].dir else ''}"


def test_a_refused_multirun_leaves_no_directory(
    run: Callable[[Settings], int], runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["-m", "model=tiny", "opt=flash", "+opt.flash.nosuch=1", "seed=1,2"], run=run) == 1
    assert capsys.readouterr().err.count("flash has no option nosuch; it has: backend, decode") == 2
    assert runs == []
    assert list((tmp_path / "results").iterdir()) == []


def test_a_finished_point_of_a_multirun_is_not_run_again(run: Callable[[Settings], int], runs: Runs) -> None:
    asked: list[Path | None] = []

    def finished(wanted: Settings) -> int | None:
        asked.append(wanted.dir)
        return 3 if wanted.dir == Path("here/0") else None

    assert main(["-m", "run.dir=here", "seed=1,2"], run, finished) == 3
    assert (asked, [s.dir for s in runs]) == ([Path("here/0"), Path("here/1")], [Path("here/1")])


def test_multirun_into_a_named_directory(run: Callable[[Settings], int], runs: Runs) -> None:
    assert main(["-m", "run.dir=here", "seed=1,2"], run=run) == 0
    assert [s.dir for s in runs] == [Path("here/0"), Path("here/1")]
    assert list(Path.cwd().iterdir()) == []  # no empty directories, as these runs wrote nothing


@pytest.mark.slow
@pytest.mark.parametrize(
    ("results", "status", "ran"),
    [([0, 3, 0], 3, 3), ([3, 1, 0], 1, 3), ([0, 0, 0], 0, 3), ([0, 130, 0], 130, 2), ([143, 0, 0], 143, 1)],
)
def test_the_worst_status_of_a_multirun_wins_and_an_interrupt_ends_it(
    results: list[int], status: int, ran: int, runs: Runs
) -> None:
    def run(wanted: Settings) -> int:
        runs.append(wanted)
        return results[len(runs) - 1]

    assert main(["-m", "seed=1,2,3"], run=run) == status
    assert len(runs) == ran


@pytest.mark.parametrize(
    "error", [UserError("no such checkpoint; mend it"), PermissionError(13, "Permission denied", "x")]
)
def test_an_error_inside_the_run_is_told_too(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def run(_: Settings) -> int:
        raise error

    assert main([], run=run) == 1
    assert capsys.readouterr().err == f"qwen3bench: error: {error}\n"


def test_a_bug_shows_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def run(_: Settings) -> int:
        raise ValueError("a bug")

    assert main([], run=run) == 1
    assert "ValueError: a bug" in capsys.readouterr().err


def test_full_error_shows_the_traceback_and_reaches_the_run_unchanged(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def run(_: Settings) -> int:
        seen.append(os.environ.get("HYDRA_FULL_ERROR"))
        raise UserError("wrong")

    main([], run=run)
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    main([], run=run)
    assert "Traceback" in capsys.readouterr().err
    assert seen == [None, "1"]
    assert os.environ["HYDRA_FULL_ERROR"] == "1"


def test_guarded_gives_130_on_ctrl_c() -> None:
    def action() -> int:
        raise KeyboardInterrupt

    assert guarded(action) == 130


def test_compose_takes_no_options_of_hydra() -> None:
    with pytest.raises(UserError, match="--cfg=job is not an option here"):
        compose(["--cfg", "job"])


def test_help_names_the_commands_groups_and_options() -> None:
    shown = _python("--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    for line in (
        "python -m qwen3bench +opt=flash,tie",
        "resume=DIR",
        "opt: flash, flce, gemv, mask, mlp, norm, qkv, recompute, residual, rope, tie",
        "band: 0.01",
    ):
        assert line in shown.stdout
    assert 'eval "$(qwen3bench -sc install=bash)"' in shown.stdout


def test_cfg_job_shows_the_composed_config() -> None:
    shown = _python("--cfg", "job", "--resolve", "+opt=tie,flash", "flash.backend=cudnn", "batch_size=3")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "backend: cudnn" in shown.stdout
    assert shown.stdout.count("batch_size: 3") == 3  # the run's, prefill's and decode's
    assert shown.stdout.index("  flash:") < shown.stdout.index("  tie:")


@pytest.mark.slow
def test_tab_completion_completes_groups_and_options() -> None:
    assert _python("-sc", "query=bash", COMP_LINE="qwen3bench measure=").stdout.split() == [
        f"measure={name}" for name in sorted(choices("measure"))
    ]
    assert "batch_size=" in _python("-sc", "query=bash", COMP_LINE="qwen3bench batch").stdout
    assert "complete" in _python("-sc", "install=bash").stdout


def test_a_mistake_in_a_process_of_its_own() -> None:
    shown = _python("opt=falsh")
    assert (shown.returncode, shown.stdout) == (1, "")
    assert shown.stderr.startswith("qwen3bench: error: there is no optimization 'falsh'; did you mean flash?\n")


def test_mistakes_and_cfg_need_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from qwen3bench.__main__ import main\n"
        "from qwen3bench.config.cli import compose\n"
        "compose(['design=full'])\n"
        "sys.exit(main(['--cfg', 'job']) or main(['sed=1']) - 1)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_its_version_is_the_packages_own() -> None:
    told = _python("--version")
    assert (told.returncode, told.stdout) == (0, f"qwen3bench {version('qwen3bench')}\n")


def test_a_checkout_works_uninstalled() -> None:
    code = "\n".join(
        [
            "from importlib import metadata",
            "def missing(name): raise metadata.PackageNotFoundError(name)",
            "metadata.version = missing",
            "from qwen3bench.config.cli import compose",
            "compose(['+opt=flash'])",
        ]
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(SOURCE)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_composed_config_is_followed_by_what_it_would_measure(capsys) -> None:  # type: ignore[no-untyped-def]
    def run(_: object) -> int:
        raise AssertionError("--cfg measures nothing")

    assert main(["--cfg", "job", "design=each"], run, about=lambda settings: [f"{len(settings.cells)} cells"]) == 0
    config = capsys.readouterr().out
    assert config.endswith("# 6 cells\n")
    assert OmegaConf.create(config).design.name == "each"
