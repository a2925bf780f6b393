"""Two more formats that the contract must bear: one whose bytes lie in two children, one that encodes what it stores."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from lamina.format_node import Columns, FormatNode, Mapping, Reservation, To
from lamina.graph import Opener
from lamina.limits import Limits
from lamina.node import MAY_UNMAP
from lamina.numeric import np
from lamina.request import Child
from lamina.schema import Option, Schema
from lamina.status import DATA, PRESENT

from .vdi import Vdi


class Split(FormatNode):
    """A flat disk in two files: its first `AT` bytes in `file`, the rest in `rest`."""

    AT: ClassVar = 90_000 // 512 * 512
    driver: ClassVar[str] = "split"
    schema: ClassVar[Schema] = Schema(
        "split", [Option(name, "node", "a part of the disk") for name in ("file", "rest")]
    )

    def __init__(self, file: Child, rest: Child, *, name: str | None = None, read_only: bool = False) -> None:
        super().__init__(name=name, read_only=read_only)
        self.file = file
        self.children = {"file": file, "rest": rest}
        self.parts = (file, rest)

    @classmethod
    def open(cls, options: dict[str, Any], opener: Opener) -> Self:
        parts = [opener.child(name, options[name], grows=True) for name in ("file", "rest")]
        return cls(*parts, name=opener.name, read_only=opener.read_only)

    @property
    def size(self) -> int:
        return self.AT + self.parts[1].size

    @property
    def serialise(self) -> int:
        return 512

    def map(self, offset: int, length: int) -> Mapping:
        if offset < self.AT:
            return Mapping(PRESENT, min(length, self.AT - offset), offset, self.parts[0])
        return Mapping(PRESENT, length, offset - self.AT, self.parts[1])

    def map_columns(self, offset: int, length: int) -> Columns:
        edges = sorted({offset, min(max(offset, self.AT), offset + length), offset + length})
        start = np.array(edges[:-1], np.int64)
        second = start >= self.AT
        flags = np.full(len(start), PRESENT, np.uint8)
        return Columns(start, np.diff(edges), flags, start - second * self.AT, self.parts, second.astype(np.int32))

    def reserve(self, offset: int, length: int) -> Reservation:
        _, length, host, child, _ = self.map(offset, length)
        assert child is not None
        return Reservation(offset, length, host, child)

    def drop(self, offset: int, length: int, to: To, *, keep: bool = False) -> None:
        end = offset + length
        while offset < end:
            _, run, host, child, _ = self.map(offset, end - offset)
            assert child is not None
            child.zero(host, run, 0 if keep else MAY_UNMAP)
            offset += run

    def flush(self) -> None:
        for part in self.parts:
            part.flush()


class Cipher(Vdi):
    """A VDI whose blocks are not stored as they read: each byte is combined with one that follows from its place. No cipher
    to keep a secret with."""

    driver: ClassVar[str] = "cipher"

    @property
    def limits(self) -> Limits:
        return Limits()

    def map(self, offset: int, length: int) -> Mapping:
        flags, length, place, child, _ = super().map(offset, length)
        return Mapping(flags, length, -1, child, place)

    def map_columns(self, offset: int, length: int) -> Columns:
        start, _, flags, *_ = super().map_columns(offset, length)
        first = np.append(True, flags[1:] != flags[:-1])  # without their places more neighbours are alike
        start, flags = start[first], flags[first]
        return Columns(start, np.diff(start, append=offset + length), flags, np.full(len(start), -1), (self.file,))

    def load(self, mapping: Mapping, offset: int, view: memoryview) -> None:
        self.file.read_into(mapping.token, view)
        view[:] = combined(offset, view)

    def reserve(self, offset: int, length: int) -> Reservation:
        flags, run, _, _, place = self.map(offset, length)
        if flags & DATA:
            return Reservation(offset, run, place, self.file)
        return super().reserve(offset, length)

    def store(self, reservation: Reservation, offset: int, view: memoryview, event: str = "write_aio") -> None:
        super().store(reservation, offset, memoryview(combined(offset, view)), event)

    def drop(self, offset: int, length: int, to: To, *, keep: bool = False) -> None:
        raise self.refuse("zero")  # zeros in the file are not zeros of the disk


def combined(offset: int, view: memoryview) -> bytes:
    """The bytes of the disk from `offset` on, encoded or decoded."""
    where = np.arange(offset, offset + len(view), dtype=np.uint64)
    return ((where * 7 + (where >> np.uint64(9)) + 90).astype(np.uint8) ^ np.frombuffer(view, np.uint8)).tobytes()
