"""Switches that share a part: each wraps what the others make of it, in an order that names given do not change."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from lab_project import TEN, write_lab
from torch import Tensor

from qwen3bench import ModelConfig, build_model
from qwen3bench.config.catalogue import claim_of, resolve
from qwen3bench.config.choices import choices, use_config_dir
from qwen3bench.config.claims import Claim, Switch
from qwen3bench.config.cli import compose
from qwen3bench.errors import UserError
from qwen3bench.model.baseline import BASELINE_PARTS, assemble
from qwen3bench.model.build import filled
from qwen3bench.model.layers import FeedForward, RMSNorm
from qwen3bench.model.parts import Parts
from qwen3bench.model.qwen3 import Qwen3Model
from qwen3bench.opt.norm import FusedRMSNorm
from qwen3bench.worker.equivalence.gate import Gate

NAMES = tuple(TEN)
NORMS = ("flat_norm", "halved_norm", "copied_norm")


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder with ten switches of the user's own."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    for module in ("lab", "lab.switches"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    folder = write_lab(tmp_path)
    use_config_dir(folder)
    yield folder
    use_config_dir(None)


def declare(folder: Path, name: str, text: str) -> None:
    """Write the YAML file of a switch anew."""
    content = f"# @package opt.{name}\n_target_: lab.switches.{name}\n{text}\n"
    (folder / "opt" / f"{name}.yaml").write_text(content, encoding="utf-8")
    use_config_dir(None)  # forgets what it has read
    use_config_dir(folder)


def changed_parts(parts: Parts) -> set[str]:
    return {f.name for f in fields(Parts) if getattr(parts, f.name) is not getattr(BASELINE_PARTS, f.name)}


def built(config: ModelConfig, switches: dict[str, Switch], weights: dict[str, Tensor]) -> Qwen3Model:
    """The model of these optimizations, put on in this order."""
    with torch.device("meta"):
        model = Qwen3Model(config, assemble(switches))
    return filled(model, weights)


def test_every_switch_of_ours_says_which_part_it_changes() -> None:
    for name in choices("opt"):
        (switch,) = resolve([name]).values()
        assert changed_parts(switch(BASELINE_PARTS)) == {claim_of(name).part}, name


@pytest.mark.usefixtures("lab")
@pytest.mark.parametrize("others", [(), ("flash", "tie", "mask", "norm", "residual")], ids=["alone", "over ours"])
def test_ten_switches_over_five_parts_compute_the_same_in_either_order(
    tiny: ModelConfig, tiny_weights: dict[str, Tensor], others: tuple[str, ...]
) -> None:
    weights = {name: tensor.double() for name, tensor in tiny_weights.items()}
    tokens = torch.randint(0, tiny.vocab_size, (2, 13))
    baseline = build_model(tiny, (), weights)(tokens)
    switches = resolve((*others, *NAMES))
    turned = dict(reversed(switches.items()))
    for order in (switches, turned):
        model = built(tiny, order, weights)
        assert changed_parts(model.parts) == {claim_of(name).part for name in others} | {
            *("norm", "residual", "attend", "mask", "mlp")
        }
        torch.testing.assert_close(model(tokens), baseline, rtol=0, atol=1e-12)
        bases = [base.__name__ for base in type(model.final_norm).__mro__]
        assert {"FlatNorm", "HalvedNorm", "CopiedNorm"} <= set(bases)
        assert ("FusedRMSNorm" in bases) == ("norm" in others)
        assert {"PlainSilu", "SwappedProduct"} <= {base.__name__ for base in type(model.trf_blocks[0].ff).__mro__}


@pytest.mark.usefixtures("lab")
def test_names_in_any_order_build_the_same_model(tiny: ModelConfig, tiny_weights: dict[str, Tensor]) -> None:
    bases = [
        [base.__name__ for base in type(build_model(tiny, names, tiny_weights).final_norm).__mro__]
        for names in (("norm", *NORMS), (*reversed(NORMS), "norm"))
    ]
    assert bases[0] == bases[1] == ["CopiedNorm", "HalvedNorm", "FlatNorm", *(b.__name__ for b in FusedRMSNorm.__mro__)]


@pytest.mark.usefixtures("lab")
def test_the_gate_judges_what_they_make_together(tiny: ModelConfig) -> None:
    gate = Gate(tiny, device=torch.device("cpu"), dtype=torch.float32, opts={name: {} for name in NAMES})
    assert gate.judge_cell(NAMES).equivalent


# What is refused


def test_one_that_does_not_say_so_is_refused_before_anything_is_built(lab: Path, tiny: ModelConfig) -> None:
    declare(lab, "halved_norm", "commutes: [norm, copied_norm]")
    with pytest.raises(UserError) as refusal:
        build_model(tiny, ("flat_norm", "halved_norm"), device="meta")
    first, second = str(refusal.value).split("\n")
    assert first.endswith("both replace the part 'norm'; switch one of them off")
    assert second.endswith("each lists the other under commutes: opt/halved_norm.yaml does not")
    build_model(tiny, ("flat_norm", "copied_norm"), device="meta")


def test_a_conflict_of_declared_parts_needs_no_model(lab: Path) -> None:
    folder, both = f"--config-dir={lab}", "opt=plain_silu,swapped_product"
    assert len(compose([folder, both, "design=full"]).cells) == 4
    for part in ("mlp", "mlp.activation", "mlp.activation.exp"):
        declare(lab, "swapped_product", f"part: {part}")
        with pytest.raises(UserError, match="plain_silu and swapped_product both replace the part 'mlp'"):
            compose([folder, both])
        assert compose([folder, both, "design=each"]).cells  # in which they are never on together
    with pytest.raises(UserError, match="optimizations mlp and plain_silu both replace the part 'mlp'"):
        compose([folder, "opt=mlp,plain_silu"])


def fused(parts: Parts) -> Parts:
    return replace(parts, norm=FusedRMSNorm)


def other(parts: Parts) -> Parts:
    class Other(RMSNorm):
        pass

    return replace(parts, norm=Other)


def wrapping(parts: Parts) -> Parts:
    inner = parts.norm
    return replace(parts, norm=lambda dim, eps: inner(dim, eps))


def late(parts: Parts) -> Parts:
    return replace(parts, norm=lambda dim, eps: parts.norm(dim, eps))


def shy(parts: Parts) -> Parts:
    return replace(parts, norm=wrapping(parts).norm) if parts.norm is RMSNorm else parts


def claimed(**functions: object) -> dict[str, Switch]:
    """Optimizations of which each says that it commutes with all others."""
    return {name: Switch(function, Claim(name, commutes=("all",))) for name, function in functions.items()}  # type: ignore[arg-type]


def test_what_replaces_is_wrapped_whatever_the_order() -> None:
    for names in (("fused", "wrapping"), ("wrapping", "fused")):
        functions = {"fused": fused, "wrapping": wrapping}
        parts = assemble(claimed(**{name: functions[name] for name in names}))
        assert type(parts.norm(4, 1e-6)) is FusedRMSNorm


@pytest.mark.parametrize("careless", [other, late, shy])
def test_one_that_would_drop_what_another_made_is_refused(careless: object) -> None:
    for switches in (claimed(fused=fused, careless=careless), claimed(careless=careless, fused=fused)):
        with pytest.raises(UserError, match=r"replaces 'norm' in place of wrapping what \w+ made of it"):
            assemble(switches)


def test_a_yaml_that_names_another_part_is_refused() -> None:
    with pytest.raises(UserError, match=r"one replaces the part 'norm', and its YAML file says part: mlp.activation"):
        assemble({"one": Switch(fused, Claim("one", "mlp.activation"))})


def test_each_sees_the_baseline_but_for_the_part_that_it_shares() -> None:
    seen: list[Parts] = []

    def watching(parts: Parts) -> Parts:
        seen.append(parts)
        return wrapping(parts)

    wide = claimed(fused=fused, watching=watching)
    assemble({**wide, "mlp": Switch(lambda parts: replace(parts, mlp=lambda c: FeedForward(c)), Claim("mlp"))})
    assert [changed_parts(parts) for parts in seen] == [set(), {"norm"}]


def test_finer_parts_overlap_where_one_holds_the_other() -> None:
    claims = [Claim(str(i), part) for i, part in enumerate(("mlp", "mlp.a", "mlp.a.b", "mlp.ab", "norm"))]
    apart = {(one.part, two.part) for one, two in combinations(claims, 2) if one.shares_with(two)}
    assert apart == {("mlp.a", "mlp.ab"), ("mlp.a.b", "mlp.ab")}
    assert not Claim("x").shares_with(Claim("y"))


def test_commutes_must_list_optimizations(lab: Path) -> None:
    for text, told in (
        ("commutes: [nrom]", "commutes must be a list of other"),
        ("part: [a]", "part must be the name"),
    ):
        declare(lab, "copied_mask", text)
        with pytest.raises(UserError, match=rf"opt/copied_mask.yaml: {told}"):
            compose([f"--config-dir={lab}", "opt=copied_mask"])
