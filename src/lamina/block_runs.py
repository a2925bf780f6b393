"""Runs of blocks: the block table of a format, merged into as few rows as possible, for `map` and `map_columns`.

Formats that divide the disk into blocks of one size (clusters, grains), with a table of their locations, all need the same:
adjacent blocks with equal flags and contiguous locations become one row, also across the border of two tables, and a result
ends after `limits.MAX_ROWS` rows. It complements the contract in `format_node.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import limits
from .format_node import Columns

if TYPE_CHECKING:
    from .request import Child


def following(entries: Sequence[int], index: int, stop: int, mask: int, step: int) -> int:
    """The number of entries from `index`, up to `stop`, that continue the entry at `index`: each equals, in the bits of
    `mask`, the one before it plus `step` (0: all are equal). At least 1. In plain Python, for `FormatNode.map`."""
    expected = (entries[index] & mask) + step
    at = index + 1
    while at < stop and entries[at] & mask == expected:
        expected += step
        at += 1
    return at - index


class BlockRuns:
    """The columns of a range of a disk, made from its blocks of `1 << bits` bytes: `add` them in order, then read `columns`.
    All offsets refer to `child`. Not thread-safe."""

    def __init__(self, child: Child, bits: int, offset: int, length: int) -> None:
        self._child = child
        self._bits = bits
        self._offset, self._stop = offset, offset + length
        self._next = offset >> bits  # the number of the next block
        self._starts: list[Any] = []
        self._flags: list[Any] = []
        self._hosts: list[Any] = []
        self._rows = 0

    @property
    def full(self) -> bool:
        """Whether there are as many rows as one result holds; later rows are cut off."""
        return self._rows >= limits.MAX_ROWS

    def add(self, flags: Any, host: Any) -> None:
        """Add the next blocks, one element each: their flags (uint8, see `format_node.Mapping`), and their offsets in the
        child (int64; -1: none)."""
        from .numeric import np

        # A block with an offset continues if the next one is directly after it; one without, if the next one has none either.
        continues = np.where(host[:-1] >= 0, host[1:] == host[:-1] + (1 << self._bits), host[1:] < 0)
        first = np.concatenate(([0], np.flatnonzero(~(continues & (flags[1:] == flags[:-1]))) + 1))
        self.add_runs(first, flags[first], host[first], len(flags))

    def add_runs(self, first: Any, flags: Any, host: Any, count: int) -> None:
        """Add the next `count` blocks as runs. `first`: the numbers of the first blocks of the runs, from 0. One element for
        each run: its flags and its offset."""
        self._append(first + self._next, flags, host, count)

    def add_alike(self, count: int, flags: int = 0) -> None:
        """Add the next `count` blocks, all with these flags and without an offset."""
        from .numeric import np

        self._append(np.array([self._next]), np.array([flags], np.uint8), np.array([-1]), count)

    def _append(self, start: Any, flags: Any, host: Any, count: int) -> None:
        # The first row may continue the last row of the previous call.
        if self._starts and flags[0] == self._flags[-1][-1]:
            run = int(start[0] - self._starts[-1][-1]) << self._bits
            before = int(self._hosts[-1][-1])
            if host[0] == (before + run if before >= 0 else -1):
                start, flags, host = start[1:], flags[1:], host[1:]
        self._next += count
        if len(start):
            self._starts.append(start)
            self._flags.append(flags)
            self._hosts.append(host)
            self._rows += len(start)

    def columns(self) -> Columns:
        """The added blocks, cut to the range, or to the rows that one result holds."""
        from .numeric import np

        most, offset = limits.MAX_ROWS, self._offset
        begin, flags, host = map(_joined, (self._starts, self._flags, self._hosts))
        begin <<= self._bits
        end = min(self._next << self._bits, self._stop) if self._rows <= most else int(begin[most])
        begin, flags, host = begin[:most], flags[:most], host[:most]
        if host[0] >= 0:
            host[0] += offset - begin[0]
        begin[0] = offset
        length = np.empty(len(begin), np.int64)
        np.subtract(begin[1:], begin[:-1], out=length[:-1])
        length[-1] = end - begin[-1]
        return Columns(begin, length, flags, host, (self._child,))


def _joined(parts: list[Any]) -> Any:
    from .numeric import np

    return parts[0] if len(parts) == 1 else np.concatenate(parts)
