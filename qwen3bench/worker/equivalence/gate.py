"""The equivalence gate: does a cell compute the baseline's function?

A tolerance in bfloat16 is nearly blind: a decode position off by one or a norm's eps of 1e-5 hide in its
rounding, and stand out of float32's by factors of 40 to 9000. So a cell is judged twice, over prompts of
several odd lengths and a larger one, as a prefill, token by token and in chunks against a KV cache, all logits or the
last alone, and on a GPU, where kernels are chosen by how many tokens there are, over one of the workload's own size,
up to `WHOLE` tokens in all (what is chosen for more of them alone, as a tile of `mlp` may be, is not judged):

- in float32 against the baseline in float64: maximum and root-mean-square error at most 2 × those of the
  baseline in float32 (flash-attention, tests/test_flash_attn.py: at most twice the error of the plain
  implementation in the same dtype), and a relative L2 error of at most 1e-3;
- in the run's dtype against the same reference: maximum at most 2 ×, root-mean-square at most 1.25 × the
  baseline's in that dtype, and the same most likely token in at least 99 % of the positions where the
  reference's margin is clear, more than twice the baseline's maximum error (transformers' tests of Qwen3
  compare greedily chosen tokens).

Absolute tolerances would not do: Liger-Kernel's tests of RMSNorm allow 1e-4 in float32 and 5 in bfloat16.
Errors are pooled over all prompts and positions before they are compared: the two maxima of a few rounding
errors easily lie apart by a factor of two, those of hundreds of rows do not. Nothing is nearer to the
reference than the rounding of the logits themselves, so the baseline's error counts as at least that.

The weights are random, scaled so that each layer, each norm's eps and each gain moves the logits (see
`sensitised`); a cell without `tie` is judged with a head that is not the embedding.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qwen3bench.config.choices import options_of
from qwen3bench.config.model_config import ModelConfig
from qwen3bench.errors import UserError
from qwen3bench.model.build import build_model
from qwen3bench.model.cache import KVCache
from qwen3bench.model.checkpoint import EMBEDDING, HEAD
from qwen3bench.model.weights import load_weights
from qwen3bench.worker.equivalence.logit_errors import Comparison, Errors, WrongLogitsError, case_errors

Weights = dict[str, Tensor]
Build = Callable[[ModelConfig, tuple[str, ...], Weights, torch.device, torch.dtype], Any]
Options = Mapping[str, Mapping[str, Any]]
Factory = Callable[[Weights, torch.dtype], Any]
Rope = tuple[Tensor, Tensor]  # cosine and sine, (context length, head size) each
NewCache = Callable[[Any, int, int], Any]

LENGTHS = (1, 7, 37, 130)  # one row, and multiples of no tile
BATCH_SIZE = 3
LARGEST = (5, 700)  # sequences and tokens that are judged of a workload's larger prompt
WHOLE = 2048  # tokens in all that are judged of it as it is, on a GPU
SMALL_DIM = 256  # of a model for which, on a CPU, more threads than one only wait for each other
FATAL = (torch.cuda.OutOfMemoryError, torch.AcceleratorError)  # errors that are the caller's to handle
_SPARE = 5  # positions of a cache that are never filled: what reads them is wrong


def cut(config: ModelConfig, device: torch.device) -> ModelConfig:
    """The shape that the gate judges: the run's, with at most 4 layers (2 on a CPU or of a wide model).

    All layers are alike, and what one does wrong shows in two. The vocabulary is cut to 4096 rows, as no switch
    touches the head's product.
    """
    wide = config.emb_dim > 2048
    layers = min(config.num_layers, 2 if wide or device.type == "cpu" else 4)
    vocabulary = min(config.vocab_size, 4096)
    context = min(config.context_length, max(2 * LARGEST[1], WHOLE))
    return replace(config, num_layers=layers, vocab_size=vocabulary, context_length=context)


def sensitised(config: ModelConfig, device: torch.device, dtype: torch.dtype, seed: int) -> Weights:
    """Random float32 weights whose values `dtype` holds exactly, under which every part of the model shows.

    Query and key norms have gains around 3, so attention is peaky. The residual stream, and queries and keys
    before their norms, are as small as √(10³ eps), where a wrong eps shows; each block adds about as much to
    the stream as it holds; values, gates and logits are of order 1; no gain is 1.
    """
    weights = load_weights("random", config, device=device, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    small = math.sqrt(1e3 * config.rms_norm_eps)
    width = config.emb_dim
    deviation = {
        EMBEDDING: small,
        "q_proj.weight": small / math.sqrt(width),
        "k_proj.weight": small / math.sqrt(width),
        "v_proj.weight": 1 / math.sqrt(width),
        "o_proj.weight": small / math.sqrt(config.num_heads * config.head_dim),
        "gate_proj.weight": 2 / math.sqrt(width),
        "up_proj.weight": 1 / math.sqrt(width),
        "down_proj.weight": small / math.sqrt(config.hidden_dim),
    }
    for name, tensor in weights.items():
        if name == HEAD:
            continue
        if name.endswith("norm.weight"):
            gain = torch.rand(tensor.shape, generator=generator) + 0.5
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                gain *= 3
            elif name == "model.norm.weight":
                gain /= small * math.sqrt(width)
            tensor.copy_(gain)
        else:
            part = next(part for part in deviation if name.endswith(part))
            tensor.mul_(deviation[part] / tensor.std())
        tensor.copy_(tensor.to(dtype))
    return weights


@dataclass(frozen=True)
class Case:
    """One way to compute the logits of a prompt: in one forward, or in `chunks` of tokens against a cache.

    `usual` are those that a workload asks for: a prefill, and single tokens after one. The prompt's first
    `sequences` take part. `keep` > 0: only the last that many tokens' logits are asked for.
    """

    name: str
    prompt: int
    chunks: tuple[int, ...] = ()
    usual: bool = False
    sequences: int = max(BATCH_SIZE, LARGEST[0])
    keep: int = 0


def whole_size(sizes: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Sequences and tokens of the largest prompt among `sizes`, as many of either as `WHOLE` tokens in all allow."""
    sequences, tokens = max(sizes, key=math.prod)
    tokens = min(tokens, WHOLE)
    return max(1, min(sequences, WHOLE // tokens)), tokens


def _chooses_by_size(device: torch.device) -> bool:
    """Whether a device may have other kernels for other numbers of tokens."""
    return device.type != "cpu"


def cases(lengths: Sequence[int], large: int | None = None, whole: tuple[int, int] | None = None) -> list[Case]:
    """Each prompt in one forward, the long ones in chunks too, the short ones token by token, also alone.

    `large`: the length of one more prompt; `whole`: sequences and tokens of another, the last, in one forward alone.
    """
    found = [Case(f"a prefill of length {n}", i, usual=n > 1) for i, n in enumerate(lengths)]
    for i, n in enumerate(lengths):
        if n <= 64:
            singles = min(n, 12)
            filled = (n - singles,) if n > singles else ()
            found.append(Case(f"a decode of length {n}", i, (*filled, *[1] * singles), usual=n > singles))
        if 7 <= n <= 64:  # a lone token may have a kernel of its own
            chunks = (n - 5, *[1] * 5)
            found.append(Case(f"a decode of one sequence of length {n}", i, chunks, usual=True, sequences=1))
        if n > 64:  # whose kernel may split so many keys
            name = f"a decode of one sequence of length {n}"
            found.append(Case(name, i, (n - 2, 1, 1), usual=True, sequences=1))
        if n > 7:
            first = n // 2
            found.append(Case(f"chunks of length {n}", i, (first, 1, 3, n - first - 4)))
    found.append(Case(f"the last logits of length {lengths[-1]}", len(lengths) - 1, usual=True, keep=1))
    if large is not None:
        found.append(Case(f"a large prefill of length {large}", len(lengths), usual=True))
        if large > 2:
            chunks = (large - 2, 1, 1)
            found.append(Case(f"a decode after {large - 2} tokens", len(lengths), chunks, usual=True))
            if large > 64:  # whose kernel may split so many keys
                name = f"a decode of one sequence after {large - 2} tokens"
                found.append(Case(name, len(lengths), chunks, usual=True, sequences=1))
    if whole is not None:
        index = len(lengths) + (large is not None)
        found.append(Case(f"a prefill of {whole[0]} × {whole[1]}", index, usual=whole[1] > 1, sequences=whole[0]))
    return found


class Gate:
    """Judges cells of one model shape on one device; the reference is computed once, at the first check.

    `opts` holds the options of each optimization by name. `build` makes a cell's model from weights with
    Hugging Face's names. Judged is a shallower model of the run's shapes (see `cut`). `sizes` are the sequences and
    tokens of the workloads' prompts: where one is larger than the gate's own prompts, such a one is judged as well,
    up to `LARGEST`, and on a GPU the largest as it is, up to `WHOLE` tokens.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        seed: int = 0,
        opts: Options | None = None,
        build: Build | None = None,
        sizes: Iterable[tuple[int, int]] = (),
    ) -> None:
        self.device = torch.device(device)
        self.whole = config
        self.config = cut(config, self.device)
        self.dtype = dtype
        self.seed = seed
        self.opts: Options = opts or {}
        self.build = build
        lengths = sorted({min(n, self.config.context_length) for n in LENGTHS})
        generator = torch.Generator().manual_seed(seed)
        shapes = [(BATCH_SIZE, n) for n in lengths]
        sizes = [(1, 1), *sizes]
        context = self.config.context_length
        whole = whole_size([(n, min(t, context)) for n, t in sizes]) if _chooses_by_size(self.device) else None
        sequences, tokens = (
            min(most, max(given)) for most, given in zip(LARGEST, zip(*sizes, strict=True), strict=True)
        )
        tokens = min(tokens, context)
        large = sequences > BATCH_SIZE or tokens > lengths[-1]
        if large:
            shapes.append((sequences, tokens))
        if whole is not None:
            shapes.append(whole)
        self.prompts = [
            torch.randint(self.config.vocab_size, shape, generator=generator).to(self.device) for shape in shapes
        ]
        self.cases = cases(lengths, tokens if large else None, whole)
        self._weights: dict[torch.dtype, Weights] = {}
        self._references: dict[bool, list[Tensor]] = {}  # by whether the head is tied
        self._baseline: dict[tuple[torch.dtype, bool], Errors] = {}

    @property
    def dtypes(self) -> list[torch.dtype]:
        """The dtypes in which a cell is judged: float32, then the run's."""
        return list(dict.fromkeys((torch.float32, self.dtype)))

    def check(self, cell: tuple[str, ...]) -> dict[str, Any]:
        """The verdict on a cell, as the record's `verify` line has it.

        `max_abs_error` is that of float32; `kl_mean` (in nats) and `top1_agreement` are those of the run's
        dtype. Options may allow less than the default ones: FlashAttention and cuDNN refuse float32, and
        explicit masks or single keys. What no workload does in the run's dtype is then judged with the
        default options, and `checks` has the number of such cases (`…_stood_in`). Raises
        torch.cuda.OutOfMemoryError, and `UserError` where the cell cannot be built.
        """

        def factory(opts: Options) -> Factory:
            return lambda weights, dtype: self._build(cell, opts, weights, dtype)

        if not self._blocks_are_alike(cell):
            layers = f"the first {self.config.num_layers} of {self.whole.num_layers}"
            return _verdict() | {"reason": f"its blocks are of different kinds, so that {layers} do not tell of all"}
        has_options = any(self.opts[name] != options_of("opt", name) for name in cell if self.opts.get(name))
        return self.check_model(factory(self.opts), kv_cache, factory({}) if has_options else None, tied="tie" in cell)

    def check_model(
        self,
        factory: Factory,
        new_cache: NewCache | None = None,
        stand_in: Factory | None = None,
        tied: bool = False,
        rope: Rope | None = None,
    ) -> dict[str, Any]:
        """The verdict on any model: `factory(weights, dtype)` makes one from weights with Hugging Face's names.

        It is called as `model(tokens)` for logits (b, t, vocabulary), as `model(tokens, None, 0, 1)` for the last
        token's and, where `new_cache(model, batch_size, capacity)` is given, as `model(tokens, cache, start)`; without
        it only prefill is judged. The weights hold one matrix as embedding and head where `tied`, else two. `stand_in`
        makes the model for cases that the first refuses and no workload asks for. `rope`: the rotary tables of its
        reference in float64, where the model's angles are other numbers by design. A model that raises did not run
        (`ran`); for want of memory or by a fault of the device (`FATAL`) nothing is known of it, and that is raised.
        """
        chosen = [case for case in self.cases if new_cache is not None or not (case.chunks or case.keep)]
        verdict = _verdict()
        checks: dict[str, float] = verdict["checks"]
        checks |= {"layers": self.config.num_layers, "vocabulary": self.config.vocab_size}
        references = self._references_of(tied) if rope is None else self._computed(tied, rope)
        for dtype in self.dtypes:
            baseline = self._baseline_errors(dtype, tied).only([case.name for case in chosen])
            try:
                errors = self._attempt(factory, dtype, self._bank(dtype, tied), references, chosen, new_cache, stand_in)
            except (WrongLogitsError, _DoesNotRunError) as error:
                ran = not isinstance(error, _DoesNotRunError)
                return verdict | {"ran": ran, "reason": f"{dtype_name(dtype)}: {error}"}
            if errors.stood_in:
                checks[f"{dtype_name(dtype)}_stood_in"] = errors.stood_in
            comparison = Comparison(errors, baseline, dtype, dtype is self.dtype)
            checks |= {f"{dtype_name(dtype)}_{name}": value for name, value in comparison.checks.items()}
            if dtype is torch.float32 and errors.stood_in < len(chosen):  # else it is another model's
                verdict["max_abs_error"] = errors.max
            if dtype is self.dtype:
                verdict["kl_mean"] = errors.kl_mean
                verdict["top1_agreement"] = comparison.top1_agreement
            if comparison.reason:
                return verdict | {"reason": f"{dtype_name(dtype)}: {comparison.reason}"}
        return verdict | {"equivalent": True}

    def _blocks_are_alike(self, cell: tuple[str, ...]) -> bool:
        """Whether every block of the whole model is made of the same modules, so that the judged ones stand for all."""
        if self.build is not None or self.whole.num_layers == self.config.num_layers:
            return True
        opts = {name: self.opts.get(name, {}) for name in cell}
        try:
            blocks = build_model(self.whole, opts, device="meta").trf_blocks
        except Exception:  # what cannot be built is told with its reason where it is judged
            return True
        return len({tuple(type(module) for module in block.modules()) for block in blocks}) == 1

    def _build(self, cell: tuple[str, ...], opts: Options, weights: Weights, dtype: torch.dtype) -> Any:
        if self.build is not None:
            return self.build(self.config, cell, weights, self.device, dtype)
        return build_model(self.config, {name: opts.get(name, {}) for name in cell}, weights)

    def _attempt(
        self,
        factory: Factory,
        dtype: torch.dtype,
        weights: Weights,
        references: Sequence[Tensor],
        chosen: Sequence[Case],
        new_cache: NewCache | None,
        stand_in: Factory | None,
    ) -> Errors:
        """The errors of a model. Raises `WrongLogitsError` or `_DoesNotRunError` where it has none."""
        with self._conditions(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                model = factory(weights, dtype)
                other = stand_in(weights, dtype) if stand_in is not None else None
                return self._errors(model, references, chosen, new_cache, other, strict=dtype is self.dtype)
            except (*FATAL, WrongLogitsError, UserError):
                raise
            except Exception as error:
                why = _why(error, [warning.message for warning in caught])
                raise _DoesNotRunError(f"it does not run: {why}") from error

    def _bank(self, dtype: torch.dtype, tied: bool) -> Weights:
        """The judged weights in `dtype`: the same values in each, and stored as the run stores its own.

        Where the head is not tied it is another matrix than the embedding.
        """
        if torch.float32 not in self._weights:
            self._weights[torch.float32] = sensitised(self.config, self.device, self.dtype, self.seed)
        if dtype not in self._weights:
            self._weights[dtype] = load_weights("random", self.config, device=self.device, dtype=dtype)
            for name, tensor in self._weights[dtype].items():
                tensor.copy_(self._weights[torch.float32][name])
        bank = self._weights[dtype]
        return bank if tied else {**bank, HEAD: bank[EMBEDDING].flip(0)}

    def _computed(self, tied: bool, rope: Rope | None = None) -> list[Tensor]:
        """The logits of all prompts by the baseline in float64."""
        with self._conditions():
            model = build_model(self.config, (), self._bank(torch.float64, tied))
            if rope is not None:
                model.cos, model.sin = (table.to(self.device) for table in rope)
            logits = [logits_of(model, prompt, (), None) for prompt in self.prompts]
        del self._weights[torch.float64]
        return logits

    def _references_of(self, tied: bool) -> list[Tensor]:
        if tied not in self._references:
            self._references[tied] = self._computed(tied)
        return self._references[tied]

    def _baseline_errors(self, dtype: torch.dtype, tied: bool) -> Errors:
        references = self._references_of(tied)
        if (dtype, tied) not in self._baseline:
            with self._conditions():
                model = build_model(self.config, (), self._bank(dtype, tied))
                self._baseline[dtype, tied] = self._errors(model, references, self.cases, kv_cache)
        return self._baseline[dtype, tied]

    def _errors(
        self,
        model: Any,
        references: Sequence[Tensor],
        chosen: Sequence[Case],
        new_cache: NewCache | None,
        stand_in: Any = None,
        strict: bool = True,
    ) -> Errors:
        found, stood_in = {}, 0
        for case in chosen:
            prompt, reference = (of[case.prompt][: case.sequences] for of in (self.prompts, references))
            try:
                logits = logits_of(model, prompt, case.chunks, new_cache, case.keep)
            except FATAL:
                raise
            except Exception:
                if stand_in is None or (strict and case.usual):
                    raise
                logits = logits_of(stand_in, prompt, case.chunks, new_cache, case.keep)
                stood_in += 1
            found[case.name] = case_errors(logits, reference[:, -case.keep :])
        return Errors(found, stood_in)

    @contextmanager
    def _conditions(self) -> Iterator[None]:
        """Exact float32; and one thread for a small model on a CPU (`SMALL_DIM`)."""
        threads = torch.get_num_threads()
        with exact_float32():
            if self.device.type == "cpu" and self.config.emb_dim <= SMALL_DIM:
                torch.set_num_threads(1)
            try:
                yield
            finally:
                torch.set_num_threads(threads)


def kv_cache(model: Any, batch_size: int, capacity: int) -> KVCache:
    """A cache for `model`, whose positions hold 3 until they are filled: read too early, they show."""
    weight = model.tok_emb.weight
    cache = KVCache(model.config, batch_size, capacity, weight.device, weight.dtype)
    for stored in (cache.keys, cache.values):
        stored.fill_(3)
    return cache


@torch.inference_mode()
def logits_of(model: Any, tokens: Tensor, chunks: Sequence[int], new_cache: NewCache | None, keep: int = 0) -> Tensor:
    """Logits (b, t, vocabulary) of all tokens or the last `keep`, in one forward or in chunks against a cache."""
    if keep:
        return model(tokens, None, 0, keep)
    if not chunks or new_cache is None:
        return model(tokens)
    batch_size, length = tokens.shape
    cache = new_cache(model, batch_size, length + _SPARE)
    logits, start = [], 0
    for chunk in tokens.split(list(chunks), dim=1):
        logits.append(model(chunk, cache, start))
        start += chunk.shape[1]
    return torch.cat(logits, dim=1)


@contextmanager
def exact_float32() -> Iterator[None]:
    """Matrix products of float32 in float32, whatever was set: no TF32 on CUDA, no bfloat16 on a CPU."""
    cuda: Any = torch.backends.cuda.matmul
    cpu: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = cuda.fp32_precision, cpu.fp32_precision
    cuda.fp32_precision = cpu.fp32_precision = (
        "ieee"  # by the one interface alone: PyTorch refuses a mix with the older
    )
    try:
        yield
    finally:
        cuda.fp32_precision, cpu.fp32_precision = before


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` of torch.float32."""
    return str(dtype).removeprefix("torch.")


def _verdict() -> dict[str, Any]:
    """What is said of a model before it is judged."""
    errors = {"max_abs_error": None, "kl_mean": None, "top1_agreement": None}
    return {"equivalent": False, "ran": True, **errors, "reason": None, "checks": {}}


class _DoesNotRunError(Exception):
    """Why a model gave no logits."""


def _why(error: Exception, messages: Sequence[object]) -> str:
    """What PyTorch says and warns of, in one line, without the backends that were not asked for."""
    lines = [(str(text).strip() or type(text).__name__).splitlines()[0] for text in (error, *messages)]
    lines = [line.partition(" (Triggered internally")[0].rstrip(". ") for line in lines]
    told = dict.fromkeys(line for line in lines if not line.endswith(("not used because:", "runtime disabled")))
    return "; ".join(told)[:400]
