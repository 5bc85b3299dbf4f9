"""The types of the config's values, checked by pydantic; a mistake is one line that names the key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, TypeVar, get_type_hints

from pydantic import (
    AfterValidator,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    TypeAdapter,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from qwen3bench.config.choices import nearest
from qwen3bench.errors import UserError

Checked = TypeVar("Checked")

_MAX = 2**31 - 1  # no size, count or seed of a run is larger
_NOT_BLANK = r"^[^\x00]*[^\x00\s][^\x00]*$"  # the file system takes no NUL


def must_be(wanted: str) -> WrapValidator:
    """Make every mistake in a value read `KEY must be WANTED, not VALUE`."""

    def validate(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError("must_be", "{wanted}", {"wanted": wanted}) from None

    return WrapValidator(validate)


def one_of(*allowed: Any) -> WrapValidator:
    """Allow these values alone; a mistake names them and the nearest."""

    def validate(value: Any, _: ValidatorFunctionWrapHandler) -> Any:
        if value not in allowed:
            raise PydanticCustomError("one_of", "{allowed}", {"allowed": allowed})
        return value

    return WrapValidator(validate)


Count = Annotated[StrictInt, Field(ge=1, le=_MAX), must_be(f"a whole number from 1 to {_MAX}")]
ZeroOrOne = Annotated[StrictInt, Field(ge=0, le=1), must_be("0 or 1")]
CountOrZero = Annotated[StrictInt, Field(ge=0, le=_MAX), must_be(f"a whole number from 0 to {_MAX}")]
AnyCount = Annotated[StrictInt, Field(ge=1), must_be("a positive whole number")]
Positive = Annotated[StrictFloat, Field(gt=0, allow_inf_nan=False), must_be("a number above 0")]
PositiveAsIs = Annotated[StrictInt | StrictFloat, Field(gt=0, lt=math.inf), must_be("a positive number")]  # 1 stays 1
Share = Annotated[StrictFloat, Field(gt=0, lt=1), must_be("a number above 0 and below 1")]
Flag = Annotated[StrictBool, must_be("true or false")]
AnyText = Annotated[StrictStr, must_be("a text")]
Text = Annotated[StrictStr, Field(pattern=_NOT_BLANK), must_be("a text that is not empty")]
Distinct = AfterValidator(lambda values: list(dict.fromkeys(values)))


def validated(adapter: TypeAdapter[Checked], values: Mapping[Any, Any]) -> Checked:
    """Check and convert `values`. Raises `UserError` on the first mistake; it names the key."""
    try:
        return adapter.validate_python(values)
    except ValidationError as error:
        details = error.errors(include_url=False)
        unknown = {each["loc"] for each in details if each["type"] == "unexpected_keyword_argument"}
        raise UserError(_line(details[0], values, unknown)) from error


def check_fields(instance: Any, path: str) -> None:
    """Raise `UserError` where a field of a dataclass, `path` in the config, is not of its declared type."""
    for name, adapter in _field_adapters(type(instance)).items():  # type: ignore[arg-type]  # a class is hashable
        try:
            adapter.validate_python(getattr(instance, name))
        except ValidationError as error:
            detail = error.errors(include_url=False)[0]
            raise UserError(_line({**detail, "loc": (path, name)}, {}, set())) from error


@cache
def _field_adapters(kind: type) -> dict[str, TypeAdapter[Any]]:
    return {name: TypeAdapter(hint) for name, hint in get_type_hints(kind, include_extras=True).items()}


def _line(detail: ErrorDetails, values: Any, unknown: set[tuple[int | str, ...]]) -> str:
    *path, last = detail["loc"]
    key = ".".join(map(str, detail["loc"]))
    value, context = detail["input"], detail.get("ctx", {})
    match detail["type"]:
        case "missing":
            return f"{key} is missing from the config; give it as {key}=VALUE"
        case "unexpected_keyword_argument":
            for part in path:
                values = values[part]
            known = [str(name) for name in values if (*path, name) not in unknown]
            return f"there is no setting {key!r}{nearest(str(last), known) or '; there are ' + ', '.join(known)}"
        case "must_be":
            return f"{key} must be {context['wanted']}, not {value!r}"
        case "one_of":
            allowed = context["allowed"]
            known = [str(each) for each in allowed]
            return f"{key}={value!r} is unknown: use {' | '.join(known)}{nearest(str(value), known)}"
        case "dict_type" | "dataclass_type":
            return f"{key} must be a group of settings ({key}.KEY=VALUE), not {value!r}"
    return f"{key}: {detail['msg']}, not {value!r}"
