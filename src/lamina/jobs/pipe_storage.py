"""A pipe as the source of a conversion: a disk that is read once, from its first byte to its last."""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, ClassVar

from ..detection import detect
from ..errors import BlockIOError, FormatError, Hint, OptionError
from ..node import StorageNode
from .copy_ends import PipeSource

if TYPE_CHECKING:
    from ..extents import Extents

_GIVE_LENGTH = Hint("give its length", command="give its length (--size)")


class PipeStorage(StorageNode):
    """The `size` bytes that come through `source`. Each read begins where the one before ended; for use by one thread.
    BlockIOError if fewer bytes come, or more. With `guess` FormatError if they look like an image of some format, which would
    be taken for raw bytes."""

    driver: ClassVar[str] = "pipe"

    def __init__(self, source: PipeSource, size: int, *, guess: bool = False) -> None:
        super().__init__(read_only=True)
        self._source = source
        self._size = size
        self._guess = guess
        self._at = 0
        if not size:
            self._require_end()

    @property
    def size(self) -> int:
        return self._size

    @property
    def filename(self) -> str:
        return self._source.name

    def read_into(self, offset: int, view: memoryview) -> None:
        if offset != self._at:
            raise BlockIOError(
                "a pipe is read once, in order", errno=errno.ESPIPE, path=self.filename, operation="read", offset=offset
            )
        count = self._source.fill(view)
        self._at += count
        if count < len(view):
            raise BlockIOError(
                f"it ended after {self._at} bytes, and should have {self._size}",
                path=self.filename,
                hint=Hint(
                    "give its length, or look why the program before it ended",
                    command="give its length (--size), or look why the program before it ended",
                ),
            )
        if self._guess and not offset:
            found = detect(view, size=self._size).matches
            if found:
                raise FormatError(
                    f"it looks like an image of the format {' or '.join(found)}, which is not read from a pipe",
                    path=self.filename,
                    hint=Hint(
                        "write it to a file first; if its bytes are those of the disk, its format is raw",
                        command="write it to a file first; if its bytes are those of the disk, give -f raw",
                    ),
                )
        if self._at == self._size:
            self._require_end()

    def extents(self, offset: int, length: int) -> Extents:
        from ..extents import Extents

        return Extents.single(offset, length, data=True, present=True)

    def _require_end(self) -> None:
        if self._source.fill(memoryview(bytearray(1))):
            raise BlockIOError(f"it has more than {self._size} bytes", path=self.filename, hint=_GIVE_LENGTH)


def length_of(fd: int, name: str) -> int:
    """The number of bytes that can be read from `fd`, if it is a file or a block device. OptionError for a pipe."""
    status = os.fstat(fd)
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode)):
        raise OptionError("the length of a pipe is not known before its end", path=name, hint=_GIVE_LENGTH)
    at = os.lseek(fd, 0, os.SEEK_CUR)
    end = os.lseek(fd, 0, os.SEEK_END)
    os.lseek(fd, at, os.SEEK_SET)
    return max(end - at, 0)
