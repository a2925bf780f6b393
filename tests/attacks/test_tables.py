"""Tables of qcow2 that lie about where things are: rows 29, 48, 49, 51, 52 of the known attacks, and their kin."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

import lamina
from lamina import CorruptImage, FormatError, Image
from lamina.formats.qcow2 import layout as q

from .images import KIB, MIB, U64, Victim, victim
from .oracle import survives

CLUSTER = 4 * KIB


def writing_is_refused(found: Victim, offset: int = 0, match: str | None = None) -> None:
    """A write at `offset` raises CorruptImage and changes no byte but the mark in the header; what is read stays the same.
    From then on the image can only be read."""
    path = found.save()
    before = path.read_bytes()
    read_before = whole(path)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        with pytest.raises(CorruptImage, match=match):
            write_through(image, offset)
        with pytest.raises((CorruptImage, lamina.ReadOnly)):
            write_through(image, offset)
    after = bytearray(path.read_bytes())
    assert after[79] & q.CORRUPT
    after[79] &= ~q.CORRUPT & 0xFF
    assert bytes(after) == before, "something else was written"
    assert whole(path) == read_before
    with pytest.raises(CorruptImage, match="marked corrupt"):
        lamina.open(path, format="qcow2", read_only=False)
    survives(found.save())


def write_through(image: Image, offset: int) -> None:
    image.write(offset, b"\xa5" * 100)
    image.flush()


def whole(path: Path) -> list[bytes | str]:
    """The disk cluster by cluster, with the names of the errors."""
    found: list[bytes | str] = []
    with lamina.open(path, format="qcow2") as image:
        for at in range(0, image.size, CLUSTER):
            try:
                found.append(image.read(at, CLUSTER))
            except FormatError as error:
                found.append(type(error).__name__)
    return found


@pytest.mark.parametrize("entry", [0xBFFFFFFFFFFF0000, q.COPIED | q.OFFSET_MASK & ~(CLUSTER - 1), q.COPIED | 1 << 40])
def test_row_29_cve_2014_0143_l2_entry_far_outside(tmp_path: Path, entry: int) -> None:
    found = victim(tmp_path)
    found.put(found.l2(1), entry)
    with lamina.open(found.save(), format="qcow2") as image:
        assert image.read(CLUSTER, CLUSTER) == bytes(CLUSTER)
    length = found.path.stat().st_size
    writing_is_refused(found, CLUSTER)
    assert found.path.stat().st_size == length, "the file has become as long as the entry says"


def test_row_48_lp_1728615_cluster_0_counted_as_free(tmp_path: Path) -> None:
    found = victim(tmp_path)
    for cluster in range(64):
        found.put(found.refblock(cluster), 0, 2)
    writing_is_refused(found, 16 * CLUSTER)


def test_row_48_lp_1728615_refcount_table_of_zeros(tmp_path: Path) -> None:
    found = victim(tmp_path)
    writing_is_refused(found.put(found.reftable(), 0), 16 * CLUSTER)


@pytest.mark.parametrize("value", [1, 511, U64 & 511])
def test_row_48_refcount_block_at_offset_0_with_reserved_bits(tmp_path: Path, value: int) -> None:
    found = victim(tmp_path)
    writing_is_refused(found.put(found.reftable(), value), 16 * CLUSTER)


@pytest.mark.parametrize("value", [0x2A00, 0x00FFFFFF00000000, U64 & ~511, 1 << 63, 0x1200])
def test_row_49_iotest_060_refcount_block_cannot_be_there(tmp_path: Path, value: int) -> None:
    found = victim(tmp_path)
    writing_is_refused(found.put(found.reftable(), value), 16 * CLUSTER)


@pytest.mark.parametrize("target", ["header", "l1", "l2", "reftable", "refblock"])
def test_row_49_iotest_060_refcount_block_over_another_structure(tmp_path: Path, target: str) -> None:
    """A write of counts would go over what lies there: corruption set 58 (c) of the known attacks."""
    found = victim(tmp_path)
    place = place_of(found, target)
    if target == "refblock":
        found.put(found.reftable(1), place)
    else:
        found.put(found.reftable(), place)
    writing_is_refused(found, 16 * CLUSTER)


def place_of(found: Victim, target: str) -> int:
    return {
        "header": 0,
        "l1": found.l1(),
        "l2": found.l2(),
        "reftable": found.reftable(),
        "refblock": found.entry(found.reftable()),
    }[target]


@pytest.mark.parametrize("target", ["l1", "reftable", "refblock"])
def test_row_49_iotest_060_l2_table_over_another_structure(tmp_path: Path, target: str) -> None:
    found = victim(tmp_path)
    writing_is_refused(found.put(found.l1(), q.COPIED | place_of(found, target)), 16 * CLUSTER)


def test_row_49_two_l1_entries_name_one_l2_table(tmp_path: Path) -> None:
    found = victim(tmp_path, size=8 * MIB)
    found.put(found.l1(1), found.entry(found.l1(0)))
    writing_is_refused(found, 0)
    # Without COPIED the table is shared, which is legal: who writes takes a copy.
    found = victim(tmp_path, size=8 * MIB)
    l2 = found.l2() // CLUSTER
    found.put(found.l1(1), found.entry(found.l1(0)) & ~q.COPIED)
    found.put(found.l1(0), found.entry(found.l1(0)) & ~q.COPIED)
    found.put(found.refblock(l2), 2, 2).save()
    before = found.bytes[found.l2() : found.l2() + CLUSTER]
    with lamina.open(found.path, format="qcow2", read_only=False) as image:
        image.write(16 * CLUSTER, b"mine")
        image.flush()
        assert image.read(16 * CLUSTER, 4) == b"mine"
        assert image.read(2 * MIB + 16 * CLUSTER, 4) == bytes(4)
        assert image.read(2 * MIB, 4) == b"\1" * 4
    assert Victim(found.path).bytes[l2 * CLUSTER : (l2 + 1) * CLUSTER] == before


@pytest.mark.parametrize("target", ["l1", "l2", "reftable", "refblock"])
@pytest.mark.parametrize("flags", [q.COPIED, 0, q.COPIED | q.ZERO])
def test_row_49_iotest_060_data_over_metadata(tmp_path: Path, target: str, flags: int) -> None:
    """What would be overwritten as guest data is metadata: corruption set 58 (b)."""
    found = victim(tmp_path)
    found.put(found.l2(1), flags | place_of(found, target))
    writing_is_refused(found, CLUSTER, match="points to")


@pytest.mark.parametrize("target", ["l1", "l2", "reftable", "refblock"])
@pytest.mark.parametrize("action", ["discard", "zero"])
def test_row_49_iotest_060_discard_of_metadata(tmp_path: Path, target: str, action: str) -> None:
    found = victim(tmp_path)
    path = found.put(found.l2(1), q.COPIED | place_of(found, target)).save()
    before = path.read_bytes()
    with lamina.open(path, format="qcow2", read_only=False) as image:
        drop = image.discard if action == "discard" else partial(image.zero, unmap=True)
        with pytest.raises(CorruptImage):
            drop(CLUSTER, CLUSTER)
    assert path.read_bytes()[80:] == before[80:]
    survives(found.save())


@pytest.mark.parametrize("entry", [q.COPIED | 0x52A00, q.COPIED | 512, 0x800, q.COPIED | q.ZERO | 0x52A00])
def test_row_49_iotest_060_data_cluster_misaligned(tmp_path: Path, entry: int) -> None:
    found = victim(tmp_path)
    found.put(found.l2(1), entry)
    with lamina.open(found.save(), format="qcow2") as image:
        with pytest.raises(CorruptImage, match="multiple of the cluster size"):
            image.read(CLUSTER, 1)
        with pytest.raises(CorruptImage, match="multiple of the cluster size"):
            image.extents()
        assert image.read(0, CLUSTER) == b"\1" * CLUSTER
    writing_is_refused(found, CLUSTER)


@pytest.mark.parametrize("entry", [0x2A00, q.COPIED | 0x2A00, q.COPIED | 512, 1 << 55, q.COPIED | q.OFFSET_MASK])
def test_row_49_iotest_060_l2_table_cannot_be_there(tmp_path: Path, entry: int) -> None:
    found = victim(tmp_path)
    path = found.put(found.l1(), entry).save()
    with lamina.open(path, format="qcow2") as image:
        with pytest.raises(CorruptImage, match="L2 table 0"):
            image.read(0, 1)
        with pytest.raises(CorruptImage, match="L2 table 0"):
            image.extents()
    with lamina.open(path, format="qcow2", read_only=False) as image, pytest.raises(CorruptImage):
        image.write(0, b"x")
    survives(found.save())


def test_row_49_a_count_of_data_that_is_in_use_is_zero(tmp_path: Path) -> None:
    """The second reference to go away finds that the cluster is counted as free: nothing falls below zero."""
    found = victim(tmp_path)
    path = found.put(found.refblock(found.host(1) // CLUSTER), 0, 2).save()
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.discard(CLUSTER, CLUSTER)
        image.flush()  # the reference is gone; its count falls with the next one
        image.write(0, b"x")
        image.discard(2 * CLUSTER, CLUSTER)
        with pytest.raises(CorruptImage, match="counted as free"):
            image.flush()
    survives(found.save())


@pytest.mark.parametrize("bit", [q.CORRUPT, q.DIRTY])
def test_row_49_marked_images_are_read_but_not_written(tmp_path: Path, bit: int) -> None:
    """An image that was not closed is repaired first; one that cannot be is not written either."""
    found = victim(tmp_path)
    if bit == q.DIRTY:
        found.put(found.l2(1), found.entry(found.l2(1)) + 512)  # no count can mend that
    path = found.set(incompatible_features=bit).save()
    before = path.read_bytes()
    with lamina.open(path, format="qcow2") as image:
        assert image.read(0, 1) == b"\1"
    with pytest.raises(CorruptImage):
        lamina.open(path, format="qcow2", read_only=False)
    assert path.read_bytes()[: q.HEADER_V3["l1_size"].offset] == before[: q.HEADER_V3["l1_size"].offset]
    assert lamina.info(path, format="qcow2").dirty == (bit == q.DIRTY)
    survives(path)


def test_row_49_an_image_that_was_not_closed_is_repaired(tmp_path: Path) -> None:
    found = victim(tmp_path).set(incompatible_features=q.DIRTY)
    path = found.put(found.refblock(3), 0, 2).save()
    with lamina.open(path, format="qcow2", read_only=False) as image:
        assert image.read(0, 1) == b"\1"
        image.write(0, b"written")
    assert lamina.check(path, format="qcow2").clean
    assert not lamina.info(path, format="qcow2").dirty


@pytest.mark.parametrize("bit", range(2, 64))
def test_incompatible_features_are_never_ignored(tmp_path: Path, bit: int) -> None:
    path = victim(tmp_path).set(incompatible_features=1 << bit).save()
    with pytest.raises(FormatError):
        lamina.open(path, format="qcow2")


@pytest.mark.parametrize("length", [0, 1, 71, 103, 4095, 4096, 5000, 3 * CLUSTER, 5 * CLUSTER + 1])
def test_truncated_files(tmp_path: Path, length: int) -> None:
    survives(victim(tmp_path).truncate(length).save())
