"""What direct I/O (O_DIRECT) needs: the alignment that a file asks for, and a bounded pool of aligned buffers."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ..limits import is_power_of_two

#: The size of one buffer, and so of the largest single transfer.
BUFFER = 1 << 20

#: How often it is looked whether a buffer is free, in seconds.
_LOOK_AGAIN = 0.0002

#: A multiple of every logical block size in common use: right wherever a smaller one would do too.
_SAFE = 4096

_BLKSSZGET = 0x1268
_AT_EMPTY_PATH, _STATX_DIOALIGN = 0x1000, 0x2000
_STATX_SIZE, _DIO_OFFSET_ALIGN = 256, 156


class Pool:
    """At most `count` buffers of `BUFFER` bytes that start on a page, made when first needed. Safe for any number of
    threads: who asks when all are in use waits. An interrupt at any point leaves no place taken: each is a token in a set,
    which is taken out twice."""

    __slots__ = ("_count", "_free", "_using")

    def __init__(self, count: int = 8) -> None:
        self._count = count
        self._using: set[object] = set()
        self._free: list[memoryview] = []

    @contextmanager
    def buffer(self) -> Iterator[memoryview]:
        """A buffer for the time of the block. What is in it is left over from others: overwrite before use."""
        token, leave = object(), self._using.discard
        try:
            try:
                self._using.add(token)
                while len(self._using) > self._count:
                    leave(token)
                    time.sleep(_LOOK_AGAIN)
                    self._using.add(token)
                buffer = self._unused()
                yield buffer
                self._free.append(buffer)  # not after an error: it is as easily made anew
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
    """The power of two that offsets and lengths of direct I/O on `fd` are multiples of. OSError if it cannot do any."""
    found = _statx_alignment(fd)
    if found is None:
        # The kernel is too old to say. A trial read of a file may fall into a hole, which passes unchecked.
        found = logical_block_size(fd) if stat.S_ISBLK(os.fstat(fd).st_mode) else _SAFE
    if not is_power_of_two(found) or found > BUFFER:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return found


def logical_block_size(fd: int) -> int:
    """The smallest unit, in bytes, that the block device `fd` transfers."""
    return int(struct.unpack("i", fcntl.ioctl(fd, _BLKSSZGET, bytes(4)))[0])


def _statx_alignment(fd: int) -> int | None:
    """What statx says (Linux 6.1): 0 where direct I/O is not possible, None if it does not know."""
    import ctypes

    statx = getattr(ctypes.CDLL(None), "statx", None)
    answer = ctypes.create_string_buffer(_STATX_SIZE)
    if statx is None or statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, answer) != 0:
        return None
    (mask,) = struct.unpack_from("I", answer, 0)
    if not mask & _STATX_DIOALIGN:
        return None
    return int(struct.unpack_from("I", answer, _DIO_OFFSET_ALIGN)[0])
