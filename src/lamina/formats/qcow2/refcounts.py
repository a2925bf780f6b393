"""Host cluster management: refcounts, and the allocation of clusters.

The refcount table points to refcount blocks, each of which is a cluster of counts. Blocks are cached and changed in memory.
The owner of the tables writes them, in the order that keeps an image consistent (see `Tables.flush`):

1. `write_counts`: counts that rose, and whole new blocks and tables to which nothing points yet;
2. `write_links`, after a flush: the entries, or the header fields, that point to the new blocks and tables.

A count falls (`lower`) only when the loss of the reference is durable, so that a power cut leaks clusters at worst.

Zeros are written to a new block or table when it is allocated, before any count in it rises. A later flush therefore writes
only to storage that the file system has already allocated: even on a full disk, all acknowledged changes can be flushed.

An exception such as KeyboardInterrupt may be raised at any call. Therefore related changes are made by statements without
calls: CPython handles signals only at calls and at the ends of loop iterations. If a call cannot be avoided, the order of the
statements is such that a cluster is counted and unused at worst.
"""

from __future__ import annotations

import sys
from array import array
from itertools import chain
from typing import TYPE_CHECKING, Any

from ...errors import BlockIOError, CorruptImage, LimitExceeded
from ...limits import align_up
from . import layout as q
from .cluster_set import ClusterSet, join, merge, sorted_arrays
from .holes import has_hole
from .refcount_block import Block, make_block, unpacked

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from ...request import Child
    from .header import Header
    from .refcount_scan import RefcountScan

_ENOSPC = 28


