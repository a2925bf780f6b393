"""The ends of a copy: where bytes come from and where they go. Files and other storage, NBD exports, pipes.

Requests are started and waited for. An export has many on their way at once, over its connections, from a single thread; what
a file is asked is done when `start_...` returns. All offsets and lengths are bytes. Used by `copy` alone, from one thread.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import BlockIOError, OptionError
from ..image import Image
from ..limits import GIB, MIB
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
        asked = client.start_block_status(at, size - at) if at < size else None
        while asked is not None:
            extents: list[tuple[int, int]] = asked.wait()[wire.BASE_ALLOCATION]
            end = at + sum(length for length, _ in extents)
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

    def flush(self) -> None:
        self._client.flush()

    def resize(self, size: int) -> None:
        pass

    def close(self) -> None:
        self._image.close()


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
