"""The verdict on a raw disk: the partition table at its beginning. After "UEFI Specification" 2.10, section 5.2 (MBR)."""

from __future__ import annotations

from typing import Final

from ..filters.partition import MBR_ENTRY
from ..layout import Record
from .result import Findings

_SECTOR: Final = 512
_TABLE_AT: Final = 446
_PROTECTIVE: Final = 0xEE
#: What a volume descriptor of a CD has at `_VOLUME_AT`.
_VOLUMES: Final = {b"CD001": "iso9660", b"NSR02": "udf", b"NSR03": "udf"}
_VOLUME_AT: Final = 32769


def contents(head: bytes) -> list[str]:
    """What these first bytes of a raw disk say that is on it: "gpt", "mbr", "iso9660", "udf"."""
    found = []
    if _has_table(head):
        found.append("gpt" if any(one.type == _PROTECTIVE for one in _partitions(head)) else "mbr")
    volume = _VOLUMES.get(head[_VOLUME_AT : _VOLUME_AT + 5])
    return [*found, volume] if volume else found


def is_text_descriptor(head: bytes) -> bool:
    """Whether this is a descriptor of VMDK without a disk, as some programs recognise it: text that says which kind of disk
    it creates."""
    return all(0 < byte < 0x80 for byte in head[:_SECTOR]) and b"createtype=" in head.lower()


def judge(head: bytes, found: Findings) -> None:
    """Refuse a partition table that programs may understand in different ways."""
    if not _has_table(head):
        return
    partitions = _partitions(head)
    used = [number for number, one in enumerate(partitions) if one.type]
    if any(one.status not in (0, 0x80) for one in partitions):
        found.refuse("its partition table has an invalid boot flag")
    if not used:
        found.refuse("its boot sector has no partitions")
    for number, one in enumerate(partitions):
        if one.type != _PROTECTIVE:
            continue
        if used != [0]:
            found.refuse("its protective MBR has other partitions")
        if number == 0 and (one.first != 1 or one.first_chs != b"\0\2\0"):
            found.refuse("its protective MBR does not begin at sector 1")


def _has_table(head: bytes) -> bool:
    """Whether there is a boot sector, and not that of a FAT volume, whose program is in the place of the table."""
    return len(head) >= _SECTOR and head[510:512] == b"\x55\xaa" and not (head[0x10] == 2 and head[0x15] == 0xF8)


def _partitions(head: bytes) -> list[Record]:
    return [MBR_ENTRY.unpack(head, _TABLE_AT + number * MBR_ENTRY.size) for number in range(4)]
