"""Compressed clusters: how they are read, and how clusters are stored compressed.

After "Compressed Clusters Descriptor" of the published specification. Compressed data begins at any byte and is described
up to the end of its last sector; the host clusters that its sectors touch count it once each, and others may lie in the same
ones.

Compressed data is laid end to end. The first free byte of the cluster that was last begun is known only as long as the node
is open, and forgotten as soon as anything in that cluster is given up: bytes that something referred to are written again
only after their whole cluster was free.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from ...errors import CorruptImage
from ...format_node import Reservation
from ...limits import KIB, MIB, align_down, align_up
from .l2_entry import compressed_entry, compressed_range

if TYPE_CHECKING:
    from ...format_node import FormatNode
    from ...workers import Workers
    from .tables import Tables

#: Clusters that small reads decompressed last are kept, up to so many bytes.
_KEPT = MIB
#: What is compressed and placed at once, and what one thread compresses at least.
_BATCH, _SHARE = 4 * MIB, 128 * KIB
#: More threads than this found the file or the tables in their way.
_MOST_THREADS = 8


class NewEntry(NamedTuple):
    """The L2 entry of one compressed cluster that is not published yet, and which entry of the tables it will be."""

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
        # With counts of one bit no two can share a cluster: nothing would be saved.
        self.compresses = header.refcount_bits > 1 and not header.crypt_method
        self._kept: dict[int, bytes] = {}  # by L2 entry, the one kept first first
        self._most_kept = max(_KEPT >> self._bits, 2)
        self._keeping = threading.Lock()
        # Held from the choice of a place until it is published: the end of one piece and the beginning of the next lie in
        # one sector, and a piece at the end of the file is written up to the end of its last.
        self._placing = threading.Lock()
        self._workers: Workers | None = None

    # -- reading

    def read_into(self, entry: int, within: int, view: memoryview) -> None:
        """Fill `view` with what the cluster of this L2 entry holds from its byte `within` on. CorruptImage if it cannot be
        decompressed."""
        data = self._kept.get(entry)
        if data is None:
            data = self._decompress(entry)
            if len(view) < self._cluster_size:  # the next read is likely to want the rest
                with self._keeping:
                    self._kept[entry] = data
                    while len(self._kept) > self._most_kept:
                        del self._kept[next(iter(self._kept))]
        view[:] = memoryview(data)[within : within + len(view)]

    def _decompress(self, entry: int) -> bytes:
        offset, length = compressed_range(entry, self._bits)
        inside = min(length, self._file.node.size - offset)  # the last sector may not be there in full
        try:
            if inside <= 0:
                raise CorruptImage("it begins past the end of the file")
            data = memoryview(bytearray(inside))
            self._file.tell("read_compressed")
            self._file.read_into(offset, data)
            return self._codec()[1](data, self._cluster_size)
        except CorruptImage as error:
            raise CorruptImage(
                f"compressed data cannot be read: {error.message}",
                path=self._file.node.filename,
                operation="read",
                offset=offset,
                hint="check the image; the offset is that in its file",
            ) from error

    def _codec(self) -> tuple[Callable[[memoryview], bytes], Callable[[memoryview, int], bytes]]:
        if self._zstd:
            from ...codecs import zstd

            return zstd.compress, zstd.decompress
        from ...codecs import deflate

        return deflate.compress, deflate.decompress

    # -- writing

    def write(self, node: FormatNode, offset: int, view: memoryview) -> None:
        """Store whole clusters of the disk of `node` compressed, also the last one, which may be short. What does not shrink,
        and parts of clusters, are written as any write is. Nothing is written over: a cluster gets new storage."""
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
        size = self._cluster_size
        compressed = zip(range(0, len(view), size), self._compress_all(view), strict=True)
        for shrinks, group in groupby(compressed, lambda piece: len(piece[1]) < size):
            pieces = list(group)
            if shrinks:
                self._place_all(node, [(offset + at, data) for at, data in pieces])
            else:
                first, last = pieces[0][0], pieces[-1][0]
                node.write(offset + first, view[first : last + size])

    def _compress_all(self, view: memoryview) -> list[bytes]:
        """Each cluster of `view` compressed; of much, each thread compresses a share."""
        threads = min(os.cpu_count() or 1, _MOST_THREADS, len(view) // _SHARE)
        if threads < 2:
            return self._compress(view)
        share = align_up(-(-len(view) // threads), self._cluster_size)
        parts = [view[at : at + share] for at in range(0, len(view), share)]
        return [data for part in self._compressors().map(self._compress, parts) for data in part]

    def _compress(self, view: memoryview) -> list[bytes]:
        size, compress = self._cluster_size, self._codec()[0]
        whole = align_down(len(view), size)
        found = [compress(view[at : at + size]) for at in range(0, whole, size)]
        if whole < len(view):  # the last cluster of the disk
            found.append(compress(memoryview(bytes(view[whole:]).ljust(size, b"\0"))))
        return found

    def _compressors(self) -> Workers:
        with self._keeping:
            if self._workers is None:
                from ...workers import Workers

                self._workers = Workers(min(os.cpu_count() or 1, _MOST_THREADS), "lamina-compress")
            return self._workers

    def _place_all(self, node: FormatNode, pieces: list[tuple[int, bytes]]) -> None:
        """Reserve, write, commit: compressed data is on its way before any mapping names it."""
        tables = self._tables
        with self._placing:
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
            # An entry like this one may have named something else, long ago.
            with self._keeping:
                self._kept.pop(entry, None)
            tables.own_table(which)
            tables.replace_entry(which, index, entry)
        if tables.mappings.pressure:
            tables.write_out()

    def close(self) -> None:
        if self._workers is not None:
            self._workers.close()
