"""All tables of one image and their one owner: mappings, reference counts, what waits to be freed, and the order of writes.

Whatever changes an image does it here, inside `Tables.changing`: requests of the guest (`allocation`, `compression`),
`resize` and `create`. Changes stay in memory until `flush`, or until too much waits, and reach the disk in an order that
leaves the image whole wherever the power is cut (see `flush`). Bytes of the guest are read and written without the lock.

An exception may strike at any call (Ctrl-C is one), so entries change first, and what they named is queued to be freed after.
"""

from __future__ import annotations

import threading
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

from ...errors import CorruptImage, LaminaError, LimitExceeded
from ...limits import align_up
from . import layout as q
from .freeing import Freeing
from .l2_entry import compressed_clusters, data_cluster, is_compressed, max_compressed_offset
from .mapping import Mappings, Table
from .refcounts import Refcounts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ...request import Child
    from .header import Header

_Result = TypeVar("_Result")
#: Stretches that wait to be freed before the tables are written out early.
_MAX_UNLINKED = 4096


class Tables:
    """The tables of the image in `file`, whose checked header is `header`.

    Any number of threads may call `changing`, `flush` and `settle`. All other methods are for `work` that `changing` calls
    (the thread holds the lock, and nothing else is being changed), or for an image that no other thread uses.
    """

    def __init__(
        self,
        file: Child,
        header: Header,
        *,
        cache_bytes: int,
        writable: bool,
        on_corrupt: Callable[[], None] = lambda: None,
    ) -> None:
        """`cache_bytes`: for L2 tables, and for refcount blocks, half each. `on_corrupt` is called before the image is marked
        corrupt, which is when its writers have to stop."""
        self.file = file
        self.header = header
        self.cluster_bits = header.cluster_bits
        self.cluster_size = header.cluster_size
        #: Around all tables, in memory and on their way to the disk; never held while bytes of the guest are read or written.
        #: Whoever holds it to read them asks `require_outside_changes` first.
        self.lock = threading.RLock()
        self.mappings = Mappings(file, header, cache_bytes // 2, writable=writable)
        #: False for an image that is open to be read, and from the moment on when its tables were found to be corrupt.
        self.writable = writable
        #: Whether the thread that holds the lock is in the middle of changing the tables.
        self.changes = False
        self.given_back = 0
        self._cache_bytes = cache_bytes
        self._on_corrupt = on_corrupt
        self._refcounts: Refcounts | None = None
        self._freeing = Freeing(file, header.cluster_bits)
        # The header on disk may say another size than the one in memory: a change of it was cut short.
        self._size_unsure = False
        # Where compressed data was placed last, its end; on a cluster boundary: no space is left behind it.
        self._compressed_end = 0

    @property
    def refcounts(self) -> Refcounts:
        """The reference counts, loaded at the first change: reading needs none."""
        if self._refcounts is None:
            counts = Refcounts(self.file, self.header, self._cache_bytes // 2)
            l1, bits = self.mappings.l1, self.cluster_bits
            first = l1.offset >> bits
            own = range(first, first + -(-len(l1) * 8 >> bits))
            # Entries without COPIED may name one table together: whoever changes it takes a copy.
            place = self.header.encryption_header  # inside the file and bounded, else the image was not opened
            encryption = range(0) if place is None else range(place[0] >> bits, -(-sum(place) >> bits))
            counts.claim(
                chain([own, encryption], l1.l2_clusters(bits, copied=True)), l1.l2_clusters(bits, copied=False)
            )
            self._refcounts = counts
        return self._refcounts

    # -- the one change at a time

    def changing(self, work: Callable[..., _Result], *arguments: Any) -> _Result:
        """What `work(*arguments)` returns, called with the tables locked. Where they turn out to be corrupt the image is
        marked so. (An interrupt cannot divide `with` and a lock of the interpreter; an `__enter__` of our own it could.)"""
        with self.lock:
            if self.changes:
                self.require_outside_changes()
            self.changes = True
            try:
                return work(*arguments)
            except CorruptImage:
                if self.writable:
                    self._mark_corrupt()
                raise
            finally:
                self.changes = False

    def require_outside_changes(self) -> None:
        """Raise LaminaError where this thread, which holds the lock, is changing the tables already: a signal handler or a
        finalizer asks for something. It would find half a change, and make it a wrong one."""
        if self.changes:
            raise LaminaError(
                "this thread is inside a request of this image, and cannot make another before that is done",
                path=self.file.node.filename,
                hint="do it after the request (not in a signal handler), or in another thread",
            )

    def _mark_corrupt(self) -> None:
        """Say in the header that the image is corrupt, so that no other program writes to it, and stop writing ourselves."""
        self.writable = False
        self._on_corrupt()
        if self.header.version >= 3:
            self.header.incompatible_features |= q.CORRUPT
            try:
                self.header.store(self.file, "incompatible_features")
            except LaminaError as error:
                path = self.file.node.filename
                raise CorruptImage("the image is corrupt, and cannot be marked so", path=path) from error

    # -- L2 tables and their entries

    def own_table(self, which: int) -> Table:
        """The L2 table of this L1 entry, for changing: made if there is none, copied if it is not this image's alone."""
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
            self._freeing.add(found.offset)
        return table

    def entries(self, offset: int, length: int, *, make: bool = True) -> Iterator[tuple[int, int, int]]:
        """(L1 index, L2 index, entry) of each cluster of this aligned stretch; without `make`, tables that do not exist are
        passed over. Between two tables changes are written out if too much waits in memory."""
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
        """Put `entry` in the place of one that names clusters: those lose a reference. In this order: cut short in between, a
        cluster leaks; the other way round it could be given out while the old entry still names it."""
        table = self.mappings.table(which)
        assert table is not None, "made by `own_table`"
        self.require_droppable(table, index)
        old = table.entries[index]
        self.mappings.set(which, index, entry)
        self.give_up(old)

    def give_up(self, entry: int) -> None:
        """The clusters that this L2 entry named, which no table holds any more, lose a reference once that is durable."""
        host = data_cluster(entry)
        if host:
            self._freeing.add(host)
        elif is_compressed(entry):
            first, clusters = compressed_clusters(entry, self.cluster_bits)
            # Bytes that something referred to are written again only after their whole cluster was free.
            if first <= self._compressed_end >> self.cluster_bits < first + clusters:
                self._compressed_end = 0
            self._freeing.add(first << self.cluster_bits, clusters)

    def relieve(self) -> None:
        """Write the tables out if so much waits in memory that it should not become more."""
        if self.mappings.pressure or self._freeing.unlinked > _MAX_UNLINKED:
            self.write_out()

    # -- clusters

    def allocate_metadata(self, size: int) -> int:
        """Where a new table of `size` bytes lies. Zeros are written there at once, though the table itself is written later,
        before anything points to it: then, when the request that needs it has succeeded, the file holds storage for it."""
        counts, clusters = self.refcounts, size >> self.cluster_bits
        offset, _, _ = counts.allocate(clusters, whole=clusters > 1)
        try:
            self.file.write(offset, memoryview(bytes(size)))
        except BaseException:
            counts.lower(offset, clusters)
            raise
        counts.protect(offset, clusters)
        return offset

    def allocate_compressed(self, length: int) -> int:
        """Where the next `length` bytes of compressed data go, less than a cluster: behind the last ones as far as possible.
        Each cluster that they touch counts them from now on."""
        counts, bits = self.refcounts, self.cluster_bits
        end, self._compressed_end = self._compressed_end, 0
        begun, free = end >> bits, -end & self.cluster_size - 1
        if begun in counts.metadata:  # nobody's but in a corrupt image
            free = 0
        host = counts.allocate(1)[0] if length > free else -1
        if free and (host < 0 or host == end + free) and counts.share(begun):
            offset = end
        else:
            offset = counts.allocate(1)[0] if host < 0 else host
        if offset + length > max_compressed_offset(bits):
            raise LimitExceeded(
                "the image file has reached the largest size at which it can hold compressed clusters",
                path=self.file.node.filename,
                hint="write without compression",
            )
        self._compressed_end = offset + length
        return offset

    def abandon_compressed(self, entry: int) -> None:
        """Compressed data that this L2 entry would have named, and no table holds, was not stored."""
        self._compressed_end = 0
        first, clusters = compressed_clusters(entry, self.cluster_bits)
        self.refcounts.lower(first << self.cluster_bits, clusters)

    def require_data(self, host: int, table: Table | None = None, index: int = 0) -> None:
        """A cluster that an L2 entry names as data is aligned, inside the file, and holds no metadata: else writing would
        destroy the image, or make its file as long as the entry says."""
        if (
            host & self.cluster_size - 1
            or host >= self.file.node.size
            or host >> self.cluster_bits in (self._refcounts or self.refcounts).metadata
        ):
            raise CorruptImage(
                f"a cluster of data is said to lie at {host:#x}, which holds metadata, is misaligned or outside the file",
                path=self.file.node.filename,
                offset=None if table is None else table.offset + 8 * index,
                hint="check the image; nothing was written",
            )

    def require_droppable(self, table: Table, index: int) -> None:
        """The clusters that this entry names could be given up."""
        entry = table.entries[index]
        host = data_cluster(entry)
        if host:
            self.require_data(host, table, index)
        elif is_compressed(entry):
            first, clusters = compressed_clusters(entry, self.cluster_bits)
            for cluster in range(first, first + clusters):
                self.require_data(cluster << self.cluster_bits, table, index)

    # -- the size of the disk

    def grow_l1(self, entries: int) -> None:
        """Make the L1 table `entries` long: a copy elsewhere, which takes its place at the next flush."""
        old = self.mappings.l1
        clusters = align_up(len(old) * 8, self.cluster_size) >> self.cluster_bits
        self.file.tell("l1_grow_alloc_table")
        offset = self.allocate_metadata(align_up(entries * 8, self.cluster_size))
        self.mappings.l1 = old.grown(offset, entries)
        if clusters:
            self._freeing.add(old.offset, clusters)

    def set_size(self, size: int) -> None:
        """Say in the header that the disk has `size` bytes."""
        old = self.header.size
        self._size_unsure = (
            True  # until it is stored: cut short in between, the next flush stores the size that it finds
        )
        self.header.size = size
        try:
            self.header.store(self.file, "size")
        except BaseException:
            self.header.size = old
            raise
        self._size_unsure = False

    # -- to disk

    def flush(self) -> None:
        """Everything written before this call is on stable storage when it returns.

        The order, each step behind a flush of the file: (1) guest data, counts that rose, and tables that nothing points to
        yet; (2) pointers to new refcount blocks; (3) mappings: L2 entries, L1 entries. Only then do counts fall. Cut
        anywhere, a cluster may be counted and not used (a leak), never used and not counted.
        """
        self.changing(self._flush)

    def _flush(self) -> None:
        file = self.file
        heard = file.event is not None  # asked here: a flush that finds nothing to do takes 1.3 us
        if heard:
            file.tell("flush_to_os")
        if not self.write_out():
            if heard:
                file.tell("flush_to_disk")
            file.flush()

    def write_out(self) -> bool:
        """Bring the tables to disk, in the order of `flush`; False if there was nothing to do, and so nothing was flushed."""
        mappings, file = self.mappings, self.file
        counted = self._refcounts is not None and self._refcounts.dirty
        if not (counted or mappings.dirty or self._freeing or self._size_unsure):
            return False
        if not self.writable:
            raise CorruptImage(
                "the image was found corrupt since it was last flushed: what was changed since then is lost",
                path=file.node.filename,
                operation="flush",
                hint="check the image",
            )
        counts = self.refcounts
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
            if not mappings.l1.published:
                file.tell("l1_grow_activate_table")
                self.header.l1_table_offset, self.header.l1_size = mappings.l1.offset, len(mappings.l1)
                self.header.store(file, "l1_size", "l1_table_offset")
            file.flush()
            mappings.written()
        if self._size_unsure:
            self.header.store(file, "size")
            file.flush()
            self._size_unsure = False
        self.given_back += 1  # before storage becomes a hole; see `FormatNode.given_back`
        self._freeing.flushed(counts)
        return True

    def settle(self) -> None:
        """Bring everything to disk at the end: what is free is counted as free."""
        if self.writable:
            self.changing(self._settle)

    def _settle(self) -> None:
        self.write_out()
        if self._freeing:
            self.write_out()
        if self._refcounts is not None and self._refcounts.dirty:
            self._refcounts.write_counts()
