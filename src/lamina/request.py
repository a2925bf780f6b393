"""The request path: the rules between any two nodes, written once.

A `Child` is an edge of the graph, through which one node, or a user, calls another node. Every request passes through one.
The edge checks bounds and permissions, aligns requests (read-modify-write), splits them, emulates missing operations, and
orders overlapping requests, so that no driver below does any of that. `node.py` lists the guarantees for drivers.

A request whose range is aligned and within the limits is passed to the driver at once. That is the fast path: the first lines
of each method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from .edge import Edge, consecutive
from .errors import NotSupported, OutOfRange
from .limits import MAX_SIZE, align_down, align_up
from .node import COMPRESS, FUA, MAY_UNMAP, NO_FALLBACK, fill_zero
from .pending import DONE, Done, Pending, start_holding
from .zeros import is_zero

if TYPE_CHECKING:
    from .extents import Extents, HostFile
    from .status import Status

#: Zeros for nodes that cannot zero by themselves, and the largest buffer for the merge of unaligned writes.
_BOUNCE = 1 << 20
_ZEROS = memoryview(bytes(_BOUNCE))
#: Incremented whenever a node becomes shorter; all edges then read the size of their node again.
_epoch = 0


def sizes_changed() -> None:
    """Called after the size of a node changed: no edge uses the size that it remembers any more."""
    global _epoch
    _epoch += 1


class Child(Edge):
    """An edge that applies the rules of the request path. Thread-safe."""

    __slots__ = ()

    # -- operations

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view` with the bytes at `offset`, and with zeros past the end of growable storage."""
        node = self.node
        length = len(view)
        end = offset + length
        if offset < 0 or end > self._within or self._seen != _epoch:
            # The edge reads the size again only for requests past the known end, or after a truncation of any node.
            self._seen, self._within = _epoch, node.size
            if offset < 0 or end > self._within:
                inside = self._bound(offset, end, "read", grows=self.grows)
                fill_zero(view[inside:])
                view = view[:inside]
                length, end = inside, offset + inside
        if not length:
            return
        align = self._align
        aligned = align == 1 or not ((offset | end) & (align - 1)) or (end == node.size and not offset & (align - 1))
        if aligned and length <= self._max_transfer:
            if not self._reads_wait:
                node.read_into(offset, view)
            else:
                node.ranges.shared(offset, end, node.read_into, offset, view)
        elif not self._reads_wait:
            self._read_unaligned(offset, view)
        else:
            self._ordered(offset, end, False, self._read_unaligned, offset, view)

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        """Make the bytes at `offset` equal to `view`. `flags`: FUA, COMPRESS."""
        node = self.node
        length = len(view)
        end = offset + length
        if node.read_only or self.read_only:
            self.require_writable("write")
        if offset < 0 or end > self._within or self._seen != _epoch:
            self._seen, self._within = _epoch, node.size
            if offset < 0 or end > self._within:
                self._bound(offset, end, "write", grows=self.grows and node.growable)
        if not length:
            return
        if node.zero_detected is not None and is_zero(view):
            self.zero(offset, length, flags & ~COMPRESS | node.zero_detected)
            return
        passed = flags & node.supported_flags
        if not self._order and self.event is None and length <= self._max_transfer:
            # No order means no alignment: call the driver at once. (The second call would take 0.5 us of 1.5.)
            node.write(offset, view, passed)
        else:
            self._write_ordered(offset, view, passed)
        if flags & ~passed & FUA:
            node.flush()

    def copy_from(self, offset: int, source: HostFile, source_offset: int, length: int, flags: int = 0) -> None:
        """Make the bytes at `offset` equal to those at `source_offset` of the host file `source`, inside the system. `flags`:
        FUA; NO_FALLBACK: only by sharing storage. The caller knows the location of the bytes (`extents`), knows that a copy
        from there equals a read (`Node.copyable`), and ensures that nothing changes the source meanwhile.

        Raises NotSupported if that is impossible; then no byte has changed, or a part of the range has, and a write of the
        whole range corrects it. It is impossible for unaligned ranges (the caller writes their ends), and for nodes that must
        see the written bytes: to detect zeros (`detect-zeroes`), or because they observe each write."""
        node = self.node
        end = offset + length
        if node.read_only or self.read_only:
            self.require_writable("copy")
        if length < 0 or offset < 0 or end > node.size:
            self._bound(offset, end, "copy", grows=self.grows and node.growable)
        if not length:
            return
        if node.zero_detected is not None or self.event is not None or not self._is_aligned(offset, end):
            raise node.refuse("copy from a file here")
        self._ordered(
            offset, end, self._reads_wait, self._copy_pieces, offset, source, source_offset, length, flags & ~FUA
        )
        if flags & FUA:
            node.flush()

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        """Make the bytes read as zero. An unaligned head or tail is zeroed with its block if the rest of the block reads as
        zero already, and written otherwise, as are ranges that the driver cannot zero. With NO_FALLBACK nothing is written:
        NotSupported is raised before a byte changes."""
        node = self.node
        end = offset + length
        if node.read_only or self.read_only:
            self.require_writable("zero")
        if length < 0 or offset < 0 or end > node.size:
            self._bound(offset, end, "zero", grows=self.grows and node.growable)
        if not length:
            return
        if not node.discards:
            flags &= ~MAY_UNMAP  # deallocation is a discard
        pieces = list(self._blocks(offset, end, self._zero_align))
        if flags & NO_FALLBACK and not all(self._widen(lo, hi) for lo, hi in pieces):
            raise NotSupported("not aligned for a fast zero", node=node.name, operation="zero", offset=offset)
        passed = flags & (node.supported_flags | ~FUA)
        heard = self.event is not None and any(self._is_aligned(lo, hi) for lo, hi in pieces)
        if heard:
            self.tell("pwritev_zero")
        try:
            for lo, hi in self._steps(offset, end, self._max_zero):
                self._ordered(lo, hi, True, self._zero_step, lo, hi, passed)
                passed &= ~NO_FALLBACK  # bytes have changed: the rest must succeed
        finally:
            if heard:
                self.tell("pwritev_done")
        if flags & ~passed & FUA:
            node.flush()

    def discard(self, offset: int, length: int) -> None:
        """The caller no longer needs these bytes. Only whole blocks are discarded; an unsupported discard is not a
        failure."""
        node = self.node
        end = offset + length
        if node.read_only or self.read_only:
            self.require_writable("discard")
        if length < 0 or offset < 0 or end > node.size:
            self._bound(offset, end, "discard", grows=False)
        if not node.discards:
            return
        align = self._discard_align
        first = align_up(offset, align)
        last = end if end == node.size else align_down(end, align)
        if first >= last:
            return
        try:
            for lo, hi in self._steps(first, last, self._max_discard):
                self._ordered(lo, hi, True, node.discard, lo, hi - lo)
        except NotSupported:
            pass  # a discard is a hint

    def flush(self) -> None:
        """Return when all bytes of earlier writes are on stable storage."""
        self.node.flush()

    def truncate(self, size: int) -> None:
        """Make the node `size` bytes long; added bytes read as zero."""
        self.require_writable("truncate")
        if not 0 <= size <= MAX_SIZE:
            raise OutOfRange(f"the size {size} is not possible", node=self.node.name, operation="truncate")
        # A node that orders its requests has no other request during a change of size; storage has its own protection.
        self.node.ranges.exclusive(0, MAX_SIZE, self._truncate, size)

    def _truncate(self, size: int) -> None:
        try:
            self.node.truncate(size)
        finally:
            sizes_changed()

    def extents(self, offset: int, length: int) -> Extents:
        """The exact status of these bytes, or of the first ones, as many as one result holds; see `Node.extents`."""
        if length < 0 or offset < 0 or offset + length > self.node.size:
            self._bound(offset, offset + length, "extents", grows=False)
        if not length:
            from .extents import Extents

            return Extents.empty(offset)
        return self.node.extents(offset, length)

    def first_extents(self, offset: int, length: int, most: int) -> list[Status]:
        """The first of these extents in plain Python; see `Node.first_extents`. `length` is at least 1."""
        if length < 1 or offset < 0 or offset + length > self.node.size:
            self._bound(offset, offset + length, "extents", grows=False)
        return self.node.first_extents(offset, length, most)

    def windows(self, offset: int, length: int) -> Iterator[Extents]:
        """The exact status of the whole range, in consecutive results of `extents`."""
        return consecutive(self.extents, offset, length)

    def reads_zero(self, offset: int, length: int) -> bool:
        """Whether these bytes are known to read as zero; see `Node.reads_zero`."""
        inside = min(offset + length, self.node.size) - offset
        return inside <= 0 or self.node.reads_zero(offset, inside)

    # -- started requests (see `pending.py`); a request that cannot be started completes at once

    def start_read(self, offset: int, view: memoryview) -> Pending:
        """Start a read of the bytes at `offset` into `view`."""
        if self._passes(offset, offset + len(view), self._max_transfer, self._align):
            start = self.node.start_read
            started = self._start(start, offset, view) if self._reads_wait else start(offset, view)
            if started is not None:
                return started
        self.read_into(offset, view)
        return DONE

    def start_write(self, offset: int, view: memoryview, flags: int = 0) -> Pending:
        """Start a write of `view` at `offset`."""
        node, end = self.node, offset + len(view)
        passed = flags & node.supported_flags
        plain = node.zero_detected is None and not flags & ~passed & FUA and not (node.read_only or self.read_only)
        if plain and not self._reads_wait and self._passes(offset, end, self._max_transfer, self._align):
            started = self._start(node.start_write, offset, view, passed)
            if started is not None:
                return started
        self.write(offset, view, flags)
        return DONE

    def start_zero(self, offset: int, length: int, flags: int = 0) -> Pending:
        """Start to make the bytes read as zero."""
        node, end = self.node, offset + length
        asked = flags if node.discards else flags & ~MAY_UNMAP
        passed = asked & (node.supported_flags | ~FUA)
        plain = asked == passed and not flags & NO_FALLBACK and not (node.read_only or self.read_only)
        if plain and not self._reads_wait and self._passes(offset, end, self._max_zero, self._zero_align):
            try:
                started = self._start(node.start_zero, offset, length, passed)
                if started is not None:
                    return started
            except NotSupported:
                pass  # `zero` writes zeros
        self.zero(offset, length, flags)
        return DONE

    def start_zero_runs(self, offset: int, length: int) -> Pending:
        """Start a query for the parts of the range that are known to read as zero; see `Node.zero_runs`."""
        self.require_inside(offset, length, "query zeros")
        return self.node.start_zero_runs(offset, length) if length else Done([])

    def zero_runs(self, offset: int, length: int) -> list[tuple[int, bool]]:
        """The parts of the range that are known to read as zero; see `Node.zero_runs`."""
        self.require_inside(offset, length, "query zeros")
        return self.node.zero_runs(offset, length) if length else []

    def _passes(self, offset: int, end: int, most: int, align: int) -> bool:
        """Whether a request may go to the driver unchanged and without an event."""
        size = self.node.size
        inside = 0 <= offset < end <= size and end - offset <= most and self.event is None
        return inside and offset % align == 0 and (end % align == 0 or end == size)

    def _start(self, start: Callable[..., Pending], *arguments: Any) -> Pending | None:
        """start(*arguments), a request that shares its range with others until it is finished, if the node needs an order;
        None if another thread waits for exclusive use of a range."""
        if not self._order:
            return start(*arguments)
        ranges = self.node.ranges
        return start_holding(ranges.start, ranges.finish, start, *arguments)

    def require_inside(self, offset: int, length: int, operation: str) -> None:
        """Raise OutOfRange unless the whole range is inside the node."""
        if length < 0 or offset < 0 or offset + length > self.node.size:
            self._bound(offset, offset + length, operation, grows=False)

    # -- implementation

    def _bound(self, offset: int, end: int, operation: str, *, grows: bool) -> int:
        """The number of bytes of the request that are inside the node; raises OutOfRange if the others are not allowed."""
        size = self.node.size
        if 0 <= offset <= end <= MAX_SIZE and grows:
            return max(min(end, size) - offset, 0)
        raise OutOfRange(
            f"the request is outside the {size} bytes of this node",
            path=self.node.filename,
            operation=operation,
            offset=offset,
            length=end - offset,
        )

    def _steps(self, offset: int, end: int, step: int) -> Iterator[tuple[int, int]]:
        """The request, cut at multiples of `step`. Each step locks its own range: a request that waits for one of its bytes,
        or for the tables of a format, waits for one step and not for all of them."""
        while offset < end:
            stop = min(offset - offset % step + step, end)
            yield offset, stop
            offset = stop
            if offset < end:
                self.checkpoint()

    def _ordered(self, offset: int, end: int, exclusive: bool, work: Callable[..., None], *arguments: Any) -> None:
        """Call `work(*arguments)` while this request has [offset, end) locked, if the node needs an order."""
        unit = self._order
        if not unit:
            work(*arguments)
            return
        ranges = self.node.ranges
        hold = ranges.exclusive if exclusive else ranges.shared
        hold(offset - offset % unit, end + -end % unit, work, *arguments)

    def _copy_pieces(self, offset: int, source: HostFile, source_offset: int, length: int, flags: int) -> None:
        step, at, end = self._max_transfer, offset, offset + length
        while at < end:
            stop = min(at + step - at % step, end)
            self.node.copy_from(at, source, source_offset + at - offset, stop - at, flags)
            at = stop

    def _blocks(self, offset: int, end: int, align: int) -> Iterator[tuple[int, int]]:
        """The request, cut at the first and the last multiple of `align` inside it: head, whole blocks, tail."""
        first = min(align_up(offset, align), end)
        last = max(align_down(end, align), first)
        if offset < first:
            yield offset, first
        if first < last:
            yield first, last
        if last < end:
            yield last, end

    def _block_end(self, end: int) -> int:
        """The end of the block around `end`: a multiple of the alignment, or the end of the node. Past the end of growable
        storage it is always the multiple."""
        up = align_up(end, self._align)
        size = self.node.size
        return size if end <= size < up else up

    def _read_aligned(self, offset: int, view: memoryview) -> None:
        step = self._max_transfer
        for at in range(0, len(view), step):
            self.node.read_into(offset + at, view[at : at + step])

    def _read_block(self, lo: int) -> memoryview:
        """One aligned block, with zeros past the end of the node."""
        block = memoryview(bytearray(self._align))
        inside = min(self._align, max(self.node.size - lo, 0))
        if inside:
            self._read_aligned(lo, block[:inside])
        return block

    def _read_unaligned(self, offset: int, view: memoryview) -> None:
        align = self._align
        end = offset + len(view)
        for lo, hi in self._blocks(offset, end, align):
            part = view[lo - offset : hi - offset]
            if lo % align == 0 and (hi % align == 0 or hi == self.node.size):
                self._read_aligned(lo, part)
            else:
                start = align_down(lo, align)
                part[:] = self._read_block(start)[lo - start : hi - start]

    def _write_ordered(self, offset: int, view: memoryview, flags: int) -> None:
        align, end = self._align, offset + len(view)
        rmw = align != 1 and bool(offset & (align - 1) or (end & (align - 1) and end != self.node.size))
        write = self._write_unaligned if rmw else self._write_aligned if self.event is None else self._write_heard
        self._ordered(offset, end, rmw or self._reads_wait, write, offset, view, flags)

    def _write_aligned(self, offset: int, view: memoryview, flags: int) -> None:
        step = self._max_transfer
        if len(view) <= step:
            self.node.write(offset, view, flags)
            return
        # Cut at multiples of `step`, a multiple of 512: no block is split.
        at = 0
        while at < len(view):
            stop = min(at + step - (offset + at) % step, len(view))
            self.node.write(offset + at, view[at:stop], flags)
            at = stop

    def _write_heard(self, offset: int, view: memoryview, flags: int) -> None:
        self.tell("pwritev")
        try:
            self._write_aligned(offset, view, flags)
        finally:
            self.tell("pwritev_done")

    def _is_aligned(self, lo: int, hi: int) -> bool:
        return lo % self._align == 0 and (hi % self._align == 0 or hi == self.node.size)

    def _read_edges(self, offset: int, end: int, lo: int, hi: int) -> tuple[memoryview, memoryview]:
        """The bytes before `offset` and after `end` in their blocks; a block that contains both is read once."""
        start = align_down(end, self._align)
        edges = [("head", lo)] if offset > lo else []
        if hi > end:
            edges.append(("tail", start))
        blocks: dict[int, memoryview] = {}
        # Adjacent blocks are read with one request, unless the node observes each one.
        for near in [edges] if start <= lo + self._align else [edges[:1], edges[1:]]:
            for name, _ in near:
                self.tell(f"pwritev_rmw_{name}")
            for _, at in near:
                if at not in blocks:
                    blocks[at] = self._read_block(at)
            for name, _ in near:
                self.tell(f"pwritev_rmw_after_{name}")
        head = blocks[lo][: offset - lo] if offset > lo else _ZEROS[:0]
        tail = blocks[start][end - start : hi - start] if hi > end else _ZEROS[:0]
        return head, tail

    def _write_unaligned(self, offset: int, view: memoryview, flags: int) -> None:
        """Read-modify-write. Both edge blocks are read before the first write: a failed read fails the whole write, and every
        adjacent byte stays unchanged."""
        end = offset + len(view)
        lo, hi = align_down(offset, self._align), self._block_end(end)
        head, tail = self._read_edges(offset, end, lo, hi)
        self.tell("pwritev")
        try:
            self._write_merged(lo, hi, head, view, tail, flags)
        finally:
            self.tell("pwritev_done")

    def _write_merged(self, lo: int, hi: int, head: memoryview, view: memoryview, tail: memoryview, flags: int) -> None:
        align = self._align
        offset, end = lo + len(head), hi - len(tail)
        first = lo + align if head else lo
        last = align_down(end, align) if tail else hi
        if hi - lo <= _BOUNCE or first >= last:
            self._write_aligned(lo, memoryview(b"".join((head, view, tail))), flags)
            return
        if head:
            self._write_aligned(lo, memoryview(b"".join((head, view[: first - offset]))), flags)
        self._write_aligned(first, view[first - offset : last - offset], flags)
        if tail:
            self._write_aligned(last, memoryview(b"".join((view[last - offset :], tail))), flags)

    def _widen(self, lo: int, hi: int) -> tuple[int, int] | None:
        """The aligned range to zero for [lo, hi): the range itself, or its whole block if the rest of the block reads as zero
        already (zeroing a corner of an empty cluster then allocates nothing); None if zeros must be written. Over a filter
        the block is that of its requests: a longer block, which the filter only prefers, would change bytes outside the
        request."""
        size = self.node.size
        unit = self._zero_align if self.node.widens_zero else self._align
        start, stop = align_down(lo, unit), align_up(hi, unit)
        if stop > size >= hi:
            stop = size
        if start % self._zero_align or (stop % self._zero_align and stop != size):
            return None
        # Ask this edge, not the node: past the end of growable storage all bytes are zero, and the node is not asked.
        if start < lo and not self.reads_zero(start, lo - start):
            return None
        if hi < stop and not self.reads_zero(hi, stop - hi):
            return None
        return start, stop

    def _zero_step(self, lo: int, hi: int, flags: int) -> None:
        """Zero a range that fits in one request of the driver. The caller has locked the range."""
        for start, stop in self._blocks(lo, hi, self._zero_align):
            wide = self._widen(start, stop)
            if wide is None:
                if flags & NO_FALLBACK:
                    raise NotSupported("not aligned for a fast zero", node=self.node.name, operation="zero", offset=lo)
                self._write_zeros(start, stop, flags & FUA)
            else:
                try:
                    self.node.zero(wide[0], wide[1] - wide[0], flags)
                except NotSupported:
                    if flags & NO_FALLBACK:
                        raise
                    self._write_zeros(*wide, flags & FUA)
            flags &= ~NO_FALLBACK  # bytes have changed: the rest must succeed

    def _write_zeros(self, lo: int, hi: int, flags: int) -> None:
        # The range is locked already, so call the driver and not `write`. The cuts are at whole blocks: only the two ends are
        # merged with adjacent bytes.
        align = self._align
        step = max(_BOUNCE, align)
        at = lo
        while at < hi:
            stop = min(at - at % step + step, hi)
            part = _ZEROS[: stop - at] if stop - at <= _BOUNCE else memoryview(bytes(stop - at))
            if (at % align) or (stop % align and stop != self.node.size):
                self._write_unaligned(at, part, flags)
            else:
                self._write_aligned(at, part, flags)
            at = stop
