"""transformers as a peer: our weights, our cache, the same function, and a place in the same blocks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qwen3bench.__main__ import main
from qwen3bench.analysis.run import load_run
from qwen3bench.config.choices import options_of
from qwen3bench.config.cli import compose
from qwen3bench.config.model_config import ModelConfig
from qwen3bench.errors import UserError
from qwen3bench.model.build import build_model
from qwen3bench.model.decoder import Decoder
from qwen3bench.model.weights import load_weights
from qwen3bench.worker import peers
from qwen3bench.worker.bank import Bank
from qwen3bench.worker.compile_counters import compiled_graphs, forget_compilations
from qwen3bench.worker.equivalence.candidate import Candidate, kv_cache
from qwen3bench.worker.equivalence.gate import Gate
from qwen3bench.worker.evidence import collect
from qwen3bench.worker.peers import TransformersModel, build_peer, judge_peer, require_peer, transformers_rope
from qwen3bench.worker.runtimes import make_runtime
from qwen3bench.worker.workloads import Workload, WorkloadSize

PEERS = ("transformers:sdpa", "transformers:eager")
ALL_PEERS = (*PEERS, "transformers:sdpa_mask")
SIZES = [WorkloadSize(name, 2, 9, 6) for name in ("prefill", "decode", "generate")]
CPU = torch.device("cpu")

each_peer = pytest.mark.parametrize("peer", ALL_PEERS)
each_size = pytest.mark.parametrize("size", SIZES, ids=lambda size: size.name)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def last_logits(model: Decoder, size: WorkloadSize) -> Tensor:
    """The logits of the last step, after `size`'s workload ran twice over one cache."""
    workload = Workload(size, model)
    for step in [*workload.steps(model), *workload.steps(model)]:
        logits = step()
    return logits


@each_peer
def test_logits_are_ours_at_every_position(tiny: ModelConfig, tiny_weights: dict[str, Tensor], peer: str) -> None:
    tokens = torch.randint(tiny.vocab_size, (3, 37))
    expected = build_model(tiny, (), tiny_weights)(tokens)
    logits = build_peer(peer, tiny, tiny_weights)(tokens)
    assert (logits.shape, logits.dtype) == (expected.shape, torch.float32)
    assert (logits - expected).abs().max() <= 1e-4


@each_peer
@each_size
def test_workloads_compute_what_ours_do(
    tiny: ModelConfig, tiny_weights: dict[str, Tensor], peer: str, size: WorkloadSize
) -> None:
    ours = last_logits(build_model(tiny, (), tiny_weights), size)
    theirs = last_logits(build_peer(peer, tiny, tiny_weights), size)
    assert theirs.shape == ours.shape
    assert (theirs - ours).abs().max() <= 1e-4


@each_peer
def test_a_cache_that_our_model_filled_serves_the_peer_at_any_position(
    tiny: ModelConfig, tiny_weights: dict[str, Tensor], peer: str
) -> None:
    ours, theirs = build_model(tiny, (), tiny_weights), build_peer(peer, tiny, tiny_weights)
    tokens = torch.randint(tiny.vocab_size, (2, 20))
    expected = ours(tokens)
    cache = kv_cache(ours, 2, 25)
    ours(tokens, cache)
    for start, end in ((19, 20), (4, 5), (7, 12), (0, 1)):
        logits = theirs(tokens[:, start:end], cache, start)
        assert (logits - expected[:, start:end]).abs().max() <= 1e-4, (start, end)
    with torch.inference_mode():  # as a workload fills its cache
        theirs(tokens, filled := kv_cache(ours, 2, 25))
    assert (filled.keys[..., :20, :] - cache.keys[..., :20, :]).abs().max() <= 1e-4
    assert (filled.keys[..., 20:, :] == 3).all()


