"""The verdict on VHD (vpc). After Microsoft's "Virtual Hard Disk Image Format Specification" 1.0."""

from __future__ import annotations

from typing import Final

from ..errors import CorruptImage
from ..layout import Field, Structure
from ..limits import MIB, Budget
from .content import Content
from .result import Findings

_SECTOR: Final = 512
_FIXED, _DYNAMIC, _DIFFERENCING = 2, 3, 4
_KINDS: Final = {_FIXED: "fixed", _DYNAMIC: "dynamic", _DIFFERENCING: "differencing"}
_FOOTER: Final = Structure(
    "VHD footer",
    ">",
    [
        Field("cookie", "8s"),
        Field("features", "u32"),
        Field("version", "u32"),
        Field("data_offset", "u64", "where the dynamic header is"),
        Field("time", "u32"),
        Field("creator", "4s"),
        Field("creator_version", "u32"),
        Field("creator_system", "u32"),
        Field("original_size", "u64"),
        Field("current_size", "u64", "size of the disk in bytes"),
        Field("geometry", "u32"),
        Field("type", "u32", values=_KINDS),
        Field("checksum", "u32"),
        Field("uuid", "16s"),
        Field("saved", "u8"),
        Field("reserved", "427x"),
    ],
)
_DYNAMIC_HEADER: Final = Structure(
    "VHD dynamic header",
    ">",
    [
        Field("cookie", "8s"),
        Field("data_offset", "u64"),
        Field("table_offset", "u64"),
        Field("version", "u32"),
        Field("entries", "u32", "of the table of blocks"),
        Field("block_size", "u32"),
        Field("checksum", "u32"),
        Field("parent_uuid", "16s"),
        Field("parent_time", "u32"),
        Field("reserved", "4x"),
        Field("parent_name", "512s", "in UTF-16"),
        Field("locators", "192s", "eight places where the parent may be"),
        Field("rest", "256x"),
    ],
)
_MAX_BLOCK: Final = 64 * MIB


def judge(content: Content, found: Findings, budget: Budget) -> None:
    """Raises FormatError if the file is not a usable image."""
    raw = content.read(max(content.size - _SECTOR, 0), _SECTOR)
    if len(raw) < _SECTOR or not raw.startswith(b"conectix"):
        raise CorruptImage("the file does not end with a VHD footer")
    footer = _FOOTER.unpack(raw)
    if footer.checksum != _checksum(raw, _FOOTER["checksum"].offset):
        found.refuse("the checksum of its footer is wrong")
    found.virtual_size = footer.current_size
    found.features.append(f"type {_KINDS.get(footer.type, 'unknown')}")
    if footer.type not in _KINDS:
        found.refuse(f"the type {footer.type} is not known")
    if not content.read(0, 8).startswith(b"conectix"):  # the disk begins with the file
        if footer.type != _FIXED:
            found.refuse("it is not fixed, and has no copy of its footer at the start")
        elif footer.current_size > content.size - _SECTOR:
            found.refuse("the file is shorter than its disk")
        return
    if content.read(0, _SECTOR) != raw:
        found.refuse("the footer and its copy at the start differ")
    if footer.type == _FIXED:
        found.refuse("it is fixed, and has a copy of its footer at the start")
        return
    _judge_dynamic(content, footer.data_offset, found, budget, differs=footer.type == _DIFFERENCING)


def _judge_dynamic(content: Content, offset: int, found: Findings, budget: Budget, *, differs: bool) -> None:
    raw = content.read(offset, _DYNAMIC_HEADER.size)
    if len(raw) < _DYNAMIC_HEADER.size or not raw.startswith(b"cxsparse"):
        raise CorruptImage("it has no dynamic header where its footer says")
    header = _DYNAMIC_HEADER.unpack(raw)
    if header.checksum != _checksum(raw, _DYNAMIC_HEADER["checksum"].offset):
        found.refuse("the checksum of its dynamic header is wrong")
    size = header.block_size
    if size < _SECTOR or size > _MAX_BLOCK or size & size - 1:
        found.exceed(f"its blocks have {size} bytes, not a power of two from {_SECTOR} to {_MAX_BLOCK}")
    if 4 * header.entries > budget.memory:
        found.exceed(f"its table needs {4 * header.entries} bytes of memory, above the limit of {budget.memory}")
    if header.table_offset + 4 * header.entries > content.size:
        found.refuse("its table of blocks is not inside the file")
    name = header.parent_name.decode("utf-16-be", "replace").partition("\0")[0]
    if differs or any(header.parent_uuid) or any(header.locators) or name:
        found.refer("parent", name)


def _checksum(raw: bytes, at: int) -> int:
    """The sum of all bytes but those of the sum itself, inverted."""
    return ~(sum(raw) - sum(raw[at : at + 4])) & 0xFFFF_FFFF