class Refcounts:
    """The refcounts of one image. Not thread-safe: the caller holds the lock of the tables."""

    def __init__(self, file: Child, header: Header, cache_bytes: int, scan: RefcountScan) -> None:
        """`scan` runs before clusters become free that it protects."""
        self._file = file
        self._header = header
        self._cache_bytes = cache_bytes
        self._cluster_bits = header.cluster_bits
        self._cluster_size = header.cluster_size
        self._max_count = (1 << header.refcount_bits) - 1
        self.per_block = header.cluster_size * 8 // header.refcount_bits
        self._blocks: dict[int, Block] = {}
        self._changed: set[int] = set()  # blocks with counts that are not on disk
        self._unlinked: set[int] = set()  # new blocks to which no table on disk points
        self._moved: list[tuple[int, int]] = []  # (offset, clusters) of tables on disk that a larger one replaces
        self._offered = False  # a write of the pointer to the larger table was tried, and may have succeeded
        self._scan = scan
        self._next = scan.below  # no cluster below this index is free, or may be allocated before the scan
        self._gaps: bool | None = None  # whether clusters that the scan protects are counted as free; None: not known
        #: No byte from this host offset on was ever written: clusters allocated there read as zero.
        self.blank_from = align_up(file.node.size, header.cluster_size)
        #: Clusters with metadata, which must never be allocated or overwritten with data. Empty before `claim`.
        self.metadata = ClusterSet()
        self.table = array("Q", (0,)) * (header.refcount_table_clusters << header.cluster_bits - 3)
        file.tell("reftable_load")
        file.read_into(header.refcount_table_offset, memoryview(self.table).cast("B"))
        if sys.byteorder == "little":
            self.table.byteswap()

    def claim(self, single: Iterable[Collection[int]], shared: Iterable[Collection[int]]) -> None:
        """Fill `metadata` with the clusters that contain structures of the image: the header, the refcount table and its
        blocks, and the given batches. `shared` may contain a cluster more than once. CorruptImage if a cluster contains two
        structures: a write to one would destroy the other."""
        bits, header = self._cluster_bits, self._header
        first = header.refcount_table_offset >> bits
        own = [range(1), range(first, first + header.refcount_table_clusters)]
        blocks = [(entry & q.REFBLOCK_MASK) >> bits for entry in self.table if entry & q.REFBLOCK_MASK]
        once = join(merge(sorted_arrays(shared, repeated=True), repeated=True))
        try:
            self.metadata = ClusterSet(merge([once, *sorted_arrays(chain(own, [blocks], single))]))
        except ValueError as error:
            raise CorruptImage(
                "structures of the image overlap",
                path=self._file.node.filename,
                hint="check the image; nothing was written",
            ) from error

    def protect(self, offset: int, clusters: int) -> None:
        """Add these clusters to `metadata`."""
        self.metadata.add(offset >> self._cluster_bits, clusters)

    @property
    def dirty(self) -> bool:
        """Whether a count, or a pointer to a block or table, is not on disk."""
        return bool(self._changed or self._unlinked or self._moved)

    @property
    def links_dirty(self) -> bool:
        """Whether a new block or table waits for `write_links`."""
        return bool(self._unlinked or self._moved)

    def get(self, cluster: int) -> int:
        """The refcount of the host cluster with this index."""
        which, index = divmod(cluster, self.per_block)
        block = self._block(which)
        return 0 if block is None else block.get(index)

    def last_used(self) -> int:
        """The last cluster whose count is not 0."""
        for which in range(len(self.table) - 1, -1, -1):
            block = self._block(which)
            last = -1 if block is None else block.last_used()
            if last >= 0:
                return which * self.per_block + last
        return 0

    def allocate(self, count: int, *, whole: bool = False) -> tuple[int, int, bool]:
        """Allocate the first free run of up to `count` clusters, or of exactly `count` if `whole`, and return (host offset,
        clusters, blank); the refcounts become 1. `blank`: the clusters are known to read as zero. Raises BlockIOError
        (ENOSPC) or LimitExceeded if there is no free space, and CorruptImage if clusters with the count 0 are in use."""
        self._file.tell("cluster_alloc")
        self._file.tell("refblock_alloc")
        if self._scan.below and self._has_gaps():
            if self._scan.due(self.blank_from - (self._scan.below << self._cluster_bits)):
                self._may_reuse()
            else:
                try:
                    return self._allocate(count, whole)
                except (BlockIOError, LimitExceeded) as error:
                    # No space is left past the end.
                    if (isinstance(error, BlockIOError) and error.errno != _ENOSPC) or not self._may_reuse():
                        raise
        return self._allocate(count, whole)

    def _has_gaps(self) -> bool:
        if self._gaps is None:
            self._gaps = self._find_free(0) < self._scan.below
        return self._gaps

    def scan(self) -> None:
        """Make sure that no cluster has more references than its count says; CorruptImage if one has. From then on clusters
        are reused."""
        if self._scan.below:
            self._scan.run(self)
            self._next = 0

    def _may_reuse(self) -> bool:
        """`scan`, and whether clusters that it protects may be reused: not if a table cannot be read."""
        if self._scan.below and self._scan.attempt(self):
            self._next = 0
        return not self._scan.below

    def may_free(self, runs: list[tuple[int, int]]) -> bool:
        """The same before these clusters (host offset, clusters) become free, if the scan protects some of them."""
        return not any(offset < self.protected for offset, _ in runs) or self._may_reuse()

    @property
    def protected(self) -> int:
        """The host offset below which clusters are neither freed nor reused before the scan."""
        return self._scan.below << self._cluster_bits

    def _allocate(self, count: int, whole: bool) -> tuple[int, int, bool]:
        while True:
            start = self._find_free(self._next)
            if not whole:
                self._next = start
            run = self._run(start, count)
            while whole and run < count:
                start = self._find_free(start + run + 1)
                run = self._run(start, count)
            # The blocks with the counts of these clusters must exist. A new block occupies the first cluster it describes.
            needed = range(start // self.per_block, (start + run - 1) // self.per_block + 1)
            missing = [which for which in needed if not self.has_block(which)]
            if not missing:
                break
            if not whole:
                self._add_block(missing[0], max(start, missing[0] * self.per_block))
            elif missing[-1] >= len(self.table):
                self._grow_table(missing[-1] + 1)
            else:
                # In the middle of the run they would divide it, and no run longer than one block describes would be found.
                # The count of each is in an existing block, in an earlier one of these, or in itself.
                for at, which in enumerate(missing):
                    self._add_block(which, start + at)
        self._refuse_metadata(start, run)
        offset = start << self._cluster_bits
        end = offset + (run << self._cluster_bits)
        if end > q.MAX_HOST_OFFSET:
            raise LimitExceeded("the image file has reached the largest size that qcow2 can address")
        self._require_space(end)
        self._fill(start, run, 1)
        if not whole:
            self._next = start + run
        return offset, run, self._take_blank(offset, end)

    def _require_space(self, end: int) -> None:
        """Raise BlockIOError (ENOSPC) if `end` is past the end of storage that cannot grow."""
        if end > self._file.node.size and not self._file.node.growable:
            raise BlockIOError("no space is left in the storage", errno=_ENOSPC, path=self._file.node.filename)

    def _take_blank(self, offset: int, end: int) -> bool:
        """Whether this range was never written. From now on it counts as written."""
        blank = offset >= self.blank_from
        self.blank_from = max(self.blank_from, end)
        return blank

    def _refuse_metadata(self, start: int, run: int) -> None:
        found = self.metadata.first_of(start, start + run)
        if found >= 0:
            raise CorruptImage(
                "a cluster with metadata is counted as free",
                path=self._file.node.filename,
                offset=found << self._cluster_bits,
                hint="check the image; nothing was written",
            )

    @property
    def unwritten(self) -> set[int]:
        """The indexes of the blocks that are not wholly on disk."""
        return self._changed | self._unlinked

    def column(self, which: int) -> Any:
        """All counts of the block with the index `which`, as a column."""
        block = self._block(which)
        assert block is not None, "the caller knows that it exists"
        return unpacked(block.raw(0, self._cluster_size), self._header.refcount_bits)

    def load(self, offset: int, clusters: int) -> None:
        """Load the counts of these clusters, regardless of the size of the cache, so that `lower_loaded` cannot fail."""
        self._file.tell("cluster_free")
        self._file.tell("refblock_alloc")
        first = offset >> self._cluster_bits
        last = first + clusters - 1
        blocks = {which: self._block(which) for which in range(first // self.per_block, last // self.per_block + 1)}
        self._blocks.update((which, block) for which, block in blocks.items() if block is not None)

    def lower(self, offset: int, clusters: int = 1) -> bool:
        """Undo an allocation: lower the count of each of these clusters by one; True if the first of them is free now. If a
        block cannot be read, no count changes."""
        self._scan.urgent = True  # perhaps the disk is full
        self.load(offset, clusters)
        return self.lower_loaded(offset, clusters)

    def lower_loaded(self, offset: int, clusters: int) -> bool:
        """As `lower`, after a `load` of the same clusters."""
        first = offset >> self._cluster_bits
        for cluster in range(first, first + clusters):
            count = self.get(cluster)
            if not count:
                raise CorruptImage(
                    "a cluster in use is counted as free",
                    path=self._file.node.filename,
                    offset=cluster << self._cluster_bits,
                    hint="check the image",
                )
            if count == 1:  # it leaves `metadata` before it can be allocated
                self.metadata.discard(cluster)
            self._fill(cluster, 1, count - 1, rises=False)
            if count == 1:
                self._next = min(self._next, cluster)
        return not self.get(first)

    def share(self, cluster: int) -> bool:
        """Raise the count of this cluster, which is in use, by one; False if the count is at its maximum."""
        count = self.get(cluster)
        if not 0 < count < self._max_count:
            return False
        self._fill(cluster, 1, count + 1)
        return True

    def last_references(self, runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """The parts (host offset, clusters) of these runs without other references. Each occurrence of a cluster in the runs
        stands for one reference."""
        bits = self._cluster_bits
        found: list[tuple[int, int]] = []
        seen: dict[int, int] = {}  # the occurrences of clusters with more than one reference
        for offset, clusters in runs:
            first = begin = offset >> bits
            for cluster in range(first, first + clusters):
                count = self.get(cluster)
                if count != 1:
                    seen[cluster] = times = seen.get(cluster, 0) + 1
                    if times != count:
                        if begin < cluster:
                            found.append((begin << bits, cluster - begin))
                        begin = cluster + 1
            if begin < first + clusters:
                found.append((begin << bits, first + clusters - begin))
        return found

    # -- writes, in the order of `Tables.flush`

    def write_counts(self) -> None:
        """Write changed counts, and new blocks and tables, to which nothing points yet."""
        for which in sorted(self._changed):
            block = self._blocks[which]
            if block.low >= block.high and which not in self._unlinked:  # an interrupt kept it from being removed
                self._changed.discard(which)
                continue
            low, high = (0, self._cluster_size) if which in self._unlinked else (block.low, block.high)
            # Whole sectors, which disks write atomically.
            low, high = low - low % 512, min(align_up(high, 512), self._cluster_size)
            self._file.tell("refblock_alloc_write" if which in self._unlinked else "refblock_update_part")
            self._file.write((self.table[which] & q.REFBLOCK_MASK) + low, memoryview(block.raw(low, high)))
            block.low, block.high = self._cluster_size, 0
            self._changed.discard(which)
        if self._moved and not self._offered:
            self._file.tell("refblock_alloc_write_table")
            self._file.write(self._header.refcount_table_offset, memoryview(_big_endian(self.table)))
        self._evict()

    def write_links(self) -> list[tuple[int, int]]:
        """Write the pointers to new blocks, which are durable by now. Returns (offset, clusters) of replaced tables. If this
        fails, the new blocks and tables count as published: from then on only this method writes them."""
        replaced = self._moved
        if replaced and not self._offered:
            self._offered = True
        else:
            for which in sorted(self._unlinked):
                self._file.tell("refblock_alloc_hookup")
                entry = memoryview(_big_endian(self.table[which : which + 1]))
                self._file.write(self._header.refcount_table_offset + 8 * which, entry)
        if replaced:
            self._file.tell("refblock_alloc_switch_table")
            self._header.store(self._file, "refcount_table_offset", "refcount_table_clusters")
        self._unlinked.clear()
        self._moved, self._offered = [], False
        return replaced

    # -- inside

    def has_block(self, which: int) -> bool:
        """Whether the table has a block with this index; without it, all of its counts are 0."""
        return which < len(self.table) and bool(self.table[which] & q.REFBLOCK_MASK)

    def _block(self, which: int) -> Block | None:
        """The block with the index `which`; None if there is none, so that all of its counts are 0."""
        block = self._blocks.get(which)
        if block is not None or not self.has_block(which):
            return block
        offset = self.table[which] & q.REFBLOCK_MASK
        if offset % self._cluster_size or offset >= self._file.node.size:
            raise CorruptImage(
                f"the offset {offset:#x} of refcount block {which} is misaligned or outside the file",
                path=self._file.node.filename,
                offset=self._header.refcount_table_offset + 8 * which,
                hint="check the image",
            )
        raw = bytearray(self._cluster_size)
        self._file.tell("refblock_load")
        self._file.read_into(offset, memoryview(raw))
        self._evict()
        block = self._make(raw)
        self._blocks[which] = block
        return block

    def _make(self, raw: bytearray) -> Block:
        return make_block(raw, self._header.refcount_bits)

    def _fill(self, cluster: int, clusters: int, count: int, *, rises: bool = True) -> None:
        """Set the counts of these clusters. Before counts rise, storage for the blocks is allocated in the file; a count that
        falls was not zero, and so does not lie in a hole."""
        end = cluster + clusters
        while cluster < end:
            which, index = divmod(cluster, self.per_block)
            part = min(end - cluster, self.per_block - index)
            block = self._block(which)
            assert block is not None, "the caller makes sure that the block exists"
            if rises and not block.stored:
                offset, raw = self.table[which] & q.REFBLOCK_MASK, block.raw(0, self._cluster_size)
                if has_hole(self._file, offset, raw):
                    self._file.write(offset, memoryview(raw))
                block.stored = True
            self._changed.add(which)
            block.fill(index, part, count)
            cluster += part

    def _find_free(self, start: int) -> int:
        which, index = divmod(start, self.per_block)
        while True:
            block = self._block(which)
            found = index if block is None else block.find_free(index)
            if found >= 0:
                return which * self.per_block + found
            which, index = which + 1, 0

    def _run(self, start: int, count: int) -> int:
        """The number of free clusters from `start` on, up to `count`."""
        run = 0
        while run < count:
            which, index = divmod(start + run, self.per_block)
            block = self._block(which)
            part = min(count - run, self.per_block - index)
            free = part if block is None else block.free_run(index, part)
            run += free
            if free < part:
                break
        return run

    def _add_block(self, which: int, cluster: int) -> None:
        """Create a refcount block in `cluster`, which is free."""
        if which >= len(self.table):
            self._grow_table(which + 1)
            if self.has_block(which):
                return  # the growth of the table created this block
        offset = cluster << self._cluster_bits
        self._refuse_metadata(cluster, 1)
        self._require_space(offset + self._cluster_size)
        self._ensure_stored(which)
        counted_by, index = divmod(cluster, self.per_block)
        block = self._make(bytearray(self._cluster_size))
        if counted_by == which:
            block.fill(index, 1, 1)
        self._file.write(offset, memoryview(block.raw(0, self._cluster_size)))
        block.stored = True
        if counted_by != which:
            self._fill(cluster, 1, 1)
        # No call, and so no interrupt, from here to the entry of the table.
        self._blocks[which] = block
        self._unlinked |= {which}
        self._changed |= {which}
        self.metadata.recent |= {cluster}
        self.table[which] = offset
        self._take_blank(offset, offset + self._cluster_size)

    def _ensure_stored(self, which: int) -> None:
        """Make sure that the file has storage for this entry of the table, so that writing it cannot fail."""
        if self._moved and not self._offered:
            return  # the table on disk is another one
        first = which & ~63
        sector = self.table[first : first + 64].tobytes()
        offset = self._header.refcount_table_offset + 8 * first
        if not any(sector) and has_hole(self._file, offset, sector):
            self._file.write(offset, memoryview(sector))

    def _grow_table(self, entries: int) -> None:
        """Extend the table to `entries` entries at least: a larger one in new clusters replaces it in `write_links`."""
        self._file.tell("reftable_grow")
        size = align_up((entries + entries // 2 + 16) * 8, self._cluster_size)
        size = min(size, max(q.MAX_REFTABLE_BYTES, self._cluster_size))
        if size < entries * 8:
            raise BlockIOError(
                "the image file has reached the maximum size of its refcount table",
                errno=_ENOSPC,
                path=self._file.node.filename,
                hint="use larger clusters",
            )
        header = self._header
        old = (header.refcount_table_offset, header.refcount_table_clusters)
        # A table that the header on disk never pointed to is freed at once, any other when the header points to the new one.
        unseen = bool(self._moved) and not self._offered
        moved = self._moved if unseen else [*self._moved, old]
        clusters = size >> self._cluster_bits
        try:
            self.table.extend([0] * (size // 8 - len(self.table)))
            offset, _, _ = self.allocate(clusters, whole=True)
            try:
                self._file.write(offset, memoryview(bytes(size)))
            except BaseException:
                self.lower(offset, clusters)
                raise
            self.protect(offset, clusters)
            # One statement without calls, so no interrupt can divide it.
            header.refcount_table_offset, header.refcount_table_clusters, self._moved, self._offered = (
                offset,
                clusters,
                moved,
                False,
            )
        except BaseException:
            if header.refcount_table_offset == old[0]:
                self._shrink_table(old[1] * self._cluster_size // 8)
            raise
        if unseen:
            self.lower(*old)

    def _shrink_table(self, entries: int) -> None:
        """Undo a failed growth: blocks past the end of the smaller table are removed."""
        for which in [w for w in self._unlinked if w >= entries]:
            self.metadata.discard(self.table[which] >> self._cluster_bits)
            self._unlinked.discard(which)
            self._changed.discard(which)
            del self._blocks[which]
        del self.table[entries:]

    def _evict(self) -> None:
        """Evict clean blocks if there are too many."""
        if len(self._blocks) * self._cluster_size > self._cache_bytes:
            for which in [w for w in self._blocks if w not in self._changed and w not in self._unlinked]:
                del self._blocks[which]


def _big_endian(values: array[Any]) -> bytes:
    copy = values[:]
    if sys.byteorder == "little":
        copy.byteswap()
    return copy.tobytes()
