"""`compact`: the disk, its snapshots and bitmaps stay, and nothing that is not needed is stored any more."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lamina
from lamina.errors import Cancelled, CorruptImage, LaminaError, ReadOnly, UnsupportedFeature
from lamina.formats.qcow2.trim_node import _free_runs
from lamina.image import Image
from lamina.jobs import in_place
from lamina.jobs.compact import compact
from lamina.jobs.progress import Monitor
from lamina.storage.memory import MemoryStorage
from tests.random_changes import change

KIB, MIB = 1 << 10, 1 << 20


def states(path: Path, image: Image) -> list[bytes]:
    """The disk, and that of each snapshot."""
    found = [image.read(0, image.size)]
    for snapshot in image.snapshots():
        spec = {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}, "snapshot-id": snapshot.id}
        with lamina.open(spec, force_share=True) as then:
            found.append(then.read(0, then.size))
    return found


def stored_zeros(image: Image) -> list[int]:
    """The offsets of the clusters that this layer stores, or has storage for, although all their bytes are zero."""
    cluster = max(image.node.serialise, 512)
    return [
        at
        for at in range(0, image.size, cluster)
        if any(
            row.depth == 0 and row.present and (row.data or row.file is not None)
            for row in image.extents(at, min(cluster, image.size - at))
        )
        and all(row.depth == 0 for row in image.extents(at, min(cluster, image.size - at)))
        and not any(image.read(at, min(cluster, image.size - at)))
    ]


@settings(max_examples=30)
@given(st.integers(0, 1 << 60), st.sampled_from([None, 1, 3]))
def test_the_disk_stays_and_zeros_go(tmp_path_factory: pytest.TempPathFactory, seed: int, parallel: int | None) -> None:
    dice, folder = random.Random(seed), tmp_path_factory.mktemp("compact")
    path = folder / "disk"
    size = dice.choice([64, 100, 300, 1000]) * KIB + dice.choice([0, 0, 512])
    options: dict[str, Any] = {"cluster_size": dice.choice([512, 4 * KIB, 64 * KIB])}
    if dice.random() < 0.3:
        options = {"extended_l2": True, "cluster_size": 64 * KIB}
    elif dice.random() < 0.2:
        options["compat"] = "0.10"
    if dice.random() < 0.2:
        options["preallocation"] = dice.choice(["metadata", "full"])
    elif dice.random() < 0.5:
        lamina.create(folder / "base", "raw", dice.choice([size, size // 2, size + 5000]))
        (folder / "base").write_bytes(dice.randbytes(1) * (folder / "base").stat().st_size)
        options |= {"backing_file": "base", "backing_fmt": "raw"}
    lamina.create(path, "qcow2", size, **options)
    with pytest.MonkeyPatch.context() as patch, lamina.open(path, format="qcow2", read_only=False) as image:
        patch.setattr(in_place, "PART", 64 * KIB)
        change(image, dice, dice.randrange(10))
        if dice.random() < 0.4:
            image.create_snapshot("then")
            change(image, dice, dice.randrange(6))
        if options.get("compat") is None:
            image.add_bitmap("b", 512)
        before = states(path, image)
        done = compact(image, parallel=parallel)
        assert states(path, image) == before
        assert image.node.check().clean  # type: ignore[attr-defined]
        assert done.length[1] <= done.length[0]
        if options.get("compat") is None:
            assert list(image.bitmaps["b"].dirty(0, image.size)) == []
        if not image.snapshots() and not (options.get("compat") and "backing_file" in options):
            assert not stored_zeros(image)
        assert compact(image).zeroed == 0 or image.snapshots() or options.get("compat")
    with lamina.open(path, format="qcow2") as image:
        assert states(path, image) == before


@given(st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 2000)), max_size=30), st.sampled_from([1, 16, 512]))
def test_parts_cover_the_ranges_and_do_not_overlap(gaps: list[tuple[int, int]], block: int) -> None:
    """Two threads must never have parts of one cluster."""
    ranges, at = [], 0
    for gap, length in gaps:
        ranges.append((at + gap, length))
        at += gap + length
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_place, "PART", 1024)
        found = list(in_place.parts(ranges, block, at))
    assert all(start % block == 0 and (stop % block == 0 or stop == at) for start, stop in found)
    assert all(0 < stop - start <= 1024 for start, stop in found)
    assert all(first.stop <= second.start for first, second in pairwise(found))
    blocks = {number // block for start, length in ranges for number in range(start, start + length)}
    assert {number // block for start, stop in found for number in range(start, stop)} == blocks


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """8 MiB: 1 MiB of data, 2 MiB of stored zeros, 1 MiB of data that was discarded without a hole, 1 MiB of data, and
    64 KiB of leaks."""
    path = tmp_path / "disk"
    lamina.create(path, "qcow2", 8 * MIB)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(0, b"a" * MIB)
        image.write(MIB, bytes(2 * MIB))
        image.write(3 * MIB, b"b" * MIB)
        image.write(4 * MIB, b"c" * MIB)
        image.write(6 * MIB, b"d" * 64 * KIB)
    ignores = {"driver": "file", "filename": str(path), "discard": "ignore"}
    with lamina.open({"driver": "qcow2", "file": ignores}, read_only=False) as image:
        image.discard(3 * MIB, MIB)
        image.flush()
        node: Any = image.node
        row = image.extents(6 * MIB, 64 * KIB)[0]
        entry = node.tables.mappings.table(0).offset + 8 * (6 * MIB // (64 * KIB))
        assert row.offset is not None
    with path.open("r+b") as file:
        file.seek(entry)
        file.write(bytes(8))
    return path


def test_everything_that_is_not_needed_goes(disk: Path) -> None:
    before = disk.stat()
    with lamina.open(disk, format="qcow2", read_only=False) as image:
        content = image.read(0, image.size)
        done = compact(image)
        assert done.leaks == 1
        assert done.zeroed == 2 * MIB
        assert done.given_back >= 3 * MIB
        assert image.read(0, image.size) == content
    after = disk.stat()
    assert (before.st_size, after.st_size) == done.length
    assert (before.st_blocks - after.st_blocks) * 512 >= 3 * MIB
    assert after.st_blocks * 512 <= 2 * MIB + MIB // 2
    assert lamina.check(disk, format="qcow2").leaks == 0


def test_the_file_ends_behind_its_last_cluster(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    lamina.create(path, "qcow2", 8 * MIB)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(0, b"a" * MIB)
        image.write(MIB, bytes(4 * MIB))
    with path.open("ab") as file:
        file.write(b"rest" * MIB)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        done = compact(image)
        assert done.length[0] >= 9 * MIB
        assert done.length[1] <= MIB + 6 * 64 * KIB
        assert image.read(0, MIB) == b"a" * MIB


@pytest.mark.parametrize("preallocation", ["metadata", "full"])
def test_of_preallocation_nothing_stays(tmp_path: Path, preallocation: str) -> None:
    """The tables lie between the clusters that they map, up to the end of the file."""
    path = tmp_path / "disk"
    lamina.create(path, "qcow2", 40 * MIB, cluster_size=4096, preallocation=preallocation)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(0, b"a" * 8192)
        done = compact(image)
        assert done.length[0] > 40 * MIB
        assert done.length[1] < 100 * KIB
        assert image.read(0, image.size) == b"a" * 8192 + bytes(40 * MIB - 8192)
        image.write(30 * MIB, b"b")
        assert image.node.check().clean  # type: ignore[attr-defined]


def test_a_raw_disk_gets_holes(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"a" * MIB + bytes(2 * MIB) + b"b" * 5000 + bytes(100_000))
    content, before = path.read_bytes(), path.stat()
    with lamina.open(path, format="raw", read_only=False) as image:
        done = compact(image)
    assert path.read_bytes() == content
    assert done.leaks == 0
    assert done.length == (len(content), len(content))
    assert done.given_back == (before.st_blocks - path.stat().st_blocks) * 512 >= 2 * MIB


def test_of_a_raw_disk_holes_are_not_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(1 << 43)
        file.seek(1 << 42)
        file.write(b"x" + bytes(9999))
    with lamina.open(path, format="raw", read_only=False) as image:
        assert compact(image).zeroed <= 12288


def test_clusters_that_a_snapshot_uses_stay(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    lamina.create(path, "qcow2", 8 * MIB)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(0, bytes(2 * MIB))
        image.create_snapshot("then")
        image.write(MIB, bytes(MIB))
        before, length = states(path, image), path.stat().st_size
        done = compact(image)
        assert done.zeroed == MIB
        assert states(path, image) == before
        assert path.stat().st_size <= length


def test_version_2_over_a_backing_file_keeps_its_zeros(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "base").write_bytes(b"b" * MIB)
    path = tmp_path / "disk"
    lamina.create(path, "qcow2", MIB, backing_file="base", backing_fmt="raw", compat="0.10")
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(0, bytes(64 * KIB))
        assert compact(image).zeroed == 0
        assert image.read(0, MIB) == bytes(64 * KIB) + b"b" * (MIB - 64 * KIB)
    assert "version 2" in caplog.text


def test_a_damaged_image_is_left_alone(disk: Path) -> None:
    with lamina.open(disk, format="qcow2") as image:
        node: Any = image.node
        table = node.tables.mappings.table(0).offset
    with disk.open("r+b") as file:  # two clusters of the disk in one of the file, and one behind the end
        file.seek(table)
        entry = file.read(8)
        file.seek(table + 8)
        file.write(entry)
    before = disk.read_bytes()
    with lamina.open(disk, format="qcow2", read_only=False) as image, pytest.raises(CorruptImage, match="damaged"):
        compact(image)
    assert disk.read_bytes() == before


def test_what_cannot_be_compacted(disk: Path) -> None:
    with lamina.open(disk, format="qcow2") as image, pytest.raises(ReadOnly):
        compact(image)
    with Image(MemoryStorage(512)) as image, pytest.raises(UnsupportedFeature):
        compact(image)


def test_after_a_failure_the_disk_is_as_before(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_place, "PART", 64 * KIB)
    spec = {"driver": "qcow2", "file": {"driver": "faults", "image": {"driver": "file", "filename": str(disk)}}}
    failed = set()
    for kind in "read", "write", "flush", "discard", "truncate":
        with lamina.open(spec, read_only=False) as image:
            content = image.read(0, image.size)
            faults: Any = image.node.children["file"].node
            faults.add(kind=kind, after=1)
            try:
                compact(image)
            except LaminaError:
                failed.add(kind)
            faults.clear()
            assert image.read(0, image.size) == content
            monitor = Monitor()
            monitor.cancel()
            with pytest.raises(Cancelled):
                compact(image, monitor=monitor)
            assert image.read(0, image.size) == content
    with lamina.open(disk, format="qcow2", read_only=False) as image:
        done = compact(image)
        assert isinstance(done, lamina.CompactResult)
        assert image.read(0, image.size) == content
        assert not stored_zeros(image)
    assert lamina.check(disk, format="qcow2").corruptions == 0
    assert failed == {"read", "write", "flush", "discard"}  # nothing is cut off here


@pytest.mark.parametrize("bits", [1, 8, 16, 64])
def test_free_runs_are_those_between_counts(bits: int, seed: int) -> None:
    """Over several blocks, some of which are missing."""
    per_block = 4096 // bits
    dice = random.Random(seed)
    counts = np.zeros(6 * per_block, np.uint64)
    for _ in range(10):
        at = dice.randrange(len(counts))
        counts[at : at + dice.choice([1, 5, per_block])] = 1
    counts[2 * per_block : 4 * per_block] = 0
    columns = counts.reshape(6, per_block)
    stand_in: Any = SimpleNamespace(
        table=[1] * 6,
        per_block=per_block,
        column=lambda which: columns[which],
        has_block=lambda which: columns[which].any(),
    )
    for clusters in (0, 1, per_block // 2, per_block, 3 * per_block + 7, 6 * per_block, 9 * per_block):
        found = list(_free_runs(stand_in, clusters))
        free = np.append(counts, np.zeros(3 * per_block, np.uint64))[:clusters] == 0
        assert [number for first, last in found for number in range(first, last)] == np.flatnonzero(free).tolist()
        assert all(last < first for (_, last), (first, _) in pairwise(found))
        assert all(first < last <= clusters for first, last in found)


def test_an_encrypted_disk(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    secret = lamina.Secret(b"word")
    options = {"encrypt": {"format": "luks", "key-secret": secret, "iter-time": 10}}
    lamina.create(path, "qcow2", 2 * MIB, **options)
    spec = {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}, "encrypt": {"key-secret": secret}}
    with lamina.open(spec, read_only=False) as image:
        image.write(0, b"s" * 64 * KIB + bytes(MIB))
        assert compact(image).zeroed == MIB
        assert image.read(0, 2 * MIB) == b"s" * 64 * KIB + bytes(2 * MIB - 64 * KIB)
