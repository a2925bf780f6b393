"""Row 58 of the known attacks: the corruption that writers of qcow2 brought upon themselves in 2026.

(a) state shared between queues, (b) the first cluster overwritten by data, (c) counts written over an L2 table, (d) a late
discard of a cluster that was given out again, (e) an L1 entry published before its count, and then the disk is full.
"""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina import BlockIOError
from lamina.formats.qcow2 import layout as q
from lamina.formats.qcow2.driver import Qcow2
from lamina.graph import Opener
from lamina.image import Image
from lamina.node import FilterNode
from lamina.request import Child

from .images import KIB, MIB, Victim, victim

CLUSTER = 4 * KIB


class Watched(FilterNode):
    """Storage with a limited size, that keeps a log of what reaches it."""

    driver = "watched"
    supported_flags = 0

    def __init__(self, image: Child, limit: int | None = None) -> None:
        super().__init__(image)
        self.limit = limit
        self.log: list[tuple[str, int, int]] = []
        self.mutex = threading.Lock()

    def _room(self, end: int) -> None:
        if self.limit is not None and end > max(self.limit, self.size):
            raise BlockIOError("no space is left", errno=errno.ENOSPC, path=self.filename)

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        self._room(offset + len(view))
        with self.mutex:
            self.log.append(("write", offset, len(view)))
        super().write(offset, view, flags)

    def discard(self, offset: int, length: int) -> None:
        with self.mutex:
            self.log.append(("discard", offset, length))
        super().discard(offset, length)

    def flush(self) -> None:
        super().flush()
        with self.mutex:
            self.log.append(("flush", 0, 0))


def watched(path: Path, limit: int | None = None) -> tuple[Image, Watched]:
    """The image at `path`, opened for writing over storage that is watched."""
    opener = Opener(read_only=False)
    below = Child(opener.open({"driver": "file", "filename": str(path)}, storage=True), "image", grows=True)
    storage = Watched(below, limit)
    options: dict[str, Any] = {"file": Child(storage, "file", grows=True)}
    return Image(Qcow2.open(options, opener)), storage


def sound(path: Path) -> None:
    """No error and no leak."""
    with lamina.open(path, format="qcow2") as image:
        report = image.node.check()  # type: ignore[attr-defined]
        assert report.clean, report.findings[:5]


def no_errors(path: Path) -> None:
    with lamina.open(path, format="qcow2") as image:
        report = image.node.check()  # type: ignore[attr-defined]
        assert not report.corruptions, report.findings[:5]
        assert not report.check_errors


def fresh(folder: Path, size: int = 4 * MIB, cluster: int = CLUSTER, **options: Any) -> Path:
    path = folder / "disk.qcow2"
    lamina.create(path, "qcow2", size, cluster_size=cluster, **options)
    return path


