"""The filter `logwrites`: logs every write, in order, for replay up to any point.

The log has the format, version 1, of the Linux device-mapper target log-writes (Documentation/admin-guide/device-mapper/
log-writes), so the tools for that target read it, and so does `lamina.testing.write_log`. All fields are little-endian.
Sector 0 is the superblock: magic, version, number of entries (8 bytes each), sector size (4 bytes). Each entry is a sector
that begins with: sector, number of sectors, flags, length of inline data (8 bytes each). The inline data of a mark follows
in the same sector; the data of a write follows in the next sectors.
"""

from __future__ import annotations

import struct
import threading
from typing import TYPE_CHECKING, Any, ClassVar, Self

from ..errors import FormatError, OptionError
from ..limits import MAX_SIZE, align_up, is_power_of_two
from ..node import FUA, MAY_UNMAP, FilterNode
from ..options import parse_name
from ..schema import Option, Schema
from ..side_file import make_side_file

if TYPE_CHECKING:
    from ..graph import Opener
    from ..limits import Limits
    from ..request import Child

MAGIC = 0x6A736677736872
VERSION = 1
SUPER = struct.Struct("<3QI")
ENTRY = struct.Struct("<4Q")
FLUSH_FLAG, FUA_FLAG, DISCARD_FLAG, MARK_FLAG = 1, 2, 4, 8
#: The text of a mark that records a resize; the new size in bytes follows.
RESIZED = "lamina: size "
_FILENAME = Option("filename", "str", "the file of a log")


