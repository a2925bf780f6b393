"""What each sector of a disk may hold after a power cut: what was flushed, or something written since; never anything else.

A workload tells a `DiskHistory` what it does to a disk; the verification of a crash state asks it. Guest data is judged by
sector: a sector is all old or all new. This is assertion A4 of the power-loss design; A9 (an operation that changes no data
alters no byte) is the same question about an operation that the history is not told of.
"""

from __future__ import annotations

from .persistence import SECTOR

_ZERO = bytes(SECTOR)


class DiskHistory:
    """The contents of a disk over time. Operations are numbered from 0, in the order in which they are told; `moment`
    counts them. Not thread-safe."""

    def __init__(self, content: bytes) -> None:
        self.content = bytearray(content)
        #: How many operations there were.
        self.moment = 0
        # For each sector its values with the moment each came, the first always at 0; False: it may also not have come.
        self._values: list[list[tuple[int, bytes, bool]]] = []
        self._sizes = [(0, len(content))]
        self._extend(0, content=True)

    @property
    def size(self) -> int:
        return len(self.content)

    def write(self, offset: int, data: bytes) -> int:
        """The bytes are written; the moment from which that counts: to be found if a flush promised it."""
        self.content[offset : offset + len(data)] = data
        return self._changed(offset, len(data))

    def zero(self, offset: int, length: int) -> int:
        return self.write(offset, bytes(length))

    def discard(self, offset: int, length: int, *, reads: bytes | None = None) -> int:
        """The bytes are given up: each sector reads as before or as zero. `reads`: what it reads as now, if that is known;
        it is only where later writes into a part of a sector start from."""
        for sector in range(offset // SECTOR, -(-(offset + length) // SECTOR)):
            self._values[sector].append((self.moment + 1, _ZERO[: self._length(sector)], False))
        if reads is not None:
            self.content[offset : offset + length] = reads
        self.moment += 1
        return self.moment

    def resize(self, size: int) -> int:
        """The disk is `size` bytes long from now on; what is added reads as zero. A multiple of 512 bytes."""
        old = len(self.content)
        if old % SECTOR or size % SECTOR:
            raise ValueError("a disk that is resized has whole sectors")
        self.moment += 1
        del self.content[size:]
        self.content.extend(bytes(size - len(self.content)))
        for sector in range(old // SECTOR, min(size // SECTOR, len(self._values))):
            self._values[sector].append((self.moment, _ZERO, True))  # it was there once, and was cut off
        self._extend(self.moment)
        self._sizes.append((self.moment, size))
        return self.moment

    def check(self, disk: bytes, begun: int, durable: int) -> None:
        """Raise AssertionError if `disk` cannot be what a power cut left when all up to moment `begun` had begun and all up
        to `durable` was flushed. Moments are those that the other methods returned; 0: nothing."""
        sizes = {size for at, size in self._sizes if durable < at <= begun}
        sizes.add([size for at, size in self._sizes if at <= durable][-1])
        assert len(disk) in sizes, f"the disk is {len(disk)} bytes long, not one of {sorted(sizes)}"
        for sector in range(-(-len(disk) // SECTOR)):
            value = disk[sector * SECTOR : (sector + 1) * SECTOR]
            if value not in self.legal(sector, begun, durable):
                raise AssertionError(
                    f"sector {sector} (offset {sector * SECTOR}) holds {_shown(value)}; "
                    f"it may hold {', '.join(map(_shown, self.legal(sector, begun, durable)))} "
                    f"(begun: {begun}, durable: {durable})"
                )

    def legal(self, sector: int, begun: int, durable: int) -> list[bytes]:
        """What this sector may hold, the newest first."""
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
    """A9: raise AssertionError at the first byte that differs; what was added at the end must be zero."""
    if after[: len(before)] != before:
        at = next((at for at, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1]), len(after))
        raise AssertionError(f"{what} changed the disk at {at}: {_shown(before[at:])} became {_shown(after[at:])}")
    if any(after[len(before) :]):
        raise AssertionError(f"{what} left something in what it added behind {len(before)}")


def _shown(value: bytes) -> str:
    if not value.strip(b"\0"):
        return f"{len(value)} zeros"
    return f"{value[:8].hex(' ')}..." if len(value) > 8 else value.hex(" ")
