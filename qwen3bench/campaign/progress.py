"""What a run says while it works, on standard error: the pass, the step, the time left, the effects so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_QUIET_S = 30.0  # between two lines of progress where the output is no terminal
_REFRESH_PER_S = 2  # the supervisor shares the machine with what is timed
_TABLE_SHARE = 0.02  # of the time between blocks that may go to the table
_STOP = "Ctrl-C: stop and report"
_FREE_S = 0.05  # a table that takes no longer is made after each block


class Stage:
    """A pass, or a part of one, in progress."""

    def __init__(self, reporter: Reporter, title: str, total: int) -> None:
        self._reporter = reporter
        self._title = title
        self._total = total
        self._done = -1

    def step(self, what: str) -> None:
        """The next of the stage's steps begins."""
        self._done += 1
        self._reporter.show(f"{self._title}: {what}", f"{self._title}, {self._done} of {self._total} ({what})")


class Reporter:
    """One bar over the whole run on a terminal; elsewhere a line every 30 s at most."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._began = time.monotonic()
        self._due = self._began  # for the next line of progress
        self._end: float | None = None  # when the run is expected to end
        self._doing = ""
        self._table: Sequence[str] = ()
        self._has_answer = False  # so that ending early leaves a report
        self._measures = False  # from its announcement to its end
        self._facts: list[str] = []  # that wait for the next line
        self._answers: list[str] = []  # first ones, that wait for it too; at the end the report has better ones
        self._table_due = 0.0

    @contextmanager
    def running(self) -> Iterator[Reporter]:
        """Show progress until the run ends, however it ends; then the facts that still wait, in a line."""
        self._began = time.monotonic()
        if not self.console.is_terminal:
            try:
                yield self
            finally:
                self._measures = False
                if self._facts:
                    self._print(_joined(self._facts))
            return
        look = {"console": self.console, "refresh_per_second": _REFRESH_PER_S, "transient": True}
        with Live(get_renderable=self._shown, **look) as self._live:  # type: ignore[arg-type]
            try:
                yield self
            finally:
                self._live = None

    def measure(self, line: str, left_s: float) -> None:
        """Measuring begins, `line` says of what, and takes about `left_s` seconds: from here on facts may wait."""
        self.expect(left_s)
        self.note(line)
        self._measures = True
        self._due = time.monotonic() + _QUIET_S

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Stage]:
        """One pass of `total` steps."""
        self._doing = title
        if total:
            self._say(title)
        yield Stage(self, title, total)

    @contextmanager
    def part(self, title: str, total: int) -> Iterator[Stage]:
        """A part of a pass, such as a block, which has no line of its own."""
        self._doing = title
        yield Stage(self, title, total)

    def expect(self, left_s: float) -> None:
        """The run is expected to end in `left_s` seconds."""
        self._end = time.monotonic() + left_s

    def show(self, doing: str, line: str) -> None:
        """The present step; elsewhere than on a terminal a `line` about it, unless there was one in the last 30 s."""
        self._doing = doing
        left = "" if self._end is None else f", about {duration(self._left_s(time.monotonic()))} left"
        self._say(f"  {line}{left}")

    def table(self, made: Callable[[int], Sequence[str]]) -> None:
        """On a terminal, the lines that `made` gives for its width, under the bar.

        Where making them takes long, not each time.
        """
        started = time.monotonic()
        if self._live is None or started < self._table_due:
            return
        self._table = made(self.console.width)
        took_s = time.monotonic() - started
        self._table_due = 0.0 if took_s <= _FREE_S else started + took_s / _TABLE_SHARE

    def first_answer(self, line: str) -> None:
        """There is a first answer; elsewhere than on a terminal the `line` that tells it, if any, when one is due."""
        self._has_answer = True
        if line and self._live is None:
            self._answers.append(line)

    def note(self, text: str) -> None:
        """A line that stays; while a run measures elsewhere than on a terminal, a part of the next line that is due."""
        if self._live is None and self._measures:
            self._facts.append(text)
            self._say("")
        else:
            self._print(text)

    def _say(self, line: str) -> None:
        """Where the output is no terminal and a line is due: one line of what waits, and of progress."""
        now = time.monotonic()
        if self._live is None and now >= self._due:
            self._due = now + _QUIET_S
            waiting = [*self._facts, *[f"{_joined(self._answers)} ({_STOP})"] * bool(self._answers)]
            self._facts, self._answers = [], []
            self._print(_joined([*waiting, line]) if waiting else line)

    def _print(self, text: str) -> None:
        """A line. Control characters are escaped: what a worker says must not steer the terminal."""
        plain = "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)
        self.console.print(plain, markup=False)

    def _left_s(self, now: float) -> float:
        """What is left, never less than a twentieth of what is done: a pass that takes longer is not over."""
        return max((self._end or now) - now, (now - self._began) / 20)

    def _shown(self) -> Group:
        now = time.monotonic()
        done_s = now - self._began
        known = self._end is not None
        left_s = self._left_s(now)
        bar = ProgressBar(done_s + left_s, done_s, width=24) if known else ProgressBar(pulse=True, width=24)
        line = Table.grid(padding=(0, 1))
        left = f"{duration(left_s)} left" if known else "setting up"
        line.add_row(bar, Text(f"{left} · {_STOP}" if self._has_answer else left, no_wrap=True))
        texts = [Text(line) for line in ("", *self._table)] if self._table else []
        doing = Text("".join(each for each in self._doing if each.isprintable()))
        for text in (doing, *texts):
            text.truncate(self.console.width, overflow="ellipsis")
        return Group(line, doing, *texts)


def _joined(texts: Sequence[str]) -> str:
    """Those that are not empty, as one line."""
    return "; ".join(text.strip().removesuffix(".") for text in texts if text)


def duration(seconds: float) -> str:
    """A length of time as a person says it: `70 s`, `12 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if not hours:
        return f"{minutes} min"
    return f"{hours:,} h {minutes} min" if minutes else f"{hours:,} h"
