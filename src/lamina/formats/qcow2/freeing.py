"""Clusters that are about to be freed: they wait here until the loss of a reference is durable, then until the discard is.

Their reference counts fall only after that, so that the clusters can be allocated again. A delayed discard can therefore not
destroy new data, and a power cut, or an exception at any point, leaks a cluster at worst.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ...request import Child
    from .refcounts import Refcounts


class Freeing:
    """The waiting clusters of one image. Not thread-safe: the driver holds its lock around every call."""

    def __init__(self, file: Child, cluster_bits: int) -> None:
        self._file = file
        self._cluster_bits = cluster_bits
        # Runs (host offset, clusters), in the order in which they lost their references.
        self._unlinked: list[tuple[int, int]] = []
        self._discarded: list[tuple[int, int]] = []

    def __len__(self) -> int:
        """The number of waiting runs."""
        return len(self._unlinked) + len(self._discarded)

    @property
    def unlinked(self) -> int:
        """The number of runs that wait for the next flush."""
        return len(self._unlinked)

    def runs(self) -> Iterator[tuple[int, int]]:
        """All waiting runs (host offset, clusters)."""
        yield from self._discarded
        yield from self._unlinked

    def add(self, offset: int, clusters: int = 1) -> None:
        """The tables in memory have lost a reference to each of these clusters. Called after the change, never before."""
        waiting = self._unlinked
        if waiting and waiting[-1][0] + (waiting[-1][1] << self._cluster_bits) == offset:
            waiting[-1] = (waiting[-1][0], waiting[-1][1] + clusters)
        else:
            waiting.append((offset, clusters))

    def flushed(self, counts: Refcounts) -> None:
        """Called when the tables, and the discards of the previous flush, are on stable storage."""
        while self._discarded:
            counts.load(*self._discarded[-1])  # may fail; the next flush tries again
            counts.lower_loaded(*self._discarded.pop())  # removed from the list first, so that no count falls twice
        free = counts.last_references(self._unlinked)  # the other clusters are still in use
        if not counts.may_free(free):
            self._unlinked = [run for run in self._unlinked if run[0] >= counts.protected]  # the others are leaked
            free = counts.last_references(self._unlinked)
        self._discarded, self._unlinked = self._unlinked, []
        size = self._file.size
        for begin, end in self._ranges(free):
            self._file.discard(begin, max(min(end, size) - begin, 0))

    def _ranges(self, runs: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """The bytes (begin, end) of these runs, neighbours joined: 2,048 scattered writes of 256 KiB into a new overlay are
        discarded in one request of 0.1 s, not one by one in 0.5 s."""
        begin = end = 0
        for offset, clusters in sorted(runs):
            if offset != end:
                if begin < end:
                    yield begin, end
                begin = offset
            end = offset + (clusters << self._cluster_bits)
        if begin < end:
            yield begin, end
