"""What supervisor and worker say to each other: JSON lines, one request and one reply at a time, nothing pickled.

Request: {"op": name, …arguments}. Reply: {"ok": {…}} or {"error": {"status", "reason", …}}, the status a cell's as in
cells.csv, or `refused` for a mistake of the user's that no other cell would survive.
"""

from __future__ import annotations

import json
from typing import Any

Message = dict[str, Any]


def encode(message: Message) -> bytes:
    """A message as one line. Raises ValueError for NaN and infinities, which JSON does not have."""
    return json.dumps(message, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def decode(line: bytes) -> Message:
    """The message of one line. Raises ValueError where it is none."""
    message = json.loads(line)
    if not isinstance(message, dict):
        raise ValueError(f"a message is a JSON object, not {message!r}")
    return message
