"""Strict JSON of files that come from elsewhere: bounded, each key once, finite numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from qwen3bench.errors import UserError

# A parsed text takes some 30 times its bytes; Qwen3-32B's header, with 707 tensors, has under 0.1 MiB.
JSON_LIMIT_BYTES = 2**20


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a small file. Raises `UserError` where it is missing, oversized or malformed."""
    try:
        if not path.is_file():
            raise UserError(f"{path}: there is no such file; is {path.parent} a checkpoint's directory?")
        with path.open("rb") as file:
            text = file.read(JSON_LIMIT_BYTES + 1)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); is {path.parent} a checkpoint's directory?") from error
    if len(text) > JSON_LIMIT_BYTES:
        raise UserError(f"{path}: is larger than {JSON_LIMIT_BYTES} bytes; is it a checkpoint's?")
    return json_object(parse_json(text, str(path)), str(path))


def parse_json(text: bytes, source: str) -> Any:
    """The value of a strict JSON text: UTF-8, each key once, finite numbers, 64-bit integers.

    Raises `UserError` naming `source`.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value: dict[str, Any] = {}
        for key, item in pairs:
            if key in value:
                raise UserError(
                    f"{source}: the key {shortened(key)} occurs twice; which one counts? Get the file again"
                )
            value[key] = item
        return value

    def finite(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(f"{text[:20]} is no finite number")
        return value

    def whole(text: str) -> int:
        value = int(text)
        if abs(value) >= 2**63:
            raise ValueError(f"{text[:20]} takes more than 64 bits")
        return value

    try:
        return json.loads(
            text.decode("utf-8"),
            object_pairs_hook=unique,
            parse_constant=finite,
            parse_float=finite,
            parse_int=whole,
        )
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: is no valid JSON ({error}); get the file again") from error


def json_object(value: Any, source: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{source}: holds no JSON object; get the file again")
    return value


def shortened(value: Any) -> str:
    """`repr` in a line's length: a hostile file chooses its names."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]}…"