@pytest.mark.parametrize("cluster", [512, CLUSTER])
def test_row_58a_concurrent_write_discard_flush(tmp_path: Path, seed: int, cluster: int) -> None:
    """Eight threads, each with stretches of its own that share clusters and tables with the others'."""
    threads, piece = 8, 700  # not a multiple of a sector: neighbours meet inside clusters
    path = fresh(tmp_path, cluster=cluster)
    models = [{} for _ in range(threads)]  # type: list[dict[int, int]]
    errors: list[BaseException] = []

    def work(image: Image, me: int) -> None:
        rng = random.Random(seed * 100 + me)
        try:
            for _ in range(120):
                slot = rng.randrange(40)
                at = (slot * threads + me) * piece
                action = rng.randrange(10)
                if action < 6:
                    models[me][slot] = value = rng.randrange(1, 256)
                    image.write(at, bytes([value]) * piece)
                elif action < 8:
                    models[me][slot] = 0
                    image.zero(at, piece, unmap=action == 6)
                elif action == 8:
                    assert image.read(at, piece) == bytes([models[me].get(slot, 0)]) * piece
                else:
                    image.flush()
                if action == 7:
                    image.discard(3 * MIB + rng.randrange(64) * cluster, 8 * cluster)
        except BaseException as error:  # noqa: BLE001 - shown by the test
            errors.append(error)

    with lamina.open(path, format="qcow2", read_only=False) as image:
        running = [threading.Thread(target=work, args=(image, me)) for me in range(threads)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join(120)
        assert not errors, errors
    sound(path)
    with lamina.open(path, format="qcow2") as image:
        for me, model in enumerate(models):
            for slot, value in model.items():
                assert image.read((slot * threads + me) * piece, piece) == bytes([value]) * piece


def test_row_58a_concurrent_allocation_of_one_cluster(tmp_path: Path) -> None:
    """Many threads write parts of the same new clusters at the same moment: one cluster each stays, and no part is lost."""
    path = fresh(tmp_path, cluster=64 * KIB)
    start = threading.Barrier(8)
    with lamina.open(path, format="qcow2", read_only=False) as image:

        def work(me: int) -> None:
            start.wait()
            for index in range(10):
                image.write(index * 64 * KIB + me * 8 * KIB, bytes([me + 1]) * (8 * KIB))

        running = [threading.Thread(target=work, args=(me,)) for me in range(8)]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join(60)
        expected = b"".join(bytes([me + 1]) * (8 * KIB) for me in range(8))
        assert image.read(0, 640 * KIB) == expected * 10
    sound(path)
    assert path.stat().st_size <= 16 * 64 * KIB


def test_row_58b_the_first_cluster_is_never_data(tmp_path: Path, seed: int) -> None:
    """Only fields of the header are ever written there."""
    path = fresh(tmp_path)
    rng = random.Random(seed)
    image, storage = watched(path)
    with image:
        storage.log.clear()
        for _ in range(300):
            at = rng.randrange(image.size - 3 * CLUSTER)
            rng.choice((image.zero, image.discard, lambda at, n: image.write(at, b"\xdd" * n)))(at, rng.randrange(9000))
            if rng.random() < 0.1:
                image.flush()
    assert all(at >= q.HEADER_V3["l1_size"].offset for kind, at, _ in storage.log if kind == "write")
    assert all(at + length <= 112 or at >= CLUSTER for kind, at, length in storage.log if kind != "flush")
    sound(path)


def test_row_58c_counts_never_lie_over_an_l2_table(tmp_path: Path) -> None:
    """So many clusters that blocks, tables and L2 tables take turns in being allocated; then each is where it was."""
    path = fresh(tmp_path, size=16 * MIB, cluster=512)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        for at in range(0, image.size, 32 * KIB):
            image.write(at, at.to_bytes(8, "big") * 64)
            if at % MIB == 0:
                image.flush()
        for at in range(0, image.size, 32 * KIB):
            assert image.read(at, 8) == at.to_bytes(8, "big")
    sound(path)


def test_row_58d_a_late_discard_never_hits_a_reused_cluster(tmp_path: Path, seed: int) -> None:
    """Between the discard of a host cluster and the next write to it lies a flush, always; and what is read is right."""
    path = fresh(tmp_path, size=MIB)
    rng = random.Random(seed)
    image, storage = watched(path)
    model = bytearray(MIB)
    with image:
        for step in range(1500):
            at = rng.randrange(MIB // CLUSTER) * CLUSTER
            action = rng.randrange(10)
            if action < 5:
                data = bytes([step % 255 + 1]) * CLUSTER
                image.write(at, data)
                model[at : at + CLUSTER] = data
            elif action < 9:
                image.discard(at, CLUSTER)
                model[at : at + CLUSTER] = bytes(CLUSTER)
            else:
                image.flush()
        assert image.read(0, MIB) == model
    pending: set[int] = set()
    discards = reused = 0
    ever: set[int] = set()
    for kind, offset, length in storage.log:
        clusters = range(offset // CLUSTER, (offset + length - 1) // CLUSTER + 1) if length else range(0)
        if kind == "discard":
            discards += 1
            pending.update(clusters)
            ever.update(clusters)
        elif kind == "flush":
            pending.clear()
        else:
            assert pending.isdisjoint(clusters), "written before the discard was flushed"
            reused += not ever.isdisjoint(clusters)
    assert discards
    assert reused, "clusters that were given back are used again"
    sound(path)
    with lamina.open(path, format="qcow2") as image:
        assert image.read(0, MIB) == model


def test_row_58d_a_cluster_that_is_still_referenced_is_not_discarded(tmp_path: Path) -> None:
    """Two clusters of the disk share one of the file (count 2, no COPIED). One goes; the other keeps its bytes."""
    found = victim(tmp_path)
    host = found.host(1)
    found.put(found.l2(1), host).put(found.l2(9), host).put(found.refblock(host // CLUSTER), 2, 2).save()
    sound(found.path)
    with lamina.open(found.path, format="qcow2", read_only=False) as image:
        image.discard(CLUSTER, CLUSTER)
        image.flush()
        image.flush()
        assert image.read(9 * CLUSTER, CLUSTER) == b"\2" * CLUSTER
        assert image.read(CLUSTER, CLUSTER) == bytes(CLUSTER)
    assert Victim(found.path).bytes[host : host + CLUSTER] == b"\2" * CLUSTER


@pytest.mark.parametrize("cluster", [512, CLUSTER])
@pytest.mark.parametrize("room", [0, 1, 2, 3, 5, 17, 40])
def test_row_58e_disk_full_at_any_moment(tmp_path: Path, cluster: int, room: int) -> None:
    """The storage ends after `room` more clusters. What was flushed stays, nothing points to what was never counted, and when
    there is room again, all goes on."""
    path = fresh(tmp_path, size=16 * MIB, cluster=cluster)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(0, b"\x11" * (3 * cluster))
    image, storage = watched(path, path.stat().st_size + room * cluster)
    kept: dict[int, int] = {}
    failures = 0
    at = MIB
    for step in range(60):
        if has_room(lambda: image.write(at, bytes([step + 1]) * cluster)):  # noqa: B023 - called now
            kept[at] = step + 1
        else:
            failures += 1
        at += 37 * cluster
        if step % 7 == 0:
            failures += not has_room(image.flush)
        no_errors_beside(path)
    assert failures
    for place, value in kept.items():
        assert image.read(place, cluster) == bytes([value]) * cluster
    storage.limit = None
    image.write(at, b"\xfe" * cluster)
    image.close()
    sound(path)
    with lamina.open(path, format="qcow2") as image:
        assert image.read(0, 3 * cluster) == b"\x11" * (3 * cluster)
        for place, value in kept.items():
            assert image.read(place, cluster) == bytes([value]) * cluster
        assert image.read(at, cluster) == b"\xfe" * cluster


def has_room(action: Callable[[], None]) -> bool:
    """Whether `action` is done; if not, for lack of room and nothing else."""
    try:
        action()
    except BlockIOError as error:
        if error.errno != errno.ENOSPC:
            raise
        return False
    return True


def no_errors_beside(path: Path) -> None:
    """As `no_errors`, of the file as it is now, beside the writer: as if the power were cut here."""
    with lamina.open(path, format="qcow2", force_share=True) as image:
        report = image.node.check()  # type: ignore[attr-defined]
        assert not report.corruptions, report.findings[:5]


def test_row_58e_disk_full_when_it_is_closed(tmp_path: Path) -> None:
    """The error is told, and what was on disk before is whole."""
    path = fresh(tmp_path)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(0, b"\x11" * CLUSTER)
    size = path.stat().st_size
    image, storage = watched(path, size + 8 * CLUSTER)
    image.write(3 * MIB, b"\x22" * CLUSTER)
    storage.limit = 0
    storage.write = _full  # type: ignore[method-assign]
    with pytest.raises(BlockIOError):
        image.close()
    no_errors(path)
    with lamina.open(path, format="qcow2") as image:
        assert image.read(0, CLUSTER) == b"\x11" * CLUSTER
        assert image.read(3 * MIB, CLUSTER) == bytes(CLUSTER)


def _full(offset: int, view: memoryview, flags: int = 0) -> None:
    raise BlockIOError("no space is left", errno=errno.ENOSPC)


@pytest.mark.parametrize("cluster", [512, CLUSTER])
def test_row_58e_nothing_is_published_before_it_is_counted(tmp_path: Path, cluster: int) -> None:
    """After every single request that reaches the file, the image on disk has no error: at worst it leaks."""
    path = fresh(tmp_path, cluster=cluster)
    image, storage = watched(path)
    seen = 0
    real = storage.write

    def write(offset: int, view: memoryview, flags: int = 0) -> None:
        nonlocal seen
        real(offset, view, flags)
        seen += 1
        no_errors_beside(path)

    storage.write = write  # type: ignore[method-assign]
    with image:
        for index in range(12):
            image.write(index * 300 * KIB, bytes([index + 1]) * (2 * cluster))
            if index % 3 == 0:
                image.flush()
            if index % 4 == 3:
                image.discard((index - 1) * 300 * KIB, 2 * cluster)
    assert seen > 20
    sound(path)
