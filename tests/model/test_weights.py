import json
import math
import os
import struct
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from qwen3bench.config.checkpoint_source import checkpoint_shape, find_checkpoint
from qwen3bench.config.choices import options_of
from qwen3bench.config.model_config import ModelConfig
from qwen3bench.errors import UserError
from qwen3bench.model.checkpoint import StoredTensor, tensor_shapes
from qwen3bench.model.weights import (
    head_is_tied,
    judge_weights,
    largest_that_fits,
    load_weights,
    refuse_untied,
    stacked,
    weights_fingerprint,
)

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CONFIG = ModelConfig(num_layers=2, emb_dim=16, num_heads=4, num_kv_heads=2, head_dim=8, hidden_dim=24, vocab_size=97)


def make_peer(*, tied: bool, seed: int = 0) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    peer = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=97,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            tie_word_embeddings=tied,
        )
    )
    for parameter in peer.parameters():
        torch.nn.init.normal_(parameter)  # norm gains too, so that none can be taken for another
    return peer


def save_peer(peer: Qwen3ForCausalLM, directory: Path, **options: str) -> tuple[Path, ModelConfig]:
    peer.save_pretrained(directory, **options)
    return directory, ModelConfig.from_pretrained(directory)


def assert_equal(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, expected[name]), name


def assert_bank(weights: dict[str, torch.Tensor], config: ModelConfig) -> None:
    """Nothing is stored twice, and what a fused layout joins already lies together."""
    for layer in range(config.num_layers):
        at = f"model.layers.{layer}."
        for parts in (
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("mlp.gate_proj", "mlp.up_proj"),
        ):
            tensors = [weights[f"{at}{part}.weight"] for part in parts]
            whole = stacked(*tensors)
            assert whole.untyped_storage().data_ptr() == tensors[0].untyped_storage().data_ptr()
            assert torch.equal(whole, torch.cat(tensors))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in weights.values()}
    tensors = [t for name, t in weights.items() if name != HEAD or t is not weights[EMBEDDING]]
    assert sum(storages.values()) == sum(t.nbytes for t in tensors)


def test_tensor_shapes_are_those_of_transformers() -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in make_peer(tied=False).state_dict().items()}
    assert tensor_shapes(CONFIG) == expected


# Checkpoints that transformers writes


