"""The check of a qcow2 image: all references are counted, and compared with the refcounts in the image.

`references` collects the references from the tables. This module compares them, in windows of clusters so that memory is
bounded, with the stored refcounts and the flags COPIED, and looks for clusters with two uses that exclude each other. Both
are independent of the caches of the driver. After "Host cluster management" of the published specification "Qcow2 Image File
Format".
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
    from ...check_result import FindingKind
    from ...request import Child
    from .header import Header

_SECTOR: Final = 512
#: Clusters in one window.
_WINDOW: Final = 1 << 20
#: References to clusters without a stored refcount in one batch.
_SPARSE: Final = 1 << 18
#: The number of refcount blocks that are read although an earlier entry of the refcount table points to the same block.
_MAX_AGAIN: Final = 64


def check(storage: Child, header: Header) -> CheckReport:
    """Check the image in `storage`, which has the checked header `header`, for inconsistencies. The image is not changed.

    Errors in the image are returned as findings, never raised. A part that cannot be read is reported as UNREADABLE, and the
    rest is checked. UnsupportedFeature is raised if the image uses a feature whose references are not counted, since the
    result would be wrong. No other thread or process may write to the image meanwhile. The memory is proportional to the
    stored tables; offsets past the end of the file take none.
    """
    if q.INCOMPATIBLE.unknown(header.incompatible_features):
        raise UnsupportedFeature(
            "an image with unknown incompatible features cannot be checked",
            path=storage.node.filename,
            operation="check",
        )
    references = References(storage, header)
    if header.size % _SECTOR:
        shown = align_down(header.size, _SECTOR)
        text = f"the disk has {header.size} bytes, not a multiple of the sector size: QEMU shows {shown}"
        references.report.add(NOTE, text)
    references.walk()
    comparison = Comparison(references)
    comparison.compare()
    comparison.copied_outside()
    return references.report


class Comparison:
    """The stored refcounts, and the references of `found`, whose `walk` is done."""

    def __init__(self, found: References) -> None:
        self.found = found
        self.report = found.report
        self.order = found.header.refcount_order
        self.bits = found.bits
        self.clusters = found.clusters
        self.refcount_table = found.refcount_table
        self.incomplete = found.incomplete
        #: The number of counts in a refcount block.
        self.block_entries = found.cluster * 8 >> self.order

    def block_part(self, index: int, start: int, length: int) -> bytearray | None:
        """`length` bytes of refcount block `index` from byte `start` on. Zeros if there is no block; None if it cannot be
        read."""
        offset = int(self.refcount_table[index]) if index < len(self.refcount_table) else 0
        if not offset:
            return bytearray(length)
        if offset % self.found.cluster or offset >> 63:
            return None
        data, failed = self.found.read(offset + start, length, "refcount block")
        return None if failed else data

    def stored(self, lo: int, hi: int) -> tuple[NDArray[Any], Mask | None]:
        """The stored refcounts of clusters [lo, hi), and which of them are unknown (None: all are known). `lo` is a multiple
        of the window size."""
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
                    text = (
                        f"refcounts of clusters {at} to {at + lost - 1} are unknown: the refcount block cannot be read"
                    )
                    self.report.add(UNREADABLE, text, count=lost)
            raw += part
        return _decode(raw, order)[: hi - lo], unknown

    def windows(self) -> list[tuple[int, int]]:
        """Ascending ranges of clusters with stored refcounts: those of refcount blocks outside of holes. Adjacent ranges are
        joined up to the size of a window."""
        end = self.clusters + 1
        found: list[tuple[int, int]] = []
        table, seen, again = self.refcount_table, set[int](), 0
        for index in np.flatnonzero(table[: -(-end // self.block_entries)]).tolist():
            offset, first = int(table[index]), index * self.block_entries
            if offset % self.found.cluster or offset >= self.found.size:
                continue  # not read: see `compare_sparse`
            again += offset in seen
            if again > _MAX_AGAIN:
                text = "so many entries point to the same refcount blocks that the rest is not checked"
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
        """Compare the references with the stored refcounts, window by window."""
        uses = self.found.uses
        lists = {use: joined(uses.pop(use)) for use in list(uses)}
        if self.clusters < _WINDOW:
            highest = self.compare_window(0, self.clusters + 1, {use: one for use, one in lists.items() if len(one)})
            self.report.image_end_offset = (highest + 1) << self.bits
            return
        highest = 0
        windows = np.array(self.windows(), np.int64).reshape(-1, 2)
        for clusters in lists.values():
            if (clusters[1:] < clusters[:-1]).any():  # most are in order: a look takes a tenth of the time
                clusters.sort()
        for lo, hi in windows.tolist():
            inside = {}
            for use, clusters in lists.items():
                part = _between(clusters, lo, hi) - lo
                if len(part):
                    inside[use] = part
            highest = max(highest, self.compare_window(lo, hi, inside))
        for lo, hi in ranges(lists.values(), _SPARSE):
            rest: dict[Use, Clusters] = {}
            for use, clusters in lists.items():
                part = _between(clusters, lo, hi)
                which = np.searchsorted(windows[:, 0], part, "right") - 1
                outside = (which < 0) | (part >= np.append(windows[:, 1], 0)[which])
                if outside.any():
                    rest[use] = part[outside]
            if rest:
                highest = max(highest, self.compare_sparse(rest))
        self.report.image_end_offset = (highest + 1) << self.bits

    def compare_sparse(self, lists: dict[Use, Clusters]) -> int:
        """Compare clusters without a stored refcount: it is 0, or unknown if the offset of the refcount block is invalid.
        Returns the highest cluster. The cost depends on the number of references, not on the size of the file."""
        clusters = np.unique(np.concatenate(list(lists.values())))
        index = clusters // self.block_entries
        blocks = np.zeros(len(clusters), np.uint64)
        listed = index < len(self.refcount_table)
        blocks[listed] = self.refcount_table[index[listed]]
        unknown = (blocks % np.uint64(self.found.cluster) != 0) | (blocks >> np.uint64(63) != 0)
        if unknown.any():
            first, last = int(clusters[unknown][0]), int(clusters[unknown][-1])
            text = f"refcounts of clusters between {first} and {last} are unknown: a refcount block cannot be read"
            self.report.add(UNREADABLE, text, count=int(unknown.sum()))
        references = np.zeros(len(clusters), np.int64)
        for use, found in lists.items():
            index = np.searchsorted(clusters, found)
            references += np.bincount(index, minlength=len(clusters)) * use.weight
            if use.looks and use.copied:  # the flag means a count of 1
                self.copied(use, found[~unknown[index]])
        wrong = np.flatnonzero(~unknown)
        if len(wrong):
            at, counts = clusters[wrong], np.zeros(len(wrong), np.int64)
            self.runs(ERROR, at, counts, references[wrong], 0, compact=True)
        return int(clusters[-1])

    def compare_window(self, lo: int, hi: int, lists: dict[Use, Clusters]) -> int:
        """Compare clusters [lo, hi). `lists` contains indexes relative to `lo`. Returns the highest used cluster."""
        counts, unknown = self.stored(lo, hi)
        if unknown is None and (highest := _as_expected(counts, lists)) >= 0 and hi <= self.clusters:
            return highest + lo
        references = np.zeros(hi - lo, np.int64)
        kinds = np.zeros(hi - lo, np.uint16)
        settled = np.zeros(hi - lo, np.bool_)  # reported already
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
            # Every pointer to a block is an error if the cluster has another use. A refcount of one bit cannot count both,
            # which is reported below.
            twice = np.flatnonzero((named > 1) | ((named > 0) & (references > 0))) if maximum > 1 else named[:0]
            for at in twice.tolist():
                times = int(named[at]) - (0 if references[at] else 1)
                text = f"cluster {at + lo} is a refcount block and has other uses"
                self.report.add(ERROR, text, (at + lo) << self.bits, times)
            settled[twice] = True
            references += named
        if self.order < 6:
            for at in np.flatnonzero(references > maximum).tolist():
                text = f"cluster {at + lo} has {references[at]} references, but the maximum of a refcount is {maximum}"
                self.report.add(ERROR, text, (at + lo) << self.bits, int(references[at]) - maximum)
                settled[at] = True
            np.minimum(references, maximum, out=references)
        if hi > self.clusters and not references[-1]:
            counts[-1] = 0  # past the end of the file, without a reference
        elif hi > self.clusters and unknown is not None and unknown[-1]:
            text = f"the refcount of cluster {self.clusters}, past the end of the file, is unknown: no refcount block"
            self.report.add(UNREADABLE, text)
        wanted = references.astype(counts.dtype)
        used = np.flatnonzero((counts != 0) | (references != 0))
        if unknown is not None:
            counts[unknown] = wanted[unknown]
        self.runs(ERROR, np.flatnonzero(counts < wanted), counts, references, lo)
        surplus = np.flatnonzero(counts > wanted)
        if self.incomplete and len(surplus):
            # Not reported as leaks, which a repair frees: tables that could not be read may refer to them.
            text = f"{len(surplus)} clusters are leaked, or in use by tables that could not be read"
            self.report.add(UNREADABLE, text, (int(surplus[0]) + lo) << self.bits)
        else:
            self.runs(LEAK, surplus, counts, references, lo)
        settled |= counts < wanted
        self.overlaps(np.flatnonzero((kinds & (kinds - np.uint16(1)) != 0) & ~settled), kinds, lo)
        return int(used[-1]) + lo if len(used) else 0

    def runs(
        self,
        kind: FindingKind,
        clusters: Clusters,
        counts: NDArray[Any],
        references: Clusters,
        lo: int,
        *,
        compact: bool = False,
    ) -> None:
        """Report clusters with wrong refcounts; adjacent clusters with equal numbers make one finding. `compact`: the other
        columns have one row for each of these clusters."""
        if not len(clusters):
            return
        have, found = (counts, references) if compact else (counts[clusters], references[clusters])
        edges = (np.diff(clusters) != 1) | (have[1:] != have[:-1]) | (found[1:] != found[:-1])
        starts = np.concatenate([[0], np.flatnonzero(edges) + 1])
        most = max(MAX_FINDINGS - len(self.report.findings), 0)
        ends = np.append(starts[1:], len(clusters))
        for start, end in zip(starts[:most].tolist(), ends[:most].tolist(), strict=True):
            at = int(clusters[start]) + lo
            what = f"cluster {at}" if end - start == 1 else f"clusters {at} to {at + end - start - 1}"
            text = f"{what}: the refcount is {have[start]}, the number of references {found[start]}"
            self.report.add(kind, text, at << self.bits, end - start)
        if len(starts) > most:
            rest = len(clusters) - int(starts[most])
            self.report.add(kind, f"{rest} more clusters with wrong refcounts", None, rest)

    def overlaps(self, clusters: Clusters, kinds: NDArray[np.uint16], lo: int) -> None:
        """Report clusters with two uses that exclude each other, and a matching refcount."""
        for at in clusters.tolist():
            names = " and ".join(name for kind, name in NAMES.items() if int(kinds[at]) & kind)
            self.report.add(ERROR, f"cluster {at + lo} is used as {names}", (at + lo) << self.bits)

    def copied(self, use: Use, clusters: Clusters) -> None:
        """Report entries that point to these clusters with a flag COPIED that contradicts the stored refcount."""
        flag, other = ("set", "not 1") if use.copied else ("clear", "1")
        name = NAMES[use.kind]
        self.found.each(
            ERROR,
            lambda at: f"COPIED is {flag} in an entry for the {name} in cluster {at}, but its refcount is {other}",
            clusters,
            use.looks,
            shift=self.bits,
        )

    def copied_outside(self) -> None:
        """Compare the flags COPIED of entries that point past the end of the file with the stored refcounts, 0 if there is
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
            # Grouped by the offset of the block, so that each block is read once even if all entries point to it.
            order = listed[np.argsort(blocks, kind="stable")]
            blocks = self.refcount_table[indices[order]]
            for group in np.split(order, np.flatnonzero(blocks[1:] != blocks[:-1]) + 1):
                if not len(group):
                    continue
                raw = self.block_part(int(indices[group[0]]), 0, self.found.cluster)
                if raw is None:
                    known[group] = False
                else:
                    counts = _decode(raw, self.order)
                    single[group] = counts[clusters[group] % self.block_entries] == 1
            self.copied(use, clusters[known & (single != use.copied)])


