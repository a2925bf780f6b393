"""Progress of commands, on a terminal or as lines in a log."""

from __future__ import annotations

import sys
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from ..errors import printable
from . import program, signals

if TYPE_CHECKING:
    from rich.progress import Progress

#: Seconds after which a job shows a progress bar on a terminal without `-p`.
_DELAY = 2.0
#: Seconds between two changes of a plain bar.
_INTERVAL = 0.1


class _Bar(Protocol):
    """What is shown on a terminal."""

    def update(self, done: int, total: int) -> None: ...

    def stop(self) -> None:
        """Remove it from the terminal."""
        ...


class Meter:
    """Shows the progress of a job. A context manager; `report` is the progress callback of the job.

    With `asked` (`-p`) the progress is a bar on standard error if that is a terminal, otherwise lines in the format of
    qemu-img on standard output. Without it a long job shows a bar on a terminal. `quiet` disables both. `piped`: no lines,
    since standard output carries the copied bytes. SIGUSR1 always prints one line on standard error. The bar is rich's;
    without rich (the extra `cli`) it is the percentage alone.
    """

    def __init__(self, what: str, *, asked: bool, quiet: bool = False, piped: bool = False) -> None:
        self._what = what
        self._terminal = sys.stderr.isatty() and not program.current.plain_progress
        self._lines = asked and not self._terminal and not quiet and not piped
        self._begin = monotonic() + (0.0 if asked else _DELAY)
        self._bars = self._terminal and not quiet
        self._shown: _Bar | None = None
        self._done, self._total = 0, 1

    def report(self, done: int, total: int) -> None:
        signals.check()
        self._done, self._total = done, total
        if self._lines:
            sys.stdout.write(f"{self._percent()}\r")
            sys.stdout.flush()
        elif self._shown is not None:
            self._shown.update(done, total)
        elif self._bars and monotonic() >= self._begin:
            self._shown = self._open_bar(total)

    def _open_bar(self, total: int) -> _Bar:
        try:
            return _RichBar(self._what, total)
        except ImportError:
            return _PlainBar(self._what)

    def _percent(self) -> str:
        return _percent(self._done, self._total)

    def __enter__(self) -> Self:
        signals.progress = lambda: f"{self._percent()}\n"
        if self._lines:
            self.report(0, 1)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        signals.progress = None
        if self._shown is not None:
            self._shown.stop()
        if self._lines:
            sys.stdout.write("\n")


class _RichBar:
    """The bar of rich, with the rate and the time that is left. Raises ImportError without rich."""

    def __init__(self, what: str, total: int) -> None:
        # The import takes longer than a short job, so it happens only if a bar is shown.
        from rich.console import Console
        from rich.markup import escape
        from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

        columns: Any = ("{task.description}", BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
        self._bar: Progress = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
        self._bar.start()
        self._task = self._bar.add_task(escape(printable(what)), total=total)

    def update(self, done: int, total: int) -> None:
        self._bar.update(self._task, completed=done, total=total)

    def stop(self) -> None:
        self._bar.stop()


class _PlainBar:
    """One line on standard error, written over itself."""

    def __init__(self, what: str) -> None:
        self._what = printable(what)
        self._next = 0.0
        self._width = 0

    def update(self, done: int, total: int) -> None:
        now = monotonic()
        if now >= self._next:
            self._next = now + _INTERVAL
            self._write(f"{self._what}{_percent(done, total)}")

    def stop(self) -> None:
        self._write("")
        self._write("")

    def _write(self, text: str) -> None:
        sys.stderr.write(f"\r{text:<{self._width}}")
        sys.stderr.flush()
        self._width = len(text)


def _percent(done: int, total: int) -> str:
    return f"    ({100 * done / total if total else 100:.2f}/100%)"
