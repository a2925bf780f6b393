"""Progress of commands, on a terminal or as lines in a log."""

from __future__ import annotations

import sys
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Self

from ..errors import printable
from . import program, signals

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

#: Seconds after which a job shows a progress bar on a terminal without `-p`.
_DELAY = 2.0


class Meter:
    """Shows the progress of a job. A context manager; `report` is the progress callback of the job.

    With `asked` (`-p`) the progress is a bar on standard error if that is a terminal, otherwise lines in the format of
    qemu-img on standard output. Without it a long job shows a bar on a terminal. `quiet` disables both. `piped`: no lines,
    since standard output carries the copied bytes. SIGUSR1 always prints one line on standard error.
    """

    def __init__(self, what: str, *, asked: bool, quiet: bool = False, piped: bool = False) -> None:
        self._what = what
        self._terminal = sys.stderr.isatty() and not program.current.plain_progress
        self._lines = asked and not self._terminal and not quiet and not piped
        self._begin = monotonic() + (0.0 if asked else _DELAY)
        self._bars = self._terminal and not quiet
        self._shown: tuple[Progress, TaskID] | None = None
        self._done, self._total = 0, 1

    def report(self, done: int, total: int) -> None:
        signals.check()
        self._done, self._total = done, total
        if self._lines:
            sys.stdout.write(f"{self._percent()}\r")
            sys.stdout.flush()
        elif self._shown is not None:
            bar, task = self._shown
            bar.update(task, completed=done, total=total)
        elif self._bars and monotonic() >= self._begin:
            self._shown = self._open_bar(total)

    def _open_bar(self, total: int) -> tuple[Progress, TaskID]:
        # The import takes longer than a short job, so it happens only if a bar is shown.
        from rich.console import Console
        from rich.markup import escape
        from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

        columns = ("{task.description}", BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
        bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
        bar.start()
        return bar, bar.add_task(escape(printable(self._what)), total=total)

    def _percent(self) -> str:
        return f"    ({100 * self._done / self._total if self._total else 100:.2f}/100%)"

    def __enter__(self) -> Self:
        signals.progress = lambda: f"{self._percent()}\n"
        if self._lines:
            self.report(0, 1)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        signals.progress = None
        if self._shown is not None:
            self._shown[0].stop()
        if self._lines:
            sys.stdout.write("\n")
