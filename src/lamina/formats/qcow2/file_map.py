"""The map of a qcow2 file: what each cluster is, from the references that the check collects and the stored counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from ...file_map import NUMBER, FileMap, Route
from ...limits import MAX_SIZE
from ...numeric import NDArray, np
from ...report import UNREADABLE
from . import l1_table
from .check import Comparison
from .mapping import layout_of
from .references import DATA, NAMES, Clusters, Entries, References, Use, joined

if TYPE_CHECKING:
    from ...request import Child
    from .header import Header

#: Clusters that are looked at together.
_WINDOW: Final = 1 << 20


def file_map(storage: Child, header: Header) -> FileMap:
    """The map of the file in `storage`, which has this usable header. Damage is a part of the map, never an error."""
    found = _References(storage, header)
    found.walk()
    pieces = list(_Clusters(found).pieces())
    if not pieces:
        pieces = [(np.zeros(1, np.int64), np.full(1, NUMBER["unknown"], np.uint8), np.zeros(1, np.int64))]
    start, kind, references = (np.concatenate(column) for column in zip(*pieces, strict=True))
    heads = np.flatnonzero(np.concatenate(([True], (kind[1:] != kind[:-1]) | (references[1:] != references[:-1]))))
    problems = tuple(dict.fromkeys(one.message for one in found.report.findings if one.kind == UNREADABLE))
    return FileMap(
        found.size,
        start[heads] << header.cluster_bits,
        kind[heads],
        references[heads],
        header.cluster_size,
        problems,
    )


def route(storage: Child, header: Header) -> Route:
    """How a reader finds a byte of the disk with this header: the one of now, or that of a snapshot."""
    found = References(storage, header)
    offsets = l1_table.offsets_of(found.entries(header.l1_table_offset, header.l1_size, "L1 table")).astype(np.int64)
    index = np.flatnonzero((offsets > 0) & (offsets < found.size))
    width = 1 << layout_of(header).entry_bits
    return Route(header.l1_table_offset, 1 << header.l1_covers_bits, header.cluster_size, width, index, offsets[index])


class _References(References):
    """Remembers also which clusters hold compressed data."""

    def __init__(self, storage: Child, header: Header) -> None:
        super().__init__(storage, header)
        self.packed: list[Clusters] = [np.zeros(0, self.index)]

    def compressed(self, entries: Entries, weight: int) -> None:
        of_data = self.uses[Use(DATA, weight)]
        before = len(of_data)
        super().compressed(entries, weight)
        self.packed += of_data[before:]


class _Clusters:
    """The kind of each cluster, window by window."""

    def __init__(self, found: _References) -> None:
        self._found = found
        self._counts = Comparison(found)
        self._packed = np.unique(np.concatenate(found.packed))
        found.packed.clear()
        lists = {use: joined(found.uses.pop(use)) for use in list(found.uses)}
        for clusters in lists.values():
            clusters.sort()
        self._lists = lists
        self._maximum = min((1 << (1 << self._counts.order)) - 1, MAX_SIZE)
        #: The kind by the set of uses of a cluster; several uses exclude one another.
        self._kinds = np.full(1 << len(NAMES), NUMBER["in conflict"], np.uint8)
        self._kinds[0] = NUMBER["free"]
        for bit, name in NAMES.items():
            self._kinds[bit] = NUMBER[name]

    def pieces(self) -> Any:
        """(first cluster, kind, references) of runs of clusters, in columns, in order."""
        end = self._found.clusters
        busy = {lo // _WINDOW for lo, _ in self._counts.windows()}
        for clusters in self._lists.values():
            busy.update(np.unique(clusters // _WINDOW).tolist())
        for number in range(-(-end // _WINDOW)):
            lo = number * _WINDOW
            if number in busy:
                yield self._window(lo, min(lo + _WINDOW, end))
            elif number - 1 in busy or not number:
                yield np.array([lo]), np.array([NUMBER["free"]], np.uint8), np.zeros(1, np.int64)

    def _window(self, lo: int, hi: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        counts, unknown = self._counts.stored(lo, hi)
        kinds, references = np.zeros(hi - lo, np.uint16), np.zeros(hi - lo, np.int64)
        active = np.zeros(hi - lo, np.bool_)
        for use, clusters in self._lists.items():
            part = _between(clusters, lo, hi)
            if not len(part):
                continue
            kinds[part] |= use.kind
            references += np.bincount(part, minlength=hi - lo) * use.weight
            if use.kind == DATA and use.looks:
                active[part] = True
        found = self._kinds[kinds]
        data = kinds == DATA
        found[data & ~active] = NUMBER["guest data of snapshots"]
        found[data & (references > 1)] = NUMBER["shared guest data"]
        packed = np.zeros(hi - lo, np.bool_)
        packed[_between(self._packed, lo, hi)] = True
        found[data & packed] = NUMBER["compressed guest data"]
        stored = counts.astype(np.uint64)
        lost = (kinds == 0) & (stored > 0)
        found[lost] = NUMBER["unknown" if self._found.incomplete else "leaked"]
        low = stored < np.minimum(references, self._maximum).astype(np.uint64)
        if unknown is not None:
            low &= ~unknown
            found[unknown & (kinds == 0)] = NUMBER["unknown"]
        found[low] = NUMBER["in conflict"]
        edges = (found[1:] != found[:-1]) | (references[1:] != references[:-1])
        heads = np.flatnonzero(np.concatenate(([True], edges)))
        return heads + lo, found[heads], references[heads]


def _between(clusters: Clusters, lo: int, hi: int) -> Any:
    """The elements from `lo` to `hi` of a sorted array, counted from `lo`."""
    first, last = np.searchsorted(clusters, np.array((lo, hi), clusters.dtype))
    return clusters[first:last].astype(np.int64) - lo
