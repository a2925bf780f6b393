"""Checking a qcow2 image: every reference is counted anew and held against the counts that the image stores.

`references` walks the tables; here its result is compared, in windows of clusters so that memory stays bounded: the
stored reference counts, the COPIED flags, and clusters that are used in two ways at once. Neither part uses code or
caches of the driver. After "Host cluster management" of the published specification "Qcow2 Image File Format".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from ...errors import UnsupportedFeature
from ...limits import align_down
from ...numeric import NDArray, np
from ...report import ERROR, LEAK, MAX_FINDINGS, NOTE, UNREADABLE, CheckReport
from . import layout as q
from .references import NAMES, REFCOUNT_BLOCK, Clusters, Mask, References, Use, joined, ranges

if TYPE_CHECKING:
    from ...request import Child
    from .header import Header

_SECTOR: Final = 512
#: Clusters that are held against their counts at a time.
_WINDOW: Final = 1 << 20
#: References to clusters without a stored count that are looked at in one go.
_SPARSE: Final = 1 << 18
#: Entries of the refcount table that name a block which another entry names, too: so many are looked at all the same.
_MAX_AGAIN: Final = 64


def check(storage: Child, header: Header) -> CheckReport:
    """Hold the structures of the image in `storage` against one another, changing nothing.

    `header` is the checked header of that image. Findings are returned, never raised, however broken the tables are; a
    part that cannot be read is reported as UNREADABLE and the rest is checked all the same. UnsupportedFeature is
    raised if the image uses a feature whose references this cannot count, since every verdict would be wrong. Nothing
    else may write to the image meanwhile. Memory is in proportion to the tables that are stored; offsets beyond the
    file cost nothing.
    """
    unknown = []
    if header.incompatible_features & q.EXTENDED_L2:
        unknown.append("extended L2 entries")
    if header.incompatible_features & q.DATA_FILE:
        unknown.append("an external data file")
    if header.extension(q.EXT_BITMAPS) is not None:
        unknown.append("persistent bitmaps")
    if q.INCOMPATIBLE.unknown(header.incompatible_features):
        unknown.append("unknown incompatible features")
    if unknown:
        raise UnsupportedFeature(
            f"an image with {' and '.join(unknown)} cannot be checked", path=storage.node.filename, operation="check"
        )
    references = References(storage, header)
    if header.size % _SECTOR:
        text = f"the disk has {header.size} bytes, which are no whole sectors: QEMU shows {align_down(header.size, _SECTOR)}"
        references.report.add(NOTE, text)
    references.walk()
    comparison = _Comparison(references)
    comparison.compare()
    comparison.copied_outside()
    return references.report


class _Comparison:
    def __init__(self, found: References) -> None:
        self.found = found
        self.report = found.report
        self.order = found.header.refcount_order
        self.bits = found.bits
        self.clusters = found.clusters
        self.refcount_table = found.refcount_table
        self.incomplete = found.incomplete
        #: Clusters that one refcount block describes.
        self.block_entries = found.cluster * 8 >> self.order

    def block_part(self, index: int, start: int, length: int) -> bytearray | None:
        """`length` bytes of refcount block `index` from byte `start`. Zeros if it is not there; None if it cannot be
        read."""
        offset = int(self.refcount_table[index]) if index < len(self.refcount_table) else 0
        if not offset:
            return bytearray(length)
        if offset % self.found.cluster or offset >> 63:
            return None
        data, failed = self.found.read(offset + start, length, "refcount block")
        return None if failed else data

    def stored(self, lo: int, hi: int) -> tuple[NDArray[Any], Mask | None]:
        """The counts that are stored for clusters [lo, hi), and which of them are unknown (None: all are known). `lo`
        is a multiple of a window."""
        order = self.order
        span = min(self.block_entries, _WINDOW)
        raw = bytearray()
        unknown: Mask | None = None
        for at in range(lo, hi, span):
            index, start = divmod(at, self.block_entries)
            part = self.block_part(index, start << order >> 3, span << order >> 3)
            if part is None:
                unknown = np.zeros(hi - lo, np.bool_) if unknown is None else unknown
                unknown[at - lo : at - lo + span] = True
                part = bytearray(span << order >> 3)
                lost = min(at + span, self.clusters, hi) - at
                if lost > 0:
                    text = f"the reference counts of clusters {at} to {at + lost - 1} are unknown: no refcount block"
                    self.report.add(UNREADABLE, text, count=lost)
            raw += part
        return _decode(raw, order)[: hi - lo], unknown

    def windows(self) -> list[tuple[int, int]]:
        """Ranges of clusters, ascending, whose counts are stored: those of the refcount blocks that are not holes, and
        neighbours of them up to a window's length together."""
        end = self.clusters + 1
        found: list[tuple[int, int]] = []
        table, seen, again = self.refcount_table, set[int](), 0
        for index in np.flatnonzero(table[: -(-end // self.block_entries)]).tolist():
            offset, first = int(table[index]), index * self.block_entries
            if offset % self.found.cluster or offset >= self.found.size:
                continue  # not read: see `compare_sparse`
            again += offset in seen
            if again > _MAX_AGAIN:
                text = "refcount blocks are named so often that the counts of the rest are not examined"
                self.report.add(UNREADABLE, text, offset)
                self.incomplete = True
                break
            if offset not in seen and self.found.storage.reads_zero(offset, self.found.cluster):
                continue
            seen.add(offset)
            for lo in range(first, min(first + self.block_entries, end), _WINDOW):
                hi = min(lo + _WINDOW, first + self.block_entries, end)
                if found and found[-1][1] == lo and hi - found[-1][0] <= _WINDOW:
                    found[-1] = found[-1][0], hi
                else:
                    found.append((lo, hi))
        return found

    def compare(self) -> None:
        """Hold the references that were found against the counts that are stored, window by window."""
        uses = self.found.uses
        lists = {use: joined(uses.pop(use)) for use in list(uses)}
        if self.clusters < _WINDOW:
            highest = self.compare_window(0, self.clusters + 1, {use: one for use, one in lists.items() if len(one)})
            self.report.image_end_offset = (highest + 1) << self.bits
            return
        highest = 0
        windows = np.array(self.windows(), np.int64).reshape(-1, 2)
        for clusters in lists.values():
            clusters.sort()
        for lo, hi in windows.tolist():
            inside = {}
            for use, clusters in lists.items():
                part = clusters[slice(*np.searchsorted(clusters, (lo, hi)))] - lo
                if len(part):
                    inside[use] = part
            highest = max(highest, self.compare_window(lo, hi, inside))
        for lo, hi in ranges(lists.values(), _SPARSE):
            rest: dict[Use, Clusters] = {}
            for use, clusters in lists.items():
                part = clusters[slice(*np.searchsorted(clusters, (lo, hi)))]
                which = np.searchsorted(windows[:, 0], part, "right") - 1
                outside = (which < 0) | (part >= np.append(windows[:, 1], 0)[which])
                if outside.any():
                    rest[use] = part[outside]
            if rest:
                highest = max(highest, self.compare_sparse(rest))
        self.report.image_end_offset = (highest + 1) << self.bits

    def compare_sparse(self, lists: dict[Use, Clusters]) -> int:
        """Clusters that are referred to, and for which no count is stored: it is 0, or not known where the place of their
        refcount block cannot be. Returns the highest one. The cost depends on the references, not on the file's size."""
        clusters = np.unique(np.concatenate(list(lists.values())))
        index = clusters // self.block_entries
        blocks = np.zeros(len(clusters), np.uint64)
        listed = index < len(self.refcount_table)
        blocks[listed] = self.refcount_table[index[listed]]
        unknown = (blocks % np.uint64(self.found.cluster) != 0) | (blocks >> np.uint64(63) != 0)
        if unknown.any():
            first, last = int(clusters[unknown][0]), int(clusters[unknown][-1])
            text = f"the reference counts of clusters between {first} and {last} are unknown: no refcount block"
            self.report.add(UNREADABLE, text, count=int(unknown.sum()))
        references = np.zeros(len(clusters), np.int64)
        for use, found in lists.items():
            places = np.searchsorted(clusters, found)
            references += np.bincount(places, minlength=len(clusters)) * use.weight
            if use.looks and use.copied:  # a count of 1, say these entries
                self.copied(use, found[~unknown[places]])
        wrong = np.flatnonzero(~unknown)
        if len(wrong):
            at, counts = clusters[wrong], np.zeros(len(wrong), np.int64)
            self.runs(ERROR, at, counts, references[wrong], 0, compact=True)
        return int(clusters[-1])

    def compare_window(self, lo: int, hi: int, lists: dict[Use, Clusters]) -> int:
        """Clusters [lo, hi). `lists` holds indices from `lo`. Returns the highest cluster that is in use."""
        counts, unknown = self.stored(lo, hi)
        references = np.zeros(hi - lo, np.int64)
        kinds = np.zeros(hi - lo, np.uint16)
        settled = np.zeros(hi - lo, np.bool_)  # what some finding tells already
        maximum = (1 << (1 << self.order)) - 1
        for use, clusters in lists.items():
            kinds[clusters] |= use.kind
            if use.kind != REFCOUNT_BLOCK:
                _count(references, clusters, use.weight)
            if use.looks:
                wrong = (counts[clusters] == 1) != use.copied
                if unknown is not None:
                    wrong &= ~unknown[clusters]
                self.copied(use, clusters[wrong] + lo)
        blocks = lists.get(Use(REFCOUNT_BLOCK))
        if blocks is not None:
            named = np.bincount(blocks, minlength=hi - lo)
            # Each name of a block is one too many that comes to a cluster which is in use already. A count of one bit
            # cannot tell: there the reference does not fit, which is found below.
            twice = np.flatnonzero((named > 1) | ((named > 0) & (references > 0))) if maximum > 1 else named[:0]
            for at in twice.tolist():
                times = int(named[at]) - (0 if references[at] else 1)
                text = f"the refcount block at cluster {at + lo} is not the only use of it"
                self.report.add(ERROR, text, (at + lo) << self.bits, times)
            settled[twice] = True
            references += named
        if self.order < 6:
            for at in np.flatnonzero(references > maximum).tolist():
                text = f"cluster {at + lo} has {references[at]} references, and its count ends at {maximum}"
                self.report.add(ERROR, text, (at + lo) << self.bits, int(references[at]) - maximum)
                settled[at] = True
            np.minimum(references, maximum, out=references)
        if hi > self.clusters and not references[-1]:
            counts[-1] = 0  # not a cluster of the file, and nobody refers to it
        elif hi > self.clusters and unknown is not None and unknown[-1]:
            text = f"the reference count of cluster {self.clusters}, behind the last, is unknown: no refcount block"
            self.report.add(UNREADABLE, text)
        wanted = references.astype(counts.dtype)
        used = np.flatnonzero((counts != 0) | (references != 0))
        if unknown is not None:
            counts[unknown] = wanted[unknown]
        self.runs(ERROR, np.flatnonzero(counts < wanted), counts, references, lo)
        surplus = np.flatnonzero(counts > wanted)
        if self.incomplete and len(surplus):
            # Whoever frees leaks must not be told of these: what could not be read may refer to them.
            text = f"{len(surplus)} clusters may have leaked, or be used by what could not be read"
            self.report.add(UNREADABLE, text, (int(surplus[0]) + lo) << self.bits)
        else:
            self.runs(LEAK, surplus, counts, references, lo)
        settled |= counts < wanted
        self.overlaps(np.flatnonzero((kinds & (kinds - np.uint16(1)) != 0) & ~settled), kinds, lo)
        return int(used[-1]) + lo if len(used) else 0

    def runs(
        self,
        kind: str,
        clusters: Clusters,
        counts: NDArray[Any],
        references: Clusters,
        lo: int,
        *,
        compact: bool = False,
    ) -> None:
        """Clusters whose counts are wrong; neighbours that are wrong in the same way make one finding. `compact`: the
        other columns have one row for each of them."""
        if not len(clusters):
            return
        have, found = (counts, references) if compact else (counts[clusters], references[clusters])
        edges = (np.diff(clusters) != 1) | (have[1:] != have[:-1]) | (found[1:] != found[:-1])
        starts = np.concatenate([[0], np.flatnonzero(edges) + 1])
        room = max(MAX_FINDINGS - len(self.report.findings), 0)
        ends = np.append(starts[1:], len(clusters))
        for start, end in zip(starts[:room].tolist(), ends[:room].tolist(), strict=True):
            at = int(clusters[start]) + lo
            what = f"cluster {at}" if end - start == 1 else f"clusters {at} to {at + end - start - 1}"
            text = f"{what}: the count is {have[start]}, the references are {found[start]}"
            self.report.add(kind, text, at << self.bits, end - start)
        if len(starts) > room:
            rest = len(clusters) - int(starts[room])
            self.report.add(kind, f"{rest} more clusters with wrong counts", None, rest)

    def overlaps(self, clusters: Clusters, kinds: NDArray[np.uint16], lo: int) -> None:
        """Clusters that are used in two ways at once, though the count agrees."""
        for at in clusters.tolist():
            names = " and ".join(name for kind, name in NAMES.items() if int(kinds[at]) & kind)
            self.report.add(ERROR, f"cluster {at + lo} is used as {names}", (at + lo) << self.bits)

    def copied(self, use: Use, clusters: Clusters) -> None:
        """The COPIED flag of entries that point to these clusters is not what the stored count asks for."""
        flag, other = ("set", "not 1") if use.copied else ("clear", "1")
        name = NAMES[use.kind]
        self.found.each(
            ERROR,
            lambda at: f"COPIED is {flag} where {name} in cluster {at} is pointed to, and its count is {other}",
            clusters,
            use.looks,
            shift=self.bits,
        )

    def copied_outside(self) -> None:
        """The COPIED flags of entries that point beyond the file: they too should agree with a stored count, 0 if
        none."""
        for use, parts in self.found.outside.items():
            if not use.looks:
                continue
            clusters = np.concatenate(parts)
            indices = clusters // self.block_entries
            single = np.zeros(len(clusters), np.bool_)
            known = np.ones(len(clusters), np.bool_)
            listed = np.flatnonzero(indices < len(self.refcount_table))
            blocks = self.refcount_table[indices[listed]]
            # By the place of the block: a table whose entries all name one block has it read once.
            order = listed[np.argsort(blocks, kind="stable")]
            places = self.refcount_table[indices[order]]
            for group in np.split(order, np.flatnonzero(places[1:] != places[:-1]) + 1):
                if not len(group):
                    continue
                raw = self.block_part(int(indices[group[0]]), 0, self.found.cluster)
                if raw is None:
                    known[group] = False
                else:
                    counts = _decode(raw, self.order)
                    single[group] = counts[clusters[group] % self.block_entries] == 1
            self.copied(use, clusters[known & (single != use.copied)])


def _count(references: Clusters, clusters: Clusters, weight: int) -> None:
    """Add `weight` for every occurrence of a cluster."""
    if len(clusters) * 8 > len(references):
        references += np.bincount(clusters, minlength=len(references)) * weight
    else:
        np.add.at(references, clusters, weight)


def _decode(raw: bytes | bytearray, order: int) -> NDArray[Any]:
    """The reference counts of `1 << order` bits in the bytes of refcount blocks; below a byte, the lowest bits come
    first."""
    if order >= 3:
        width = 1 << order - 3
        return np.frombuffer(raw, f">u{width}").astype(f"u{width}")
    shifts = np.arange(0, 8, 1 << order, dtype=np.uint8)
    spread = np.frombuffer(raw, np.uint8)[:, None] >> shifts
    return (spread & np.uint8((1 << (1 << order)) - 1)).reshape(-1)
