"""`python -m qwen3bench`: command line → config → run."""

import sys

if __name__ == "__main__":
    try:
        from qwen3bench.cli import main

        sys.exit(main())
    except KeyboardInterrupt:  # while it imports
        sys.exit(130)
