"""What commands show: progress on a terminal or in a log, and texts that cannot drive a terminal."""

from __future__ import annotations

import sys
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Self

from ..errors import printable
from . import signals

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

#: Seconds after which a job shows a bar on a terminal though nobody asked for it.
_PATIENCE = 2.0


class Meter:
    """Shows how far a job is; a context manager, whose `report` is the job's progress callback.

    With `asked` (`-p`) always: a bar if standard error is a terminal, else the lines that scripts know, on standard
    output. Without it only a terminal sees a bar, once the job takes long. `quiet` shows nothing at all. SIGUSR1 asks for one
    line on standard error, always.
    """

    def __init__(self, what: str, *, asked: bool, quiet: bool = False) -> None:
        self._what = what
        self._terminal = sys.stderr.isatty()
        self._lines = asked and not self._terminal and not quiet
        self._begin = monotonic() + (0.0 if asked else _PATIENCE)
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
        # Costs more than a short job: imported only when there is a terminal to show it on.
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
