"""The filter `cache`: a bounded cache of blocks in memory, in writeback or writethrough mode."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import LaminaError, OptionError
from ..limits import MIB, is_power_of_two
from ..node import FUA, TransformNode, bounded
from ..request import Child
from ..schema import Option

if TYPE_CHECKING:
    from ..extents import Extents, HostFile


class Cache(TransformNode):
    """Caches at most `blocks` blocks of `block_size` bytes, a power of two, and evicts the least recently used block. In the
    mode "writeback" written bytes stay in the cache until their block is evicted, or until a flush, a FUA write or the close;
    in the mode "writethrough" they are written to the image first. A flush writes the dirty blocks in the order of offsets
    and then flushes the image. A block that cannot be written stays dirty: the flush fails, and the next flush tries again.
    If no block can be evicted, the request that needs a block fails.

    Thread-safe: operations run one at a time."""

    driver = "cache"
    options: ClassVar[tuple[Option, ...]] = (
        Option("blocks", "int", "the maximum number of cached blocks", default=256, minimum=1),
        Option("block-size", "size", "a power of two", default=1 << 16, minimum=512, maximum=64 * MIB),
        Option(
            "mode", "enum", "when writes reach the image", choices=("writeback", "writethrough"), default="writeback"
        ),
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
            raise OptionError(f"block-size is {block_size}", hint="it takes a power of two")
        self._asked = blocks, block_size
        self._fit()
        self._writeback = mode == "writeback"
        # In writeback mode the request path emulates FUA by a flush.
        self.supported_flags = 0 if self._writeback else FUA
        self._size = image.size
        #: Number -> bytes, the most recently used block last. Bytes past the end of the image are zeros.
        self._blocks: OrderedDict[int, bytearray] = OrderedDict()
        #: Number -> the dirty range of the block, as offsets of the disk.
        self._dirty: dict[int, tuple[int, int]] = {}
        self._mutex = threading.Lock()

    def _fit(self) -> None:
        """Choose the size of a block: not below the alignment of the image, whose edge would read a whole unit for each
        block of it. The cache keeps its size in bytes."""
        blocks, size = self._asked
        self._block_size = max(size, self.image.node.limits.request_alignment)
        self._capacity = max(blocks * size // self._block_size, 1)

    @property
    def size(self) -> int:
        return self._size

    @property
    def growable(self) -> bool:
        return self.image.node.growable

    @property
    def host_base(self) -> tuple[HostFile, int] | None:
        """That of the image in writethrough mode; in writeback mode the image does not hold all bytes."""
        return None if self._writeback else self.image.node.host_base

    def read_into(self, offset: int, view: memoryview) -> None:
        with self._mutex:
            for number, lo, hi, at in self._parts(offset, len(view)):
                view[at : at + hi - lo] = memoryview(self._block(number))[lo:hi]

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        with self._mutex:
            if not self._writeback:
                try:
                    self.image.write(offset, view, flags)
                except BaseException:
                    self._release(offset, offset + len(view))  # the content of the image is unknown
                    raise
            for number, lo, hi, at in self._parts(offset, len(view)):
                if self._writeback or number in self._blocks:
                    block = self._block(number, fill=hi - lo < self._block_size)
                    block[lo:hi] = view[at : at + hi - lo]
                if self._writeback:
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
            finally:  # a failed truncate may have changed the size as well
                self._blocks.clear()
                self._size = self.image.size

    def extents(self, offset: int, length: int) -> Extents:
        """Dirty bytes are data without a host file; the other extents are those of the image."""
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
        """Write back the dirty blocks and drop all blocks, since the nodes below may read differently now."""
        with self._mutex:
            self._write_back()
            self._blocks.clear()
            self._fit()
            self._size = self.image.size

    def settle(self) -> None:
        with self._mutex:
            self._write_back()

    # -- the following methods need the mutex

    def _parts(self, offset: int, length: int) -> Iterator[tuple[int, int, int, int]]:
        """The blocks of a range: number, start and end of the part in the block, and the offset of the part in the range."""
        end = offset + length
        at = offset
        while at < end:
            number, lo = divmod(at, self._block_size)
            hi = min(self._block_size, lo + end - at)
            yield number, lo, hi, at - offset
            at += hi - lo

    def _block(self, number: int, *, fill: bool = True) -> bytearray:
        """The block `number`, now the most recently used. `fill`: read a block that is not cached from the image."""
        block = self._blocks.get(number)
        if block is None:
            while len(self._blocks) >= self._capacity and self._evict():
                pass
            block = bytearray(self._block_size)
            inside = min(self._block_size, self.image.size - number * self._block_size)
            if fill and inside > 0:
                self.image.read_into(number * self._block_size, memoryview(block)[:inside])
            self._blocks[number] = block
        else:
            self._blocks.move_to_end(number)
        return block

    def _evict(self) -> bool:
        """Evict the least recently used block that is clean or can be written back. If there is none, raises the first error,
        or returns False in a forked child process, which never writes and may exceed the capacity."""
        first: LaminaError | None = None
        for number in self._blocks:
            try:
                self._clean(number)
            except LaminaError as error:
                first = first or error  # the block stays dirty, so the next flush reports the error
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
            base = number * self._block_size
            self.image.write(first, memoryview(self._blocks[number])[first - base : last - base])
            del self._dirty[number]

    def _write_back(self, offset: int = 0, end: int | None = None) -> None:
        """Write back all dirty blocks, or those with dirty bytes in a range. Tries all, then raises the first error."""
        first: LaminaError | None = None
        for number in self._dirty_within(offset, self._size if end is None else end):
            try:
                self._clean(number)
            except LaminaError as error:
                first = first or error
        if first is not None:
            raise first

    def _dirty_within(self, offset: int, end: int) -> list[int]:
        """The numbers of the blocks with dirty bytes in the range, in order."""
        return sorted(number for number, (first, last) in self._dirty.items() if first < end and offset < last)

    def _release(self, offset: int, end: int) -> None:
        """Write back and drop the blocks that overlap the range."""
        first, last = offset // self._block_size, -(-end // self._block_size)
        self._write_back(first * self._block_size, last * self._block_size)
        for number in [number for number in self._blocks if first <= number < last]:
            del self._blocks[number]
