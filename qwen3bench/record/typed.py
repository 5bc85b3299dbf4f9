"""Frozen dataclasses whose fields are checked when one is made: what crosses a process or a file."""

from __future__ import annotations

import dataclasses
import json
import keyword
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

T = TypeVar("T")
Count = Annotated[int, Field(ge=0, lt=2**62)]  # larger whole numbers are of no use, and some readers fail on them
Number = Annotated[int | float, Field(gt=-(2.0**1023), lt=2.0**1023)]
Seconds = Annotated[float, Field(gt=0, lt=1e9)]  # no time is longer
Names = Annotated[tuple[Annotated[str, Field(strict=True)], ...], Field(strict=False)]
Numbers = Annotated[tuple[Number, ...], Field(strict=False)]
Times = Annotated[tuple[Annotated[Seconds, Field(strict=True)], ...], Field(strict=False)]
_MAX_DEPTH = 32  # of JSON; what is written has under 10
_OF_UNION = ("int", "float")  # which pydantic adds to the name of a field of type Number
_CONFIG = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(Field,))
def typed(cls: type[T]) -> type[T]:
    """Make `cls` a frozen dataclass that raises ValueError where a field is missing or not of its type.

    Keys that it does not know are left out, so that a newer version may add some.
    """
    checked: Any = dataclass(frozen=True, kw_only=True, slots=True, config=_CONFIG)(cls)
    return checked


def made(cls: type[T], values: Mapping[str, Any]) -> T:
    """An object of the typed class `cls` from a JSON object. Raises ValueError, naming the field, where it is none."""
    try:
        return cls(**{f"{key}_" if keyword.iskeyword(key) else str(key): value for key, value in values.items()})
    except ValidationError as error:
        raise ValueError(complaint(error)) from None


def plain(value: Any) -> dict[str, Any]:
    """The fields of a typed object as a JSON object, without those that are None (not measured)."""
    names = [field.name for field in dataclasses.fields(value)]
    found = {name.rstrip("_"): getattr(value, name) for name in names}
    return {name: _plain(item) for name, item in found.items() if item is not None}


def fields_of(value: Any) -> dict[str, Any]:
    """The fields of a typed object by name, as they are: to make another object of them."""
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def complaint(error: ValidationError) -> str:
    """What is wrong with the first bad field, in a few words."""
    first = error.errors(include_url=False)[0]
    if first["type"] == "value_error":  # of an inner object, which `made` has explained
        return str(first["ctx"]["error"])
    name = ".".join(str(part).rstrip("_") for part in first["loc"] if part not in _OF_UNION) or "it"
    if first["type"] == "missing":
        return f"{name} is missing"
    return f"{name} is {first['input']!r:.80}"


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of a nested mapping with the path of each, joined by dots: `("measure.target", 0.0025)`.

    An empty mapping inside is a leaf.
    """
    for key, value in tree.items():
        path = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping) and value:
            yield from flat(value, path)
        else:
            yield path, value


def json_line(message: Mapping[str, Any]) -> bytes:
    """A JSON object in one line of ASCII, without its newline. Raises ValueError for NaN and infinities."""
    return json.dumps(message, separators=(",", ":"), allow_nan=False).encode("ascii")


def parsed_line(text: bytes, encoding: str = "ascii") -> dict[str, Any]:
    """The JSON object of one line, or of a small file.

    Raises ValueError where it is none, is nested too deep, or holds a number that is not finite.
    """
    try:
        value = json.loads(text.decode(encoding), parse_constant=_finite, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    if text.count(b"{") + text.count(b"[") > _MAX_DEPTH and _deeper(value, _MAX_DEPTH):
        raise ValueError("nested too deep")
    return value


def _deeper(value: Any, levels: int) -> bool:
    """Whether a JSON value is nested deeper than so many levels."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels < 0 or any(_deeper(each, levels - 1) for each in inner)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text:.20} is no finite number")
    return number


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return plain(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
