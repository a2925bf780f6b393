"""The bitmap directory: the persistent dirty bitmaps of an image, and where their bits lie. After "Bitmaps extension" and
"Bitmaps" of the published specification.

The bits of a bitmap are cut into clusters. Its bitmap table says where each lies, or that all of its bits are 0, or 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ...errors import CorruptImage, LimitExceeded, printable
from ...limits import MIB, align_up
from . import layout as q

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ...request import Child
    from .header import Header

IN_USE: Final = 1  #: it was not saved since it was last changed
AUTO: Final = 2  #: it records all writes
EXTRA_COMPATIBLE: Final = 4  #: it may be used though nobody knows its extra data
_KNOWN: Final = IN_USE | AUTO | EXTRA_COMPATIBLE
DIRTY_TRACKING: Final = 1

MAX_BITMAPS: Final = 65_535
MAX_DIRECTORY: Final = 64 * MIB
MAX_NAME: Final = 1023
#: Granularities that other programs support: 512 bytes to 2 GiB.
MIN_GRANULARITY_BITS, MAX_GRANULARITY_BITS = 9, 31
#: Entries of one bitmap table: 32 MiB of them, as of an L1 table.
MAX_TABLE: Final = 4 * MIB


class Entry(NamedTuple):
    """One entry of the directory. `extra` is kept byte for byte, whatever it holds."""

    table_offset: int
    table_size: int  #: entries
    flags: int
    type: int
    granularity_bits: int
    name: str
    extra: bytes = b""

    def to_bytes(self) -> bytes:
        """The entry as it lies in the directory, padded to a multiple of 8."""
        name = self.name.encode("utf-8", "surrogateescape")
        fixed: bytes = q.BITMAP_ENTRY.pack(
            bitmap_table_offset=self.table_offset,
            bitmap_table_size=self.table_size,
            flags=self.flags,
            type=self.type,
            granularity_bits=self.granularity_bits,
            name_size=len(name),
            extra_data_size=len(self.extra),
        )
        whole = fixed + self.extra + name
        return whole.ljust(align_up(len(whole), 8), b"\0")

    def to_json(self) -> dict[str, Any]:
        """By the names of `qemu-img info --output=json`."""
        named = (("in-use", IN_USE), ("auto", AUTO))
        flags = [name for name, flag in named if self.flags & flag]
        return {"flags": flags, "name": self.name, "granularity": 1 << self.granularity_bits}

    @property
    def usable(self) -> bool:
        """Whether this version of Lamina may use the bits: they were saved, and nothing about them is unknown."""
        return not self.flags & IN_USE and self.known

    @property
    def known(self) -> bool:
        """Whether nothing about the bitmap is unknown here. One that is not is kept as it is."""
        readable = self.type == DIRTY_TRACKING and not self.flags & ~_KNOWN
        size_known = MIN_GRANULARITY_BITS <= self.granularity_bits <= MAX_GRANULARITY_BITS
        return readable and size_known and (not self.extra or bool(self.flags & EXTRA_COMPATIBLE))


def table_entries(size: int, granularity_bits: int, cluster_bits: int) -> int:
    """Entries of the table of a bitmap for a disk of `size` bytes."""
    bits = -(-size >> granularity_bits)
    length = -(-bits >> 3)
    return -(-length >> cluster_bits)


def extension(header: Header) -> tuple[int, int, int] | None:
    """(number of bitmaps, offset of the directory, its length) as the header says; None where it says that there are none, or
    that they are out of date. Not checked."""
    data = header.extension(q.EXT_BITMAPS)
    if data is None or not header.autoclear_features & q.AUTOCLEAR["bitmaps"] or len(data) != q.BITMAPS.size:
        return None
    found: Any = q.BITMAPS.unpack(data)
    return found.nb_bitmaps, found.bitmap_directory_offset, found.bitmap_directory_size


def read(file: Child, header: Header) -> list[Entry]:
    """The bitmaps of the image in `file`. CorruptImage, LimitExceeded where the directory cannot be read."""
    data = header.extension(q.EXT_BITMAPS)
    try:
        if header.autoclear_features & q.AUTOCLEAR["bitmaps"]:
            if data is None:
                raise CorruptImage("the header says that the bitmaps are up to date, and has none")
            if len(data) != q.BITMAPS.size:
                raise CorruptImage(f"the bitmaps extension has {len(data)} bytes instead of {q.BITMAPS.size}")
        where = extension(header)
        return [] if where is None else _read(file, header, *where)
    except (CorruptImage, LimitExceeded) as error:
        error.path = error.path or file.node.filename
        raise


def _read(file: Child, header: Header, count: int, offset: int, length: int) -> list[Entry]:
    if not 1 <= count <= MAX_BITMAPS:
        raise LimitExceeded(f"the number of bitmaps is {count}, not one of 1 to {MAX_BITMAPS}")
    if length > MAX_DIRECTORY:
        raise LimitExceeded(f"the bitmap directory has {length} bytes, above the limit of {MAX_DIRECTORY}")
    if offset % header.cluster_size or not offset or offset + length > align_up(file.size, header.cluster_size):
        raise CorruptImage(f"the bitmap directory at {offset:#x} is misaligned, or not inside the file")
    raw = bytearray(length)
    file.read_into(offset, memoryview(raw))
    entries = list(_entries(raw, count))
    if len({entry.name for entry in entries}) != len(entries):
        raise CorruptImage("two bitmaps have the same name", offset=offset)
    for entry in entries:
        _require_placed(entry, file, header)
    return entries


def _entries(raw: bytearray, count: int) -> Iterator[Entry]:
    at = 0
    for index in range(count):
        if at + q.BITMAP_ENTRY.size > len(raw):
            raise CorruptImage(f"the bitmap directory ends in entry {index} of {count}")
        fixed: Any = q.BITMAP_ENTRY.unpack(raw, at)
        extra_at = at + q.BITMAP_ENTRY.size
        name_at = extra_at + fixed.extra_data_size
        end = name_at + fixed.name_size
        if end > len(raw) or not 1 <= fixed.name_size <= MAX_NAME:
            raise CorruptImage(f"the bitmap directory ends in entry {index} of {count}, or its name is too long")
        yield Entry(
            fixed.bitmap_table_offset,
            fixed.bitmap_table_size,
            fixed.flags,
            fixed.type,
            fixed.granularity_bits,
            raw[name_at:end].decode("utf-8", "surrogateescape"),
            bytes(raw[extra_at:name_at]),
        )
        at = align_up(end, 8)
    if at != len(raw):
        raise CorruptImage(f"the bitmap directory has {len(raw)} bytes, and its entries {at}")


def _require_placed(entry: Entry, file: Child, header: Header) -> None:
    name = printable(entry.name)
    if not entry.table_size:
        return
    if entry.table_size > MAX_TABLE:
        raise LimitExceeded(f"the table of bitmap {name} has {entry.table_size} entries, above {MAX_TABLE}")
    end = entry.table_offset + 8 * entry.table_size
    if (
        entry.table_offset % header.cluster_size
        or not entry.table_offset
        or end > align_up(file.size, header.cluster_size)
    ):
        raise CorruptImage(
            f"the table of bitmap {name} at {entry.table_offset:#x} is misaligned, or not inside the file"
        )


def read_table(file: Child, header: Header, entry: Entry) -> list[int]:
    """The table of a bitmap: for each cluster of its bits where it lies, or 0 (all zeros) or 1 (all ones). CorruptImage where
    that cannot be."""
    import struct

    raw = bytearray(8 * entry.table_size)
    file.read_into(entry.table_offset, memoryview(raw))
    table = list(struct.unpack(f">{entry.table_size}Q", raw))
    for value in table:
        if value > 1 and (value % header.cluster_size or value & ~q.BITMAP_TABLE_MASK or value >= file.size):
            raise CorruptImage(
                f"the table of bitmap {printable(entry.name)} points to {value:#x}, which cannot be",
                path=file.node.filename,
                offset=entry.table_offset,
                hint="check the image",
            )
    return table