@pytest.mark.parametrize("attention", ["sdpa", "sdpa_mask"])
def test_a_compiled_prompt_is_said_to_need_no_mask_and_an_eager_one_is_called_as_its_users_do(
    tiny: ModelConfig, tiny_weights: dict[str, Tensor], attention: str
) -> None:
    peer = build_peer(f"transformers:{attention}", tiny, tiny_weights)
    masks = []
    peer.language_model.register_forward_pre_hook(
        lambda _module, _inputs, named: masks.append(named["attention_mask"]), with_kwargs=True
    )
    tokens, told = torch.randint(tiny.vocab_size, (1, 5)), {"full_attention": None} if attention == "sdpa" else None
    compiled = peer.compiled(lambda forward: forward)  # which runs what a compiler would be given
    for model, hint in ((peer, None), (compiled, told)):
        model(tokens)
        cache = kv_cache(peer, 1, 9)
        for start, end in ((0, 4), (4, 5)):
            model(tokens[:, start:end], cache, start)
        assert masks == [hint, hint, None]
        masks.clear()


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_the_banks(tiny: ModelConfig, tied: bool) -> None:
    config = ModelConfig(**{**options_of("model", "tiny"), "tie_word_embeddings": tied})
    bank = Bank(config, "random", CPU, torch.float32, 0, {})
    peer = build_peer(PEERS[0], config, bank.weights)
    named = dict(peer.language_model.named_parameters(remove_duplicate=False))
    assert named.keys() == bank.weights.keys()
    for name, parameter in named.items():
        stored = "model.embed_tokens.weight" if tied and name == "lm_head.weight" else name
        assert parameter.data_ptr() == bank.weights[stored].data_ptr(), name
    same = build_model(config, ("tie",) if tied else (), device="meta")
    counts = ("num_parameters", "num_unique_parameters", "num_non_embedding_parameters", "parameter_bytes")
    for model in (peer, build_peer(PEERS[0], config, dtype=torch.float32)):  # with weights, and on `meta`
        assert {name: getattr(model, name) for name in counts} == {name: getattr(same, name) for name in counts}


def test_an_untied_head_is_never_the_embeddings_tensor(tiny_weights: dict[str, Tensor]) -> None:
    config = ModelConfig(**{**options_of("model", "tiny"), "tie_word_embeddings": False})
    peer = build_peer(PEERS[0], config, tiny_weights)  # whose head is the embedding's tensor
    assert peer.out_head.weight.data_ptr() != peer.tok_emb.weight.data_ptr()
    assert torch.equal(peer.out_head.weight, peer.tok_emb.weight)


def test_a_head_that_differs_is_not_tied(tiny: ModelConfig, tiny_weights: dict[str, Tensor]) -> None:
    weights = tiny_weights | {"lm_head.weight": 2 * tiny_weights["lm_head.weight"]}
    peer = build_peer(PEERS[0], tiny, weights)
    tokens = torch.randint(tiny.vocab_size, (1, 5))
    assert torch.allclose(peer(tokens), 2 * build_peer(PEERS[0], tiny, tiny_weights)(tokens))


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES[:2], ids=lambda size: size.name)
def test_compiles_whole_without_breaks(size: WorkloadSize) -> None:
    config = ModelConfig(**{**options_of("model", "tiny"), "num_layers": 1})  # compiling two takes twice as long
    peer = build_peer(PEERS[0], config, load_weights("random", config))
    workload = Workload(size, peer)
    expected = workload.steps(peer)[-1]()
    runtime = make_runtime("compile", CPU, **options_of("runtime", "compile"))
    forget_compilations()
    prepared = runtime.prepare_model(peer)
    assert prepared.compile_options == {"autotune_local_cache": False, "coordinate_descent_tuning": False}
    launches = [runtime.prepare(step).launch for step in workload.steps(prepared.model)]
    evidence = collect(prepared.model, workload, "compile", launches)
    assert (evidence.graph_breaks, evidence.recompiles) == (0, 0)
    assert compiled_graphs() == 1
    assert torch.equal(workload.steps(prepared.model.original)[-1](), expected)
    logits = launches[-1]()
    assert isinstance(logits, Tensor)
    assert (logits - expected).abs().max() <= 1e-4


@pytest.mark.slow
@each_peer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_accepts_it(tiny: ModelConfig, peer: str, dtype: torch.dtype) -> None:
    verdict = judge_peer(
        Gate(
            tiny,
            device="cpu",
            dtype=dtype,
            workloads=[WorkloadSize("prefill", 1, 450, 0), WorkloadSize("decode", 1, 450, 1)],
        ),
        peer,
    )
    assert verdict.equivalent, verdict.reason


