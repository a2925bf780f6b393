"""The verdict on VDI, VirtualBox's format."""

from __future__ import annotations

from typing import Final

from ..errors import CorruptImage
from ..layout import Field, Structure
from ..limits import Budget
from .content import Content
from .result import Findings

_HEADER: Final = Structure(
    "VDI header",
    "<",
    [
        Field("text", "64s"),
        Field("signature", "u32"),
        Field("version", "u32"),
        Field("header_size", "u32"),
        Field("type", "u32"),
        Field("flags", "u32"),
        Field("comment", "256s"),
        Field("map_offset", "u32"),
        Field("data_offset", "u32"),
        Field("geometry", "12s"),
        Field("sector_size", "u32"),
        Field("unused", "4x"),
        Field("disk_size", "u64"),
        Field("block_size", "u32"),
        Field("block_extra", "u32"),
        Field("blocks", "u32"),
        Field("allocated", "u32"),
        Field("uuid", "16s"),
        Field("snapshot_uuid", "16s"),
        Field("link_uuid", "16s"),
        Field("parent_uuid", "16s"),
    ],
)
_DYNAMIC, _STATIC = 1, 2
_KINDS: Final = {_DYNAMIC: "dynamic", _STATIC: "static", 3: "undo", 4: "differencing"}
_VERSION: Final = 0x0001_0001


def judge(content: Content, found: Findings, budget: Budget) -> None:
    """Raises FormatError if the file is not a usable image."""
    raw = content.read(0, 512)
    if len(raw) < 512:
        raise CorruptImage("the file ends in its header")
    header = _HEADER.unpack(raw)
    found.virtual_size = header.disk_size
    found.features.append(f"type {_KINDS.get(header.type, 'unknown')}")
    if header.version != _VERSION:
        found.refuse(f"version {header.version:#x} is not known")
    if header.type not in (_DYNAMIC, _STATIC) or any(header.link_uuid) or any(header.parent_uuid):
        found.refuse("it has a parent, which another file holds, or is of a type that is not known")
    if header.block_extra:
        found.refuse("its blocks have extra data, which programs treat in different ways")
    size = header.block_size
    if not size or size & size - 1:
        found.exceed(f"its blocks have {size} bytes, not a power of two")
    elif header.disk_size > header.blocks * size:
        found.refuse("its table has fewer blocks than its disk")
    if 4 * header.blocks > budget.memory:
        found.exceed(f"its table needs {4 * header.blocks} bytes of memory, above the limit of {budget.memory}")
    if header.map_offset + 4 * header.blocks > content.size:
        found.refuse("its table of blocks is not inside the file")
