"""Support for direct I/O (O_DIRECT): the alignment that a file requires, and a bounded pool of aligned buffers."""

from __future__ import annotations

import errno
import mmap
import os
import stat
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ..capabilities import LINUX, fcntl
from ..limits import is_power_of_two

#: The size of one buffer, and so the largest transfer of one system call.
BUFFER = 1 << 20

#: The interval, in seconds, at which a waiting thread checks for a free buffer.
_POLL_INTERVAL = 0.0002

#: A multiple of every common logical block size.
_SAFE = 4096

_BLKSSZGET = 0x1268
_AT_EMPTY_PATH, _STATX_DIOALIGN = 0x1000, 0x2000
_STATX_SIZE, _DIO_OFFSET_ALIGN = 256, 156


class Pool:
    """At most `count` page-aligned buffers of `BUFFER` bytes, allocated when first needed. Thread-safe: a thread waits while
    all buffers are in use. An interrupt at any point leaves no buffer marked as in use: each use is a token in a set, and the
    token is removed twice."""

    __slots__ = ("_count", "_free", "_using")

    def __init__(self, count: int = 8) -> None:
        self._count = count
        self._using: set[object] = set()
        self._free: list[memoryview] = []

    @contextmanager
    def buffer(self) -> Iterator[memoryview]:
        """A context manager that provides a buffer. Its content is undefined."""
        token, leave = object(), self._using.discard
        try:
            try:
                self._using.add(token)
                while len(self._using) > self._count:
                    leave(token)
                    time.sleep(_POLL_INTERVAL)
                    self._using.add(token)
                buffer = self._unused()
                yield buffer
                self._free.append(buffer)  # after an error the buffer is dropped; a new one is cheap
            finally:
                leave(token)
        finally:
            leave(token)

    def _unused(self) -> memoryview:
        try:
            return self._free.pop()
        except IndexError:
            return memoryview(mmap.mmap(-1, BUFFER))


def alignment(fd: int) -> int:
    """The alignment, a power of two, of offsets and lengths of direct I/O on `fd`. Raises OSError without direct I/O."""
    found = _statx_alignment(fd)
    if found is None:
        # An old kernel. A trial read would prove nothing, since a read of a hole succeeds with any alignment.
        found = logical_block_size(fd) if stat.S_ISBLK(os.fstat(fd).st_mode) else _SAFE
    if not is_power_of_two(found) or found > BUFFER:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return found


def logical_block_size(fd: int) -> int:
    """The logical block size, in bytes, of the block device `fd`."""
    return int(struct.unpack("i", fcntl.ioctl(fd, _BLKSSZGET, bytes(4)))[0])


def _statx_alignment(fd: int) -> int | None:
    """The alignment from statx (Linux 6.1): 0 if direct I/O is not supported, None if the kernel does not tell."""
    if not LINUX:
        return None
    import ctypes

    statx = getattr(ctypes.CDLL(None), "statx", None)
    answer = ctypes.create_string_buffer(_STATX_SIZE)
    if statx is None or statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, answer) != 0:
        return None
    (mask,) = struct.unpack_from("I", answer, 0)
    if not mask & _STATX_DIOALIGN:
        return None
    return int(struct.unpack_from("I", answer, _DIO_OFFSET_ALIGN)[0])
