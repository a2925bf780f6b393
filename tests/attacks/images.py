"""Victims: valid images, and their structures to be overwritten by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Self

import lamina
from lamina.formats.qcow2 import layout as q

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

U32 = (1 << 32) - 1
U64 = (1 << 64) - 1


class Victim:
    """A qcow2 image in memory. Structures are named as in `lamina.formats.qcow2.layout`; entries are counted from 0.
    `save` writes it to `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = bytearray(path.read_bytes())

    @classmethod
    def of(cls, content: bytes) -> Self:
        """The image that consists of these bytes; `save` needs a path."""
        found = cls.__new__(cls)
        found.path, found.bytes = Path(os.devnull), bytearray(content)
        return found

    @property
    def header(self) -> Any:
        return (q.HEADER_V3 if self.bytes[7] == 3 else q.HEADER_V2).unpack(self.bytes)

    @property
    def cluster_size(self) -> int:
        return 1 << self.header.cluster_bits

    def set(self, **fields: int) -> Self:
        """Overwrite header fields."""
        for name, value in fields.items():
            at = q.HEADER_V3[name].offset
            packed = q.HEADER_V3.pack_field(name, value)
            self.bytes[at : at + len(packed)] = packed
        return self

    def extension(self, kind: int, data: bytes, length: int | None = None) -> Self:
        """Put an extension in front of the others; `length` is what it says of itself."""
        at = self.header.header_length if self.header.version == 3 else q.HEADER_V2.size
        head = q.EXTENSION.pack(type=kind, length=len(data) if length is None else length)
        new = head + data.ljust(-(-len(data) // 8) * 8, b"\0")
        end = self.cluster_size
        self.bytes[at:end] = (new + self.bytes[at:end])[: end - at]
        if self.header.backing_file_offset:
            self.set(backing_file_offset=self.header.backing_file_offset + len(new))
        return self

    def entry(self, at: int) -> int:
        return int.from_bytes(self.bytes[at : at + 8], "big")

    def put(self, at: int, value: int, width: int = 8) -> Self:
        if at + width > len(self.bytes):
            self.bytes.extend(bytes(at + width - len(self.bytes)))
        self.bytes[at : at + width] = value.to_bytes(width, "big")
        return self

    # Where entries lie.

    def l1(self, index: int = 0) -> int:
        return int(self.header.l1_table_offset) + 8 * index

    def l2(self, index: int = 0, table: int = 0) -> int:
        return (self.entry(self.l1(table)) & q.OFFSET_MASK) + 8 * index

    def reftable(self, index: int = 0) -> int:
        return int(self.header.refcount_table_offset) + 8 * index

    def refblock(self, cluster: int = 0) -> int:
        """Where the count (of 16 bits) of this cluster lies."""
        return self.entry(self.reftable()) + 2 * cluster

    def host(self, index: int = 0) -> int:
        """Where the data of this guest cluster lies."""
        return self.entry(self.l2(index)) & q.OFFSET_MASK

    def truncate(self, size: int) -> Self:
        del self.bytes[size:]
        return self

    def save(self, path: Path | None = None) -> Path:
        path = path or self.path
        path.write_bytes(self.bytes)
        return path


def victim(folder: Path, name: str = "hostile.qcow2", *, size: int = MIB, **options: Any) -> Victim:
    """A small valid image with clusters of data, of zeros and of nothing."""
    path = folder / name
    options.setdefault("cluster_size", 4096)
    lamina.create(path, "qcow2", size, **options)
    cluster = options["cluster_size"]
    with lamina.open(path, format="qcow2", read_only=False) as image:
        for index in range(4):
            image.write(index * cluster, bytes([index + 1]) * cluster)
        image.write(size - cluster, b"\xee" * cluster)
        if options.get("compat", "1.1") == "1.1":
            image.zero(5 * cluster, 2 * cluster)
    return Victim(path)


def overlay(folder: Path, backing: str, fmt: str | None = "raw", name: str = "overlay.qcow2", size: int = MIB) -> Path:
    """An image that names `backing`, whatever that is; `fmt` None: without saying its format."""
    path = folder / name
    # `create` stores paths only: another name of the same length is put into the header by hand.
    stored = (backing or "x").encode("utf-8", "surrogateescape")
    room = "x" * len(stored)
    lamina.create(path, "qcow2", size, backing_file=room, backing_fmt=fmt or "raw", backing_unchecked=True)
    with open(path, "r+b") as file:
        offset = int.from_bytes(file.read(16)[8:], "big")
        file.seek(offset)
        assert file.read(len(stored)) == room.encode()
        file.seek(offset)
        file.write(stored)
    if fmt is None:
        found = Victim(path)
        at = found.bytes.index(q.EXT_BACKING_FORMAT.to_bytes(4, "big"), q.HEADER_V3.size)
        found.put(at, 0x12345678, 4).save()  # an extension that nobody knows
    return path


def sparse(path: Path, size: int) -> Path:
    """Make the file `size` bytes long, with a hole at its end."""
    os.truncate(path, size)
    return path
