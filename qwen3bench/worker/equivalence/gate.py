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

A cell without `tie` is judged with a head that is not the embedding.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qwen3bench.config.model_config import ModelConfig
from qwen3bench.errors import UserError
from qwen3bench.model.build import build_model
from qwen3bench.record.messages import Judgment
from qwen3bench.worker.equivalence.candidate import FATAL, Candidate, Options, cell_candidate
from qwen3bench.worker.equivalence.cases import Case
from qwen3bench.worker.equivalence.logit_errors import Errors, WrongLogitsError
from qwen3bench.worker.equivalence.reference import Reference
from qwen3bench.worker.equivalence.verdict import ErrorComparison, dtype_name


class Gate:
    """Judges cells of one model shape on one device; the reference is computed once, at the first.

    `opts` holds the options of each optimization by name. Judged is a shallower model of the run's shapes
    (`reference.cut`), over prompts of its own and of the workloads' `sizes` (`cases.judged_prompts`).
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        seed: int = 0,
        opts: Options | None = None,
        sizes: Iterable[tuple[int, int]] = (),
    ) -> None:
        self.whole = config
        self.dtype = dtype
        self.opts: Options = opts or {}
        self.reference = Reference(config, torch.device(device), dtype, seed, sizes)
        self.config = self.reference.config

    @property
    def dtypes(self) -> list[torch.dtype]:
        """The dtypes in which a cell is judged: float32, then the run's."""
        return list(dict.fromkeys((torch.float32, self.dtype)))

    def judge_cell(self, cell: tuple[str, ...]) -> Judgment:
        """The verdict on a cell of ours. Raises as `judge` does, and `UserError` where the cell cannot be built."""
        if not self._blocks_are_alike(cell):
            layers = f"the first {self.config.num_layers} of {self.whole.num_layers}"
            return Judgment(
                equivalent=False, reason=f"its blocks are of different kinds, so that {layers} do not tell of all"
            )
        return self.judge(cell_candidate(cell, self.config, self.opts))

    def judge(self, candidate: Candidate) -> Judgment:
        """The verdict on any model.

        A model that raises did not run. Raises `FATAL`, as nothing is known of a model for which memory or the device
        failed.
        """
        cases = [case for case in self.reference.cases if candidate.takes(case)]
        judgment = Judgment(
            equivalent=False, checks={"layers": self.config.num_layers, "vocabulary": self.config.vocab_size}
        )
        expected = self.reference.logits(candidate)
        for dtype in self.dtypes:
            baseline = self.reference.baseline_errors(dtype, candidate.tied).only([case.name for case in cases])
            try:
                errors = self._errors(candidate, dtype, expected, cases)
            except (WrongLogitsError, _DoesNotRunError) as error:
                ran = not isinstance(error, _DoesNotRunError)
                return replace(judgment, ran=ran, reason=f"{dtype_name(dtype)}: {error}")
            judgment = ErrorComparison(errors, baseline, dtype, dtype is self.dtype).added_to(judgment)
            if judgment.reason:
                return judgment
        return replace(judgment, equivalent=True)

    def _blocks_are_alike(self, cell: tuple[str, ...]) -> bool:
        """Whether every block of the whole model is made of the same modules, so that the judged ones stand for all."""
        if self.whole.num_layers == self.config.num_layers:
            return True
        opts = {name: self.opts.get(name, {}) for name in cell}
        try:
            blocks = build_model(self.whole, opts, device="meta").trf_blocks
        except Exception:  # what cannot be built is told with its reason where it is judged
            return True
        return len({tuple(type(module) for module in block.modules()) for block in blocks}) == 1

    def _errors(
        self, candidate: Candidate, dtype: torch.dtype, expected: Sequence[Tensor], cases: Sequence[Case]
    ) -> Errors:
        """The errors of a model. Raises `WrongLogitsError` or `_DoesNotRunError` where it has none."""
        weights = self.reference.weights(dtype, candidate.tied)
        with self.reference.conditions(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                return self.reference.errors(
                    candidate.built(weights, dtype), expected, cases, strict=dtype is self.dtype
                )
            except (*FATAL, WrongLogitsError, UserError):
                raise
            except Exception as error:
                why = _why(error, [warning.message for warning in caught])
                raise _DoesNotRunError(f"it does not run: {why}") from error


class _DoesNotRunError(Exception):
    """Why a model gave no logits."""


def _why(error: Exception, messages: Sequence[object]) -> str:
    """What PyTorch says and warns of, in one line, without the backends that were not asked for."""
    lines = [(str(text).strip() or type(text).__name__).splitlines()[0] for text in (error, *messages)]
    lines = [line.partition(" (Triggered internally")[0].rstrip(". ") for line in lines]
    told = dict.fromkeys(line for line in lines if not line.endswith(("not used because:", "runtime disabled")))
    return "; ".join(told)[:400]
