"""The legal content of each sector of a disk after a power cut: the flushed content, or content written since the flush.

A workload records its operations in a `DiskHistory`, and the verification of a crash state compares the disk with it. The
unit is a sector, which is completely old or completely new. This is assertion A4 of the power-loss design; A9 (an operation
that changes no data alters no byte) is the same check for an operation that is not recorded.
"""

from __future__ import annotations

from .persistence import SECTOR

_ZERO = bytes(SECTOR)


class DiskHistory:
    """The content of a disk over time. Operations are numbered from 0 in the order in which they are recorded; `moment` is
    their number so far. Not thread-safe."""

    def __init__(self, content: bytes) -> None:
        self.content: bytearray = bytearray(content)
        #: The number of operations so far.
        self.moment: int = 0
        # The values of each sector with the moment of each, the first always at 0; False: the change may not have happened.
        self._values: list[list[tuple[int, bytes, bool]]] = []
        self._sizes = [(0, len(content))]
        self._extend(0, content=True)

    @property
    def size(self) -> int:
        return len(self.content)

    def write(self, offset: int, data: bytes) -> int:
        """Record a write. Returns the moment from which its bytes are required, once a flush guarantees them."""
        self.content[offset : offset + len(data)] = data
        return self._changed(offset, len(data))

    def zero(self, offset: int, length: int) -> int:
        return self.write(offset, bytes(length))

    def discard(self, offset: int, length: int, *, reads: bytes | None = None) -> int:
        """Record a discard: each sector reads as before or as zero. `reads`: its present content, if that is known, from
        which later writes of a part of a sector start."""
        for sector in range(offset // SECTOR, -(-(offset + length) // SECTOR)):
            self._values[sector].append((self.moment + 1, _ZERO[: self._length(sector)], False))
        if reads is not None:
            self.content[offset : offset + length] = reads
        self.moment += 1
        return self.moment

    def resize(self, size: int) -> int:
        """Record the new size `size`, a multiple of 512 bytes; added bytes read as zero."""
        old = len(self.content)
        if old % SECTOR or size % SECTOR:
            raise ValueError("the size of a resized disk is a multiple of 512 bytes")
        self.moment += 1
        del self.content[size:]
        self.content.extend(bytes(size - len(self.content)))
        for sector in range(old // SECTOR, min(size // SECTOR, len(self._values))):
            self._values[sector].append((self.moment, _ZERO, True))  # the sector existed and was removed
        self._extend(self.moment)
        self._sizes.append((self.moment, size))
        return self.moment

    def check(self, disk: bytes, begun: int, durable: int) -> None:
        """Raise AssertionError unless `disk` is possible after a power cut, when all operations up to the moment `begun` had
        begun, and all up to `durable` were flushed. The other methods return the moments; 0 is the beginning."""
        sizes = {size for at, size in self._sizes if durable < at <= begun}
        sizes.add([size for at, size in self._sizes if at <= durable][-1])
        assert len(disk) in sizes, f"the disk is {len(disk)} bytes long, but only {sorted(sizes)} are possible"
        for sector in range(-(-len(disk) // SECTOR)):
            value = disk[sector * SECTOR : (sector + 1) * SECTOR]
            if value not in self.legal(sector, begun, durable):
                raise AssertionError(
                    f"sector {sector} (offset {sector * SECTOR}) contains {_shown(value)}; "
                    f"possible are {', '.join(map(_shown, self.legal(sector, begun, durable)))} "
                    f"(begun: {begun}, durable: {durable})"
                )

    def legal(self, sector: int, begun: int, durable: int) -> list[bytes]:
        """The legal content of this sector, the newest first."""
        found = []
        for at, value, certain in reversed(self._values[sector]):
            if at > begun:
                continue
            found.append(value)
            if certain and at <= durable:
                break
        return found

    def _length(self, sector: int) -> int:
        return min(SECTOR, len(self.content) - sector * SECTOR)

    def _changed(self, offset: int, length: int) -> int:
        self.moment += 1
        for sector in range(offset // SECTOR, -(-(offset + length) // SECTOR)):
            value = bytes(self.content[sector * SECTOR : (sector + 1) * SECTOR])
            self._values[sector].append((self.moment, value, True))
        return self.moment

    def _extend(self, moment: int, *, content: bool = False) -> None:
        for at in range(len(self._values) * SECTOR, len(self.content), SECTOR):
            value = bytes(self.content[at : at + SECTOR]) if content else _ZERO
            self._values.append([(0, value, True)])


def same_bytes(before: bytes, after: bytes, what: str = "the operation") -> None:
    """A9: raise AssertionError at the first byte that differs; bytes added at the end must be zero."""
    if after[: len(before)] != before:
        at = next((at for at, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1]), len(after))
        raise AssertionError(f"{what} changed the disk at {at}: {_shown(before[at:])} became {_shown(after[at:])}")
    if any(after[len(before) :]):
        raise AssertionError(f"{what} added bytes after {len(before)} that are not zero")


def _shown(value: bytes) -> str:
    if not value.strip(b"\0"):
        return f"{len(value)} zeros"
    return f"{value[:8].hex(' ')}..." if len(value) > 8 else value.hex(" ")
