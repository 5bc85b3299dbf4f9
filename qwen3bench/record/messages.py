"""What supervisor and worker say to each other: JSON lines, one request and one reply at a time, nothing pickled.

Request: {"op": name, …arguments}. Reply: {"ok": {…}} or {"error": {"status", "reason", …}}, the status a cell's as in
cells.csv, or `refused` for a mistake of the user's that no other cell would survive.
"""

from __future__ import annotations

import json
import math
from typing import Any

from qwen3bench.errors import UserError

Message = dict[str, Any]

_NUMBER = (int, float)
_NEEDED = {
    "probe": ("device",),
    "identify": ("environment", "fingerprint"),
    "verify": ("equivalent",),
    "visit": ("time", "samples"),
}
# What others read later, and what it has to be; null where it is not known.
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("device", "status", "reason", "attention_backend", "dtype"), (str,)),
    **dict.fromkeys(("environment", "fingerprint", "kernels", "checks", "vendor", "compile_options"), (dict,)),
    **dict.fromkeys(("samples", "notes", "itl_s"), (list,)),
    **dict.fromkeys(("equivalent", "tied_storage"), (bool,)),
    **dict.fromkeys(("num_parameters", "num_unique_parameters", "num_non_embedding_parameters"), (int,)),
    **dict.fromkeys(("parameter_bytes", "peak_allocated_bytes", "peak_reserved_bytes", "cache_bytes"), (int,)),
    **dict.fromkeys(("kernel_launches", "graph_breaks", "recompiles", "bytes", "flops"), (int,)),
    **dict.fromkeys(("max_abs_error", "kl_mean", "top1_agreement", "copy_bytes_per_s", "matmul_flops_per_s"), _NUMBER),
    **dict.fromkeys(("time", "compile_s", "latency_s", "ttft_s", "tpot_s"), _NUMBER),
}
# Likewise what a list's items or a dict's values have to be.
_INNER: dict[str, tuple[type, ...]] = {
    "samples": (dict,),
    "itl_s": _NUMBER,
    "notes": (str,),
    "kernels": (int,),
    "fingerprint": (str,),
}
_MOST = 2**63  # larger whole numbers are of no use, and some readers fail on them

FAILURES = ("oom", "crashed", "timeout", "not_equivalent", "invalid")


class CellFailure(Exception):
    """A request that the worker could not fulfil: the cell's status and the reason. Nothing more is asked of it."""

    def __init__(self, status: str, reason: str, peak_allocated_bytes: int | None = None) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.peak_allocated_bytes = peak_allocated_bytes


def encode(message: Message) -> bytes:
    """A message as one line. Raises ValueError for NaN and infinities, which JSON does not have."""
    return json.dumps(message, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def decode(line: bytes) -> Message:
    """The message of one line. Raises ValueError where it is none."""
    try:
        message = json.loads(line, parse_constant=_finite, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(message, dict):
        raise ValueError("not a JSON object")
    return message


def answer(line: bytes, op: str) -> Message:
    """The fields of the reply to `op`, each of its kind.

    Raises `CellFailure` where the reply is an error or no reply, and `UserError` where it refuses what the user asked.
    """
    try:
        reply = decode(line)
        if isinstance(reply.get("ok"), dict):
            return _checked(reply["ok"], _NEEDED.get(op, ()))
        error = _checked(reply["error"], ("status", "reason"))
    except (ValueError, TypeError, AttributeError, KeyError) as fault:
        raise CellFailure("crashed", f"the worker's answer to {op} is no message ({fault})") from None
    reason = error["reason"] or "no reason given"
    if error["status"] == "refused":
        raise UserError(reason)
    status = error["status"] if error["status"] in FAILURES else "crashed"
    raise CellFailure(status, reason, error.get("peak_allocated_bytes"))


def _checked(fields: Message, needed: tuple[str, ...] = ()) -> Message:
    """`fields`, each of its kind. Raises ValueError where one is not, and where a needed one is missing."""
    if missing := [name for name in needed if fields.get(name) is None]:
        raise ValueError(f"{missing[0]} is missing")
    for name, value in fields.items():
        if value is not None and name in _KINDS and not _is_kind(value, _KINDS[name]):
            raise ValueError(f"{name} is {value!r:.80}")
        inner = list(value.values()) if isinstance(value, dict) else value
        if name in _INNER and value is not None and not all(_is_kind(item, _INNER[name]) for item in inner):
            raise ValueError(f"{name} holds {value!r:.80}")
    for sample in fields.get("samples") or ():
        _checked(sample, ("latency_s",))
    return fields


def _is_kind(value: object, kinds: tuple[type, ...]) -> bool:
    return type(value) in kinds and not (isinstance(value, int) and abs(value) > _MOST)


def _finite(text: str) -> float:
    """The number of a JSON literal. Raises ValueError for NaN and infinities, 1e999 too."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no finite number")
    return number
