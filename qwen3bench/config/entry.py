"""What all entries share: a parser whose mistakes are one line, and the exit status."""

from __future__ import annotations

import argparse
import io
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from qwen3bench.errors import UserError

FULL_ERROR = "HYDRA_FULL_ERROR"  # Hydra's variable: 1 shows tracebacks


class Parser(argparse.ArgumentParser):
    """A parser of a command line, with mistakes as `UserError` instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        """Raise `UserError`."""
        raise UserError(f"{printable(message)}; `{self.prog} --help` shows what there is")


def guarded(action: Callable[[], int]) -> int:
    """Exit status of `action`; an error that the user can mend is printed in one or two lines and gives 1.

    What standard output or error cannot encode is escaped. HYDRA_FULL_ERROR=1 in the environment shows the traceback as
    well. Any other exception is a bug.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        return action()
    except BrokenPipeError:  # the reader of a pipe has seen enough; what is left goes nowhere (Python's docs, SIGPIPE)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UserError, OSError) as error:
        if os.environ.get(FULL_ERROR) == "1":
            traceback.print_exc()
        message = "\n".join(printable(line) for line in str(error).split("\n"))
        print(f"qwen3bench: error: {message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except Exception:
        traceback.print_exc()
        return 1


def printable(text: str) -> str:
    """`text` with control characters escaped: a file's name must not steer the terminal."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)
