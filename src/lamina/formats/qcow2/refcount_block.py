"""Refcount blocks: a cluster of refcounts in memory, and the range of its bytes that is not on disk.

After "Host cluster management" of the published specification: a count has `refcount_bits` bits, big-endian; counts of less
than 8 bits begin with the lowest bits of a byte.
"""

from __future__ import annotations

import re
import sys
from array import array
from typing import Any

_TYPECODES = {8: "B", 16: "H", 32: "I", 64: "Q"}


class WideBlock:
    """A refcount block with 8, 16, 32 or 64 bits per count, in native byte order."""

    __slots__ = ("counts", "high", "low", "stored")

    def __init__(self, raw: bytes | bytearray, bits: int) -> None:
        self.counts: array[int] = array(_TYPECODES[bits], bytes(raw))
        if sys.byteorder == "little":
            self.counts.byteswap()
        self.low, self.high = len(raw), 0  # the bytes that are not on disk yet
        self.stored = False  # the file is known to hold storage for all of it

    def get(self, index: int) -> int:
        return self.counts[index]

    def fill(self, index: int, length: int, count: int) -> None:
        """Set `length` counts from `index` on. They are marked as changed first."""
        width = self.counts.itemsize
        counts = array(self.counts.typecode, (count,)) * length
        self.low = min(self.low, index * width)
        self.high = max(self.high, (index + length) * width)
        self.counts[index : index + length] = counts

    def free_run(self, index: int, length: int) -> int:
        """The number of counts from `index` on that are 0, up to `length`."""
        part = self.counts[index : index + length]
        return next((at for at, count in enumerate(part) if count), len(part)) if any(part) else len(part)

    def find_free(self, start: int) -> int:
        """The first index from `start` on whose count is 0, or -1."""
        try:
            return self.counts.index(0, start)
        except ValueError:
            return -1

    def last_used(self) -> int:
        """The last index whose count is not 0, or -1."""
        return (len(self.counts.tobytes().rstrip(b"\0")) - 1) // self.counts.itemsize

    def raw(self, low: int, high: int) -> bytes:
        width = self.counts.itemsize
        part = self.counts[low // width : -(-high // width)]
        if sys.byteorder == "little":
            part.byteswap()
        return part.tobytes()


class NarrowBlock:
    """A refcount block with 1, 2 or 4 bits per count, beginning with the lowest bits of each byte."""

    __slots__ = ("_bits", "_has_free", "_per_byte", "bytes", "high", "low", "stored")

    def __init__(self, raw: bytes | bytearray, bits: int) -> None:
        self.bytes = bytearray(raw)
        self._bits = bits
        self._per_byte = 8 // bits
        mask = (1 << bits) - 1
        free = [byte for byte in range(256) if any(not byte >> at & mask for at in range(0, 8, bits))]
        self._has_free = re.compile(b"[" + b"".join(b"\\x%02x" % byte for byte in free) + b"]")
        self.low, self.high = len(raw), 0
        self.stored = False

    def get(self, index: int) -> int:
        byte, at = divmod(index, self._per_byte)
        return self.bytes[byte] >> at * self._bits & (1 << self._bits) - 1

    def fill(self, index: int, length: int, count: int) -> None:
        """Set `length` counts from `index` on. They are marked as changed first."""
        self.low = min(self.low, index // self._per_byte)
        self.high = max(self.high, (index + length - 1) // self._per_byte + 1)
        mask = (1 << self._bits) - 1
        for number in range(index, index + length):
            byte, at = divmod(number, self._per_byte)
            self.bytes[byte] = self.bytes[byte] & ~(mask << at * self._bits) | count << at * self._bits

    def free_run(self, index: int, length: int) -> int:
        """The number of counts from `index` on that are 0, up to `length`."""
        stop = min(index + length, len(self.bytes) * self._per_byte)
        return next((at for at in range(index, stop) if self.get(at)), stop) - index

    def find_free(self, start: int) -> int:
        """The first index from `start` on whose count is 0, or -1."""
        per_byte = self._per_byte
        while start % per_byte:
            if not self.get(start):
                return start
            start += 1
        found = self._has_free.search(self.bytes, start // per_byte)
        if found is None:
            return -1
        index = found.start() * per_byte
        while self.get(index):
            index += 1
        return index

    def last_used(self) -> int:
        """The last index whose count is not 0, or -1."""
        at = len(self.bytes.rstrip(b"\0")) * self._per_byte - 1
        while at >= 0 and not self.get(at):
            at -= 1
        return at

    def raw(self, low: int, high: int) -> bytes:
        return bytes(self.bytes[low:high])


Block = WideBlock | NarrowBlock


def make_block(raw: bytearray, refcount_bits: int) -> Block:
    """The block with these bytes, unchanged."""
    return WideBlock(raw, refcount_bits) if refcount_bits >= 8 else NarrowBlock(raw, refcount_bits)


def unpacked(raw: bytes | bytearray, refcount_bits: int) -> Any:
    """The counts in the bytes of a block, as a column."""
    from ...numeric import np

    if refcount_bits >= 8:
        return np.frombuffer(raw, f">u{refcount_bits // 8}")
    packed = np.frombuffer(raw, np.uint8)
    shifts = np.arange(0, 8, refcount_bits, dtype=np.uint8)
    return (packed[:, None] >> shifts & np.uint8((1 << refcount_bits) - 1)).reshape(-1)
