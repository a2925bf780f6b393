"""How a job tells how far it is, and how it is told to stop. Used by every job; shown by `cli.terminal`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import monotonic
from typing import Protocol

from ..errors import Cancelled

#: What a job calls now and then with (bytes done, bytes in all). It runs in the thread of the job, and may raise to
#: stop it.
Progress = Callable[[int, int], None]

#: Seconds between two reports, so that telling costs nothing beside doing.
INTERVAL = 0.1


class CancelEvent(Protocol):
    """What tells jobs to stop: a `threading.Event`, or anything else with this method. The job asks it, in any thread, before
    each step, and does not change it: one event may stop several jobs."""

    def is_set(self) -> bool:
        """Whether the jobs that have this event are to stop."""


class Monitor:
    """The link between a job and its observer. The job calls `update` and `warn`; any thread may call `cancel`.

    `report` shows the progress. `tell` shows a warning; it may be called in any thread. By default the log "lamina" gets it,
    or standard error where that log has no handler. When `event` is set, that is as good as `cancel`."""

    def __init__(
        self,
        report: Progress | None = None,
        tell: Callable[[str], object] | None = None,
        event: CancelEvent | None = None,
    ) -> None:
        self._report = report
        self._tell = tell or _log
        self._stopped = threading.Event()
        self._event = event
        self._next = 0.0

    def cancel(self) -> None:
        """The job stops at its next step, removes what it made, and raises Cancelled."""
        self._stopped.set()

    @property
    def cancelled(self) -> bool:
        return self._stopped.is_set() or (self._event is not None and self._event.is_set())

    def check(self) -> None:
        """Raise Cancelled if the job was told to stop."""
        if self.cancelled:
            raise Cancelled("the job was stopped")

    def warn(self, text: str) -> None:
        """Tell the observer of something that does not end the job."""
        self._tell(text)

    def update(self, done: int, total: int) -> None:
        """`done` of `total` bytes are dealt with. Raises Cancelled if the job was told to stop."""
        self.check()
        if self._report is None:
            return
        now = monotonic()
        if now >= self._next or done >= total:
            self._next = now + INTERVAL
            self._report(done, total)


def _log(text: str) -> None:
    import logging

    logger = logging.getLogger("lamina")
    logger.warning(text if logger.hasHandlers() else f"lamina: warning: {text}")
