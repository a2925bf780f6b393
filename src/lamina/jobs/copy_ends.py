"""The ends of a copy: where bytes come from and where they go. Storage of any kind, and pipes.

Requests are started and waited for (`lamina.pending`). Storage that is far away has many on their way at once, from a single
thread; what a file is asked is done when `start_...` returns. All offsets and lengths are bytes. Used by `copy` alone, from
one thread.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from ..errors import BlockIOError, LaminaError, OptionError
from ..limits import GIB, KIB, MIB
from ..node import MAY_UNMAP, Node, StorageNode
from ..pending import DONE, Pending

if TYPE_CHECKING:
    from ..image import Image
    from ..request import Child

#: A part of the source: offset, length, and whether it is known to read as zero.
Part = tuple[int, int, bool]

#: The longest request to make zero, so that progress is told.
_MOST_ZERO = 1 * GIB
_ZEROS = memoryview(bytes(1 * MIB))
#: A target is asked whether it reads as zero where at least so many bytes are to become zero...
_WORTH_ASKING = 64 * KIB
#: ... and no longer once it was asked so often, and its answers told of less than 1 MiB each. Likewise a source, where
#: they tell of less than 64 KiB.
_FREE_QUESTIONS = 256


class Source(Protocol):
    """Where bytes come from, by offset. (A pipe is none: `PipeSource`.)"""

    name: str
    size: int

    def parts(self, begin: int) -> Iterator[Part]:
        """All from `begin` to the end, in order."""

    def start_read(self, offset: int, view: memoryview) -> Pending:
        """Begin to fill `view`."""

    def close(self) -> None: ...


class Target(Protocol):
    """Where bytes go. Requests begin and end at multiples of `block`, or at the end of the source. `blank`: it reads as zero
    where nothing was written. `ordered`: everything must come in order. `forgets`: its flush may fail because what was
    written before was lost with a connection, and succeed once it was written again. `size`: room for so many bytes; None:
    for any number."""

    name: str
    block: int
    size: int | None
    blank: bool
    ordered: bool
    forgets: bool

    def start_write(self, offset: int, view: memoryview) -> Pending:
        """Begin to write `view`, which must not change until it is done."""

    def start_zero(self, offset: int, length: int) -> Pending:
        """Begin to make these bytes zero."""

    def to_zero(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Which of these bytes must be made zero, as (offset, length): all that are not known to read as zero already. It is
        asked in the order of the disk, before anything was written there."""

    def forget(self) -> None:
        """What was written since the last flush may be lost: so is what `to_zero` knew."""

    def flush(self) -> None:
        """All that is done is on stable storage on return."""

    def resize(self, size: int) -> None:
        """The source has so many bytes: a file becomes as long, anything else has its own size."""

    def close(self) -> None: ...


class StorageSource:
    """The bytes of an image: a file, a block device, an export of a server, or a graph over one. It has a root of its own, so
    that the image may be used and closed meanwhile. `extents`: skip the holes."""

    def __init__(self, image: Image, *, extents: bool = True) -> None:
        self._image = image.share()
        self._extents = extents
        self.name = image.filename
        self.size = image.size

    @property
    def node(self) -> Node:
        return self._image.node

    def parts(self, begin: int) -> Iterator[Part]:
        root, at, size = self._image.root, begin, self.size
        answers = 0
        asked = root.start_zero_runs(at, size - at) if self._extents and at < size else None
        while asked is not None:
            runs: list[tuple[int, bool]] = asked.wait()
            end = at + sum(length for length, _ in runs)
            answers += 1
            # The next answer comes while this one is worked on; but answers so short cost more than reading.
            worth = answers <= _FREE_QUESTIONS + (end - begin) // (64 * KIB)
            asked = root.start_zero_runs(end, size - end) if end < size and worth else None
            for length, zero in runs:
                yield at, length, zero
                at += length
        if at < size:
            yield at, size - at, False

    def start_read(self, offset: int, view: memoryview) -> Pending:
        return self._image.root.start_read(offset, view)

    def close(self) -> None:
        self._image.close()


class PipeSource:
    """Bytes as they come through the descriptor `fd`, which stays open."""

    def __init__(self, fd: int, name: str = "-") -> None:
        self._fd = fd
        self.name = name

    def fill(self, view: memoryview) -> int:
        """Fill `view` with what comes next; the number of bytes that came is smaller at the end alone."""
        done = 0
        try:
            while done < len(view):
                count = os.readv(self._fd, [view[done:]])
                if not count:
                    break
                done += count
        except OSError as error:
            raise BlockIOError.from_os(error, "cannot read", path=self.name) from error
        return done

    def close(self) -> None:
        pass


class StorageTarget:
    """Storage behind an edge, which this closes. `grows`: a file that becomes as long as the source is; else there must be
    room. `allocated`: zeros take up room."""

    ordered = False

    def __init__(self, child: Child, name: str, *, blank: bool, grows: bool, allocated: bool = False) -> None:
        self._child = child
        self._grows = grows
        self._flags = 0 if allocated else MAY_UNMAP
        self.name = name
        self.blank = blank and not allocated
        self.block = child.node.limits.request_alignment
        self.size = None if grows else child.size
        self.forgets = _reconnects(child.node)
        self._zeros = None if self.blank or allocated or grows else _KnownZeros(child, self.block)

    @property
    def node(self) -> Node:
        return self._child.node

    def start_write(self, offset: int, view: memoryview) -> Pending:
        return self._child.start_write(offset, view)

    def start_zero(self, offset: int, length: int) -> Pending:
        if self._grows and offset + length > self._child.size:
            self._child.truncate(offset + length)
        return self._child.start_zero(offset, length, self._flags)

    def to_zero(self, offset: int, length: int) -> list[tuple[int, int]]:
        return [(offset, length)] if self._zeros is None else self._zeros.others(offset, length)

    def forget(self) -> None:
        if self._zeros is not None:
            self._zeros.forget()

    def flush(self) -> None:
        below = self._child.node.children.get("image") if self._grows else None
        (below or self._child).flush()  # a file that is being made lies under `creation.Unsynced`

    def resize(self, size: int) -> None:
        if self._grows and self._child.size != size:
            self._child.truncate(size)

    def close(self) -> None:
        self._child.close()


