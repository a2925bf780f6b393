"""When the scan of the reference counts runs, and what it costs: never before it is needed, and once for each time that an
image is open for writing. (`test_refcounts_too_low` has what it finds.)
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina import Budget, CorruptImage
from lamina.formats.qcow2 import driver, refcount_scan
from lamina.formats.qcow2 import layout as q
from lamina.formats.qcow2.refcounts import Refcounts

from .images import KIB, MIB, Victim, sparse
from .test_refcounts_too_low import CLUSTER, SIZE, base
from .test_writers import has_room, watched


def fragmented(path: Path, **options: Any) -> int:
    """An image in whose file every second of 64 clusters is free; its length."""
    lamina.create(path, "qcow2", SIZE, cluster_size=CLUSTER, **options)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        for index in range(64):
            image.write(index * CLUSTER, bytes([index + 1]) * CLUSTER)
        for index in range(0, 64, 2):
            image.discard(index * CLUSTER, CLUSTER)
    assert lamina.check(path, format="qcow2").clean
    return path.stat().st_size


@pytest.mark.parametrize("bits", [1, 2, 8, 16, 32, 64])
def test_free_clusters_of_a_sound_image_are_reused(tmp_path: Path, bits: int) -> None:
    path = tmp_path / "disk.qcow2"
    size = fragmented(path, refcount_bits=bits)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        for index in range(0, 64, 2):
            image.write(index * CLUSTER, bytes([index + 1]) * CLUSTER)
    assert path.stat().st_size == size
    assert lamina.check(path, format="qcow2").clean
    with lamina.open(path, format="qcow2") as image:
        assert image.read(0, 64 * CLUSTER) == b"".join(bytes([index + 1]) * CLUSTER for index in range(64))


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the file, in clusters, at which scans ran."""
    seen: list[int] = []
    run = refcount_scan.RefcountScan.run

    def counted(self: refcount_scan.RefcountScan, counts: Refcounts) -> None:
        if self.below:
            seen.append(self.below)
        run(self, counts)

    monkeypatch.setattr(refcount_scan.RefcountScan, "run", counted)
    return seen


