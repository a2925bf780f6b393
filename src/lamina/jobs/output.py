"""The limit of what a job writes: a small file may read as terabytes. Used by `convert` and `copy`."""

from __future__ import annotations

from ..errors import LimitExceeded


class Output:
    """Counts bytes of data before they are written, and raises LimitExceeded where they are more than `limit`; None: there is
    no limit. `source`, for the message: whose data it is. `added`: the bytes so far, for whoever begins again at an earlier
    place. One thread calls `add`, and one may call `also`."""

    __slots__ = ("_also", "_limit", "_source", "added")

    def __init__(self, limit: int | None, source: str) -> None:
        self._limit = limit
        self._source = source
        self.added = self._also = 0

    def add(self, count: int) -> None:
        """`count` more bytes are to be written."""
        self.added += count
        self._check()

    def also(self, count: int) -> None:
        """`count` bytes in all come another way."""
        self._also = count
        self._check()

    def _check(self) -> None:
        if self._limit is not None and self.added + self._also > self._limit:
            raise LimitExceeded(
                f"it holds more than the {self._limit} bytes of data that may be written",
                path=self._source,
                hint="if that is expected, allow more (--max-output; max_output in the budget)",
            )
