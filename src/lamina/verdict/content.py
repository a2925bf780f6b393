"""The bytes of the file under examination: any part of a file, and of a pipe what was kept while it passed by.

Of a pipe the first `HEAD` bytes, the last `TAIL` bytes and the parts that the judges ask for in advance stay in memory,
whatever its length. A judge that needs another part gets `NotKept`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from errno import EISDIR, ETIMEDOUT
from typing import ClassVar

from ..capabilities import O_CLOEXEC, O_NOCTTY, O_NONBLOCK, pread, preadv, read_into, wait_for, waits
from ..descriptors import open_into
from ..errors import BlockIOError, FormatError, NotFound, OptionError
from ..limits import KIB, MIB
from ..named_file import PATIENCE
from ..node import StorageNode
from ..request import Child
from ..schema import Schema

#: Bytes of a pipe that are kept: the first, which is as much as the longest first cluster of qcow2, and the last.
HEAD = 2 * MIB
TAIL = 4 * KIB
#: All parts of a pipe together that are kept besides these.
_KEPT = 512 * KIB
_STEP = 64 * KIB

#: What the judges want to be kept of a pipe: (offset, length), by its first bytes.
Wanted = Callable[[memoryview], Iterable[tuple[int, int]]]


class NotKept(FormatError):
    """A judge needs bytes in the middle of a pipe, which have passed by."""


class Content:
    """`name` is for messages, `size` the length in bytes. `close` it in the end."""

    def __init__(self, name: str, fd: int, size: int) -> None:
        self.name = name
        self.size = size
        self._fd = fd

    @classmethod
    @contextmanager
    def open(cls, path: str, wanted: Wanted) -> Iterator[Content]:
        """A context manager: the file, block device or FIFO at `path`. Raises NotFound, BlockIOError, OptionError for
        anything else."""
        fds: list[int] = []
        try:
            try:
                fd = open_into(fds, path, os.O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK)
            except OSError as error:
                raise (NotFound if isinstance(error, FileNotFoundError) else BlockIOError).from_os(
                    error, "it cannot be opened", path=path
                ) from error
            except ValueError as error:
                raise OptionError("this is no name of a file", path=path) from error
            yield cls.of(path, fd, wanted)
        finally:
            for fd in fds:
                os.close(fd)

    @classmethod
    def of(cls, name: str, fd: int, wanted: Wanted) -> Content:
        """What the open descriptor `fd` leads to. Of a pipe everything is read."""
        try:
            status = os.fstat(fd)
            mode = status.st_mode
            if stat.S_ISREG(mode):
                return cls(name, fd, status.st_size)
            if stat.S_ISBLK(mode):
                here = os.lseek(fd, 0, os.SEEK_CUR)
                size = os.lseek(fd, 0, os.SEEK_END)
                os.lseek(fd, here, os.SEEK_SET)
                return cls(name, fd, size)
            if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
                return Passed(name, fd, wanted)
        except BlockIOError:
            raise
        except OSError as error:
            raise BlockIOError.from_os(error, "it cannot be read", path=name) from error
        if stat.S_ISDIR(mode):
            raise BlockIOError("this is a folder", errno=EISDIR, path=name)
        raise OptionError("this is not a file, block device or pipe", path=name)

    def read(self, offset: int, length: int) -> bytes:
        """The bytes there, fewer at the end of the file. Raises BlockIOError, NotKept."""
        length = min(length, self.size - offset)
        if length <= 0:
            return b""
        try:
            return pread(self._fd, length, offset)
        except OSError as error:
            raise BlockIOError.from_os(error, "it cannot be read", path=self.name, offset=offset) from error

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view`, all of which is inside the file."""
        done = 0
        while done < len(view):
            try:
                count = preadv(self._fd, [view[done:]], offset + done)
            except OSError as error:
                raise BlockIOError.from_os(error, "it cannot be read", path=self.name, offset=offset) from error
            if not count:
                raise BlockIOError("the file became shorter", path=self.name, offset=offset + done)
            done += count

    def storage(self) -> Child:
        """The same as the storage of an image, for drivers that read headers. The caller closes it."""
        return Child(_Storage(self), "file")


class Passed(Content):
    """A pipe of which everything has been read."""

    def __init__(self, name: str, fd: int, wanted: Wanted) -> None:
        super().__init__(name, fd, 0)
        self._wait()
        head = bytearray(HEAD)
        self._parts: list[tuple[int, memoryview]] = []
        with memoryview(head) as whole:
            while self.size < HEAD:
                count = self._more(whole[self.size : self.size + _STEP])
                self.size += count
                if not count:
                    break
        del head[self.size :]
        self._parts.append((0, memoryview(head)))
        if self.size == HEAD:
            self._let_pass(head, wanted)

    def _let_pass(self, head: bytearray, wanted: Wanted) -> None:
        """Read the rest, and keep its end, and what is wanted of it."""
        places, left = [], _KEPT
        for offset, length in wanted(memoryview(head)):
            start, stop = max(offset, HEAD), offset + min(length, left)
            if start < stop:
                places.append((start, stop, bytearray()))
                left -= stop - start
        tail = head[-TAIL:]
        step = bytearray(_STEP)
        view = memoryview(step)
        while count := self._more(view):
            for start, stop, kept in places:
                low, high = max(start - self.size, 0), min(stop - self.size, count)
                if low < high:
                    kept += view[low:high]
            tail = (tail + view[max(count - TAIL, 0) : count])[-TAIL:]
            self.size += count
        self._parts += [(start, memoryview(kept)) for start, _, kept in places]
        self._parts.append((self.size - len(tail), memoryview(tail)))

    def _wait(self) -> None:
        """Wait for a first byte, or for the end: a FIFO without a writer would pass for an empty file."""
        if waits(self._fd):
            return  # the first read waits
        if not wait_for(self._fd, PATIENCE):
            raise BlockIOError(f"no process has written to it for {PATIENCE:g} s", errno=ETIMEDOUT, path=self.name)

    def _more(self, view: memoryview) -> int:
        """Read what comes next, and wait for it; the number of bytes, 0 at the end."""
        while True:
            try:
                return read_into(self._fd, view)
            except BlockingIOError:  # the descriptor does not wait by itself
                wait_for(self._fd, None)

    def read(self, offset: int, length: int) -> bytes:
        found = bytearray(max(min(length, self.size - offset), 0))
        self.read_into(offset, memoryview(found))
        return bytes(found)

    def read_into(self, offset: int, view: memoryview) -> None:
        at = 0
        while at < len(view):
            found = next(
                (part[offset + at - start :] for start, part in self._parts if 0 <= offset + at - start < len(part)),
                None,
            )
            if found is None:
                raise NotKept("a part in the middle decides, which a pipe does not keep", path=self.name, offset=offset)
            count = min(len(found), len(view) - at)
            view[at : at + count] = found[:count]
            at += count


class _Storage(StorageNode):
    """The content as a node, for reading."""

    driver: ClassVar[str] = "inspected"
    schema: ClassVar[Schema] = Schema("inspected", [])

    def __init__(self, content: Content) -> None:
        super().__init__(read_only=True)
        self._content = content

    @property
    def size(self) -> int:
        return self._content.size

    @property
    def filename(self) -> str:
        return self._content.name

    def read_into(self, offset: int, view: memoryview) -> None:
        self._content.read_into(offset, view)
