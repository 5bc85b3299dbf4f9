"""A folder of the user's own, laid out as configs/: its switches are switches like any other."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen3bench.config import catalogue
from qwen3bench.config.choices import choices, options_of, own_config_dir, use_config_dir
from qwen3bench.config.cli import compose, main
from qwen3bench.config.settings import Settings, settings_from
from qwen3bench.config.sources import module_file, own_code
from qwen3bench.errors import UserError

MODULE = '''"""`mine`: a norm of my own."""

raise SystemExit("imported")
'''
YAML = """\
# @package opt.mine
_target_: mypackage.mymodule.apply
order: 15
workloads: [decode]
volume: 11
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """`lab/own/opt/mine.yaml`, its package beside the folder; the current directory is another."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    folder, package = tmp_path / "lab" / "own", tmp_path / "lab" / "mypackage"
    for directory in (folder / "opt", package):
        directory.mkdir(parents=True)
    (folder / "opt" / "mine.yaml").write_text(YAML)
    (package / "mymodule.py").write_text(MODULE)
    yield folder
    use_config_dir(None)


def test_its_switch_is_a_factor_with_options_and_a_place(own: Path) -> None:
    settings = compose(["--config-dir", str(own), "design=full", "+opt=tie,mine,flash", "mine.volume=12"])
    assert settings.factors == ("flash", "mine", "tie")
    assert len(settings.cells) == 8
    assert settings.opts["mine"] == {"_target_": "mypackage.mymodule.apply", "volume": 12}
    assert options_of("opt", "mine") == {"_target_": "mypackage.mymodule.apply", "volume": 11}
    with pytest.raises(UserError, match="mine has no option volme"):
        compose([f"--config-dir={own}", "+opt=mine", "+opt.mine.volme=1"])


def test_a_command_without_the_folder_knows_nothing_of_it(own: Path) -> None:
    compose([f"--config-dir={own}", "+opt=mine"])
    with pytest.raises(UserError, match="there is no optimization 'mine'"):
        compose(["+opt=mine"])
    assert own_config_dir() is None
    assert "mine" not in choices("opt")


def test_hydras_main_and_multirun_take_it_too(own: Path) -> None:
    seen: list[Settings] = []

    def run(settings: Settings) -> int:
        seen.append(settings)
        return 0

    folder = own.rename(own.with_name("it's own"))
    try:
        assert main(["--config-dir", str(folder), "+opt=mine"], run=run) == 0
        assert main(["--config-dir", str(folder), "-m", "opt=mine,flash"], run=run) == 0
        assert compose([f"--config-dir={folder}", "+opt=mine"]).factors == ("mine",)
    finally:
        folder.rename(own)
    assert [settings.factors for settings in seen] == [("mine",), ("mine",), ("flash",)]


def test_other_groups_have_choices_of_ones_own_as_well(own: Path) -> None:
    (own / "model").mkdir()
    mine = (Path(__file__).parents[2] / "configs/model/tiny.yaml").read_text().replace("num_layers: 2", "num_layers: 3")
    (own / "model" / "mine.yaml").write_text(mine)
    assert compose([f"--config-dir={own}", "model=mine"]).model.num_layers == 3


def test_it_is_described_without_being_imported(own: Path) -> None:
    settings = compose([f"--config-dir={own}", "+opt=mine"])
    assert catalogue.described("mine", settings.opts["mine"]) == "a norm of my own (volume=11)"
    assert module_file("mypackage.mymodule") == own.parent / "mypackage" / "mymodule.py"
    assert module_file("mypackage.nothing") is None


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("flash", "# @package opt.flash\n", "the name 'flash' is taken"),
        ("all", "# @package opt.all\n", "the name 'all' is none for an optimization"),
        ("baseline", "# @package opt.baseline\n", "the name 'baseline' is none for an optimization"),
        ("a+b", "# @package opt.a+b\n", r"the name 'a\+b' is none for an optimization"),
        ("other", "_target_: mypackage.mymodule.apply\n", "the line `# @package opt.other` is missing"),
        ("other", "# @package opt.other\n- a\n", "is a list"),
        ("other", "# @package opt.other\na: [\n", "cannot be read as YAML"),
    ],
)
def test_a_file_that_cannot_be_a_switch_is_named(own: Path, name: str, text: str, told: str) -> None:
    (own / "opt" / f"{name}.yaml").write_text(text)
    with pytest.raises(UserError, match=rf"opt/{name.replace('+', '.')}\.yaml: {told}"):
        compose([f"--config-dir={own}", "+opt=mine"])


def test_a_folder_that_is_not_there_is_the_users_error() -> None:
    with pytest.raises(UserError, match="there is no folder 'nowhere'"):
        compose(["--config-dir", "nowhere"])


@pytest.mark.parametrize("place", ["elsewhere", "lab", "lab/own/opt", "lab/mypackage"])
def test_a_folder_that_holds_no_choice_is_told_what_it_needs(own: Path, place: str) -> None:
    folder = own.parents[1] / place
    (own.parent / "mypackage" / "opt").mkdir()  # without a file
    with pytest.raises(UserError) as told:
        compose([f"--config-dir={folder}", "+opt=mine"])
    assert str(told.value) == (
        f"--config-dir: {str(folder)!r} has no opt/NAME.yaml; write one for each switch of your own"
    )


def test_a_folder_may_hold_choices_of_another_group_alone(own: Path) -> None:
    (own / "opt").rename(own / "model")
    (own / "model" / "mine.yaml").write_text((Path(__file__).parents[2] / "configs/model/tiny.yaml").read_text())
    assert compose([f"--config-dir={own}", "model=mine"]).model.num_layers == 2


# What it is hashed by


def test_any_change_of_its_file_or_its_package_changes_its_hash(own: Path) -> None:
    def hashes() -> dict[str, str]:
        return own_code(compose([f"--config-dir={own}", "+opt=mine,flash"]).opts)

    first = hashes()
    assert sorted(first) == ["mypackage", "opt/mine.yaml"]
    assert hashes() == first
    (own.parent / "mypackage" / "kernel.cu").write_text("// of a kernel that it launches")
    second = hashes()
    assert [name for name in first if first[name] != second[name]] == ["mypackage"]
    (own / "opt" / "mine.yaml").write_text(f"{YAML}# a word\n")
    third = hashes()
    assert [name for name in second if second[name] != third[name]] == ["opt/mine.yaml"]


def test_a_single_file_is_hashed_by_itself(own: Path) -> None:
    (own.parent / "loose.py").write_text("def apply(parts): return parts")
    (own / "opt" / "mine.yaml").write_text("# @package opt.mine\n_target_: loose.apply\n")
    (found,) = {own_code(compose([f"--config-dir={own}", "+opt=mine"]).opts)["loose"]}
    (own.parent / "beside.py").write_text("another")
    assert own_code(compose([f"--config-dir={own}", "+opt=mine"]).opts)["loose"] == found


def test_our_switches_have_no_code_of_the_users_own() -> None:
    assert own_code(compose(["opt=all"]).opts) == {}


def test_what_has_no_source_has_no_hash(own: Path) -> None:
    for target in ("nopackage.apply", "builtins.len", ""):
        (own / "opt" / "mine.yaml").write_text(f"# @package opt.mine\n_target_: '{target}'\n")
        assert list(own_code(compose([f"--config-dir={own}", "+opt=mine"]).opts)) == ["opt/mine.yaml"]


# opt=all


@pytest.mark.slow
def test_all_names_every_switch_that_a_workload_knows(own: Path) -> None:
    every = choices("opt")
    known = {name: catalogue.workloads_of(name) for name in every}
    assert known["gemv"] == ("decode", "generate")
    for workload in choices("workload"):
        expected = tuple(name for name in every if workload in known[name])
        assert compose([f"workload={workload}", "opt=all"]).factors == expected
        assert compose([f"workload=[{workload}]", "+opt=[all]"]).factors == expected
    assert known["flce"] == known["recompute"] == ("train",)
    inference = catalogue.known_to(("prefill", "decode"))
    assert compose(["+opt=all"]).factors == inference  # which are what a run measures by itself
    assert compose(["opt=flash,all", "workload=prefill"]).factors == tuple(n for n in every if "prefill" in known[n])
    assert compose(["opt=gemv,all", "workload=prefill"]).factors == inference  # what is named is not left out
    folder = f"--config-dir={own}"
    assert "mine" in compose([folder, "opt=all", "workload=decode"]).factors
    assert "mine" not in compose([folder, "opt=all", "workload=prefill"]).factors


def test_all_beside_single_ones_in_a_multirun() -> None:
    seen: list[tuple[str, ...]] = []

    def run(settings: Settings) -> int:
        seen.append(settings.factors)
        return 0

    assert main(["-m", "opt=flash,all", "workload=decode"], run=run) == 0
    assert seen == [("flash",), catalogue.known_to(("decode",))]


def test_a_workload_that_does_not_exist_is_named(own: Path) -> None:
    (own / "opt" / "mine.yaml").write_text(YAML.replace("decode", "decod"))
    with pytest.raises(UserError, match=r"opt/mine.yaml: workloads must be a list of some of prefill, decode"):
        compose([f"--config-dir={own}", "opt=all"])


def test_declarations_are_no_options() -> None:
    assert "workloads" not in options_of("opt", "gemv")
    assert "workloads" not in settings_from(compose(["+opt=gemv"]).to_dict()).opts["gemv"]
