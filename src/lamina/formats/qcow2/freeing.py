"""Clusters on their way to being free: what lost a reference waits here until that is durable, then until its discard is.

Only then is its count lowered, so that it can be given out again. A late discard of the file can therefore never hit what is
stored there next, and a power cut, or an exception at any point, leaks a cluster at worst.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...request import Child
    from .refcounts import Refcounts


class Freeing:
    """The clusters of one image that wait. Not thread-safe: the driver holds its lock around every call."""

    def __init__(self, file: Child, cluster_bits: int) -> None:
        self._file = file
        self._cluster_bits = cluster_bits
        # Stretches (host offset, clusters), in the order in which they lost their references.
        self._unlinked: list[tuple[int, int]] = []
        self._discarded: list[tuple[int, int]] = []

    def __len__(self) -> int:
        """How many stretches wait."""
        return len(self._unlinked) + len(self._discarded)

    @property
    def unlinked(self) -> int:
        """How many stretches wait for the next flush."""
        return len(self._unlinked)

    def add(self, offset: int, clusters: int = 1) -> None:
        """A reference to each of these clusters is gone from the tables in memory. Called after it is gone, never before."""
        waiting = self._unlinked
        if waiting and waiting[-1][0] + (waiting[-1][1] << self._cluster_bits) == offset:
            waiting[-1] = (waiting[-1][0], waiting[-1][1] + clusters)
        else:
            waiting.append((offset, clusters))

    def flushed(self, counts: Refcounts) -> None:
        """Everything in the tables is on stable storage now, and so are the discards of the time before."""
        while self._discarded:
            counts.load(*self._discarded[-1])  # whatever can fail comes first, and is tried again by the next flush
            counts.lower_loaded(*self._discarded.pop())  # no longer waiting before it is lowered: never lowered twice
        self._discarded, self._unlinked = self._unlinked, []
        for offset, clusters in counts.last_references(self._discarded):  # others are still in use
            inside = max(self._file.size - offset, 0)
            self._file.discard(offset, min(clusters << self._cluster_bits, inside))
