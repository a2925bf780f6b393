"""Stand-ins of the tests of copies from file to file: systems that share, copy, or stop half-way; storage that takes note."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lamina.extents import HostFile
from lamina.limits import Limits
from lamina.node import StorageNode
from lamina.storage.file import FileStorage
from lamina.storage.memory import MemoryStorage

KIB = 1024
BLOCK = 4 * KIB
SIZE = 64 * KIB
DATA = random.Random(7).randbytes(SIZE)
OLD = random.Random(8).randbytes(SIZE)

_copy_file_range = os.copy_file_range


def file(path: Path, content: bytes | None = None, *, kind: type[FileStorage] = FileStorage) -> FileStorage:
    if content is not None:
        path.write_bytes(content)
    return kind([os.open(path, os.O_RDWR | os.O_CREAT)], str(path))


# What the system may do. Each stands in for os.copy_file_range.


def honest(*place: int) -> int:
    return _copy_file_range(*place)


def reluctant(source: int, target: int, count: int, *offsets: int) -> int:
    return _copy_file_range(source, target, min(count, 777), *offsets)


class Stops:
    """Copies some bytes, then says `number`; 0: that there are no more."""

    def __init__(self, after: int, number: int) -> None:
        self.left, self.number = after, number

    def __call__(self, source: int, target: int, count: int, *offsets: int) -> int:
        count = min(count, self.left)
        if not count:
            if self.number:
                raise OSError(self.number, os.strerror(self.number))
            return 0
        self.left -= count
        return _copy_file_range(source, target, count, *offsets)


class Sharing:
    """An ioctl as of a file system that shares blocks of 4 KiB; counts what it did. No such file system is needed here."""

    def __init__(self) -> None:
        self.shared: list[int] = []

    def __call__(self, fd: int, request: int, argument: Any = 0) -> Any:
        if request != 0x4020940D:
            return fcntl.fcntl(fd, request, argument)
        source, source_offset, length, offset = struct.unpack("qQQQ", argument)
        end = source_offset + length
        if (source_offset | offset) % BLOCK or (end % BLOCK and end != os.fstat(source).st_size):
            raise OSError(errno.EINVAL, "not whole blocks")
        assert os.pwrite(fd, os.pread(source, length, source_offset), offset) == length
        self.shared.append(length)
        return 0


def no_copy(*_: int) -> int:
    raise AssertionError("bytes were copied that could be shared")


def says(number: int) -> Callable[..., Any]:
    def call(*_: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return call


class Copying(StorageNode):
    """Bytes with limits, to which ranges of `Source` can be copied; notes what arrives."""

    driver = "copying"

    def __init__(self, size: int, limits: Limits | None = None, *, serialise: int = 0, grows: bool = False) -> None:
        super().__init__()
        self.bytes = bytearray(size)
        self.seen: list[tuple[int, int, int, int]] = []
        self.flushes = 0
        self._limits, self._serialise, self._grows = limits or Limits(), serialise, grows

    size = property(lambda self: len(self.bytes))
    limits = property(lambda self: self._limits)
    serialise = property(lambda self: self._serialise)
    growable = property(lambda self: self._grows)

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        raise AssertionError("nothing is written here")

    def copy_from(self, offset: int, source: HostFile, source_offset: int, length: int, flags: int = 0) -> None:
        self.seen.append((offset, source_offset, length, flags))

    def flush(self) -> None:
        self.flushes += 1


SOURCE = MemoryStorage(SIZE)


def content(node: FileStorage) -> bytes:
    """The bytes of the file, as others see them."""
    return Path(node.filename).read_bytes()
