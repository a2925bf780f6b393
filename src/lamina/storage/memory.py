"""The driver `memory`: a sparse disk in memory, which is discarded when the node is closed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Self

from ..errors import Closed
from ..node import FUA, StorageNode, bounded, fill_zero
from ..schema import Option, Schema

if TYPE_CHECKING:
    from ..extents import Extents
    from ..graph import Opener

PAGE = 1 << 16


class MemoryStorage(StorageNode):
    """Pages of `PAGE` bytes, allocated by writes; an unallocated page reads as zeros, so a node of 1 TiB needs no memory.
    Thread-safe: operations run one at a time. No data outlives the node, so a flush does nothing and every write honours
    FUA."""

    driver: ClassVar[str] = "memory"
    transient = True
    schema: ClassVar[Schema] = Schema("memory", [Option("size", "size", "the initial length in bytes", default=0)])
    supported_flags = FUA

    def __init__(self, size: int = 0, *, name: str | None = None, read_only: bool = False) -> None:
        super().__init__(name=name, read_only=read_only)
        self._size = size
        self._pages: dict[int, bytearray] | None = {}  # bytes past the size are always zero; None after close
        self._mutex = threading.Lock()

    @classmethod
    def open(cls, options: dict[str, Any], opener: Opener) -> Self:
        return cls(options["size"], name=opener.name, read_only=opener.read_only)

    @property
    def size(self) -> int:
        return self._size

    @property
    def growable(self) -> bool:
        return True

    @property
    def allocated(self) -> int:
        """The memory of the pages, in bytes."""
        with self._mutex:
            return len(self._require_open("stat")) * PAGE

    def read_into(self, offset: int, view: memoryview) -> None:
        with self._mutex:
            pages = self._require_open("read")
            for number, lo, hi, at in _parts(offset, len(view)):
                page = pages.get(number)
                if page is None:
                    fill_zero(view[at : at + hi - lo])
                else:
                    view[at : at + hi - lo] = memoryview(page)[lo:hi]

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        with self._mutex:
            pages = self._require_open("write")
            self._size = max(self._size, offset + len(view))  # first: no interrupt leaves bytes behind the end
            for number, lo, hi, at in _parts(offset, len(view)):
                page = pages.get(number)
                if page is None:
                    page = pages[number] = bytearray(PAGE)
                page[lo:hi] = view[at : at + hi - lo]

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        """Free complete pages, with or without MAY_UNMAP: keeping them has no advantage."""
        with self._mutex:
            self._clear(self._require_open("zero"), offset, offset + length)
            self._size = max(self._size, offset + length)

    def discard(self, offset: int, length: int) -> None:
        with self._mutex:
            self._clear(self._require_open("discard"), offset, offset + length)

    def truncate(self, size: int) -> None:
        with self._mutex:
            pages = self._require_open("truncate")
            if size < self._size:
                self._clear(pages, size, self._size)
            self._size = size

    def extents(self, offset: int, length: int) -> Extents:
        from ..extents import DATA, PRESENT, ZERO, Extents
        from ..numeric import np

        first, last = offset // PAGE, -(-(offset + length) // PAGE)
        with self._mutex:
            numbers = np.array(sorted(_within(self._require_open("extents"), first, last)), np.int64)
        # Consecutive pages form one extent of data; the gaps between them are extents of zeros.
        breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
        heads, tails = numbers[np.append(0, breaks)[: len(numbers)]], numbers[np.append(breaks - 1, -1)[: len(numbers)]]
        inner = np.column_stack((heads, tails + 1)).ravel() * PAGE
        edges = np.clip(np.concatenate(([offset], inner, [offset + length])), offset, offset + length)
        flags = np.full(len(edges) - 1, ZERO | PRESENT, np.uint8)
        flags[1::2] = DATA | PRESENT
        lengths = np.diff(edges)
        rows = np.flatnonzero(lengths)
        start = edges[rows]
        found = Extents.from_columns(start, lengths[rows], flags[rows], file=0, offset=start.copy(), files=(self,))
        return bounded(found)

    def reads_zero(self, offset: int, length: int) -> bool:
        with self._mutex:
            return (
                next(_within(self._require_open("read"), offset // PAGE, -(-(offset + length) // PAGE)), None) is None
            )

    def reopen(self, read_only: bool) -> None:
        self.read_only = read_only

    def close(self) -> None:
        with self._mutex:
            self._pages = None

    def _require_open(self, operation: str) -> dict[int, bytearray]:
        if self._pages is None:
            raise Closed("the node is closed", node=self.name, operation=operation)
        return self._pages

    def _clear(self, pages: dict[int, bytearray], start: int, end: int) -> None:
        """Make [start, end) read as zeros. A page without other bytes below the size is freed."""
        first, last = start // PAGE, -(-end // PAGE)
        for number in list(_within(pages, first, last)):
            lo, hi = max(start - number * PAGE, 0), min(end - number * PAGE, PAGE)
            if lo == 0 and (hi == PAGE or end >= self._size):
                del pages[number]
            else:
                pages[number][lo:hi] = bytes(hi - lo)


def _parts(offset: int, length: int) -> Iterator[tuple[int, int, int, int]]:
    """The pages of a range: number, start and end of the part in the page, and the offset of the part in the range."""
    end = offset + length
    at = offset
    while at < end:
        number, lo = divmod(at, PAGE)
        hi = min(PAGE, lo + end - at)
        yield number, lo, hi, at - offset
        at += hi - lo


def _within(pages: dict[int, bytearray], first: int, last: int) -> Iterator[int]:
    """The numbers of the allocated pages in range(first, last), in no particular order."""
    if last - first < len(pages):
        return (number for number in range(first, last) if number in pages)
    return (number for number in pages if first <= number < last)
