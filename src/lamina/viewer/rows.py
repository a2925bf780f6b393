"""The rows of a picture: exact as long as they are few enough, and beyond that blocks with counts of what is in them.

Coarse rows are those of `Extents.align`, so a picture can be rounded further by the rules of the library; only blocks that
several extents touch are coarse, and each of them is a row.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final, NamedTuple

from ..extents import COMPRESSED, DATA, PRESENT, ZERO, Extents
from ..file_map import NUMBER, FileMap
from ..jobs.windows import windows
from ..numeric import NDArray, np
from ..palette import CONTENT, content

if TYPE_CHECKING:
    from ..image import Image
    from ..jobs.progress import Monitor

#: Rows that are held at most; before there are more, all become coarser.
MAX_ROWS: Final = 1 << 21
#: The index in `palette.CONTENT` of each combination of flags.
CLASS_OF_FLAGS: Final = np.array(
    [
        list(CONTENT).index(content(bool(f & DATA), bool(f & ZERO), bool(f & PRESENT), bool(f & COMPRESSED)))
        for f in range(2 * COMPRESSED)
    ],
    np.uint8,
)
#: A block of a coarse map of a file is shown as the last of these that it contains.
_WEAKEST_FIRST: Final = (
    "unknown", "free", "guest data", "guest data of snapshots", "compressed guest data", "shared guest data", "bitmaps",
    "refcount block", "L2 table", "refcount table", "L1 table", "L1 table of a snapshot", "snapshot table",
    "encryption header", "header", "leaked", "in conflict",
)  # fmt: skip
_RANKED: Final = np.array([NUMBER[name] for name in _WEAKEST_FIRST], np.uint8)
_RANK: Final = np.argsort(_RANKED)


class Rows(NamedTuple):
    """The status of a disk. `grain`: 1 if the extents are exact. Otherwise they are rounded to blocks of so many bytes;
    `begins` is then the number of exact extents that begin in each row, and `counts` has its bytes by class of content (a
    column each)."""

    extents: Extents
    grain: int = 1
    begins: NDArray[np.int64] | None = None
    counts: tuple[NDArray[np.int64], ...] = ()

    def by_class(self) -> tuple[NDArray[np.int64], ...]:
        """The bytes of each class of content in each row."""
        if self.counts:
            return self.counts
        classes = CLASS_OF_FLAGS[self.extents.flags]
        return tuple(np.where(classes == number, self.extents.length, 0) for number in range(len(CONTENT)))

    def totals(self) -> list[int]:
        """The bytes of each class of content; exact also for coarse rows."""
        return [int(column.sum()) for column in self.by_class()]

    def unit(self) -> int:
        """The largest power of two of which all boundaries are multiples."""
        return _unit(np.append(self.extents.start, self.extents.end))


def _unit(edges: NDArray[np.int64]) -> int:
    bits = int(np.bitwise_or.reduce(edges)) if len(edges) else 0
    return bits & -bits or 1


def rows_of(image: Image, monitor: Monitor, most: int = MAX_ROWS) -> tuple[Rows, dict[int, int]]:
    """The rows of all bytes of `image`, exact unless there are more than `most`; and by depth the bytes that each layer
    stores of the disk."""
    owned: dict[int, int] = {}
    done = Rows(Extents.empty(0))
    waiting: list[Extents] = []
    count = 0
    for piece in windows(image, 0, image.size):
        waiting.append(piece)
        count += len(piece)
        stored = piece.where(data=True, zero=False)
        for depth in np.unique(stored.depth).tolist():
            owned[depth] = owned.get(depth, 0) + int(stored.length[stored.depth == depth].sum())
        if count > most // 4:
            # The last extent may go on in the next window.
            exact = Extents.concat(waiting).coalesce()
            last = int(exact.start[-1])
            done = _append(done, exact.clip(exact.begin, last), most)
            waiting, count = [exact.clip(last, exact.end)], 1
        monitor.update(piece.end, image.size)
    return _append(done, Extents.concat(waiting).coalesce(), most) if waiting else done, owned


def _append(done: Rows, exact: Extents, most: int) -> Rows:
    """The rows and those of `exact`, which begins where they end, with an extent of its own."""
    if not len(exact):
        return done
    added = Rows(exact)
    if done.grain > 1:
        added = coarsened(added, done.grain)
        assert done.begins is not None
        assert added.begins is not None
        counts = tuple(np.concatenate(pair) for pair in zip(done.counts, added.counts, strict=True))
        begins = np.concatenate((done.begins, added.begins))
        joined = Rows(Extents.concat([done.extents, added.extents]), done.grain, begins, counts)
        done = coarsened(joined, done.grain)  # the block in which both meet
    else:
        done = Rows(Extents.concat([done.extents, added.extents]).coalesce())
    while len(done.extents) > most:
        done = coarsened(done, max(2 * done.grain, 2 * done.unit()))
    return done


def coarsened(rows: Rows, grain: int) -> Rows:
    """The rows rounded to blocks of `grain` bytes, a power of two. Blocks that lie in one row stay as they are."""
    fine, end = rows.extents, rows.extents.end
    if not len(fine):
        return rows
    inner = fine.start & grain - 1 != 0
    inner[0] = False
    base = np.unique(fine.start[inner] & -grain)
    top = np.minimum(base, end - grain) + grain
    base = np.maximum(base, fine.begin)
    # Blocks that were mixed before stay rows of their own, even if they equal their neighbours.
    start = np.unique(np.concatenate((fine.start[~inner], base, top[top < end])))
    stop = np.append(start[1:], end)
    extents = fine.align(grain).intersect(Extents.from_columns(start, stop - start, 0))
    # An edge inside a fine row cuts one whose bytes are all of one class.
    row = np.searchsorted(fine.start, start, "right") - 1
    into = start - fine.start[row]
    pure = CLASS_OF_FLAGS[fine.flags[row]]
    counts = []
    for number, column in enumerate(rows.by_class()):
        before = np.concatenate(([0], np.cumsum(column)))
        at = before[row] + np.where(pure == number, into, 0)
        counts.append(np.diff(np.append(at, before[-1])))
    begins = np.ones(len(fine), np.int64) if rows.begins is None else rows.begins
    before = np.concatenate(([0], np.cumsum(begins)))
    at = before[np.searchsorted(fine.start, np.append(start, end), "left")]
    return Rows(extents, grain, np.diff(at), tuple(counts))


class Ranges(NamedTuple):
    """Ranges of a disk, in order and not adjacent: those of a bitmap, or those that differ. `grain`: they are rounded
    outwards to blocks of so many bytes; 1: they are not. `total`: the bytes of the ranges before that."""

    start: NDArray[np.int64]
    length: NDArray[np.int64]
    total: int
    grain: int = 1

    def unit(self) -> int:
        return _unit(np.concatenate((self.start, self.start + self.length)))

    def coarser(self, grain: int) -> Ranges:
        """The ranges rounded to blocks of `grain` bytes, and joined."""
        lo = self.start & -grain
        hi = (self.start + self.length + grain - 1) & -grain
        if not len(lo):
            return self
        heads = np.flatnonzero(np.append(True, lo[1:] > hi[:-1]))
        tails = np.append(heads[1:], len(lo)) - 1
        return Ranges(lo[heads], hi[tails] - lo[heads], self.total, grain)


def ranges_of(found: Iterable[tuple[int, int]], most: int = MAX_ROWS) -> Ranges:
    """These ranges (start, length), rounded if there are more than `most`."""
    edges = array("q")
    done = Ranges(np.zeros(0, np.int64), np.zeros(0, np.int64), 0)
    for start, length in found:
        edges.append(start)
        edges.append(length)
        if len(edges) >= most:
            done = _added(done, edges, most)
            edges = array("q")
    return _added(done, edges, most)


def _added(done: Ranges, edges: array[int], most: int) -> Ranges:
    start, length = np.frombuffer(edges, np.int64).reshape(-1, 2).T if edges else (done.start[:0], done.length[:0])
    total = done.total + int(length.sum())
    done = Ranges(np.concatenate((done.start, start)), np.concatenate((done.length, length)), total, done.grain)
    if done.grain > 1:
        done = done.coarser(done.grain)
    while len(done.start) > most:
        done = done.coarser(max(2 * done.grain, 2 * done.unit()))
    return done


def coarser_file(found: FileMap, grain: int) -> FileMap:
    """The map with what lies in one block of `grain` bytes made one part: damage and leaks win over tables, and those over
    data; the number of references is then unknown."""
    block = found.start & -grain
    inner = np.flatnonzero(found.start & grain - 1) if len(found.start) else np.zeros(0, np.int64)
    if not len(inner):
        return found
    mixed = np.unique(block[inner])
    edges = np.unique(np.concatenate((found.start[found.start & grain - 1 == 0], mixed, mixed + grain)))
    edges = edges[edges < found.size]
    # Each new part begins inside an old one, and ends with the last old one that begins before its end.
    first = np.searchsorted(found.start, edges, "right") - 1
    last = np.searchsorted(found.start, np.append(edges[1:], found.size), "left") - 1
    bounds = np.column_stack((first, last + 1)).ravel()
    ranks = np.append(_RANK[found.kind], 0)  # one more, so that every bound is inside
    kind = _RANKED[np.maximum.reduceat(ranks, bounds)[::2]]
    references = np.where(first == last, found.references[first], -1)
    keep = np.append(True, (kind[1:] != kind[:-1]) | (references[1:] != references[:-1]))
    return found._replace(start=edges[keep], kind=kind[keep], references=references[keep])
