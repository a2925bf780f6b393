"""What the bytes of a qcow2 file are, and where the bytes of its disk are: `lamina.explain` for this format.

`explain_uses` finds what lies in a cluster, and `explain_found` puts it into words. The status of guest data is decoded by
the layout of L2 entries that reads use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ...errors import FormatError, OptionError
from ...explanation import FREE, LEAKED, UNKNOWN, UNREFERENCED, Explainer, Explanation, Overview, Part, Step
from ...limits import MAX_SIZE
from . import explain_fields, l1_table, l2_entry, snapshot_table
from . import layout as q
from .explain_found import BitmapBits, Compressed, Data, Found, L2Table, RefcountBlock, Region
from .explain_uses import L1, Entry, Reader, Uses
from .header import Header
from .references import HEADER, NAMES

if TYPE_CHECKING:
    from ...file_map import FileMap, Route
    from ...request import Child


class Qcow2Explainer(Explainer):
    """The explanation of the image in `storage`. `values`: the options of `open`; a snapshot among them is the disk to which
    `guest` refers. Raises FormatError if the file is no qcow2 image at all; a broken header is one of the problems."""

    def __init__(self, storage: Child, values: Mapping[str, Any]) -> None:
        self._reader = Reader(storage)
        self._uses: Uses | None = None
        self._disk: Header | None = None
        #: The last cluster that was asked for, its refcount and what lies in it.
        self._cached: tuple[int, int | None, list[Found]] | None = None
        try:
            header = Header.read(storage)
        except FormatError as error:
            if not self._reader.read(0, len(q.MAGIC)).startswith(q.MAGIC):
                raise
            self._reader.tell(f"the header cannot be used: {error.message}")
            return
        self._reader = self._uses = Uses(storage, header)
        if unknown := header.unsupported():
            self._uses.tell(f"the image uses {', '.join(unknown)}: what is said may be wrong")
        self._disk = header
        id, name = values.get("snapshot-id"), values.get("snapshot-name")
        if id is not None or name is not None:
            entries = snapshot_table.read(storage, header)
            self._disk = header.at_snapshot(snapshot_table.find(entries, id, name, self._reader.path))

    @property
    def disk_size(self) -> int:
        return 0 if self._disk is None else self._disk.size

    def overview(self) -> Overview:
        uses = self._uses
        raw = self._reader.read(0, uses.cluster if uses else 1 << q.MIN_CLUSTER_BITS)
        places = explain_fields.of_header(raw, uses.header if uses else None)
        fields = tuple(place.part(NAMES[HEADER]) for place in places)
        regions = sorted(uses.regions, key=lambda use: use.start) if uses else []
        parts = (
            [Part(uses.name(use), use.start, use.stop - use.start, uses.owner(use)) for use in regions] if uses else []
        )
        return Overview(fields, tuple(parts), self._reader.problems)

    def at(self, offset: int) -> Explanation:
        if not 0 <= offset < self._reader.size:
            raise OptionError(f"the file ends at {self._reader.size}, before {offset}", path=self._reader.path)
        uses = self._uses
        if uses is None:
            return Explanation(offset, (self._without_header(offset),), problems=self._reader.problems)
        cluster = offset >> uses.bits
        if self._cached is None or self._cached[0] != cluster:
            self._cached = (cluster, uses.refcount(cluster), _in_cluster(uses, cluster))
        _, refcount, found = self._cached
        parts = [part for one in found if (part := one.part(offset)) is not None]
        parts = parts or [_between(uses, offset, found, refcount)]
        return Explanation(offset, tuple(parts), cluster, refcount, uses.problems)

    def guest(self, offset: int) -> Step:
        if self._uses is None or self._disk is None:
            raise FormatError(self._reader.problems[0], path=self._reader.path)
        from .explain_guest import find

        return find(self._uses, self._disk, offset)

    def file_map(self, size: int) -> FileMap:
        if self._uses is None:
            return super().file_map(size)
        from .file_map import file_map

        return file_map(self._uses.storage, self._uses.header)

    def route(self) -> Route | None:
        if self._uses is None or self._disk is None:
            return None
        from .file_map import route

        return route(self._uses.storage, self._disk)

    def _without_header(self, offset: int) -> Part:
        places = explain_fields.of_header(self._reader.read(0, 1 << q.MIN_CLUSTER_BITS), None)
        end = max((one.start + one.length for one in places), default=0)
        if offset < end:
            return explain_fields.find(places, offset, NAMES[HEADER], 0, end)
        return Part(UNKNOWN, end, self._reader.size - end, text="what it is cannot be said without the header")


def _in_cluster(uses: Uses, cluster: int) -> list[Found]:
    """What lies in this cluster of the file."""
    low, high = cluster << uses.bits, cluster + 1 << uses.bits
    found: list[Found] = [Region(uses, use) for use in uses.regions if use.start < high and use.stop > low]
    blocks: dict[int, list[int]] = {}
    for index, start in uses.refcount_blocks(low, high):
        blocks.setdefault(start, []).append(index)
    found += [RefcountBlock(uses, start, indexes) for start, indexes in blocks.items()]
    tables: dict[int, list[tuple[L1, int]]] = {}
    for l1, entry in uses.l1_entries(low, high):
        tables.setdefault(l1_table.decode(entry.entry).offset, []).append((l1, entry.number))
    found += [L2Table(uses, start, users) for start, users in tables.items()]
    found += _data(uses, low, high)
    found += [BitmapBits(uses, number, entry) for number, entry in uses.bitmap_entries(low, high)]
    return found


def _data(uses: Uses, low: int, high: int) -> list[Found]:
    """The guest data that lies in this range of the file."""
    # Compressed data has at most two clusters and a sector; where it ends depends on what begins in its last sector.
    entries = uses.l2_entries(low, high + 2 * uses.cluster + q.SECTOR)
    users = uses.l1_users({entry.table for entry in entries}) if entries else {}
    plain: dict[int, list[Entry]] = {}
    compressed: dict[int, list[Entry]] = {}
    ends: dict[int, int] = {}
    for entry in entries:
        decoded = l2_entry.decode(entry.entry, uses.bits)
        (compressed if decoded.compressed else plain).setdefault(decoded.offset, []).append(entry)
        ends[decoded.offset] = max(ends.get(decoded.offset, 0), decoded.offset + decoded.length)
    found: list[Found] = [Data(uses, start, some, users) for start, some in plain.items() if start < high]
    # Only the sectors are known: the data of one ends where the next begins, in the same sector.
    for start, following in pairwise([*sorted(compressed), MAX_SIZE]):
        if start < high:
            found.append(Compressed(uses, start, min(ends[start], following), compressed[start], users))
    return found


def _between(uses: Uses, offset: int, found: Sequence[Found], refcount: int | None) -> Part:
    """The bytes of a cluster around this one that nothing of what lies in it covers."""
    cluster = offset >> uses.bits
    low = max([cluster << uses.bits, *(one.stop for one in found if one.stop <= offset)])
    high = min([cluster + 1 << uses.bits, uses.size, *(one.start for one in found if one.start > offset)])
    if found:
        names = ", ".join(sorted({one.name for one in found}))
        return Part(UNREFERENCED, low, high - low, text=f"nothing refers to it, in a cluster with: {names}")
    structure = UNKNOWN if refcount is None else LEAKED if refcount else FREE
    count = "cannot be read" if refcount is None else f"is {refcount}"
    return Part(structure, low, high - low, text=f"nothing refers to the cluster, and its refcount {count}")
