"""An error's text in one line that is short enough to be read, without losing the cause."""

from __future__ import annotations

_HINTS = ("Set TORCHDYNAMO_VERBOSE=", "For even more developer context", "Search for `cuda", "CUDA kernel errors might")
_START = 0.3  # of what is kept: whose message it is; a compiler names the cause last


def error_text(error: BaseException) -> str:
    """What an error says, in one line, without PyTorch's hints at the end on how to see more."""
    lines = (line.strip() for line in str(error).splitlines())
    return " ".join(" ".join(line for line in lines if not line.startswith(_HINTS)).split())


def both_ends(text: str, most: int) -> str:
    """The text; its start and its end where it is longer than `most` characters."""
    if len(text) <= most:
        return text
    start = int(most * _START)
    return f"{text[:start]} … {text[start + 3 - most :]}"
