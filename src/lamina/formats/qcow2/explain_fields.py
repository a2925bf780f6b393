"""The fields of the structures of a qcow2 image, each with its place in the file, its value and its meaning, for `explain`.

The structures are those of `layout` and of LUKS; records are found where `header`, `snapshot_table` and `bitmap_directory`
find them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from ...crypto import luks1
from ...explanation import UNUSED, Part
from ...layout import Structure
from ...limits import align_up
from . import layout as q

if TYPE_CHECKING:
    from .header import Header

_EXTENSIONS: Final = {
    q.EXT_BACKING_FORMAT: "backing file format",
    q.EXT_FEATURE_NAMES: "feature names",
    q.EXT_BITMAPS: "bitmaps",
    q.EXT_ENCRYPTION: "encryption header pointer",
    q.EXT_DATA_FILE: "data file name",
    q.EXT_UNUSED: "unused",
}
#: Extensions whose data consists of fields.
_STRUCTURES: Final = {q.EXT_BITMAPS: q.BITMAPS, q.EXT_ENCRYPTION: q.ENCRYPTION_POINTER}
_FEATURE_KINDS: Final = ("incompatible", "compatible", "autoclear")
#: The extra data of a snapshot: as many of these fields as there is space for.
_EXTRA: Final = (
    ("vm_state_size", "bytes of state of the machine"),
    ("disk_size", "size of the disk in bytes"),
    ("icount", "instructions that the guest had executed; all ones: not counted"),
)


class Place(NamedTuple):
    """A field: where it is in the file, its value there (a number, or text), and what it means."""

    start: int
    length: int
    name: str
    value: int | str | None
    text: str

    def part(self, structure: str, owner: str | None = None) -> Part:
        return Part(structure, self.start, self.length, owner, self.name, self.value, self.text)


def find(places: Sequence[Place], offset: int, structure: str, start: int, stop: int, owner: str | None = None) -> Part:
    """The part of the structure from `start` to `stop` that contains the byte at `offset`: the first of these fields that
    does, or what is between two of them."""
    for place in places:
        if place.start <= offset < place.start + place.length:
            return place.part(structure, owner)
    low = max((one.start + one.length for one in places if one.start + one.length <= offset), default=start)
    high = min((one.start for one in places if one.start > offset), default=stop)
    return Part(structure, low, high - low, owner, UNUSED, None, "not used by any field")


def fields(structure: Structure, raw: bytes, start: int, at: int = 0, prefix: str = "") -> Iterator[Place]:
    """The fields of the structure at `at` of `raw`, whose first byte is at `start` of the file."""
    for row in structure.describe(raw, at):
        if not row.name.isidentifier():
            yield Place(start + row.offset, row.size, f"{prefix}padding", None, "padding")
            continue
        value = row.value if isinstance(row.value, int) else None
        text = structure[row.name].text(row.value) if row.name in structure else "reserved"
        yield Place(start + row.offset, row.size, prefix + row.name, value, f"{text}; {row.doc}" if row.doc else text)


def of_header(raw: bytes, header: Header | None) -> list[Place]:
    """The fields in these first bytes of the file. `header`: None if it cannot be used; then its fields are all that is
    known."""
    version = int.from_bytes(raw[4:8])
    places = list(fields(q.HEADER_V2 if version == 2 else q.HEADER_V3, raw, 0))
    if header is None:
        return places
    if header.header_length > q.COMPRESSION_TYPE_OFFSET:
        kind = raw[q.COMPRESSION_TYPE_OFFSET]
        text = f"{kind} ({q.COMPRESSION_TYPES.get(kind, 'unknown')}); how clusters are compressed"
        places.append(Place(q.COMPRESSION_TYPE_OFFSET, 1, "compression_type", kind, text))
    at = header.header_length
    for kind, data in header.extensions:
        places += _extension(raw, at, kind, len(data))
        at += q.EXTENSION.size + align_up(len(data), 8)
    if int.from_bytes(raw[at : at + 4]) == q.EXT_END and at + q.EXTENSION.size <= len(raw):
        places += [
            one._replace(text=f"{one.value}; the end of the extensions")
            for one in fields(q.EXTENSION, raw, 0, at, "end.")
        ]
    stored = q.HEADER_V2.unpack(raw)
    if stored.backing_file_offset and stored.backing_file_size:
        places.append(
            _words(
                raw,
                0,
                stored.backing_file_offset,
                stored.backing_file_size,
                "backing_file",
                "the name of the backing file",
            )
        )
    return places


def _extension(raw: bytes, at: int, kind: int, length: int) -> Iterator[Place]:
    name = f"extension {_EXTENSIONS.get(kind, f'{kind:#010x}')}"
    for place in fields(q.EXTENSION, raw, 0, at, f"{name}."):
        yield place._replace(text=f"{kind:#010x}; {name}") if place.name.endswith(".type") else place
    data = at + q.EXTENSION.size
    if kind in _STRUCTURES and length == _STRUCTURES[kind].size:
        yield from fields(_STRUCTURES[kind], raw, 0, data, f"{name}.")
    elif kind == q.EXT_FEATURE_NAMES:
        for row in range(data, data + length - q.FEATURE_NAME_SIZE + 1, q.FEATURE_NAME_SIZE):
            word = raw[row + 2 : row + q.FEATURE_NAME_SIZE].rstrip(b"\0").decode("utf-8", "surrogateescape")
            of = _FEATURE_KINDS[raw[row]] if raw[row] < len(_FEATURE_KINDS) else f"unknown ({raw[row]})"
            yield Place(
                row, q.FEATURE_NAME_SIZE, f"{name}.entry", None, f"{of} feature bit {raw[row + 1]} is called {word!r}"
            )
    elif kind in (q.EXT_BACKING_FORMAT, q.EXT_DATA_FILE):
        yield _words(raw, 0, data, length, f"{name}.name", name.removeprefix("extension "))
    elif length:
        yield Place(data, length, f"{name}.data", None, f"{length} bytes of data")
    if padding := -length % 8:
        yield Place(data + length, padding, f"{name}.padding", None, "padding to a multiple of 8 bytes")


def of_snapshot(raw: bytes, start: int) -> list[Place]:
    """The fields of the entry of the snapshot table with these bytes, which begin at `start` of the file."""
    places = list(fields(q.SNAPSHOT, raw, start))
    fixed = q.SNAPSHOT.unpack(raw)
    at, end = q.SNAPSHOT.size, q.SNAPSHOT.size + fixed.extra_data_size
    for name, doc in _EXTRA:
        if at + 8 <= end:
            value = int.from_bytes(raw[at : at + 8])
            places.append(Place(start + at, 8, f"extra.{name}", value, f"{value}; {doc}"))
            at += 8
    if at < end:
        places.append(Place(start + at, end - at, "extra.rest", None, "extra data that is not known"))
    at = end
    for name, length in (("id", fixed.id_size), ("name", fixed.name_size)):
        if length:
            places.append(_words(raw, start, at, length, name, f"the {name} of the snapshot"))
        at += length
    if at < len(raw):
        places.append(Place(start + at, len(raw) - at, "padding", None, "padding to a multiple of 8 bytes"))
    return places


def of_bitmap(raw: bytes, start: int) -> list[Place]:
    """The same for an entry of the bitmap directory."""
    places = list(fields(q.BITMAP_ENTRY, raw, start))
    at = q.BITMAP_ENTRY.size
    fixed = q.BITMAP_ENTRY.unpack(raw)
    if fixed.extra_data_size:
        places.append(Place(start + at, fixed.extra_data_size, "extra", None, "extra data that is not known"))
        at += fixed.extra_data_size
    length = fixed.name_size
    places.append(_words(raw, start, at, length, "name", "the name of the bitmap"))
    at += length
    if at < len(raw):
        places.append(Place(start + at, len(raw) - at, "padding", None, "padding to a multiple of 8 bytes"))
    return places


def of_luks(raw: bytes, start: int, length: int) -> list[Place]:
    """The fields of the LUKS header with these first bytes, which begin at `start` of the file; it has `length` bytes."""
    places = list(fields(luks1.HEADER, raw, start))
    if len(raw) < luks1.HEADER_BYTES:
        return places
    material = luks1.HEADER.unpack(raw).key_bytes * luks1.STRIPES
    for number in range(luks1.SLOTS):
        at = luks1.HEADER.size + number * luks1.KEY_SLOT.size
        places += fields(luks1.KEY_SLOT, raw, start, at, f"slot {number}.")
        place = luks1.KEY_SLOT.unpack(raw, at).key_material_offset * 512
        if luks1.HEADER_BYTES <= place < length and material:
            size = min(material, length - place)
            places.append(
                Place(start + place, size, f"slot {number}.key material", None, "the split and encrypted master key")
            )
    return places


def _words(raw: bytes, start: int, at: int, length: int, name: str, doc: str) -> Place:
    text = raw[at : at + length].decode("utf-8", "surrogateescape")
    return Place(start + at, length, name, text, f"{text!r}; {doc}")
