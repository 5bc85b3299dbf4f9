import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen3bench.config.model_config import ModelConfig
from qwen3bench.config.strict_json import parse_json
from qwen3bench.errors import UserError
from qwen3bench.model.checkpoint import StoredTensor, locate_tensors, tensor_shapes
from qwen3bench.model.weights import load_weights

CONFIG = ModelConfig(
    num_layers=2,
    emb_dim=8,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    hidden_dim=12,
    vocab_size=31,
    context_length=64,
    rope_base=10_000.0,
    tie_word_embeddings=True,
)
CONFIG_JSON = {
    "model_type": "qwen3",
    "vocab_size": 31,
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "intermediate_size": 12,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.norm.weight"


def make_header(names: list[str]) -> dict[str, dict]:
    """A float32 header that lays the named tensors one after the other."""
    header, position = {}, 0
    for name in names:
        shape = tensor_shapes(CONFIG)[name]
        end = position + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    return header


def write_tensors(path: Path, header: dict | bytes, data_bytes: int) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + struct.pack("<f", 0.5) * (data_bytes // 4))


def data_bytes(header: dict) -> int:
    return max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")


def stored_names() -> list[str]:
    return [name for name in tensor_shapes(CONFIG) if name != "lm_head.weight"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The directory of a sound tied checkpoint, every value 0.5."""
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG_JSON))
    header = make_header(stored_names())
    write_tensors(directory / "model.safetensors", header, data_bytes(header))
    return directory


@pytest.fixture
def sharded(checkpoint: Path) -> Path:
    """The same in two shards and an index."""
    (checkpoint / "model.safetensors").unlink()
    names = stored_names()
    weight_map = {}
    for shard, part in (("a.safetensors", names[:9]), ("b.safetensors", names[9:])):
        header = make_header(part)
        write_tensors(checkpoint / shard, header, data_bytes(header))
        weight_map |= dict.fromkeys(part, shard)
    write_index(checkpoint, weight_map)
    return checkpoint


def write_index(directory: Path, weight_map: object) -> None:
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def read_index(directory: Path) -> dict[str, str]:
    return json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]


def assert_refused(directory: Path, *named: object, config: ModelConfig = CONFIG) -> None:
    """Loading is one short line that holds each of `named`, and no tensor is allocated before it."""

    def allocate(*args: object, **options: object) -> None:
        raise AssertionError("allocated before the checkpoint was judged")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", allocate)
        with pytest.raises(UserError) as caught:
            load_weights(directory, config)
    told = str(caught.value)
    for each in (directory, *named):
        assert str(each) in told
    assert "\n" not in told
    assert len(told) < 400 + 2 * len(str(directory))


def test_the_sound_checkpoints_load(checkpoint: Path) -> None:
    weights = load_weights(checkpoint, CONFIG)
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == tensor_shapes(CONFIG)
    assert all((tensor == 0.5).all() for tensor in weights.values())


def test_the_sound_shards_load(sharded: Path) -> None:
    assert list(load_weights(sharded, CONFIG)) == list(tensor_shapes(CONFIG))


def entry(header: dict, name: str, **changes: object) -> dict:
    return header | {name: header[name] | changes}


def without(header: dict, name: str) -> dict:
    return make_header([other for other in header if other != name])


def shifted(header: dict, name: str, by: int) -> dict:
    """`name` and all tensors after it moved by `by` bytes."""
    first = header[name]["data_offsets"][0]
    return {
        other: item
        | {
            "data_offsets": [
                offset + (by if item["data_offsets"][0] >= first else 0) for offset in item["data_offsets"]
            ]
        }
        for other, item in header.items()
    }


# What is done to a sound header, and what the error names beside the file.
HEADERS = {
    "overlap": (lambda h: shifted(h, UP, -4), UP),
    "same bytes twice": (lambda h: h | {"model.extra": h[UP]}, "offset"),  # either of the two is named
    "hole": (lambda h: shifted(h, UP, 4), UP),
    "hole at the start": (lambda h: shifted(h, stored_names()[0], 4), stored_names()[0]),
    "unknown dtype": (lambda h: entry(h, UP, dtype="F99"), "F99"),
    "integer dtype": (lambda h: entry(h, UP, dtype="I32"), f"'{UP}' has dtype I32"),
    "eight-bit dtype": (lambda h: without(h, UP) | eight_bit(h), f"'{UP}' has dtype F8_E4M3"),
    "dtype no string": (lambda h: entry(h, UP, dtype=["F32"]), "expected string"),
    "fewer bytes than the shape": (lambda h: entry(h, UP, shape=[12, 9]), "invalid shape"),
    "shape beyond memory": (lambda h: entry(h, UP, shape=[2**62, 2**62]), "overflow"),
    "negative size": (lambda h: entry(h, UP, shape=[-12, -8]), "-12"),
    "size no integer": (lambda h: entry(h, UP, shape=[12.0, 8]), "12.0"),
    "size a boolean": (lambda h: entry(h, UP, shape=[True, 96]), "boolean"),
    "offsets reversed": (lambda h: entry(h, UP, data_offsets=h[UP]["data_offsets"][::-1]), "offset"),
    "three offsets": (lambda h: entry(h, UP, data_offsets=[0, 1, 2]), "length 3"),
    "entry no object": (lambda h: h | {UP: 7}, "integer `7`"),
    "entry with more": (lambda h: entry(h, UP, pad=1), UP),
    "metadata no strings": (lambda h: h | {"__metadata__": {"format": 1}}, "expected a string"),
    "metadata no object": (lambda h: h | {"__metadata__": "pt"}, "expected a map"),
    "missing tensor": (lambda h: without(h, UP), f"'{UP}' is missing"),
    "name of a megabyte's length": (lambda h: entry(h, UP, dtype="X" * 10**5), "XXX"),
}


def eight_bit(header: dict) -> dict:
    """An entry for `UP` of one byte an element, after the float32 tensors."""
    end = data_bytes(without(header, UP))
    shape = header[UP]["shape"]
    return {UP: {"dtype": "F8_E4M3", "shape": shape, "data_offsets": [end, end + math.prod(shape)]}}


@pytest.mark.parametrize(("change", "named"), HEADERS.values(), ids=HEADERS.keys())
def test_malformed_header_is_one_error(checkpoint: Path, change, named: str) -> None:
    header = change(make_header(stored_names()))
    sizes = [e["data_offsets"][1] for e in header.values() if isinstance(e, dict) and "data_offsets" in e]
    write_tensors(checkpoint / "model.safetensors", header, max(sizes))
    file = ["model.safetensors"] if UP in header else []  # a missing tensor is in no file
    assert_refused(checkpoint, named, *file)


SOUND = json.dumps(make_header(stored_names())).encode()
DATA = data_bytes(make_header(stored_names()))
TEXTS = {
    "bad UTF-8": (SOUND.replace(b"norm", b"n\xffrm", 1), "UTF-8"),
    "overlong UTF-8": (SOUND.replace(b"norm", b"\xc0\xae", 1), "UTF-8"),
    "byte order mark": (b"\xef\xbb\xbf" + SOUND, "JSON"),
    "no JSON": (b"{" + SOUND, "JSON"),
    "a list": (b"[" + SOUND + b"]", "JSON"),
    "text after the object": (SOUND + b"{}", "trailing characters"),
    "NaN": (SOUND.replace(b"[31, 8]", b"[NaN, 8]"), "JSON"),
    "too many digits": (SOUND.replace(b"[31, 8]", b"[31" + b"0" * 5000 + b", 8]"), "JSON"),
    "deep nesting": (b'{"a":' * 50_000, "recursion"),
    "a tensor twice": (SOUND[:-1] + b", " + SOUND[1:], "'model.embed_tokens.weight' occurs twice"),
    "a key of a tensor twice": (
        SOUND.replace(b'"dtype"', b'"dtype": "F64", "dtype"', 1),
        "dtype",
    ),
    "the metadata twice": (
        b'{"__metadata__":{},"__metadata__":{},' + SOUND[1:],
        "duplicate field `__metadata__`",
    ),
}


@pytest.mark.parametrize(("text", "named"), TEXTS.values(), ids=TEXTS.keys())
def test_malformed_header_text_is_one_error(checkpoint: Path, text: bytes, named: str) -> None:
    write_tensors(checkpoint / "model.safetensors", text, DATA)
    assert_refused(checkpoint, "model.safetensors", named)


def test_the_spaces_that_writers_pad_a_header_with_are_fine(checkpoint: Path) -> None:
    write_tensors(checkpoint / "model.safetensors", SOUND + b"   ", DATA)
    assert len(load_weights(checkpoint, CONFIG)) == 25


FILES = {
    "empty": (lambda b: b"", "too small"),
    "seven bytes": (lambda b: b[:7], "too small"),
    "truncated in the header": (lambda b: b[:100], "header"),
    "truncated in the data": (lambda b: b[:-1], "not fully covered"),
    "no data": (lambda b: b[: 8 + len(SOUND)], "not fully covered"),
    "trailing byte": (lambda b: b + b"\0", "not fully covered"),
    "oversized header": (lambda b: b"\0\0\0\0\0\0\0\x01" + b[8:], "oversized header"),
    "largest header": (lambda b: b"\xff" * 8 + b[8:], "oversized header"),
    "header over the limit, file as large": (lambda b: struct.pack("<Q", 2**21) + b" " * 2**21, "oversized header"),
    "empty header": (lambda b: struct.pack("<Q", 0) + b[8:], "JSON"),
    "zip pickle": (lambda b: b"PK\x03\x04" + b[4:], "pickle"),
    "old pickle": (lambda b: b"\x80\x02\x8a\x0al\xfc\x9cF" + b[8:], "pickle"),
}


@pytest.mark.parametrize(("change", "named"), FILES.values(), ids=FILES.keys())
def test_malformed_file_is_one_error(checkpoint: Path, change, named: str) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))
    assert_refused(checkpoint, path, named)


def test_extra_tensor_is_refused(checkpoint: Path) -> None:
    header = make_header(stored_names())
    header |= {"model.layers.2.x": {"dtype": "F32", "shape": [1], "data_offsets": [DATA, DATA + 4]}}
    write_tensors(checkpoint / "model.safetensors", header, DATA + 4)
    assert_refused(checkpoint, "model.safetensors", "'model.layers.2.x' is no part")


@pytest.mark.parametrize("shape", [[8, 12], [96], [12, 8, 1]])
def test_misshapen_tensor_is_refused_with_both_shapes(checkpoint: Path, shape: list[int]) -> None:
    header = entry(make_header(stored_names()), UP, shape=shape)
    write_tensors(checkpoint / "model.safetensors", header, DATA)
    assert_refused(checkpoint, "model.safetensors", UP, tuple(shape), (12, 8))


def test_untied_checkpoint_needs_its_head(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text(json.dumps(CONFIG_JSON | {"tie_word_embeddings": False}))
    assert_refused(checkpoint, "'lm_head.weight' is missing")


def test_several_missing_tensors_are_counted(checkpoint: Path) -> None:
    header = make_header(stored_names()[:-3])
    write_tensors(checkpoint / "model.safetensors", header, data_bytes(header))
    assert_refused(checkpoint, "up_proj.weight' and 2 more are missing")


def test_what_is_no_regular_file_is_refused(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    os.mkfifo(checkpoint / "model.safetensors")  # opening one would wait for ever
    assert_refused(checkpoint, "is no regular file")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickle_is_refused_unread(checkpoint: Path, name: str) -> None:
    (checkpoint / "model.safetensors").unlink()
    os.mkfifo(checkpoint / name)  # opening it would wait for ever
    assert_refused(checkpoint, f"{name}: a pickle")


def test_pickle_beside_safetensors_is_ignored(checkpoint: Path) -> None:
    os.mkfifo(checkpoint / "pytorch_model.bin")
    assert len(load_weights(checkpoint, CONFIG)) == 25


def test_directory_without_weights_is_refused(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    assert_refused(checkpoint, "no model.safetensors")


# The index


@pytest.mark.parametrize("target", ["../b.safetensors", "/etc/hostname.safetensors", "sub/../../b.safetensors", ".."])
def test_index_that_points_outside_is_refused(sharded: Path, target: str) -> None:
    (sharded.parent / "b.safetensors").write_bytes((sharded / "b.safetensors").read_bytes())
    moved = {name: target if shard == "b.safetensors" else shard for name, shard in read_index(sharded).items()}
    write_index(sharded, moved)
    assert_refused(sharded, target, "outside")


def test_index_with_an_absolute_or_winding_path_is_refused_even_inside(sharded: Path) -> None:
    weight_map = read_index(sharded)
    for target in (str(sharded / "b.safetensors"), "x/../b.safetensors"):
        moved = {name: target if shard == "b.safetensors" else shard for name, shard in weight_map.items()}
        write_index(sharded, moved)
        assert_refused(sharded, target, "outside")


def test_shard_that_links_outside_is_refused(sharded: Path) -> None:
    outside = (sharded / "b.safetensors").rename(sharded.parent / "outside.safetensors")
    (sharded / "b.safetensors").symlink_to(outside)
    assert_refused(sharded, "'b.safetensors'", "outside")


def test_shard_that_links_to_itself_is_refused(sharded: Path) -> None:
    (sharded / "b.safetensors").unlink()
    (sharded / "b.safetensors").symlink_to("b.safetensors")
    assert_refused(sharded, "b.safetensors")


def test_shards_of_the_hub_cache_may_link_to_its_blobs(sharded: Path) -> None:
    repository = sharded.parent / "models--Qwen--Qwen3-0.6B"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "blobs").mkdir()
    snapshot = sharded.rename(repository / "snapshots" / "0123abcd")
    for path in sorted(snapshot.iterdir()):
        blob = path.rename(repository / "blobs" / f"hash-of-{path.name}")
        path.symlink_to(Path("../../blobs") / blob.name)
    shared = sharded.parent / "blobs" / "ab"  # what all repositories of a cache may share
    shared.mkdir(parents=True)
    blob = repository / "blobs" / "hash-of-b.safetensors"
    blob.rename(shared / "hash")
    blob.symlink_to("../../blobs/ab/hash")
    assert len(load_weights(snapshot, CONFIG)) == 25


# What is done to a sound index, and what the error names.
INDEXES = {
    "shard that is not there": (lambda m: m | {UP: "c.safetensors"}, "'c.safetensors'"),
    "tensor that its shard lacks": (lambda m: m | {"model.x": "b.safetensors"}, "b.safetensors: 'model.x'"),
    "tensor in the other shard": (lambda m: m | {UP: "a.safetensors"}, f"a.safetensors: '{UP}'"),
    "tensor not listed": (
        lambda m: {name: shard for name, shard in m.items() if name != UP},
        f"b.safetensors: '{UP}'",
    ),
    "pickled shard": (lambda m: m | {UP: "pytorch_model-1.bin"}, "'pytorch_model-1.bin' is no safetensors"),
    "empty file name": (lambda m: m | {UP: ""}, "'' is no safetensors"),
    "file name too long": (lambda m: m | {UP: "x" * 5000 + ".safetensors"}, "xxx"),
    "NUL in the file name": (lambda m: m | {UP: "b\0.safetensors"}, r"b\x00.safetensors"),
    "surrogate in the file name": (lambda m: m | {UP: "\ud800.safetensors"}, r"\ud800.safetensors"),
    "no file name": (lambda m: m | {UP: ["b.safetensors"]}, UP),
    "empty": (lambda m: {}, "weight_map"),
    "no object": (lambda m: list(m), "weight_map"),
}


@pytest.mark.parametrize(("change", "named"), INDEXES.values(), ids=INDEXES.keys())
def test_wrong_index_is_one_error(sharded: Path, change, named: str) -> None:
    write_index(sharded, change(read_index(sharded)))
    assert_refused(sharded, named)


JSON_TEXTS = {
    "truncated": (lambda t: t[:-3], "JSON"),
    "bad UTF-8": (lambda t: t.replace("m", "\xff", 1).encode("latin-1"), "utf-8"),
    "a list": (lambda t: f"[{t}]", "JSON object"),
    "empty": (lambda t: "", "JSON"),
    "larger than any": (lambda t: t + " " * 2**20, 2**20),
    "a key twice": (lambda t: t[:-1] + "," + t[1:], "twice"),
}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize(("change", "named"), JSON_TEXTS.values(), ids=JSON_TEXTS.keys())
def test_malformed_json_file_is_one_error(sharded: Path, name: str, change, named: object) -> None:
    text = change((sharded / name).read_text())
    (sharded / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert_refused(sharded, name, named)


def test_a_tensor_twice_in_the_index_is_refused(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    path.write_text(path.read_text().replace(f'"{UP}"', f'"{UP}": "a.safetensors", "{UP}"'))
    assert_refused(sharded, path, UP, "twice")


# config.json


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("hidden_size", 16, ("emb_dim", 16, 8)),
        ("rope_theta", 1e6, ("rope_base", 1e6, 1e4)),
        ("rope_theta", 10**400, ("64 bits",)),
        ("rms_norm_eps", 1e-5, ("rms_norm_eps", 1e-5, 1e-6)),
        ("tie_word_embeddings", "false", ("tie_word_embeddings",)),
        ("model_type", "llama", ("model_type", "'llama'", "'qwen3'")),
    ],
)
def test_config_of_another_model_is_refused(checkpoint: Path, key: str, value: object, named: tuple) -> None:
    (checkpoint / "config.json").write_text(json.dumps(CONFIG_JSON | {key: value}))
    assert_refused(checkpoint, "config.json", *named)


def test_missing_config_is_refused(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()
    assert_refused(checkpoint, "config.json")


def test_more_layers_than_memory_are_refused_at_once(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text(json.dumps(CONFIG_JSON | {"num_hidden_layers": 10**12}))
    assert_refused(checkpoint, f"{10**12} layers", config=ModelConfig.from_pretrained(checkpoint))


# Arbitrary bytes

ARBITRARY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
).map(lambda value: json.dumps(value).encode())
SMALL = st.integers(-2, 40)
ENTRY = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "F16", "I8", None]), "shape": st.lists(SMALL, max_size=3)}
    | {"data_offsets": st.lists(SMALL, max_size=3)}
)
HEADER_LIKE = st.dictionaries(st.sampled_from([UP, NORM, "__metadata__", ""]), ENTRY).map(
    lambda h: json.dumps(h).encode()
)


def framed(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


@st.composite
def edited(draw: st.DrawFn, original: bytes) -> bytes:
    """`original` with a few bytes changed, removed or put in, its header's text preferred."""
    content = bytearray(original)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, min(len(content), 8 + len(SOUND))))
        content[place : place + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(content)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


def load_or_refuse(directory: Path) -> None:
    try:
        config = ModelConfig.from_pretrained(directory)
        weights = load_weights(directory, config)
    except UserError:
        return
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == tensor_shapes(config)
    assert all(tensor.isfinite().all() for tensor in weights.values())


PROPERTY = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@PROPERTY
@given(
    st.binary(max_size=64)
    | st.binary(max_size=64).map(framed)
    | ARBITRARY_JSON.map(framed)
    | HEADER_LIKE.map(framed)
    | edited(framed(SOUND) + struct.pack("<f", 0.5) * (DATA // 4))
)
def test_arbitrary_tensors_never_give_a_traceback(scratch: Path, content: bytes) -> None:
    (scratch / "config.json").write_text(json.dumps(CONFIG_JSON))
    (scratch / "model.safetensors").write_bytes(content)
    load_or_refuse(scratch)
    (scratch / "model.safetensors").unlink()


@PROPERTY
@given(st.binary(max_size=64) | ARBITRARY_JSON | edited(json.dumps(CONFIG_JSON).encode()))
def test_arbitrary_config_never_gives_a_traceback(scratch: Path, content: bytes) -> None:
    write_tensors(scratch / "model.safetensors", SOUND, DATA)
    (scratch / "config.json").write_bytes(content)
    load_or_refuse(scratch)
    (scratch / "model.safetensors").unlink()


@PROPERTY
@given(
    st.binary(max_size=64)
    | ARBITRARY_JSON
    | ARBITRARY_JSON.map(lambda inner: b'{"weight_map":' + inner + b"}")
    | st.dictionaries(st.sampled_from(stored_names()), st.text(max_size=9) | st.just("a.safetensors")).map(
        lambda weight_map: json.dumps({"weight_map": weight_map}).encode()
    )
    | edited(json.dumps({"weight_map": dict.fromkeys(stored_names(), "a.safetensors")}).encode())
)
def test_arbitrary_index_never_gives_a_traceback(scratch: Path, content: bytes) -> None:
    write_tensors(scratch / "a.safetensors", SOUND, DATA)
    (scratch / "config.json").write_text(json.dumps(CONFIG_JSON))
    (scratch / "model.safetensors.index.json").write_bytes(content)
    load_or_refuse(scratch)


@PROPERTY
@given(st.binary(max_size=64) | ARBITRARY_JSON)
def test_strict_json_reads_what_json_reads_or_refuses(content: bytes) -> None:
    try:
        value = parse_json(content, "x")
    except UserError:
        return
    assert value == json.loads(content)


def test_header_of_the_largest_model_is_far_below_the_limit(tmp_path: Path) -> None:
    largest = ModelConfig(num_layers=64, emb_dim=5120, num_heads=64, num_kv_heads=8, head_dim=128, hidden_dim=25600)
    position, header = 0, {}
    for name, shape in tensor_shapes(largest).items():
        end = position + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, end]}
        position = end
    path = tmp_path / "model.safetensors"
    write_tensors(path, header, 0)
    with path.open("r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) + position)  # sparse
    expected = {name: StoredTensor(path, name) for name in tensor_shapes(largest)}
    assert locate_tensors(tmp_path, largest, tied=False) == expected
    assert len(json.dumps(header)) < 2**20 / 8


def test_a_checkpoint_is_judged_without_torch() -> None:
    code = "import sys, qwen3bench.model.checkpoint; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
