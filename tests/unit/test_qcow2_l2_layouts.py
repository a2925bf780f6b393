"""Extended L2 entries below the mapping of qcow2: single entries on the path of small reads, runs, and columns, each compared
with the bits as the specification words them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lamina
from lamina.errors import CorruptImage
from lamina.formats.qcow2 import layout as q
from lamina.formats.qcow2.header import Header
from lamina.formats.qcow2.mapping import Mappings
from lamina.request import Child
from lamina.status import COMPRESSED, DATA, PRESENT, ZERO
from lamina.storage.memory import MemoryStorage

_WORD, _BITMAP = (1 << 64) - 1, (1 << 32) - 1
STORED, ZEROED, PACKED = DATA | PRESENT, ZERO | PRESENT, DATA | PRESENT | COMPRESSED


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
    header = Header(cluster_bits=BITS, l1_table_offset=CLUSTER, l1_size=tables, incompatible_features=q.EXTENDED_L2)
    return Mappings(Child(file, "file"), header, 1 << 20)


@st.composite
def entry(draw: st.DrawFn) -> int:
    host = draw(st.sampled_from([0, 8, 9, 10])) * CLUSTER
    if draw(st.integers(0, 9)) == 0:
        unused = draw(st.sampled_from([0, 0, 1 << 64, 1 << 96]))  # the bitmap of a compressed cluster
        return 1 << 62 | draw(st.integers(0, (1 << 62) - 1)) | unused
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


def test_clusters_too_small_for_subclusters(tmp_path: Path) -> None:
    path = tmp_path / "image"
    lamina.create(path, "qcow2", 1 << 20, cluster_size=8192)
    with path.open("r+b") as file:
        file.seek(72)
        file.write(q.EXTENDED_L2.to_bytes(8))
    with pytest.raises(CorruptImage, match="clusters of 8192 bytes"):
        lamina.open(path, format="qcow2")
