"""Host cluster management: reference counts, and which cluster is given out next.

The refcount table points to refcount blocks, each a cluster of counts. Blocks are cached and changed in memory; nothing here
decides when they reach the disk: the driver writes them in the order that keeps an image whole (see `driver.Qcow2.flush`):

1. `write_counts`: counts that rose, and whole new blocks and tables that nothing points to yet;
2. `write_links`, after a flush: the entries, or the header fields, that point to the new blocks and tables.

A count is lowered (`lower`) only when the reference is durably gone, so a crash leaks clusters and never loses one.

A new block or table is written to its place before anything is counted there, so that a later flush only writes over what the
file system has found room for already: on a full disk everything that was acknowledged can still be flushed.

An exception may strike at any call (Ctrl-C is one). So whatever belongs together changes in statements without calls, stores
and operators: CPython handles signals at calls and at the ends of loops only. Where a call cannot be avoided, the order is
such that a cluster is counted and not used at worst.
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
from .refcount_block import Block, make_block

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from ...request import Child
    from .header import Header

_ENOSPC = 28


class Refcounts:
    """The counts of one image. Not thread-safe: the driver holds its lock around every call."""

    def __init__(self, file: Child, header: Header, cache_bytes: int) -> None:
        self._file = file
        self._header = header
        self._cache_bytes = cache_bytes
        self._cluster_bits = header.cluster_bits
        self._cluster_size = header.cluster_size
        self._max_count = (1 << header.refcount_bits) - 1
        self.per_block = header.cluster_size * 8 // header.refcount_bits
        self._blocks: dict[int, Block] = {}
        self._changed: set[int] = set()  # blocks with counts that are not on disk
        self._unlinked: set[int] = set()  # new blocks that no table on disk points to
        self._moved: list[tuple[int, int]] = []  # (offset, clusters) of tables on disk that a larger one replaces
        self._offered = False  # the header was to point to the larger one: though that failed, it may do so
        self._next = 0  # no cluster below this index is free
        #: Host offset from which on no byte was ever written: what is given out there reads as zero.
        self.blank_from = align_up(file.node.size, header.cluster_size)
        #: Clusters that hold metadata, which must never be given out, nor written as data. Empty before `claim`.
        self.metadata = ClusterSet()
        self.table = array("Q", (0,)) * (header.refcount_table_clusters << header.cluster_bits - 3)
        file.tell("reftable_load")
        file.read_into(header.refcount_table_offset, memoryview(self.table).cast("B"))
        if sys.byteorder == "little":
            self.table.byteswap()

    def claim(self, single: Iterable[Collection[int]], shared: Iterable[Collection[int]]) -> None:
        """Fill `metadata` with what holds structures of the image as it was found: the header, the refcount table and its
        blocks, and the clusters given, in batches. Those that are `shared` may be named more than once. CorruptImage if one
        cluster holds two structures: writing to the one would destroy the other."""
        bits, header = self._cluster_bits, self._header
        first = header.refcount_table_offset >> bits
        own = [range(1), range(first, first + header.refcount_table_clusters)]
        blocks = [(entry & q.REFBLOCK_MASK) >> bits for entry in self.table if entry & q.REFBLOCK_MASK]
        once = join(merge(sorted_arrays(shared, repeated=True), repeated=True))
        try:
            self.metadata = ClusterSet(merge([once, *sorted_arrays(chain(own, [blocks], single))]))
        except ValueError as error:
            raise CorruptImage(
                "structures of the image lie over one another",
                path=self._file.node.filename,
                hint="check the image; it was not written to",
            ) from error

    def protect(self, offset: int, clusters: int) -> None:
        """These clusters hold metadata from now on."""
        self.metadata.add(offset >> self._cluster_bits, clusters)

    @property
    def dirty(self) -> bool:
        """Whether a count, or what points to a block or table, is not on disk."""
        return bool(self._changed or self._unlinked or self._moved)

    @property
    def links_dirty(self) -> bool:
        """Whether a new block or table waits for `write_links`."""
        return bool(self._unlinked or self._moved)

    def get(self, cluster: int) -> int:
        """The count of the host cluster with this index."""
        which, index = divmod(cluster, self.per_block)
        block = self._block(which)
        return 0 if block is None else block.get(index)

    def allocate(self, count: int, *, whole: bool = False) -> tuple[int, int, bool]:
        """(host offset, clusters, blank): the first free run of up to `count` clusters, of exactly `count` if `whole`; each
        is counted once from now on. `blank`: the room is known to read as zero. Raises BlockIOError (ENOSPC) or
        LimitExceeded when there is no more room, CorruptImage where what is counted as free is not."""
        self._file.tell("cluster_alloc")
        self._file.tell("refblock_alloc")
        while True:
            start = self._find_free(self._next)
            if not whole:
                self._next = start
            run = self._run(start, count)
            while whole and run < count:
                start = self._find_free(start + run + 1)
                run = self._run(start, count)
            # Blocks that will count these clusters must exist; a new one takes the first cluster that it counts itself.
            needed = range(start // self.per_block, (start + run - 1) // self.per_block + 1)
            missing = [which for which in needed if not self._has(which)]
            if not missing:
                break
            if not whole:
                self._add_block(missing[0], max(start, missing[0] * self.per_block))
            elif missing[-1] >= len(self.table):
                self._grow_table(missing[-1] + 1)
            else:
                # In the middle of the run they would cut it: a run longer than what one block counts was never found. Each
                # is counted by a block that is there already, one of those before it here, or itself.
                for at, which in enumerate(missing):
                    self._add_block(which, start + at)
        self._refuse_metadata(start, run)
        offset = start << self._cluster_bits
        end = offset + (run << self._cluster_bits)
        if end > q.MAX_HOST_OFFSET:
            raise LimitExceeded("the image file has reached the largest size that qcow2 can address")
        self._require_room(end)
        self._fill(start, run, 1)
        if not whole:
            self._next = start + run
        return offset, run, self._take_blank(offset, end)

    def _require_room(self, end: int) -> None:
        if end > self._file.node.size and not self._file.node.growable:
            raise BlockIOError("no space is left in the storage", errno=_ENOSPC, path=self._file.node.filename)

    def _take_blank(self, offset: int, end: int) -> bool:
        """Whether this room was never written; from now on it counts as written."""
        blank = offset >= self.blank_from
        self.blank_from = max(self.blank_from, end)
        return blank

    def _refuse_metadata(self, start: int, run: int) -> None:
        found = self.metadata.first_of(start, start + run)
        if found >= 0:
            raise CorruptImage(
                "a cluster that holds metadata is counted as free",
                path=self._file.node.filename,
                offset=found << self._cluster_bits,
                hint="check the image; it was not written to",
            )

    def load(self, offset: int, clusters: int) -> None:
        """Have the counts of these clusters in memory, whatever the size of the cache, so that lowering them cannot fail."""
        self._file.tell("cluster_free")
        self._file.tell("refblock_alloc")
        first = offset >> self._cluster_bits
        last = first + clusters - 1
        blocks = {which: self._block(which) for which in range(first // self.per_block, last // self.per_block + 1)}
        self._blocks.update((which, block) for which, block in blocks.items() if block is not None)

    def lower(self, offset: int, clusters: int = 1) -> bool:
        """Take one reference away from each of these clusters; True if that left the first of them free. Where a block
        cannot be read nothing is taken away."""
        self.load(offset, clusters)
        return self.lower_loaded(offset, clusters)

    def lower_loaded(self, offset: int, clusters: int) -> bool:
        """As `lower`, behind a `load` of the same clusters."""
        first = offset >> self._cluster_bits
        for cluster in range(first, first + clusters):
            count = self.get(cluster)
            if not count:
                raise CorruptImage(
                    "a cluster that was in use is counted as free",
                    path=self._file.node.filename,
                    offset=cluster << self._cluster_bits,
                    hint="check the image",
                )
            if count == 1:  # known to hold no metadata before it can be given out
                self.metadata.discard(cluster)
            self._fill(cluster, 1, count - 1, rises=False)
            if count == 1:
                self._next = min(self._next, cluster)
        return not self.get(first)

    def share(self, cluster: int) -> bool:
        """Count one more reference to this cluster, which is in use; False where that cannot be counted."""
        count = self.get(cluster)
        if not 0 < count < self._max_count:
            return False
        self._fill(cluster, 1, count + 1)
        return True

    def last_references(self, stretches: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """The parts (host offset, clusters) of these stretches to which there is no reference but those that the stretches
        stand for: one for each time that they name a cluster."""
        bits = self._cluster_bits
        found: list[tuple[int, int]] = []
        named: dict[int, int] = {}  # how often, for those with more than one reference
        for offset, clusters in stretches:
            first = begin = offset >> bits
            for cluster in range(first, first + clusters):
                count = self.get(cluster)
                if count != 1:
                    named[cluster] = times = named.get(cluster, 0) + 1
                    if times != count:
                        if begin < cluster:
                            found.append((begin << bits, cluster - begin))
                        begin = cluster + 1
            if begin < first + clusters:
                found.append((begin << bits, first + clusters - begin))
        return found

    # -- to disk, in the order that the driver decides

    def write_counts(self) -> None:
        """Write what changed: safe before anything refers to it. New tables too: nothing points to them yet."""
        for which in sorted(self._changed):
            block = self._blocks[which]
            if block.low >= block.high and which not in self._unlinked:  # an interrupt kept it from being crossed off
                self._changed.discard(which)
                continue
            low, high = (0, self._cluster_size) if which in self._unlinked else (block.low, block.high)
            # Whole sectors: a sector is what a disk writes at once.
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
        """Point to the new blocks, which are durable by now. Returns (offset, clusters) of tables that were replaced. Where
        it fails, what it was to point to is taken for published: from then on it changes only here."""
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

    def _has(self, which: int) -> bool:
        return which < len(self.table) and bool(self.table[which] & q.REFBLOCK_MASK)

    def _block(self, which: int) -> Block | None:
        """Block number `which`, or None if all its counts are 0 because there is none."""
        block = self._blocks.get(which)
        if block is not None or not self._has(which):
            return block
        offset = self.table[which] & q.REFBLOCK_MASK
        if offset % self._cluster_size or offset >= self._file.node.size:
            raise CorruptImage(
                f"refcount block {which} is said to lie at {offset:#x}, which cannot be",
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
        """Give clusters this count. Where counts rise, the file is made to have room for the blocks first: a count that falls
        was not zero, and lies in no hole."""
        end = cluster + clusters
        while cluster < end:
            which, index = divmod(cluster, self.per_block)
            part = min(end - cluster, self.per_block - index)
            block = self._block(which)
            assert block is not None, "counted only where a block exists"
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
        """How many clusters are free from `start` on, up to `count`."""
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
        """A new refcount block in `cluster`, which is free and is the first that the block counts as used: itself."""
        if which >= len(self.table):
            self._grow_table(which + 1)
            if self._has(which):
                return  # the larger table needed this block already
        offset = cluster << self._cluster_bits
        self._refuse_metadata(cluster, 1)
        self._require_room(offset + self._cluster_size)
        self._ensure_stored(which)
        counted_by, index = divmod(cluster, self.per_block)
        block = self._make(bytearray(self._cluster_size))
        if counted_by == which:
            block.fill(index, 1, 1)
        self._file.write(offset, memoryview(block.raw(0, self._cluster_size)))
        block.stored = True
        if counted_by != which:
            self._fill(cluster, 1, 1)
        # One step: no call, and so no interrupt, from here to the entry of the table.
        self._blocks[which] = block
        self._unlinked |= {which}
        self._changed |= {which}
        self.metadata.recent |= {cluster}
        self.table[which] = offset
        self._take_blank(offset, offset + self._cluster_size)

    def _ensure_stored(self, which: int) -> None:
        """See to it that the file holds storage for this entry of the table, so that writing it cannot fail."""
        if self._moved and not self._offered:
            return  # that table is not this one
        first = which & ~63
        sector = self.table[first : first + 64].tobytes()
        offset = self._header.refcount_table_offset + 8 * first
        if not any(sector) and has_hole(self._file, offset, sector):
            self._file.write(offset, memoryview(sector))

    def _grow_table(self, entries: int) -> None:
        """Make room for more blocks: a larger table, in new clusters, that takes the place of this one at `write_links`."""
        self._file.tell("reftable_grow")
        size = align_up((entries + entries // 2 + 16) * 8, self._cluster_size)
        size = min(size, max(q.MAX_REFTABLE_BYTES, self._cluster_size))
        if size < entries * 8:
            raise BlockIOError(
                "the image file is as large as its refcount table can count",
                errno=_ENOSPC,
                path=self._file.node.filename,
                hint="use larger clusters",
            )
        header = self._header
        old = (header.refcount_table_offset, header.refcount_table_clusters)
        # A table that never reached the disk is given up at once; one that did when the header points elsewhere.
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
            # One step: no call, and so no interrupt, inside it.
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
        """Undo a growth that failed: blocks that only the larger table could point to are gone with it."""
        for which in [w for w in self._unlinked if w >= entries]:
            self.metadata.discard(self.table[which] >> self._cluster_bits)
            self._unlinked.discard(which)
            self._changed.discard(which)
            del self._blocks[which]
        del self.table[entries:]

    def _evict(self) -> None:
        """Forget clean blocks when there are too many."""
        if len(self._blocks) * self._cluster_size > self._cache_bytes:
            for which in [w for w in self._blocks if w not in self._changed and w not in self._unlinked]:
                del self._blocks[which]


def _big_endian(values: array[Any]) -> bytes:
    copy = values[:]
    if sys.byteorder == "little":
        copy.byteswap()
    return copy.tobytes()
