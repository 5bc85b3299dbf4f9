"""`python -m qwen3bench.aa [campaigns=20] [KEY=VALUE …]`: how often does the measuring call noise an effect?

A/A campaigns: every cell of the 2^5 is a copy of the baseline under the cell's label, measured and analysed as any run
is, so each significant effect is a false one. Each campaign has a seed of its own and is a run directory of its own,
`campaign-01`, …; with the same run.dir finished campaigns are read and an unfinished one is continued.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from qwen3bench.campaign.copies import measure
from qwen3bench.config.cli import compose, guarded
from qwen3bench.errors import UserError

# On a noisy machine more than sixteen blocks take time and tell nothing more about false alarms.
DEFAULTS = (
    "model=tiny",
    "workload=prefill",
    "prompt_tokens=64",
    "design=full",
    "device=cpu",
    "measure=quick",
    "measure.max_seconds=30",
    "measure.max_blocks=16",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 no more false alarms than chance allows, 3 more, 1 an error, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _main(arguments))


def _main(arguments: Sequence[str]) -> int:
    if any(argument in ("-h", "--help") for argument in arguments):
        print(f"{__doc__}\n{main.__doc__}\nUnless told otherwise: {' '.join(DEFAULTS)}")
        return 0
    return measure(compose([*DEFAULTS, *_settings_of(arguments)]), _count(arguments))


def _count(arguments: Sequence[str]) -> int:
    given = [argument.partition("=")[2] for argument in arguments if argument.startswith("campaigns=")]
    if not given:
        return 20
    if not (given[-1].isdecimal() and 1 <= int(given[-1]) <= 10_000):
        raise UserError(f"campaigns={given[-1]} must be a whole number from 1 to 10000")
    return int(given[-1])


def _settings_of(arguments: Sequence[str]) -> list[str]:
    return [argument for argument in arguments if not argument.startswith("campaigns=")]


if __name__ == "__main__":
    sys.exit(main())
