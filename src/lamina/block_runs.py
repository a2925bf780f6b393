"""Runs of blocks: what the block table of a format says, joined into as few rows as can be, for `map` and `map_columns`.

Formats that divide the disk into blocks of one size (clusters, grains) and keep a table of where each lies all need the same:
neighbours that are alike, and lie one after the other, are one row; also where two tables, or two parts of one, meet; and an
answer ends where it has `limits.MAX_ROWS` rows. Beside the contract in `format_node.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import limits
from .format_node import Columns

if TYPE_CHECKING:
    from .request import Child


def following(entries: Sequence[int], index: int, stop: int, mask: int, step: int) -> int:
    """How many entries from `index` on, up to `stop`, go on as the one at `index` does: each is, as far as `mask` looks, the
    one before it plus `step` (0: alike). At least 1. In plain Python, for `FormatNode.map`."""
    expected = (entries[index] & mask) + step
    at = index + 1
    while at < stop and entries[at] & mask == expected:
        expected += step
        at += 1
    return at - index


class BlockRuns:
    """The columns of a stretch of a disk, made from the blocks of `1 << bits` bytes that it touches: `add` them in order,
    then ask for `columns`. All offsets count in `child`. For one thread."""

    def __init__(self, child: Child, bits: int, offset: int, length: int) -> None:
        self._child = child
        self._bits = bits
        self._offset, self._stop = offset, offset + length
        self._next = offset >> bits  # the number of the block that is added next
        self._starts: list[Any] = []
        self._flags: list[Any] = []
        self._places: list[Any] = []
        self._rows = 0

    @property
    def full(self) -> bool:
        """Whether there are as many rows as one answer holds; what is added after that is cut off again."""
        return self._rows >= limits.MAX_ROWS

    def add(self, flags: Any, place: Any) -> None:
        """The next blocks, one element each: their flags (uint8, see `format_node.Mapping`) and where each begins in the
        child, -1 where it does not (int64)."""
        from .numeric import np

        # Blocks with a place go on where the next one lies behind it, others where the next one has none either.
        goes_on = np.where(place[:-1] >= 0, place[1:] == place[:-1] + (1 << self._bits), place[1:] < 0)
        first = np.concatenate(([0], np.flatnonzero(~(goes_on & (flags[1:] == flags[:-1]))) + 1))
        self.add_runs(first, flags[first], place[first], len(flags))

    def add_runs(self, first: Any, flags: Any, place: Any, count: int) -> None:
        """The next `count` blocks, of which those numbered `first` begin another run, the block 0 among them. One element
        for each run: its flags and its place."""
        self._append(first + self._next, flags, place, count)

    def add_alike(self, count: int, flags: int = 0) -> None:
        """The next `count` blocks, all with these flags and without a place."""
        from .numeric import np

        self._append(np.array([self._next]), np.array([flags], np.uint8), np.array([-1]), count)

    def _append(self, start: Any, flags: Any, place: Any, count: int) -> None:
        # A row goes on across the seam of what was added before where it is alike and contiguous.
        if self._starts and flags[0] == self._flags[-1][-1]:
            run = int(start[0] - self._starts[-1][-1]) << self._bits
            before = int(self._places[-1][-1])
            if place[0] == (before + run if before >= 0 else -1):
                start, flags, place = start[1:], flags[1:], place[1:]
        self._next += count
        if len(start):
            self._starts.append(start)
            self._flags.append(flags)
            self._places.append(place)
            self._rows += len(start)

    def columns(self) -> Columns:
        """What was added, cut to the stretch, or to the rows that one answer holds."""
        from .numeric import np

        most, offset = limits.MAX_ROWS, self._offset
        begin, flags, place = map(_joined, (self._starts, self._flags, self._places))
        begin <<= self._bits
        end = min(self._next << self._bits, self._stop) if self._rows <= most else int(begin[most])
        begin, flags, place = begin[:most], flags[:most], place[:most]
        if place[0] >= 0:
            place[0] += offset - begin[0]
        begin[0] = offset
        length = np.empty(len(begin), np.int64)
        np.subtract(begin[1:], begin[:-1], out=length[:-1])
        length[-1] = end - begin[-1]
        return Columns(begin, length, flags, place, (self._child,))


def _joined(parts: list[Any]) -> Any:
    from .numeric import np

    return parts[0] if len(parts) == 1 else np.concatenate(parts)
