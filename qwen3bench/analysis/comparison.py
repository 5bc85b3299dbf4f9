"""What changed between two runs, and whether something got slower."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from qwen3bench.analysis.changes import PLACE, Compared, judged_table, ok_cells
from qwen3bench.analysis.contrasts import others_of
from qwen3bench.analysis.doubts import Controlled, Doubt, doubts
from qwen3bench.analysis.regression import Change
from qwen3bench.analysis.run import Run
from qwen3bench.errors import UserError
from qwen3bench.record.states import CellStatus
from qwen3bench.record.typed import flat

TOLERANCE = 0.03  # of a latency: less than that, few would hold a change back for
_KEYS = ["cell", *PLACE]
_MOST = 6  # of what one run alone has, named; the cells of a screen are 64
# Settings that say where results go or how they are shown, not what was measured.
_NOT_COMPARED = ("run.", "resume", "report.")


@dataclass(frozen=True)
class Comparison:
    """What differs between runs A and B; `ratio` above 1: B is faster, or needs less.

    - `config`, `environment`: key, a, b of the settings that differ
    - `status`: cell, workload, runtime, a, b of the cells whose status differs
    - `changes`: what `changes.judged_table` gives
    - `latency`: cell, workload, runtime, a, b in seconds, as in cells.csv
    - `memory`: cell, workload, runtime, a, b in bytes, ratio (A / B) where the peak differs
    - `only`: what one run alone holds, in words
    - `lost`: cells that are ok in A and not in B, though B measures their workload and runtime, in words; those that
      confirm a screen are not among them, as each run chooses its own
    - `unlike`: sizes, model, dtype, clipping of gradients and threads of one CPU in which what is compared differs, in
      words
    - `warnings`: what makes a run less than it should be, in words: unfinished, noisy
    - `doubts`: why the runs cannot tell whether something got slower by the `tolerance`
    """

    config: pd.DataFrame
    environment: pd.DataFrame
    status: pd.DataFrame
    changes: pd.DataFrame
    latency: pd.DataFrame
    memory: pd.DataFrame
    only: list[str]
    lost: list[str]
    unlike: list[str]
    warnings: list[str]
    doubts: list[Doubt]
    tolerance: float

    @property
    def judged(self) -> pd.DataFrame:
        """The changes that a gate goes by.

        Interactions are not among them: where one switch alone gets better, that with another falls. What a fall costs
        shows in the cells.
        """
        return self.changes[self.changes["kind"] != Compared.INTERACTION]

    @property
    def slower(self) -> pd.DataFrame:
        """The judged changes that are slower."""
        return self.judged[self.judged["change"] == Change.SLOWER]

    @property
    def failed(self) -> pd.DataFrame:
        """Of `status`, the cells that are no longer ok."""
        return self.status[self.status["a"] == CellStatus.OK]

    @property
    def regressed(self) -> bool:
        """Whether something got slower, is no longer ok or is no longer measured."""
        return bool(len(self.slower) or len(self.failed) or self.lost)


def compare(a: Run, b: Run, tolerance: float = TOLERANCE, *, latency: bool = False) -> Comparison:
    """What changed from run A to run B, and whether it got slower by the `tolerance` (a fraction of the latency).

    Judged are the main effects, each cell's speed-up over the baseline, and its ratio to each peer of both runs. They
    are told within a run, so what all cells share, such as the machine's state, leaves them. `latency`: judge raw
    latencies too, which it does not leave. Effects are compared where both runs tell the same average over the same
    switches; one that is a ratio to the baseline is that cell's speed-up. Holm's p is over all that is judged, and
    apart from it over the interactions.

    Raises `UserError` where no cell under a workload and runtime is in both: nothing would be compared, and a gate
    must not pass for that.
    """
    if a.cells.merge(b.cells, on=_KEYS).empty:
        raise UserError(
            f"{a.path} and {b.path} have no cell under the same workload and runtime; there is nothing to compare"
        )
    changes = judged_table(a, b, Controlled(a, b).noise(), tolerance, latency=latency)
    return Comparison(
        config=_differences(a.config, b.config),
        environment=_differences(*_known_to_both(a.environment, b.environment)),
        status=_status(a, b),
        changes=changes,
        latency=_pairs(a, b, "latency_s"),
        memory=_memory(a, b),
        only=_only(a, b),
        lost=_lost(a, b),
        unlike=_unlike(a, b),
        warnings=[*_warnings("A", a), *_warnings("B", b)],
        doubts=doubts(a, b, changes, tolerance),
        tolerance=tolerance,
    )


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> pd.DataFrame:
    flat_a, flat_b = dict(flat(a)), dict(flat(b))
    keys = [k for k in dict.fromkeys([*flat_a, *flat_b]) if not k.startswith(_NOT_COMPARED)]
    rows = [(k, flat_a.get(k), flat_b.get(k)) for k in keys if flat_a.get(k) != flat_b.get(k)]
    return pd.DataFrame(rows, columns=["key", "a", "b"], dtype=object)


def _known_to_both(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Two environments without what an older version did not write down: not known then is no difference."""
    if not (a and b):
        return a, b
    known = [key for key in a if key in b]
    return {key: a[key] for key in known}, {key: b[key] for key in known}


