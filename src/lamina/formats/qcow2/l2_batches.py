"""L2 tables, many at once: read in batches, and the host clusters to which their entries point.

`rewrite` changes the counts of these clusters, and `refcount_scan` compares them with the references. The check has a walk of
its own (`references`), so that it finds errors of this one. After "Cluster mapping" of the published specification.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ...errors import CorruptImage
from ...limits import MIB, align_up
from ...numeric import np
from . import l2_entry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ...request import Child
    from .l2_entry import L2Layout

#: Bytes of L2 tables that are looked at in one go.
BATCH = 4 * MIB


def read_tables(file: Child, offsets: Any, cluster_bits: int, batch: int = BATCH) -> Iterator[tuple[Any, Any]]:
    """(offsets, entries as one column) of the L2 tables at these offsets (int64), in batches of `batch` bytes, or one by one.
    Tables that are adjacent in a batch are read in one request. CorruptImage if a table is misaligned or outside the file."""
    size, end = 1 << cluster_bits, align_up(file.size, 1 << cluster_bits)
    step = max(batch >> cluster_bits, 1)
    for at in range(0, len(offsets), step):
        part = offsets[at : at + step]
        wrong = np.flatnonzero((part & size - 1 != 0) | (part + size > end))
        if len(wrong):
            raise CorruptImage(
                "an L2 table is misaligned or outside the file",
                path=file.node.filename,
                offset=int(part[wrong[0]]),
                hint="check the image",
            )
        raw = bytearray(len(part) << cluster_bits)
        view = memoryview(raw)
        edges = [0, *(np.flatnonzero(np.diff(part) != size) + 1).tolist(), len(part)]
        for first, stop in pairwise(edges):
            file.read_into(int(part[first]), view[first << cluster_bits : stop << cluster_bits])
        yield part, np.frombuffer(raw, ">u8").astype(np.uint64)


def host_clusters(words: Any, layout: L2Layout, path: str) -> Iterator[Any]:
    """The host clusters (int64) to which the entries of these tables point, each as often as they do: data clusters, and
    each cluster that compressed data overlaps. CorruptImage if a data cluster is misaligned."""
    bits = layout.cluster_bits
    entries = words[:: 1 << layout.entry_bits - 3]
    packed = l2_entry.compressed_mask(entries)
    some = bool(packed.any())
    offsets = l2_entry.offsets_of(entries[~packed] if some else entries).astype(np.int64)
    offsets = offsets[offsets != 0]
    wrong = np.flatnonzero(offsets & layout.cluster_size - 1)
    if len(wrong):
        raise CorruptImage(
            "an L2 entry points to a misaligned cluster",
            path=path,
            offset=int(offsets[wrong[0]]) >> bits << bits,
            hint="check the image",
        )
    yield offsets >> bits
    if some:
        begin, end = l2_entry.compressed_ranges(entries[packed], bits)
        first = (begin >> np.uint64(bits)).astype(np.int64)
        last = (end - np.uint64(1) >> np.uint64(bits)).astype(np.int64)
        while len(first):
            yield first
            first, last = first[first < last] + 1, last[first < last]
