"""The equivalence gate: does a cell compute the baseline's function?

A tolerance in bfloat16 is nearly blind: a decode position off by one or a norm's eps of 1e-5 hide in its
rounding, and stand out of float32's by factors of 40 to 9000. So a cell is judged twice, over prompts of several odd
lengths as a prefill, token by token and in chunks against a KV cache, all logits or the last alone, and over what each
workload asks for at its own size: the whole vocabulary, several calls with other tokens, the steps of `generate`:

- in float32 against float64: maximum and root-mean-square error at most 2 × those of the
  baseline in float32 (flash-attention, tests/test_flash_attn.py: at most twice the error of the plain
  implementation in the same dtype), and a relative L2 error of at most 1e-3;
- in the run's dtype against the same reference: maximum at most 2 ×, root-mean-square at most 1.25 × the
  baseline's in that dtype, and the same most likely token in at least 99 % of the positions where the
  reference's margin is clear, more than twice the baseline's maximum error (transformers' tests of Qwen3
  compare greedily chosen tokens);
- in both, no case's root-mean-square error above 4 × the baseline's, so that a case of few positions is not lost
  among thousands.

Absolute tolerances would not do: Liger-Kernel's tests of RMSNorm allow 1e-4 in float32 and 5 in bfloat16.
Errors are pooled over all prompts and positions before they are compared: the two maxima of a few rounding
errors easily lie apart by a factor of two, those of hundreds of rows do not. Nothing is nearer to the
reference than the rounding of the logits themselves, so the baseline's error counts as at least that.

Weights of another set make activations as large as 10⁶, in float16 as large as it holds: clamps and overflows show
there. The reference is `anchor`'s, which shares no code with the models, and the baseline in float64 must agree with
it to 1e-9: else a mistake in code that all cells share would weaken the limits, and no cell passes.

A cell without `tie` is judged with a head that is not the embedding.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace

import torch

from qwen3bench.config.model_config import ModelConfig
from qwen3bench.errors import UserError
from qwen3bench.model.build import skeleton
from qwen3bench.record.messages import Judgment
from qwen3bench.worker.equivalence.candidate import FATAL, Candidate, Options, cell_candidate
from qwen3bench.worker.equivalence.cases import Case, WeightSet
from qwen3bench.worker.equivalence.judged_layers import judged_layers
from qwen3bench.worker.equivalence.logit_errors import Errors, WrongLogitsError, dtype_name
from qwen3bench.worker.equivalence.reference import LAYERS, Leniency, Reference, WrongReferenceError
from qwen3bench.worker.equivalence.verdict import ErrorComparison
from qwen3bench.worker.error_text import both_ends, error_text
from qwen3bench.worker.workloads import WorkloadSize


class Gate:
    """Judges cells of one model shape on one device; the reference is computed once, at the first.

    `opts` holds the options of each optimization by name. Judged is a model of the run's shapes with three of its
    layers (`judged_layers`), over prompts of the gate's own and what each of `workloads` asks for (`judged_cases`).
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        seed: int = 0,
        opts: Options | None = None,
        workloads: Iterable[WorkloadSize] = (),
    ) -> None:
        self.whole = config
        self.dtype = dtype
        self.opts: Options = opts or {}
        self.reference = Reference(config, torch.device(device), dtype, seed, workloads)
        self.config = self.reference.config

    @property
    def dtypes(self) -> list[torch.dtype]:
        """The dtypes in which a cell is judged: float32, then the run's."""
        return list(dict.fromkeys((torch.float32, self.dtype)))

    def judge_cell(self, cell: tuple[str, ...]) -> Judgment:
        """The verdict on a cell of ours. Raises as `judge` does, and `UserError` where the cell cannot be built."""
        opts = {name: self.opts.get(name, {}) for name in cell}
        layers: Sequence[int] | None = range(self.config.num_layers)
        with suppress(Exception):  # what cannot be built is told with its reason where it is judged
            layers = judged_layers(list(skeleton(self.whole, opts).trf_blocks), self.config.num_layers)
        if layers is None:
            return Judgment(
                equivalent=False,
                reason=f"its {self.whole.num_layers} blocks are of more than {LAYERS} different kinds, "
                f"so that no {LAYERS} of them tell of all",
            )
        whole = replace(self.whole, context_length=self.config.context_length)
        return self.judge(cell_candidate(cell, whole, layers, self.opts))

    def judge(self, candidate: Candidate) -> Judgment:
        """The verdict on any model.

        A model that raises did not run. Raises `FATAL`, as nothing is known of a model for which memory or the device
        failed.
        """
        judgment = Judgment(
            equivalent=False, checks={"layers": self.config.num_layers, "vocabulary": self.config.vocab_size}
        )
        taken = [case for case in self.reference.cases if candidate.takes(case)]
        try:
            self.reference.check_baseline()
            baselines = {dtype: self.reference.baseline_errors(dtype, candidate.tied) for dtype in self.dtypes}
        except WrongReferenceError as error:
            return replace(judgment, reason=str(error))
        for dtype, baseline in baselines.items():
            cases = [case for case in taken if case.name in baseline.by_case]
            try:
                errors = self._errors(candidate, dtype, cases)
            except (WrongLogitsError, _DoesNotRunError) as error:
                ran = not isinstance(error, _DoesNotRunError)
                return replace(judgment, ran=ran, reason=f"{dtype_name(dtype)}: {error}")
            if left_out := len(taken) - len(errors.by_case):  # as memory does not suffice
                judgment = replace(judgment, checks=judgment.checks | {f"{dtype_name(dtype)}_left_out": left_out})
            loud = [case.name for case in cases if case.weights is WeightSet.LOUD]
            judgment = ErrorComparison(errors, baseline, dtype, dtype is self.dtype, loud).added_to(judgment)
            if judgment.reason:
                return judgment
        return replace(judgment, equivalent=True)

    def _errors(self, candidate: Candidate, dtype: torch.dtype, cases: Sequence[Case]) -> Errors:
        """The errors of a model. Raises `WrongLogitsError` or `_DoesNotRunError` where it has none."""
        is_run_dtype = dtype is self.dtype
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                return self.reference.errors(
                    candidate, dtype, cases, Leniency(strict=is_run_dtype, memory=not is_run_dtype)
                )
            except (*FATAL, WrongLogitsError, UserError):
                raise
            except Exception as error:
                why = _why(error, [warning.message for warning in caught])
                raise _DoesNotRunError(f"it does not run: {why}") from error


class _DoesNotRunError(Exception):
    """Why a model gave no logits."""


def _why(error: Exception, messages: Sequence[object]) -> str:
    """What PyTorch says and warns of, in one line, without the backends that were not asked for.

    Of an error its first line; where that only announces the rest, as a compiler's does, all of it.
    """
    lines = [(str(text).strip() or type(text).__name__).splitlines()[0] for text in (error, *messages)]
    if lines[0].endswith(":"):
        lines[0] = error_text(error)
    lines = [line.partition(" (Triggered internally")[0].rstrip(". ") for line in lines]
    told = dict.fromkeys(line for line in lines if not line.endswith(("not used because:", "runtime disabled")))
    return both_ends("; ".join(told), 400)