def test_what_needs_no_free_cluster_of_the_file_needs_no_scan(tmp_path: Path, scans: list[int]) -> None:
    path = tmp_path / "disk.qcow2"
    base(path)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(0, b"in place")
        image.write(SIZE // 2, b"new" * (4 * CLUSTER))
        image.flush()
        image.discard(SIZE // 2, CLUSTER)  # a cluster of this session
        image.flush()
        image.flush()
        image.write(SIZE - CLUSTER, b"into it")
    assert not scans
    assert lamina.check(path, format="qcow2").clean


def test_one_scan_for_each_time_that_the_image_is_open(tmp_path: Path, scans: list[int]) -> None:
    path = tmp_path / "disk.qcow2"
    size = fragmented(path)
    scans.clear()
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(SIZE - CLUSTER, b"x")
        image.create_snapshot("s")
        image.write(0, b"y" * (16 * CLUSTER))
        image.discard(0, 16 * CLUSTER)
        image.flush()
        image.delete_snapshot("1")
        image.amend(refcount_bits=8)
        image.truncate(SIZE // 2)
    assert scans == [size // CLUSTER]
    assert lamina.check(path, format="qcow2").clean


def test_a_large_image_is_scanned_when_much_was_written_behind_it(
    tmp_path: Path, scans: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 times the bytes of its one L2 table; then what is free in the file is used."""
    monkeypatch.setattr(refcount_scan, "_SMALL", 0)
    path = tmp_path / "disk.qcow2"
    size = fragmented(path)
    scans.clear()
    with lamina.open(path, format="qcow2", read_only=False) as image:
        for index in range(16):
            assert not scans
            image.write(SIZE // 2 + index * CLUSTER, b"n" * CLUSTER)
        assert path.stat().st_size == size + 16 * CLUSTER
        for index in range(16, 40):
            image.write(SIZE // 2 + index * CLUSTER, b"n" * CLUSTER)
        assert scans == [size // CLUSTER]
    assert path.stat().st_size == size + 16 * CLUSTER
    assert lamina.check(path, format="qcow2").clean


@pytest.mark.parametrize("room", [0, 1, 3])
def test_a_large_image_is_scanned_when_its_file_cannot_grow(
    tmp_path: Path, scans: list[int], monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """A write past the end of the file that fails is the last one, until the free clusters of the file are used."""
    monkeypatch.setattr(refcount_scan, "_SMALL", 0)
    path = tmp_path / "disk.qcow2"
    size = fragmented(path)
    scans.clear()
    image, storage = watched(path, size + room * CLUSTER)
    with image:
        places = range(SIZE // 2, SIZE // 2 + (room + 20) * CLUSTER, CLUSTER)
        written = [has_room(partial(image.write, at, b"n" * CLUSTER)) for at in places]
        image.flush()
        assert scans == [size // CLUSTER]
        assert written.count(False) <= 1
        storage.limit = None
    assert lamina.check(path, format="qcow2").clean


def test_storage_of_fixed_size_is_scanned_at_once(
    tmp_path: Path, scans: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refcount_scan, "_SMALL", 0)
    path = tmp_path / "disk.qcow2"
    fragmented(path)
    scans.clear()
    image, storage = watched(path)
    monkeypatch.setattr(type(storage), "growable", property(lambda self: False))
    with image:
        for index in range(20):
            image.write(SIZE // 2 + index * CLUSTER, b"n" * CLUSTER)
        assert len(scans) == 1
    assert lamina.check(path, format="qcow2").clean


@pytest.mark.parametrize("window", [1, 1536, MIB])
def test_the_counts_of_a_few_blocks_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    """An image of 8 refcount blocks, with snapshots; whichever of its counts is too low is found."""
    monkeypatch.setattr(refcount_scan, "_WINDOW", window)
    path = tmp_path / "disk.qcow2"
    lamina.create(path, "qcow2", SIZE, cluster_size=512)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(0, b"old" * (256 * KIB))
        image.create_snapshot("s")
        image.write(0, b"new" * (64 * KIB))
        image.discard(64 * KIB, 32 * KIB)
        image.flush()
        image.write(MIB, b"more")
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.create_snapshot("t")
    found = Victim(path)
    content = bytes(found.bytes)
    places = {}
    for which in range(64):
        if block := found.entry(found.reftable(which)):
            places.update({256 * which + at: block + 2 * at for at in range(256) if any(content[block + 2 * at :][:2])})
    assert max(places) > 7 * 256
    for cluster in list(places)[:: len(places) // 12]:
        found.bytes[:] = content
        at = places[cluster]
        found.put(at, int.from_bytes(content[at : at + 2], "big") - 1, 2).save()
        with lamina.open(path, format="qcow2", read_only=False) as image:
            with pytest.raises(CorruptImage) as caught:
                image.create_snapshot("new")
            assert caught.value.offset == cluster * 512


def test_an_image_without_counts_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    found = base(path)
    before = found.put(found.reftable(), 0).save().read_bytes()
    with lamina.open(path, format="qcow2", read_only=False) as image, pytest.raises(CorruptImage):
        image.write(SIZE // 2, b"new")
    assert path.read_bytes()[q.HEADER_V3.size :] == before[q.HEADER_V3.size :]


def test_a_file_that_is_long_and_empty_is_not_walked(tmp_path: Path) -> None:
    """The scan takes as long as what the file stores."""
    path = sparse(base(tmp_path / "disk.qcow2", 512).save(), 1 << 43)
    began = time.process_time()
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(SIZE // 2, b"new")
    assert time.process_time() - began < 2


@pytest.mark.parametrize(("memory", "most"), [(MIB, 900 * KIB), (40 * KIB, 40 * KIB), (600, 0)])
def test_the_scan_keeps_to_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int, most: int) -> None:
    """It counts fewer clusters at a time where the budget has not much left, and fails for none; nothing stays booked."""
    path = tmp_path / "disk.qcow2"
    lamina.create(path, "qcow2", SIZE, cluster_size=512)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(0, b"x" * MIB)
        image.discard(0, 64 * KIB)
    monkeypatch.setattr(refcount_scan, "_LEAST", 512)
    booked: list[int] = []
    rebook = driver.rebook

    def watch(node: Any, count: int, what: str) -> None:
        rebook(node, count, what)
        booked.append(count)

    monkeypatch.setattr(driver, "rebook", watch)
    with lamina.open(path, format="qcow2", read_only=False, budget=Budget(memory=memory)) as image:
        kept = image.node.kept_bytes  # type: ignore[attr-defined]
        image.write(SIZE // 2 + MIB // 2, b"x")
        assert max(booked, default=0) <= max(most, kept)
        assert bool(most) == (max(booked, default=0) > kept)
        assert image.node.kept_bytes == kept  # type: ignore[attr-defined]
    assert lamina.check(path, format="qcow2").clean


def test_one_unreadable_table_fails_no_other_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The scan needs all tables. Without it nothing is freed, reused or cut off; writes, flushes and discards go on."""
    path = tmp_path / "disk.qcow2"
    size = fragmented(path)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.truncate(2 * SIZE)
        far = SIZE  # the second L2 table maps it
        image.write(far, b"far" * CLUSTER)
    before = path.read_bytes()
    with lamina.open(path, format="qcow2") as image:
        l1: Any = image.node.tables.mappings.l1  # type: ignore[attr-defined]
        table = l1.l2_offset(1)
    rules = [{"kind": "read", "start": table, "length": CLUSTER}]
    file = {"driver": "faults", "image": {"driver": "file", "filename": str(path)}, "rules": rules}
    with lamina.open({"driver": "qcow2", "file": file}, read_only=False) as image:
        with pytest.raises(lamina.BlockIOError):
            image.read(far, 1)
        for _ in range(3):
            for index in range(1, 20, 2):
                image.discard(index * CLUSTER, CLUSTER)
            image.flush()
            for index in range(20):
                image.write(index * CLUSTER, b"again" * (CLUSTER // 5))
            image.flush()
        assert image.read(0, 5) == b"again"
    assert len([record for record in caplog.records if "not all tables can be read" in record.message]) == 1
    after = path.read_bytes()
    assert len(after) >= len(before) >= size
    found = lamina.check(path, format="qcow2")
    assert found.leaks
    assert not found.corruptions
    with lamina.open(path, format="qcow2") as image:
        assert image.read(far, 3) == b"far"
        expected = b"".join(bytes([index + 1]) * CLUSTER if index % 2 else bytes(CLUSTER) for index in range(20, 64))
        assert image.read(20 * CLUSTER, 44 * CLUSTER) == expected
