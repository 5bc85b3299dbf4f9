"""Every switch replaces its own part and no other's, and one file of each kind adds a new one."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qwen3bench import ModelConfig, build_model
from qwen3bench.config import catalogue as optimizations
from qwen3bench.config import choices
from qwen3bench.errors import UserError
from qwen3bench.model.attention import AdditiveMask
from qwen3bench.model.baseline import BASELINE_PARTS, assemble
from qwen3bench.model.layers import RMSNorm
from qwen3bench.model.parts import Parts
from qwen3bench.opt.norm import apply as fuse_norms

PART = {"flash": "attend", "tie": "head", "mlp": "mlp", "mask": "mask", "norm": "norm"}


def changed_parts(parts: Parts) -> set[str]:
    return {f.name for f in fields(Parts) if getattr(parts, f.name) is not getattr(BASELINE_PARTS, f.name)}


def test_the_five_in_the_order_of_labels(all_opts: tuple[str, ...]) -> None:
    assert all_opts[:5] == ("flash", "tie", "mlp", "mask", "norm")


@pytest.mark.parametrize("name", PART)
def test_a_switch_replaces_its_part_and_no_other(name: str) -> None:
    (switch,) = optimizations.resolve([name]).values()
    assert changed_parts(switch(BASELINE_PARTS)) == {PART[name]}


def test_a_cell_replaces_the_parts_of_its_switches(each_cell: tuple[str, ...]) -> None:
    switches = optimizations.resolve(each_cell)
    each = [changed_parts(switch(BASELINE_PARTS)) for switch in switches.values()]
    assert changed_parts(assemble(switches)) == set().union(*each)


def test_no_switch_changes_the_state_dict(tiny: ModelConfig, tiny_weights: dict[str, Tensor], each_opt: str) -> None:
    state = build_model(tiny, (each_opt,), tiny_weights).state_dict()
    baseline = build_model(tiny, (), tiny_weights).state_dict()
    assert list(state) == list(baseline)
    assert all(torch.equal(tensor, baseline[name]) for name, tensor in state.items())


def test_two_switches_that_claim_one_part_are_refused_in_either_order() -> None:
    def other_norms(parts: Parts) -> Parts:
        return replace(parts, norm=lambda dim, eps: RMSNorm(dim, eps))

    for claims in (
        {"norm": fuse_norms, "other": other_norms},
        {"other": other_norms, "norm": fuse_norms},
    ):
        with pytest.raises(UserError, match=r"replace the part 'norm'; switch one of them off") as refusal:
            assemble(claims)
        assert "norm" in str(refusal.value)
        assert "other" in str(refusal.value)


def test_each_switch_sees_the_baseline() -> None:
    seen: list[Parts] = []

    def watch(parts: Parts) -> Parts:
        seen.append(parts)
        return replace(parts, mask=AdditiveMask())

    assemble({"norm": fuse_norms, "watch": watch})
    assert changed_parts(seen[0]) == set()


SIXTH_PY = """
from dataclasses import replace

from qwen3bench.model.layers import TransformerBlock


class LoudBlock(TransformerBlock):
    pass


def apply(parts, volume=3):
    LoudBlock.volume = volume
    return replace(parts, block=LoudBlock)
"""
SIXTH_YAML = """\
# @package opt.sixth
_target_: sixth_optimization.apply
order: 25
volume: 11
"""


@pytest.fixture
def sixth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One Python file and one YAML file, in a copy of configs/."""
    configs = shutil.copytree(choices.config_dir(), tmp_path / "configs")
    (configs / "opt" / "sixth.yaml").write_text(SIXTH_YAML)
    (tmp_path / "sixth_optimization.py").write_text(SIXTH_PY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "sixth_optimization", raising=False)  # of another test, elsewhere
    choices_of_a_group = choices.choices
    for module in (choices, optimizations):
        monkeypatch.setattr(module, "config_dir", lambda: configs, raising=False)
    choices_of_a_group.cache_clear()
    yield
    choices_of_a_group.cache_clear()


@pytest.mark.usefixtures("sixth")
def test_one_file_of_each_kind_adds_a_sixth(tiny: ModelConfig, tiny_weights: dict[str, Tensor]) -> None:
    assert choices.choices("opt")[:6] == ("flash", "tie", "sixth", "mlp", "mask", "norm")
    assert list(optimizations.resolve({"norm", "sixth", "tie"})) == ["tie", "sixth", "norm"]
    tokens = torch.zeros(1, 3, dtype=torch.long)
    model = build_model(tiny, ("norm", "sixth", "tie"), tiny_weights)
    assert {type(block).__name__ for block in model.trf_blocks} == {"LoudBlock"}
    assert model.trf_blocks[0].volume == 11
    assert build_model(tiny, {"sixth": {"volume": 12}}, tiny_weights).trf_blocks[0].volume == 12
    assert torch.equal(model(tokens), build_model(tiny, ("norm",), tiny_weights)(tokens))
    with pytest.raises(UserError, match=r"there are flash, tie, sixth, mlp, .*; did you mean sixth"):
        build_model(tiny, ("sixht",), tiny_weights)


@pytest.mark.usefixtures("sixth")
def test_a_sixth_is_described_by_its_docstring(tmp_path: Path) -> None:
    module = tmp_path / "sixth_optimization.py"
    module.write_text('"""`sixth`: a block\nthat is loud.\n\nMore of it.\n"""\nraise SystemExit("imported")')
    assert optimizations.described("sixth", optimizations.declared("sixth")) == "a block that is loud (volume=11)"
    module.write_text('"""`sixth` is loud."""')
    assert optimizations.described("sixth") == "`sixth` is loud"


@pytest.mark.usefixtures("sixth")
@pytest.mark.parametrize("source", [None, "x = 1", "not Python", '"""', "\udcff"])
def test_what_cannot_be_described_is_left_out(
    source: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    if source is not None:
        (tmp_path / "no_words.py").write_text(source, errors="surrogateescape")
    for target in ("no_words.apply", "no_words.deeper.apply"):
        (choices.config_dir() / "opt" / "sixth.yaml").write_text(f"# @package opt.sixth\n_target_: {target}\n")
        assert optimizations.described("sixth", {"volume": 1}) == ""
    assert optimizations.described("unheard_of", {"_target_": "no_words.apply"}) == ""


def test_every_switch_is_described() -> None:
    for name in choices.choices("opt"):
        assert len(optimizations.described(name)) > 20, name


@pytest.mark.usefixtures("sixth")
def test_a_yaml_file_that_would_name_another_is_refused() -> None:
    path = choices.config_dir() / "opt" / "sixth.yaml"
    path.write_text(SIXTH_YAML.replace("opt.sixth", "opt.qkv"))
    with pytest.raises(UserError, match=r"sixth.yaml: the line `# @package opt.sixth` is missing"):
        choices.choices("opt")


@pytest.mark.usefixtures("sixth")
@pytest.mark.parametrize("target", ["sixth_optimization.nothing", "no.such.module", "sixth_optimization"])
def test_what_cannot_be_loaded_is_the_users_error(target: str) -> None:
    (choices.config_dir() / "opt" / "sixth.yaml").write_text(f"# @package opt.sixth\n_target_: {target}\n")
    with pytest.raises(UserError, match=f"sixth: its _target_ {target} cannot be loaded: .*"):
        optimizations.resolve(["sixth"])


def test_the_sixth_is_gone_again() -> None:
    assert "sixth" not in choices.choices("opt")
