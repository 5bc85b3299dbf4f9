"""`python -m qwen3bench`: command line → config → run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwen3bench.config.settings import Settings


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status of the command line."""
    try:
        from qwen3bench.config import cli

        return cli.main(argv, _run, _finished, _about)
    except KeyboardInterrupt:  # while it imports
        return 130


def _run(settings: Settings) -> int:
    from qwen3bench.campaign.launch import run  # late: --help, --cfg and mistakes do without its second of imports

    return run(settings)


def _finished(settings: Settings) -> int | None:
    from qwen3bench.campaign.launch import finished_status

    return finished_status(settings)


def _about(settings: Settings) -> Sequence[str]:
    from qwen3bench.campaign.forecast import about_design

    return about_design(settings)


if __name__ == "__main__":
    sys.exit(main())
