"""Reading and replaying logs of writes in the format of dm-log-writes, made by `filters.logwrites`, QEMU or Linux.

`read_log` returns the entries, `replay` the disk at any point among them, and `records` converts a log for the power-loss
harness, which then tries every state that a power cut could have left on the logged disk.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ..errors import BlockIOError, FormatError
from .persistence import Record, apply

_MAGIC, _VERSION = 0x6A736677736872, 1
_SUPER, _ENTRY = struct.Struct("<3QI"), struct.Struct("<4Q")
_FLUSH, _FUA, _DISCARD, _MARK = 1, 2, 4, 8
_SIZE = "lamina: size "
_LARGEST_SECTOR = 1 << 23


class Entry(NamedTuple):
    """One entry of a log. Offsets and lengths are bytes."""

    number: int
    kind: str  #: write, discard, flush, mark, resize
    offset: int = 0  #: for a resize: the new size
    length: int = 0
    data: bytes = b""
    fua: bool = False
    flush: bool = False  #: a write or mark that also includes a flush before it
    text: str = ""  #: for a mark


def read_log(path: str | os.PathLike[str]) -> Iterator[Entry]:
    """The entries of the log at `path`, as many as its superblock counts. FormatError if it is not such a log, or is
    truncated; BlockIOError if it cannot be read."""
    name = os.fspath(path)
    try:
        with open(name, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            raw = file.read(_SUPER.size)
            if len(raw) < _SUPER.size or _SUPER.unpack(raw)[:2] != (_MAGIC, _VERSION):
                raise FormatError(
                    "it is not a log of writes, version 1", path=name, hint="the filter logwrites creates such logs"
                )
            _, _, count, sector = _SUPER.unpack(raw)
            if not 0 < sector <= _LARGEST_SECTOR:
                raise FormatError(f"the log declares sectors of {sector} bytes", path=name)
            at = sector
            for number in range(count):
                file.seek(at)
                head = file.read(sector)
                if len(head) < _ENTRY.size:
                    raise _ends(name, number)
                first, sectors, flags, inline = _ENTRY.unpack_from(head)
                length = sectors * sector
                at += sector
                stored = not flags & (_DISCARD | _MARK)
                if inline > sector - _ENTRY.size or (stored and at + length > size):
                    raise _ends(name, number)
                if flags & _MARK:
                    text = head[_ENTRY.size : _ENTRY.size + inline].decode(errors="replace")
                    if text.startswith(_SIZE) and text.removeprefix(_SIZE).isdecimal():
                        yield Entry(number, "resize", int(text.removeprefix(_SIZE)))
                    else:
                        yield Entry(number, "mark", flush=bool(flags & _FLUSH), text=text)
                elif flags & _DISCARD:
                    yield Entry(number, "discard", first * sector, length)
                elif flags & _FLUSH and not length:
                    yield Entry(number, "flush")
                else:
                    data = file.read(length)
                    fua, flush = bool(flags & _FUA), bool(flags & _FLUSH)
                    yield Entry(number, "write", first * sector, length, data, fua, flush)
                    at += length
    except OSError as error:
        if isinstance(error, BlockIOError):
            raise
        raise BlockIOError.from_os(error, "cannot read the log", path=name) from error


def _ends(name: str, number: int) -> FormatError:
    return FormatError(f"the log ends inside entry {number}", path=name)


def replay(entries: Iterable[Entry], content: bytes = b"", *, until: str | None = None) -> bytes:
    """The content of the disk, `content` at the beginning of the log, after these entries; with `until`, up to the first mark
    with that text. Discarded bytes read as zero. The result may be longer than a disk whose size is not a multiple of the
    sectors of the log."""
    disk = bytearray(content)
    for entry in entries:
        if until is not None and entry.kind == "mark" and entry.text == until:
            break
        for record in records([entry]):
            apply(disk, record)
    return bytes(disk)


def records(entries: Iterable[Entry]) -> Iterator[Record]:
    """The log as records for `persistence.crash_states`. Marks become `begin` marks with their text as label."""
    for entry in entries:
        if entry.kind == "flush" or entry.flush:
            yield Record("flush_start", label=entry.number)
            yield Record("flush_done", label=entry.number)
        if entry.kind == "write":
            yield Record("write", entry.offset, entry.length, entry.data, entry.fua)
        elif entry.kind == "discard":
            yield Record("discard", entry.offset, entry.length)
        elif entry.kind == "resize":
            yield Record("truncate", entry.offset)
        elif entry.kind == "mark":
            yield Record("begin", label=entry.text)
