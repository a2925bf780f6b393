"""Compressed clusters: reading and writing.

After "Compressed Clusters Descriptor" of the published specification. Compressed data begins at any byte, and its descriptor
covers the sectors up to its last one. Each host cluster that these sectors overlap counts one reference for it; the data of
several clusters may share a host cluster.

Compressed data is written end to end. The first free byte of the last host cluster is known only while the node is open, and
is forgotten when any data in that host cluster is freed: bytes to which an entry pointed are reused only after their whole
host cluster was free.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import closing
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from ...coding import threads_for, workers_of
from ...errors import CorruptImage, OptionError
from ...format_node import Reservation
from ...limits import KIB, MIB, align_down, align_up
from .l2_entry import compressed_entry, compressed_range

if TYPE_CHECKING:
    from ...format_node import FormatNode
    from .tables import Tables

#: The size of the cache of clusters that small reads decompressed, in bytes.
_CACHE = MIB
#: The bytes whose compressed data is held at once.
_BATCH = 4 * MIB
#: The bytes that a thread compresses at a time: the others have work while one writes. (600 MB of files with zstd on two
#: processors take 1.30 s; in halves of a request, all of it before it is written, 1.42 s; in parts of 128 KiB 1.40 s.)
_PART = 512 * KIB
#: The most compressed data that is read at once.
_RUN = MIB
#: Compressed data ends in any byte of a sector.
_SECTOR = 512


class NewEntry(NamedTuple):
    """The L2 entry of a compressed cluster that no table contains yet, and its indexes in the tables."""

    l1_index: int
    l2_index: int
    entry: int


class Compression:
    """The compressed clusters of the image with these tables. Any number of threads may call its methods."""

    def __init__(self, tables: Tables) -> None:
        header = tables.header
        self._tables, self._file = tables, tables.file
        self._bits, self._cluster_size = header.cluster_bits, header.cluster_size
        self._zstd = bool(header.compression_type)
        #: The effort to compress, as the codec takes it; None: its default for images.
        self.level: int | None = None
        # With refcounts of one bit no two clusters can share a host cluster, so compression would save nothing.
        self.compresses = header.refcount_bits > 1 and not (header.crypt_method or header.external_data)
        self._cache: dict[int, bytes | bytearray] = {}  # by L2 entry, the oldest first
        self._max_cached = max(_CACHE >> self._bits, 2)
        self._cache_lock = threading.Lock()
        # Held from the allocation of storage until the L2 entries point to it: the end of one cluster's data and the
        # beginning of the next share a sector, and data at the end of the file is padded to a whole sector.
        self._allocating = threading.Lock()

    def set_level(self, level: int | None) -> None:
        """Compress with this effort, before anything is written. OptionError if the codec has no such level."""
        if level is not None and level > 9 and not self._zstd:
            raise OptionError(
                f"deflate has no compression level {level}", path=self._file.node.filename, hint="it takes 1 to 9"
            )
        self.level = level

    # -- reading

    def read_into(self, entry: int, within: int, view: memoryview) -> None:
        """Fill `view` with the data of the cluster with this L2 entry, from its byte `within` on. CorruptImage if it cannot
        be decompressed."""
        self.read_parts([(entry, within, view)])

    def read_parts(self, parts: list[tuple[int, int, memoryview]]) -> None:
        """`read_into` of each part. Data that lies end to end is read from the file at once."""
        bits, size, decompress = self._bits, self._cluster_size, self._codec()[1]
        places = [compressed_range(entry, bits) for entry, _, _ in parts]
        stored, start, end = memoryview(b""), 0, 0
        for at, ((entry, within, view), (offset, length)) in enumerate(zip(parts, places, strict=True)):
            data = self._cache.get(entry)
            if data is None:
                if offset < start or offset + length > end:
                    start, end = offset, _end_of_run(places, at)
                    stored = self._read(start, end - start)
                try:
                    data = decompress(stored[offset - start : offset - start + length], size)
                except CorruptImage as error:
                    raise self._unreadable(offset, error) from error
                if len(view) < size:  # the next read probably needs the rest
                    self._keep(entry, data)
            view[:] = data if len(view) == size else memoryview(data)[within : within + len(view)]

    def _keep(self, entry: int, data: bytes | bytearray) -> None:
        with self._cache_lock:
            self._cache[entry] = data
            while len(self._cache) > self._max_cached:
                del self._cache[next(iter(self._cache))]

    def _unreadable(self, offset: int, error: CorruptImage) -> CorruptImage:
        outside = offset >= self._file.node.size
        return CorruptImage(
            f"compressed data cannot be read: {'it begins past the end of the file' if outside else error.message}",
            path=self._file.node.filename,
            operation="read",
            offset=offset,
            hint="check the image; the offset is that in its file",
        )

    def _read(self, offset: int, length: int) -> memoryview:
        """That part of the file. The file may end inside the last sector, or before."""
        data = memoryview(bytearray(max(min(length, self._file.node.size - offset), 0)))
        if data:
            self._file.tell("read_compressed")
            self._file.read_into(offset, data)
        return data

    def _codec(self) -> tuple[Callable[..., bytes], Callable[[memoryview, int], bytes | bytearray]]:
        if self._zstd:
            from ...codecs import zstd

            return zstd.compress, zstd.decompress
        from ...codecs import deflate

        return deflate.compress, deflate.decompress

    # -- writing

    def write(self, node: FormatNode, offset: int, view: memoryview) -> None:
        """Store whole clusters of the disk of `node` compressed, including a short last cluster. Parts of clusters, and
        clusters that do not shrink, are written uncompressed. Compressed clusters always get new storage."""
        size = self._cluster_size
        end = offset + len(view)
        first = align_up(offset, size)
        last = end if end == node.size else align_down(end, size)
        if not self.compresses or first >= last:
            node.write(offset, view)
            return
        if offset < first:
            node.write(offset, view[: first - offset])
        for at in range(first, last, _BATCH):
            self._write_clusters(node, at, view[at - offset : min(at + _BATCH, last) - offset])
        if last < end:
            node.write(last, view[last - offset :])

    def _write_clusters(self, node: FormatNode, offset: int, view: memoryview) -> None:
        """Compress and write: other threads compress the rest while a part is written."""
        size = self._cluster_size
        at = 0
        with closing(self._compress_all(node, view)) as parts:
            for part in parts:
                compressed = zip(range(at, at + len(part) * size, size), part, strict=True)
                at += len(part) * size
                for shrinks, group in groupby(compressed, lambda piece: len(piece[1]) < size):
                    pieces = list(group)
                    if shrinks:
                        self._store_all(node, [(offset + start, data) for start, data in pieces])
                    else:
                        first, last = pieces[0][0], pieces[-1][0]
                        node.write(offset + first, view[first : last + size])

    def _compress_all(self, node: FormatNode, view: memoryview) -> Generator[list[bytes], None, None]:
        """The clusters of `view`, compressed, part by part; several threads share a long buffer."""
        if threads_for(len(view)) < 2:
            yield self._compress(view)
            return
        share = max(_PART, self._cluster_size)
        parts = (view[at : at + share] for at in range(0, len(view), share))
        yield from workers_of(node).results(self._compress, parts)

    def _compress(self, view: memoryview) -> list[bytes]:
        size, compress = self._cluster_size, self._codec()[0]
        if self.level is not None:
            compress = partial(compress, level=self.level)
        whole = align_down(len(view), size)
        found = [compress(view[at : at + size]) for at in range(0, whole, size)]
        if whole < len(view):  # the last cluster of the disk
            found.append(compress(memoryview(bytes(view[whole:]).ljust(size, b"\0"))))
        return found

    def _store_all(self, node: FormatNode, pieces: list[tuple[int, bytes]]) -> None:
        """Reserve, write, commit: the data is written before an L2 entry points to it."""
        tables = self._tables
        with self._allocating:
            new = tables.changing(self._reserve, pieces)
            try:
                offsets = [compressed_range(one.entry, self._bits)[0] for one in new]
                start = 0
                for stop in range(1, len(pieces) + 1):
                    if stop == len(pieces) or offsets[stop] != offsets[stop - 1] + len(pieces[stop - 1][1]):
                        data = memoryview(b"".join(data for _, data in pieces[start:stop]))
                        node.store(Reservation(0, len(data), offsets[start], self._file), 0, data, "write_compressed")
                        start = stop
            except BaseException:
                tables.changing(self._abandon, new)
                raise
            tables.changing(self._commit, new)

    def _reserve(self, pieces: list[tuple[int, bytes]]) -> list[NewEntry]:
        tables, bits = self._tables, self._bits
        new: list[NewEntry] = []
        self._file.tell("cluster_alloc_bytes")
        try:
            for offset, data in pieces:
                which, index = divmod(offset >> bits, tables.mappings.per_table)
                tables.require_droppable(tables.own_table(which), index)
                host = tables.allocate_compressed(len(data))
                new.append(NewEntry(which, index, compressed_entry(host, len(data), bits)))
        except BaseException:
            self._abandon(new)
            raise
        return new

    def _abandon(self, new: list[NewEntry]) -> None:
        for one in new:
            self._tables.abandon_compressed(one.entry)

    def _commit(self, new: list[NewEntry]) -> None:
        tables = self._tables
        for which, index, entry in new:
            # An equal entry may have pointed to other data before.
            with self._cache_lock:
                self._cache.pop(entry, None)
            tables.own_table(which)
            tables.replace_entry(which, index, entry)
        if tables.mappings.pressure:
            tables.write_out()


def _end_of_run(places: list[tuple[int, int]], first: int) -> int:
    """The end of the data that begins with that of the place number `first` and continues with those after it: each begins
    where the one before it ends, or in the same sector."""
    start, length = places[first]
    end = start + length
    for offset, length in places[first + 1 :]:
        if not end - _SECTOR < offset <= end or offset + length > start + _RUN:
            break
        end = offset + length
    return end
