"""The status of a range summed up in cells of one size: what a picture shows of a disk that has more bytes than the picture.

A cell tells exactly how many of its bytes are of each kind, and which layers own bytes of it. Nothing is rounded, and no kind
stands for another: a cell with bytes of several kinds says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ..limits import align_down
from ..numeric import np
from ..palette import CONTENT, content
from ..status import COMPRESSED, DATA, PRESENT, ZERO

if TYPE_CHECKING:
    from ..extents import Extents, Int64s

#: The kinds of content, in the order in which a picture shows them; see `palette.CONTENT`.
KINDS = tuple(CONTENT)
#: The kinds that take storage.
STORED = ("data", "compressed", "reserved")

#: The index in `KINDS` for each combination of the flags of an extent.
_KIND_OF_FLAGS = np.array(
    [
        KINDS.index(content(bool(flags & DATA), bool(flags & ZERO), bool(flags & PRESENT), bool(flags & COMPRESSED)))
        for flags in range(16)
    ],
    np.int8,
)
_NO_LAYER = np.int32(-1)
_ABOVE_ALL = np.int32(2**31 - 1)


class Cell(NamedTuple):
    """The bytes from `start`, `length` of them. `amounts`: the bytes of each kind that occurs, in the order of `KINDS`.
    `layers`: the lowest and highest depth of the layers that own bytes of the cell; None if no layer does."""

    start: int
    length: int
    amounts: dict[str, int]
    layers: tuple[int, int] | None

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def kind(self) -> str | None:
        """The kind of all bytes; None if they are of several kinds, or if the status of some is unknown."""
        ((kind, amount),) = self.amounts.items() if len(self.amounts) == 1 else ((None, 0),)
        return kind if amount == self.length else None

    @property
    def unknown(self) -> int:
        """The number of bytes in no extent that was added."""
        return self.length - sum(self.amounts.values())

    @property
    def stored(self) -> int:
        """The number of bytes that take storage."""
        return sum(self.amounts.get(kind, 0) for kind in STORED)


class Cells:
    """The range [begin, end) in cells of `size` bytes. Their boundaries are the multiples of `size`, and the ends of the
    range. Extents are added in any number of parts, which must not overlap; the memory is that of the cells.

    Raises ValueError for an empty range or a size below 1."""

    def __init__(self, begin: int, end: int, size: int) -> None:
        if not 0 <= begin < end or size < 1:
            raise ValueError(f"no cells of {size} bytes in [{begin}, {end})")
        self.begin, self.end, self.size = begin, end, size
        first = align_down(begin, size)
        count = -(-(end - first) // size)
        self._bounds: Int64s = np.append(first + np.arange(count, dtype=np.int64) * size, end)
        self._bounds[0] = begin
        self._amounts = np.zeros((len(KINDS), count), np.int64)
        self._top = np.full(count, _ABOVE_ALL)
        self._bottom = np.full(count, _NO_LAYER)

    def add(self, extents: Extents) -> None:
        """Add the part of these extents that is inside the range."""
        part = extents.clip(self.begin, self.end)
        if not len(part):
            return
        first = int(np.searchsorted(self._bounds, part.begin, "right")) - 1
        last = int(np.searchsorted(self._bounds, part.end, "left"))
        here = slice(first, last)
        bounds = np.clip(self._bounds[first : last + 1], part.begin, part.end)
        row = np.searchsorted(part.start, bounds, "right") - 1
        into = np.minimum(bounds - part.start[row], part.length[row])  # a boundary may be in a gap after its row
        kinds = _KIND_OF_FLAGS[part.flags]
        for number in range(len(KINDS)):
            chosen = kinds == number
            if chosen.any():
                # The bytes of this kind before each boundary: those of whole rows, and of the row that contains it.
                before = np.concatenate(([0], np.cumsum(part.length * chosen)))
                self._amounts[number, here] += np.diff(before[row] + into * chosen[row])
        self._add_layers(part.where(present=True), here, bounds)

    def _add_layers(self, owned: Extents, here: slice, bounds: Int64s) -> None:
        first = np.searchsorted(owned.start + owned.length, bounds[:-1], "right")
        last = np.searchsorted(owned.start, bounds[1:], "left")
        some = np.flatnonzero(first < last)
        if not len(some):
            return
        # reduceat gets the bounds first, last, first, ...; the results between two groups are discarded. The last row may
        # be in many groups, so there is one more depth, which `last` refers to and no group contains.
        pairs = np.column_stack((first[some], last[some])).ravel()
        depths = np.append(owned.depth, _NO_LAYER)
        cells = some + here.start
        self._top[cells] = np.minimum(self._top[cells], np.minimum.reduceat(depths, pairs)[::2])
        self._bottom[cells] = np.maximum(self._bottom[cells], np.maximum.reduceat(depths, pairs)[::2])

    def __len__(self) -> int:
        return len(self._top)

    def cells(self) -> list[Cell]:
        """All cells, in order."""
        starts = self._bounds.tolist()
        columns = self._amounts.T.tolist()
        top, bottom = self._top.tolist(), self._bottom.tolist()
        return [
            Cell(
                starts[number],
                starts[number + 1] - starts[number],
                {kind: amount for kind, amount in zip(KINDS, amounts, strict=True) if amount},
                (top[number], bottom[number]) if bottom[number] >= 0 else None,
            )
            for number, amounts in enumerate(columns)
        ]

    def totals(self) -> dict[str, int]:
        """The bytes of each kind that occurs, in the order of `KINDS`."""
        sums = self._amounts.sum(axis=1).tolist()
        return {kind: amount for kind, amount in zip(KINDS, sums, strict=True) if amount}


def cell_size(begin: int, end: int, most: int, least: int = 1) -> int:
    """The smallest power of two, at least `least` (a power of two), such that [begin, end) has at most `most` cells of that
    size."""
    size = least
    while -(-end // size) - begin // size > most:
        size *= 2
    return size


def exact_size(size: int) -> str:
    """The size in the largest unit in which it is a multiple of a quarter: `1.25 GiB`, `600 B`. No byte is rounded away."""
    for power in range(6, 0, -1):
        unit = 1 << 10 * power
        if size >= unit and size % (unit // 4) == 0:
            return f"{size // unit}{('', '.25', '.5', '.75')[size % unit // (unit // 4)]} {'KMGTPE'[power - 1]}iB"
    return f"{size} B"
