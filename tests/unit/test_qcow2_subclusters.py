"""Writes, zeroes and discards of images with extended L2 entries: what is copied, kept and freed, to the subcluster."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.errors import CorruptImage, NotSupported, OptionError
from lamina.formats.qcow2.driver import Qcow2
from lamina.graph import Opener
from lamina.image import Image
from lamina.node import COMPRESS, MAY_UNMAP, NO_FALLBACK
from lamina.request import Child
from lamina.status import COMPRESSED, DATA, PRESENT, ZERO
from lamina.storage.memory import MemoryStorage

CLUSTER = 16_384
UNIT = CLUSTER // 32
SIZE = 20 * CLUSTER
STORED, ZEROED = DATA | PRESENT, ZERO | PRESENT


class Storage(MemoryStorage):
    """It lists its requests: the offset and the length of each write, and (-1, 0) for a flush."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[int, int]] = []

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        self.log.append((offset, len(view)))
        super().write(offset, view, flags)

    def flush(self) -> None:
        self.log.append((-1, 0))
        super().flush()


@pytest.fixture
def storage() -> Storage:
    made = Storage()
    values = Qcow2.create_schema.parse({"size": SIZE, "cluster_size": CLUSTER, "extended_l2": True})
    Qcow2.create(Child(made, "file", grows=True), SIZE, values)
    return made


@pytest.fixture
def opened(storage: Storage) -> Callable[..., Image]:
    def make(below: bytes | None = None, *, read_only: bool = False) -> Image:
        spec: dict[str, Any] = {"file": Child(storage, "file", grows=True)}
        if below is not None:
            backing = MemoryStorage()
            backing.write(0, memoryview(below))
            spec["backing"] = Child(backing, "backing")
        return Image(Qcow2.open(Qcow2.schema.parse(spec), Opener(read_only=read_only)))

    return make


def units(image: Image, cluster: int) -> list[int]:
    """The flags of the 32 subclusters of a cluster."""
    node: Any = image.node
    return [node.map(cluster * CLUSTER + at * UNIT, UNIT).flags for at in range(32)]


