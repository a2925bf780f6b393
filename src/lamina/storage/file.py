"""The driver `file`: a regular file or a block device, accessed with positioned reads and writes.

Each operation is a system call with an explicit offset, so the driver is thread-safe. SEEK_DATA and SEEK_HOLE find holes;
fallocate zeroes and discards. With `cache.direct` requests bypass the page cache (`DirectFileStorage`)."""

from __future__ import annotations

import errno
import os
import stat
import threading
from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Self

from ..capabilities import O_DIRECT, RWF_DSYNC, SEEK_HOLES, allocated, fcntl, flush_data, preadv, pwritev
from ..descriptors import close_all, close_one, duplicate_into
from ..errors import BlockIOError, Closed, LaminaError, NotSupported, OptionError
from ..limits import KIB, MIB, Limits, align_down, align_up
from ..node import FUA, MAY_UNMAP, NO_FALLBACK, StorageNode, fill_zero, plain
from ..schema import Option, Schema
from ..status import DATA, PRESENT, ZERO, Status
from . import aligned, holes, locks, system
from .failure import failure
from .holes import DataRange
from .opening import open_again, open_file, path_of, require_file
from .system import fallocate as _libc_fallocate

if TYPE_CHECKING:
    from ..extents import Extents, HostFile
    from ..graph import Opener

_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 1, 2, 16

#: The longest write into the page cache, whose pages are no larger then. A virtual machine that gives free memory back to its
#: host loses pages of 2 MiB: after another program had run, 4.3 GB took 7.2 s in writes of 2 MiB, and 3.7 s in these.
_PIECE = 512 * KIB

_DIRECT = Option("direct", "bool", "bypass the page cache (O_DIRECT)", default=False)
_CACHE = Schema("cache", [_DIRECT, Option("no-flush", "bool", "without an effect: no flush is omitted")])


