"""One group of the config, read key by key."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwen3bench.config.choices import nearest, place
from qwen3bench.errors import UserError

_MOST = 2**31 - 1  # no size, count or seed of a run is larger


class Section:
    """One mapping of the config; each value is taken once, and what is left over was misspelt.

    Every method raises `UserError` where the value is missing or of the wrong type or size; it names the key.
    """

    def __init__(self, path: str, values: dict[Any, Any]) -> None:
        self.path = path
        self.values = dict(values)
        self.known: list[str] = []

    def key(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name

    def take(self, name: str) -> Any:
        self.known.append(name)
        if name not in self.values:
            raise UserError(f"{self.key(name)} is missing from the config; give it as {self.key(name)}=VALUE")
        return self.values.pop(name)

    def wrong(self, name: str, wanted: str, value: object) -> UserError:
        return UserError(f"{self.key(name)} must be {wanted}, not {value!r}")

    def section(self, name: str) -> Section:
        value = self.take(name)
        if not isinstance(value, dict):
            raise self.wrong(name, f"a group of settings ({self.key(name)}.KEY=VALUE)", value)
        return Section(self.key(name), value)

    def whole(self, name: str, least: int) -> int:
        value = self.take(name)
        if type(value) is not int or not least <= value <= _MOST:
            raise self.wrong(name, f"a whole number from {least} to {_MOST}", value)
        return value

    def optional_whole(self, name: str) -> int | None:
        return self._optional(name, lambda: self.whole(name, least=1))

    def number(self, name: str, below: float = math.inf) -> float:
        value = self.take(name)
        if type(value) not in (int, float) or not 0 < value < below:
            raise self.wrong(name, "a number above 0" + (f" and below {below:g}" if below < math.inf else ""), value)
        return float(value)

    def optional_number(self, name: str, below: float = math.inf) -> float | None:
        return self._optional(name, lambda: self.number(name, below))

    def text(self, name: str) -> str:
        value = self.take(name)
        if not isinstance(value, str) or not value.strip() or "\0" in value:
            raise self.wrong(name, "a text", value)
        return value

    def optional_path(self, name: str) -> Path | None:
        return self._optional(name, lambda: Path(self.text(name)).expanduser())

    def one_of(self, name: str, allowed: tuple[str, ...]) -> str:
        value = self.take(name)
        if value not in allowed:
            hint = nearest(str(value), allowed)
            raise UserError(f"{self.key(name)}={value!r} is unknown: use {' | '.join(allowed)}{hint}")
        return value

    def named_options(self, name: str) -> dict[str, dict[str, Any]]:
        """The options of each named choice, in the order that they ask for."""
        chosen = self.section(name)
        for choice, options in chosen.values.items():
            if not isinstance(choice, str) or not isinstance(options, dict):
                raise chosen.wrong(choice, "a group of settings", options)
        ordered = sorted(chosen.values, key=lambda choice: place(chosen.values[choice]))
        return {c: {k: v for k, v in chosen.values[c].items() if k != "order"} for c in ordered}

    def refuse_the_rest(self) -> None:
        for name in self.values:
            hint = nearest(str(name), self.known) or f"; there are {', '.join(self.known)}"
            raise UserError(f"there is no setting {self.key(str(name))!r}{hint}")

    def _optional(self, name: str, read: Callable[[], Any]) -> Any:
        if name in self.values and self.values[name] is None:
            return self.take(name)
        return read()
