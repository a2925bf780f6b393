"""The flat model of a disk, and what the status of a disk must say of bytes that are known.

Plain Python over a `bytearray`, slow and obviously right. Nothing here knows a driver.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from ..node import Node
from ..request import Child

if TYPE_CHECKING:
    from ..extents import Extents
    from ..image import Image
    from ..root import Root


class Disk:
    """A disk as a `bytearray`. A byte that was discarded may read as before or as zero until it is written again. With
    `keeps` False nothing ever changes. Offsets and lengths are bytes. Not thread-safe."""

    def __init__(self, content: bytes, *, keeps: bool = True) -> None:
        self.bytes = bytearray(content)
        self.keeps = keeps
        self._discarded = bytearray(len(content))  # 1 for each byte that may also read as zero

    def __len__(self) -> int:
        return len(self.bytes)

    def write(self, offset: int, data: bytes) -> None:
        if self.keeps:
            self.bytes[offset : offset + len(data)] = data
            self._discarded[offset : offset + len(data)] = bytes(len(data))

    def zero(self, offset: int, length: int) -> None:
        self.write(offset, bytes(length))

    def discard(self, offset: int, length: int) -> None:
        self._discarded[offset : offset + length] = b"\1" * length

    def truncate(self, size: int) -> None:
        """What is added reads as zero."""
        del self.bytes[size:], self._discarded[size:]
        added = bytes(size - len(self.bytes))
        self.bytes += added
        self._discarded += added

    def wrong(self, offset: int, found: bytes) -> int | None:
        """Where `found`, read at `offset`, first holds a byte that cannot be; None if it does nowhere."""
        if self.bytes[offset : offset + len(found)] == found:
            return None
        for at, byte in enumerate(found, offset):
            if byte != self.bytes[at] and (byte or not self._discarded[at]):
                return at
        return None


def check_status(found: Extents, begin: int, content: bytes) -> None:
    """Assert that `found` is a right answer for the bytes from `begin` on, which read as `content`.

    It covers each byte once, in order, as few extents as can be. Zero reads as zero; what a layer owns without storing it,
    and what no layer owns, is zero; a host offset leads to the very bytes, and compressed bytes have none.
    """
    end = begin + len(content)
    assert (found.begin, found.end) == (begin, end), f"[{begin}, {end}) was asked, {found!r} came back"
    assert found.contiguous
    assert len(found) == len(found.coalesce()), f"equal neighbours: {found!r}"
    for row in found:
        assert row.length > 0
        part = content[row.start - begin : row.end - begin]
        if row.zero:
            assert part.count(0) == len(part), f"said to read as zero, and does not: {row}"
        else:
            assert row.data, f"neither stored nor zero: {row}"
            assert row.present, f"stored, and nobody owns it: {row}"
        assert (row.file is None) == (row.offset is None)
        if row.compressed:
            assert row.offset is None
            assert row.data
        elif row.data and row.offset is not None:
            assert read_host(row.file, row.offset, row.length) == part, f"other bytes lie in the host file: {row}"


def read_host(file: object, offset: int, length: int) -> bytes:
    """Bytes of the host file that an extent names: a node of storage."""
    assert isinstance(file, Node)
    buffer = bytearray(length)
    Child(file, "host", grows=True).read_into(offset, memoryview(buffer))
    return bytes(buffer)


def check_first_extents(edge: Child | Root, whole: Extents, most: int) -> None:
    """Assert that `Node.first_extents`, asked from the beginning of `whole` to its end for `most` rows at a time, says what
    `whole`, an answer of `Node.extents`, does."""
    from ..extents import Extent, Extents
    from ..status import COMPRESSED, DATA, PRESENT, ZERO

    rows, at = [], whole.begin
    while at < whole.end:
        few = edge.first_extents(at, whole.end - at, most)
        assert 1 <= len(few) <= most, f"{len(few)} rows, and at most {most} were asked for"
        for flags, length, depth, file, offset in few:
            assert length > 0
            data, zero, present, compressed = (bool(flags & bit) for bit in (DATA, ZERO, PRESENT, COMPRESSED))
            host = None if file is None else offset
            rows.append(Extent(at, length, data, zero, present, depth, compressed, file, host))
            at += length
    if rows:
        assert Extents.from_extents(rows).coalesce() == whole


def check_disk(image: Image, disk: Disk) -> bytes:
    """Assert that all bytes of `image` are those of `disk`, and that its status agrees with them. Returns them."""
    assert image.size == len(disk)
    content = image.read(0, image.size)
    wrong = disk.wrong(0, content)
    assert wrong is None, f"byte {wrong} is {content[wrong]}, and was {disk.bytes[wrong]}"
    status = image.extents()
    check_status(status, 0, content)
    check_first_extents(image.root, status, 3)
    return content


class Written(NamedTuple):
    """One of many writes that ran at once: every byte of it was `value`, which no other write had."""

    thread: int
    offset: int
    length: int
    value: int


def serial_order(writes: Sequence[Written], before: bytes, after: bytes, atom: int) -> str | None:
    """Why `after` cannot come from `before` by some order of `writes` in each block of `atom` bytes; None if it can.

    `writes` lists those of each thread in the order in which that thread did them. Values are not in `before`.
    """
    for block in range(0, len(before), atom):
        stop = min(block + atom, len(before))
        here = [w for w in writes if w.offset < stop and block < w.offset + w.length]
        if not here:
            if before[block:stop] != after[block:stop]:
                return f"the block at {block} changed, and nobody wrote to it"
            continue
        # Between two edges of writes all bytes were covered by the same writes, so all must show the same one.
        ends = (end for w in here for end in (w.offset, w.offset + w.length))
        edges = sorted({block, stop, *(min(max(end, block), stop) for end in ends)})
        later: dict[Hashable, set[Hashable]] = {w.value: set() for w in here}
        for first, second in pairwise(edges):
            over = {w.value for w in here if w.offset <= first < w.offset + w.length}
            part = after[first:second]
            if not over:
                if part != before[first:second]:
                    return f"bytes {first} to {second} changed, and nobody wrote to them"
            elif part[0] not in over or part.count(part[0]) != len(part):
                return f"bytes {first} to {second} are of no single write, or of one that is not theirs"
            else:
                for value in over - {part[0]}:
                    later[value].add(part[0])
        for first_write, second_write in pairwise(sorted(here, key=lambda w: w.thread)):
            if first_write.thread == second_write.thread:
                later[first_write.value].add(second_write.value)
        if _cyclic(later):
            return f"the block at {block} is the result of no order of its {len(here)} writes"
    return None


def _cyclic(later: Mapping[Hashable, set[Hashable]]) -> bool:
    left = {key: set(after) for key, after in later.items()}
    while left:
        last = [key for key, after in left.items() if not after & left.keys()]
        if not last:
            return True
        for key in last:
            del left[key]
    return False
