"""Copies of host ranges in a graph: they get round no filter that must see bytes; a format takes them as it takes writes."""

from __future__ import annotations

import errno
import random
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina import registry
from lamina.errors import BlockIOError, NotSupported
from lamina.filters.concat import Concat
from lamina.filters.offset import Offset
from lamina.formats.qcow2.driver import Qcow2
from lamina.formats.raw import Raw
from lamina.graph import Opener
from lamina.image import Image
from lamina.node import NO_FALLBACK, FilterNode, Node, TransformNode
from lamina.request import Child
from lamina.testing.failing import FailingStorage, Session, fail_nth
from tests.unit.copying import BLOCK, DATA, KIB, OLD, SIZE, SOURCE, Copying, content, says


@pytest.fixture
def unshared(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system that cannot share blocks, whatever this one can."""
    monkeypatch.setattr("lamina.storage.system.fcntl.ioctl", says(errno.EOPNOTSUPP))


# -- filters and formats

#: Filters that copies pass, and filters whose reads may be replaced by copies: no others, and none of the latter that does
#: something about reads. Leaving a method alone is what puts a filter in; this is here so that none gets in unseen.
PASS = {"blocksize", "concat", "copy_on_read", "nodiscard", "noextents", "nozero", "offset", "partition", "readonly"}
READ = (PASS - {"copy_on_read"}) | {"compress", "logwrites", "preallocate", "protect"}


def filters() -> list[type[Node]]:
    found = []
    for name in registry.names():
        kind = registry.lookup(name)
        if kind.__module__.startswith("lamina.filters"):
            found.append(kind)
    assert len(found) > 20
    return found


def bare(kind: type[Node], image: Child) -> Any:
    """A filter over `image` without its own state: enough to see what its class says of copies."""
    node = kind.__new__(kind)
    Node.__init__(node)
    node.image = image  # type: ignore[attr-defined]
    node.children["image"] = image
    node._offset = 0  # type: ignore[attr-defined]
    if isinstance(node, Concat):
        node._disks = (image,)
        node.graph_changed()
    return node


def test_which_filters_copies_pass() -> None:
    passes, reads = set(), set()
    for kind in filters():
        storage = Copying(SIZE)
        node = bare(kind, Child(storage, "image"))
        try:
            node.copy_from(0, SOURCE, 0, BLOCK)
            assert storage.seen == [(0, 0, BLOCK, 0)]
            passes.add(kind.driver)
        except NotSupported:
            assert storage.seen == []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Copying, "copyable", True)
            if node.copyable:
                reads.add(kind.driver)
    assert passes == PASS
    assert reads <= READ
    assert reads >= PASS - {"copy_on_read"}


def test_a_filter_is_got_round_by_no_copy() -> None:
    class Looks(FilterNode):
        driver = "looks"

        def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
            self.image.write(offset, view, flags)

    class Counts(FilterNode):
        driver = "counts"

        def read_into(self, offset: int, view: memoryview) -> None:
            self.image.read_into(offset, view)

    class Changes(TransformNode):
        driver = "changes"

    class Shifted(Offset):
        driver = "shifted"

        def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
            super().write(offset, view, flags)

    for kind in (Looks, Changes, Shifted):
        storage = Copying(SIZE)
        with pytest.raises(NotSupported):
            bare(kind, Child(storage, "image")).copy_from(0, SOURCE, 0, BLOCK)
        assert storage.seen == []
    assert not bare(Counts, Child(Copying(SIZE), "image")).copyable


def test_a_window_shifts(pair: Any) -> None:
    source, target = pair
    node = Offset(Child(target, "image"), offset=BLOCK, size=8 * BLOCK)
    assert node.copyable
    node.copy_from(BLOCK, source, 3 * BLOCK, BLOCK)
    disk = Raw(Child(target, "file"), offset=5 * BLOCK, size=8 * BLOCK)
    assert disk.copyable
    disk.copy_from(0, source, 0, BLOCK)
    expected = bytearray(OLD)
    expected[2 * BLOCK : 3 * BLOCK] = DATA[3 * BLOCK : 4 * BLOCK]
    expected[5 * BLOCK : 6 * BLOCK] = DATA[:BLOCK]
    assert content(target) == expected


def over(name: str, options: dict[str, Any], path: Path, *, format: str = "raw", write: bool = False) -> Image:
    disk = {"driver": format, "file": {"driver": "file", "filename": str(path)}}
    return lamina.open({"driver": name, "image": disk, **options}, read_only=not write)


@pytest.mark.parametrize("name", ["blkdebug", "faults"])
def test_a_rule_about_writes_is_not_got_round(tmp_path: Path, pair: Any, name: str) -> None:
    with over(name, rule(name, "write"), Path(pair[1].filename), write=True) as image:
        with pytest.raises(NotSupported):
            image.root.copy_from(0, pair[0], 0, BLOCK)
        with pytest.raises(BlockIOError) as caught:
            image.write(0, DATA[:BLOCK])
        assert caught.value.errno == errno.ENOSPC
    assert content(pair[1]) == OLD


@pytest.mark.parametrize("name", ["blkdebug", "faults"])
def test_who_has_a_rule_about_reads_is_not_copyable(pair: Any, name: str) -> None:
    with over(name, rule(name, "read"), Path(pair[0].filename)) as image:
        assert image.extents().files  # where the bytes lie is told all the same
        assert not image.node.copyable
        with over("nozero", {}, Path(pair[0].filename)) as other:
            assert other.node.copyable
            with other.edit() as edit:
                edit.insert(name, rule(name, "read"), above=other.node.children["image"])
            assert not other.node.copyable  # somewhere below is enough


def rule(name: str, kind: str) -> dict[str, Any]:
    if name == "faults":
        return {"rules": [{"kind": kind, "error": "ENOSPC"}]}
    return {"inject-error": [{"event": "none", "iotype": kind, "errno": errno.ENOSPC}]}


CLUSTER = 4 * KIB


def qcow2(path: Path, size: int, **options: Any) -> Image:
    lamina.create(path, "qcow2", size, cluster_size=CLUSTER, **options)
    return lamina.open(path, format="qcow2", read_only=False)


def test_a_format_takes_whole_clusters_as_it_takes_writes(tmp_path: Path, pair: Any, qemu: Any, seed: int) -> None:
    source, _ = pair
    dice = random.Random(seed)
    path = tmp_path / "disk.qcow2"
    disk = bytearray(40 * CLUSTER)
    with qcow2(path, len(disk)) as image:
        for _ in range(60):
            first = dice.randrange(40)
            length = dice.randint(1, min(40 - first, 16)) * CLUSTER
            at, start = first * CLUSTER, dice.randrange(0, SIZE - length + 1, 512)
            what = dice.choice(["copy", "copy", "write", "zero", "discard"])
            if what == "copy":
                image.root.copy_from(at, source, start, length)
                disk[at : at + length] = DATA[start : start + length]
            elif what == "write":
                at += dice.randrange(CLUSTER)
                part = DATA[start : start + min(length, len(disk) - at)]
                image.write(at, part)
                disk[at : at + len(part)] = part
            elif what == "zero":
                image.zero(at, length, unmap=dice.random() < 0.5)
                disk[at : at + length] = bytes(length)
            else:
                image.discard(at, length)
                disk[at : at + length] = bytes(length)
        assert image.read(0, len(disk)) == disk
    (tmp_path / "disk.raw").write_bytes(disk)
    assert qemu.check(path)[0] == 0
    qemu.img("compare", "-f", "qcow2", "-F", "raw", path, tmp_path / "disk.raw")


def test_a_format_refuses_parts_of_clusters_and_reserves_nothing(tmp_path: Path, pair: Any) -> None:
    path = tmp_path / "disk.qcow2"
    with qcow2(path, 9 * CLUSTER + 512) as image:
        image.flush()
        before = path.stat().st_size
        places = ((1, CLUSTER), (0, CLUSTER - 1), (CLUSTER + 512, CLUSTER), (9 * CLUSTER, 512), (0, 9 * CLUSTER + 512))
        for at, length in places:
            with pytest.raises(NotSupported):
                image.root.copy_from(at, pair[0], 0, length)
        assert not image.extents().data.any()
        assert path.stat().st_size == before


def test_what_the_file_of_a_format_refuses_leaves_no_trace(
    tmp_path: Path, pair: Any, unshared: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "disk.qcow2"
    with qcow2(path, 9 * CLUSTER) as image:
        image.write(CLUSTER, OLD[: 2 * CLUSTER])
        with pytest.raises(NotSupported):
            image.root.copy_from(0, pair[0], 0, 4 * CLUSTER, NO_FALLBACK)
        expected = bytes(CLUSTER) + OLD[: 2 * CLUSTER] + bytes(6 * CLUSTER)
        assert image.read(0, image.size) == expected
    with lamina.open(path, format="qcow2") as image:
        assert image.read(0, image.size) == expected
        assert image.node.check().clean  # type: ignore[attr-defined]


def test_a_format_over_a_file_that_hears_refuses(tmp_path: Path, pair: Any) -> None:
    qcow2(tmp_path / "disk.qcow2", 9 * CLUSTER).close()
    file = {"driver": "blkdebug", "image": {"driver": "file", "filename": str(tmp_path / "disk.qcow2")}}
    with lamina.open({"driver": "qcow2", "file": file}, read_only=False) as image:
        with pytest.raises(NotSupported):
            image.root.copy_from(0, pair[0], 0, CLUSTER)
        assert not image.extents().data.any()


# -- fail the Nth


class ByCopies(Image):
    """Writes as copies from a file, where they can be."""

    copies = 0

    def write(self, offset: int, data: Any, *, fua: bool = False) -> None:
        source = FailingStorage(bytes(data))
        try:
            self.root.copy_from(offset, source, 0, len(data))
            ByCopies.copies += 1
        except NotSupported:
            super().write(offset, data, fua=fua)


def failing_copy(self: Any, offset: int, source: Any, source_offset: int, length: int, flags: int = 0) -> None:
    self.write(offset, memoryview(bytes(source.content[source_offset : source_offset + length])))


@pytest.mark.parametrize("driver", [Raw, Qcow2])
def test_fail_the_nth_request_of_copies(monkeypatch: pytest.MonkeyPatch, driver: Any) -> None:
    monkeypatch.setattr(FailingStorage, "copy_from", failing_copy, raising=False)
    storage = FailingStorage()
    options = {"size": 40 * KIB, **({"cluster_size": 512} if driver is Qcow2 else {})}
    driver.create(Child(storage, "file", grows=True), 40 * KIB, driver.create_schema.parse(options))

    def make(edge: Child, read_only: bool) -> Image:
        return ByCopies(driver.open(driver.schema.parse({"file": edge}), Opener(read_only=read_only)))

    def operation(session: Session) -> None:
        session.write(0, DATA[: 6 * KIB])
        session.write(35 * KIB, DATA[: 5 * KIB])
        session.write(2 * KIB, DATA[8 * KIB : 11 * KIB])
        session.flush()
        session.zero(KIB, KIB)
        session.write(0, OLD[: 4 * KIB])
        session.flush()

    before = ByCopies.copies
    points = fail_nth(make, operation, content=bytes(storage.content), absorbed=("discard",))
    assert points >= (20 if driver is Raw else 60)
    assert ByCopies.copies > before + points
