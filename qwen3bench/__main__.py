"""`python -m qwen3bench`: command line → config → run."""

import sys


def main() -> int:
    """The exit status of the command line."""
    try:
        from qwen3bench.config.cli import main as run

        return run()
    except KeyboardInterrupt:  # while it imports
        return 130


if __name__ == "__main__":
    sys.exit(main())
