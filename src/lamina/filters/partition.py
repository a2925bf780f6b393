"""The filter `partition`: one partition of a disk with an MBR (primary and logical partitions) or a GPT.

The tables follow the UEFI Specification, version 2.10, chapter 5 (GPT: section 5.3; legacy MBR: section 5.2.1). Logical
partitions follow the common layout: a chain of boot records inside the extended partition. Tables are untrusted input: every
number is checked against the size of the disk, checksums are verified, and the length of the chain is bounded.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any, ClassVar, Final, NamedTuple

from ..errors import CorruptImage, FormatError, LimitExceeded, OptionError
from ..layout import Field, Structure
from ..limits import is_power_of_two
from ..request import Child
from ..schema import Option
from ..window import WindowNode

MBR_ENTRY: Final = Structure(
    "MBR partition entry",
    "<",
    [
        Field("status", "u8", "0x80: bootable", default=0),
        Field("first_chs", "3s", "the first cylinder, head and sector; not used", default=bytes(3)),
        Field("type", "u8", "the type of the content; 0: the entry is empty"),
        Field("last_chs", "3s", "the last cylinder, head and sector; not used", default=bytes(3)),
        Field("first", "u32", "the first sector (of a logical partition: relative to its boot record)"),
        Field("sectors", "u32", "the number of sectors"),
    ],
)
GPT_HEADER: Final = Structure(
    "GPT header",
    "<",
    [
        Field("signature", "8s", 'the bytes "EFI PART"', default=b"EFI PART"),
        Field("revision", "u32", "1.0", default=0x10000),
        Field("header_size", "u32", "the number of bytes that the checksum covers", default=92),
        Field("header_crc", "u32", "CRC-32 of the header, with this field as zero", default=0),
        Field("", "4x", "reserved"),
        Field("my_lba", "u64", "the sector of this header"),
        Field("alternate_lba", "u64", "the sector of the other copy"),
        Field("first_usable", "u64", "the first sector that a partition may use"),
        Field("last_usable", "u64", "the last sector that a partition may use"),
        Field("disk_guid", "16s", "the identifier of the disk", default=bytes(16)),
        Field("entries_lba", "u64", "the first sector of the entries"),
        Field("entry_count", "u32", "the number of entries, including empty ones"),
        Field("entry_size", "u32", "the size of an entry: 128 bytes times a power of two", default=128),
        Field("entries_crc", "u32", "CRC-32 of all entries", default=0),
    ],
)
GPT_ENTRY: Final = Structure(
    "GPT partition entry",
    "<",
    [
        Field("type_guid", "16s", "the type of the content; zeros: the entry is empty"),
        Field("guid", "16s", "the identifier of the partition", default=bytes(16)),
        Field("first", "u64", "the first sector"),
        Field("last", "u64", "the last sector"),
        Field("attributes", "u64", "flags", default=0),
        Field("name", "72s", "the name, in UTF-16LE", default=bytes(72)),
    ],
)

SECTOR_SIZES: Final = (512, 4096)
_PROTECTIVE: Final = 0xEE
_EXTENDED: Final = (0x05, 0x0F, 0x85)
#: The maximum length of the chain of logical partitions. Operating systems stop at about 60.
_MAX_LOGICAL: Final = 128
#: The maximum size of all GPT entries in bytes: 8,192 entries of the usual size. Most tables have 128.
_MAX_ENTRIES: Final = 1 << 20


class Partition(WindowNode):
    """The partition `partition` of `image`. Numbers are those of Linux: 1 to 4 are primary partitions and 5 and up logical
    ones of an MBR; for a GPT they are the numbers of the entries. The table is read once, when the node is opened; the size
    is fixed. Stateless and thread-safe. Raises FormatError without a partition table, CorruptImage for an inconsistent
    table, OptionError for an unknown partition."""

    driver = "partition"
    options: ClassVar[tuple[Option, ...]] = (
        Option(
            "partition",
            "int",
            "the number of the partition, as in Linux: 1 to 4 primary, 5 and up logical; or of the GPT entry",
            required=True,
            minimum=1,
        ),
        Option("sector-size", "int", "the sector size of the disk in bytes (default: detected)", choices=SECTOR_SIZES),
    )

    def __init__(self, image: Child, partition: int, *, sector_size: int | None = None, **common: Any) -> None:
        super().__init__(image, *find(image, partition, sector_size), **common)


class _Table(NamedTuple):
    """A GPT with valid checksums and bounds."""

    sector: int
    first_usable: int
    last_usable: int
    entry_size: int
    entries: bytes


def find(disk: Child, number: int, sector: int | None = None) -> tuple[int, int]:
    """The offset and length, in bytes, of partition `number`, which is inside the disk. `sector`: the sector size, 512 or
    4096. The default is that of the GPT; for an MBR it is 4096 if the disk requires requests of that alignment, else 512.
    Raises as `Partition` does."""
    record = _table_of(disk)
    if record is None:
        raise FormatError(
            "the disk has no partition table", path=disk.node.filename, hint="open the image without this filter"
        )
    if _is_gpt(record):
        table = _gpt(disk, (sector,) if sector else SECTOR_SIZES)
        numbers = _used(table)
        if number not in numbers:
            raise _missing(disk, number, numbers)
        return _in_gpt(disk, table, number)
    sector = sector or _mbr_sector(disk)
    found = _in_mbr(disk, record, number, sector)
    if number not in found:
        raise _missing(disk, number, sorted(found))
    return _inside(disk, number, found[number], sector)


def partitions(disk: Child, sector: int | None = None) -> dict[int, tuple[int, int]]:
    """The offset and length, in bytes, of each partition, by its number; none for a disk without a partition table. `sector`
    as for `find`. Raises CorruptImage for an inconsistent table, and for a partition that is not inside the disk."""
    record = _table_of(disk)
    if record is None:
        return {}
    if _is_gpt(record):
        table = _gpt(disk, (sector,) if sector else SECTOR_SIZES)
        return {number: _in_gpt(disk, table, number) for number in _used(table)}
    sector = sector or _mbr_sector(disk)
    found = _in_mbr(disk, record, None, sector)
    return {number: _inside(disk, number, bounds, sector) for number, bounds in sorted(found.items())}


def _table_of(disk: Child) -> list[Any] | None:
    """The entries of the first boot record; None if the disk has no partition table."""
    record = _boot_record(disk, 0)
    # The boot sector of a file system has the same signature, but boot code in place of the entries.
    return None if record is None or any(entry.status & 0x7F for entry in record) else record


def _is_gpt(record: list[Any]) -> bool:
    return any(entry.type == _PROTECTIVE for entry in record)


# -- GPT


def _gpt(disk: Child, sectors: tuple[int, ...]) -> _Table:
    """The first valid copy of the table: the primary copy with any of the sector sizes, otherwise the backup."""
    reasons = []
    for backup in (False, True):
        for sector in sectors:
            lba = disk.size // sector - 1 if backup else 1
            found = _gpt_at(disk, sector, lba)
            if isinstance(found, _Table):
                return found
            reasons.append(f"{found} in {sector}-byte sector {lba}")
    raise CorruptImage(
        "no copy of the GPT is valid: " + ", ".join(reasons),
        path=disk.node.filename,
        hint="repair it with gdisk or sfdisk",
    )


def _gpt_at(disk: Child, sector: int, lba: int) -> _Table | str:
    """The table whose header is in sector `lba`, or the reason why there is no valid one."""
    sectors = disk.size // sector
    if not 1 <= lba < sectors:
        return "no space for a header"
    raw = _read(disk, lba * sector, sector)
    header = GPT_HEADER.unpack(raw)
    if header.signature != b"EFI PART":
        return "no header"
    if not GPT_HEADER.size <= header.header_size <= sector:
        return f"a header of {header.header_size} bytes"
    at = GPT_HEADER["header_crc"].offset
    if zlib.crc32(raw[:at] + bytes(4) + raw[at + 4 : header.header_size]) != header.header_crc:
        return "a header with a wrong checksum"
    if header.my_lba != lba:
        return f"a header for sector {header.my_lba}"
    if header.entry_size % GPT_ENTRY.size or not is_power_of_two(header.entry_size // GPT_ENTRY.size):
        return f"entries of {header.entry_size} bytes"
    length = header.entry_count * header.entry_size
    if not 0 < length <= _MAX_ENTRIES:
        return f"{header.entry_count} entries"
    if header.entries_lba < 2 or header.entries_lba * sector + length > disk.size:
        return "entries outside the disk"
    if not header.first_usable <= header.last_usable < sectors:
        return "usable sectors outside the disk"
    entries = _read(disk, header.entries_lba * sector, length)
    if zlib.crc32(entries) != header.entries_crc:
        return "entries with a wrong checksum"
    return _Table(sector, header.first_usable, header.last_usable, header.entry_size, entries)


def _used(table: _Table) -> list[int]:
    """The numbers of the partitions."""
    step = table.entry_size
    return [at // step + 1 for at in range(0, len(table.entries), step) if any(table.entries[at : at + 16])]


def _in_gpt(disk: Child, table: _Table, number: int) -> tuple[int, int]:
    """The offset and length of a partition in bytes."""
    entry = GPT_ENTRY.unpack(table.entries, (number - 1) * table.entry_size)
    # `_gpt_at` has checked the usable sectors against the size of the disk.
    if not table.first_usable <= entry.first <= entry.last <= table.last_usable:
        raise _outside(disk, number, entry.first, entry.last - entry.first + 1)
    return entry.first * table.sector, (entry.last - entry.first + 1) * table.sector


# -- MBR


def _mbr_sector(disk: Child) -> int:
    return 4096 if disk.node.limits.request_alignment == 4096 else 512


def _in_mbr(disk: Child, record: list[Any], number: int | None, sector: int) -> dict[int, tuple[int, int]]:
    """The first sector and the number of sectors of the partitions up to `number`; None: of all."""
    found: dict[int, tuple[int, int]] = {}
    for slot, entry in enumerate(record, 1):
        if entry.type and entry.type not in _EXTENDED:
            found[slot] = entry.first, entry.sectors
    extended = next((entry for entry in record if entry.type in _EXTENDED), None)
    if extended is not None and (number is None or number > 4):
        for logical, bounds in enumerate(_logical(disk, extended, sector), 5):
            found[logical] = bounds
            if logical == number:
                break
    return found


def _inside(disk: Child, number: int, bounds: tuple[int, int], sector: int) -> tuple[int, int]:
    """The offset and length in bytes of a partition with these sectors."""
    first, sectors = bounds
    if not sectors or (first + sectors) * sector > disk.size:
        raise _outside(disk, number, first, sectors)
    return first * sector, sectors * sector


def _logical(disk: Child, extended: Any, sector: int) -> Iterator[tuple[int, int]]:
    """The first sector and the number of sectors of each logical partition, in the order of the chain. Each boot record
    contains one partition, relative to the record, and the next record, relative to the extended partition."""
    begin, end = extended.first, extended.first + extended.sectors
    at, seen = begin, {0}
    while True:
        if at in seen:
            raise CorruptImage(f"the chain of logical partitions returns to sector {at}", path=disk.node.filename)
        if len(seen) > _MAX_LOGICAL:
            raise LimitExceeded(f"there are more than {_MAX_LOGICAL} logical partitions", path=disk.node.filename)
        seen.add(at)
        record = _boot_record(disk, at * sector) if begin <= at < end else None
        if record is None:
            raise CorruptImage(
                f"the chain of logical partitions refers to sector {at}, which is not a boot record",
                path=disk.node.filename,
            )
        for entry in record[:2]:
            if entry.type and entry.type not in _EXTENDED and entry.sectors:
                if at + entry.first + entry.sectors > end:
                    raise CorruptImage(
                        f"the logical partition of the boot record in sector {at} ends outside its extended partition",
                        path=disk.node.filename,
                    )
                yield at + entry.first, entry.sectors
        link = next((entry for entry in record[:2] if entry.type in _EXTENDED and entry.sectors), None)
        if link is None:
            return
        at = begin + link.first


def _boot_record(disk: Child, offset: int) -> list[Any] | None:
    """The four entries of the boot record at `offset`, or None if there is none."""
    if offset + 512 > disk.size:
        return None
    raw = _read(disk, offset, 512)
    if raw[510:] != b"\x55\xaa":
        return None
    return [MBR_ENTRY.unpack(raw, 446 + slot * MBR_ENTRY.size) for slot in range(4)]


def _read(disk: Child, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    disk.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def _missing(disk: Child, number: int, numbers: list[int]) -> OptionError:
    known = ", ".join(map(str, numbers[:16])) + (", ..." if len(numbers) > 16 else "")
    return OptionError(
        f"the disk has no partition {number}",
        path=disk.node.filename,
        hint=f"the partitions are: {known}" if numbers else "the partition table is empty",
    )


def _outside(disk: Child, number: int, first: int, sectors: int) -> CorruptImage:
    return CorruptImage(
        f"partition {number} ({sectors} sectors from {first}) is not inside the disk of {disk.size} bytes",
        path=disk.node.filename,
    )
