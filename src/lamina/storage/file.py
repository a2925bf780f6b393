"""The driver `file`: a regular file or a block device, reached with positioned reads and writes.

All operations are single system calls that carry their own offset, so any number of threads may run them at once. Holes
come from SEEK_DATA and SEEK_HOLE, zeroing and discarding from fallocate. With `cache.direct` requests go around the
page cache, through aligned buffers (`DirectFileStorage`).
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
from array import array
from collections.abc import Callable
from operator import length_hint
from os import preadv, pwritev
from typing import TYPE_CHECKING, Any, ClassVar, Self

from ..errors import BlockIOError, Closed, LaminaError, NotSupported, OptionError
from ..limits import MAX_ROWS, MIB, Limits, align_down, align_up
from ..node import FUA, MAY_UNMAP, NO_FALLBACK, StorageNode, bounded, fill_zero, plain
from ..schema import Option, Schema
from . import aligned, locks, system
from .opening import open_file, path_of, require_file
from .system import fallocate as _libc_fallocate

if TYPE_CHECKING:
    from ..extents import Extents, HostFile
    from ..graph import Opener

_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 1, 2, 16

_RWF_DSYNC = getattr(os, "RWF_DSYNC", 0)

_HINTS = {
    errno.ENOSPC: "free some space there, then try again",
    errno.EDQUOT: "free some space there, then try again",
    errno.EFBIG: "the file system or a limit of this process allows no file of that size",
}

_CACHE = Schema("cache", [Option("direct", "bool", "go around the page cache of the system (O_DIRECT)", default=False)])


class FileStorage(StorageNode):
    """A file. `size` is tracked: writes past the end make a regular file longer. What another program does to the
    length meanwhile is not noticed, except that what it cut off reads as zeros."""

    driver: ClassVar[str] = "file"
    schema: ClassVar[Schema] = Schema(
        "file",
        [
            Option("filename", "str", "the file or block device", required=True),
            Option(
                "locking",
                "enum",
                "keep others from using the file in ways that exclude this one; auto: where its file system can",
                choices=("auto", "on", "off"),
                default="auto",
            ),
            Option("cache", "dict", "how the file is cached", items=_CACHE),
        ],
    )
    supported_flags = FUA if _RWF_DSYNC else 0
    _cached = True  # by the page cache

    def __init__(self, fd: int, filename: str, *, name: str | None = None, read_only: bool = False) -> None:
        """The file behind the descriptor `fd`, which belongs to this node from now on."""
        super().__init__(name=name, read_only=read_only)
        self._fd = fd
        #: Closes `fd` when it is asked for its next element, once: one step, which no interrupt cuts in two.
        self._open_fds = iter((fd,))
        self._give_back = map(os.close, self._open_fds)
        self._filename = filename
        self.path = path_of(fd, filename)
        status = os.fstat(fd)
        self.identity = (status.st_dev, status.st_ino)
        self._regular = stat.S_ISREG(status.st_mode)
        self._size = status.st_size if self._regular else os.lseek(fd, 0, os.SEEK_END)
        self._block = 1 if self._regular else aligned.logical_block_size(fd)
        # Held by whatever changes the file's length: a write that appends and a truncation must not cross.
        self._growing = threading.Lock()
        self._missing: set[int] = set()  # modes of fallocate that this file does not have
        self._lost: OSError | None = None  # why a flush failed

    @classmethod
    def open(cls, options: dict[str, Any], opener: Opener) -> Self:
        """Open `filename`, or take a copy of the descriptor `opener.fd`. Raises NotFound, Locked, BlockIOError."""
        filename = options["filename"]
        direct = bool((options.get("cache") or {}).get("direct"))
        writing = not opener.read_only
        if opener.force_share and writing:
            raise OptionError(
                "force-share is only for reading", path=filename, hint="open it read-only, or without force-share"
            )
        fd = open_file(filename, writing) if opener.fd is None else os.dup(opener.fd)
        try:
            require_file(os.fstat(fd).st_mode, filename)
            locking = options.get("locking", "auto")
            if locking != "off" and not opener.force_share:
                locks.acquire(
                    fd,
                    writing=writing,
                    path=filename,
                    required=locking == "on",
                    taken=opener.taken,
                    withheld=opener.unshared,
                )
            kind: type[FileStorage] = DirectFileStorage if direct and cls is FileStorage else cls
            try:
                return kind(fd, filename, name=opener.name, read_only=opener.read_only)  # type: ignore[return-value]
            except OSError as error:
                if isinstance(error, LaminaError):
                    raise
                raise BlockIOError.from_os(error, path=filename, operation="open") from error
        except BaseException:
            os.close(fd)
            raise

    # -- what it is

    @property
    def size(self) -> int:
        return self._size

    @property
    def growable(self) -> bool:
        return self._regular

    @property
    def limits(self) -> Limits:
        return Limits(zero_alignment=self._block, discard_alignment=self._block)

    @property
    def filename(self) -> str:
        return self._filename

    @property
    def allocated(self) -> int:
        """The bytes of storage that the file takes up; may be less than its size (holes) or more."""
        try:
            return os.fstat(self._fd).st_blocks * 512
        except OSError as error:
            raise self._failed(error, "stat") from error

    @property
    def has_other_writer(self) -> bool:
        """Whether another open of the file, in any program, is known by its lock to write to it now."""
        return locks.in_use_for_writing(self._fd)

    # -- what it does

    @plain
    def read_into(self, offset: int, view: memoryview) -> None:
        try:
            done = preadv(self._fd, (view,), offset)
            if done != len(view):
                self._read_rest(offset, view, done)
        except OSError as error:
            raise self._failed(error, "read", offset, len(view)) from error

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        end = offset + len(view)
        if end > self._size:
            self._grow(end, self._write, offset, view, flags)
        else:
            self._write(offset, view, flags)

    def copy_from(self, offset: int, source: HostFile, source_offset: int, length: int, flags: int = 0) -> None:
        """From another regular file, or elsewhere in this one: its blocks are shared where the file system can do that; else,
        without NO_FALLBACK, the system copies, though not past the page cache of one that is opened around it."""
        if not (
            isinstance(source, FileStorage)
            and source.copyable
            and self._regular
            and source._regular
            and 0 <= source_offset <= source.size - length
            and (source.identity != self.identity or abs(offset - source_offset) >= length)
        ):
            raise self.refuse("copy from there")
        end = offset + length
        if end > self._size:
            self._grow(end, self._copy, offset, source, source_offset, length, flags)
        else:
            self._copy(offset, source, source_offset, length, flags)

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        end = offset + length
        if end > self._size:
            self._grow(end, self._zero, offset, length, flags)
        else:
            self._zero(offset, length, flags)
        if flags & FUA:
            self.flush()

    def discard(self, offset: int, length: int) -> None:
        try:
            if self._regular:
                done = self._fallocate(_PUNCH_HOLE | _KEEP_SIZE, offset, length)
            else:
                done = system.discard_device(self._fd, offset, length)
        except OSError as error:
            raise self._failed(error, "discard", offset, length) from error
        if not done:
            raise NotSupported("no holes can be made in it", path=self._filename, operation="discard")

    def flush(self) -> None:
        """fdatasync: the bytes, and of the metadata all that is needed to find them (the length of the file too).

        A flush that failed fails for ever, until the file is opened again: the system reports a write-back error once
        and then calls the pages clean, so a later fdatasync would succeed without the bytes being there.
        """
        if self.read_only:
            return
        if self._fd < 0:
            raise Closed("this file was closed", path=self._filename, operation="flush")
        if self._lost is None:
            try:
                os.fdatasync(self._fd)
                return
            except OSError as error:
                self._lost = error
        raise BlockIOError.from_os(
            self._lost,
            "what was written since the last good flush may be lost",
            path=self._filename,
            operation="flush",
            hint="open it again, and write that anew",
        ) from self._lost

    def truncate(self, size: int) -> None:
        with self._growing:
            if not self._regular:
                if size == self._size:
                    return
                raise NotSupported(
                    f"a device of {self._size} bytes cannot be made {size} bytes long",
                    path=self._filename,
                    operation="truncate",
                )
            try:
                # Not where nothing changes: ext4 writes a file that was cut to nothing to the disk when it is closed, since
                # it may take the place of an older one (a new image of 1.7 GiB: 0.8 s).
                if os.fstat(self._fd).st_size != size:
                    os.ftruncate(self._fd, size)
            except OSError as error:
                raise self._failed(error, "truncate", length=size) from error
            self._size = size

    def extents(self, offset: int, length: int) -> Extents:
        from ..extents import DATA, PRESENT, ZERO, Extents
        from ..numeric import np

        try:
            edges = np.frombuffer(self._edges(offset, offset + length), np.int64)
        except OSError as error:
            raise self._failed(error, "extents", offset, length) from error
        flags = np.full(len(edges) - 1, ZERO | PRESENT, np.uint8)
        flags[1::2] = DATA | PRESENT
        lengths = np.diff(edges)
        rows = np.flatnonzero(lengths)
        start = edges[rows]
        # Neighbours are alike only if the file changed while it was asked.
        found = Extents.from_columns(start, lengths[rows], flags[rows], file=0, offset=start.copy(), files=(self,))
        return bounded(found.coalesce())

    def reads_zero(self, offset: int, length: int) -> bool:
        try:
            return os.lseek(self._fd, offset, os.SEEK_DATA) >= offset + length
        except OSError as error:
            # ENXIO: no data from here to the end. Anything else: not known, which this question allows.
            return error.errno == errno.ENXIO

    @property
    def held(self) -> bool:
        return length_hint(self._open_fds) > 0

    def close(self) -> None:
        self._fd = -1  # first: once it is closed, the number may be another file's
        try:
            next(self._give_back, None)
        except OSError as error:
            raise BlockIOError.from_os(error, path=self._filename, operation="close") from error

    def forsake(self) -> None:
        # Locks belong to the open file, which the parent has too: closing a descriptor of it leaves them alone.
        FileStorage.close(self)

    # -- how it is done

    def _read_rest(self, offset: int, view: memoryview, done: int) -> None:
        """Go on after a short read; what lies past the end of the file (somebody cut it) is zeros."""
        while done < len(view):
            count = preadv(self._fd, (view[done:],), offset + done)
            if not count:
                fill_zero(view[done:])
                return
            done += count

    def _write(self, offset: int, view: memoryview, flags: int) -> None:
        try:
            how = _RWF_DSYNC if flags & FUA else 0
            done = pwritev(self._fd, (view,), offset, how)
            while done != len(view):
                done += pwritev(self._fd, (view[done:],), offset + done, how)
        except OSError as error:
            # This may have taken the only report of a write-back error of somebody else's bytes; see `flush`.
            if flags & FUA and error.errno == errno.EIO:
                self._lost = error
            raise self._failed(error, "write", offset, len(view)) from error

    def _copy(self, offset: int, source: FileStorage, source_offset: int, length: int, flags: int) -> None:
        place = (self._fd, offset, source._fd, source_offset, length)
        try:
            if self._fd < 0 or source._fd < 0:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            if system.share(*place):
                return
            quick = flags & NO_FALLBACK or not self._cached or not source._cached
            done = 0 if quick else system.copy(*place)
        except OSError as error:
            raise (self if source._fd >= 0 else source)._failed(error, "copy", offset, length) from error
        if not done:
            raise NotSupported("the system cannot copy from there", path=self._filename, operation="copy")
        # Some of it is done, so the rest must be: it passes through here.
        buffer = memoryview(bytearray(min(length - done, MIB)))
        for at in range(done, length, MIB):
            part = buffer[: length - at]
            source.read_into(source_offset + at, part)
            self._write(offset + at, part, 0)

    def _zero(self, offset: int, length: int, flags: int) -> None:
        end, size = offset + length, self._size
        inside = max(min(end, size) - offset, 0)
        try:
            if flags & MAY_UNMAP and (not inside or self._fallocate(_PUNCH_HOLE | _KEEP_SIZE, offset, inside)):
                if end > size and os.fstat(self._fd).st_size < end:
                    os.ftruncate(self._fd, end)
            elif not self._fallocate(_ZERO_RANGE, offset, length):
                raise NotSupported("it cannot be zeroed without writing", path=self._filename, operation="zero")
        except OSError as error:
            if isinstance(error, LaminaError):
                raise
            raise self._failed(error, "zero", offset, length) from error

    def _grow(self, end: int, operation: Callable[..., None], *arguments: Any) -> None:
        """Run an operation that ends at `end`, past the size, and make the size follow."""
        with self._growing:
            try:
                operation(*arguments)
            except BaseException:
                # Part of it may be there: what lies past the tracked size would otherwise come back in a later growth.
                if self._fd >= 0:
                    self._size = max(self._size, os.fstat(self._fd).st_size)
                raise
            self._size = max(self._size, end)

    def _fallocate(self, mode: int, offset: int, length: int) -> bool:
        """False if this file has no such operation (asked once); OSError if it has and it failed."""
        if mode in self._missing:
            return False
        number = _libc_fallocate(self._fd, mode, offset, length)
        if number in system.MISSING:
            self._missing.add(mode)
            return False
        if number:
            raise OSError(number, os.strerror(number))
        return True

    def _edges(self, offset: int, end: int) -> array[int]:
        """Where, between `offset` and `end`, a hole and data take turns; what starts at `offset` is a hole, maybe
        empty. The last edge is `end`, or where one answer has as many rows as it may."""
        fd, seek, to_data, to_hole = self._fd, os.lseek, os.SEEK_DATA, os.SEEK_HOLE
        edges = array("q", (offset,))
        add = edges.append
        at = offset
        try:
            while (at := seek(fd, at, to_data)) < end:
                add(at)
                if (at := seek(fd, at, to_hole)) >= end:
                    break
                add(at)
                if len(edges) > MAX_ROWS:
                    return edges
        except OSError as error:
            if error.errno == errno.EINVAL and len(edges) == 1:
                add(offset)  # this system does not know holes: all is data
            elif error.errno != errno.ENXIO:  # that one: nothing but a hole from here to the end
                raise
        add(end)
        return edges

    def _failed(
        self, error: OSError, operation: str, offset: int | None = None, length: int | None = None
    ) -> LaminaError:
        place: dict[str, Any] = {"path": self._filename, "operation": operation, "offset": offset, "length": length}
        if self._fd < 0:
            return Closed("this file was closed", **place)
        return BlockIOError.from_os(error, hint=_HINTS.get(error.errno or 0), **place)


class DirectFileStorage(FileStorage):
    """A file without the page cache. Bytes go through aligned buffers of a bounded pool; the request path aligns the
    requests. Only the last block of a file whose length is not aligned goes through the page cache, so that its length
    stays exact at any moment."""

    _cached = False

    def __init__(self, fd: int, filename: str, *, name: str | None = None, read_only: bool = False) -> None:
        super().__init__(fd, filename, name=name, read_only=read_only)
        try:
            self._align = aligned.alignment(fd)
            self._flags = fcntl.fcntl(fd, fcntl.F_GETFL)
            fcntl.fcntl(fd, fcntl.F_SETFL, self._flags | os.O_DIRECT)
        except OSError as error:
            raise BlockIOError.from_os(
                error, "no direct I/O on it", path=filename, operation="open", hint="leave out cache.direct"
            ) from error
        self._pool = aligned.Pool()
        self._buffered = threading.Lock()

    def after_fork(self) -> None:
        super().after_fork()
        self._pool = aligned.Pool()

    @property
    def limits(self) -> Limits:
        step = max(self._align, self._block)
        return Limits(request_alignment=self._align, zero_alignment=step, discard_alignment=step)

    @plain
    def read_into(self, offset: int, view: memoryview) -> None:
        length = len(view)
        done = 0
        try:
            with self._pool.buffer() as buffer:
                while done < length:
                    want = min(length - done, len(buffer))
                    count = preadv(self._fd, (buffer[: align_up(want, self._align)],), offset + done)
                    got = min(count, want)
                    view[done : done + got] = buffer[:got]
                    done += got
                    if got < want and (not got or count % self._align):
                        break  # the end of the file
        except OSError as error:
            raise self._failed(error, "read", offset, length) from error
        if done < length:
            fill_zero(view[done:])

    def _write(self, offset: int, view: memoryview, flags: int) -> None:
        length = len(view)
        whole = align_down(length, self._align)
        with self._pool.buffer() as buffer:
            done = 0
            while done < whole:
                count = min(whole - done, len(buffer))
                buffer[:count] = view[done : done + count]
                super()._write(offset + done, buffer[:count], flags)
                done += count
        if whole < length:
            self._write_tail(offset + whole, view[whole:], flags)

    def _write_tail(self, offset: int, view: memoryview, flags: int) -> None:
        # For a moment the descriptor is an ordinary one. What other threads write meanwhile is only cached needlessly.
        if self._fd < 0:
            raise Closed("this file was closed", path=self._filename, operation="write")
        with self._buffered:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, self._flags)
            try:
                super()._write(offset, view, flags)
            finally:
                fcntl.fcntl(self._fd, fcntl.F_SETFL, self._flags | os.O_DIRECT)
