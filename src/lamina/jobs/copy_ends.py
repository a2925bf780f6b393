"""Sources and targets of a copy: storage of any kind, and pipes.

Requests are started and waited for later (`lamina.pending`): remote storage has many in flight from a single thread; requests
to a file are finished when `start_...` returns. All offsets and lengths are bytes. Only `copy` uses this module, from one
thread.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from ..capabilities import read_into, wait_for
from ..errors import BlockIOError, Hint, LaminaError, OptionError
from ..limits import GIB, KIB, MIB
from ..node import MAY_UNMAP, Node
from ..pending import DONE, Pending
from .requests import reconnects

if TYPE_CHECKING:
    from ..image import Image
    from ..request import Child
    from ..root import Root
    from .progress import Monitor

#: A part of the source: offset, length, and whether it is known to read as zero.
Part = tuple[int, int, bool]

#: A thread that waits for a pipe looks so often, in seconds, whether the job was cancelled.
_LOOK = 0.1
#: The longest request that zeroes, so that the job reports progress.
MOST_ZERO = 1 * GIB
_ZEROS = memoryview(bytes(1 * MIB))
#: The job queries the zeros of a target before it zeroes at least so many bytes...
_LEAST_QUERIED = 64 * KIB
#: ... until it has made so many queries whose results covered less than 1 MiB each. Queries of a source end when their
#: results covered less than 64 KiB each.
_FREE_QUERIES = 256


class Source(Protocol):
    """A source that is read by offset. (For a pipe see `PipeSource`.)"""

    name: str
    size: int

    def parts(self, begin: int) -> Iterator[Part]:
        """The parts from `begin` to the end, in order."""

    def start_read(self, offset: int, view: memoryview) -> Pending:
        """Start a read into `view`."""

    def close(self) -> None: ...


class Target(Protocol):
    """A target. Requests begin and end at multiples of `block`, or at the end of the source. `blank`: it reads as zero where
    nothing was written. `ordered`: requests must come in the order of their offsets. `forgets`: its flush may fail because
    earlier writes were lost with a connection, and succeeds when they are repeated. `size`: its capacity in bytes; None:
    unlimited."""

    name: str
    block: int
    size: int | None
    blank: bool
    ordered: bool
    forgets: bool

    def start_write(self, offset: int, view: memoryview) -> Pending:
        """Start a write of `view`, which must not change until the request is finished."""

    def start_zero(self, offset: int, length: int) -> Pending:
        """Start to make these bytes zero."""

    def to_zero(self, offset: int, length: int) -> list[tuple[int, int]]:
        """The parts of the range that must be made zero, as (offset, length): all not known to read as zero. Called
        in the order of offsets, before anything is written there."""

    def forget(self) -> None:
        """Writes since the last flush may be lost, so what `to_zero` knows is outdated."""

    def flush(self) -> None:
        """On return, all finished requests are on stable storage."""

    def resize(self, size: int) -> None:
        """The source has `size` bytes: a file gets this length; the size of any other target is fixed."""

    def close(self) -> None: ...


class StorageSource:
    """The bytes of an image: a file, a block device, an export of a server, or a graph over one. It has a root of its own, so
    that the image may be used and closed meanwhile; or with `owns`, that of the image, which it closes. `extents`: skip the
    holes."""

    def __init__(self, image: Image, *, extents: bool = True, owns: bool = False) -> None:
        self._extents = extents
        self.name = image.filename
        self.size = image.size
        self._image = image if owns else image.share()  # last, so that an interrupt cannot lose it

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
            # The next result arrives while this one is processed. But queries with such short results cost more than reads.
            worth = answers <= _FREE_QUERIES + (end - begin) // (64 * KIB)
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
    """The bytes of a pipe, read through the descriptor `fd`, which stays open. A thread that waits for bytes raises Cancelled
    when `monitor` is cancelled; without one only a signal ends the wait, in the main thread."""

    def __init__(self, fd: int, name: str = "-", monitor: Monitor | None = None) -> None:
        self._fd = fd
        self._monitor = monitor
        self.name = name

    def fill(self, view: memoryview) -> int:
        """Fill `view` with the next bytes, and return their number, which is smaller than `view` only at the end."""
        done = 0
        try:
            while done < len(view):
                if self._monitor is not None:
                    self._wait(self._monitor)
                count = read_into(self._fd, view[done:])
                if not count:
                    break
                done += count
        except OSError as error:
            raise BlockIOError.from_os(error, "cannot read", path=self.name) from error
        return done

    def _wait(self, monitor: Monitor) -> None:
        """Wait until there is something to read, or the end."""
        monitor.check()
        while not wait_for(self._fd, _LOOK):
            monitor.check()

    def close(self) -> None:
        pass


class StorageTarget:
    """Storage below an edge or a root, which `close` closes. `grows`: a file that gets the length of the source; other
    storage must be long enough. `allocated`: zeros are allocated."""

    ordered = False

    def __init__(self, child: Child | Root, name: str, *, blank: bool, grows: bool, allocated: bool = False) -> None:
        self._child = child
        self._grows = grows
        self._flags = 0 if allocated else MAY_UNMAP
        self.name = name
        self.blank = blank and not allocated
        self.block = child.node.limits.request_alignment
        self.size = None if grows else child.size
        self.forgets = reconnects(child.node)
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
        """Close the storage. After an interrupt, call it again."""
        self._child.close()


class _KnownZeros:
    """The zeros of a target, queried as a copy progresses. Parts are whole blocks of `block` bytes."""

    def __init__(self, child: Child | Root, block: int) -> None:
        self._child = child
        self._size = child.size
        self._block = block
        self._querying = True
        self._queries = self._covered = 0  # the number of queries, and the bytes that their results covered
        self.forget()

    def forget(self) -> None:
        #: (end, whether it reads as zero) of consecutive ranges from `_begin` to `_end`.
        self._runs: deque[tuple[int, bool]] = deque()
        self._begin = self._end = 0
        self._next: Pending | None = None  # the query for the range that follows `_end`

    def others(self, offset: int, length: int) -> list[tuple[int, int]]:
        """The parts of these bytes that are not known to read as zero."""
        found: list[tuple[int, int]] = []
        at, end = offset, offset + length
        while at < end:
            if not self._begin <= at < self._end and not (end - at >= _LEAST_QUERIED and self._query(at)):
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
        """Append the whole blocks around [lo, hi) that are in [offset, end), whose begin is aligned."""
        lo -= (lo - offset) % self._block
        hi = min(hi + -(hi - offset) % self._block, end)
        if found and sum(found[-1]) >= lo:
            lo = found.pop()[0]
        found.append((lo, hi - lo))

    def _query(self, at: int) -> bool:
        """Query the zeros from `at` on. False if the target does not tell, or in parts so small that queries cost more than
        they save."""
        if not self._querying:
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
            self._queries += 1
            self._covered += self._end - at
            self._querying = self._queries < _FREE_QUERIES + self._covered // MIB
            if len(self._runs) == 1 and self._runs[0][1] and self._end < self._size:
                # Much of the target is empty: the next result arrives while this one is processed.
                self._next = self._child.start_zero_runs(self._end, self._size - self._end)
        except LaminaError:
            self._querying = False  # without results the job makes zeros everywhere
        return self._end > at


class PipeTarget:
    """A pipe, written in order through the descriptor `fd`, which stays open."""

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
            raise  # the reader has closed the pipe: the command line ends without a message
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
        raise OptionError("a pipe cannot be flushed", path=self.name, hint=Hint("omit flush", command="omit --flush"))

    def resize(self, size: int) -> None:
        pass

    def close(self) -> None:
        pass


def on_grid(
    parts: Iterator[Part], begin: int, block: int, request: int, near: int = 0, most_zero: int = MOST_ZERO
) -> Iterator[Part]:
    """The same parts for a target that takes whole blocks. Zeros begin and end at multiples of `block`, since a block that
    has any data is read as a whole. No part is longer than one request: data is cut at multiples of `request`, which is a
    multiple of `block`. Zeros of at most `near` bytes are read together with their neighbours; longer ones are cut at
    multiples of `most_zero`."""
    at = end = begin  # [at, end) is data that was not yielded yet, up to the end of a block and of a request
    for offset, length, zero in parts:
        end = offset + length
        if zero:
            lo = offset + -offset % block
            hi = end - end % block
            if hi - lo > near:
                yield from _cut(at, lo, request, False)
                yield from _cut(lo, hi, most_zero, True)
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
