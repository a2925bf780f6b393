"""The verdict on VMDK: only a sparse disk that is wholly in this file is safe. After VMware's "Virtual Disk Format 5.0".

A descriptor is text that may name any number of files with any bytes in them, so each line of it must be understood. Programs
disagree about repeated lines and about a header at the end of the file; both are refused.
"""

from __future__ import annotations

import re
from typing import Final

from ..errors import CorruptImage, FormatError
from ..layout import Field, Structure
from ..limits import KIB, Budget
from .content import Content
from .result import Findings

_SECTOR: Final = 512
_HEADER: Final = Structure(
    "VMDK sparse extent header",
    "<",
    [
        Field("magic", "4s"),
        Field("version", "u32"),
        Field("flags", "u32"),
        Field("capacity", "u64", "sectors of the disk"),
        Field("grain_size", "u64", "sectors of a grain"),
        Field("descriptor_offset", "u64", "in sectors"),
        Field("descriptor_size", "u64", "in sectors"),
        Field("table_entries", "u32", "entries of a grain table"),
        Field("redundant_directory", "u64"),
        Field("directory", "u64", "where the grain directory is, in sectors"),
    ],
)
_MARKER: Final = Structure(
    "VMDK stream marker",
    "<",
    [Field("value", "u64"), Field("size", "u32"), Field("type", "u32"), Field("padding", "496s")],
)
_FOOTER, _END_OF_STREAM = 3, 0
#: The grain directory is in a footer, at the end of the file.
_AT_END: Final = (1 << 64) - 1
_MAX_DESCRIPTOR: Final = 64 * KIB
_MAX_EXTENTS: Final = 1024
#: 32 MiB of grain tables, 64 MiB of data in a grain, as other limits of Lamina.
_MAX_GRAIN: Final = 128 * KIB
_KINDS: Final = ("monolithicsparse", "streamoptimized")
_EXTENT: Final = re.compile(r'(?:rw|rdonly|noaccess) +[0-9]+ +([a-z]+)(?: +"([^"]*)")?(?: +[0-9]+)?')


def judge(content: Content, found: Findings, budget: Budget) -> None:
    """Raises FormatError if the file cannot be understood."""
    head = content.read(0, _SECTOR)
    if not head.startswith(b"KDMV"):
        found.refuse("its disk is in other files, or in a form of VMDK that is not judged")
        text = content.read(0, _MAX_DESCRIPTOR)
        if not head.startswith(b"COWD"):
            _judge_text(text, found, apart=True)
        return
    header = _HEADER.unpack(head)
    if header.version not in (1, 2, 3):
        raise FormatError(f"VMDK version {header.version} is not known")
    if header.descriptor_offset != 1 or not header.descriptor_size:
        raise CorruptImage("its descriptor is missing, or not behind the header")
    if header.descriptor_size * _SECTOR > _MAX_DESCRIPTOR:
        found.exceed(
            f"its descriptor has {header.descriptor_size} sectors, above the limit of {_MAX_DESCRIPTOR // _SECTOR}"
        )
        return
    found.virtual_size = header.capacity * _SECTOR
    if not 1 <= header.grain_size <= _MAX_GRAIN or header.grain_size & header.grain_size - 1:
        found.exceed(f"its grains have {header.grain_size} sectors, not a power of two up to {_MAX_GRAIN}")
    if not 1 <= header.table_entries <= 512:
        found.exceed(f"its grain tables have {header.table_entries} entries, not 1 to 512")
    elif header.grain_size and header.capacity // header.grain_size // header.table_entries * 4 > budget.memory:
        found.exceed(f"its grain directory needs more memory than the limit of {budget.memory} bytes")
    size = header.descriptor_size * _SECTOR
    text = content.read(_SECTOR, size)
    if len(text) < size:
        raise CorruptImage("the file ends in its descriptor")
    _judge_text(text, found)
    if header.directory == _AT_END:
        _judge_footer(content, found)


def _judge_text(raw: bytes, found: Findings, *, apart: bool = False) -> None:
    """The descriptor, which ends with the first NUL. `apart`: it is all of the file, so that each extent is another one."""
    try:
        text = raw.partition(b"\0")[0].decode("ascii")
    except UnicodeDecodeError:
        raise CorruptImage("its descriptor is not plain text") from None
    fields: dict[str, str] = {}
    extents = 0
    for line in (part.strip() for part in text.split("\n")):
        key, equals, value = line.partition("=")
        if not line or line.startswith("#") or line.lower().startswith("ddb"):
            continue
        if equals and " " not in key:
            if fields.setdefault(key.lower(), value) is not value:
                found.refuse(f"its descriptor says {key.lower()} twice")
        elif line.lower().split(" ")[0] in ("rw", "rdonly", "noaccess"):
            extents += 1
            if extents > _MAX_EXTENTS:
                found.exceed(f"it has more than {_MAX_EXTENTS} extents")
                break
            _judge_extent(line, found, apart)
        else:
            found.refuse("its descriptor has a line that is not known")
    kind = fields.get("createtype", "").lower()
    name = kind.strip('"')
    found.features.append(f"type {name or 'unknown'}")
    for word in ("createtype", "parentcid", "parentfilenamehint"):  # some programs take the first, wherever it is
        if text.lower().count(word) != (word in fields):
            found.refuse(f"its descriptor says {word} in several places")
    if kind != f'"{name}"' or name not in _KINDS:
        found.refuse("only the types monolithicSparse and streamOptimized have their disk in the file itself")
    if extents != 1:
        found.refuse(f"it has {extents} extents, not one")
    if "parentfilenamehint" in fields:
        found.refer("parent", fields["parentfilenamehint"].strip('"'))
    if fields.get("parentcid", "ffffffff").strip('"').lower() != "ffffffff":
        found.refuse("it has a parent")


def _judge_extent(line: str, found: Findings, apart: bool) -> None:
    parts = _EXTENT.fullmatch(line.lower())
    name = line.partition('"')[2].rpartition('"')[0]
    if apart or parts is None or parts[1] != "sparse" or not name or "/" in name or "\\" in name:
        found.refer("extent", name or line)


def _judge_footer(content: Content, found: Findings) -> None:
    """A header at the end takes the place of the first one, so it must say the same."""
    tail = content.read(max(content.size - 3 * _SECTOR, 0), 3 * _SECTOR)
    if len(tail) < 3 * _SECTOR:
        raise CorruptImage("the file ends before its footer")
    footer = _HEADER.unpack(tail, _SECTOR)
    same = footer._asdict() | {"directory": _AT_END} == _HEADER.unpack(content.read(0, _SECTOR))._asdict()
    if not same or footer.directory == _AT_END:
        found.refuse("its footer contradicts its header")
    first, last = _MARKER.unpack(tail), _MARKER.unpack(tail, 2 * _SECTOR)
    wrong = any(first.padding) or any(last.padding) or first.size or last.size or last.value
    if wrong or first.type != _FOOTER or last.type != _END_OF_STREAM:
        found.refuse("the markers around its footer are not valid")
