"""What `L2Layout` bears: entries of 16 bytes with a bitmap of subclusters, as a layout of its own below the mapping of qcow2.

The driver does not open images with such entries. This layout is here to hold that nothing but a layout is missing for the
mapping of one: sizes, single entries on the path of small reads, and columns."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.errors import CorruptImage
from lamina.format_node import Mapping
from lamina.formats.qcow2 import mapping
from lamina.formats.qcow2.header import Header
from lamina.formats.qcow2.l2_entry import InvalidEntry, L2Layout, data_cluster, is_compressed
from lamina.formats.qcow2.mapping import Mappings
from lamina.request import Child
from lamina.status import COMPRESSED, DATA, PRESENT, ZERO
from lamina.storage.memory import MemoryStorage

_WORD, _BITMAP = (1 << 64) - 1, (1 << 32) - 1
STORED, ZEROED, PACKED = DATA | PRESENT, ZERO | PRESENT, DATA | PRESENT | COMPRESSED


class Pairs:
    """Entries of 16 bytes in memory."""

    def __init__(self, words: array[int]) -> None:
        self.words = words

    def __len__(self) -> int:
        return len(self.words) // 2

    def __getitem__(self, index: int) -> int:
        return self.words[2 * index] | self.words[2 * index + 1] << 64


class Extended(L2Layout):
    """Entries with 32 subclusters to a cluster. A unit is a subcluster."""

    __slots__ = ()
    entry_bits = 4
    units_bits = 5

    def load(self, file: Child, offset: int) -> Any:
        words = array("Q", bytes(self.cluster_size))
        file.read_into(offset, memoryview(words).cast("B"))
        words.byteswap()
        return Pairs(words)

    def column(self, entries: Any) -> Any:
        return np.frombuffer(entries.words, np.uint64)

    def map_one(self, entry: int, within: int, length: int, file: Child) -> Mapping | None:
        if entry & self.not_simple:
            return None
        bits = self.cluster_bits - self.units_bits
        asked = (2 << (within + length - 1 >> bits)) - (1 << (within >> bits))
        stored, zero, host = entry >> 64 & asked, entry >> 96 & asked, data_cluster(entry)
        if (stored and zero) or stored not in (0, asked) or zero not in (0, asked) or (stored and not host):
            return None
        flags = STORED if stored else ZEROED if zero else 0
        return Mapping(flags, length, host + within, file) if flags and host else Mapping(flags, length)

    def run(self, entries: Any, unit: int, stop: int) -> tuple[int, int, int, int]:
        entry, at = entries[unit >> 5], unit & 31
        count = min(32 - at, stop - unit)
        if is_compressed(entry):
            return PACKED, -1, count, entry
        host, stored, zero = data_cluster(entry), entry >> 64 + at & _BITMAP, entry >> 96 + at & _BITMAP
        if host & self.misaligned or (stored & zero) & 1 or (stored & 1 and not host):
            raise self.invalid(host)
        alike = 1
        while alike < count and (stored >> alike ^ stored) & 1 == 0 and (zero >> alike ^ zero) & 1 == 0:
            alike += 1
        flags = STORED if stored & 1 else ZEROED if zero & 1 else 0
        place = host + (at << self.cluster_bits - 5) if flags and host else -1
        return flags, place, alike, entry

    def runs(self, words: Any, first: int, stop: int) -> tuple[Any, Any, Any]:
        descriptors, bitmaps = words[0::2].repeat(32)[first:stop], words[1::2].repeat(32)[first:stop]
        at = np.arange(first, stop, dtype=np.uint64) & np.uint64(31)
        packed = descriptors >> np.uint64(62) & np.uint64(1) != 0
        host = (descriptors & np.uint64((1 << 56) - 512)).astype(np.int64)
        stored = (bitmaps >> at & np.uint64(1) != 0) & ~packed
        zero = (bitmaps >> at + np.uint64(32) & np.uint64(1) != 0) & ~packed
        if ((host & self.misaligned != 0) & ~packed | stored & zero | stored & (host == 0)).any():
            raise InvalidEntry("an extended L2 entry contradicts itself")
        flags = np.select([packed, stored, zero], [PACKED, STORED, ZEROED], 0).astype(np.uint8)
        size = 1 << self.cluster_bits - 5
        place = np.where((flags != 0) & ~packed & (host != 0), host + at.astype(np.int64) * size, -1)
        goes_on = np.where(place[:-1] >= 0, place[1:] == place[:-1] + size, place[1:] < 0) & (flags[1:] == flags[:-1])
        heads = np.concatenate(([0], np.flatnonzero(~goes_on) + 1))
        return heads, flags[heads], place[heads]


BITS = 14  # the least for such entries
CLUSTER, UNIT = 1 << BITS, 1 << BITS - 5
PER_TABLE = CLUSTER // 16


def mappings(entries: dict[int, int], tables: int) -> Mappings:
    """The mapping of an image whose L2 tables, as many as said, have these entries."""
    file = MemoryStorage((2 + tables) * CLUSTER)
    for which in range(tables):
        file.write(CLUSTER + 8 * which, memoryview(((2 + which) * CLUSTER | 1 << 63).to_bytes(8, "big")))
    for cluster, entry in entries.items():
        raw = (entry & _WORD).to_bytes(8, "big") + (entry >> 64).to_bytes(8, "big")
        file.write(2 * CLUSTER + 16 * cluster, memoryview(raw))
    header = Header(cluster_bits=BITS, l1_table_offset=CLUSTER, l1_size=tables)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mapping, "L2Layout", Extended)
        return Mappings(Child(file, "file"), header, 1 << 20)


@st.composite
def entry(draw: st.DrawFn) -> int:
    host = draw(st.sampled_from([0, 8, 9, 10])) * CLUSTER
    if draw(st.integers(0, 9)) == 0:
        return 1 << 62 | draw(st.integers(0, (1 << 62) - 1))
    masks = st.sampled_from([0, _BITMAP, _BITMAP, 1, 1 << 31, 0xFFFF0000, 0x0FFFFFF0]) | st.integers(0, _BITMAP)
    stored = draw(masks) if host else 0
    zero = draw(masks) & ~stored
    return host | (1 << 63 if host else 0) | stored << 64 | zero << 96


def told(entries: dict[int, int], unit: int) -> tuple[int, int]:
    """(flags, offset or -1) of a unit, read from the bits as the specification words it."""
    entry, at = entries.get(unit // 32, 0), unit % 32
    host = entry & (1 << 56) - 512
    if entry >> 62 & 1:
        return PACKED, -1
    if entry >> 64 + at & 1:
        return STORED, host + at * UNIT
    if entry >> 96 + at & 1:
        return ZEROED, host + at * UNIT if host else -1
    return 0, -1


CLUSTERS = st.sampled_from([0, 1, 2, PER_TABLE - 2, PER_TABLE - 1, PER_TABLE, PER_TABLE + 1])


@given(st.dictionaries(CLUSTERS, entry()), st.data())
def test_entries_with_subclusters(entries: dict[int, int], data: st.DataObject) -> None:
    found = mappings(entries, 2)
    first = data.draw(st.sampled_from([0, 1, 31, 33, 32 * PER_TABLE - 33, 32 * PER_TABLE]))
    stop = min(first + data.draw(st.integers(1, 200)), 64 * PER_TABLE)
    wanted = [told(entries, unit) for unit in range(first, stop)]
    columns = found.map_columns(first * UNIT, (stop - first) * UNIT)
    rows = zip(columns.start, columns.length, columns.flags, columns.offset, strict=True)
    units = [
        (flags, place + at * UNIT if place >= 0 else -1)
        for _, length, flags, place in rows
        for at in range(length // UNIT)
    ]
    assert units == wanted
    at = first
    while at < stop:
        flags, length, place, _, token = found.map(at * UNIT + 1, (stop - at) * UNIT - 1)
        length += 1
        assert 0 < length <= (stop - at) * UNIT
        units = [(flags, place - 1 + n * UNIT if place >= 0 else -1) for n in range(length // UNIT)]
        assert units == wanted[at - first : at - first + len(units)]
        assert token == (entries[at // 32] if flags & COMPRESSED else None)
        one = found.map_one(at * UNIT, UNIT)
        if flags & COMPRESSED:
            assert one is None
        else:
            assert one is not None
            assert one[:3] == (flags, UNIT, place - 1 if place >= 0 else -1)
        at += length // UNIT


@pytest.mark.parametrize("number", [8 * CLUSTER | 1 << 64 | 1 << 96, 1 << 64, 8 * CLUSTER + 512 | 1 << 64])
def test_an_entry_that_contradicts_itself(number: int) -> None:
    found = mappings({0: number}, 1)
    with pytest.raises(CorruptImage):
        found.map(0, UNIT)
    with pytest.raises(CorruptImage):
        found.map_columns(0, UNIT)
    assert found.map_one(0, UNIT) is None
