"""The guard of a raw disk whose format was only guessed: it must not become an image of another format.

A disk whose format is guessed at every open belongs to its guest: a header that the guest wrote would be believed the next
time, with every file that it names. Only `Policy.unchecked` lets such a disk be written at all.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .. import detection
from ..errors import BlockIOError, Hint

if TYPE_CHECKING:
    from ..request import Child


class Guard:
    """The guard of the disk in `file`. Thread-safe: changes of the bytes that decide are made one after the other."""

    def __init__(self, file: Child) -> None:
        self._file = file
        self._mutex = threading.Lock()

    @contextmanager
    def writing(self, offset: int, view: memoryview, size: int) -> Iterator[None]:
        """A write of `view` to the disk of `size` bytes. Raises BlockIOError (EPERM) before it if the disk would look like
        another format after it."""
        if not detection.touches_probe(offset, len(view), size):
            yield
            return
        with self._mutex:
            head, tail = self._read(0, min(size, detection.HEAD_BYTES)), self._tail(size)
            for start, part in ((0, head), (size - len(tail), tail)):
                begin, end = max(offset, start), min(offset + len(view), start + len(part))
                if begin < end:
                    part[begin - start : end - start] = view[begin - offset : end - offset]
            self._require_raw(head, tail, size)
            yield

    @contextmanager
    def resizing(self, size: int) -> Iterator[None]:
        """A change of the size. Raises as `writing`."""
        with self._mutex:
            self._require_raw(self._read(0, min(size, detection.HEAD_BYTES)), self._tail(size), size)
            yield

    def _tail(self, size: int) -> bytearray:
        return self._read(max(size - detection.TAIL_BYTES, 0), min(size, detection.TAIL_BYTES))

    def _read(self, offset: int, length: int) -> bytearray:
        """Bytes of the disk; zeros past the end of its file."""
        found = bytearray(length)
        inside = max(min(self._file.node.size - offset, length), 0)
        self._file.read_into(offset, memoryview(found)[:inside])
        return found

    def _require_raw(self, head: bytearray, tail: bytearray, size: int) -> None:
        found = detection.detect(head, tail, size)
        if found.matches:
            raise BlockIOError(
                f"the bytes are those of the format {found.matches[0]}, and the format of this image, raw, was only guessed",
                errno=errno.EPERM,
                path=self._file.node.filename,
                operation="write",
                hint=Hint('give the format: format="raw"', command="give the format: -f raw"),
            )
