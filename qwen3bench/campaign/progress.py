"""What a run says while it works, on standard error: the pass, the step, the time left."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_WORTH_SAYING_S = 5.0
_QUIET_S = 10.0  # between two lines of one stage where the output is no terminal


class Stage:
    """A pass or a block in progress."""

    def __init__(self, reporter: Reporter, title: str, total: int) -> None:
        self._reporter = reporter
        self._title = title
        self._total = total
        self._done = -1
        self._started = self._said = time.monotonic()

    def step(self, what: str) -> None:
        """The next of the stage's steps begins."""
        self._done += 1
        now = time.monotonic()
        if self._reporter.bar is None and now - self._said >= _QUIET_S and self._done:
            self._said = now
            left = (now - self._started) / self._done * (self._total - self._done)
            self._reporter.note(f"  {self._done} of {self._total} ({what}), about {duration(left)} left")
        self._reporter.show(self._title, what, self._done, self._total)


class Reporter:
    """Bars on a terminal, lines elsewhere."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self.bar: Progress | None = None

    @contextmanager
    def running(self) -> Iterator[Reporter]:
        """Show progress until the run ends, however it ends."""
        if not self.console.is_terminal:
            yield self
            return
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=self.console, transient=True) as self.bar:
            self._task = self.bar.add_task("")
            try:
                yield self
            finally:
                self.bar = None

    @contextmanager
    def stage(self, title: str, total: int) -> Iterator[Stage]:
        """One pass or block of `total` steps."""
        if self.bar is not None:
            self.bar.reset(self._task, description=title, total=total)
        elif total:
            self.note(title)
        started = time.monotonic()
        yield Stage(self, title, total)
        elapsed_s = time.monotonic() - started
        if self.bar is None and elapsed_s >= _WORTH_SAYING_S:
            self.note(f"  took {elapsed_s:.0f} s")

    def show(self, title: str, what: str, done: int, total: int) -> None:
        """The present step, on a terminal."""
        if self.bar is not None:
            self.bar.update(self._task, description=f"{title}: {what}", completed=done, total=total)

    def note(self, text: str) -> None:
        """A line that stays. Control characters are escaped: what a worker says must not steer the terminal."""
        plain = "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)
        self.console.print(plain, markup=False)


def duration(seconds: float) -> str:
    """A length of time as a person says it."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
