"""The qcow2 node: the mapping of `mapping.py` and the counts of `refcounts.py`, and the order in which they reach the disk.

What a write changes in the tables stays in memory until a flush, and a flush writes in an order that leaves the image whole
wherever the power is cut (see `Qcow2.flush`). Overwriting a cluster that is this image's own goes straight to it.
"""

from __future__ import annotations

import threading
from array import array
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from ...errors import CorruptImage, LaminaError, NotSupported
from ...format_node import Columns, FormatNode, Mapping, Reservation, To
from ...limits import Limits, align_up
from ...node import COMPRESS
from ...references import Reference
from ...request import Child
from ...schema import Option, Schema
from . import create as _create
from . import layout as q
from . import sparse
from .compression import Compression
from .freeing import Freeing
from .header import Header
from .mapping import Mappings, Table
from .refcounts import Refcounts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from collections.abc import Mapping as Options

    from ...graph import Opener
    from ...report import CheckReport
    from ...results import ImageInfo


_Result = TypeVar("_Result")
#: Clusters that are zeroed or discarded while the tables are locked, some 20 ms; other requests come in between.
_STEP_CLUSTERS = 1 << 15
#: Stretches that wait to be freed before the tables are written out early.
_MAX_UNLINKED = 4096


class Qcow2(FormatNode):
    """An image of format qcow2, version 2 or 3, over the child `file` and, if it has one, the child `backing`."""

    driver: ClassVar[str] = "qcow2"
    faithful = True
    schema: ClassVar[Schema] = Schema(
        "qcow2",
        [
            Option("file", "node", "where the image lies", required=True),
            Option("backing", "node", "the layer below, instead of the one that the image names"),
        ],
    )
    create_schema: ClassVar[Schema] = _create.SCHEMA
    prepare_create = staticmethod(_create.prepare)

    def __init__(
        self, file: Child, header: Header, *, read_only: bool, cache_bytes: int, name: str | None = None
    ) -> None:
        super().__init__(name=name, read_only=read_only)
        self.children["file"] = self.file = file
        self.header = header
        self._cluster_size = header.cluster_size
        self._cluster_bits = header.cluster_bits
        # Around all tables, in memory and on their way to the disk; never held while guest data is read or written.
        self._lock = threading.RLock()
        self._mappings = Mappings(file, header, cache_bytes // 2, writable=not read_only)
        self._map_one = self._mappings.map_one  # asked by every read
        self._cache_bytes = cache_bytes
        self._refcounts_: Refcounts | None = None
        self._freeing = Freeing(file, header.cluster_bits)
        #: The header on disk may say another size than the one in memory: a change of it was cut short.
        self.size_unsure = False
        self._compression = Compression(self)
        self.supported_flags = COMPRESS if self._compression.compresses else 0

    @classmethod
    def open(cls, options: dict[str, Any], opener: Opener) -> Self:
        file = opener.child("file", options["file"], grows=True)
        header = Header.read(file)
        path = file.node.filename
        header.require_openable(path, writable=not opener.read_only)
        stored = sparse.stored_bytes(file, header.l1_table_offset, header.l1_size * 8)
        opener.book(stored, "the L1 table", path)
        node = cls(file, header, read_only=opener.read_only, cache_bytes=opener.cache_bytes, name=opener.name)
        named = Reference(header.backing_file, "backing", "backing file", format=header.backing_format)
        backing = opener.reference(file, named, options.get("backing", {}))
        if backing is not None:
            node.children["backing"] = backing
        if not opener.read_only and header.autoclear_features:
            # They promise that a writer kept something up to date which this one does not know.
            header.autoclear_features = 0
            header.store(file, "autoclear_features")
        return node

    @classmethod
    def create(cls, storage: Child, size: int, values: Options[str, Any]) -> None:
        _create.create(storage, size, values)

    @classmethod
    def inspect(cls, storage: Child, values: Options[str, Any]) -> ImageInfo:
        return _create.describe(Header.read(storage))

    def check(self) -> CheckReport:
        from .check import check

        if not self.read_only:
            self.flush()
        return check(self.file, self.header)

    # -- what it is

    @property
    def size(self) -> int:
        return self.header.size

    @property
    def serialise(self) -> int:
        return self._cluster_size

    @property
    def limits(self) -> Limits:
        size = self._cluster_size
        step = _STEP_CLUSTERS * size
        return Limits(
            zero_alignment=size,
            max_zero=step,
            discard_alignment=size,
            max_discard=step,
            compress_alignment=size if self._compression.compresses else 0,
        )

    @property
    def _refcounts(self) -> Refcounts:
        """Loaded at the first change: reading needs no counts."""
        if self._refcounts_ is None:
            counts = Refcounts(self.file, self.header, self._cache_bytes // 2)
            first = self.header.l1_table_offset >> self._cluster_bits
            own = range(first, first + -(-self.header.l1_size * 8 >> self._cluster_bits))
            # Entries without COPIED may name one table together: whoever changes it takes a copy.
            copied, shared = (self._mappings.l2_clusters(copied=flag) for flag in (True, False))
            counts.claim(chain([own], copied), shared)
            self._refcounts_ = counts
        return self._refcounts_

    # -- the mapping

    def map(self, offset: int, length: int) -> Mapping:
        found = self._map_one(offset, length)
        if found is not None:
            return found
        with self._lock:
            self.require_outside_changes()
            return self._mappings.map(offset, length)

    def map_columns(self, offset: int, length: int) -> Columns:
        with self._lock:
            self.require_outside_changes()
            return self._mappings.map_columns(offset, length)

    def load(self, mapping: Mapping, offset: int, view: memoryview) -> None:
        self._compression.read_into(mapping.token, offset & self._cluster_size - 1, view)

    def changing(self, work: Callable[..., _Result], *arguments: Any) -> _Result:
        """What `work(*arguments)` returns, called with the tables locked. Where they turn out to be corrupt the image is
        marked so. (An interrupt cannot divide `with` and a lock of the interpreter; an `__enter__` of our own it could.)"""
        with self._lock:
            self.require_outside_changes()
            self.changes = True
            try:
                return work(*arguments)
            except CorruptImage:
                if not self.read_only:
                    self.mark_corrupt()
                raise
            finally:
                self.changes = False

    def reserve(self, offset: int, length: int) -> Reservation:
        return self.changing(self._reserve, offset, length)

    def _reserve(self, offset: int, length: int) -> Reservation:
        bits, cluster_size = self._cluster_bits, self._cluster_size
        within = offset & cluster_size - 1
        cluster = offset >> bits
        which, index = divmod(cluster, self._mappings.per_table)
        # No further than the last cluster of this request, and of this L2 table.
        stop = min(index + (within + length - 1 >> bits) + 1, self._mappings.per_table)
        table = self._own_table(which)
        entries = table.entries
        entry = entries[index]
        host = entry & q.OFFSET_MASK
        if host and entry & (q.COPIED | q.COMPRESSED) == q.COPIED:
            self._require_data(host, table, index)
            if entry & q.ZERO:  # a place is kept for it, with anything in it: filled like a new one
                return self._room(offset, length, host, 1, (which, index, host, 1, False))
            run = 1
            while index + run < stop and entries[index + run] == entry + run * cluster_size:
                self._require_data(host + run * cluster_size, table, index + run)
                run += 1
            return Reservation(offset, min(length, run * cluster_size - within), host + within, self.file)
        run = 1
        while index + run < stop and entries[index + run] & (q.COPIED | q.COMPRESSED) != q.COPIED:
            run += 1
        for at in range(index, index + run) if any(entries[index : index + run]) else ():
            self._require_droppable(table, at)  # given up when this write is committed; too late to refuse then
        host, run, blank = self._refcounts.allocate(run)
        room = self._room(offset, length, host, run, (which, index, host, run, True))
        room.blank = blank
        return room

    def _room(self, offset: int, length: int, host: int, clusters: int, token: Any) -> Reservation:
        within = offset & self._cluster_size - 1
        length = min(length, (clusters << self._cluster_bits) - within)
        tail = -(within + length) & self._cluster_size - 1
        return Reservation(offset, length, host + within, self.file, new=True, head=within, tail=tail, token=token)

    def commit(self, reservation: Reservation) -> None:
        if reservation.token is not None:
            self.changing(self._commit, *reservation.token)

    def _commit(self, which: int, index: int, host: int, clusters: int, _allocated: bool) -> None:
        table = self._own_table(which)
        replaced = table.entries[index : index + clusters]
        for at, entry in enumerate(replaced):
            if entry & q.COMPRESSED or entry & q.OFFSET_MASK != host + (at << self._cluster_bits):
                self._require_droppable(table, index + at)
            else:
                replaced[at] = 0  # its place was kept, and is filled now
        self._mappings.set_run(which, index, host, clusters)
        for entry in replaced:
            self._give_up(entry)
        if self._mappings.pressure:
            self._write_out()

    def abandon(self, reservation: Reservation) -> None:
        if reservation.token is not None:
            _, _, host, clusters, allocated = reservation.token
            if allocated:
                self.changing(self._refcounts.lower, host, clusters)

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        if flags & COMPRESS:
            self._compression.write(offset, view)
        else:
            FormatNode.write(self, offset, view)

    def drop(self, offset: int, length: int, to: To, *, keep: bool = False) -> None:
        if self.header.version < 3 and to is not To.BELOW and self.backing is not None:
            # Without a flag for zero a cluster that is dropped shows what the backing file holds.
            what = "zero" if to is To.ZERO else "discard"
            raise NotSupported(
                f"version 2 cannot {what} clusters over a backing file", node=self.name, operation=what, offset=offset
            )
        self.changing(self._drop, offset, length, to, keep)

    def _drop(self, offset: int, length: int, to: To, keep: bool) -> None:
        flagged, backed = self.header.version >= 3, self.backing is not None
        left = q.ZERO if flagged and to is not To.BELOW else 0
        # Whether a cluster that holds nothing must say that it is zero; else tables that do not exist need not.
        everywhere = flagged and (to is To.ZERO or (to is To.ANY and backed))
        for which, index, entry in self._entries(offset, length, make=everywhere):
            if entry & q.COMPRESSED or (entry & q.OFFSET_MASK and not (keep and flagged)):
                self.replace_entry(which, index, left)
            elif everywhere and not entry & q.ZERO:
                self._mappings.set(which, index, entry | q.ZERO)
            elif to is To.BELOW and entry:
                self._mappings.set(which, index, 0)

    def truncate(self, size: int) -> None:
        from .resize import resize

        resize(self, size)

    def replace_l1(self, entries: int) -> None:
        """Make the L1 table `entries` long: a copy elsewhere, which takes its place at the next flush."""
        self.changing(self._replace_l1, entries)

    def _replace_l1(self, entries: int) -> None:
        old = (self.header.l1_table_offset, align_up(self.header.l1_size * 8, self._cluster_size) >> self._cluster_bits)
        self.file.tell("l1_grow_alloc_table")
        offset = self._allocate_metadata(align_up(entries * 8, self._cluster_size))
        self._mappings.move_l1(offset, entries)
        if old[1]:
            self._freeing.add(*old)

    def cut_off(self, start: int, end: int) -> None:
        """Free the clusters of [start, end), which is past the end of the disk; both are multiples of the cluster size, or
        the end that the disk had."""
        if start < end:
            self.drop(start, end - start, To.BELOW)

    def _entries(self, offset: int, length: int, *, make: bool = True) -> Iterator[tuple[int, int, int]]:
        """(L1 index, L2 index, entry) of each cluster of this aligned stretch; without `make`, tables that do not exist are
        passed over. Between two entries what changed is written out if too much waits in memory."""
        per_table = self._mappings.per_table
        first, last = offset >> self._cluster_bits, offset + length - 1 >> self._cluster_bits
        for which in range(first // per_table, last // per_table + 1):
            if not make and not self._mappings.l1[which] & q.OFFSET_MASK:
                continue
            entries = self._own_table(which).entries
            low, high = max(first - which * per_table, 0), min(last - which * per_table, per_table - 1)
            for index in range(low, high + 1):
                yield which, index, entries[index]
            if self._mappings.pressure or self._freeing.unlinked > _MAX_UNLINKED:
                self._write_out()

    def _own_table(self, which: int) -> Table:
        """The L2 table of this L1 entry, for changing: made if there is none, copied if it is not this image's alone."""
        mappings = self._mappings
        found = mappings.table(which)
        if found is not None and mappings.l1[which] & q.COPIED:
            mappings.make_room(found)
            return found
        entries = array("Q", bytes(self._cluster_size)) if found is None else found.entries[:]
        mappings.make_room_for_entry(which)
        table = Table(self._allocate_metadata(self._cluster_size), entries, new=True)
        if found is not None:
            self.file.tell("l2_alloc_cow_read")
        mappings.link_table(which, table)
        if found is not None:
            self._freeing.add(found.offset)
        return table

    def _allocate_metadata(self, size: int) -> int:
        """Where a new table of `size` bytes lies. Zeros are written there at once, though the table itself is written later,
        before anything points to it: then, when the request that needs it has succeeded, there is room for certain."""
        counts, clusters = self._refcounts, size >> self._cluster_bits
        offset, _, _ = counts.allocate(clusters, whole=clusters > 1)
        try:
            self.file.write(offset, memoryview(bytes(size)))
        except BaseException:
            counts.lower(offset, clusters)
            raise
        counts.protect(offset, clusters)
        return offset

    def replace_entry(self, which: int, index: int, entry: int) -> None:
        """Put `entry` in the place of one that names clusters: those lose a reference. In this order: cut short in between, a
        cluster leaks; the other way round it could be given out while the old entry still names it."""
        table = self._mappings.table(which)
        assert table is not None, "made by `_own_table`"
        self._require_droppable(table, index)
        old = table.entries[index]
        self._mappings.set(which, index, entry)
        self._give_up(old)

    def _give_up(self, entry: int) -> None:
        """What this L2 entry named, which no table holds any more, loses a reference."""
        if entry & q.COMPRESSED:
            first, clusters = q.compressed_clusters(entry, self._cluster_bits)
            self._compression.forget(entry)
            self._freeing.add(first << self._cluster_bits, clusters)
        elif entry & q.OFFSET_MASK:
            self._freeing.add(entry & q.OFFSET_MASK)

    def _require_data(self, host: int, table: Table | None = None, index: int = 0) -> None:
        """A cluster that an L2 entry names as data is aligned, inside the file, and holds no metadata: else writing would
        destroy the image, or make its file as long as the entry says."""
        if (
            host & self._cluster_size - 1
            or host >= self.file.node.size
            or host >> self._cluster_bits in self._refcounts.metadata
        ):
            raise CorruptImage(
                f"a cluster of data is said to lie at {host:#x}, which holds metadata, is misaligned or outside the file",
                path=self.filename,
                offset=None if table is None else table.offset + 8 * index,
                hint="check the image; nothing was written",
            )

    def _require_droppable(self, table: Table, index: int) -> None:
        """What this entry names could be given up."""
        entry = table.entries[index]
        if entry & q.COMPRESSED:
            self._require_compressed(entry, table, index)
        elif entry & q.OFFSET_MASK:
            self._require_data(entry & q.OFFSET_MASK, table, index)

    def _require_compressed(self, entry: int, table: Table | None = None, index: int = 0) -> None:
        first, clusters = q.compressed_clusters(entry, self._cluster_bits)
        for cluster in range(first, first + clusters):
            self._require_data(cluster << self._cluster_bits, table, index)

    # -- to disk

    def flush(self) -> None:
        """Everything written before this call is on stable storage when it returns.

        The order, each step behind a flush of the file: (1) guest data, counts that rose, and tables that nothing points to
        yet; (2) pointers to new refcount blocks; (3) mappings: L2 entries, L1 entries. Only then do counts fall. Cut
        anywhere, a cluster may be counted and not used (a leak), never used and not counted.
        """
        self.changing(self._flush)

    def _flush(self) -> None:
        self.file.tell("flush_to_os")
        if not self._write_out():
            self.file.tell("flush_to_disk")
            self.file.flush()

    def _write_out(self) -> bool:
        """Bring the tables to disk; False if there was nothing to do, and so nothing was flushed."""
        mappings, file = self._mappings, self.file
        counted = self._refcounts_ is not None and (self._refcounts_.dirty or self._refcounts_.links_dirty)
        if not (counted or mappings.dirty or self._freeing or self.size_unsure):
            return False
        if self.read_only:
            raise CorruptImage(
                "the image was found corrupt since it was last flushed: what was changed since then is lost",
                path=self.filename,
                operation="flush",
                hint="check the image",
            )
        counts = self._refcounts
        counts.write_counts()
        mappings.write_tables()
        file.tell("flush_to_disk")
        file.flush()
        if counts.links_dirty:
            for offset, clusters in counts.write_links():
                self._freeing.add(offset, clusters)
            file.flush()
        if mappings.dirty:
            mappings.write_links()
            if mappings.l1_moved:
                file.tell("l1_grow_activate_table")
                self.header.store(file, "l1_size", "l1_table_offset")
            file.flush()
            mappings.written()
        if self.size_unsure:
            self.header.store(file, "size")
            file.flush()
            self.size_unsure = False
        self._freeing.flushed(counts)
        return True

    def _settle(self) -> None:
        """At the end: what is free is counted as free."""
        self._write_out()
        if self._freeing:
            self._write_out()
        if self._refcounts_ is not None and self._refcounts_.dirty:
            self._refcounts_.write_counts()

    def mark_corrupt(self) -> None:
        """Say in the header that the image is corrupt, so that no other program writes to it, and stop writing ourselves."""
        self.read_only = True
        if self.header.version >= 3:
            self.header.incompatible_features |= q.CORRUPT
            try:
                self.header.store(self.file, "incompatible_features")
            except LaminaError as error:
                raise CorruptImage("the image is corrupt, and cannot be marked so", path=self.filename) from error

    def settle(self) -> None:
        if not self.read_only:
            self.changing(self._settle)

    def close(self) -> None:
        try:
            super().close()
        finally:
            self._compression.close()