def _status(a: Run, b: Run) -> pd.DataFrame:
    both = a.cells[[*_KEYS, "status"]].merge(b.cells[[*_KEYS, "status"]], on=_KEYS, suffixes=("_a", "_b"))
    both = both.rename(columns={"status_a": "a", "status_b": "b"}).astype(object)
    both = both.where(both.notna(), None)
    return both.loc[[x != y for x, y in zip(both["a"], both["b"], strict=True)]].reset_index(drop=True)


def _pairs(a: Run, b: Run, column: str) -> pd.DataFrame:
    """`column` of both runs' cells that are ok, in B's order."""
    left, right = (ok_cells(run)[[*_KEYS, column]].dropna() for run in (a, b))
    both = right.merge(left, on=_KEYS, suffixes=("_b", "_a"))
    return both.rename(columns={f"{column}_a": "a", f"{column}_b": "b"})[[*_KEYS, "a", "b"]].astype(
        {"a": float, "b": float}
    )


def _memory(a: Run, b: Run) -> pd.DataFrame:
    both = _pairs(a, b, "peak_allocated_bytes")
    both = both[both["a"] != both["b"]].reset_index(drop=True)
    return both.assign(ratio=both["a"] / both["b"])


def _warnings(name: str, run: Run) -> Iterator[str]:
    if not run.finished:
        yield f"{name} has not finished: what is here is what was measured until now"
    for row in run.controls.aa.to_dict("records"):
        if row["noisy"]:
            off = f"{100 * abs(row['ratio'] - 1):.2g} % apart, more than {100 * row['limit']:g} %"
            yield f"{name} is noisy: two copies of the baseline are {off} ({row['workload']}, {row['runtime']})"


def _only(a: Run, b: Run) -> list[str]:
    said = []
    for name, run, other in (("A", a, b), ("B", b, a)):
        for what, column in (("cell", "cell"), ("workload", "workload"), ("runtime", "runtime")):
            theirs = set(other.cells[column])
            alone = [str(v) for v in dict.fromkeys(run.cells[column]) if v not in theirs]
            if alone:
                named = [*alone[:_MOST], *[f"{len(alone) - _MOST} more"] * (len(alone) > _MOST)]
                said.append(f"{what}{'s' if len(alone) > 1 else ''} in {name} alone: {', '.join(named)}")
    if differ := set(a.factors) ^ set(b.factors):
        text = "an effect is an average over the others, so effects are not compared"
        said.append(f"not both vary {', '.join(sorted(differ))}: {text}")
    told = [_told(run) for run in (a, b)]
    unlike = {key: (told[0][key], told[1][key]) for key in told[0] if told[1].get(key, told[0][key]) != told[0][key]}
    for where in dict.fromkeys(unlike.values()):
        terms = dict.fromkeys(key[-1] for key, others in unlike.items() if others == where)
        in_a, in_b = (text or "as an average over the others" for text in where)
        said.append(f"not compared: {', '.join(terms)}, told {in_a} in A and {in_b} in B")
    return said


def _lost(a: Run, b: Run) -> list[str]:
    there = b.cells[PLACE].drop_duplicates()
    asked = (a.cells["status"] == CellStatus.OK) & a.cells["cell"].isin(a.record.run.cells)
    ok = a.cells.loc[asked, _KEYS].merge(there, on=PLACE)
    left = ok.merge(b.cells[_KEYS], on=_KEYS, how="left", indicator="found")
    return [f"{r.cell} ({r.workload}, {r.runtime})" for r in left[left["found"] == "left_only"].itertuples()]


def _unlike(a: Run, b: Run) -> list[str]:
    both = a.cells.merge(b.cells, on=_KEYS, suffixes=("_a", "_b"))
    said = []
    for name in ("model", "dtype", "batch_size", "prompt_tokens", "new_tokens"):
        pairs = both[[f"{name}_a", f"{name}_b"]].dropna().drop_duplicates().itertuples(index=False, name=None)
        said += [f"{name} {old} and {new}" for old, new in pairs if old != new]
    there = [name for name in dict.fromkeys(both["workload"]) if (name in a.last_logits) != (name in b.last_logits)]
    said += [f"logits_to_keep {name in a.last_logits:d} and {name in b.last_logits:d}" for name in there]
    clips = [run.record.run.setting("workload", "train", "clip") for run in (a, b)]
    if "train" in set(both["workload"]) and clips[0] != clips[1]:
        said.append("clip {} and {}".format(*("none" if clip is None else clip for clip in clips)))
    same_cpu = a.record.run.device == b.record.run.device and None not in (a.threads, b.threads)
    if same_cpu and a.threads != b.threads:
        said.append(f"threads {a.threads} and {b.threads}")
    return said


def _told(run: Run) -> dict[tuple[str, ...], str]:
    """What the other switches do where the main effects on latency are told, by workload, runtime and term."""
    table = run.effects[(run.effects["metric"] == "latency_s") & (run.effects["kind"] == "main")]
    table = table[table["estimate"].notna()]
    keys = table[[*PLACE, "term"]].itertuples(index=False, name=None)
    return dict(zip(keys, map(others_of, table["reason"]), strict=True))
