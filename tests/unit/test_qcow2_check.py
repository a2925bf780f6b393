"""The check of qcow2 images, on images that are built here byte by byte: no driver and no peer has a part in them."""

from __future__ import annotations

import struct
import tracemalloc
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.errors import BlockIOError, UnsupportedFeature
from lamina.formats.qcow2 import layout as q
from lamina.formats.qcow2 import references
from lamina.formats.qcow2.check import check
from lamina.formats.qcow2.header import Header
from lamina.formats.qcow2.references import References
from lamina.report import ERROR, LEAK, MAX_FINDINGS, UNREADABLE, CheckReport
from lamina.request import Child
from lamina.storage.memory import MemoryStorage

HOLE, ZERO, PREALLOCATED, STORED, PACKED = range(5)


class Image:
    """An image in memory: header, refcount table, refcount blocks, L1, L2 tables, clusters; in that order, without gaps."""

    def __init__(
        self, kinds: Sequence[int] = (STORED,) * 4, *, bits: int = 9, order: int = 4, version: int = 3
    ) -> None:
        self.bits, self.order, self.version = bits, order, version
        self.cs = cs = 1 << bits
        per_table, per_block = cs // 8, cs * 8 >> order
        tables = max(-(-len(kinds) // per_table), 1)
        fixed = 2 + 1 + tables
        stored = sum(kind >= PREALLOCATED for kind in kinds)
        blocks = 1
        while blocks * per_block < fixed + blocks + stored:
            blocks += 1
        assert blocks <= per_table
        assert tables <= per_table
        self.reftable, self.block, self.l1 = cs, 2 * cs, (2 + blocks) * cs
        self.l2 = self.l1 + cs
        self.clusters = fixed + blocks + stored
        self.raw = bytearray(self.clusters * cs)
        self.size = len(kinds) * cs
        self.header = Header(
            version=version,
            cluster_bits=bits,
            size=self.size,
            l1_size=tables,
            l1_table_offset=self.l1,
            refcount_table_offset=self.reftable,
            refcount_table_clusters=1,
            refcount_order=order,
            header_length=104 if version == 3 else 72,
        )
        for index in range(blocks):
            self.put(self.reftable + 8 * index, self.block + index * cs)
        for index in range(tables):
            self.put(self.l1 + 8 * index, self.l2 + index * cs | q.COPIED)
        for cluster in range(self.clusters):
            self.count(cluster, 1)
        self.data = self.l2 + tables * cs
        at = self.data
        for index, kind in enumerate(kinds):
            value = {HOLE: 0, ZERO: q.ZERO, PREALLOCATED: at | q.COPIED | q.ZERO, STORED: at | q.COPIED}.get(kind)
            # Compressed data of one sector, so that it stays in its cluster.
            self.put(self.entry(index), q.COMPRESSED | at if value is None else value)
            at += cs * (kind >= PREALLOCATED)

    def entry(self, index: int) -> int:
        return self.l2 + 8 * index

    def get(self, at: int) -> int:
        return int(struct.unpack_from(">Q", self.raw, at)[0])

    def put(self, at: int, value: int) -> None:
        struct.pack_into(">Q", self.raw, at, value)

    def count(self, cluster: int, value: int) -> None:
        """Store the reference count of a cluster."""
        width = 1 << self.order
        index, inside = divmod(cluster, self.cs * 8 >> self.order)
        start = (self.get(self.reftable + 8 * index) & q.REFBLOCK_MASK) + (inside * width >> 3)
        if width >= 8:
            self.raw[start : start + width // 8] = value.to_bytes(width // 8, "big")
        else:
            shift = inside * width % 8
            mask = (1 << width) - 1
            self.raw[start] = self.raw[start] & ~(mask << shift) & 0xFF | value << shift

    def storage(self) -> MemoryStorage:
        head = self.header.to_bytes()
        self.raw[: len(head)] = head
        storage = MemoryStorage(len(self.raw))
        storage.write(0, memoryview(bytes(self.raw)))
        storage.read_only = True
        return storage

    def check(self) -> CheckReport:
        child = Child(self.storage(), "file")
        return check(child, Header.read(child))


def told(report: CheckReport) -> tuple[int, int, int]:
    return report.corruptions, report.leaks, report.check_errors


shapes = st.tuples(
    st.lists(st.integers(HOLE, PACKED), min_size=1, max_size=150),
    st.integers(9, 12),
    st.integers(0, 6),
    st.sampled_from([2, 3]),
)


def build(shape: tuple[list[int], int, int, int]) -> Image:
    kinds, bits, order, version = shape
    if version == 2:
        kinds, order = [HOLE if kind in (ZERO, PREALLOCATED) else kind for kind in kinds], 4
    return Image(kinds, bits=bits, order=order, version=version)


@given(shapes)
def test_a_whole_image_is_clean(shape: tuple[list[int], int, int, int]) -> None:
    image = build(shape)
    report = image.check()
    kinds = [kind if image.version == 3 or kind in (STORED, PACKED) else HOLE for kind in shape[0]]
    assert report.clean, report.findings
    assert report.total_clusters == len(kinds)
    assert report.allocated_clusters == sum(kind >= PREALLOCATED for kind in kinds)
    assert report.compressed_clusters == kinds.count(PACKED)
    assert report.image_end_offset == len(image.raw)


@given(shapes, st.data())
def test_one_wrong_count_is_found(shape: tuple[list[int], int, int, int], data: st.DataObject) -> None:
    image = build(shape)
    cluster = data.draw(st.integers(0, image.clusters - 1))
    value = data.draw(st.integers(0, (1 << (1 << image.order)) - 1).filter(lambda value: value != 1))
    image.count(cluster, value)
    report = image.check()
    flagged = 0
    for at in [image.l1 + 8 * i for i in range(image.header.l1_size)] + [
        image.entry(i) for i in range(image.header.l1_size * image.cs // 8)
    ]:
        entry = image.get(at)
        flagged += bool(entry & q.COPIED) and (entry & q.OFFSET_MASK) == cluster * image.cs
    assert told(report) == ((flagged, 1, 0) if value else (1 + flagged, 0, 0))
    assert {finding.offset for finding in report.findings} == {cluster * image.cs}


Break = Callable[[Image], None]

#: What is done to four stored clusters, and what (corruptions, leaks, check errors) is then told.
BROKEN: dict[str, tuple[Break, tuple[int, int, int]]] = {
    "COPIED missing in L2": (lambda i: i.put(i.entry(0), i.data), (1, 0, 0)),
    "COPIED missing in L1": (lambda i: i.put(i.l1, i.l2), (1, 0, 0)),
    "COPIED without a place": (lambda i: i.put(i.entry(0), q.COPIED), (1, 1, 0)),
    "COPIED and compressed": (lambda i: i.put(i.entry(0), q.COPIED | q.COMPRESSED | i.data), (1, 0, 0)),
    "two guest clusters in one": (lambda i: i.put(i.entry(0), i.get(i.entry(1))), (1, 1, 0)),
    "data in the L2 table": (lambda i: i.put(i.entry(0), i.l2 | q.COPIED), (1, 1, 0)),
    "data in the refcount block": (lambda i: i.put(i.entry(0), i.block | q.COPIED), (2, 1, 0)),
    "compressed data in the header": (lambda i: i.put(i.entry(0), q.COMPRESSED), (1, 1, 0)),
    "data at the end of the file": (lambda i: i.put(i.entry(0), len(i.raw)), (1, 1, 0)),
    "data beyond, COPIED": (lambda i: i.put(i.entry(0), 1 << 55 | q.COPIED), (2, 1, 0)),
    "compressed data beyond": (lambda i: i.put(i.entry(0), q.COMPRESSED | 1 << 60), (1, 1, 0)),
    "L2 table beyond": (lambda i: i.put(i.l1, 1 << 55), (1, 5, 0)),
    "L2 entry, reserved bit": (lambda i: i.put(i.entry(0), i.get(i.entry(0)) | 4), (1, 0, 0)),
    "L2 entry, high reserved bit": (lambda i: i.put(i.entry(60), 1 << 57), (1, 0, 0)),
    "L1 entry, reserved bit": (lambda i: i.put(i.l1, i.get(i.l1) | 1 << 56), (1, 0, 0)),
    "L1 entry gone": (lambda i: i.put(i.l1, 0), (0, 5, 0)),
    "refcount block gone": (lambda i: i.put(i.reftable, 0), (8 + 5, 0, 0)),
    "refcount block beyond": (lambda i: i.put(i.reftable, 1 << 40), (9 + 5, 0, 0)),
    "refcount block far beyond": (lambda i: i.put(i.reftable, 1 << 63), (1, 0, 9)),
    "refcount block, reserved bit": (lambda i: i.put(i.reftable, i.block | 1), (1, 1, 0)),
    "refcount block named twice": (lambda i: i.put(i.reftable + 8, i.block), (2, 0, 0)),
    "refcount block in the L1 table": (lambda i: i.put(i.reftable + 8, i.l1), (2, 0, 0)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_told(name: str) -> None:
    spoil, expected = BROKEN[name]
    image = Image()
    spoil(image)
    assert told(image.check()) == expected


def test_metadata_and_data_in_one_cluster_are_told_even_if_all_counts_agree() -> None:
    image = Image()
    image.put(image.entry(0), image.l2)
    image.put(image.l1, image.l2)
    image.count(image.l2 // image.cs, 2)
    image.count(image.data // image.cs, 0)
    report = image.check()
    assert told(report) == (1, 0, 0)
    assert "L2 table and guest data" in report.findings[0].message


def test_two_guest_clusters_may_share_one_if_it_is_counted() -> None:
    image = Image()
    image.put(image.entry(0), image.data)
    image.put(image.entry(1), image.data)
    image.count(image.data // image.cs, 2)
    image.count(image.data // image.cs + 1, 0)
    assert image.check().clean


def test_a_count_that_cannot_hold_the_references_is_an_error() -> None:
    image = Image(order=0)
    for index in range(4):
        image.put(image.entry(index), image.data | q.COPIED)
    assert told(image.check()) == (3, 3, 0)


@pytest.mark.parametrize("bits", [10, 12])
def test_misaligned_entries_count_in_both_clusters(bits: int) -> None:
    image = Image(bits=bits)
    image.put(image.entry(0), image.get(image.entry(0)) + 512)
    assert told(image.check()) == (2, 0, 0)


def test_compressed_data_counts_in_every_cluster_that_it_touches() -> None:
    image = Image([STORED] * 3, bits=10)
    # From the last sector of the first cluster, through the second, into the third: four sectors of 512 bytes.
    image.put(image.entry(0), q.COMPRESSED | 3 << 60 | image.data + 512)
    image.put(image.entry(1), 0)
    image.put(image.entry(2), 0)
    assert image.check().clean


def test_fragments_are_neighbours_that_do_not_follow_one_another() -> None:
    image = Image([STORED] * 6)
    assert image.check().fragmented_clusters == 0
    first, second = image.get(image.entry(1)), image.get(image.entry(2))
    image.put(image.entry(1), second)
    image.put(image.entry(2), first)
    report = image.check()
    assert report.clean
    assert report.fragmented_clusters == 3


def test_a_snapshot_counts_what_it_holds() -> None:
    image = Image()
    table, l1 = len(image.raw), len(image.raw) + image.cs
    extra = struct.pack(">QQ", 0, image.size)
    image.raw += (struct.pack(">QIHHIIQII", l1, 1, 1, 1, 0, 0, 0, 0, len(extra)) + extra + b"1a").ljust(image.cs, b"\0")
    image.raw += struct.pack(">Q", image.l2).ljust(image.cs, b"\0")
    image.header.nb_snapshots, image.header.snapshots_offset = 1, table
    image.put(image.l1, image.l2)
    for index in range(4):
        image.put(image.entry(index), image.data + index * image.cs)
    for cluster in range(image.l2 // image.cs, image.clusters):
        image.count(cluster, 2)
    image.count(table // image.cs, 1)
    image.count(l1 // image.cs, 1)
    assert image.check().clean
    image.put(table, l1 + 8)
    assert told(image.check()) == (1, 6, 0)
    image.put(table, l1)
    struct.pack_into(">I", image.raw, table + 36, 1 << 31)
    report = image.check()
    assert told(report) == (0, 0, 2), "leaks must not be told where references may be missing"
    assert {finding.kind for finding in report.findings} == {UNREADABLE}


class Walked(References):
    """Notes for each L2 table how often it was walked, what it counts, and how often as an active one."""

    def __init__(self) -> None:
        child = Child(Image().storage(), "file")
        super().__init__(child, Header.read(child))
        self.walked: dict[int, list[tuple[int, int]]] = defaultdict(list)

    def stored_tables(self, offsets: Any) -> Any:
        return np.ones(len(offsets), np.bool_)

    def l2_batches(self, offsets: Any) -> Iterator[Any]:
        yield offsets

    def l2_entries(self, tables: Any, weight: int, looks: int) -> None:
        for offset in tables.tolist():
            self.walked[offset].append((weight, looks))


@given(
    st.lists(st.tuples(st.lists(st.integers(1, 40)), st.integers(1, 3), st.booleans()), max_size=6), st.integers(1, 5)
)
def test_tables_that_several_l1_tables_name_are_walked_once(
    found: list[tuple[list[int], int, bool]], most: int
) -> None:
    wanted = {}
    for number in {number for names, _, _ in found for number in names}:
        times = [(names.count(number), weight, active) for names, weight, active in found]
        counted = sum(count * weight for count, weight, _ in times)
        wanted[number * 512] = [(counted, sum(count * weight for count, weight, active in times if active))]
    walk = Walked()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(references, "_L1_BATCH", most)
        patch.setattr(references, "_FEWEST", 1)
        walk.l2_tables([(np.array(names, np.uint64) * 512, weight, active) for names, weight, active in found])
    assert walk.walked == wanted


def test_many_tables_of_several_l1_tables_take_little_more_memory_than_the_l1_tables() -> None:
    count = 1 << 18
    active = np.arange(count, dtype=np.uint64)[::-1] * np.uint64(512)
    found = [(active, 1, True), (active.copy(), 1, False), (active[: count // 2].copy(), 1, False)]
    walk = Walked()
    walk.l2_entries = lambda *_: None  # type: ignore[method-assign]
    tracemalloc.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(references, "_L1_BATCH", 1 << 13)
            walk.l2_tables(found)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * 8 * count * 2.5


class Failing(MemoryStorage):
    """Storage with one bad byte."""

    bad = -1

    def read_into(self, offset: int, view: memoryview) -> None:
        if offset <= self.bad < offset + len(view):
            raise BlockIOError("a bad sector", operation="read", offset=offset)
        super().read_into(offset, view)


@pytest.mark.parametrize("where", ["l1", "l2", "reftable", "block"])
def test_a_read_that_fails_is_told_and_the_rest_is_checked(where: str) -> None:
    image = Image([STORED] * 100)
    image.put(image.entry(70), image.get(image.entry(70)) | 2)
    storage = image.storage()
    storage.__class__ = Failing
    child = Child(storage, "file")
    header = Header.read(child)
    storage.bad = getattr(image, where)  # type: ignore[attr-defined]
    report = check(child, header)
    assert report.check_errors
    assert report.leaks == 0
    if where != "l1":
        assert any("reserved" in finding.message for finding in report.findings)


def test_every_byte_of_metadata_may_be_anything() -> None:
    """Each byte of every table in turn, turned over: no exception, and never silence where a pointer changed."""
    clean = Image([STORED, STORED, ZERO, PREALLOCATED])
    for at in [
        *range(clean.reftable, clean.reftable + 16),
        *range(clean.l1, clean.l1 + 8),
        *range(clean.l2, clean.l2 + 48),
    ]:
        image = Image([STORED, STORED, ZERO, PREALLOCATED])
        image.raw[at] ^= 0xFF
        assert not image.check().clean, at


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, (1 << 64) - 1)), min_size=1, max_size=30))
def test_random_entries_never_raise_nor_cost_memory(patches: list[tuple[int, int]]) -> None:
    image = Image([STORED] * 60)
    end = image.data // 8 - image.cs // 8
    for at, value in patches:
        image.put(image.cs + at % end * 8, value)
    child = Child(image.storage(), "file")
    header = Header.read(child)
    tracemalloc.start()
    try:
        check(child, header)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_table_that_many_entries_name_is_read_once() -> None:
    image = Image([STORED] * 64)
    # A large L1 table behind everything, all of whose entries name the one L2 table.
    entries = 1 << 17
    image.header.l1_table_offset, image.header.l1_size = len(image.raw), entries
    image.raw += struct.pack(">Q", image.l2) * entries
    report = image.check()
    assert report.allocated_clusters == 64 * entries
    assert report.corruptions > 64
    assert len(report.findings) <= MAX_FINDINGS


def test_a_huge_sparse_file_costs_no_more_than_its_tables() -> None:
    image = Image()
    storage = image.storage()
    storage.read_only = False
    storage.truncate(1 << 50)
    child = Child(storage, "file")
    image.put(image.entry(0), (1 << 50) - image.cs | q.COPIED)
    storage.write(image.l2, memoryview(image.raw)[image.l2 : image.l2 + 8])
    tracemalloc.start()
    try:
        report = check(child, Header.read(child))
        assert tracemalloc.get_traced_memory()[1] < 512 << 20
    finally:
        tracemalloc.stop()
    assert told(report) == (2, 1, 0)
    assert report.image_end_offset == 1 << 50


def test_zero_flag_in_version_2() -> None:
    image = Image(version=2)
    image.put(image.entry(0), image.get(image.entry(0)) | q.ZERO)
    assert told(image.check()) == (1, 0, 0)


def test_what_cannot_be_counted_is_refused() -> None:
    image = Image()
    image.header.incompatible_features = 1 << 40
    with pytest.raises(UnsupportedFeature):
        image.check()


def test_findings_say_what_and_where() -> None:
    image = Image()
    image.count(image.data // image.cs, 0)
    image.count(image.data // image.cs + 1, 5)
    report = image.check()
    assert {finding.kind for finding in report.findings} == {ERROR, LEAK}
    assert all("\n" not in finding.message for finding in report.findings)
    assert {finding.offset for finding in report.findings} == {image.data, image.data + image.cs}
