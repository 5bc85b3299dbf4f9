"""`python -m qwen3bench`: command line → config → run."""

import sys

from qwen3bench.cli import main

if __name__ == "__main__":
    sys.exit(main())