def test_rotary_frequencies_that_are_not_ours_are_refused(tiny: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = peers.transformers_config
    monkeypatch.setattr(
        peers, "transformers_config", lambda config, *a: theirs(replace(config, rope_base=1.00003e6), *a)
    )
    with pytest.raises(ValueError, match="rotary frequencies"):
        transformers_rope(tiny)


def wrong_eps(peer: TransformersModel) -> None:
    for module in peer.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 1e-5


def one_layer_louder(peer: TransformersModel) -> None:
    layer = peer.language_model.model.layers[0].mlp
    layer.register_forward_hook(lambda _module, _inputs, output: 1.01 * output)


def off_by_one(peer: TransformersModel) -> None:
    forward = peer.forward
    peer.forward = lambda tokens, cache=None, start=0, keep=0: forward(tokens, cache, max(0, start - 1), keep)


def without_a_mask(peer: TransformersModel) -> None:
    for layer in peer.language_model.model.layers:
        layer.self_attn.is_causal = False


@pytest.mark.slow
@pytest.mark.parametrize("mistake", [wrong_eps, one_layer_louder, off_by_one, without_a_mask])
def test_the_gate_rejects_a_broken_one(tiny: ModelConfig, mistake: Callable[[TransformersModel], None]) -> None:
    gate = Gate(tiny, device="cpu", dtype=torch.float32)

    def broken(weights: dict[str, Tensor], _dtype: torch.dtype) -> TransformersModel:
        peer = build_peer(PEERS[0], gate.config, weights)
        mistake(peer)
        return peer

    verdict = gate.judge(Candidate(broken, kv_cache, rope=transformers_rope(gate.config)))
    assert not verdict.equivalent
    assert "error" in verdict.reason


def test_without_transformers_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"needs the package transformers.*pip install 'qwen3bench\[peers\]'"):
        require_peer(PEERS[0])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("peer.transformers.attention=sdpa", "peer.transformers must be a list of its cells"),
        ("+peer.transformers.dtype=float32", "peer.transformers must be a list of its cells and nothing else"),
    ],
)
def test_settings_refuse_what_a_peer_does_not_have(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        compose(["model=tiny", "peer=transformers", override])


def test_an_unknown_attention_is_refused() -> None:
    with pytest.raises(UserError, match=r"'flex' is unknown: use sdpa \| eager \| sdpa_mask"):
        require_peer("transformers:flex")
    with pytest.raises(UserError, match="peer 'vllm' is not known; there are transformers, liger, torchtitan"):
        require_peer("vllm:sdpa")


def test_labels_come_after_our_own() -> None:
    settings = compose(["model=tiny", "peer=transformers", "opt=flash"])
    assert settings.labels == ["baseline", "flash", *PEERS]
    chosen = compose(["model=tiny", "peer=transformers", "peer.transformers.attention=[eager]"])
    assert chosen.labels == ["baseline", "transformers:eager"]


@pytest.mark.slow
def test_a_run_measures_it_in_the_same_blocks(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    argv = ["model=tiny", "opt=flash", "peer=transformers", "peer.transformers.attention=[sdpa]", "prompt_tokens=16"]
    argv += ["device=cpu", "workload=decode", "measure=quick", "measure.min_blocks=2", "measure.max_blocks=2"]
    argv += ["measure.min_processes=1", f"run.dir={directory}"]
    assert main(argv) == 0
    run = load_run(directory)
    cells = run.cells.set_index("cell")
    assert list(cells.index) == ["baseline", "flash", "transformers:sdpa"]
    peer = cells.loc["transformers:sdpa"]
    assert (peer["status"], peer["equivalent"], peer["attention_backend"]) == ("ok", True, "FlashAttention")
    assert peer["num_parameters"] == cells.loc["baseline", "num_unique_parameters"]
    assert peer["latency_s"] > 0
    assert peer["kernel_launches"] > 50
    visited = run.samples.groupby("block")["cell"].apply(set)
    assert all(labels == set(cells.index) for labels in visited)


@pytest.mark.cuda
@each_peer
@each_size
@pytest.mark.parametrize("runtime_name", ["graph", "compile"])
def test_captures_in_a_cuda_graph(tiny: ModelConfig, peer: str, size: WorkloadSize, runtime_name: str) -> None:
    device = torch.device("cuda", 0)
    bank = Bank(tiny, "random", device, torch.float32, 0, {})
    ours, theirs = bank.build(()), build_peer(peer, tiny, bank.weights)
    workload = Workload(size, ours)
    for step in workload.steps(ours):
        expected = step()
    outputs: list[Tensor] = []

    def kept(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            outputs.append(step())
            return outputs[-1]

        return run

    runtime = make_runtime(runtime_name, device)
    theirs = runtime.prepare_model(theirs).model
    launches = [runtime.prepare(kept(step)).launch for step in workload.steps(theirs)]
    captured = outputs[-1]  # what the last graph writes
    captured.zero_()
    for launch in launches:
        launch()
    torch.cuda.synchronize()
    assert (captured - expected).abs().max() <= 1e-3
    assert runtime.on_device_clock
