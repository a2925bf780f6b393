"""The filter `cache`: blocks of the image in memory, within a bound, written back late or at once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..errors import LaminaError, OptionError
from ..limits import MIB, is_power_of_two
from ..node import FUA, TransformNode, bounded
from ..request import Child
from ..schema import Option

if TYPE_CHECKING:
    from ..extents import Extents, HostFile


class Cache(TransformNode):
    """At most `blocks` blocks of `block_size` bytes of `image`, a power of two; the one that was not used for longest
    makes room. With the mode "writeback" a write stays here until its block makes room, or until a flush, a FUA write or
    the close; "writethrough" hands it down first. A flush writes what is dirty in the order of offsets, then flushes the
    image. What cannot be written stays dirty: that flush fails, and the next one tries again. If no block can make room,
    the request that needs one fails.

    Safe for any number of threads: one operation runs at a time."""

    driver = "cache"
    options = (
        Option("blocks", "int", "how many blocks are kept at most", default=256, minimum=1),
        Option("block-size", "size", "a power of two", default=1 << 16, minimum=512, maximum=64 * MIB),
        Option("mode", "enum", "when writes go down", choices=("writeback", "writethrough"), default="writeback"),
    )

    def __init__(
        self,
        image: Child,
        blocks: int = 256,
        block_size: int = 1 << 16,
        mode: str = "writeback",
        **common: Any,
    ) -> None:
        super().__init__(image, **common)
        if not is_power_of_two(block_size):
            raise OptionError(f"block-size is {block_size}", hint="it must be a power of two")
        self._most = blocks
        self._unit = block_size
        self._late = mode == "writeback"
        # Without FUA of its own, the edge above asks for a flush.
        self.supported_flags = 0 if self._late else FUA
        self._size = image.size
        #: Number -> bytes, the one used last at the end. Past the end of the image they are zeros.
        self._blocks: OrderedDict[int, bytearray] = OrderedDict()
        #: Number -> the range of that block, in the terms of the disk, that the image does not have yet.
        self._dirty: dict[int, tuple[int, int]] = {}
        self._mutex = threading.Lock()

    @property
    def size(self) -> int:
        return self._size

    @property
    def growable(self) -> bool:
        return self.image.node.growable

    @property
    def host_base(self) -> tuple[HostFile, int] | None:
        """The image's where every write goes down at once."""
        return None if self._late else self.image.node.host_base

    def read_into(self, offset: int, view: memoryview) -> None:
        with self._mutex:
            for number, lo, hi, at in self._parts(offset, len(view)):
                view[at : at + hi - lo] = memoryview(self._block(number))[lo:hi]

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        with self._mutex:
            if not self._late:
                try:
                    self.image.write(offset, view, flags)
                except BaseException:
                    self._release(offset, offset + len(view))  # what is there now is not known
                    raise
            for number, lo, hi, at in self._parts(offset, len(view)):
                if self._late or number in self._blocks:
                    block = self._block(number, fill=hi - lo < self._unit)
                    block[lo:hi] = view[at : at + hi - lo]
                if self._late:
                    start, stop = offset + at, offset + at + hi - lo
                    first, last = self._dirty.get(number, (start, stop))
                    self._dirty[number] = min(first, start), max(last, stop)
            self._size = max(self._size, offset + len(view))

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        with self._mutex:
            self._release(offset, offset + length)
            self.image.zero(offset, length, flags)
            self._size = max(self._size, offset + length)

    def discard(self, offset: int, length: int) -> None:
        with self._mutex:
            self._release(offset, offset + length)
            self.image.discard(offset, length)

    def flush(self) -> None:
        with self._mutex:
            self._write_back()
            self.image.flush()

    def truncate(self, size: int) -> None:
        with self._mutex:
            self._write_back()
            try:
                self.image.truncate(size)
            finally:  # what failed may have changed the size all the same
                self._blocks.clear()
                self._size = self.image.size

    def extents(self, offset: int, length: int) -> Extents:
        """What is dirty is data that no file holds yet; the rest is the image's answer."""
        from ..extents import DATA, PRESENT, Extents

        end = offset + length
        with self._mutex:
            rows, at = [], offset
            for number in self._dirty_within(offset, end):
                first, last = self._dirty[number]
                first, last = max(first, offset), min(last, end)
                rows += [(at, first - at, 0)] * (at < first) + [(first, last - first, 1)] * (first < last)
                at = max(at, last)
            inside = min(max(self.image.size - offset, 0), length)
            below = self.image.extents(offset, inside) if inside else Extents.empty(offset)
        if below.end == offset + inside:
            below = below.pad_zero(end).coalesce()
        if not rows:
            return bounded(below)
        rows += [(at, end - at, 0)] * (at < end)
        start, lengths, dirty = zip(*rows, strict=True)
        flags = [(DATA | PRESENT) * row for row in dirty]
        own = Extents.from_columns(start, lengths, flags).clip(offset, below.end)
        return bounded(own.masking(below).coalesce())

    def reads_zero(self, offset: int, length: int) -> bool:
        with self._mutex:
            return not self._dirty_within(offset, offset + length) and self.image.reads_zero(offset, length)

    def graph_changed(self) -> None:
        """What is dirty goes down, and all else is forgotten: what lies below now may read otherwise."""
        with self._mutex:
            self._write_back()
            self._blocks.clear()
            self._size = self.image.size

    def settle(self) -> None:
        with self._mutex:
            self._write_back()

    # -- all that follows is called with the mutex held

    def _parts(self, offset: int, length: int) -> Iterator[tuple[int, int, int, int]]:
        """The blocks of a range: number, where in the block it starts and ends, and how far into the range that is."""
        end = offset + length
        at = offset
        while at < end:
            number, lo = divmod(at, self._unit)
            hi = min(self._unit, lo + end - at)
            yield number, lo, hi, at - offset
            at += hi - lo

    def _block(self, number: int, *, fill: bool = True) -> bytearray:
        """The block, used just now. `fill`: with the image's bytes, if it was not there."""
        block = self._blocks.get(number)
        if block is None:
            while len(self._blocks) >= self._most and self._make_room():
                pass
            block = bytearray(self._unit)
            inside = min(self._unit, self.image.size - number * self._unit)
            if fill and inside > 0:
                self.image.read_into(number * self._unit, memoryview(block)[:inside])
            self._blocks[number] = block
        else:
            self._blocks.move_to_end(number)
        return block

    def _make_room(self) -> bool:
        """Let go of the block that was not used for longest, of those that can be let go of. False, where there is none, in a
        forked child, which writes nothing: one block more is kept there."""
        first: LaminaError | None = None
        for number in self._blocks:
            try:
                self._clean(number)
            except LaminaError as error:
                first = first or error  # it stays dirty, and a flush will tell
                continue
            del self._blocks[number]
            return True
        if self.foreign:
            return False
        assert first is not None
        raise first

    def _clean(self, number: int) -> None:
        dirty = self._dirty.get(number)
        if dirty is not None:
            first, last = dirty
            base = number * self._unit
            self.image.write(first, memoryview(self._blocks[number])[first - base : last - base])
            del self._dirty[number]

    def _write_back(self, offset: int = 0, end: int | None = None) -> None:
        """Hand all that is dirty down, or what touches a range; all is tried, and the first error raised."""
        first: LaminaError | None = None
        for number in self._dirty_within(offset, self._size if end is None else end):
            try:
                self._clean(number)
            except LaminaError as error:
                first = first or error
        if first is not None:
            raise first

    def _dirty_within(self, offset: int, end: int) -> list[int]:
        """The numbers of dirty blocks with dirty bytes in the range, in order."""
        return sorted(number for number, (first, last) in self._dirty.items() if first < end and offset < last)

    def _release(self, offset: int, end: int) -> None:
        """Hand down what is dirty in the blocks that touch the range, and forget them."""
        first, last = offset // self._unit, -(-end // self._unit)
        self._write_back(first * self._unit, last * self._unit)
        for number in [number for number in self._blocks if first <= number < last]:
            del self._blocks[number]