def _reconnects(node: Node) -> bool:
    """Whether some storage below `node` makes lost connections anew."""
    if isinstance(node, StorageNode) and node.reconnects:
        return True
    return any(_reconnects(child.node) for child in node.children.values())


class _KnownZeros:
    """What a target reads as, asked as a copy comes along. Parts are whole blocks of `block` bytes."""

    def __init__(self, child: Child, block: int) -> None:
        self._child = child
        self._size = child.size
        self._block = block
        self._asking = True
        self._asked = self._told = 0  # questions, and bytes that were told of
        self.forget()

    def forget(self) -> None:
        #: (end, whether it reads as zero) of stretches that follow each other from `_begin` to `_end`.
        self._runs: deque[tuple[int, bool]] = deque()
        self._begin = self._end = 0
        self._next: Pending | None = None  # the question about what follows `_end`

    def others(self, offset: int, length: int) -> list[tuple[int, int]]:
        """The parts of these bytes that are not known to read as zero."""
        found: list[tuple[int, int]] = []
        at, end = offset, offset + length
        while at < end:
            if not self._begin <= at < self._end and not (end - at >= _WORTH_ASKING and self._ask(at)):
                self._append(found, offset, at, end, end)
                break
            while self._runs[0][0] <= at:
                self._begin = self._runs.popleft()[0]
            stop, zero = self._runs[0]
            stop = min(stop, end)
            if not zero:
                self._append(found, offset, at, stop, end)
            at = stop
        return found

    def _append(self, found: list[tuple[int, int]], offset: int, lo: int, hi: int, end: int) -> None:
        """Whole blocks around [lo, hi), as far as [offset, end) reaches, which begins with one."""
        lo -= (lo - offset) % self._block
        hi = min(hi + -(hi - offset) % self._block, end)
        if found and sum(found[-1]) >= lo:
            lo = found.pop()[0]
        found.append((lo, hi - lo))

    def _ask(self, at: int) -> bool:
        """Learn what follows `at`. False where the target does not say, or in so small parts that to ask costs more than it
        can save."""
        if not self._asking:
            return False
        asked = self._next if at == self._end else None
        self.forget()
        self._begin = self._end = at
        try:
            asked = asked or self._child.start_zero_runs(at, self._size - at)
            told: list[tuple[int, bool]] = asked.wait()
            for length, zero in told:
                self._end += length
                if self._runs and self._runs[-1][1] == zero:
                    self._runs.pop()
                self._runs.append((self._end, zero))
            self._asked += 1
            self._told += self._end - at
            self._asking = self._asked < _FREE_QUESTIONS + self._told // MIB
            if len(self._runs) == 1 and self._runs[0][1] and self._end < self._size:
                # Much of it is empty: the next answer comes while this one is worked on.
                self._next = self._child.start_zero_runs(self._end, self._size - self._end)
        except LaminaError:
            self._asking = False  # nothing is lost by not knowing
        return self._end > at


class PipeTarget:
    """Bytes as they go through the descriptor `fd`, which stays open, in order."""

    block = 1
    size: int | None = None
    blank = False
    ordered = True
    forgets = False

    def __init__(self, fd: int, name: str = "-") -> None:
        self._fd = fd
        self.name = name

    def start_write(self, offset: int, view: memoryview) -> Pending:
        try:
            while len(view):
                view = view[os.write(self._fd, view) :]
        except BrokenPipeError:
            raise  # whoever reads there has enough: the command line ends quietly
        except OSError as error:
            raise BlockIOError.from_os(error, "cannot write", path=self.name) from error
        return DONE

    def start_zero(self, offset: int, length: int) -> Pending:
        while length:
            count = min(length, len(_ZEROS))
            self.start_write(offset, _ZEROS[:count])
            length -= count
        return DONE

    def to_zero(self, offset: int, length: int) -> list[tuple[int, int]]:
        return [(offset, length)]

    def forget(self) -> None:
        pass

    def flush(self) -> None:
        raise OptionError("a pipe cannot be flushed", path=self.name, hint="leave --flush out")

    def resize(self, size: int) -> None:
        pass

    def close(self) -> None:
        pass


def on_grid(parts: Iterator[Part], begin: int, block: int, request: int, near: int = 0) -> Iterator[Part]:
    """The same parts for a target that takes whole blocks: a block that holds anything is read, so that zeros begin and end
    at multiples of `block`; and none is longer than one request: data is cut at multiples of `request`, itself one of
    `block`. Zeros of at most `near` bytes are read together with what lies beside them."""
    at = end = begin  # what lies between was not handed on yet: data, up to the end of a block and of a request
    for offset, length, zero in parts:
        end = offset + length
        if zero:
            lo = offset + -offset % block
            hi = end - end % block
            if hi - lo > near:
                yield from _cut(at, lo, request, False)
                yield from _cut(lo, hi, _MOST_ZERO, True)
                at = hi
        else:
            hi = end - end % request
            if hi > at:
                yield from _cut(at, hi, request, False)
                at = hi
    yield from _cut(at, end, request, False)


def _cut(begin: int, end: int, most: int, zero: bool) -> Iterator[Part]:
    while begin < end:
        stop = min(begin - begin % most + most, end)
        yield begin, stop - begin, zero
        begin = stop
