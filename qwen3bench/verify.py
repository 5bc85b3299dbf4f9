"""`python -m qwen3bench.verify [+opt=…] [model=…] [design=…] [+peer=transformers]`: the equivalence gate alone."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from qwen3bench.config.cli import compose, guarded
from qwen3bench.config.settings import Settings
from qwen3bench.record.design import cell_of, is_peer


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 every cell computes the baseline's function, 3 some cell does not, 1 an error.

    Without `+opt` or `design` all 2^5 cells of the five are judged.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if any(argument in ("-h", "--help") for argument in arguments):
        print(f"{__doc__}\n\n{main.__doc__}")
        return 0
    named = {argument.partition("=")[0].lstrip("+") for argument in arguments}
    if not named & {"opt", "design"}:
        arguments.append("design=full")
    return guarded(lambda: verify(compose(arguments)))


def verify(settings: Settings) -> int:
    """Judge the cells of `settings`, print one line for each, and return the exit status.

    Judged on random weights of the gate's own, whatever `weights` says: what is compared are functions. Raises
    `UserError` where these weights cannot be loaded, or a cell cannot be built on them.
    """
    import torch  # late: mistakes on the command line need no torch

    from qwen3bench.worker.bank import Bank
    from qwen3bench.worker.equivalence.gate import Gate
    from qwen3bench.worker.peers import judge_peer
    from qwen3bench.worker.session import device_here, is_out_of_memory, use_device

    settings = settings.resolved(device_here(settings.device))
    device = use_device(settings.device)
    began = time.monotonic()
    dtype = getattr(torch, settings.dtype)
    if settings.weights != "random":  # what a run of these weights would refuse
        bank = Bank(settings.model, settings.weights, device, dtype, settings.seed, settings.opts)
        for cell in settings.labels:
            if not is_peer(cell):
                bank.build(cell_of(cell))
        del bank
    gate = Gate(
        settings.model,
        device=device,
        dtype=dtype,
        seed=settings.seed,
        opts=settings.opts,
        sizes=settings.prompt_sizes,
    )
    model, judged = settings.model, gate.config
    print(
        f"{model.name} on {settings.device}: {judged.num_layers} of {model.num_layers} layers, "
        f"{judged.vocab_size} of {model.vocab_size} tokens; errors as multiples of the baseline's"
    )
    cells = settings.labels
    width = max(map(len, cells))
    columns = ["float32 max", "float32 rms"]
    if dtype is not torch.float32:
        columns += [f"{settings.dtype} max", f"{settings.dtype} rms"]
    columns += ["mean KL", "same top-1"]
    print("  ".join([f"{'cell':{width}}", "verdict ", *columns]))
    failed = 0
    for number, cell in enumerate(cells, start=1):
        _progress(f"judging {cell} ({number} of {len(cells)})")
        try:
            verdict = judge_peer(gate, cell) if is_peer(cell) else gate.check(cell_of(cell))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            verdict = {
                "equivalent": False,
                "ran": False,
                "checks": {},
                "reason": "out of memory; free some or name a smaller model",
            }
        _progress("")
        failed += not verdict["equivalent"]
        values = [verdict["checks"].get(column.replace(" ", "_") + "_ratio") for column in columns[:-2]]
        values += [verdict.get("kl_mean"), verdict.get("top1_agreement")]
        shown = [f"{_shown(value):>{len(column)}}" for value, column in zip(values, columns, strict=True)]
        print("  ".join([f"{cell:{width}}", _word(verdict), *shown]))
        if verdict["reason"]:
            print(f"  {verdict['reason']}")
    print(
        f"{len(cells) - failed} of {len(cells)} cells compute the baseline's function "
        f"({time.monotonic() - began:.1f} s)"
    )
    return 3 if failed else 0


def _word(verdict: dict[str, Any]) -> str:
    word = "ok" if verdict["equivalent"] else "DIFFERS" if verdict["ran"] else "FAILS"
    return f"{word:8}"


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.3g}"


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
