"""The file of a new qcow2 image as a node that computes it: no table is stored, and the data is that of a disk.

The file has no gaps: the header, the refcount table, the refcount blocks, the L1 table, the L2 tables of the parts of the
disk that have data, and the clusters with data, in the order of the disk. Every cluster has one reference. The places of all
of them follow from the extents of the disk, which are queried once, when the node is made. So the file can be read from the
first byte to the last, and written to a pipe (`jobs.convert_streams`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ...edge import consecutive
from ...errors import LimitExceeded, UnsupportedFeature
from ...limits import Limits
from ...node import TransformNode, fill_zero
from ...numeric import np
from . import layout as q
from .create import header_of
from .l2_entry import with_copied
from .measure import refcount_clusters

if TYPE_CHECKING:
    from ...extents import Extents
    from ...numeric import NDArray
    from ...pending import Pending
    from ...request import Child

#: The most runs of clusters with data; they take 24 bytes each.
_MOST_RUNS = 4 << 20
#: Table entries that are computed at once.
_MANY = 1 << 16
_REFUSED = {
    "backing_file": "a backing file",
    "encrypt": "encryption",
    "data_file": "an external data file",
    "preallocation": "preallocated clusters",
}


class _Runs:
    """A set of numbers in ascending runs. The rank of a number in the set is how many smaller ones there are."""

    def __init__(self, first: NDArray[np.int64], count: NDArray[np.int64]) -> None:
        self.first, self.count = first, count
        self.before = np.concatenate((np.zeros(1, np.int64), np.cumsum(count)))  # the rank of each first number
        self.total = int(self.before[-1])

    def ranks(self, begin: int, end: int) -> NDArray[np.int64]:
        """The rank of each number from `begin` to `end`; -1 for those that are not in the set."""
        numbers = np.arange(begin, end, dtype=np.int64)
        found = np.full(end - begin, -1, np.int64)
        if len(self.first):
            run = np.searchsorted(self.first, numbers, "right") - 1
            inside = (run >= 0) & (numbers - self.first[run] < self.count[run])
            run = run[inside]
            found[inside] = self.before[run] + numbers[inside] - self.first[run]
        return found

    def from_rank(self, rank: int) -> tuple[int, int]:
        """The number with this rank, and how many numbers of its run begin with it."""
        run = int(np.searchsorted(self.before, rank, "right")) - 1
        done = rank - int(self.before[run])
        return int(self.first[run]) + done, int(self.count[run]) - done

    def divided(self, size: int) -> _Runs:
        """The numbers of the groups of `size` numbers that have at least one number in the set."""
        first, last = self.first // size, (self.first + self.count - 1) // size
        if not len(first):
            return self
        # Two runs may share a group: then it belongs to the first of them.
        first = np.maximum(first, np.concatenate(([-1], last[:-1])) + 1)
        kept = last >= first
        return _Runs(first[kept], (last - first + 1)[kept])


class _Region(NamedTuple):
    """The part of the file from `begin` to `end`. fill(offset, view) makes the bytes of `view`; the offset is relative to
    `begin`."""

    begin: int
    end: int
    fill: Callable[[int, memoryview], None]


class ComputedFile(TransformNode):
    """The file of an image with the disk `image` and the options `values`. Thread-safe; the size is fixed. Parts of the disk
    that have become data since the node was made read as zeros in the image. Raises UnsupportedFeature for options that need
    more than one pass, and LimitExceeded for disks of too many parts."""

    driver = "qcow2-file"

    def __init__(self, image: Child, values: Mapping[str, Any]) -> None:
        super().__init__(image, read_only=True)
        refused = [text for name, text in _REFUSED.items() if values.get(name) not in (None, "off")]
        if refused:
            raise UnsupportedFeature(
                f"a qcow2 image with {refused[0]} is not made in one pass",
                hint="write it to a file, without this option",
            )
        header = header_of(values, size := values["size"])
        self._cluster = cluster = header.cluster_size
        self._words = 2 if header.extended_l2 else 1  # of 64 bits in an L2 entry
        self._data = _stored(image, cluster)
        self._per_table = cluster // (8 * self._words)
        self._tables = self._data.divided(self._per_table)
        self._count_bits = header.refcount_bits
        l1 = header.l1_entries(size)
        counted = 1 + -(-l1 * 8 // cluster) + self._tables.total + self._data.total
        blocks, table = refcount_clusters(counted, cluster, self._count_bits)
        if table * cluster > max(q.MAX_REFTABLE_BYTES, cluster):
            raise LimitExceeded("the image would have too many clusters of this size", hint="use a larger cluster_size")
        self._clusters = counted + blocks + table
        header.set(
            {
                "size": size,
                "l1_size": l1,
                "refcount_table_offset": cluster,
                "refcount_table_clusters": table,
                "l1_table_offset": (1 + table + blocks) * cluster if l1 else 0,
            }
        )
        self._header = header.to_bytes()
        self._blocks = blocks
        self._regions: list[_Region] = []
        self._begin: dict[str, int] = {}
        end = 0
        for name, count, fill in (
            ("header", 1, self._fill_header),
            ("refcount table", table, self._fill_refcount_table),
            ("refcount blocks", blocks, self._fill_refcounts),
            ("l1", -(-l1 * 8 // cluster), self._fill_l1),
            ("l2", self._tables.total, self._fill_l2),
            ("data", self._data.total, self._fill_data),
        ):
            self._begin[name] = end
            self._regions.append(_Region(end, end + count * cluster, fill))
            end += count * cluster
        self._size = end

    @property
    def size(self) -> int:
        return self._size

    @property
    def limits(self) -> Limits:
        return Limits()

    def read_into(self, offset: int, view: memoryview) -> None:
        end = offset + len(view)
        for begin, stop, fill in self._regions:
            lo, hi = max(begin, offset), min(stop, end)
            if lo < hi:
                fill(lo - begin, view[lo - offset : hi - offset])

    def start_read(self, offset: int, view: memoryview) -> Pending:
        at = offset - self._begin["data"]
        if at >= 0:
            place, inside = self._place(at)
            if inside >= len(view) and place + len(view) <= self.image.size:
                return self.image.start_read(place, view)
        return super().start_read(offset, view)

    def extents(self, offset: int, length: int) -> Extents:
        from ...extents import Extents

        return Extents.single(offset, length, data=True, present=True)

    # -- the regions

    def _fill_header(self, offset: int, view: memoryview) -> None:
        part = self._header[offset : offset + len(view)]
        view[: len(part)] = part
        fill_zero(view[len(part) :])

    def _fill_refcount_table(self, offset: int, view: memoryview) -> None:
        def entries(begin: int, end: int) -> NDArray[np.int64]:
            numbers = np.arange(begin, end, dtype=np.int64)
            return np.where(numbers < self._blocks, self._begin["refcount blocks"] + numbers * self._cluster, 0)

        _fill_words(offset, view, entries)

    def _fill_refcounts(self, offset: int, view: memoryview) -> None:
        """The counts of all clusters are 1, and the rest of the last block is 0."""
        bits = self._count_bits
        one = (1).to_bytes(bits // 8, "big") if bits >= 8 else bytes([sum(1 << at for at in range(0, 8, bits))])
        skipped = offset % len(one)
        view[:] = (one * (len(view) // len(one) + 2))[skipped : skipped + len(view)]
        used, rest = divmod(self._clusters * bits, 8)
        if rest and offset <= used < offset + len(view):
            view[used - offset] = one[0] & (1 << rest) - 1
        end = max(used + bool(rest) - offset, 0)
        if end < len(view):
            fill_zero(view[end:])

    def _fill_l1(self, offset: int, view: memoryview) -> None:
        def entries(begin: int, end: int) -> NDArray[np.int64]:
            return self._pointers(self._tables.ranks(begin, end), "l2")

        _fill_words(offset, view, entries)

    def _fill_l2(self, offset: int, view: memoryview) -> None:
        size = 8 * self._words * self._per_table  # of a table: one cluster
        done = 0
        while done < len(view):
            # Tables of adjacent parts of the disk are computed together.
            rank, inside = divmod(offset + done, size)
            number, tables = self._tables.from_rank(rank)
            count = min(tables * size - inside, len(view) - done)
            first = number * self._per_table * self._words

            def words(begin: int, end: int, first: int = first) -> NDArray[np.int64]:
                return self._l2_words(first + begin, first + end)

            _fill_words(inside, view[done : done + count], words)
            done += count

    def _l2_words(self, begin: int, end: int) -> NDArray[np.int64]:
        """These words of the L2 entries of all clusters of the disk, one after the other."""
        if self._words == 1:
            return self._pointers(self._data.ranks(begin, end), "data")
        lo, hi = begin // 2, -(-end // 2)
        pointers = self._pointers(self._data.ranks(lo, hi), "data")
        # All subclusters of a cluster with data are allocated.
        pairs = np.stack((pointers, np.where(pointers != 0, 0xFFFF_FFFF, 0)), axis=1).reshape(-1)
        return pairs[begin - 2 * lo : end - 2 * lo]

    def _pointers(self, ranks: NDArray[np.int64], region: str) -> NDArray[np.int64]:
        """Table entries that point to the clusters with these ranks of a region; 0 for -1."""
        offsets = np.where(ranks < 0, 0, self._begin[region] + ranks * self._cluster).astype(np.uint64)
        return with_copied(offsets, ranks >= 0).view(np.int64)  # type: ignore[no-any-return]

    def _fill_data(self, offset: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            place, inside = self._place(offset + done)
            count = min(inside, len(view) - done)
            stored = max(min(count, self.image.size - place), 0)  # the disk may end inside its last cluster
            if stored:
                self.image.read_into(place, view[done : done + stored])
            fill_zero(view[done + stored : done + count])
            done += count

    def _place(self, at: int) -> tuple[int, int]:
        """Where on the disk the byte `at` of the region of data lies, and how many bytes from it on lie side by side."""
        rank, inside = divmod(at, self._cluster)
        number, count = self._data.from_rank(rank)
        return number * self._cluster + inside, count * self._cluster - inside


def _fill_words(offset: int, view: memoryview, words: Callable[[int, int], NDArray[np.int64]]) -> None:
    """Fill `view` with the bytes at `offset` of big-endian words of 64 bits; words(begin, end) computes some of them."""
    at, end = offset, offset + len(view)
    while at < end:
        first = at // 8
        last = min(first + _MANY, -(-end // 8))
        stop = min(last * 8, end)
        text = words(first, last).astype(">i8").tobytes()
        view[at - offset : stop - offset] = text[at - 8 * first : stop - 8 * first]
        at = stop


def _stored(disk: Child, cluster: int) -> _Runs:
    """The clusters of the disk that have data."""
    firsts: list[NDArray[np.int64]] = []
    counts: list[NDArray[np.int64]] = []
    runs = 0
    last = -1  # the last cluster so far
    for first, count in _clusters_with_data(disk, cluster):
        # A cluster of two parts of the disk, or adjacent ones, is in one run.
        ends = np.maximum.accumulate(first + count)
        first = np.maximum(first, np.concatenate(([last + 1], ends[:-1])))
        kept = ends > first
        first, ends = first[kept], ends[kept]
        if not len(first):
            continue
        last = int(ends[-1]) - 1
        starts = np.flatnonzero(np.concatenate(([True], first[1:] > ends[:-1])))
        firsts.append(first[starts])
        counts.append(ends[np.append(starts[1:], len(first)) - 1] - first[starts])
        runs += len(starts)
        if runs > _MOST_RUNS:
            raise LimitExceeded(
                f"the data of the disk has more than {_MOST_RUNS} parts, whose places would be kept in memory",
                path=disk.node.filename,
                hint="write the image to a file, or use a larger cluster_size",
            )
    none = np.zeros(0, np.int64)
    return _Runs(np.concatenate([none, *firsts]), np.concatenate([none, *counts]))


def _clusters_with_data(disk: Child, cluster: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """(first, count) of the clusters that extents with data touch, in the order of the disk."""
    for found in consecutive(disk.extents, 0, disk.size):
        held = found.where(zero=False)
        first = held.start // cluster
        yield first, -(-(held.start + held.length) // cluster) - first