def _between(clusters: Clusters, lo: int, hi: int) -> Clusters:
    """The elements from `lo` to `hi` of a sorted array. (Edges of another type would convert all of it.)"""
    begin, end = np.searchsorted(clusters, np.array((lo, hi), clusters.dtype))
    return clusters[begin:end]


def _as_expected(counts: NDArray[Any], lists: dict[Use, Clusters]) -> int:
    """The last cluster in use of a window without a finding, in which each cluster has at most one reference, with the flag
    COPIED if it can have it; -1 if the window may be another. It takes a fourth of the time of a comparison."""
    used = np.zeros(len(counts), np.bool_)
    for use, clusters in lists.items():
        if use.weight != 1 or (use.looks and not use.copied):
            return -1
        used[clusters] = True
    if np.count_nonzero(used) != sum(map(len, lists.values())) or not lists or not np.array_equal(counts, used):
        return -1
    return len(used) - 1 - int(used[::-1].argmax())


def _count(references: Clusters, clusters: Clusters, weight: int) -> None:
    """Add `weight` for every occurrence of a cluster."""
    if len(clusters) * 8 > len(references):
        references += np.bincount(clusters, minlength=len(references)) * weight
    else:
        np.add.at(references, clusters, weight)


def _decode(raw: bytes | bytearray, order: int) -> NDArray[Any]:
    """The refcounts of `1 << order` bits in these bytes of refcount blocks; counts of less than a byte begin with the lowest
    bits."""
    if order >= 3:
        width = 1 << order - 3
        return np.frombuffer(raw, f">u{width}").astype(f"u{width}")
    shifts = np.arange(0, 8, 1 << order, dtype=np.uint8)
    spread = np.frombuffer(raw, np.uint8)[:, None] >> shifts
    return (spread & np.uint8((1 << (1 << order)) - 1)).reshape(-1)
