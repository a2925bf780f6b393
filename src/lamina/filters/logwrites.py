"""The filter `logwrites`: every write, in order, in a log that can be replayed to any point.

The log has the format of the Linux device-mapper target log-writes (Documentation/admin-guide/device-mapper/log-writes),
version 1, so that tools made for that read it; `lamina.testing.write_log` does too. All fields are little-endian. Sector 0 is
the superblock: magic, version, number of entries (8 bytes each), sector size (4 bytes). Each entry is a sector that begins
with: sector, number of sectors, flags, bytes of inline data (8 bytes each); the inline data of a mark follows at once, the
data of a write in whole sectors behind it.
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
#: A mark with this text, and a number of bytes behind it, says that the disk was made so long.
RESIZED = "lamina: size "
_FILENAME = Option("filename", "str", "the file of a log")


class LogWrites(FilterNode):
    """Passes everything on to `image`, and appends what changed it to `log`: writes and zeroes with their bytes, discards,
    flushes, marks.

    A request is logged when it has succeeded. A flush is logged behind all that had returned when it began and before all
    that returned later, as the worst disk would have it. Requests are multiples of `sector_size` and ordered where they
    overlap, so the log has the order that the disk saw. Without a log (read-only) it only passes.
    """

    driver: ClassVar[str] = "logwrites"
    faithful = True
    schema: ClassVar[Schema] = Schema(
        "logwrites",
        [
            Option("image", "node", "the node below", required=True, aliases=("file",)),
            Option("log", "node", "where the log goes: a file, made if it is not there, or a node", required=True),
            Option("log-sector-size", "size", "a power of two", default=512, minimum=512, maximum=1 << 23),
            Option("log-append", "bool", "go on with the log that is there", default=False),
            Option(
                "log-super-update-interval",
                "int",
                "entries after which the count in the superblock is brought up to date",
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
        """Raises FormatError where `log-append` finds no log, or one of another sector size."""
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
        with self._mutex:  # what returns while this runs may not be covered by it: that is logged behind it
            self.image.flush()
            log = self.children.get("log")
            if log is not None and not self.read_only:
                self._add(log, ENTRY.pack(0, 0, FLUSH_FLAG, 0))
                self._tell(log)
                log.flush()

    def truncate(self, size: int) -> None:
        """The format has no entry for this: it is logged as a mark, which `lamina.testing.write_log` follows."""
        self.image.truncate(size)
        self.mark(f"{RESIZED}{size}")

    def mark(self, text: str) -> None:
        """Put a mark into the log, to be replayed up to. OptionError if it does not fit a sector behind its header."""
        data = text.encode()
        most = self.sector_size - ENTRY.size
        if len(data) > most:
            raise OptionError(f"a mark of {len(data)} bytes does not fit", hint=f"at most {most} bytes")
        log = self.children.get("log")
        if log is not None:
            with self._mutex:
                self._add(log, ENTRY.pack(0, 0, MARK_FLAG, len(data)) + data)
                self._tell(log)

    def settle(self) -> None:
        log = self.children.get("log")
        if log is not None and not self.read_only:
            with self._mutex:
                self._tell(log)

    def _append(self, offset: int, length: int, flags: int, view: memoryview | None = None) -> None:
        """An entry for this request, and the bytes behind it; zeros where there is no view."""
        log = self.children.get("log")
        if log is None:
            return
        sectors = -(-length // self.sector_size)
        with self._mutex:
            header = ENTRY.pack(offset // self.sector_size, sectors, flags, 0)
            data = self._end + self.sector_size
            end = data if flags & DISCARD_FLAG else data + sectors * self.sector_size
            # The bytes before the header that makes them count, as far as that can be said without a flush.
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
    """Options for the node that holds the log. A plain name is a file; it is made if it is not there."""
    spec = parse_name(given) if isinstance(given, str) else given
    if not isinstance(spec, dict):
        return spec
    spec = {"driver": "file", **spec}
    if isinstance(spec.get("filename"), str):
        _FILENAME.parse(spec["filename"], "log.filename")
    path = spec.get("filename")
    if spec["driver"] == "file" and isinstance(path, str):
        make_side_file(path, failure="cannot make the log")
    return spec


def _find_end(log: Child, sector_size: int) -> tuple[int, int]:
    """(number of entries, byte behind the last) of the log that is there."""
    path = log.node.filename
    raw = bytearray(SUPER.size)
    log.read_into(0, memoryview(raw))
    magic, version, entries, size = SUPER.unpack(raw)
    if magic != MAGIC or version != VERSION:
        raise FormatError("there is no log of writes to append to", path=path, hint="leave log-append out to begin one")
    if size != sector_size:
        raise FormatError(
            f"its sectors are {size} bytes long, not {sector_size}", path=path, hint="set log-sector-size"
        )
    end = sector_size
    head = bytearray(ENTRY.size)
    for number in range(entries):
        log.read_into(min(end, MAX_SIZE - ENTRY.size), memoryview(head))
        _, sectors, flags, _ = ENTRY.unpack(head)
        end += sector_size + (0 if flags & (DISCARD_FLAG | MARK_FLAG) else sectors * sector_size)
        if end > align_up(log.size, sector_size):
            raise FormatError(f"entry {number} of the log does not lie in it", path=path, hint="begin a new one")
    return entries, end
