"""A second format that is read and written, by mapping and allocation only: a dynamic VDI, as VirtualBox and QEMU have it.

Little-endian. A header of 512 bytes, a map of 32-bit block numbers, blocks of 1 MiB. It shows what `format_node` asks of a
driver, and is no driver of Lamina: no parents, no repair.
"""

from __future__ import annotations

import struct
import threading
import uuid
from array import array
from collections.abc import Mapping as Options
from typing import Any, ClassVar, Self

from lamina.block_runs import BlockRuns, following
from lamina.errors import FormatError
from lamina.format_node import Columns, FormatNode, Mapping, Reservation, To
from lamina.graph import Opener
from lamina.limits import MIB, align_up
from lamina.node import MAY_UNMAP
from lamina.numeric import np
from lamina.request import Child
from lamina.schema import Option, Schema
from lamina.status import DATA, PRESENT, ZERO

BITS, BLOCK, SIGNATURE, VERSION, DYNAMIC = 20, MIB, 0xBEDA107F, 0x10001, 1
#: In the map: no block; no block, and zero though there may be a parent. All else is the number of a block.
FREE, ZEROED = 0xFFFFFFFF, 0xFFFFFFFE
#: Text, signature, version, length of what follows, type, flags, comment; where map and blocks begin; geometry, sector,
#: unused; size of the disk, of a block, extra bytes of it; blocks of the disk, and in the file; four UUIDs.
HEADER = struct.Struct("<64s5I256s2I3I2IQ4I64s56x")
MAP_AT, COUNT_AT = HEADER.size, 0x184
STORED = DATA | PRESENT


class Vdi(FormatNode):
    """An image over the child `file`."""

    driver: ClassVar[str] = "vdi"
    schema: ClassVar[Schema] = Schema("vdi", [Option("file", "node", "where the image lies", required=True)])
    create_schema: ClassVar[Schema] = Schema("vdi", [Option("size", "size", "the length of the disk in bytes")])

    def __init__(self, file: Child, *, name: str | None = None, read_only: bool = False) -> None:
        super().__init__(name=name, read_only=read_only)
        self.file = self.children["file"] = file
        head = memoryview(bytearray(HEADER.size))
        file.read_into(0, head)
        _, signature, version, _, kind, _, _, map_at, self._data, _, _, _, sector, _, *rest = HEADER.unpack(head)
        self._size, block, extra, blocks, self._used, _ = rest
        found = (signature, version, kind, map_at, sector, block, extra, blocks)
        right = (SIGNATURE, VERSION, DYNAMIC, MAP_AT, 512, BLOCK, 0, -(-self._size // BLOCK))
        if found != right or not map_at + 4 * blocks <= self._data <= file.size:
            raise FormatError("it is no dynamic VDI of blocks of 1 MiB", path=file.node.filename)
        self._map = array("I", bytes(4 * blocks))
        file.read_into(map_at, memoryview(self._map).cast("B"))
        if any(self._used <= entry < ZEROED for entry in self._map):
            raise FormatError("its map names blocks that the file does not have", path=file.node.filename)
        self._free: list[int] = []  # numbers of blocks below `_used` that nothing names
        self._changed = False  # the map or the count is not on disk yet
        self._lock = threading.Lock()  # around the map, the count and the free blocks

    @classmethod
    def open(cls, options: dict[str, Any], opener: Opener) -> Self:
        return cls(opener.child("file", options["file"], grows=True), name=opener.name, read_only=opener.read_only)

    @classmethod
    def create(cls, storage: Child, size: int, values: Options[str, Any]) -> None:
        blocks = -(-size // BLOCK)
        data = align_up(MAP_AT + 4 * blocks, BLOCK)
        head = (b"<<< Oracle VM VirtualBox Disk Image >>>\n", SIGNATURE, VERSION, 400, DYNAMIC, 0, b"", MAP_AT, data)
        ids = uuid.uuid4().bytes_le + uuid.uuid4().bytes_le + bytes(32)
        storage.write(0, memoryview(HEADER.pack(*head, 0, 0, 0, 512, 0, size, BLOCK, 0, blocks, 0, ids)))
        storage.write(MAP_AT, memoryview(b"\xff" * (4 * blocks)))
        storage.truncate(data)

    @property
    def size(self) -> int:
        return self._size

    @property
    def serialise(self) -> int:
        return BLOCK

    def _place(self, entry: int, within: int = 0) -> int:
        return self._data + (entry << BITS) + within

    def map(self, offset: int, length: int) -> Mapping:
        index, within = offset >> BITS, offset & BLOCK - 1
        entry = self._map[index]
        count = following(self._map, index, (offset + length - 1 >> BITS) + 1, FREE, int(entry < ZEROED))
        length = min((count << BITS) - within, length)
        if entry >= ZEROED:
            return Mapping(ZERO | PRESENT if entry == ZEROED else 0, length)
        return Mapping(STORED, length, self._place(entry, within), self.file)

    def map_columns(self, offset: int, length: int) -> Columns:
        entries = np.array(self._map[offset >> BITS : (offset + length - 1 >> BITS) + 1], np.int64)
        runs = BlockRuns(self.file, BITS, offset, length)
        flags = np.where(entries < ZEROED, STORED, np.where(entries == ZEROED, ZERO | PRESENT, 0))
        runs.add(flags.astype(np.uint8), np.where(entries < ZEROED, self._data + (entries << BITS), -1))
        return runs.columns()

    def reserve(self, offset: int, length: int) -> Reservation:
        index, within = offset >> BITS, offset & BLOCK - 1
        if self._map[index] < ZEROED:
            found = self.map(offset, length)
            return Reservation(offset, found.length, self._place(self._map[index], within), self.file)
        length = min(BLOCK - within, length)
        with self._lock:
            number = self._free.pop() if self._free else self._used
            self._used = max(self._used, number + 1)
        tail = BLOCK - within - length
        token = index, number
        place = self._place(number, within)
        return Reservation(offset, length, place, self.file, new=True, head=within, tail=tail, token=token)

    def commit(self, reservation: Reservation) -> None:
        if reservation.new:
            with self._lock:
                index, number = reservation.token
                self._map[index], self._changed = number, True

    def abandon(self, reservation: Reservation) -> None:
        if reservation.new:
            with self._lock:
                self._free.append(reservation.token[1])

    def drop(self, offset: int, length: int, to: To, *, keep: bool = False) -> None:
        # A block keeps its place, since blocks are counted, not listed as free: its bytes go, and leave a hole in the file.
        end = offset + length
        while offset < end:
            found = self.map(offset, end - offset)
            if found.flags & DATA:
                self.file.zero(found.offset, found.length, 0 if keep else MAY_UNMAP)
            offset += found.length

    def flush(self) -> None:
        self.file.flush()  # first the bytes, then the map that names them
        with self._lock:
            if self._changed:
                self.file.write(COUNT_AT, memoryview(struct.pack("<I", self._used)))
                self.file.write(MAP_AT, memoryview(self._map).cast("B"))
                self.file.flush()
                self._changed = False

    def settle(self) -> None:
        if not self.read_only:
            self.flush()
