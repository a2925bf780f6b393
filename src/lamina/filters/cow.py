"""The filter `cow` (copy-on-write): keeps all changes in memory and never changes its child. `snapshot=on` opens it."""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, Self

from .. import limits, registry
from ..limits import Limits
from ..node import FUA, TransformNode, bounded, fill_zero
from ..request import Child
from ..schema import Option, Schema

if TYPE_CHECKING:
    from ..extents import Extents
    from ..graph import Opener

# The source of a range of the disk: zeros, the memory of the filter, or the child.
_ZERO, _DATA, _BELOW = 0, 1, -1


class Cow(TransformNode):
    """Unchanged bytes are read from `image`, which is opened read-only. All changes, including those of the size, are kept in
    memory and discarded when the node is closed. Discarded bytes read as zeros, never as the bytes of the image. Changes are
    recorded exactly, in bytes, so writes need no read.

    Thread-safe: the request path orders overlapping requests. Memory grows with the written data, in pages of 64 KiB."""

    driver: ClassVar[str] = "cow"
    transient = True
    schema: ClassVar[Schema] = Schema(
        "cow", [Option("image", "node", "the child node, which is never written", required=True)]
    )
    serialise = 512
    supported_flags = FUA  # no data outlives the node, so a flush would have no effect

    def __init__(self, image: Child, *, name: str | None = None, read_only: bool = False) -> None:
        super().__init__(image, name=name, read_only=read_only)
        self._size = image.size
        #: The part of the image that is still visible: bytes past a truncation read as zeros when the disk grows again.
        self._visible = image.size
        self._mutex = threading.Lock()  # for the size: writes that do not overlap may extend the disk concurrently
        self._changed = _RangeMap()
        self._memory = Child(registry.lookup("memory", "storage")(), "above", grows=True)

    @classmethod
    def open(cls, options: dict[str, Any], opener: Opener) -> Self:
        image = opener.child("image", options["image"], read_only=True)
        return cls(image, name=opener.name, read_only=opener.read_only)

    @property
    def size(self) -> int:
        return self._size

    @property
    def growable(self) -> bool:
        return self.image.node.growable

    @property
    def limits(self) -> Limits:
        """No limits, since the image is only read."""
        return Limits()

    def read_into(self, offset: int, view: memoryview) -> None:
        for lo, hi, kind in self._changed.within(offset, offset + len(view)):
            part = view[lo - offset : hi - offset]
            if kind == _DATA:
                self._memory.read_into(lo, part)
            elif kind == _ZERO:
                fill_zero(part)
            else:
                inside = min(max(self._visible - lo, 0), hi - lo)
                if inside:
                    self.image.read_into(lo, part[:inside])
                fill_zero(part[inside:])

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        self._memory.write(offset, view)
        self._change(offset, offset + len(view), _DATA)

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        self._memory.zero(offset, length)  # frees the pages
        self._change(offset, offset + length, _ZERO)

    def discard(self, offset: int, length: int) -> None:
        self.zero(offset, length)

    def flush(self) -> None:
        """Do nothing, since no data outlives the node."""

    def truncate(self, size: int) -> None:
        self._changed.cut(size)
        self._memory.truncate(min(size, self._memory.size))
        self._visible = min(self._visible, size)
        self._size = size

    def extents(self, offset: int, length: int) -> Extents:
        """Changed ranges are data or zero without a host file; the other extents are those of the image."""
        import numpy as np

        from ..extents import DATA, PRESENT, ZERO, Extents

        inside = min(max(self._visible - offset, 0), length)
        below = self.image.extents(offset, inside) if inside else Extents.empty(offset)
        if below.end == offset + inside:
            below = below.pad_zero(offset + length).coalesce()
        changed = np.array(list(islice(self._changed.within(offset, below.end), limits.MAX_ROWS)), np.int64)
        flags = np.array([ZERO | PRESENT, DATA | PRESENT, 0], np.uint8)[changed[:, 2]]  # _BELOW (-1) is the last item
        own = Extents.from_columns(changed[:, 0], changed[:, 1] - changed[:, 0], flags)
        return bounded(own.masking(below.clip(offset, own.end)).coalesce())

    def reads_zero(self, offset: int, length: int) -> bool:
        for lo, hi, kind in self._changed.within(offset, offset + length):
            inside = min(max(self._visible - lo, 0), hi - lo)
            if kind == _DATA or (kind == _BELOW and inside and not self.image.reads_zero(lo, inside)):
                return False
        return True

    def graph_changed(self) -> None:
        self._visible = min(self._visible, self.image.size)

    def reopen(self, read_only: bool) -> None:
        """The image is only read either way."""
        self.read_only = read_only

    def close(self) -> None:
        self._memory.close()
        super().close()

    def _change(self, start: int, end: int, kind: int) -> None:
        self._changed.set(start, end, kind)
        with self._mutex:
            self._size = max(self._size, end)


class _RangeMap:
    """A map from changed ranges to their source (`_ZERO` or `_DATA`). Adjacent ranges with one source are joined.
    Thread-safe."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._kinds: list[int] = []
        self._mutex = threading.Lock()

    def set(self, start: int, end: int, kind: int) -> None:
        """Set the source of [start, end)."""
        with self._mutex:
            # The ranges that overlap or touch it; the remaining parts of the first and the last are kept.
            first, last = bisect_left(self._ends, start), bisect_right(self._starts, end)
            left, right = [], []
            if first < last:
                if self._starts[first] < start:
                    left = [(self._starts[first], start, self._kinds[first])]
                if self._ends[last - 1] > end:
                    right = [(end, self._ends[last - 1], self._kinds[last - 1])]
            if left and left[0][2] == kind:
                start = left.pop()[0]
            if right and right[0][2] == kind:
                end = right.pop()[1]
            self._replace(first, last, [*left, (start, end, kind), *right])

    def cut(self, size: int) -> None:
        """Remove all ranges from `size` on."""
        with self._mutex:
            first = bisect_right(self._ends, size)
            kept = self._starts[first:][:1]
            self._replace(
                first, len(self._ends), [(kept[0], size, self._kinds[first])] if kept and kept[0] < size else []
            )

    def within(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """A snapshot of [start, end) as rows (start, end, source); the source of unchanged ranges is `_BELOW`."""
        with self._mutex:
            first, last = bisect_right(self._ends, start), bisect_left(self._starts, end)
            found = zip(self._starts[first:last], self._ends[first:last], self._kinds[first:last], strict=True)
        for low, high, kind in found:
            low, high = max(low, start), min(high, end)
            if start < low:
                yield start, low, _BELOW
            yield low, high, kind
            start = high
        if start < end:
            yield start, end, _BELOW

    def _replace(self, first: int, last: int, rows: list[tuple[int, int, int]]) -> None:
        self._starts[first:last] = [row[0] for row in rows]
        self._ends[first:last] = [row[1] for row in rows]
        self._kinds[first:last] = [row[2] for row in rows]
