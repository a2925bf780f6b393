"""The verdict on VHDX. After [MS-VHDX], sections 2.2 (headers, region table) and 2.6 (metadata)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, Final
from uuid import UUID

from ..errors import CorruptImage
from ..layout import Field, Structure
from ..limits import KIB, MIB, TIB, Budget
from .content import Content
from .result import Findings

_HEADERS: Final = (64 * KIB, 128 * KIB)
_TABLES: Final = (192 * KIB, 256 * KIB)
_TABLE_BYTES: Final = 64 * KIB
#: Bytes of metadata that are looked at: the table and the items behind it.
_METADATA_BYTES: Final = 256 * KIB
_MAX_ENTRIES: Final = 2047
_MAX_SIZE: Final = 64 * TIB

_HEADER: Final = Structure(
    "VHDX header",
    "<",
    [
        Field("signature", "4s"),
        Field("checksum", "u32"),
        Field("sequence", "u64"),
        Field("file_write_guid", "16s"),
        Field("data_write_guid", "16s"),
        Field("log_guid", "16s", "zeros: the log is empty"),
        Field("log_version", "u16"),
        Field("version", "u16"),
        Field("log_length", "u32"),
        Field("log_offset", "u64"),
    ],
)
_TABLE: Final = Structure(
    "VHDX region table",
    "<",
    [Field("signature", "4s"), Field("checksum", "u32"), Field("count", "u32"), Field("", "4x")],
)
_REGION: Final = Structure(
    "VHDX region", "<", [Field("guid", "16s"), Field("offset", "u64"), Field("length", "u32"), Field("required", "u32")]
)
_METADATA: Final = Structure(
    "VHDX metadata table", "<", [Field("signature", "8s"), Field("", "2x"), Field("count", "u16"), Field("", "20x")]
)
_ITEM: Final = Structure(
    "VHDX metadata item",
    "<",
    [Field("guid", "16s"), Field("offset", "u32"), Field("length", "u32"), Field("flags", "u32"), Field("", "4x")],
)
_PARAMETERS: Final = Structure("VHDX file parameters", "<", [Field("block_size", "u32"), Field("flags", "u32")])
_SIZE: Final = Structure("VHDX disk size", "<", [Field("size", "u64")])
_LOCATOR: Final = Structure("VHDX parent locator", "<", [Field("type", "16s"), Field("", "2x"), Field("count", "u16")])
_PAIR: Final = Structure(
    "VHDX parent locator entry",
    "<",
    [Field("key", "u32"), Field("value", "u32"), Field("key_size", "u16"), Field("value_size", "u16")],
)
_HAS_PARENT: Final = 2
_IS_REQUIRED: Final = 4
_MAX_PAIRS: Final = 64


def _guid(text: str) -> bytes:
    return UUID(text).bytes_le


_METADATA_REGION: Final = _guid("8B7CA206-4790-4B9A-B8FE-575F050F886E")
_REGIONS: Final = {_METADATA_REGION, _guid("2DC27766-F623-4200-9D64-115E9BFD4A08")}
_FILE_PARAMETERS: Final = _guid("CAA16737-FA36-4D43-B3B6-33F0AA44E76B")
_DISK_SIZE: Final = _guid("2FA54224-CD1B-4876-B211-5DBED83BF4B8")
_PARENT_LOCATOR: Final = _guid("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C")
_ITEMS: Final = {
    _FILE_PARAMETERS,
    _DISK_SIZE,
    _PARENT_LOCATOR,
    _guid("8141BF1D-A96F-4709-BA47-F233A8FAAB5F"),  # logical sector size
    _guid("CDA348C7-445D-4471-9CC9-E9885251C556"),  # physical sector size
    _guid("BECA12AB-B2E6-4523-93EF-C309E000C746"),  # identification of the disk
}


def wanted(head: memoryview) -> Iterator[tuple[int, int]]:
    """The parts of the file besides its beginning that `judge` reads."""
    for region in _regions(bytes(head[_TABLES[0] : _TABLES[0] + _TABLE_BYTES])):
        if region.guid == _METADATA_REGION:
            yield region.offset, min(region.length, _METADATA_BYTES)


def judge(content: Content, found: Findings, budget: Budget) -> None:
    """Raises FormatError if the file is not a usable image."""
    _judge_log(content, found)
    first, second = (content.read(at, _TABLE_BYTES) for at in _TABLES)
    if len(second) < _TABLE_BYTES or not first.startswith(b"regi"):
        raise CorruptImage("it has no region table")
    if first != second:
        found.refuse("the two copies of its region table differ")
    if not _is_checked(first):
        found.refuse("the checksum of its region table is wrong")
    if _TABLE.unpack(first).count > _MAX_ENTRIES:
        found.exceed(f"its region table has {_TABLE.unpack(first).count} entries, above the limit of {_MAX_ENTRIES}")
    metadata = None
    for region in _regions(first):
        if region.guid == _METADATA_REGION:
            if metadata is not None:
                found.refuse("it has two metadata regions")
            metadata = region
        elif region.guid not in _REGIONS and region.required & 1:
            found.refuse("it needs a region that is not known")
    if metadata is None:
        raise CorruptImage("it has no metadata region")
    _judge_metadata(content.read(metadata.offset, min(metadata.length, _METADATA_BYTES)), found, budget)


def _judge_log(content: Content, found: Findings) -> None:
    """The log can replace any part of the file when it is opened, so it must be empty."""
    current = None
    for at in _HEADERS:
        raw = content.read(at, 4 * KIB)
        if len(raw) == 4 * KIB and raw.startswith(b"head") and _is_checked(raw):
            header = _HEADER.unpack(raw)
            if current is not None and header.sequence == current.sequence:
                found.refuse("its two headers have one sequence number")
            if current is None or header.sequence > current.sequence:
                current = header
    if current is None:
        raise CorruptImage("it has no valid header")
    if current.version != 1:
        found.refuse(f"version {current.version} is not known")
    if any(current.log_guid):
        found.refuse("it was not closed properly: its log changes it when it is opened")


def _judge_metadata(raw: bytes, found: Findings, budget: Budget) -> None:
    if not raw.startswith(b"metadata") or len(raw) < _METADATA.size:
        raise CorruptImage("it has no metadata")
    count = _METADATA.unpack(raw).count
    if count > _MAX_ENTRIES:
        found.exceed(f"it has {count} metadata items, above the limit of {_MAX_ENTRIES}")
        return
    items: dict[bytes, Any] = {}
    for number in range(count):
        item = _ITEM.unpack(raw, _METADATA.size + number * _ITEM.size)
        if items.setdefault(item.guid, item) is not item:
            found.refuse("it has two metadata items of a kind")
        if item.guid not in _ITEMS and item.flags & _IS_REQUIRED:
            found.refuse("it needs a metadata item that is not known")
    if not {_FILE_PARAMETERS, _DISK_SIZE} <= items.keys():
        raise CorruptImage("its file parameters, or the size of its disk, are missing")
    parameters = _PARAMETERS.unpack(raw, items[_FILE_PARAMETERS].offset)
    size = _SIZE.unpack(raw, items[_DISK_SIZE].offset).size
    found.virtual_size = size
    block = parameters.block_size
    if not MIB <= block <= 256 * MIB or block & block - 1:
        found.exceed(f"its blocks have {block} bytes, not a power of two from 1 to 256 MiB")
    elif size // block * 8 > budget.memory:
        found.exceed(f"its table of blocks needs more memory than the limit of {budget.memory} bytes")
    if size > _MAX_SIZE:
        found.exceed(f"its disk has {size} bytes, above the limit of {_MAX_SIZE}")
    if _PARENT_LOCATOR in items:
        _judge_locator(raw, items[_PARENT_LOCATOR].offset, found)
    if parameters.flags & _HAS_PARENT:
        found.refuse("it has a parent")


def _judge_locator(raw: bytes, at: int, found: Findings) -> None:
    """Name the files where the parent may be."""
    count = _LOCATOR.unpack(raw, at).count
    if count > _MAX_PAIRS:
        found.exceed(f"its parent locator has {count} entries, above the limit of {_MAX_PAIRS}")
    for number in range(min(count, _MAX_PAIRS)):
        pair = _PAIR.unpack(raw, at + _LOCATOR.size + number * _PAIR.size)
        key, value = (
            raw[at + start : at + start + length].decode("utf-16-le", "replace")
            for start, length in ((pair.key, pair.key_size), (pair.value, pair.value_size))
        )
        if key.endswith("_path"):
            found.refer("parent", value)
    found.refuse("it has a parent")


def _regions(table: bytes) -> Iterator[Any]:
    if not table.startswith(b"regi") or len(table) < _TABLE_BYTES:
        return
    for number in range(min(_TABLE.unpack(table).count, _MAX_ENTRIES)):
        yield _REGION.unpack(table, _TABLE.size + number * _REGION.size)


def _is_checked(raw: bytes) -> bool:
    """Whether the CRC-32C at byte 4 is that of all bytes, with zeros in its own place."""
    return _crc32c(raw[:4] + bytes(4) + raw[8:]) == int.from_bytes(raw[4:8], "little")


@cache
def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


def _crc32c(raw: bytes) -> int:
    crc, table = 0xFFFF_FFFF, _crc_table()
    for byte in raw:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFF_FFFF
