"""The disk of an image as a file of the standard library (`Image.as_file`)."""

from __future__ import annotations

import errno
import io
import operator
import os
from typing import TYPE_CHECKING

from .buffers import byte_view
from .errors import BlockIOError, OutOfRange
from .status import ZERO

if TYPE_CHECKING:
    from collections.abc import Buffer  # type: ignore[attr-defined,unused-ignore]  # Python 3.12

    from .image import Image

#: The numbers of Linux, for systems without them.
_SEEK_DATA: int = getattr(os, "SEEK_DATA", 3)
_SEEK_HOLE: int = getattr(os, "SEEK_HOLE", 4)
#: The number of extents that a search for data or for a hole asks for at a time.
_ROWS = 64


class DiskFile(io.RawIOBase):
    """The disk of an image as a raw binary file with a position of its own, for code that expects a file:
    `io.BufferedReader`, `io.BufferedRandom`, `shutil.copyfileobj`, `hashlib.file_digest`, `tarfile`, `zipfile`.

    It behaves like a block device. A read ends at the end of the disk. A write past it raises OutOfRange and changes nothing;
    `truncate` changes the size. There is no descriptor (`fileno`), and `flush` has nothing to do, since nothing is buffered:
    `sync` is what `os.fsync` is to other files. Each call is at least one request, so wrap the file in `io.BufferedReader` or
    `io.BufferedRandom` for many small reads and writes.

    Closing it leaves the image open; then, as for any Python file, every operation raises ValueError and `closed` is true.
    Once the image is closed, every operation raises `Closed`, which is a ValueError as well, but `closed` stays false. Other
    errors are those of `Image`: ReadOnly (a PermissionError), BlockIOError (an OSError), CorruptImage.

    One thread at a time may use a file, since its calls share the position; the buffered classes of `io` have a lock for
    that. Any number of files over one image may be used at the same time.
    """

    def __init__(self, image: Image) -> None:
        self._of = image
        self._at = 0
        #: The name of the image, as `Image.filename`.
        self.name: str = image.filename
        self._mode = "rb"
        self._mode = self.mode

    @property
    def mode(self) -> str:
        """ "rb", or "rb+" if the image is writable; of the last use if the file or the image is closed."""
        if not self.closed and not self._of.closed:
            self._mode = "rb" if self._of.read_only else "rb+"
        return self._mode

    @property
    def image(self) -> Image:
        """The image. Raises ValueError if this file is closed."""
        if self.closed:
            raise ValueError("I/O operation on closed file")
        return self._of

    def readable(self) -> bool:
        """True."""
        return self.image.size >= 0

    def writable(self) -> bool:
        """Whether the image is writable."""
        return not self.image.read_only

    def seekable(self) -> bool:
        """True."""
        return self.image.size >= 0

    def tell(self) -> int:
        """The position in bytes, which may be past the end of the disk."""
        return self._at if self.image.size >= 0 else 0

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Set the position, and return it. `whence` says what `offset` counts from: `io.SEEK_SET` the start of the disk,
        `io.SEEK_CUR` the position, `io.SEEK_END` the end of the disk. `os.SEEK_DATA` sets it to the first byte at or after
        `offset` that is not known to read as zero, and `os.SEEK_HOLE` to the first that is, or to the end of the disk; both
        raise BlockIOError with ENXIO, as files do, if there is none. OutOfRange for a position before the start, ValueError
        for another `whence`."""
        offset = operator.index(offset)
        size = self.image.size
        if whence == io.SEEK_SET:
            position = offset
        elif whence == io.SEEK_CUR:
            position = self._at + offset
        elif whence == io.SEEK_END:
            position = size + offset
        elif whence in (_SEEK_DATA, _SEEK_HOLE):
            position = self._search(offset, size, zero=whence == _SEEK_HOLE)
        else:
            raise ValueError(f"whence is {whence}; use io.SEEK_SET, SEEK_CUR, SEEK_END, or os.SEEK_DATA, SEEK_HOLE")
        if position < 0:
            raise OutOfRange(
                f"the position {position} is before the start of the disk", path=self.name, operation="seek"
            )
        self._at = position
        return position

    def _search(self, offset: int, size: int, *, zero: bool) -> int:
        """The first byte from `offset` on that is known to read as zero, or is not."""
        root, at = self.image.root, offset
        while 0 <= at < size:
            for row in root.first_extents(at, size - at, _ROWS):
                if bool(row.flags & ZERO) is zero:
                    return at
                at += row.length
        if zero and 0 <= offset < size:
            return size
        what = "hole" if zero else "data"
        raise BlockIOError(
            f"there is no {what} at or after this byte",
            errno=errno.ENXIO,
            path=self.name,
            operation="seek",
            offset=offset,
        )

    def read(self, size: int | None = -1, /) -> bytes:
        """At most `size` bytes; up to the end of the disk if it is negative or None. b"" at the end. Allocates no memory for
        bytes past the end."""
        image = self.image
        left = max(image.size - self._at, 0)
        wanted = -1 if size is None else operator.index(size)
        count = left if wanted < 0 else min(wanted, left)
        data = image.read(self._at, count) if count else b""
        self._at += count
        return data

    def readall(self) -> bytes:
        """All bytes from the position to the end of the disk."""
        return self.read()

    def readinto(self, buffer: Buffer, /) -> int:
        """Fill a writable contiguous buffer, of items of any size, or its first bytes at the end of the disk. Returns the
        number of bytes, 0 at the end."""
        image, view = self.image, byte_view(buffer)
        if view.readonly and view:
            raise TypeError(f"readinto() needs a writable buffer, not {type(buffer).__name__}")
        count = min(len(view), max(image.size - self._at, 0))
        if count:
            image.read_into(self._at, view[:count])
            self._at += count
        return count

    def write(self, data: Buffer, /) -> int:
        """Write all bytes of a contiguous buffer at the position, and return their number. OutOfRange, before any change, if
        they do not fit into the disk."""
        image, view = self.image, byte_view(data)
        if image.read_only or view:
            image.write(self._at, view)  # the image refuses what is not possible
        self._at += len(view)
        return len(view)

    def truncate(self, size: int | None = None, /) -> int:
        """Change the size of the disk to `size` bytes, or to the position, and return it. The position stays. Added bytes
        read as zero. See `Image.truncate` for the errors."""
        size = self._at if size is None else operator.index(size)
        self.image.truncate(size)
        return size

    def sync(self) -> None:
        """Return when all bytes of earlier writes are on stable storage, as `os.fsync` for other files."""
        self.image.flush()

    def __repr__(self) -> str:
        return f"<DiskFile name={self.name!r} mode={self.mode!r}{' closed' if self.closed else ''}>"