class FileStorage(StorageNode):
    """A file. `size` is tracked: a write past the end extends a regular file. Changes of the length by other programs are not
    noticed, except that bytes beyond a new, earlier end read as zeros."""

    driver: ClassVar[str] = "file"
    read_only: bool
    schema: ClassVar[Schema] = Schema(
        "file",
        [
            Option("filename", "str", "the file or block device", required=True),
            Option(
                "locking",
                "enum",
                "lock the file against conflicting use; auto: if its file system supports locks",
                choices=("auto", "on", "off"),
                default="auto",
            ),
            Option("cache", "dict", "caching of the file", items=_CACHE),
            Option(
                "holes",
                "bool",
                "ask the file system which parts are holes; off: every byte is data, if the file system cannot be trusted",
                default=True,
            ),
        ],
    )
    supported_flags = FUA if RWF_DSYNC else 0
    _cached = True  # in the page cache
    _locks: dict[str, frozenset[int]] | None = None  # the further permissions of its locks, if it has locks
    _force_share = False
    _holes = SEEK_HOLES  # whether the file system is asked for holes

    def __init__(self, fds: list[int], filename: str, *, name: str | None = None, read_only: bool = False) -> None:
        """The file of the one descriptor in `fds`, a list (`descriptors`) that the node owns from now on."""
        super().__init__(name=name, read_only=read_only)
        self._fds = fds
        self._fd = fd = fds[-1]
        self._filename = filename
        self.path: str | None = path_of(fd, filename)
        status = os.fstat(fd)
        self.identity: tuple[int, int] | None = (status.st_dev, status.st_ino)
        self._regular = stat.S_ISREG(status.st_mode)
        self._size = status.st_size if self._regular else os.lseek(fd, 0, os.SEEK_END)
        self._block = 1 if self._regular else aligned.logical_block_size(fd)
        # Held while the length of the file changes, so that appending writes and truncations do not overlap.
        self._growing = threading.Lock()
        self._data_range = DataRange()
        self._missing: set[int] = set()  # modes of fallocate that this file does not support
        self._flush_error: OSError | None = None  # the error of a failed flush

    @classmethod
    def open(cls, options: dict[str, Any], opener: Opener) -> Self:
        """Open `filename`, or duplicate the descriptor `opener.fd`. Raises NotFound, Locked, BlockIOError."""
        filename = options["filename"]
        direct = bool((options.get("cache") or {}).get("direct"))
        writing = not opener.read_only
        if opener.force_share and writing:
            raise OptionError("force-share requires read-only", path=filename, hint="open it read-only")
        fds = opener.descriptors()
        try:
            fd = open_file(fds, filename, writing) if opener.fd is None else duplicate_into(fds, opener.fd)
            require_file(os.fstat(fd).st_mode, filename)
            locking = options.get("locking", "auto")
            permissions = None
            if locking != "off" and not opener.force_share:
                extra = {"taken": opener.taken, "withheld": opener.unshared}
                locked = locks.acquire(fd, writing=writing, path=filename, required=locking == "on", **extra)
                permissions = extra if locked else None
            kind: type[FileStorage] = DirectFileStorage if direct and cls is FileStorage else cls
            try:
                node = kind(fds, filename, name=opener.name, read_only=opener.read_only)
                node._locks, node._force_share = permissions, opener.force_share
                node._holes = SEEK_HOLES and options.get("holes", True)
                return node  # type: ignore[return-value]
            except OSError as error:
                if isinstance(error, LaminaError):
                    raise
                raise BlockIOError.from_os(error, path=filename, operation="open") from error
        except BaseException:
            close_all(fds)
            raise

    # -- properties

    @property
    def size(self) -> int:
        return self._size

    @property
    def growable(self) -> bool:
        return self._regular

    @property
    def immutable(self) -> bool:
        return self.read_only

    @property
    def limits(self) -> Limits:
        return Limits(zero_alignment=self._block, discard_alignment=self._block)

    @property
    def filename(self) -> str:
        return self._filename

    @property
    def allocated(self) -> int:
        """The allocated bytes of the file; less than its size if it has holes, and possibly more."""
        try:
            return allocated(os.fstat(self._fd))
        except OSError as error:
            raise self._failed(error, "stat") from error

    @property
    def has_other_writer(self) -> bool:
        """Whether another process, or another open file of this one, holds the lock of a writer on the file."""
        return locks.in_use_for_writing(self._fd)

    # -- operations

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
        """Copy from another regular file, or another range of this one. The file system shares the blocks if possible;
        otherwise, without NO_FALLBACK, the kernel copies. The kernel does not copy to or from a file with direct I/O."""
        if not (
            isinstance(source, FileStorage)
            and source.copyable
            and self._regular
            and source._regular
            and 0 <= source_offset <= source.size - length
            and (source.identity != self.identity or abs(offset - source_offset) >= length)
        ):
            raise self.refuse("copy from this source")
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
        finally:
            self._data_range.forget()
        if not done:
            raise NotSupported("the file does not support holes", path=self._filename, operation="discard")

    def flush(self) -> None:
        """fdatasync: flush the bytes and the metadata that are needed to read them (including the length of the file).

        After a failed flush every flush fails until the file is opened again: the kernel reports a write-back error once and
        then marks the pages as clean, so a later fdatasync would succeed although bytes were lost."""
        if self.read_only:
            return
        if self._fd < 0:
            raise Closed("the file is closed", path=self._filename, operation="flush")
        if self._flush_error is None:
            try:
                flush_data(self._fd)
                return
            except OSError as error:
                self._flush_error = error
        raise BlockIOError.from_os(
            self._flush_error,
            "data written since the last successful flush may be lost",
            path=self._filename,
            operation="flush",
            hint="open the file again and repeat these writes",
        ) from self._flush_error

    def truncate(self, size: int) -> None:
        with self._growing:
            if not self._regular:
                if size == self._size:
                    return
                raise NotSupported(
                    f"the size of this device is {self._size} bytes and cannot be changed to {size}",
                    path=self._filename,
                    operation="truncate",
                )
            try:
                # Only if the length changes: ext4 flushes a file that was truncated to 0 when it is closed, since programs
                # replace files in that way (0.8 s for a new image of 1.7 GiB).
                if os.fstat(self._fd).st_size != size:
                    os.ftruncate(self._fd, size)
            except OSError as error:
                raise self._failed(error, "truncate", length=size) from error
            finally:
                self._data_range.forget()
            self._size = size

    def extents(self, offset: int, length: int) -> Extents:
        return holes.extents(self._boundaries(offset, offset + length), self)

    def zero_runs(self, offset: int, length: int) -> list[tuple[int, bool]]:
        return holes.zero_runs(self._boundaries(offset, offset + length))

    def first_extents(self, offset: int, length: int, most: int) -> list[Status]:
        end = offset + length
        try:
            begin, stop = self._data_range.find(self._fd, offset, end) if self._holes else (offset, end)
        except OSError as error:
            raise self._failed(error, "extents", offset, length) from error
        rows: list[Status] = []
        if begin > offset:
            rows.append(Status(ZERO | PRESENT, begin - offset, 0, self, offset))
        if begin < end and len(rows) < most:
            rows.append(Status(DATA | PRESENT, min(stop, end) - begin, 0, self, begin))
        return rows

    def reads_zero(self, offset: int, length: int) -> bool:
        if not self._holes:
            return False
        try:
            return os.lseek(self._fd, offset, os.SEEK_DATA) >= offset + length
        except OSError as error:
            # ENXIO: no data up to the end of the file. Other errors: unknown, for which False is allowed.
            return error.errno == errno.ENXIO

    def reopen(self, read_only: bool) -> None:
        """Exchange the descriptor; the locks are never given up meanwhile."""
        if self._force_share:
            raise OptionError("it was opened with force-share, which requires read-only", path=self._filename)
        self.flush()
        fds: list[int] = []
        try:
            mode = (os.O_RDONLY if read_only else os.O_RDWR) | (0 if self._cached else O_DIRECT)
            fd = open_again(fds, self._fd, self.path or self._filename, self._filename, mode)
            if self._locks is not None:
                locks.pass_on(self._fd, fd, writing=not read_only, path=self._filename, **self._locks)
            # One step: from now on `fds` has the old descriptor, which is closed below.
            self._fd, self.read_only, self._fds, fds = fd, read_only, fds, self._fds
        finally:
            try:
                close_all(fds)
            finally:
                close_all(fds)

    @property
    def held(self) -> bool:
        return bool(self._fds)

    def close(self) -> None:
        self._fd = -1  # first, since the number may be reused as soon as it is closed
        self._data_range.forget()  # it belongs to this descriptor
        try:
            close_one(self._fds)
        except OSError as error:
            raise BlockIOError.from_os(error, path=self._filename, operation="close") from error

    def forsake(self) -> None:
        # Locks belong to the open file description, which the parent process shares, so this close does not release them.
        FileStorage.close(self)

    # -- implementation

    def _read_rest(self, offset: int, view: memoryview, done: int) -> None:
        """Continue after a short read. Bytes past the end of the file, which another program truncated, are zeros."""
        while done < len(view):
            count = preadv(self._fd, (view[done:],), offset + done)
            if not count:
                fill_zero(view[done:])
                return
            done += count

    def _write(self, offset: int, view: memoryview, flags: int) -> None:
        if len(view) > _PIECE and self._cached and not flags & FUA:
            for at in range(0, len(view), _PIECE):
                self._write(offset + at, view[at : at + _PIECE], flags)
            return
        try:
            how = RWF_DSYNC if flags & FUA else 0
            done = pwritev(self._fd, (view,), offset, how)
            while done != len(view):
                done += pwritev(self._fd, (view[done:],), offset + done, how)
        except OSError as error:
            # This may be the only report of a write-back error of other writes; see `flush`.
            if flags & FUA and error.errno == errno.EIO:
                self._flush_error = error
            raise self._failed(error, "write", offset, len(view)) from error

    def _copy(self, offset: int, source: FileStorage, source_offset: int, length: int, flags: int) -> None:
        ranges = (self._fd, offset, source._fd, source_offset, length)
        try:
            if self._fd < 0 or source._fd < 0:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            if system.share(*ranges):
                return
            share_only = flags & NO_FALLBACK or not self._cached or not source._cached
            done = 0 if share_only else system.copy(*ranges)
        except OSError as error:
            raise (self if source._fd >= 0 else source)._failed(error, "copy", offset, length) from error
        finally:
            self._data_range.forget()  # a shared hole is one here, too
        if not done:
            raise NotSupported("the kernel cannot copy from this source", path=self._filename, operation="copy")
        # The kernel copied a part, so NotSupported is no longer allowed: the rest is copied through a buffer.
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
                raise NotSupported("the file cannot be zeroed without writing", path=self._filename, operation="zero")
        except OSError as error:
            if isinstance(error, LaminaError):
                raise
            raise self._failed(error, "zero", offset, length) from error
        finally:
            self._data_range.forget()

    def _grow(self, end: int, operation: Callable[..., None], *arguments: Any) -> None:
        """Run an operation that ends at `end`, past the size, and update the size."""
        with self._growing:
            try:
                operation(*arguments)
            except BaseException:
                # The file may be longer now: bytes beyond the tracked size would otherwise reappear when the file grows.
                if self._fd >= 0:
                    self._size = max(self._size, os.fstat(self._fd).st_size)
                raise
            self._size = max(self._size, end)

    def _fallocate(self, mode: int, offset: int, length: int) -> bool:
        """Call fallocate. Returns False if the file does not support `mode` (tried once); raises OSError for other errors."""
        if mode in self._missing:
            return False
        number = _libc_fallocate(self._fd, mode, offset, length)
        if number in system.MISSING:
            self._missing.add(mode)
            return False
        if number:
            raise OSError(number, os.strerror(number))
        return True

    def _boundaries(self, offset: int, end: int) -> array[int]:
        if not self._holes:
            return array("q", (offset, offset, end))  # an empty hole, then data
        try:
            return holes.boundaries(self._fd, offset, end)
        except OSError as error:
            raise self._failed(error, "extents", offset, end - offset) from error

    def _failed(
        self, error: OSError, operation: str, offset: int | None = None, length: int | None = None
    ) -> LaminaError:
        return failure(error, operation, self._filename, offset, length, closed=self._fd < 0)


class DirectFileStorage(FileStorage):
    """A file with direct I/O. Bytes pass through the aligned buffers of a bounded pool; the request path aligns the requests.
    Only an incomplete last block is written through the page cache, so that the length of the file is always exact."""

    _cached = False

    def __init__(self, fds: list[int], filename: str, *, name: str | None = None, read_only: bool = False) -> None:
        super().__init__(fds, filename, name=name, read_only=read_only)
        fd = self._fd
        try:
            if not O_DIRECT:
                raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
            self._align = aligned.alignment(fd)
            self._flags = fcntl.fcntl(fd, fcntl.F_GETFL)
            fcntl.fcntl(fd, fcntl.F_SETFL, self._flags | O_DIRECT)
        except OSError as error:
            raise BlockIOError.from_os(
                error, "the file does not support direct I/O", path=filename, operation="open", hint="omit cache.direct"
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
        # The descriptor loses O_DIRECT for a moment. Other threads may then use the page cache, which is harmless.
        if self._fd < 0:
            raise Closed("the file is closed", path=self._filename, operation="write")
        with self._buffered:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, self._flags)
            try:
                super()._write(offset, view, flags)
            finally:
                fcntl.fcntl(self._fd, fcntl.F_SETFL, self._flags | O_DIRECT)
