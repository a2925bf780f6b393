"""Repair: reference counts and flags COPIED made anew from the references that the check finds, published by one write.

All references are counted, those past the end of the file too, before a cluster is allocated. Nothing that they or the old
counts name is written to; so wherever the power is cut the image is the old one or the repaired one, and no byte of the guest
changes. What counts cannot mend (an entry that points to what cannot be, two structures in one place) stays a finding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from ...errors import CorruptImage, LimitExceeded
from ...limits import MAX_SIZE, align_up
from ...numeric import np
from . import snapshot_table
from .cluster_set import ClusterSet
from .l1_table import offsets_of
from .references import REFCOUNT_BLOCK, REFCOUNT_TABLE, References
from .rewrite import L1Place, Rewrite

if TYPE_CHECKING:
    from .tables import Tables

#: References so many clusters past the end of the file, and once its length, are counted; nothing is allocated behind those
#: that lie further out.
_BEHIND = 1 << 16


def repair(tables: Tables, book: Callable[[int], None], what: Literal["leaks", "all"]) -> tuple[None, Any]:
    """Mend counts that are too high, and with "all" also those that are too low, and flags. Returns None and the parts of the
    file (offset, length) that are free now."""
    header = tables.header
    change = _Recount(tables, book, what)
    entries = snapshot_table.read(tables.file, header)
    active = L1Place(header.l1_table_offset, header.l1_size)
    found = change.entries_of(active)
    change.release(active.offset, 8 * active.entries)
    change.publish(found, entries, entries, size=header.size)
    header.lost_refcounts = None
    return None, change.freed()


class _Recount(Rewrite):
    """A rewrite whose counts come from references instead of the refcount blocks, none of which it keeps."""

    def __init__(self, tables: Tables, book: Callable[[int], None], what: Literal["leaks", "all"]) -> None:
        self._what = what
        self._limit = MAX_SIZE
        super().__init__(tables, book)

    def _claimed(self) -> ClusterSet:
        return ClusterSet()  # where structures lie over one another, the references say so

    def _refcount_table(self) -> Any:
        raw = bytearray(self._header.refcount_table_clusters << self._bits)
        self._file.read_into(self._header.refcount_table_offset, memoryview(raw))
        entries = np.frombuffer(raw, ">u8").astype(np.uint64)
        usable = (entries % np.uint64(self._cluster) == 0) & (entries < np.uint64(self._file.size))
        return np.where(usable, entries, np.uint64(0)).astype(np.int64)

    def _prepare(self) -> None:
        super()._prepare()
        found = References(self._file, self._header)
        found.walk()
        reach = 2 * found.clusters + _BEHIND
        behind = [part for parts in found.outside.values() for part in parts]
        highest = max((int(part[part < reach].max(initial=0)) for part in behind), default=0)
        far = [int(part[part >= reach].min(initial=self._limit)) for part in behind]
        self._limit = min(far, default=self._limit)
        length = align_up(max(len(self._counts), found.clusters + 1, highest + 1), self._per_block)
        grown = np.zeros(length, self._counts.dtype)
        grown[: len(self._before)] = self._before
        self._before = grown
        counts = np.zeros(length, np.int64)
        structures = np.zeros(length, np.bool_)
        for uses in (found.uses, found.outside):
            for use, parts in uses.items():
                for part in parts:
                    inside = part[part < length]
                    if use.kind in (REFCOUNT_TABLE, REFCOUNT_BLOCK):
                        structures[inside] = True
                    else:
                        np.add.at(counts, inside, use.weight)
        if int(counts.max()) > self._most:
            raise LimitExceeded(
                f"a cluster has more references than {self._header.refcount_bits} bits count",
                path=self._path,
                hint="convert the image to one with larger counts (refcount_bits)",
            )
        old = self._before.astype(np.int64)
        old[structures & (counts == 0)] = 0  # the blocks and the table of now are replaced
        used = (counts != 0) | structures | (self._before != 0)
        if found.incomplete:  # tables that could not be read may refer to what seems to be free
            if self._header.lost_refcounts is not None:
                raise CorruptImage(
                    "the refcounts are lost, and cannot be made anew, since some tables cannot be read",
                    path=self._path,
                    hint="convert the image to a new one",
                )
            counts = np.maximum(counts, old)
            used[: found.clusters] = True
        #: With "leaks", the references to each cluster beyond its count.
        self._uncounted = np.zeros(0, np.int64)
        if self._what == "leaks":
            counted = np.minimum(counts, old)
            self._uncounted, counts = counts - counted, counted
        if self._header.lost_refcounts is not None:  # nothing lies there before the header names another place
            offset, size = self._header.lost_refcounts
            used[offset >> self._bits : -(-(offset + size) >> self._bits)] = True
        self._counts = counts.astype(self._before.dtype)
        self._free = np.flatnonzero(~used)

    def release(self, offset: int, length: int) -> None:
        first = offset >> self._bits
        clusters = np.arange(first, first + (-(-length >> self._bits)), dtype=np.int64)
        inside = clusters[clusters < len(self._uncounted)]
        uncounted = inside[self._uncounted[inside] > 0]
        self._uncounted[uncounted] -= 1  # else the count of a cluster that is still in use could fall to 0
        self._change(np.setdiff1d(clusters, uncounted), -1)

    def _allocate(self, clusters: int) -> int:
        offset = super()._allocate(clusters)
        if (offset >> self._bits) + clusters > self._limit:
            raise CorruptImage("the tables of the image point far past the end of its file", path=self._path)
        return offset

    def _own_flags(self, entries: Any) -> Any:
        if self._what == "leaks":
            return entries
        offsets = offsets_of(entries).astype(np.int64)
        usable = (offsets % self._cluster == 0) & (offsets < self._file.size)
        return np.where(usable, super()._own_flags(np.where(usable, entries, np.uint64(0))), entries)

    def _counts_at(self, clusters: Any) -> Any:
        return self._counts[np.minimum(clusters, len(self._counts) - 1)]

    def _release_counts(self) -> None:
        """The old table and blocks are not counted."""
        self._table = np.zeros(0, np.int64)

    def _changed_blocks(self) -> list[int]:
        return np.flatnonzero(self._counts.reshape(-1, self._per_block).any(axis=1)).tolist()