class LogWrites(FilterNode):
    """Passes all requests to `image` and appends those that change it to `log`: writes and zero requests with their bytes,
    discards, flushes and marks.

    A request is logged after it has succeeded. The entry of a flush follows all requests that had returned when the flush
    began, and precedes all requests that returned later, which is the weakest guarantee of a disk. Requests are aligned to
    `sector_size` and ordered where they overlap, so the order of the log is that of the disk. A read-only node has no log.
    """

    driver: ClassVar[str] = "logwrites"
    faithful = True
    schema: ClassVar[Schema] = Schema(
        "logwrites",
        [
            Option("image", "node", "the node below", required=True, aliases=("file",)),
            Option("log", "node", "the log: a file, created if it does not exist, or a node", required=True),
            Option(
                "log-sector-size",
                "size",
                "the sector of the log and the request alignment of the filter, a power of two",
                default=512,
                minimum=512,
                maximum=1 << 23,
            ),
            Option("log-append", "bool", "append to an existing log instead of overwriting it", default=False),
            Option(
                "log-super-update-interval",
                "int",
                "the number of entries after which the superblock is updated",
                default=4096,
                minimum=1,
            ),
        ],
    )

    def __init__(
        self,
        image: Child,
        log: Child | None,
        *,
        log_sector_size: int = 512,
        log_append: bool = False,
        log_super_update_interval: int = 4096,
        name: str | None = None,
        read_only: bool = False,
    ) -> None:
        super().__init__(image, name=name, read_only=read_only)
        if not is_power_of_two(log_sector_size):
            raise OptionError(f"log-sector-size is {log_sector_size}", hint="it takes a power of two")
        self.sector_size = log_sector_size
        self._interval = log_super_update_interval
        self._mutex = threading.Lock()
        self._entries, self._end, self._told = 0, log_sector_size, 0
        if log is not None:
            if log_append and log.size:
                self._entries, self._end = _find_end(log, log_sector_size)
            self.children["log"] = log
            self._tell(log)

    @classmethod
    def open(cls, options: dict[str, Any], opener: Opener) -> Self:
        """Raises FormatError if `log-append` finds no log, or a log with another sector size."""
        given = options.pop("log")
        log = None if opener.read_only else opener.child("log", _storage(given), grows=True)
        return super().open({**options, "log": log}, opener)

    @property
    def limits(self) -> Limits:
        below = self.image.node.limits
        unit = max(below.request_alignment, self.sector_size)
        most = below.max_transfer if below.max_transfer >= unit else 0
        return below._replace(request_alignment=unit, max_transfer=most)

    @property
    def serialise(self) -> int:
        return self.sector_size

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        self.image.write(offset, view, flags)
        self._append(offset, len(view), FUA_FLAG if flags & FUA else 0, view)

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        self.image.zero(offset, length, flags)
        self._append(offset, length, FUA_FLAG if flags & FUA else 0)

    def discard(self, offset: int, length: int) -> None:
        self.image.discard(offset, length)
        self._append(offset, length, DISCARD_FLAG)

    def flush(self) -> None:
        with self._mutex:  # requests that return during the flush may not be covered by it, so they are logged after it
            self.image.flush()
            log = self.children.get("log")
            if log is not None and not self.read_only:
                self._add(log, ENTRY.pack(0, 0, FLUSH_FLAG, 0))
                self._tell(log)
                log.flush()

    def truncate(self, size: int) -> None:
        """Truncate the image. The log format has no entry for that; a mark records it for `lamina.testing.write_log`."""
        self.image.truncate(size)
        self.mark(f"{RESIZED}{size}")

    def mark(self, text: str) -> None:
        """Append a mark, a point to which the log can be replayed. Raises OptionError if it does not fit in a sector."""
        data = text.encode()
        most = self.sector_size - ENTRY.size
        if len(data) > most:
            raise OptionError(f"a mark of {len(data)} bytes does not fit", hint=f"at most {most} bytes")
        log = self.children.get("log")
        if log is not None:
            with self._mutex:
                self._add(log, ENTRY.pack(0, 0, MARK_FLAG, len(data)) + data)
                self._tell(log)

    def begin_writing(self) -> None:
        if "log" not in self.children:
            raise self.refuse("log that was opened with it")  # it was opened for reading, which logs nothing

    def settle(self) -> None:
        log = self.children.get("log")
        if log is not None and not self.read_only:
            with self._mutex:
                self._tell(log)

    def _append(self, offset: int, length: int, flags: int, view: memoryview | None = None) -> None:
        """Append an entry for a request, and its bytes after it; zeros if `view` is None."""
        log = self.children.get("log")
        if log is None:
            return
        sectors = -(-length // self.sector_size)
        with self._mutex:
            header = ENTRY.pack(offset // self.sector_size, sectors, flags, 0)
            data = self._end + self.sector_size
            end = data if flags & DISCARD_FLAG else data + sectors * self.sector_size
            # The bytes are written before the header that makes them valid. (There is no flush between the two.)
            if view is not None:
                log.write(data, view)
                log.zero(data + length, end - data - length)
            elif end > data:
                log.zero(data, end - data, MAY_UNMAP)
            self._add(log, header)
            self._end = end
            if self._entries - self._told >= self._interval:
                self._tell(log)

    def _add(self, log: Child, header: bytes) -> None:
        log.write(self._end, memoryview(header.ljust(self.sector_size, b"\0")))
        self._end += self.sector_size
        self._entries += 1

    def _tell(self, log: Child) -> None:
        raw = SUPER.pack(MAGIC, VERSION, self._entries, self.sector_size)
        log.write(0, memoryview(raw.ljust(self.sector_size, b"\0")))
        self._told = self._entries


def _storage(given: Any) -> Any:
    """Options for the node that stores the log. A file that does not exist is created."""
    spec = parse_name(given) if isinstance(given, str) else given
    if not isinstance(spec, dict):
        return spec
    spec = {"driver": "file", **spec}
    if isinstance(spec.get("filename"), str):
        _FILENAME.parse(spec["filename"], "log.filename")
    path = spec.get("filename")
    if spec["driver"] == "file" and isinstance(path, str):
        make_side_file(path, failure="cannot create the log")
    return spec


def _find_end(log: Child, sector_size: int) -> tuple[int, int]:
    """(number of entries, end of the last entry) of an existing log."""
    path = log.node.filename
    raw = bytearray(SUPER.size)
    log.read_into(0, memoryview(raw))
    magic, version, entries, size = SUPER.unpack(raw)
    if magic != MAGIC or version != VERSION:
        raise FormatError("this is not a log of logwrites", path=path, hint="omit log-append to begin a new log")
    if size != sector_size:
        hint = f"set log-sector-size={size}"
        raise FormatError(f"the sector size of the log is {size} bytes, not {sector_size}", path=path, hint=hint)
    end = sector_size
    head = bytearray(ENTRY.size)
    for number in range(entries):
        log.read_into(min(end, MAX_SIZE - ENTRY.size), memoryview(head))
        _, sectors, flags, _ = ENTRY.unpack(head)
        end += sector_size + (0 if flags & (DISCARD_FLAG | MARK_FLAG) else sectors * sector_size)
        if end > align_up(log.size, sector_size):
            raise FormatError(f"entry {number} is outside the log", path=path, hint="begin a new log")
    return entries, end
