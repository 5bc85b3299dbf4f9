"""`python -m qwen3bench.verify [+opt=…] [model=…] [design=…] [+peer=transformers]`: the equivalence gate alone."""

from __future__ import annotations

import inspect
import os
import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import track

from qwen3bench.config.cli import compose, guarded
from qwen3bench.config.settings import Settings
from qwen3bench.record.messages import Judgment
from qwen3bench.reporting.text_table import narrow_table

_WIDTH = 200  # a cell's line stays one line in a log


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 every cell computes the baseline's function, 3 some cell does not, 1 an error.

    With `workload=train` every cell's gradients are judged too.
    Without `+opt` or `design` all 2^5 cells of the five are judged.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _main(arguments))


def _main(arguments: Sequence[str]) -> int:
    if any(argument in ("-h", "--help") for argument in arguments):
        print(f"{__doc__}\n\n{inspect.getdoc(main)}")
        return 0
    named = {argument.partition("=")[0].lstrip("+") for argument in arguments}
    return verify(compose(arguments if named & {"opt", "design"} else [*arguments, "design=full"]))


def verify(settings: Settings) -> int:
    """Judge the cells of `settings`, print a table of them, and return the exit status."""
    from qwen3bench.worker.verification import Verification  # late: mistakes on the command line need no torch

    began = time.monotonic()
    verification = Verification(settings)
    settings, judged = verification.settings, verification.config
    model, dtypes = settings.model, dict.fromkeys(("float32", settings.dtype))
    err = Console(stderr=True)
    console = Console(highlight=False, soft_wrap=True)
    width = console.width if console.is_terminal or "COLUMNS" in os.environ else _WIDTH
    console.print(
        f"{model.name} on {settings.device}: {judged.num_layers} of {model.num_layers} layers; "
        "errors as multiples of the baseline's",
        markup=False,
    )
    ratios = [f"{dtype} {error}" for dtype in dtypes for error in ("max", "rms")]
    heads = ["verdict", *ratios, "mean KL", "same top-1"]
    table: dict[str, list[str]] = {}
    reasons, equivalent = [], 0
    try:
        for cell in track(settings.labels, "judging", console=err, transient=True, disable=not err.is_terminal):
            judgment = verification.judge(cell)
            values = [judgment.checks.get(f"{name.replace(' ', '_')}_ratio") for name in ratios]
            values += [judgment.kl_mean, judgment.top1_agreement]
            table[cell] = [_word(judgment), *("" if value is None else f"{value:.3g}" for value in values)]
            equivalent += judgment.equivalent
            if judgment.reason:
                reasons.append(f"{cell}: {judgment.reason}")
    finally:  # interrupted, what is judged is told all the same
        for line in narrow_table(table, heads, width):
            console.print(line, markup=False)
        for reason in reasons:
            console.print(reason, markup=False)
    cells = len(settings.labels)
    trains = any(sizes.precision is not None for sizes in settings.workloads.values())
    do = "compute the baseline's function" + " and train as it does" * trains
    console.print(f"{equivalent} of {cells} cells {do} ({time.monotonic() - began:.1f} s)")
    return 0 if equivalent == cells else 3


def _word(judgment: Judgment) -> str:
    return "ok" if judgment.equivalent else "DIFFERS" if judgment.ran else "FAILS"


if __name__ == "__main__":
    sys.exit(main())
