"""Valid qcow2 images in memory, all their fields by the structures of `layout`, and values at the edges of intervals.

`Original.make` makes an image. Its `fields` are the integers of each structure of `lamina.formats.qcow2.layout` that the
image contains: of headers, extensions, entries of tables, and reference counts.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

from lamina.creation import create_driver
from lamina.crypto import luks1
from lamina.crypto.secret import Secret
from lamina.formats.qcow2 import bitmap_directory, snapshot_table
from lamina.formats.qcow2 import layout as q
from lamina.formats.qcow2.driver import Qcow2
from lamina.graph import Opener
from lamina.image import Image
from lamina.layout import Structure
from lamina.limits import MAX_SIZE
from lamina.policy import Policy
from lamina.request import Child
from lamina.storage.memory import MemoryStorage

from .images import Victim

SECRET = Secret(b"hunter2")
#: What the backing file of an image contains that has one.
BACKING = b"\x77" * (20 << 10)

#: An extension that nobody knows.
UNKNOWN_EXTENSION = 0x12345678
_EXTRA_NAMES = ("vm_state", "disk_size", "icount")
#: What an entry of a table has besides an offset.
_ENTRY_FLAGS = (0, q.COPIED, q.COMPRESSED, q.ZERO, q.COPIED | q.ZERO, q.COPIED | q.COMPRESSED, q.COMPRESSED | 3 << 54)
_FIXED = (
    *(0, 1, 2, 3, 7, 8, 9, 63, 64, 511, 512, 513, 4095, 4096, 0x7FFF, 0xFFFF, 0x10000, 0x10001),
    *((1 << bits) + step for bits in (31, 32, 55, 56, 61, 62, 63) for step in (-1, 0, 1)),
)
#: The limits of the format and of Lamina, in their units.
_LIMITS = (
    *(value for name, value in vars(q).items() if name.startswith(("MAX_", "MIN_"))),
    *(q.MAX_L1_BYTES // 8, q.SECTOR, MAX_SIZE, snapshot_table.MAX_BYTES),
    *(value for name, value in vars(bitmap_directory).items() if name.startswith(("MAX_", "MIN_"))),
)


class Field(NamedTuple):
    """An integer of `width` bytes at the offset `at`. `name`: of its structure, and of itself."""

    name: str
    at: int
    width: int
    entry: bool = False  #: of an L1, L2, refcount or bitmap table


class Kept(MemoryStorage):
    """A storage whose bytes outlive the image that is on it."""

    def close(self) -> None:
        pass


def storage_of(content: bytes) -> Kept:
    """A storage that contains these bytes."""
    storage = Kept(len(content))
    if content:
        storage.write(0, memoryview(content))
    return storage


def content_of(storage: Kept) -> bytes:
    content = bytearray(storage.size)
    storage.read_into(0, memoryview(content))
    return bytes(content)


def open_on(storage: Kept, *, read_only: bool, backing: bool, snapshot: str | None = None) -> Image:
    """The image in `storage`, which may open no file."""
    spec: dict[str, Any] = {"file": Child(storage, "file", grows=True)}
    if backing:
        spec["backing"] = Child(storage_of(BACKING), "backing")
    if snapshot is not None:
        spec["snapshot-id"] = snapshot
    if int.from_bytes(content_at(storage, q.HEADER_V2["crypt_method"].offset, 4)):
        spec["encrypt"] = {"key-secret": SECRET}
    opener = Opener(policy=Policy.none(), read_only=read_only)
    return Image(Qcow2.open(Qcow2.schema.parse(spec), opener))


def content_at(storage: Kept, offset: int, length: int) -> bytes:
    found = bytearray(max(min(length, storage.size - offset), 0))
    storage.read_into(offset, memoryview(found))
    return bytes(found)


class Original(NamedTuple):
    """A valid image. `places`: the offsets of its structures."""

    name: str
    content: bytes
    backing: bool
    fields: tuple[Field, ...]
    places: tuple[int, ...]
    cluster_size: int
    encrypted: bool

    @classmethod
    def make(
        cls,
        size: int,
        *,
        backing: bool = False,
        bitmaps: bool = False,
        snapshots: int = 0,
        encrypt: bool = False,
        **options: Any,
    ) -> Original:
        name = ",".join(f"{key}={value}" for key, value in options.items())
        name += (
            ",encrypt" * encrypt
            + ",backing" * backing
            + ",bitmaps" * bitmaps
            + f",{snapshots} snapshots" * bool(snapshots)
        )
        if backing:
            options |= {"backing_file": "base", "backing_fmt": "raw", "backing_unchecked": True}
        if encrypt:
            options["encrypt"] = {"format": "luks", "key-secret": SECRET, "iter-time": 1}
        storage = Kept()
        kind: Any = create_driver("qcow2")
        kind.create(Child(storage, "file", grows=True), size, kind.create_schema.parse({**options, "size": size}))
        cluster = options["cluster_size"]
        with open_on(storage, read_only=False, backing=backing) as image:
            _fill(image, cluster, snapshots, bitmaps)
        found = Victim.of(content_of(storage)).extension(UNKNOWN_EXTENSION, b"whatever it is")
        if bitmaps:  # the extension went in front of the others: its bit stays
            assert found.header.autoclear_features & q.AUTOCLEAR["bitmaps"]
        content = bytes(found.bytes)
        fields = tuple(_fields(content))
        return cls(name, content, backing, fields, _places(content, fields, cluster), cluster, encrypt)

    def values(self, rng: random.Random, field: Field) -> int:
        """A value at the edge of an interval, for this field."""
        most = (1 << 8 * field.width) - 1
        now = int.from_bytes(self.content[field.at : field.at + field.width])
        kind = rng.randrange(8)
        if kind == 0:
            value = rng.choice(_FIXED)
        elif kind == 1:
            value = rng.choice((0, 1, most, most - 1, most >> 1, (most >> 1) + 1))
        elif kind == 2:
            value = rng.choice(_LIMITS)
            value = rng.choice((value, value // self.cluster_size, value // 8)) + rng.choice((-1, 0, 1))
        elif kind == 3:
            value = now ^ 1 << rng.randrange(8 * field.width)
        elif kind == 4:
            value = now + rng.choice((1, 8, 512, self.cluster_size)) * rng.choice((-1, 1))
        else:
            end = len(self.content)
            value = rng.choice((*self.places, end, end - end % -self.cluster_size))
            value += rng.choice((0, 0, 0, 0, -1, 1, 8, 512, self.cluster_size, -self.cluster_size))
        if field.entry and rng.randrange(2):
            value |= rng.choice(_ENTRY_FLAGS)
        return value & most

    def changed(self, rng: random.Random) -> tuple[bytes, list[str]]:
        """The image with one field changed, or a few; and what was done."""
        content, done = bytearray(self.content), []
        for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
            # By structure first: an image has many more entries of tables than fields of its header.
            structure = rng.choice(sorted({field.name.partition(".")[0] for field in self.fields}))
            field = rng.choice([one for one in self.fields if one.name.partition(".")[0] == structure])
            value = self.values(rng, field)
            content[field.at : field.at + field.width] = value.to_bytes(field.width)
            done.append(f"{field.name} at {field.at:#x} = {value:#x}")
        if rng.randrange(12) == 0:
            cut = max(rng.choice(self.places) + rng.choice((0, 1, 512, self.cluster_size)), 1)
            done.append(f"cut to {cut}")
            del content[cut:]
        return bytes(content), done


def _fill(image: Image, cluster: int, snapshots: int, bitmaps: bool) -> None:
    """Clusters of all kinds, and what else the options say."""
    node: Any = image.node
    if bitmaps:
        image.add_bitmap("records", 512)
        image.add_bitmap("does not", 4096, enabled=False)
    size = image.size
    image.write(0, b"\x01" * (2 * cluster))
    if node.limits.compress_alignment:
        image.write(2 * cluster, b"\x02" * cluster, compress=True)
        if node.header.refcount_bits > 2:  # both in one cluster, which snapshots count again
            image.write(3 * cluster, bytes(range(256)) * (cluster // 256), compress=True)
    for number in range(snapshots):
        image.create_snapshot(f"snapshot {number}")
        image.write(number * cluster, b"\x03" * cluster)
    if node.header.version > 2 or node.backing is None:
        image.zero(5 * cluster, 2 * cluster)
    image.write(size - cluster + 100, b"\xee" * (cluster - 100))


def _fields(content: bytes) -> Iterator[Field]:
    found = Victim.of(content)
    header = found.header
    yield from _of(q.HEADER_V3 if header.version == 3 else q.HEADER_V2, "header", 0)
    if header.version == 3 and header.header_length > q.COMPRESSION_TYPE_OFFSET:
        yield Field("header.compression_type", q.COMPRESSION_TYPE_OFFSET, 1)
    at = header.header_length if header.version == 3 else q.HEADER_V2.size
    extended = header.version == 3 and bool(header.incompatible_features & q.EXTENDED_L2)
    refcount_bits = 1 << header.refcount_order if header.version == 3 else 16
    while True:
        head = q.EXTENSION.unpack(content, at)
        yield from _of(q.EXTENSION, "extension", at)
        if head.type == q.EXT_END:
            break
        at += q.EXTENSION.size
        if head.type == q.EXT_BITMAPS:
            yield from _of(q.BITMAPS, "bitmaps", at)
            yield from _bitmaps(content, q.BITMAPS.unpack(content, at))
        elif head.type == q.EXT_ENCRYPTION:
            yield from _of(q.ENCRYPTION_POINTER, "encryption", at)
            luks = q.ENCRYPTION_POINTER.unpack(content, at).offset
            yield from _of(luks1.HEADER, "luks", luks)
            yield from _of(luks1.KEY_SLOT, "slot", luks + luks1.HEADER.size)
        else:
            yield from (Field("extension.data", at + step, 8) for step in range(0, head.length, 8))
        at += -(-head.length // 8) * 8
    yield from _tables(content, header.l1_table_offset, header.l1_size, extended, header.cluster_bits, "")
    at = header.snapshots_offset
    for _ in range(header.nb_snapshots):
        entry = q.SNAPSHOT.unpack(content, at)
        yield from _of(q.SNAPSHOT, "snapshot", at)
        for number, name in enumerate(_EXTRA_NAMES[: entry.extra_data_size // 8]):
            yield Field(f"snapshot.{name}", at + q.SNAPSHOT.size + 8 * number, 8)
        yield from _tables(
            content, entry.l1_table_offset, entry.l1_size, extended, header.cluster_bits, " of a snapshot"
        )
        length = q.SNAPSHOT.size + entry.extra_data_size + entry.id_size + entry.name_size
        at += -(-length // 8) * 8
    yield from _entries("refcount table", header.refcount_table_offset, 4)
    block = found.entry(header.refcount_table_offset)
    used = min(len(content) // found.cluster_size + 2, found.cluster_size * 8 // refcount_bits)
    width = max(refcount_bits // 8, 1)
    yield from (Field("refcount", block + at, width) for at in range(0, max(used * refcount_bits // 8, 1), width))


def _bitmaps(content: bytes, extension: Any) -> Iterator[Field]:
    at = extension.bitmap_directory_offset
    for _ in range(extension.nb_bitmaps):
        entry = q.BITMAP_ENTRY.unpack(content, at)
        yield from _of(q.BITMAP_ENTRY, "bitmap", at)
        yield from _entries("bitmap table", entry.bitmap_table_offset, entry.bitmap_table_size)
        length = q.BITMAP_ENTRY.size + entry.extra_data_size + entry.name_size
        at += -(-length // 8) * 8


def _tables(content: bytes, l1: int, entries: int, extended: bool, bits: int, whose: str) -> Iterator[Field]:
    yield from _entries(f"L1 table{whose}", l1, min(entries, 8))
    for at in range(l1, l1 + 8 * min(entries, 2), 8):
        l2 = int.from_bytes(content[at : at + 8]) & q.OFFSET_MASK
        if l2:
            yield from _entries(f"L2 table{whose}", l2, min((1 << bits) // 8, 32 if extended else 12))


def _entries(name: str, at: int, count: int) -> Iterator[Field]:
    return (Field(f"{name}.{index}", at + 8 * index, 8, entry=True) for index in range(count))


def _of(structure: Structure, name: str, at: int) -> Iterator[Field]:
    return (
        Field(f"{name}.{field.name}", at + field.offset, field.size) for field in structure.fields if field.is_integer
    )


def _places(content: bytes, fields: tuple[Field, ...], cluster: int) -> tuple[int, ...]:
    """Where structures begin, and where data is."""
    found = {field.at - field.at % cluster for field in fields}
    found |= {number * cluster for number in range(-(-len(content) // cluster)) if number < 40}
    return tuple(sorted(found))


def originals() -> list[Original]:
    """Images of each version, with clusters of 512 bytes, 4 KiB and 64 KiB, each with something else."""
    make = Original.make
    return [
        make(24 << 10, cluster_size=512, snapshots=2),
        make(24 << 10, cluster_size=512, bitmaps=True, refcount_bits=64),
        make(24 << 10, cluster_size=512, refcount_bits=1),
        make(24 << 10, cluster_size=512, refcount_bits=2, snapshots=1),
        make(24 << 10, cluster_size=1024, compat="0.10", snapshots=2, backing=True),
        make(64 << 10, cluster_size=4096, compat="0.10"),
        make(96 << 10, cluster_size=4096, refcount_bits=4, backing=True, bitmaps=True),
        make(96 << 10, cluster_size=4096, compression_type="zstd", snapshots=1, bitmaps=True),
        make(96 << 10, cluster_size=4096, encrypt=True, refcount_bits=8),
        make(256 << 10, cluster_size=16384, extended_l2=True, backing=True, snapshots=1),
        make(256 << 10, cluster_size=16384, extended_l2=True, bitmaps=True, refcount_bits=32),
        make(640 << 10, cluster_size=65536, snapshots=1, lazy_refcounts=True),
    ]
