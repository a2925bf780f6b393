"""The owner of all tables of an image: mappings, refcounts, the clusters that are about to be freed, and the order of writes.

All changes of an image are made by functions that `Tables.changing` calls: for requests of the guest (`allocation` and
`compression`), for `resize` and for `create`. Changes stay in memory until `flush`, or until there are too many, and reach
the disk in an order that keeps the image consistent after a power cut at any point (see `flush`). The lock of the tables is
not held while guest data is read or written.

An exception such as KeyboardInterrupt may be raised at any call. Therefore entries change first, and the clusters to which
they pointed are queued to be freed afterwards.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, TypeVar

from ...errors import CorruptImage, LaminaError, LimitExceeded
from ...limits import align_up
from . import layout as q
from .freeing import Freeing
from .l2_entry import compressed_clusters, data_cluster, is_compressed, max_compressed_offset
from .mapping import Mappings, Table
from .refcount_scan import RefcountScan
from .refcounts import Refcounts
from .structures import claim

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from ...request import Child
    from .caches import Caches
    from .header import Header

_Result = TypeVar("_Result")
#: The number of runs waiting to be freed from which on the tables are written early.
_MAX_UNLINKED = 4096


class Tables:
    """The tables of the image in `file`, whose checked header is `header`.

    Any number of threads may call `changing`, `flush` and `settle`. All other methods are for functions that `changing` calls
    (with the lock held, and no other change in progress), or for an image that no other thread uses.
    """

    def __init__(
        self,
        file: Child,
        header: Header,
        *,
        caches: Caches,
        writable: bool,
        data: Child | None = None,
        on_corrupt: Callable[[], None] = lambda: None,
        book: Callable[[int], None] = lambda count: None,
    ) -> None:
        """`data`: the edge to an external data file. `on_corrupt` is called before the image is marked corrupt; writes must
        stop from then on. `book`: see `RefcountScan`."""
        self.file = file
        self.header = header
        self.cluster_bits = header.cluster_bits
        self.cluster_size = header.cluster_size
        #: Protects all tables, also while they are written; never held while guest data is read or written. A thread that
        #: takes it to read the tables calls `require_outside_changes` first.
        self.lock = threading.RLock()
        #: The edge to the storage of guest data: the image file, or the external data file.
        self.data = file if data is None else data
        self.external = header.external_data
        #: The offset of a cluster in an L2 entry in memory exceeds that in `data` by so much (see `l2_external`).
        self.shift = header.cluster_size if self.external else 0
        self.mappings = Mappings(file, header, caches.l2, writable=writable, data=data)
        #: False for a read-only image, and after its tables were found corrupt.
        self.writable = writable
        #: Whether the thread with the lock is changing the tables.
        self.changes = False
        self.given_back = 0
        self._caches = caches
        self._on_corrupt = on_corrupt
        self._refcounts: Refcounts | None = None
        self.freeing = Freeing(file, header.cluster_bits)
        self._scan = RefcountScan(self, book)
        # Fields of the header of which the disk may hold other values, because a change of them failed.
        self._unsure: tuple[str, ...] = ()
        # The same for a change of the whole header: the first bytes of the file before it.
        self._unsure_start = b""
        #: Whether the disk may hold another bitmap directory than is known here (see `publish_bitmaps`).
        self.unsure_bitmaps = False
        # The end of the last compressed data; at a cluster boundary there is no free space after it.
        self._compressed_end = 0

    @property
    def refcounts(self) -> Refcounts:
        """The refcounts, loaded for the first change; reads do not need them."""
        if self._refcounts is None:
            counts = Refcounts(self.file, self.header, self._caches.refcounts, self._scan)
            claim(counts, self.file, self.header, self.mappings.l1)
            self._refcounts = counts
        return self._refcounts

    def require_apart(self) -> None:
        """Raise CorruptImage if two structures of the image overlap. Called before one is changed in place."""
        if self._refcounts is None:
            self._refcounts = self.refcounts

    # -- one change at a time

    def changing(self, work: Callable[..., _Result], *arguments: Any) -> _Result:
        """Call `work(*arguments)` with the tables locked, and return its result. If it raises CorruptImage, the image is
        marked corrupt. (No interrupt can separate `with` from acquiring a lock of the interpreter; with an `__enter__` in
        Python it could.)"""
        with self.lock:
            if self.changes:
                self.require_outside_changes()
            self.changes = True
            try:
                if self._unsure or self._unsure_start or self.unsure_bitmaps:
                    self._store_unsure()
                return work(*arguments)
            except CorruptImage:
                if self.writable:
                    self._mark_corrupt()
                raise
            finally:
                self.changes = False

    def require_outside_changes(self) -> None:
        """Raise LaminaError if this thread, which has the lock, is already changing the tables: the caller is a signal
        handler or a finalizer, and would see, and continue from, an incomplete change."""
        if self.changes:
            raise LaminaError(
                "this thread is inside a request of this image, and cannot make another before that is done",
                path=self.file.node.filename,
                hint="do it after the request (not in a signal handler), or in another thread",
            )

    def forget_refcounts(self) -> None:
        """Read the reference counts again before the next change. All of them are on disk."""
        self._refcounts = None

    def switch(self, values: dict[str, int]) -> None:
        """Make other tables, which are on stable storage, those of the image: `values` are adjacent fields of the header,
        written at once. After an error the tables are the old ones, whose header goes to the disk before anything else
        changes."""
        header, file = self.header, self.file
        header.require_fields(values)
        mappings = Mappings(file, header.but(values), self._caches.l2, data=self.data)
        before, names = header.values(*values), tuple(values)
        try:
            header.set(values)
            header.store(file, *names)
            file.flush()
        except BaseException:
            header.set(before)
            self._unsure = names
            raise
        # One statement without calls, so no interrupt can divide it.
        self.mappings, self._refcounts, self._compressed_end = mappings, None, 0

    def _mark_corrupt(self) -> None:
        """Mark the image corrupt in its header, so that no program writes to it, and stop writing."""
        self.writable = False
        self._on_corrupt()
        if self.header.version >= 3:
            self.header.incompatible_features |= q.CORRUPT
            try:
                self.header.store(self.file, "incompatible_features")
            except LaminaError as error:
                path = self.file.node.filename
                raise CorruptImage("the image is corrupt, and marking it corrupt failed", path=path) from error

    # -- L2 tables and their entries

    def own_table(self, which: int) -> Table:
        """The L2 table of this L1 entry, for a change: a new one if there is none, a copy if others refer to it."""
        mappings = self.mappings
        found = mappings.table(which)
        if found is not None and found.own:
            if not found.stored:
                mappings.ensure_stored(found)
            return found
        entries = mappings.layout.blank() if found is None else found.entries[:]
        mappings.l1.ensure_stored(self.file, which)
        table = Table(self.allocate_metadata(self.cluster_size), entries, new=True)
        if found is not None:
            self.file.tell("l2_alloc_cow_read")
        mappings.link_table(which, table)
        if found is not None:
            self.freeing.add(found.offset)
        return table

    def entries(self, offset: int, length: int, *, make: bool = True) -> Iterator[tuple[int, int, int]]:
        """(L1 index, L2 index, entry) of each cluster of this aligned range. Missing tables are created, or skipped without
        `make`. Between two tables, changes are written if there are too many in memory."""
        per_table = self.mappings.per_table
        first, last = offset >> self.cluster_bits, offset + length - 1 >> self.cluster_bits
        for which in range(first // per_table, last // per_table + 1):
            if not make and not self.mappings.l1.l2_offset(which):
                continue
            entries = self.own_table(which).entries
            low, high = max(first - which * per_table, 0), min(last - which * per_table, per_table - 1)
            for index in range(low, high + 1):
                yield which, index, entries[index]
            self.relieve()

    def replace_entry(self, which: int, index: int, entry: int) -> None:
        """Replace an entry that points to clusters, which lose a reference. The entry changes first: an interrupt in between
        leaks a cluster. In the other order the cluster could be allocated again while the old entry points to it."""
        table = self.mappings.table(which)
        assert table is not None, "made by `own_table`"
        self.require_droppable(table, index)
        old = table.entries[index]
        self.mappings.set(which, index, entry)
        self.give_up(old)

    def give_up(self, entry: int) -> None:
        """Queue the loss of a reference to the clusters of this L2 entry, which no table contains any more. Clusters of an
        external data file have no reference counts."""
        if self.external:
            return
        host = data_cluster(entry)
        if host:
            self.freeing.add(host)
        elif is_compressed(entry):
            first, clusters = compressed_clusters(entry, self.cluster_bits)
            # Bytes to which an entry pointed are reused only after their whole cluster was free.
            if first <= self._compressed_end >> self.cluster_bits < first + clusters:
                self._compressed_end = 0
            self.freeing.add(first << self.cluster_bits, clusters)

    def relieve(self) -> None:
        """Write the tables if there are too many changes in memory."""
        if self.mappings.pressure or self.freeing.unlinked > _MAX_UNLINKED:
            self.write_out()

    # -- clusters

    def allocate_metadata(self, size: int) -> int:
        """Allocate clusters for a new table of `size` bytes, and return their offset. Zeros are written at once, so that the
        file has storage for the table when the request succeeds; the table itself is written before anything points to
        it."""
        counts, clusters = self.refcounts, size >> self.cluster_bits
        offset, _, _ = counts.allocate(clusters, whole=clusters > 1)
        try:
            self.file.write(offset, memoryview(bytes(size)))
        except BaseException:
            counts.lower(offset, clusters)
            raise
        counts.protect(offset, clusters)
        return offset

    def allocate_data(self, cluster: int, clusters: int) -> tuple[int, int, bool]:
        """As `Refcounts.allocate`, for guest data from this guest cluster on: an external data file has a place for each."""
        if not self.external:
            return self.refcounts.allocate(clusters)
        place = cluster << self.cluster_bits
        return place + self.shift, clusters, place >= self.data.size

    def abandon_data(self, host: int, clusters: int) -> None:
        """Free what `allocate_data` returned, and no entry points to."""
        if not self.external:
            self.refcounts.lower(host, clusters)

    def allocate_compressed(self, length: int) -> int:
        """Allocate `length` bytes, less than a cluster, for compressed data, and return their offset: directly after the last
        compressed data if possible. The refcount of each cluster that they overlap rises."""
        counts, bits = self.refcounts, self.cluster_bits
        end, self._compressed_end = self._compressed_end, 0
        begun, free = end >> bits, -end & self.cluster_size - 1
        if begun in counts.metadata:  # only in a corrupt image
            free = 0
        host = counts.allocate(1)[0] if length > free else -1
        if free and (host < 0 or host == end + free) and counts.share(begun):
            offset = end
        else:
            offset = counts.allocate(1)[0] if host < 0 else host
        if offset + length > max_compressed_offset(bits):
            raise LimitExceeded(
                "the image file has reached the maximum size for compressed clusters",
                path=self.file.node.filename,
                hint="write without compression",
            )
        self._compressed_end = offset + length
        return offset

    def abandon_compressed(self, entry: int) -> None:
        """Free the storage of compressed data that was not written. No table contains this L2 entry for it."""
        self._compressed_end = 0
        first, clusters = compressed_clusters(entry, self.cluster_bits)
        self.refcounts.lower(first << self.cluster_bits, clusters)

    def require_data(self, host: int, table: Table | None = None, index: int = 0) -> None:
        """Raise CorruptImage unless the data cluster of an L2 entry is aligned, inside the file, and contains no metadata: a
        write would destroy the image, or make the file as long as the entry says."""
        if self.external:
            return  # `l2_external` has checked that
        if (
            host & self.cluster_size - 1
            or host >= self.file.node.size
            or host >> self.cluster_bits in (self._refcounts or self.refcounts).metadata
        ):
            raise CorruptImage(
                f"an L2 entry points to {host:#x} for data: that is metadata, misaligned or outside the file",
                path=self.file.node.filename,
                offset=None if table is None else table.offset + (index << self.mappings.layout.entry_bits),
                hint="check the image; nothing was written",
            )

    def require_droppable(self, table: Table, index: int) -> None:
        """Raise CorruptImage unless the clusters of this entry can be freed."""
        entry = table.entries[index]
        host = data_cluster(entry)
        if host:
            self.require_data(host, table, index)
        elif is_compressed(entry):
            first, clusters = compressed_clusters(entry, self.cluster_bits)
            for cluster in range(first, first + clusters):
                self.require_data(cluster << self.cluster_bits, table, index)

    def give_back(self, offset: int, length: int) -> None:
        """The clusters of a structure at `offset`, to which nothing points now, lose a reference once that is durable."""
        self.freeing.add(offset, -(-length >> self.cluster_bits))

    def publish_bitmaps(self, count: int, offset: int, size: int) -> None:
        """Make the directory at `offset`, which is written, that of the image. The caller takes it over, and then clears
        `unsure_bitmaps`. Where an error comes first, the disk gets to say that its bitmaps are out of date before anything
        else changes."""
        if not self.write_out():
            self.file.flush()
        self.unsure_bitmaps = True
        self.header.set_bitmaps(self.file, count, offset, size)

    # -- the size of the disk

    def grow_l1(self, entries: int) -> None:
        """Extend the L1 table to `entries` entries: a copy at another offset, which replaces it at the next flush."""
        old = self.mappings.l1
        clusters = align_up(len(old) * 8, self.cluster_size) >> self.cluster_bits
        self.file.tell("l1_grow_alloc_table")
        offset = self.allocate_metadata(align_up(entries * 8, self.cluster_size))
        self.mappings.l1 = old.grown(offset, entries)
        if clusters:
            self.freeing.add(old.offset, clusters)

    def own_if_any(self, which: int) -> None:
        """As `own_table`, if there is a table."""
        if self.mappings.l1.l2_offset(which):
            self.own_table(which)

    def unlink_shared(self, first: int, last: int) -> None:
        """Give up the L2 tables from `first` to `last` to which snapshots refer as well, and what their entries refer to. A
        change of one entry after the other would need a copy of each table."""
        mappings = self.mappings
        for which in range(first, min(last, len(mappings.l1))):
            table = mappings.table(which)
            if table is None or table.own:
                continue
            used = [index for index, entry in enumerate(table.entries) if entry]
            for index in used:
                self.require_droppable(table, index)
            entries = [table.entries[index] for index in used]
            self.freeing.add(mappings.unlink_table(which))
            for entry in entries:
                self.give_up(entry)
            self.relieve()

    def unlink_behind(self, size: int) -> None:
        """Give up the L2 tables of what lies behind a disk of `size` bytes. All changes are on stable storage."""
        self.unlink(range(self.header.l1_entries(size), len(self.mappings.l1)))

    def unlink(self, tables: Iterable[int]) -> None:
        """Give up the L2 tables with these L1 indexes, which point to no clusters. All changes are on stable storage."""
        for which in tables:
            if self.mappings.l1.l2_offset(which):
                self.freeing.add(self.mappings.unlink_table(which))
                if len(self.freeing) > _MAX_UNLINKED:
                    self.write_out()

    def trim(self) -> None:
        """Cut off what lies behind the last cluster in use. All counts are on stable storage."""
        node, counts = self.file.node, self.refcounts
        end = counts.last_used() + 1 << self.cluster_bits
        # It may be in use all the same.
        if node.growable and node.size > end and counts.may_free([(end, 1)]):
            self.file.truncate(end)
            counts.blank_from = end

    def set_size(self, size: int) -> None:
        """Store the size of the disk in the header."""
        self.store({"size": size})

    def store(self, values: dict[str, int]) -> None:
        """Change these adjacent fields of the header, in memory and on the disk. After an error the fields in memory are the
        old ones, and go to the disk before anything else changes."""
        header = self.header
        header.require_fields(values)
        before, names = header.values(*values), tuple(values)
        try:
            header.set(values)
            header.store(self.file, *names)
            self._unsure = ()
        except BaseException:
            header.set(before)
            self._unsure = names
            raise

    def rewrite_header(self, changes: Mapping[str, Any]) -> None:
        """As `header_rewrite.rewrite`. After an error the header in memory is the old one, and goes to the disk before
        anything else changes."""
        from .header_rewrite import rewrite

        start = bytearray(q.SECTOR)
        self.file.read_into(0, memoryview(start))
        try:
            rewrite(self.header, self.file, changes)
        except BaseException:
            self._unsure_start = bytes(start)
            raise

    def _store_unsure(self) -> None:
        if self._unsure_start:
            self.file.write(0, memoryview(self._unsure_start))
        if self._unsure:
            self.header.store(self.file, *self._unsure)
        self.file.flush()
        self._unsure, self._unsure_start = (), b""
        if self.unsure_bitmaps:
            self.header.forget_bitmaps(self.file)
            self.unsure_bitmaps = False

    # -- to disk

    def flush(self) -> None:
        """Everything written before this call is on stable storage when it returns.

        The order, with a flush of the file after each step: (1) guest data, refcounts that rose, and tables to which
        nothing points yet; (2) pointers to new refcount blocks; (3) L2 entries, then L1 entries. Refcounts fall only after
        that. After a power cut a cluster may be counted and unused (a leak), but never used and uncounted.
        """
        self.changing(self._flush)

    def _flush(self) -> None:
        file = self.file
        heard = file.event is not None  # checked here, since a flush without changes takes only 1.3 us
        if heard:
            file.tell("flush_to_os")
        if not self.write_out():
            if heard:
                file.tell("flush_to_disk")
            if self.external:
                self.data.flush()
            file.flush()

    def write_out(self) -> bool:
        """Write the tables, in the order of `flush`; False if there were no changes, and therefore no flush."""
        mappings, file = self.mappings, self.file
        counted = self._refcounts is not None and self._refcounts.dirty
        if not (counted or mappings.dirty or self.freeing):
            return False
        if not self.writable:
            raise CorruptImage(
                "the image was found corrupt: changes since the last flush are lost",
                path=file.node.filename,
                operation="flush",
                hint="check the image",
            )
        counts = self.refcounts
        counts.write_counts()
        mappings.write_tables()
        file.tell("flush_to_disk")
        if self.external:
            self.data.flush()
        file.flush()
        if counts.links_dirty:
            for offset, clusters in counts.write_links():
                self.freeing.add(offset, clusters)
            file.flush()
        if mappings.dirty:
            mappings.write_links()
            if not mappings.l1.published:
                file.tell("l1_grow_activate_table")
                self.header.l1_table_offset, self.header.l1_size = mappings.l1.offset, len(mappings.l1)
                self.header.store(file, "l1_size", "l1_table_offset")
            file.flush()
            mappings.written()
        self.given_back += 1  # before the file gets a hole; see `FormatNode.given_back`
        self.freeing.flushed(counts)
        return True

    def settle(self) -> None:
        """Write everything before the image is closed, so that free clusters have the count 0."""
        if self.writable:
            self.changing(self._settle)

    def _settle(self) -> None:
        self.write_out()
        if self.freeing:
            self.write_out()
        if self._refcounts is not None and self._refcounts.dirty:
            self._refcounts.write_counts()