def host(image: Image, cluster: int) -> int:
    node: Any = image.node
    which, index = divmod(cluster, CLUSTER // 16)
    return int(node.tables.mappings.table(which).entries[index]) & (1 << 56) - 512


def allocated(image: Image) -> int:
    """The host clusters that are in use; none is leaked."""
    node: Any = image.node
    image.flush()
    image.flush()  # clusters without a reference are free after the second
    node.settle()
    report = node.check()
    assert report.clean, report.findings
    return int(report.allocated_clusters)


def test_a_write_copies_no_more_than_its_subclusters(opened: Callable[..., Image], storage: Storage) -> None:
    below = random.Random(1).randbytes(SIZE)
    with opened(below) as image:
        storage.log.clear()
        image.write(5 * UNIT + 7, b"x" * UNIT)
        assert (host(image, 0) + 5 * UNIT, 2 * UNIT) in storage.log
        assert units(image, 0) == [STORED if at in (5, 6) else 0 for at in range(32)]
        disk = bytearray(below)
        disk[5 * UNIT + 7 : 6 * UNIT + 7] = b"x" * UNIT
        assert image.read(0, SIZE) == disk


def test_a_write_beside_allocated_subclusters_is_in_place(opened: Callable[..., Image], storage: Storage) -> None:
    with opened(b"b" * SIZE) as image:
        image.write(0, b"x" * UNIT)
        image.flush()
        first = host(image, 0)
        storage.log.clear()
        image.write(3 * UNIT, b"y" * 2 * UNIT)
        image.write(UNIT - 1, b"zz")  # one byte of an allocated subcluster, and one of the next
        assert storage.log == [(first + 3 * UNIT, 2 * UNIT), (first + UNIT - 1, UNIT + 1)]
        assert units(image, 0) == [STORED] * 2 + [0] + [STORED] * 2 + [0] * 27
        storage.log.clear()
        image.flush()
        flush = storage.log.index((-1, 0))
        assert flush == 0, "the data is durable before the entry reaches the disk"
        assert len(storage.log) == 3
        assert allocated(image) == 1
        assert (
            image.read(0, 6 * UNIT) == b"x" * (UNIT - 1) + b"zz" + b"b" * (2 * UNIT - 1) + b"y" * 2 * UNIT + b"b" * UNIT
        )


def test_zeroes_keep_storage_or_free_it(opened: Callable[..., Image]) -> None:
    with opened(b"b" * SIZE) as image:
        image.write(0, b"x" * 4 * UNIT)
        image.zero(UNIT, 2 * UNIT)
        assert units(image, 0)[:5] == [STORED, ZEROED, ZEROED, STORED, 0]
        kept = host(image, 0)
        image.zero(0, 8 * UNIT)
        assert units(image, 0) == [ZEROED] * 8 + [0] * 24
        assert host(image, 0) == kept
        image.write(100, b"y")
        assert host(image, 0) == kept
        assert image.read(0, UNIT) == b"\0" * 100 + b"y" + b"\0" * (UNIT - 101)
        image.zero(0, UNIT, unmap=True)
        assert units(image, 0) == [ZEROED] * 8 + [0] * 24
        assert host(image, 0) == 0
        assert image.read(0, CLUSTER) == b"\0" * 8 * UNIT + b"b" * 24 * UNIT
        assert allocated(image) == 0
        image.zero(3 * CLUSTER + UNIT, UNIT)  # nothing was there
        assert units(image, 3) == [0, ZEROED] + [0] * 30
        assert allocated(image) == 0


def test_a_discard_is_of_whole_clusters(opened: Callable[..., Image]) -> None:
    with opened(b"b" * SIZE) as image:
        image.write(0, b"x" * 3 * CLUSTER)
        image.discard(UNIT, 2 * CLUSTER)
        assert units(image, 0) == [STORED] * 32
        assert units(image, 1) == [ZEROED] * 32
        assert units(image, 2) == [STORED] * 32
        assert allocated(image) == 2


def test_compressed_clusters(opened: Callable[..., Image]) -> None:
    with opened() as image:
        image.root.write(0, memoryview(b"c" * 2 * CLUSTER), COMPRESS)
        assert units(image, 0) == [STORED | COMPRESSED] * 32
        image.write(9 * UNIT, b"x" * UNIT)
        assert units(image, 0) == [STORED] * 32
        assert image.read(0, CLUSTER) == b"c" * 9 * UNIT + b"x" * UNIT + b"c" * 22 * UNIT
        with pytest.raises(NotSupported):
            image.root.zero(CLUSTER + 3 * UNIT, 5 * UNIT, NO_FALLBACK)
        assert units(image, 1) == [STORED | COMPRESSED] * 32
        image.zero(CLUSTER + 3 * UNIT, CLUSTER)
        assert units(image, 1) == [STORED] * 3 + [ZEROED] * 29
        assert units(image, 2) == [ZEROED] * 3 + [0] * 29
        image.root.write(0, memoryview(b"d" * CLUSTER), COMPRESS)
        image.root.zero(CLUSTER - UNIT, UNIT, MAY_UNMAP)
        assert units(image, 0) == [STORED] * 31 + [ZEROED]
        assert image.read(0, 2 * CLUSTER) == b"d" * 31 * UNIT + bytes(UNIT) + b"c" * 3 * UNIT + bytes(29 * UNIT)
        assert allocated(image) == 2


def test_a_shared_cluster_is_copied_as_far_as_it_is_allocated(opened: Callable[..., Image]) -> None:
    with opened(b"b" * SIZE) as image:
        image.write(8 * UNIT, b"x" * UNIT)
        image.write(12 * UNIT, b"y" * UNIT)
        image.zero(20 * UNIT, UNIT)
        node: Any = image.node
        node.create_snapshot("one")
        before = host(image, 0)
        image.write(10 * UNIT + 5, b"z")
        assert host(image, 0) != before
        assert units(image, 0) == [0] * 8 + [STORED] * 5 + [0] * 7 + [ZEROED] + [0] * 11
        assert image.read(8 * UNIT, 5 * UNIT) == (
            b"x" * UNIT + b"b" * UNIT + b"b" * 5 + b"z" + b"b" * (2 * UNIT - 6) + b"y" * UNIT
        )
        assert allocated(image) == 1
        image.zero(0, 9 * UNIT)
        node.apply_snapshot("1")
        assert units(image, 0) == [0] * 8 + [STORED] + [0] * 3 + [STORED] + [0] * 7 + [ZEROED] + [0] * 11
        image.zero(8 * UNIT, UNIT)  # flags of this entry alone: the cluster stays shared
        assert units(image, 0)[8] == ZEROED
        assert host(image, 0) == before
        node.apply_snapshot("1")
        assert image.read(8 * UNIT, UNIT) == b"x" * UNIT
        node.delete_snapshot("1")
        assert allocated(image) == 1


def test_a_new_size_inside_a_cluster(opened: Callable[..., Image]) -> None:
    with opened(b"b" * SIZE) as image:
        image.write(2 * CLUSTER, b"x" * CLUSTER)
        image.truncate(2 * CLUSTER + 3 * UNIT)
        image.truncate(2 * CLUSTER + UNIT)
        image.truncate(3 * CLUSTER)
        assert image.read(2 * CLUSTER, CLUSTER) == b"x" * UNIT + bytes(31 * UNIT)
        image.truncate(UNIT)
        assert allocated(image) == 0
        image.truncate(SIZE)
        assert image.read(0, SIZE) == b"b" * UNIT + bytes(SIZE - UNIT)
        covered = CLUSTER * CLUSTER // 16
        image.truncate(covered + CLUSTER)
        image.write(covered, b"y")
        assert image.node.header.l1_size == 2  # type: ignore[attr-defined]
        assert allocated(image) == 2


@pytest.mark.parametrize(
    "operation", [lambda image: image.write(7 * UNIT, b"y"), lambda image: image.zero(7 * UNIT, UNIT)]
)
@pytest.mark.parametrize("bitmap", [1 | 1 << 32, 1 << 5 | 1 << 37])
def test_an_invalid_bitmap_stops_writes(tmp_path: Path, bitmap: int, operation: Any) -> None:
    path = tmp_path / "image"
    lamina.create(path, "qcow2", SIZE, cluster_size=CLUSTER, extended_l2=True)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(0, b"x" * CLUSTER)
        image.flush()
        at = image.node.tables.mappings.l1.l2_offset(0)  # type: ignore[attr-defined]
    with path.open("r+b") as file:
        file.seek(at + 8)
        file.write(bitmap.to_bytes(8))
    with (
        lamina.open(path, format="qcow2", read_only=False) as image,
        pytest.raises(CorruptImage, match="allocated and zero"),
    ):
        operation(image)
    with pytest.raises(CorruptImage, match="marked corrupt"):
        lamina.open(path, format="qcow2", read_only=False)


@pytest.mark.parametrize(
    ("options", "said"), [({"cluster_size": 8192}, "16384 bytes or more"), ({"compat": "0.10"}, "version 2")]
)
def test_options_that_contradict_each_other(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        lamina.create(tmp_path / "image", "qcow2", 1 << 20, extended_l2=True, **options)
    assert not (tmp_path / "image").exists()
