"""Print a model's tree, its parameter counts and its memory; nothing is allocated.

usage: python -m qwen3bench.describe [+opt=NAME,…] [model=NAME] [KEY=VALUE …]

  python -m qwen3bench.describe                       the baseline of Qwen3-0.6B
  python -m qwen3bench.describe +opt=flash,tie        ONE model with both on
  python -m qwen3bench.describe model=32b             another size; its shape: model.num_layers=2, …
  python -m qwen3bench.describe weights=DIR           the shape in DIR/config.json; a hub id too: Qwen/Qwen3-8B
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from qwen3bench.config.cli import compose
from qwen3bench.config.entry import guarded


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status of `python -m qwen3bench.describe ARGV`: 0, or 1 with the error on stderr."""
    return guarded(lambda: _describe(sys.argv[1:] if argv is None else argv))


def _describe(argv: Sequence[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print((__doc__ or "").strip())
        return 0
    settings = compose(argv)
    from qwen3bench.model.description import description  # late: --help and mistakes need no torch

    print(description(settings.model, settings.opts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
