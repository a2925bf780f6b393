"""The limit of a job's output: a small file may read as terabytes. Used by `convert` and `copy`."""

from __future__ import annotations

from ..errors import Hint, LimitExceeded


class OutputLimit:
    """Counts bytes of data before a job writes them, and raises LimitExceeded if they are more than `limit`; None: no limit.
    `source`: the file name for the message. `added`: the bytes so far; a job that resumes at an earlier offset resets it.
    One thread calls `add`, and one may call `set_offloaded`."""

    __slots__ = ("_limit", "_offloaded", "_source", "added")

    def __init__(self, limit: int | None, source: str) -> None:
        self._limit = limit
        self._source = source
        self.added = self._offloaded = 0

    def add(self, count: int) -> None:
        """The job is about to write `count` more bytes."""
        self.added += count
        self._check()

    def set_offloaded(self, count: int) -> None:
        """The operating system copies `count` bytes in all."""
        self._offloaded = count
        self._check()

    def _check(self) -> None:
        if self._limit is not None and self.added + self._offloaded > self._limit:
            raise LimitExceeded(
                f"it holds more than the {self._limit} bytes of data that may be written",
                path=self._source,
                hint=Hint(
                    "if that is expected, allow more: max_output=..., here or in the budget",
                    command="if that is expected, allow more: --max-output SIZE",
                ),
            )
