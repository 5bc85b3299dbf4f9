"""Every YAML composes, and says what the contract promises."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from qwen3bench.config import choices as choices_module
from qwen3bench.config.choices import choices, config_dir, five
from qwen3bench.config.cli import compose
from qwen3bench.config.settings import Settings, settings_from
from qwen3bench.errors import UserError
from qwen3bench.record.design import label

OwnSwitches = Callable[..., None]


@pytest.fixture
def own_switches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OwnSwitches]:
    """Adds optimizations to a copy of the catalogue, by name and what their files declare."""
    shutil.copytree(config_dir(), tmp_path / "configs")
    monkeypatch.setattr(choices_module, "__file__", str(tmp_path / "qwen3bench/config/choices.py"))

    def add(**declarations: str) -> None:
        for name, text in declarations.items():
            content = f"# @package opt.{name}\n_target_: somewhere.apply\norder: 90\n{text}"
            (tmp_path / f"configs/opt/{name}.yaml").write_text(content, encoding="utf-8")
        forget()

    def forget() -> None:
        for name in ("choices", "config_dir"):
            getattr(choices_module, name).cache_clear()

    yield add
    monkeypatch.undo()
    forget()


GROUPS = ("model", "opt", "workload", "runtime", "peer", "design", "measure", "cluster")
FIVE = ("flash", "tie", "mlp", "mask", "norm")
PUBLISHED = {  # layers, width, heads, key/value heads, feed-forward width, tied (Qwen3's report, table 1)
    "qwen3-0.6b": (28, 1024, 16, 8, 3072, True),
    "qwen3-1.7b": (28, 2048, 16, 8, 6144, True),
    "qwen3-4b": (36, 2560, 32, 8, 9728, True),
    "qwen3-8b": (36, 4096, 32, 8, 12288, False),
    "qwen3-14b": (40, 5120, 40, 8, 17408, False),
    "qwen3-32b": (64, 5120, 64, 8, 25600, False),
}


@pytest.mark.parametrize(("group", "name"), [(group, name) for group in GROUPS for name in choices(group)])
def test_every_yaml_composes(group: str, name: str) -> None:
    settings = compose([f"{group}={name}"])
    chosen = {
        "model": [settings.model.name],
        "opt": settings.opts,
        "workload": settings.workloads,
        "runtime": settings.runtimes,
        "peer": settings.peers,
        "design": [settings.design],
        "measure": [settings.measure.name],
        "cluster": ["ray"] if settings.cluster == "local" else [],
    }
    assert list(chosen[group]) == [name]


def test_every_yaml_is_in_a_tested_group_and_fits_on_a_screen() -> None:
    for path in config_dir().rglob("*.yaml"):
        relative = path.relative_to(config_dir())
        assert relative.parts[0] in (*GROUPS, "hydra", "config.yaml", "_hydra.yaml", "five.yaml"), relative
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 60, relative


def test_the_five_are_those_that_a_whole_design_brings() -> None:
    assert five() == tuple(compose(["design=full"]).factors)


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_are_the_published_ones(name: str) -> None:
    model = compose([f"model={name}"]).model
    shape = (model.num_layers, model.emb_dim, model.num_heads, model.num_kv_heads, model.hidden_dim)
    assert (*shape, model.tie_word_embeddings) == PUBLISHED[name]
    assert (model.head_dim, model.vocab_size, model.context_length) == (128, 151_936, 40_960)
    assert (model.rope_base, model.rms_norm_eps) == (1e6, 1e-6)


def test_defaults_measure_the_baseline_of_the_smallest_published_model() -> None:
    settings = compose([])
    assert settings.model.name == "qwen3-0.6b"
    assert settings.cells == [()]
    assert (settings.batch_size, settings.weights, settings.seed) == (1, "random", 0)
    assert "prefill" in settings.workloads


def test_full_without_names_is_the_five_in_label_order() -> None:
    settings = compose(["design=full"])
    assert settings.factors == FIVE
    assert len(settings.cells) == 32
    assert settings.cells[0] == ()
    assert label(settings.cells[-1]) == "flash+tie+mlp+mask+norm"


@pytest.mark.parametrize(
    ("argv", "cells"),
    [
        (["+opt=tie,flash"], ["baseline", "flash+tie"]),
        (["design=full", "opt=[tie,flash]"], ["baseline", "flash", "tie", "flash+tie"]),
        (["design=full", "opt="], ["baseline"]),
        (["design=each"], ["baseline", *FIVE]),
        (["design=each", "opt=norm"], ["baseline", "norm"]),
        (
            ["design=leave_one_out", "opt=flash,mask,norm"],
            ["baseline", "flash+mask+norm", "mask+norm", "flash+norm", "flash+mask"],
        ),
    ],
)
def test_designs_make_these_cells(argv: list[str], cells: list[str]) -> None:
    assert [label(cell) for cell in compose(argv).cells] == cells


SEVEN = "opt=flash,tie,mlp,mask,norm,qkv,gemv"


def test_a_screen_of_seven_has_64_cells_and_a_record_brings_them_back() -> None:
    settings = compose(["design=screen", SEVEN])
    assert len(settings.cells) == 64
    assert (settings.cells[0], settings.cells[-1]) == ((), settings.factors)
    recorded = settings.to_dict()
    assert recorded["design"]["measured"] == [label(cell) for cell in settings.cells]
    fewer = {**recorded, "design": {**recorded["design"], "measured": ["baseline", "flash"]}}
    assert settings_from(recorded).cells == settings.cells
    assert settings_from(fewer).labels == ["baseline", "flash"]  # as recorded, and not found again
    assert settings_from({**recorded, "design": {"name": "full"}}).design == "full"  # from before there were screens


def test_a_screen_takes_a_size_or_a_resolution() -> None:
    assert len(compose(["design=screen", SEVEN, "design.cells=40"]).cells) == 40
    assert len(compose(["design=screen", SEVEN, "design.resolution=4"]).cells) == 16
    for argv, message in (
        (["design=full", "design.cells=9"], r"design\.cells and design\.resolution are for design=screen"),
        (["design=screen", "design.resolution=2"], r"design\.resolution=2 is unknown: use 5 \| 4 \| 3"),
        (["design=screen", SEVEN, "design.cells=10"], r"ask for 29 or more"),
    ):
        with pytest.raises(UserError, match=message):
            compose(argv)


@pytest.mark.slow
def test_more_than_512_cells_are_refused_with_the_screen_that_would_do(own_switches: OwnSwitches) -> None:
    own_switches(**{f"own{i}": "" for i in range(5)})
    ten = "opt=flash,tie,mlp,mask,norm," + ",".join(f"own{i}" for i in range(5))
    with pytest.raises(
        UserError, match="1,024 cells; design=screen tells every main effect and pair of these 10 in 80"
    ):
        compose(["design=full", ten])
    assert len(compose(["design=full", ten, "design.force=true"]).cells) == 1024
    assert len(compose(["design=screen", ten]).cells) == 80


def test_switches_that_do_not_go_together_are_left_out_or_refused(own_switches: OwnSwitches) -> None:
    own_switches(own0="excludes: [flash]\n", own1="needs: [mask]\n")
    settings = compose(["design=screen", "opt=flash,mask,own0,own1"])
    assert settings.opts["own0"] == {"_target_": "somewhere.apply"}
    together = [set(cell) for cell in settings.cells]
    assert not any({"flash", "own0"} <= cell or ("own1" in cell and "mask" not in cell) for cell in together)
    assert len(together) == 9
    assert compose(["design=full", "opt=flash,mask,own0,own1"]).cells == settings.cells
    with pytest.raises(UserError, match=r"flash\+own0: own0 and flash exclude each other; switch one off"):
        compose(["opt=flash,own0"])
    with pytest.raises(UserError, match="own1 needs mask; name both"):
        compose(["opt=own1"])
    own_switches(own2="excludes: [nothing]\n")
    with pytest.raises(UserError, match=r"opt/own2\.yaml: excludes must be a list of other optimizations"):
        compose(["opt=own2"])


def test_generating_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"workload\.generate\.new_tokens must be a whole number"):
        compose(["workload=generate", "workload.generate.new_tokens=0"])


def test_only_a_prefill_can_leave_out_logits() -> None:
    settings = compose(["workload=prefill,decode", "prefill.logits_to_keep=1"])
    assert settings.to_dict()["workload"]["prefill"]["logits_to_keep"] == 1
    assert settings_from(settings.to_dict()) == settings
    assert "logits_to_keep" not in compose([]).to_dict()["workload"]["prefill"]
    with pytest.raises(UserError, match=r"workload\.prefill\.logits_to_keep must be 0 or 1, not 2"):
        compose(["prefill.logits_to_keep=2"])
    with pytest.raises(UserError, match=r"workload\.decode\.logits_to_keep: only a prefill"):
        compose(["workload=decode", "+workload.decode.logits_to_keep=1"])


def test_training_has_a_precision_and_nothing_else_has() -> None:
    with pytest.raises(UserError, match=r"workload\.train\.precision is not named: use auto \| amp \| bf16 \| fp32"):
        compose(["workload=train", "train.precision=null"])
    for option in ("precision=fp32", "clip=1.0"):
        with pytest.raises(UserError, match=r"workload\.prefill: precision and clip are for training alone"):
            compose(["workload=prefill,train", f"+workload.prefill.{option}"])


@pytest.mark.parametrize(("name", "fixed"), [("prefill", 0), ("decode", 1), ("train", 0)])
def test_how_many_tokens_are_generated_is_for_generate_alone(name: str, fixed: int) -> None:
    with pytest.raises(UserError, match=rf"workload\.{name}\.new_tokens is {fixed}; how many are generated is for"):
        compose([f"workload={name}", f"{name}.new_tokens=3"])
    assert compose([f"workload={name},generate", "new_tokens=3"]).workloads["generate"].new_tokens == 3


def test_what_an_older_record_lacks_is_left_out_where_it_changes_nothing() -> None:
    """Such a finished run is known again by a multirun, and compares as the same."""
    assert "threads" not in compose([]).to_dict()
    assert compose(["threads=2"]).to_dict()["threads"] == 2
    assert settings_from(compose([]).to_dict()).threads == "auto"


def test_a_sixth_optimization_needs_one_yaml_file_and_comes_last(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    import shutil

    from qwen3bench.config import choices as module

    shutil.copytree(config_dir(), tmp_path / "configs")
    sixth = "# @package opt.aqkv\n_target_: somewhere.aqkv.apply\n"  # no order asked for, first by name
    (tmp_path / "configs/opt/aqkv.yaml").write_text(sixth, encoding="utf-8")
    for cached in (module.choices, module.config_dir):
        cached.cache_clear()
    monkeypatch.setattr(module, "__file__", str(tmp_path / "qwen3bench/config/choices.py"))
    try:
        assert choices("opt")[:5] == FIVE
        assert choices("opt")[-1] == "aqkv"
        assert compose(["design=full"]).factors == FIVE
        assert label(compose(["opt=aqkv,norm"]).cells[-1]) == "norm+aqkv"
    finally:
        for cached in (module.choices, module.config_dir):
            cached.cache_clear()


def test_cuda_and_cpu_settle_what_auto_leaves_open() -> None:
    settings = compose(["workload=prefill,generate"])
    cuda, cpu = settings.resolved("cuda:1"), settings.resolved("cpu")
    assert (list(cuda.runtimes), cuda.dtype, cuda.prompt_tokens) == (["graph"], "bfloat16", 2048)
    assert (list(cpu.runtimes), cpu.dtype, cpu.prompt_tokens) == (["eager"], "float32", 16)
    assert cuda.workloads["generate"].prompt_tokens == 2048
    assert (cuda.target("graph"), cuda.target("compile"), cuda.target("eager")) == (0.0025, 0.0025, 0.01)
    assert cpu.target("compile") == 0.01
    assert compose(["measure.target=0.02"]).resolved("cuda").target("graph") == 0.02
    assert (cuda.time_allowed_s, cpu.time_allowed_s) == (60, 30)
    assert compose(["workload=train", "model=tiny"]).resolved("cpu").time_allowed_s == 18
    assert compose(["measure.max_seconds=7"]).resolved("cuda").time_allowed_s == 7


def test_what_the_command_line_settles_stays() -> None:
    argv = ["prompt_tokens=7", "dtype=float16", "runtime=auto,eager", "workload=decode", "measure.repeats=4"]
    settings = compose([*argv, "workload.decode.prompt_tokens=9"]).resolved("cpu")
    assert (settings.dtype, settings.prompt_tokens, settings.measure.repeats) == ("float16", 7, 4)
    assert settings.workloads["decode"].prompt_tokens == 9
    assert list(settings.runtimes) == ["eager"]


def test_a_short_context_shortens_the_default_prompt_and_refuses_a_longer_one() -> None:
    settings = compose(["model=tiny", "workload=generate"]).resolved("cuda")
    assert settings.prompt_tokens == settings.model.context_length - settings.new_tokens
    with pytest.raises(UserError, match=r"workload\.prefill needs 513 tokens.*context of 512"):
        compose(["model=tiny", "prompt_tokens=513"]).resolved("cpu")


def test_graph_is_refused_on_a_cpu() -> None:
    with pytest.raises(UserError, match=r"runtime=graph replays CUDA graphs.*cpu"):
        compose(["runtime=graph"]).resolved("cpu")


def _everything() -> Settings:
    argv = ["design=each", "workload=generate,decode", "runtime=eager,compile", "peer=transformers"]
    more = [
        "run.dir=a/b",
        "resume=a/b",
        "report.memory_limit_gib=2.5",
        "threads=3",
        "measure=thorough",
        "flash.backend=math",
    ]
    return compose([*argv, *more, "model=tiny", "seed=3"])


@pytest.mark.parametrize("device", [None, "cpu"])
def test_the_resolved_config_gives_the_settings_back(device: str | None) -> None:
    settings = _everything() if device is None else _everything().resolved(device)
    assert settings_from(settings.to_dict()) == settings
    assert settings_from(OmegaConf.create(OmegaConf.to_yaml(OmegaConf.create(settings.to_dict())))) == settings
    assert settings.to_dict()["opt"]["flash"]["backend"] == "math"
    assert list(settings.to_dict()["opt"]) == list(FIVE)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch_size=0", "batch_size must be a whole number"),
        ("batch_size=true", "batch_size must be a whole number"),
        ("batch_size=1.0", "batch_size must be a whole number"),
        ("new_tokens=null", "new_tokens must be"),
        ("prompt_tokens=-1", "prompt_tokens must be"),
        ("seed=-1", "seed must be"),
        ("seed=99999999999999999999", "seed must be"),
        ("device=tpu", "device must be .*cpu.*'tpu'"),
        ("device=cuda:x", "device must be .*'cuda:x'"),
        ("devices=[-1]", "devices must be all, or a list of cards .*-1"),
        ("devices=1.5", "devices must be all, or a list of cards .*1.5"),
        ("dtype=bf16", "dtype='bf16' is unknown: use auto | bfloat16.*did you mean bfloat16"),
        ("threads=0", "threads must be auto or a whole number above 0, not 0"),
        ("threads=all", "threads must be auto or a whole number above 0, not 'all'"),
        ("threads=null", "threads must be auto"),
        ("weights=null", "weights must be a text"),
        ("weights=''", "weights must be a text that is not empty"),
        ("analysis.band=0", "analysis.band must be a number above 0 and below 1"),
        ("analysis.confidence=95", "analysis.confidence must be"),
        ("analysis.band=.nan", "analysis.band must be"),
        ("report.memory_limit_gib=lots", "report.memory_limit_gib must be a number"),
        ("measure.step_timeout_s=3e6", "measure.step_timeout_s must be a number above 0 and below 1e\\+06"),
        ("measure.max_blocks=2", "measure.max_blocks=2 is below min_blocks=8"),
        ("measure=3", "a group is set to the name of an option"),
        ("model.num_heads=3", "num_heads=3 is no multiple"),
        ("model.num_layers=many", "model.num_layers must be"),
        ("model.tie_word_embeddings=perhaps", "model.tie_word_embeddings must be true or false"),
        ("model.name=3", "model.name must be a text"),
        ("+model.depth=3", "there is no setting 'model.depth'"),
        ("+measure.max_block=3", "there is no setting 'measure.max_block'.*did you mean max_blocks"),
        ("+sede=1", "there is no setting 'sede'.*did you mean seed"),
        ("~seed", "seed is missing"),
        ("~model.emb_dim", "model.emb_dim is missing"),
        ("seed=???", "Missing mandatory value: seed"),
        ("seed=${nowhere}", "'nowhere' not found"),
        ("opt.mlp=3", "opt.mlp must be a group of settings"),
        ("~opt.mlp._target_", "opt.mlp names no function"),
        ("workload=", "no workload is named"),
        ("runtime=[]", "no runtime is named"),
        ("+runtime.eagre.inductor=1", "there is no runtime 'eagre'; did you mean eager"),
        ("+peer.transformers.kernels=1", "peer.transformers must be a list"),
        ("peer=3", "a group is set to the name of an option"),
        ("design.name=all", "design.name='all' is unknown"),
        ("+workload.generate.tokens=1", "workload.generate.batch_size is missing"),
    ],
)
def test_a_wrong_value_is_named(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        compose(["opt=mlp", override])
    assert len(str(caught.value).splitlines()) <= 2


def test_a_runtime_that_does_not_exist_makes_no_settings() -> None:
    with pytest.raises(UserError, match="'grph'; did you mean graph"):
        replace(compose([]), runtimes={"grph": {}})


@pytest.mark.parametrize("group", ["runtime", "peer", "analysis"])
def test_a_group_is_no_list(group: str) -> None:
    with pytest.raises(UserError, match=f"{group} must be a group of settings"):
        settings_from(compose([]).to_dict() | {group: ["eager"]})


def test_settings_without_a_mapping_are_refused() -> None:
    config = replace(compose([]), seed=1).to_dict() | {"report": 3}
    with pytest.raises(UserError, match="report must be a group of settings"):
        settings_from(config)


@pytest.mark.parametrize(
    ("overrides", "device", "runtime", "processes"),
    [
        ([], "cpu", "eager", 3),
        ([], "cuda", "eager", 3),
        ([], "cuda", "graph", 5),
        ([], "cuda", "compile", 5),
        (["measure=quick"], "cuda", "graph", 3),
        (["measure.target=0.005"], "cpu", "eager", 5),
        (["measure.min_processes=2"], "cuda", "graph", 2),
        (["+peer=transformers"], "cpu", "eager", 5),
        (["+peer=transformers", "measure=quick"], "cpu", "eager", 5),
        (["+peer=transformers", "measure.min_processes=3"], "cpu", "eager", 3),
        (["measure=thorough"], "cpu", "eager", 5),
    ],
)
def test_narrow_intervals_and_ratios_to_others_take_more_processes(
    overrides: list[str], device: str, runtime: str, processes: int
) -> None:
    assert replace(compose(overrides), device=device).min_processes(runtime) == processes


def test_a_cluster_is_named_by_its_address() -> None:
    assert compose([]).cluster is None
    assert compose(["cluster=ray"]).cluster == "local"
    for address in ("auto", "10.0.0.1:6379", "node-1.local:6379"):
        settings = compose(["cluster=ray", f"cluster.address={address}"])
        assert settings.cluster == settings_from(settings.to_dict()).cluster == address
    for address in ("nowhere", "10.0.0.1", "ray://a:1", ":6379"):
        with pytest.raises(UserError, match=r"cluster\.address must be local, auto, or HOST:PORT"):
            compose(["cluster=ray", f"cluster.address='{address}'"])


@pytest.mark.parametrize(
    ("overrides", "device", "blocks"),
    [([], "cpu", 2), ([], "cuda:0", 3), (["measure=thorough"], "cpu", 2), (["measure.blocks_per_process=4"], "cpu", 4)],
)
def test_a_process_times_fewer_blocks_on_a_cpu(overrides: list[str], device: str, blocks: int) -> None:
    assert replace(compose(overrides), device=device).blocks_per_process == blocks


@pytest.mark.parametrize(
    ("override", "devices"),
    [
        ("devices=all", ("all",)),
        ("devices=[0,1,0]", ("0", "1")),
        ("devices=1", ("1",)),
        ("devices=[GPU-1b,MIG-2c]", ("GPU-1b", "MIG-2c")),
        ("seed=0", ()),
    ],
)
def test_cards_are_named_by_number_or_uuid(override: str, devices: tuple[str, ...]) -> None:
    settings = compose([override])
    assert settings.devices == devices
    assert settings_from(settings.to_dict()).devices == devices
