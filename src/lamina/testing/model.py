"""A flat model of a disk, and the rules for the status of known bytes.

Plain Python over a `bytearray`: slow and simple. The module knows no driver.
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
    """A disk as a `bytearray`. A discarded byte may read as before or as zero until it is written again. With `keeps` False
    the content never changes. Offsets and lengths are bytes. Not thread-safe."""

    def __init__(self, content: bytes, *, keeps: bool = True) -> None:
        self.bytes: bytearray = bytearray(content)
        self.keeps = keeps
        self._discarded = bytearray(len(content))  # 1 for each byte that may also read as zero

    def __len__(self) -> int:
        return len(self.bytes)

    def write(self, offset: int, data: bytes) -> None:
        """The bytes from `offset` on become `data`."""
        if self.keeps:
            self.bytes[offset : offset + len(data)] = data
            self._discarded[offset : offset + len(data)] = bytes(len(data))

    def zero(self, offset: int, length: int) -> None:
        """These bytes become zeros."""
        self.write(offset, bytes(length))

    def discard(self, offset: int, length: int) -> None:
        """These bytes may become anything that the contract allows."""
        self._discarded[offset : offset + length] = b"\1" * length

    def truncate(self, size: int) -> None:
        """Change the size; added bytes read as zero."""
        del self.bytes[size:], self._discarded[size:]
        added = bytes(size - len(self.bytes))
        self.bytes += added
        self._discarded += added

    def wrong(self, offset: int, found: bytes) -> int | None:
        """The offset of the first impossible byte of `found`, read at `offset`; None if there is none."""
        if self.bytes[offset : offset + len(found)] == found:
            return None
        for at, byte in enumerate(found, offset):
            if byte != self.bytes[at] and (byte or not self._discarded[at]):
                return at
        return None


def check_status(found: Extents, begin: int, content: bytes) -> None:
    """Assert that `found` is a correct status of the bytes from `begin`, which read as `content`.

    It covers each byte once, in order, in as few extents as possible. Extents with the flag zero read as zero; so do extents
    of a layer without data, and those of no layer. A host offset leads to the same bytes; compressed extents have none.
    """
    end = begin + len(content)
    assert (found.begin, found.end) == (begin, end), f"the query was for [{begin}, {end}), the result is {found!r}"
    assert found.contiguous
    assert len(found) == len(found.coalesce()), f"equal adjacent extents: {found!r}"
    for row in found:
        assert row.length > 0
        part = content[row.start - begin : row.end - begin]
        if row.zero:
            assert part.count(0) == len(part), f"the extent has the flag zero, but does not read as zero: {row}"
        else:
            assert row.data, f"neither data nor zero: {row}"
            assert row.present, f"data that belongs to no layer: {row}"
        assert (row.file is None) == (row.offset is None)
        if row.compressed:
            assert row.offset is None
            assert row.data
        elif row.data and row.offset is not None:
            assert read_host(row.file, row.offset, row.length) == part, f"the host file contains other bytes: {row}"


def read_host(file: object, offset: int, length: int) -> bytes:
    """The bytes of the host file of an extent, which is a storage node."""
    assert isinstance(file, Node)
    buffer = bytearray(length)
    Child(file, "host", grows=True).read_into(offset, memoryview(buffer))
    return bytes(buffer)


def check_first_extents(edge: Child | Root, whole: Extents, most: int) -> None:
    """Assert that `Node.first_extents`, called repeatedly for at most `most` rows over the range of `whole`, agrees with
    `whole`, a result of `Node.extents`."""
    from ..extents import Extent, Extents
    from ..status import COMPRESSED, DATA, PRESENT, ZERO

    rows, at = [], whole.begin
    while at < whole.end:
        few = edge.first_extents(at, whole.end - at, most)
        assert 1 <= len(few) <= most, f"{len(few)} rows, but at most {most} were requested"
        for flags, length, depth, file, offset in few:
            assert length > 0
            data, zero, present, compressed = (bool(flags & bit) for bit in (DATA, ZERO, PRESENT, COMPRESSED))
            host = None if file is None else offset
            rows.append(Extent(at, length, data, zero, present, depth, compressed, file, host))
            at += length
    if rows:
        assert Extents.from_extents(rows).coalesce() == whole


def check_disk(image: Image, disk: Disk) -> bytes:
    """Assert that all bytes of `image` equal those of `disk`, and that its status agrees with them. Returns the bytes."""
    assert image.size == len(disk)
    content = image.read(0, image.size)
    wrong = disk.wrong(0, content)
    assert wrong is None, f"byte {wrong} is {content[wrong]}, not {disk.bytes[wrong]}"
    status = image.extents()
    check_status(status, 0, content)
    check_first_extents(image.root, status, 3)
    return content


class Written(NamedTuple):
    """One of several concurrent writes: every byte of it has `value`, which no other write has."""

    thread: int
    offset: int
    length: int
    value: int


def serial_order(writes: Sequence[Written], before: bytes, after: bytes, atom: int) -> str | None:
    """A reason why no order of `writes` in each block of `atom` bytes turns `before` into `after`; None if one does.

    `writes` has a list for each thread, in the order of that thread. Values do not occur in `before`.
    """
    for block in range(0, len(before), atom):
        stop = min(block + atom, len(before))
        here = [w for w in writes if w.offset < stop and block < w.offset + w.length]
        if not here:
            if before[block:stop] != after[block:stop]:
                return f"the block at {block} changed without a write"
            continue
        # Between two boundaries of writes the same writes cover all bytes, so all bytes must come from the same one.
        ends = (end for w in here for end in (w.offset, w.offset + w.length))
        edges = sorted({block, stop, *(min(max(end, block), stop) for end in ends)})
        later: dict[Hashable, set[Hashable]] = {w.value: set() for w in here}
        for first, second in pairwise(edges):
            over = {w.value for w in here if w.offset <= first < w.offset + w.length}
            part = after[first:second]
            if not over:
                if part != before[first:second]:
                    return f"bytes {first} to {second} changed without a write"
            elif part[0] not in over or part.count(part[0]) != len(part):
                return f"bytes {first} to {second} come from several writes, or from a write elsewhere"
            else:
                for value in over - {part[0]}:
                    later[value].add(part[0])
        for first_write, second_write in pairwise(sorted(here, key=lambda w: w.thread)):
            if first_write.thread == second_write.thread:
                later[first_write.value].add(second_write.value)
        if _cyclic(later):
            return f"the block at {block} is not the result of any order of its {len(here)} writes"
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
