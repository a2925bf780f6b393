"""Images whose reference counts are too low: something that is in use is counted as free, or twice in use and counted once.

A write that needs a new cluster would take the first, and a discard of one reference would free the second for both. QEMU
does that, and succeeds. Here a scan of all references comes before clusters of the file become free again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import lamina
from lamina import CorruptImage, Image
from lamina.formats.qcow2 import layout as q

from .images import KIB, MIB, Victim

CLUSTER = 4 * KIB
EXTENDED = 16 * KIB
SIZE = 2 * MIB


class Damaged(NamedTuple):
    """An image with a count that is too low."""

    found: Victim
    #: Offset of the cluster.
    place: int
    #: The guest clusters that a change may drop: one that refers to the cluster, and one that has nothing to do with it.
    reference: int
    other: int = 3


def base(path: Path, cluster: int = CLUSTER, **options: Any) -> Victim:
    lamina.create(path, "qcow2", SIZE, cluster_size=cluster, **options)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        for index in range(8):
            image.write(index * cluster, bytes([index + 1]) * cluster)
    return Victim(path)


def snapshot(path: Path, name: str) -> Victim:
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.create_snapshot(name)
    return Victim(path)


def count(found: Victim, place: int, value: int) -> None:
    found.put(found.refblock(place // found.cluster_size), value, 2)


def data(path: Path) -> Damaged:
    found = base(path)
    count(found, found.host(5), 0)
    return Damaged(found, found.host(5), 5)


def last_data(path: Path) -> Damaged:
    """The last cluster of the file, which a change of the size cuts off."""
    found = base(path)
    last = max(range(8), key=found.host)
    count(found, found.host(last), 0)
    return Damaged(found, found.host(last), last)


def extended(path: Path) -> Damaged:
    found = base(path, EXTENDED, extended_l2=True)
    place = found.entry(found.l2() + 5 * 16) & q.OFFSET_MASK
    count(found, place, 0)
    return Damaged(found, place, 5)


def compressed(path: Path) -> Damaged:
    lamina.create(path, "qcow2", SIZE, cluster_size=CLUSTER)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        for index in range(8):
            image.write(index * CLUSTER, bytes([index + 1]) * CLUSTER, compress=True)
        image.write(3 * CLUSTER, b"\4" * CLUSTER)
    found = Victim(path)
    place = found.entry(found.l2(5)) & (1 << 58) - 1 & -CLUSTER
    count(found, place, 0)
    return Damaged(found, place, 5)


def of_snapshot(path: Path) -> Damaged:
    """A cluster to which only the snapshot refers."""
    base(path)
    found = snapshot(path, "s")
    place = found.host(5)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(5 * CLUSTER, b"\x77" * CLUSTER)
    found = Victim(path)
    count(found, place, 0)
    return Damaged(found, place, 4)


def l2_of_snapshot(path: Path) -> Damaged:
    """The L2 table of a snapshot."""
    base(path)
    found = snapshot(path, "s")
    place = found.entry(found.entry(found.header.snapshots_offset)) & q.OFFSET_MASK
    assert place != found.l2()
    count(found, place, 0)
    return Damaged(found, place, 4)


def twice(path: Path) -> Damaged:
    """Two entries with COPIED, and a count of 1."""
    found = base(path)
    found.put(found.l2(6), found.entry(found.l2(5)))
    return Damaged(found, found.host(5), 5)


def shared_with_a_snapshot(path: Path) -> Damaged:
    base(path)
    found = snapshot(path, "s")
    count(found, found.host(5), 1)
    found.put(found.l2(5), found.entry(found.l2(5)) | q.COPIED)
    return Damaged(found, found.host(5), 5)


def l2_of_two_snapshots(path: Path) -> Damaged:
    """A table of two snapshots that counts one: to delete one of them would free the table of the other."""
    base(path)
    for name in "stu":  # the first has a table to itself, whose flags are those of before
        found = snapshot(path, name)
    place = found.l2()
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(5 * CLUSTER, b"\x77" * CLUSTER)
    found = Victim(path)
    count(found, place, 1)
    return Damaged(found, place, 4)


def twice_compressed(path: Path) -> Damaged:
    found = base(path)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(5 * CLUSTER, b"\x66" * CLUSTER, compress=True)
    found = Victim(path)
    found.put(found.l2(6), found.entry(found.l2(5)))
    return Damaged(found, found.entry(found.l2(5)) & (1 << 58) - 1 & -CLUSTER, 5)


def bitmap(path: Path) -> Damaged:
    """The bits of a bitmap."""
    base(path)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.add_bitmap("b", 64 * KIB)
        image.write(5 * CLUSTER, b"\6" * CLUSTER)
    found = Victim(path)
    extension = found.bytes.index(q.EXT_BITMAPS.to_bytes(4, "big")) + q.EXTENSION.size
    directory = found.entry(extension + q.BITMAPS["bitmap_directory_offset"].offset)
    place = found.entry(found.entry(directory))  # of the bits to which the table points
    count(found, place, 0)
    return Damaged(found, place, 5)


FREE = (data, last_data, extended, compressed, of_snapshot, l2_of_snapshot, bitmap)
TWICE = (twice, shared_with_a_snapshot, l2_of_two_snapshots, twice_compressed)


def write(image: Image, one: Damaged) -> None:
    image.write(SIZE // 2, b"new" * (4 * one.found.cluster_size))
    image.flush()


def write_compressed(image: Image, one: Damaged) -> None:
    image.write(SIZE // 2, b"new!" * one.found.cluster_size, compress=True)
    image.flush()


def discard(image: Image, one: Damaged) -> None:
    cluster = one.found.cluster_size
    image.discard(one.reference * cluster, cluster)
    for _ in range(2):  # the storage is discarded behind the first flush, and is free behind the second one
        image.flush()
    write(image, one)


def discard_another(image: Image, one: Damaged) -> None:
    discard(image, one._replace(reference=one.other))


def replace_by_compressed(image: Image, one: Damaged) -> None:
    cluster = one.found.cluster_size
    image.write(one.reference * cluster, b"packed!!" * (cluster // 8), compress=True)
    image.flush()
    discard_another(image, one)


def take_snapshot(image: Image, one: Damaged) -> None:
    image.create_snapshot("new")


def delete_snapshot(image: Image, one: Damaged) -> None:
    if not image.snapshots():
        image.create_snapshot("new")
    image.delete_snapshot(image.snapshots()[-1].id)


def apply_snapshot(image: Image, one: Damaged) -> None:
    if not image.snapshots():
        image.create_snapshot("new")
    image.apply_snapshot(image.snapshots()[-1].id)


def other_width(image: Image, one: Damaged) -> None:
    image.amend(refcount_bits=32)


def shrink(image: Image, one: Damaged) -> None:
    image.truncate(SIZE // 2)


def add_bitmap(image: Image, one: Damaged) -> None:
    image.add_bitmap("new", 64 * KIB)
    image.write(0, b"\1")


#: Whether the change frees a cluster even where none is counted as free.
CHANGES: dict[Callable[[Image, Damaged], None], bool] = {
    write: False,
    write_compressed: False,
    add_bitmap: False,
    discard: True,
    discard_another: True,
    replace_by_compressed: True,
    take_snapshot: True,
    delete_snapshot: True,
    apply_snapshot: True,
    other_width: True,
    shrink: True,
}


def contents(path: Path) -> dict[str, list[bytes]]:
    """All clusters of the disk, and of each snapshot."""
    found: dict[str, list[bytes]] = {}
    with lamina.open(path, format="qcow2") as image:
        names = [one.name for one in image.snapshots()]
    for name in ["", *names]:
        spec: Any = {"driver": "qcow2", "file": str(path)} | ({"snapshot-name": name} if name else {})
        with lamina.open(spec) as image:
            found[name] = [image.read(at, CLUSTER) for at in range(0, image.size, CLUSTER)]
    return found


@pytest.mark.parametrize("change", CHANGES, ids=lambda one: one.__name__)
@pytest.mark.parametrize("damage", FREE + TWICE, ids=lambda one: one.__name__)
def test_nothing_that_is_in_use_is_overwritten(
    tmp_path: Path, damage: Callable[[Path], Damaged], change: Callable[[Image, Damaged], None]
) -> None:
    path = tmp_path / "disk.qcow2"
    one = damage(path)
    one.found.save()
    cluster = one.found.cluster_size
    before, stored = contents(path), bytes(one.found.bytes[one.place : one.place + cluster])
    assert lamina.check(path, format="qcow2").corruptions
    error: CorruptImage | None = None
    image = lamina.open(path, format="qcow2", read_only=False)
    try:
        change(image, one)
        image.close()  # which writes bitmaps
    except CorruptImage as caught:
        error = caught
        image.close()
    if change is shrink:  # cuts off what lies behind the last cluster that is counted
        assert error is not None or damage is not last_data
    elif damage in FREE or CHANGES[change]:
        assert error is not None
    if error is not None:
        assert error.offset == one.place
        with pytest.raises(CorruptImage, match="marked corrupt"):
            lamina.open(path, format="qcow2", read_only=False)
    assert path.read_bytes()[one.place : one.place + cluster] == stored
    after = contents(path)
    touched = {*range(SIZE // 2 // CLUSTER, SIZE // CLUSTER)}
    for index in (one.reference, one.other):
        touched.update(range(index * cluster // CLUSTER, (index + 1) * cluster // CLUSTER))
    for name, clusters in before.items():
        changed = {at for at, was in enumerate(clusters) if at >= len(after[name]) or after[name][at] != was}
        assert changed <= (set() if name else touched)


def test_a_reference_past_the_end_of_the_file_is_not_allocated(tmp_path: Path) -> None:
    """The entry would show, and overwrite, what was written there for another one."""
    path = tmp_path / "disk.qcow2"
    found = base(path)
    end = -(-len(found.bytes) // CLUSTER) * CLUSTER
    count(found, found.host(5), 0)
    found.put(found.l2(5), end | q.COPIED).save()
    with lamina.open(path, format="qcow2", read_only=False) as image:
        with pytest.raises(CorruptImage) as caught:
            image.write(SIZE // 2, b"new" * CLUSTER)
        assert caught.value.offset == end


@pytest.mark.parametrize("first", [0, 1])
def test_refcount_blocks_past_the_end_of_the_file(tmp_path: Path, first: int) -> None:
    """All of them, or all but the first."""
    path = tmp_path / "disk.qcow2"
    found = base(path, 64 * KIB)
    for index in range(first, 1500):
        found.put(found.reftable(index), (1 << 40) + index * 64 * KIB)
    before = found.save().read_bytes()
    with lamina.open(path, format="qcow2", read_only=False) as image, pytest.raises(CorruptImage):
        image.create_snapshot("s")
    assert path.read_bytes()[q.HEADER_V3.size :] == before[q.HEADER_V3.size :]


def test_version_2_cannot_be_marked_and_is_not_written_either(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    found = base(path, compat="0.10")
    place = found.host(5)
    count(found, place, 0)
    before = found.save().read_bytes()
    with lamina.open(path, format="qcow2", read_only=False) as image:
        for _ in range(2):
            with pytest.raises(lamina.LaminaError):
                image.write(SIZE // 2, b"new")
    assert path.read_bytes() == before


def test_repair_mends_them(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    for damage in (data, twice, of_snapshot):
        path.unlink(missing_ok=True)
        one = damage(path)
        one.found.save()
        before = contents(path)
        assert lamina.check(path, format="qcow2", repair="all").clean
        assert contents(path) == before
        with lamina.open(path, format="qcow2", read_only=False) as image:
            discard_another(image, one)
        assert lamina.check(path, format="qcow2").clean


def test_a_repair_writes_over_nothing_that_an_unreadable_table_may_refer_to(tmp_path: Path) -> None:
    """The table of a snapshot cannot be read for now, and clusters to which it alone refers are counted as free."""
    path, cluster = tmp_path / "disk.qcow2", 4096
    lamina.create(path, "qcow2", 1 << 20, cluster_size=cluster)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(0, b"early" * 8192)
        image.create_snapshot("one")
        image.write(0, b"later" * 8192)
    raw = bytearray(path.read_bytes())

    def named_at(at: int) -> int:
        return int.from_bytes(raw[at : at + 8], "big") & q.OFFSET_MASK

    header = q.HEADER_V3.unpack(raw)
    early, now = (named_at(named_at(at)) for at in (header.snapshots_offset, q.HEADER_V3["l1_table_offset"].offset))
    counts = named_at(header.refcount_table_offset)
    for at in (*range(early, early + 8 * 8, 8), now):
        place = counts + 2 * (named_at(at) // cluster)
        raw[place : place + 2] = bytes(2)
    path.write_bytes(raw)
    rules = [{"kind": "read", "start": early, "length": cluster}]
    file = {"driver": "faults", "image": {"driver": "file", "filename": str(path)}, "rules": rules}
    found = lamina.check({"driver": "qcow2", "file": file}, repair="all")
    assert found.check_errors
    assert found.corruptions_fixed
    with lamina.open({"driver": "qcow2", "file": str(path), "snapshot-id": "1"}) as image:
        assert image.read(0, 5 * 8192) == b"early" * 8192
