"""No write reaches a region of the file that something else uses: the nine regions of QEMU's overlap checks
(`overlap-check=all`), and four that these miss: bitmap tables and bits, the encryption header, compressed clusters, and the
state of a machine in a snapshot.

Each test damages one pointer or count, so that a write would hit the region. The write is refused, the image is marked
corrupt on the disk, and no other byte of the file changes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina import CorruptImage, Image
from lamina.formats.qcow2 import layout as q
from lamina.formats.qcow2.driver import EncryptedQcow2
from lamina.formats.qcow2.header import Header
from lamina.graph import Opener
from lamina.request import Child

from .images import KIB, MIB, Victim

CLUSTER = 4 * KIB
#: The L1 table has an entry for each 2 MiB.
SIZE = 4 * MIB
REFERENCE = (
    "header",
    "active L1 table",
    "active L2 table",
    "refcount table",
    "refcount block",
    "snapshot table",
    "inactive L1 table",
    "inactive L2 table",
    "bitmap directory",
)
STRUCTURES = (*REFERENCE, "bitmap table", "bitmap bits", "encryption header")
STORED = ("compressed cluster", "machine state")
#: Of the 11 guest clusters with entries, one that a test may point elsewhere.
GUEST = 9


def image_with_all(folder: Path) -> tuple[Victim, dict[str, int]]:
    """An image, and the offset of a cluster of each region but the encryption header."""
    path = folder / "disk.qcow2"
    lamina.create(path, "qcow2", 2 * SIZE, cluster_size=CLUSTER)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        for index in range(10):
            image.write(index * CLUSTER, bytes([index + 1]) * CLUSTER)
        image.write(10 * CLUSTER, b"compressed" * CLUSTER, compress=True)
        image.write(SIZE, b"state of a machine")
        image.create_snapshot("s")
        image.truncate(SIZE)
        image.add_bitmap("b", 64 * KIB, enabled=False)
        marks = image.bitmaps["b"]
        image.add_bitmap("other", 64 * KIB)
        image.write(0, b"\1")
        image.merge_bitmaps("b", [image.bitmaps["other"]])
        image.remove_bitmap("other")
        assert marks
    found = Victim(path)
    extension = found.bytes.index(q.EXT_BITMAPS.to_bytes(4, "big")) + q.EXTENSION.size
    directory = found.entry(extension + q.BITMAPS["bitmap_directory_offset"].offset)
    snapshots = found.header.snapshots_offset
    inactive = found.entry(snapshots)
    # The snapshot was taken of a disk of the size of today; what lies behind it is the state of the machine.
    found.put(snapshots + q.SNAPSHOT.size + 8, SIZE).put(snapshots + q.SNAPSHOT.size, CLUSTER)
    behind = found.entry(inactive + 8 * (SIZE // (2 * MIB))) & q.OFFSET_MASK
    return found, {
        "header": 0,
        "active L1 table": found.l1(),
        "active L2 table": found.l2(),
        "refcount table": found.reftable(),
        "refcount block": found.refblock(),
        "snapshot table": snapshots,
        "inactive L1 table": inactive,
        "inactive L2 table": found.entry(inactive) & q.OFFSET_MASK,
        "bitmap directory": directory,
        "bitmap table": found.entry(directory),
        "bitmap bits": found.entry(found.entry(directory)),
        "compressed cluster": found.entry(found.l2(10)) & (1 << 58) - 1 & -CLUSTER,
        "machine state": found.entry(behind) & q.OFFSET_MASK,
    }


def encrypted(folder: Path) -> tuple[Victim, dict[str, int]]:
    pytest.importorskip("cryptography")
    path = folder / "disk.qcow2"
    options = {"format": "luks", "key-secret": lamina.Secret(b"secret"), "iter-time": 10}
    lamina.create(path, "qcow2", SIZE, cluster_size=CLUSTER, encrypt=options)
    with opened(path) as image:
        for index in range(10):
            image.write(index * CLUSTER, bytes([index + 1]) * CLUSTER)
    storage = Child(Opener().open({"driver": "file", "filename": str(path)}, storage=True), "file")
    try:
        place = Header.read(storage).encryption_header
    finally:
        storage.close()
    assert place is not None
    return Victim(path), {"encryption header": place[0]}


def victim_with(folder: Path, region: str) -> tuple[Victim, int]:
    """An image with this region, and its offset."""
    found, places = encrypted(folder) if region == "encryption header" else image_with_all(folder)
    lamina_check(found)
    return found, places[region]


def lamina_check(found: Victim) -> None:
    assert lamina.check(found.save(), format="qcow2").clean


def opened(path: Path) -> Image:
    with path.open("rb") as file:
        method = file.read(36)[35]
    spec: dict[str, Any] = {"driver": "qcow2", "file": str(path)}
    if method:
        spec["encrypt"] = {"key-secret": lamina.Secret(b"secret")}
    return lamina.open(spec, read_only=False)


def flushed(image: Image, change: Callable[[Image], None]) -> None:
    change(image)
    image.flush()


def refused(found: Victim, change: Callable[[Image], None]) -> None:
    """`change` is refused, the image is marked corrupt, and nothing else in the file is changed."""
    path = found.save()
    before = bytearray(found.bytes)
    image = opened(path)
    try:
        with pytest.raises(CorruptImage):
            flushed(image, change)
    finally:
        image.close()
    after = Victim(path)
    assert after.header.incompatible_features & q.CORRUPT
    at = q.HEADER_V3["incompatible_features"].offset
    before[at : at + 8] = after.bytes[at : at + 8]
    assert [at for at in range(0, len(before), 512) if before[at : at + 512] != after.bytes[at : at + 512]] == []


def allocate(image: Image) -> None:
    for at in range(MIB, MIB + 64 * CLUSTER, CLUSTER):
        image.write(at, b"new" * 1000)


def write_compressed(image: Image, offset: int) -> None:
    """Uncompressed into an encrypted image, which has no compressed clusters."""
    image.write(offset, b"x" * CLUSTER, compress=not isinstance(image.node, EncryptedQcow2))


def count(found: Victim, place: int, value: int) -> None:
    found.put(found.refblock(place // CLUSTER), value, 2)


@pytest.mark.parametrize("region", STRUCTURES + STORED)
def test_no_cluster_is_allocated_there(tmp_path: Path, region: str) -> None:
    """It is counted as free: for guest data, for an L2 table, for compressed data, for tables of a snapshot."""
    found, place = victim_with(tmp_path, region)
    count(found, place, 0)
    content = bytes(found.bytes)
    for change in (
        allocate,
        lambda image: image.write(2 * MIB + CLUSTER, b"new"),
        lambda image: write_compressed(image, MIB),
        lambda image: image.create_snapshot("new"),
        lambda image: image.amend(refcount_bits=32),
    ):
        found.bytes[:] = content
        refused(found, change)


@pytest.mark.parametrize("region", STRUCTURES)
@pytest.mark.parametrize("copied", [True, False])
def test_no_data_is_written_there(tmp_path: Path, region: str, copied: bool) -> None:
    """An L2 entry points to it. Written in place with COPIED; without, the old cluster would be freed."""
    found, place = victim_with(tmp_path, region)
    found.put(found.l2(GUEST), place | (q.COPIED if copied else 0))
    content = bytes(found.bytes)
    for change in (
        lambda image: image.write(GUEST * CLUSTER, b"x" * CLUSTER),
        lambda image: image.write(GUEST * CLUSTER + 100, b"x"),
        lambda image: write_compressed(image, GUEST * CLUSTER),
        lambda image: image.discard(GUEST * CLUSTER, CLUSTER),
    ):
        found.bytes[:] = content
        if region != "header":  # an entry that says 0 points nowhere
            refused(found, change)


@pytest.mark.parametrize("region", STRUCTURES)
def test_no_l2_table_is_written_there(tmp_path: Path, region: str) -> None:
    """An L1 entry points to it, as the only reference to a table."""
    found, place = victim_with(tmp_path, region)
    found.put(found.l1(1), place | q.COPIED)
    if region != "header":
        refused(found, lambda image: image.zero(2 * MIB, MIB))


@pytest.mark.parametrize("region", STRUCTURES)
def test_no_refcount_block_is_written_there(tmp_path: Path, region: str) -> None:
    """An entry of the refcount table points to it."""
    found, place = victim_with(tmp_path, region)
    found.put(found.reftable(1), place)
    if region != "header":
        refused(found, lambda image: image.write(MIB, b"new"))


@pytest.mark.parametrize("region", STORED)
@pytest.mark.parametrize("by", ["an L2 entry", "an L1 entry", "the refcount table"])
def test_what_lies_over_data_is_noticed_before_it_is_reused(tmp_path: Path, region: str, by: str) -> None:
    """A second use of the cluster, which is counted once: it is not freed, nor is any other cluster."""
    found, place = victim_with(tmp_path, region)
    if by == "an L2 entry":
        found.put(found.l2(GUEST), place | q.COPIED)
    elif by == "an L1 entry":
        found.bytes[place : place + CLUSTER] = bytes(CLUSTER)  # an empty table
        found.put(found.l1(1), place | q.COPIED)
    else:
        found.put(found.reftable(1), place)
    content = bytes(found.bytes)
    for change in (
        lambda image: image.create_snapshot("new"),
        lambda image: image.delete_snapshot("1"),
        lambda image: image.amend(refcount_bits=32),
    ):
        found.bytes[:] = content
        refused(found, change)


def test_a_bitmap_is_not_marked_in_another_structure(tmp_path: Path) -> None:
    """The flag "in use" of a bitmap is written before the first byte of the disk changes."""
    found, places = image_with_all(tmp_path)
    with opened(found.save()) as image:
        image.enable_bitmap("b", True)
    found = Victim(found.path)
    extension = found.bytes.index(q.EXT_BITMAPS.to_bytes(4, "big")) + q.EXTENSION.size
    directory = found.entry(extension + q.BITMAPS["bitmap_directory_offset"].offset)
    found.put(found.reftable(1), directory)
    refused(found, lambda image: image.write(0, b"x"))
    assert places


def test_no_key_slot_is_written_over_another_structure(tmp_path: Path) -> None:
    found, places = encrypted(tmp_path)
    found.put(found.reftable(1), places["encryption header"] + CLUSTER)
    slot = {"state": "active", "new-secret": lamina.Secret(b"more"), "iter-time": 10}
    refused(found, lambda image: image.amend(encrypt=slot))
