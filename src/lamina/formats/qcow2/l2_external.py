"""L2 entries of images with an external data file: the offset of a cluster there is its offset on the disk.

After "External data file bit" and "Standard Cluster Descriptor" of the published specification. Offset 0 is a valid offset in
the data file: an entry with the offset 0 and the flag COPIED has storage there. Everywhere else an offset of 0 means that
there is no storage. So in memory these entries have an offset that is one cluster higher, and only this module knows: tables
get it when they are loaded (`adopt`), and lose it when they are written (`to_disk`). Neither the mapping nor the changes need
to tell the two kinds of images apart.

Entries that point anywhere else, and compressed clusters, are invalid. They get the flag COMPRESSED in memory, which no valid
entry has here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import layout as q
from .l2_entry import InvalidEntry, L2Layout
from .l2_extended import ExtendedL2Layout

if TYPE_CHECKING:
    from ...format_node import Mapping
    from ...request import Child

_WRONG = "an L2 entry points to another place than that of its cluster in the data file, or to compressed data"


class _External(L2Layout):
    __slots__ = ()

    external = True

    def adopt(self, words: Any, cluster: int, *, strict: bool) -> None:
        from ...numeric import np

        entries = words[:: 1 << self.entry_bits - 3]
        place = np.arange(cluster, cluster + len(entries), dtype=np.uint64) << np.uint64(self.cluster_bits)
        offset = entries & np.uint64(q.OFFSET_MASK)
        stored = (offset != 0) | (entries & np.uint64(q.COPIED) != 0)
        wrong = stored & (offset != place) | (entries & np.uint64(q.COMPRESSED) != 0)
        if wrong.any():
            if strict:
                raise InvalidEntry(_WRONG)
            entries[wrong] = q.COMPRESSED
            stored &= ~wrong
        entries[stored] |= np.uint64(q.COPIED)
        entries[stored] += np.uint64(self.cluster_size)

    def to_disk(self, entries: Any) -> bytes:
        from ...numeric import np

        words = self.column(entries).copy()
        changed = words[:: 1 << self.entry_bits - 3]
        stored = changed & np.uint64(q.OFFSET_MASK) != 0
        changed[stored] -= np.uint64(self.cluster_size)
        return bytes(words.astype(">u8").tobytes())

    def map_one(self, entry: int, within: int, length: int, file: Child) -> Mapping | None:
        found = super().map_one(entry, within, length, file)
        if found is None or found.offset < 0:
            return found
        return found._replace(offset=found.offset - self.cluster_size)

    def run(self, entries: Any, unit: int, stop: int) -> tuple[int, int, int, int]:
        flags, host, units, entry = super().run(entries, unit, stop)
        if entry & q.COMPRESSED:
            raise InvalidEntry(_WRONG)
        return flags, host - self.cluster_size if host >= 0 else -1, units, entry

    def runs(self, words: Any, first: int, stop: int) -> tuple[Any, Any, Any]:
        from ...numeric import np
        from ...status import COMPRESSED

        heads, flags, hosts = super().runs(words, first, stop)
        if (flags & np.uint8(COMPRESSED)).any():
            raise InvalidEntry(_WRONG)
        return heads, flags, np.where(hosts >= 0, hosts - self.cluster_size, -1)


class ExternalL2Layout(_External):
    """The layout of standard entries."""

    __slots__ = ()


class ExternalExtendedL2Layout(_External, ExtendedL2Layout):
    """The layout of extended entries."""

    __slots__ = ()
