"""The ends of a copy: where bytes come from and where they go. Files and other storage, NBD exports, pipes.

Requests are started and waited for. An export has many on their way at once, over its connections, from a single thread; what
a file is asked is done when `start_...` returns. All offsets and lengths are bytes. Used by `copy` alone, from one thread.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import BlockIOError, LaminaError, OptionError
from ..image import Image
from ..limits import GIB, KIB, MIB
from ..nbd import wire
from ..nbd.node import NbdStorage
from ..node import MAY_UNMAP

if TYPE_CHECKING:
    from ..nbd import Client
    from ..node import Node
    from ..request import Child

#: A part of the source: offset, length, and whether it is known to read as zero.
Part = tuple[int, int, bool]

#: The longest request to make zero, so that progress is told.
_MOST_ZERO = 1 * GIB
_ZEROS = memoryview(bytes(1 * MIB))
#: An export is asked whether it reads as zero where at least so many bytes are to become zero...
_WORTH_ASKING = 64 * KIB
#: ... and no longer once it was asked so often, and its answers told of less than 1 MiB each.
_FREE_QUESTIONS = 256


class Wait(Protocol):
    """A request that was started."""

    def wait(self) -> Any:
        """Until it is done; raises the LaminaError that it failed with, each time that it is asked."""


class _Done:
    def wait(self) -> None:
        pass


#: A request that is done already.
DONE = _Done()


class Source(Protocol):
    """Where bytes come from, by offset. (A pipe is none: `PipeSource`.)"""

    name: str
    size: int

    def parts(self, begin: int) -> Iterator[Part]:
        """All from `begin` to the end, in order."""

    def start_read(self, offset: int, view: memoryview) -> Wait:
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

    def start_write(self, offset: int, view: memoryview) -> Wait:
        """Begin to write `view`, which must not change until it is done."""

    def start_zero(self, offset: int, length: int) -> Wait:
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
    """An opened image, which this closes: a file, a block device, or whatever lies over one. `extents`: skip its holes."""

    def __init__(self, image: Image, *, extents: bool = True) -> None:
        self._image = image
        self._extents = extents
        self.name = image.filename
        self.size = image.size

    @property
    def node(self) -> Node:
        return self._image.node

    def parts(self, begin: int) -> Iterator[Part]:
        size = self._image.size
        if not self._extents:
            if begin < size:
                yield begin, size - begin, False
            return
        from .windows import windows

        for found in windows(self._image, begin, size):
            yield from zip(found.start.tolist(), found.length.tolist(), found.zero.tolist(), strict=True)

    def start_read(self, offset: int, view: memoryview) -> Wait:
        self._image.read_into(offset, view)
        return DONE

    def close(self) -> None:
        self._image.close()


class ExportSource:
    """An export, through a client that this closes. `extents`: ask where its holes are, if the server tells."""

    def __init__(self, client: Client, *, extents: bool = True) -> None:
        self._client = client
        self._extents = extents and wire.BASE_ALLOCATION in client.contexts
        self.name = str(client.target)
        self.size = client.size

    def parts(self, begin: int) -> Iterator[Part]:
        client, at, size = self._client, begin, self._client.size
        if not self._extents:
            if at < size:
                yield at, size - at, False
            return
        answers = 0
        asked = client.start_block_status(at, size - at) if at < size else None
        while asked is not None:
            extents: list[tuple[int, int]] = asked.wait()[wire.BASE_ALLOCATION]
            end = at + sum(length for length, _ in extents)
            answers += 1
            if end < size and answers > _FREE_QUESTIONS + (end - begin) // (64 * KIB):
                # Answers so short cost more than reading.
                for length, status in extents:
                    yield at, length, bool(status & wire.STATE_ZERO)
                    at += length
                yield end, size - end, False
                return
            # The next answer comes while this one is worked on.
            asked = client.start_block_status(end, size - end) if end < size else None
            for length, status in extents:
                yield at, length, bool(status & wire.STATE_ZERO)
                at += length

    def start_read(self, offset: int, view: memoryview) -> Wait:
        return self._client.start_read(offset, view)

    def close(self) -> None:
        self._client.close()


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
    forgets = False

    def __init__(self, child: Child, name: str, *, blank: bool, grows: bool, allocated: bool = False) -> None:
        self._child = child
        self._grows = grows
        self._flags = 0 if allocated else MAY_UNMAP
        self.name = name
        self.blank = blank and not allocated
        self.block = child.node.limits.request_alignment
        self.size = None if grows else child.size

    def start_write(self, offset: int, view: memoryview) -> Wait:
        self._child.write(offset, view)
        return DONE

    def start_zero(self, offset: int, length: int) -> Wait:
        if self._grows and offset + length > self._child.size:
            self._child.truncate(offset + length)
        self._child.zero(offset, length, self._flags)
        return DONE

    def to_zero(self, offset: int, length: int) -> list[tuple[int, int]]:
        known = self._flags and self._child.reads_zero(offset, length)
        return [] if known else [(offset, length)]

    def forget(self) -> None:
        pass

    def flush(self) -> None:
        below = self._child.node.children.get("image") if self._grows else None
        (below or self._child).flush()  # a file that is being made lies under `creation.Unsynced`

    def resize(self, size: int) -> None:
        if self._grows and self._child.size != size:
            self._child.truncate(size)

    def close(self) -> None:
        self._child.close()


class ExportTarget:
    """An export, through a client that this closes. `reconnects`: the client makes lost connections anew."""

    ordered = False

    def __init__(self, client: Client, *, blank: bool, allocated: bool = False, reconnects: bool = False) -> None:
        self._client = client
        self._image = Image(NbdStorage(client))
        self._allocated = allocated
        self.name = str(client.target)
        self.blank = blank and not allocated
        self.block = client.minimum
        self.size: int | None = client.size
        self.forgets = reconnects
        asks = not (blank or allocated) and wire.BASE_ALLOCATION in client.contexts
        self._status = _Status(client, self.block) if asks else None

    def start_write(self, offset: int, view: memoryview) -> Wait:
        end = offset + len(view)
        if end % self.block and end != self.size:
            # The source ends inside a block of the target, whose rest stays as it is.
            self._image.write(offset, view)
            return DONE
        return self._client.start_write(offset, view)

    def start_zero(self, offset: int, length: int) -> Wait:
        end = offset + length
        if not self._client.can_zero or (end % self.block and end != self.size):
            self._image.zero(offset, length, unmap=not self._allocated)
            return DONE
        return self._client.start_zero(offset, length, no_hole=self._allocated)

    def to_zero(self, offset: int, length: int) -> list[tuple[int, int]]:
        return [(offset, length)] if self._status is None else self._status.not_zero(offset, length)

    def forget(self) -> None:
        if self._status is not None:
            self._status.forget()

    def flush(self) -> None:
        self._client.flush()

    def resize(self, size: int) -> None:
        pass

    def close(self) -> None:
        self._image.close()


class _Status:
    """What an export reads as, asked as a copy comes along. Parts are whole blocks of `block` bytes."""

    def __init__(self, client: Client, block: int) -> None:
        self._client = client
        self._block = block
        self._asking = True
        self._asked = self._told = 0  # questions, and bytes that were told of
        self.forget()

    def forget(self) -> None:
        #: (end, whether it reads as zero) of stretches that follow each other from `_begin` to `_end`.
        self._runs: deque[tuple[int, bool]] = deque()
        self._begin = self._end = 0
        self._next: Any = None  # the question about what follows `_end`

    def not_zero(self, offset: int, length: int) -> list[tuple[int, int]]:
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
        """Learn what follows `at`. False where the server does not say, or in so small parts that to ask costs more than it
        can save."""
        if not self._asking:
            return False
        asked = self._next if at == self._end else None
        self.forget()
        self._begin = self._end = at
        try:
            asked = asked or self._client.start_block_status(at, self._client.size - at)
            told: list[tuple[int, int]] = asked.wait()[wire.BASE_ALLOCATION]
            for length, flags in told:
                self._end += length
                zero = bool(flags & wire.STATE_ZERO)
                if self._runs and self._runs[-1][1] == zero:
                    self._runs.pop()
                self._runs.append((self._end, zero))
            self._asked += 1
            self._told += self._end - at
            self._asking = self._asked < _FREE_QUESTIONS + self._told // MIB
            if len(self._runs) == 1 and self._runs[0][1] and self._end < self._client.size:
                # Much of it is empty: the next answer comes while this one is worked on.
                self._next = self._client.start_block_status(self._end, self._client.size - self._end)
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

    def start_write(self, offset: int, view: memoryview) -> Wait:
        try:
            while len(view):
                view = view[os.write(self._fd, view) :]
        except BrokenPipeError:
            raise  # whoever reads there has enough: the command line ends quietly
        except OSError as error:
            raise BlockIOError.from_os(error, "cannot write", path=self.name) from error
        return DONE

    def start_zero(self, offset: int, length: int) -> Wait:
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


def on_grid(parts: Iterator[Part], begin: int, block: int, request: int) -> Iterator[Part]:
    """The same parts for a target that takes whole blocks: a block that holds anything is read, so that zeros begin and end
    at multiples of `block`; and none is longer than one request: data is cut at multiples of `request`, itself one of
    `block`."""
    at = end = begin  # what lies between was not handed on yet: data that ends inside a block
    for offset, length, zero in parts:
        end = offset + length
        if zero:
            lo = offset + -offset % block
            hi = end - end % block
            if hi > lo:
                yield from _cut(at, lo, request, False)
                yield from _cut(lo, hi, _MOST_ZERO, True)
                at = hi
        else:
            hi = end - end % block
            if hi > at:
                yield from _cut(at, hi, request, False)
                at = hi
    yield from _cut(at, end, request, False)


def _cut(begin: int, end: int, most: int, zero: bool) -> Iterator[Part]:
    while begin < end:
        stop = min(begin - begin % most + most, end)
        yield begin, stop - begin, zero
        begin = stop
