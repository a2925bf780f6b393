"""The structures of an image: the clusters of each, before the first change.

All of them are claimed together (`Refcounts.claim`), which compares them with one another: none may lie over another.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

from ...errors import LimitExceeded
from .l1_table import L1Table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ...request import Child
    from .header import Header
    from .refcounts import Refcounts
    from .snapshot_table import Entry

#: The L1 tables of snapshots may have so many bytes beyond twice what the file stores; more would lie over one another, or in
#: holes of the file.
_SLACK = 64 << 20


def claim(counts: Refcounts, file: Child, header: Header, l1: L1Table) -> None:
    """Claim the clusters of all structures of the image in `file`, whose active L1 table is `l1`."""
    bits = header.cluster_bits
    first = l1.offset >> bits
    own = range(first, first + -(-len(l1) * 8 >> bits))
    place = header.encryption_header  # inside the file and bounded, else the image was not opened
    encryption = range(0) if place is None else range(place[0] >> bits, -(-sum(place) >> bits))
    kept, kept_l2 = _snapshots(file, header)
    # Several entries without COPIED may point to one table, which is copied before a change.
    counts.claim(
        chain([own, encryption], kept, _bitmaps(file, header), l1.l2_clusters(bits, copied=True)),
        chain(kept_l2, l1.l2_clusters(bits, copied=False)),
    )


def l2_clusters(file: Child, header: Header, l1: L1Table) -> Iterator[list[int]]:
    """The clusters of all L2 tables in batches, as often as entries of the active L1 table and of those of snapshots point to
    them."""
    for copied in (True, False):
        yield from l1.l2_clusters(header.cluster_bits, copied=copied)
    yield from _snapshots(file, header)[1]


def _snapshots(file: Child, header: Header) -> tuple[list[range], Iterator[list[int]]]:
    """The clusters of the snapshot table and of the L1 tables of snapshots; and the clusters of their L2 tables, in
    batches."""
    bits = header.cluster_bits
    if not header.nb_snapshots:
        return [], iter(())
    from . import snapshot_table

    entries = snapshot_table.read(file, header)
    places = [(header.snapshots_offset, sum(len(entry.to_bytes()) for entry in entries))]
    for entry in entries:
        snapshot_table.require_usable(entry, file, header)
        places.append((entry.l1_table_offset, entry.l1_size * 8))
    most = 2 * (file.node.allocated or file.size) + _SLACK
    if sum(length for _, length in places) > most:
        raise LimitExceeded(
            f"the L1 tables of the snapshots have more than {most} bytes, and cannot all lie in this file",
            path=file.node.filename,
            hint="the image can only be read; delete snapshots with another program",
        )
    clusters = [range(start >> bits, -(-(start + length) >> bits)) for start, length in places]
    return clusters, _snapshot_l2(file, bits, entries)


def _snapshot_l2(file: Child, bits: int, entries: list[Entry]) -> Iterator[list[int]]:
    for entry in entries:
        l1 = L1Table.load(file, entry.l1_table_offset, entry.l1_size)
        for copied in (True, False):  # the flag is only accurate in the active table
            yield from l1.l2_clusters(bits, copied=copied)


def _bitmaps(file: Child, header: Header) -> list[range]:
    """The clusters of the bitmap directory, of the bitmap tables, and of bits."""
    bits = header.cluster_bits
    if not header.has_bitmaps:
        return []
    from . import bitmap_directory

    where = bitmap_directory.extension(header)
    if where is None:
        return []
    places = [where[1:]]
    for entry in bitmap_directory.read(file, header):
        places.append((entry.table_offset, 8 * entry.table_size))
        table = bitmap_directory.read_table(file, header, entry)
        places += [(value, header.cluster_size) for value in table if value > 1]
    return [range(start >> bits, -(-(start + length) >> bits)) for start, length in places]
