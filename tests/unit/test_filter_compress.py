"""The filter `compress`: what is written through it is packed, at any alignment; over what cannot pack it is refused."""

from __future__ import annotations

from typing import Any

import pytest

import lamina
from lamina import Image, UnsupportedFeature
from lamina.filters.compress import Compress
from lamina.filters.offset import Offset
from lamina.formats.qcow2.driver import Qcow2
from lamina.graph import Opener
from lamina.node import COMPRESS, FUA
from lamina.request import Child
from lamina.storage.memory import MemoryStorage
from lamina.testing import FilterConformance
from lamina.testing.disk import DiskConformance
from lamina.testing.formats import KeptMemory

CLUSTER = 4096
SIZE = 40 * CLUSTER + 100


class Packing(KeptMemory):
    """Says that it can pack, and remembers the flags of its writes."""

    supported_flags = FUA | COMPRESS

    @property
    def limits(self) -> Any:
        return super().limits._replace(compress_alignment=4096)

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        self.__dict__.setdefault("flags", []).append(flags)
        super().write(offset, view, flags & FUA)


class TestOverMemory(FilterConformance):
    def make(self, image: Child) -> Compress:
        if type(image.node) is KeptMemory:  # the suite makes it, and cannot know what this filter needs
            image.node.__class__ = Packing
            image.refresh()
        return Compress(image)


class TestOverQcow2(DiskConformance):
    """Random work through it, beside the model."""

    resizes = False
    options: dict[str, Any] = {"cluster_size": CLUSTER}

    def opened(self) -> Compress:
        storage = KeptMemory()
        values = Qcow2.create_schema.parse({**self.options, "size": 300_001})
        Qcow2.create(Child(storage, "file", grows=True), 300_001, values)
        return self.over(storage)

    def over(self, storage: Any, *, read_only: bool = False) -> Compress:
        storage.read_only = read_only
        spec = {"file": Child(storage, "file", grows=True)}
        node = Qcow2.open(Qcow2.schema.parse(spec), Opener(read_only=read_only))
        return Compress(Child(node, "image", grows=True), read_only=read_only)

    def reopened(self, node: Any, *, read_only: bool = False) -> Compress:
        storage = node.image.node.file.node
        node.close()
        again = self.over(storage)
        check: Any = again.image.node
        assert not check.check().corruptions
        again.close()
        return self.over(storage, read_only=read_only)


class TestOverQcow2Zstd(TestOverQcow2):
    options = {"cluster_size": 65536, "compression_type": "zstd"}


def qcow2(**options: Any) -> Qcow2:
    storage = MemoryStorage()
    values = Qcow2.create_schema.parse({"cluster_size": CLUSTER, **options, "size": SIZE})
    Qcow2.create(Child(storage, "file", grows=True), SIZE, values)
    return Qcow2.open({"file": Child(storage, "file", grows=True)}, Opener(read_only=False))


def packed(image: Image) -> list[tuple[int, int]]:
    return [(row.start, row.length) for row in image.extents() if row.compressed]


def test_writes_of_any_alignment_are_packed() -> None:
    image = Image(Compress(Child(qcow2(), "image")))
    assert image.alignment == CLUSTER
    image.write(2 * CLUSTER + 100, b"short")
    image.write(9 * CLUSTER - 5, b"w" * (3 * CLUSTER))
    image.write(SIZE - 50, b"end" * 16)
    assert packed(image) == [(2 * CLUSTER, CLUSTER), (8 * CLUSTER, 4 * CLUSTER), (40 * CLUSTER, 100)]
    assert image.read(2 * CLUSTER, 106) == bytes(100) + b"short\0"
    assert image.read(SIZE - 51, 49) == b"\0" + b"end" * 16
    image.write(2 * CLUSTER + 103, b"RTER")
    assert image.read(2 * CLUSTER + 99, 9) == b"\0shoRTER\0"
    assert len(packed(image)) == 3


def test_what_does_not_shrink_is_stored_as_it_is(seed: int) -> None:
    import random

    noise = random.Random(seed).randbytes(CLUSTER)
    image = Image(Compress(Child(qcow2(), "image")))
    image.write(0, noise + b"calm" * (CLUSTER // 4) + noise)
    assert packed(image) == [(CLUSTER, CLUSTER)]
    assert image.read(0, 3 * CLUSTER) == noise + b"calm" * (CLUSTER // 4) + noise


def test_zeroes_and_discards_stay_what_they_are() -> None:
    image = Image(Compress(Child(qcow2(), "image")))
    image.write(0, b"x" * (4 * CLUSTER))
    image.zero(CLUSTER, CLUSTER)
    image.discard(2 * CLUSTER, CLUSTER)
    assert packed(image) == [(0, CLUSTER), (3 * CLUSTER, CLUSTER)]
    assert image.read(CLUSTER, 2 * CLUSTER) == bytes(2 * CLUSTER)
    assert image.root.reads_zero(CLUSTER, 2 * CLUSTER)


def test_packed_clusters_share_room_that_is_free_again_when_all_are_gone() -> None:
    node = qcow2()
    storage = node.file.node
    image = Image(Compress(Child(node, "image")))
    image.flush()
    before = storage.size
    image.write(0, b"room" * (40 * CLUSTER // 4))
    image.flush()
    grown = storage.size - before
    assert grown <= 3 * CLUSTER, "40 clusters of text, a table, and some packed data"
    for _ in range(50):  # what is given up is used again
        image.write(0, b"room" * (40 * CLUSTER // 4))
        image.flush()
    assert storage.size - before <= 9 * CLUSTER
    image.flush()
    assert not [finding for finding in node.check().findings if finding.kind != "note"]


def test_over_what_cannot_pack_it_is_refused() -> None:
    for node in (MemoryStorage(1 << 20), qcow2(refcount_bits=1)):
        with pytest.raises(UnsupportedFeature, match="qcow2"):
            Compress(Child(node, "image"))
    storage = Packing(1 << 20)
    between = Opener(read_only=False).open({"driver": "cow", "image": Child(storage, "image")})
    with pytest.raises(UnsupportedFeature, match="qcow2"):
        Compress(Child(between, "image"))
    with pytest.raises(UnsupportedFeature, match="qcow2"):  # its blocks are not the image's
        Compress(Child(Offset(Child(storage, "image"), 512), "image"))


def test_it_reaches_the_format_through_other_filters() -> None:
    storage = Packing(1 << 20)
    node: Any = Child(storage, "image")
    for name in ("log", "stats", "offset", "throttle", "nozero"):
        extra = {"log": "/dev/null"} if name == "log" else {"offset": 4096} if name == "offset" else {}
        node = Child(Opener(read_only=False).open({"driver": name, "image": node, **extra}), "image")
    image = Image(Compress(node))
    image.write(5, b"through", fua=True)
    assert storage.flags == [COMPRESS | FUA]
    image.close()


def test_the_flag_is_nothing_to_who_cannot_pack() -> None:
    image = Image(MemoryStorage(1 << 20))
    image.root.write(0, memoryview(b"plain"), COMPRESS)
    assert image.read(0, 5) == b"plain"


def test_a_packed_image_can_be_opened_by_name(tmp_path: Any) -> None:
    path = tmp_path / "disk.qcow2"
    lamina.create(path, "qcow2", size=SIZE)
    spec = {"driver": "compress", "image": {"driver": "qcow2", "file": {"filename": str(path)}}}
    with lamina.open(spec, read_only=False) as image:
        image.write(0, b"x" * 1000)
    with lamina.open(spec) as image:
        assert image.extents(0, 1)[0].compressed
        assert image.read(990, 20) == b"x" * 10 + bytes(10)
