"""Which part of the model an optimization changes, and which of them may change the same one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from qwen3bench.errors import UserError

ALL = "all"  # under `commutes`: every other that lists this one


@dataclass(frozen=True)
class Claim:
    """What the YAML file of an optimization says of the part that it changes; `part` is empty where it says nothing.

    A dot names a finer part of its own, as in `mlp.activation`. `commutes` lists those that may change the same part.
    """

    name: str
    part: str = ""
    commutes: tuple[str, ...] = ()

    @property
    def whole(self) -> str:
        """The part of `Parts`, without the finer one."""
        return self.part.partition(".")[0]

    def shares_with(self, other: Claim) -> bool:
        """Whether both may change one part: each lists the other, or they name finer parts that do not overlap."""
        if self.lists(other) and other.lists(self):
            return True
        finer = [f"{claim.part}." for claim in (self, other)]
        apart = not (finer[0].startswith(finer[1]) or finer[1].startswith(finer[0]))
        return self.whole == other.whole and apart

    def lists(self, other: Claim) -> bool:
        """Whether it says that it commutes with the other."""
        return other.name in self.commutes or ALL in self.commutes

    def conflict(self, other: Claim, part: str) -> UserError:
        """The error of two that claim one part and do not share it."""
        silent = [claim.name for claim, beside in ((self, other), (other, self)) if not claim.lists(beside)]
        lacking = " and ".join(f"opt/{name}.yaml" for name in silent)
        return UserError(
            f"optimizations {self.name} and {other.name} both replace the part '{part}'; switch one of them off\n"
            f"where one wraps what the other makes, each lists the other under commutes: {lacking} "
            f"{'does' if len(silent) == 1 else 'do'} not"
        )


@dataclass(frozen=True)
class Switch:
    """An optimization: its function Parts → Parts, options bound, and the part that it claims."""

    function: Callable[[Any], Any]
    claim: Claim

    def __call__(self, parts: Any) -> Any:
        return self.function(parts)


def refuse_conflicts(claims: Iterable[Claim], cells: Iterable[tuple[str, ...]]) -> None:
    """Raise `UserError` where two that are on in one cell declare the same part and do not share it."""
    clashing = [
        (one, other)
        for one, other in combinations(claims, 2)
        if one.whole and one.whole == other.whole and not one.shares_with(other)
    ]
    if clashing:
        for cell in map(set, cells):
            for one, other in clashing:
                if {one.name, other.name} <= cell:
                    raise one.conflict(other, one.whole)