@pytest.mark.parametrize("shard", ["1GB", "10KB"])
@pytest.mark.parametrize("tied", [True, False])
def test_checkpoint_has_the_values_that_were_saved(tmp_path: Path, tied: bool, shard: str) -> None:
    peer = make_peer(tied=tied)
    directory, config = save_peer(peer, tmp_path / "peer", max_shard_size=shard)
    assert (directory / "model.safetensors").exists() == (shard == "1GB")
    weights = load_weights(directory, config)
    assert_equal(weights, peer.state_dict())
    assert_bank(weights, config)
    assert (weights[HEAD] is weights[EMBEDDING]) == tied
    assert head_is_tied(weights) == tied


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_converts_as_torch_does(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    peer = make_peer(tied=True).to(stored)
    directory, config = save_peer(peer, tmp_path / "peer")
    weights = load_weights(directory, config, dtype=wanted)
    assert_equal(weights, {name: tensor.to(wanted) for name, tensor in peer.state_dict().items()})
    assert_bank(weights, config)


def test_config_of_transformers_4_reads_as_that_of_5(tmp_path: Path) -> None:
    directory, config = save_peer(make_peer(tied=True), tmp_path / "peer")
    written = json.loads((directory / "config.json").read_text())
    assert written["rope_parameters"]["rope_theta"] == config.rope_base
    del written["rope_parameters"]
    old = written | {"rope_theta": 5e5, "rope_scaling": None, "torch_dtype": "float32"}
    (directory / "config.json").write_text(json.dumps(old))
    assert ModelConfig.from_pretrained(directory).rope_base == 5e5
    with pytest.raises(UserError, match=r"rope_base.* 500000.0.* 10000.0"):
        load_weights(directory, config)


def test_config_with_a_key_twice_is_refused(tmp_path: Path) -> None:
    directory, _ = save_peer(make_peer(tied=True), tmp_path / "peer")
    text = (directory / "config.json").read_text()
    (directory / "config.json").write_text(text.replace("{", '{"rms_norm_eps": 1e-5,', 1))
    with pytest.raises(UserError, match=r"config.json: .*'rms_norm_eps' .*twice"):
        ModelConfig.from_pretrained(directory)


def rewrite(directory: Path, **changes: torch.Tensor) -> None:
    path = directory / "model.safetensors"
    save_file(load_file(path) | {name.replace("__", "."): t for name, t in changes.items()}, path)


def test_head_stored_beside_a_tied_config_counts_by_its_values(tmp_path: Path) -> None:
    directory, config = save_peer(make_peer(tied=True), tmp_path / "peer")
    embedding = load_file(directory / "model.safetensors")[EMBEDDING]
    rewrite(directory, lm_head__weight=embedding.clone())
    weights = load_weights(directory, config)
    assert weights[HEAD] is weights[EMBEDDING]
    assert_bank(weights, config)

    other = embedding.clone()
    other[-1, -1] = torch.nextafter(other[-1, -1], torch.tensor(torch.inf))
    rewrite(directory, lm_head__weight=other)
    weights = load_weights(directory, config)
    assert torch.equal(weights[HEAD], other)
    assert torch.equal(weights[EMBEDDING], embedding)
    with pytest.raises(UserError, match=r"tie: .*head"):
        refuse_untied(weights)


def test_tie_is_allowed_where_an_untied_head_has_the_embedding_s_values(tmp_path: Path) -> None:
    peer = make_peer(tied=False)
    peer.lm_head.weight.data.copy_(peer.model.embed_tokens.weight)
    directory, config = save_peer(peer, tmp_path / "peer")
    weights = load_weights(directory, config)
    assert weights[HEAD] is not weights[EMBEDDING]
    refuse_untied(weights)


def test_rotary_frequencies_of_old_checkpoints_are_ignored(tmp_path: Path) -> None:
    directory, config = save_peer(make_peer(tied=True), tmp_path / "peer")
    rewrite(directory, model__rotary_emb__inv_freq=torch.ones(4))
    assert load_weights(directory, config).keys() == tensor_shapes(config).keys()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [EMBEDDING, "model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_non_finite_value_is_refused_by_name(tmp_path: Path, name: str, value: float) -> None:
    peer = make_peer(tied=True)
    peer.get_parameter(name).data.view(-1)[-1] = value
    directory, config = save_peer(peer, tmp_path / "peer")
    with pytest.raises(UserError, match=f"model.safetensors: {name} .*NaN"):
        load_weights(directory, config)


def test_value_that_the_dtype_cannot_hold_is_refused(tmp_path: Path) -> None:
    peer = make_peer(tied=True)
    peer.model.norm.weight.data[0] = 1e6
    directory, config = save_peer(peer, tmp_path / "peer")
    load_weights(directory, config, dtype=torch.bfloat16)
    with pytest.raises(UserError, match=r"model.norm.weight .*torch.float16"):
        load_weights(directory, config, dtype=torch.float16)


def test_file_that_changes_while_it_is_read_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, config = save_peer(make_peer(tied=True), tmp_path / "peer")
    monkeypatch.setattr(
        "qwen3bench.model.weights.locate_tensors",
        lambda *_, **__: {HEAD: StoredTensor(directory / "config.json", HEAD)},
    )
    with pytest.raises(UserError, match=r"config.json: lm_head.weight"):
        load_weights(directory, config)


# Random weights


def test_random_weights_follow_the_seed_and_the_initializer() -> None:
    weights = load_weights("random", CONFIG, seed=3)
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == tensor_shapes(CONFIG)
    assert_equal(load_weights("random", CONFIG, seed=3), weights)
    assert weights[HEAD] is weights[EMBEDDING]
    assert_bank(weights, CONFIG)
    other = load_weights("random", CONFIG, seed=4)
    for name, tensor in weights.items():
        if name.endswith("norm.weight"):
            assert (tensor == 1).all()
        else:
            assert not torch.isin(tensor, other[name]).all()
    values = torch.cat(
        [t.flatten() for name, t in weights.items() if not name.endswith("norm.weight") and name != HEAD]
    )
    assert abs(values.mean()) < 4 * 0.02 / len(values) ** 0.5
    assert abs(values.std() - 0.02) < 4 * 0.02 / (2 * len(values)) ** 0.5
    assert len(values.unique()) > 0.99 * len(values)  # no tensor repeats another


def test_random_weights_do_not_depend_on_the_number_of_threads() -> None:
    config = ModelConfig(
        num_layers=3, emb_dim=64, num_heads=4, num_kv_heads=2, head_dim=16, hidden_dim=96, vocab_size=500
    )
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = load_weights("random", config)
        torch.set_num_threads(4)
        four = load_weights("random", config)
    finally:
        torch.set_num_threads(threads)
    assert_equal(one, four)


def test_random_weights_leave_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    load_weights("random", CONFIG)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_random_weights_are_the_same_in_every_dtype(dtype: torch.dtype) -> None:
    weights = load_weights("random", CONFIG, dtype=dtype)
    assert_equal(weights, {name: t.to(dtype) for name, t in load_weights("random", CONFIG).items()})
    assert_bank(weights, CONFIG)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_on_cuda(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = load_weights("random", CONFIG, device="cuda", dtype=dtype, seed=5)
    assert_bank(weights, CONFIG)
    assert_equal(load_weights("random", CONFIG, device="cuda", dtype=dtype, seed=5), weights)
    peer = make_peer(tied=False)
    directory, config = save_peer(peer, tmp_path / "peer")
    weights = load_weights(directory, config, device="cuda", dtype=dtype)
    assert_equal(weights, {name: t.to("cuda", dtype) for name, t in peer.state_dict().items()})
    assert_bank(weights, config)


# Row slices of one tensor


def test_stacked_is_a_view_only_of_consecutive_rows() -> None:
    whole = torch.arange(24.0).view(8, 3)

    def shares(tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()

    assert shares(stacked(whole[2:4], whole[4:7], whole[7:]))
    assert torch.equal(stacked(whole[2:4], whole[4:7], whole[7:]), whole[2:])
    assert torch.equal(stacked(whole[1:3]), whole[1:3])
    apart = {
        "gap": (whole[:2], whole[3:]),
        "overlap": (whole[:3], whole[2:]),
        "reversed": (whole[4:], whole[:4]),
        "another storage": (whole[:4], whole[4:].clone()),
        "columns": (whole[:4, :2], whole[4:, :2]),
        "transposed": (whole.t()[:1], whole.t()[1:]),
        "the same twice": (whole[:4], whole[:4]),
        "every other row, first": (whole[0:4:2], whole[2:4]),
        "every other row, second": (whole[:2], whole[2:6:2]),
    }
    for name, tensors in apart.items():
        assert not shares(stacked(*tensors)), name
        assert torch.equal(stacked(*tensors), torch.cat(tensors)), name


def test_stacked_takes_parameters_and_meta_tensors() -> None:
    whole = torch.randn(8, 3)
    parameters = [torch.nn.Parameter(part) for part in whole.split(4)]
    joined = stacked(*parameters)
    assert joined.data_ptr() == whole.data_ptr()
    assert not joined.requires_grad
    meta = torch.empty(8, 3, device="meta")
    assert stacked(meta[:4], meta[4:]).untyped_storage() is meta.untyped_storage()
    assert stacked(meta[:4], torch.empty(8, 3, device="meta")[4:]).untyped_storage() is not meta.untyped_storage()


# Where weights come from


def test_hub_id_is_fetched_without_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = make_peer(tied=True)
    directory, config = save_peer(peer, tmp_path / "peer")
    asked = []

    def snapshot_download(repo_id: str, allow_patterns: list[str]) -> str:
        asked.append((repo_id, allow_patterns))
        return str(directory)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert_equal(load_weights("Qwen/Qwen3-0.6B", config), peer.state_dict())
    assert asked == [("Qwen/Qwen3-0.6B", ["*.json", "*.safetensors"])]


def test_hub_id_gives_the_shape_from_its_config_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, config = save_peer(make_peer(tied=True), tmp_path / "0123abcd")
    asked = []

    def snapshot_download(repo_id: str, allow_patterns: list[str]) -> str:
        asked.append((repo_id, allow_patterns))
        return str(directory)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert checkpoint_shape("Qwen/Qwen3-0.6B") == replace(config, name="Qwen3-0.6B")
    assert asked == [("Qwen/Qwen3-0.6B", ["config.json"])]


def test_hub_that_does_not_answer_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(*args: object, **options: object) -> str:
        raise RuntimeError("404 Client Error.\n\nRepository Not Found\n")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(UserError, match=r"Qwen/None.*404 Client Error") as caught:
        load_weights("Qwen/None", CONFIG)
    assert "\n" not in str(caught.value)


def test_no_network_is_one_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"Qwen/Qwen3-0\.6B") as caught:
        find_checkpoint("Qwen/Qwen3-0.6B")
    assert "\n" not in str(caught.value)


def test_hub_id_without_huggingface_hub_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        find_checkpoint("Qwen/Qwen3-0.6B")


@pytest.mark.parametrize("source", ["", "nowhere", "/no/where", "./a/b", "../a", "a/b/c", "a\0b", "a/b\n", "x" * 5000])
def test_what_is_neither_directory_nor_hub_id_asks_no_hub(
    source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(UserError):
        load_weights(source, CONFIG)


def test_file_in_place_of_a_directory_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.pt")  # opening it would wait for ever
    with pytest.raises(UserError, match=r"model.pt: is a file"):
        load_weights(tmp_path / "model.pt", CONFIG)


def test_fingerprint_tells_weights_apart(tmp_path: Path) -> None:
    assert weights_fingerprint("random", 0) == "random:seed=0"
    assert weights_fingerprint("random", 1) == "random:seed=1"
    peer = make_peer(tied=True)
    prints = [weights_fingerprint(save_peer(peer, tmp_path / name)[0]) for name in ("one", "two")]
    assert prints[0] == prints[1]
    assert prints[0].startswith("sha256:")
    peer.model.layers[0].mlp.up_proj.weight.data[7, 7] += 1e-3
    assert weights_fingerprint(save_peer(peer, tmp_path / "one")[0]) != prints[0]
    assert weights_fingerprint(save_peer(peer, tmp_path / "shards", max_shard_size="10KB")[0]) != prints[0]


def test_fingerprint_of_what_is_missing_is_one_error(tmp_path: Path) -> None:
    directory, _ = save_peer(make_peer(tied=True), tmp_path / "peer", max_shard_size="10KB")
    next(directory.glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match=r"\.safetensors. is not there"):
        weights_fingerprint(directory)


# A backbone


def save_backbone(peer: Qwen3ForCausalLM, directory: Path) -> ModelConfig:
    """Save the peer as embedding and reranking models are published: without the head, and without `model.`."""
    peer.model.save_pretrained(directory)
    assert "embed_tokens.weight" in load_file(directory / "model.safetensors")
    assert json.loads((directory / "config.json").read_text())["architectures"] == ["Qwen3Model"]
    return ModelConfig.from_pretrained(directory)


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "10KB"}])
def test_a_backbone_loads_as_in_transformers(tmp_path: Path, shards: dict[str, str]) -> None:
    peer = make_peer(tied=True)
    config = save_backbone(peer, tmp_path)
    if shards:
        (tmp_path / "model.safetensors").unlink()
        peer.model.save_pretrained(tmp_path, **shards)
    weights = load_weights(tmp_path, config)
    assert_equal(weights, AutoModelForCausalLM.from_pretrained(tmp_path).state_dict())
    assert_bank(weights, config)


def test_a_backbone_that_does_not_tie_has_the_embedding_for_a_head(tmp_path: Path) -> None:
    peer = make_peer(tied=False)
    weights = load_weights(tmp_path, save_backbone(peer, tmp_path))
    assert weights[HEAD] is weights[EMBEDDING]
    assert_equal(
        {name: weights[name] for name in weights if name != HEAD},
        {name: tensor for name, tensor in peer.state_dict().items() if name != HEAD},
    )


def test_what_is_wrong_with_a_backbone_is_told_by_its_own_name(tmp_path: Path) -> None:
    config = save_backbone(make_peer(tied=True), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"layers.0.extra": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"'layers\.0\.extra' is no part"):
        load_weights(tmp_path, config)
    save_file(tensors | {"norm.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r": norm\.weight has shape \(3,\)"):
        load_weights(tmp_path, config)


# Memory


@pytest.mark.parametrize("source", ["random", "checkpoint"])
def test_more_than_memory_is_refused_before_any_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    directory, config = save_peer(make_peer(tied=True), tmp_path / "checkpoint")
    place = "random" if source == "random" else str(directory)
    needed = 4 * sum(math.prod(shape) for name, shape in tensor_shapes(config).items() if name != HEAD)
    monkeypatch.setattr("qwen3bench.model.weights.available_memory_bytes", lambda: needed)
    load_weights(place, config)
    monkeypatch.setattr("qwen3bench.model.weights.available_memory_bytes", lambda: needed - 1)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: pytest.fail("asked for memory"))
    with pytest.raises(UserError, match=r"needs .* GB in float32 for its weights alone, and the memory here has .* GB"):
        load_weights(place, config)


def test_a_sparse_file_of_512_gib_is_refused_unread(tmp_path: Path) -> None:
    vocabulary = 2**37 // CONFIG.emb_dim // 2
    huge = replace(CONFIG, vocab_size=vocabulary, tie_word_embeddings=True)
    assert write_sparse(tmp_path / "huge", huge) > 2**39  # its head is stored beside the embedding
    with pytest.raises(
        UserError, match=r"needs 549\.8 GB in float32 .*, and the memory here has 68\.7 GB; qwen3-8b fits"
    ):
        judge_weights(str(tmp_path / "huge"), huge, torch.float32, 2**36)
    judge_weights(str(tmp_path / "huge"), huge, torch.float32, None)


@pytest.mark.parametrize(
    ("model", "dtype", "memory_gib", "told"),
    [
        ("qwen3-8b", torch.bfloat16, 8, "qwen3-8b needs 16.4 GB in bfloat16 .* has 8.6 GB; qwen3-1.7b fits"),
        ("qwen3-4b", torch.float16, 8, "qwen3-4b needs 8.8 GB in float16 .* has 8.6 GB; qwen3-1.7b fits"),
        ("qwen3-14b", torch.float16, 15, "qwen3-14b needs 29.5 GB in float16 .* has 16.1 GB; qwen3-4b fits"),
        ("qwen3-32b", torch.bfloat16, 40, "qwen3-32b needs 65.5 GB in bfloat16 .* has 42.9 GB; qwen3-8b fits"),
        ("qwen3-0.6b", torch.float32, 2, "qwen3-0.6b needs 3.0 GB in float32 .* has 2.1 GB; tiny fits"),
        ("tiny", torch.float32, 1e-4, "tiny needs .*; name a smaller model or another device"),
    ],
)
def test_what_does_not_fit_a_card_is_refused_with_what_does(
    model: str, dtype: torch.dtype, memory_gib: float, told: str
) -> None:
    config = ModelConfig(**options_of("model", model))
    with pytest.raises(UserError, match=told):
        judge_weights("random", config, dtype, int(memory_gib * 2**30))
    if fitting := largest_that_fits(dtype, int(memory_gib * 2**30)):
        judge_weights("random", ModelConfig(**options_of("model", fitting)), dtype, int(memory_gib * 2**30))


LARGE = ModelConfig(
    num_layers=4, emb_dim=768, num_heads=8, num_kv_heads=4, head_dim=64, hidden_dim=2048, vocab_size=8192
)
MEASURE = """
    import sys
    from pathlib import Path
    from qwen3bench.errors import UserError
    from qwen3bench.config.model_config import ModelConfig
    from qwen3bench.model.weights import load_weights

    def memory_bytes(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    for directory in sys.argv[1:]:
        before = memory_bytes("VmRSS")
        try:
            load_weights(directory, ModelConfig.from_pretrained(directory))
            outcome = "loaded"
        except UserError:
            outcome = "refused"
        print(outcome, memory_bytes("VmHWM") - before)
"""


def write_sparse(directory: Path, shape: ModelConfig) -> int:
    """A sparse float32 checkpoint of `shape`, all zeros; its size in bytes."""
    config = {
        "model_type": "qwen3",
        "vocab_size": shape.vocab_size,
        "num_hidden_layers": shape.num_layers,
        "hidden_size": shape.emb_dim,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.hidden_dim,
        "max_position_embeddings": shape.context_length,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_theta": shape.rope_base,
        "tie_word_embeddings": shape.tie_word_embeddings,
    }
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    position, header = 0, {}
    for name, sizes in tensor_shapes(shape).items():
        end = position + 4 * math.prod(sizes)
        header[name] = {"dtype": "F32", "shape": sizes, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + position)
    return 8 + len(text) + position


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_memory_stays_below_twice_the_file(tmp_path: Path) -> None:
    small, _ = save_peer(make_peer(tied=False), tmp_path / "small")  # takes what the libraries take once
    # The peak is the process's, so what must stay lowest comes first.
    names = ("truncated", "oversized", "nan", "sound")
    for name in names:
        file_bytes = write_sparse(tmp_path / name, LARGE)
    with (tmp_path / "truncated" / "model.safetensors").open("r+b") as file:
        file.truncate(file_bytes - 1)
    with (tmp_path / "oversized" / "model.safetensors").open("r+b") as file:
        file.write(struct.pack("<Q", file_bytes - 8))
    with (tmp_path / "nan" / "model.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(struct.pack("<f", math.nan))

    command = [
        sys.executable,
        "-c",
        textwrap.dedent(MEASURE),
        str(small),
        *(str(tmp_path / name) for name in names),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    outcomes, peaks = zip(*(line.split() for line in result.stdout.splitlines()), strict=True)
    assert outcomes == ("loaded", "refused", "refused", "refused", "loaded")
    truncated, oversized, nan, sound = (int(peak) / file_bytes for peak in peaks[1:])
    assert max(truncated, oversized) < 1 / 4
    assert max(nan, sound) < 2
