"""Data and L2 tables move from the end of a qcow2 file into free space before it, and the file becomes shorter."""

from __future__ import annotations

import errno
import random
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.errors import BlockIOError, LaminaError
from lamina.formats.qcow2 import packing
from lamina.image import Image
from lamina.jobs.compact import compact
from lamina.jobs.progress import Monitor
from lamina.limits import KIB, MIB


def scattered(image: Image, size: int, cluster: int, seed: int) -> bytes:
    """Fill the disk, and free every second cluster of its first half."""
    dice = random.Random(seed)
    image.write(0, dice.randbytes(size))
    for at in range(0, size // 2, 2 * cluster):
        image.discard(at, cluster)
    image.flush()
    return image.read(0, size)


@pytest.mark.parametrize(
    "options",
    [
        {"cluster_size": 512},
        {"cluster_size": 4096, "compat": "0.10"},
        {"cluster_size": 64 * KIB},
        {"cluster_size": 64 * KIB, "extended_l2": True},
        {"cluster_size": 4096, "refcount_bits": 1},
    ],
    ids=lambda options: ",".join(map(str, options.values())),
)
def test_the_file_has_no_free_space_before_its_end(
    tmp_path: Path, options: dict[str, Any], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "STEP", 100 * KIB)  # several steps
    path, cluster = tmp_path / "disk", options["cluster_size"]
    size = 64 * cluster if cluster > 4096 else 512 * cluster
    lamina.create(path, "qcow2", size, **options)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        content = scattered(image, size, cluster, seed)
        before = path.stat().st_size
        done = compact(image)
        assert image.read(0, size) == content
    assert done.length == (before, path.stat().st_size)
    assert before - path.stat().st_size >= size // 4 - 4 * cluster
    report = lamina.check(path, format="qcow2")
    assert (report.corruptions, report.leaks) == (0, 0)
    with lamina.open(path, format="qcow2") as image:
        counts: Any = image.node.tables.refcounts  # type: ignore[attr-defined]
        free = [number for number in range(counts.last_used()) if not counts.get(number)]
        assert len(free) <= 6  # where refcount blocks, and their table, were
        assert image.read(0, size) == content


def test_nothing_moves_where_the_end_cannot(tmp_path: Path) -> None:
    """The file would be as long as before."""
    path = tmp_path / "disk"
    lamina.create(path, "qcow2", 8 * MIB)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(0, b"d" * 4 * MIB)
        image.write(4 * MIB, b"s" * MIB)
        image.create_snapshot("then")
        image.write(4 * MIB, b"n" * MIB)
        image.create_snapshot("last")
        image.discard(0, 2 * MIB)
        image.delete_snapshot(image.snapshots()[0].id)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        where = [row.offset for row in image.node.extents(0, image.size)]  # type: ignore[attr-defined]
        compact(image)
        assert [row.offset for row in image.node.extents(0, image.size)] == where  # type: ignore[attr-defined]


def test_encrypted_data_stays_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    secret = lamina.Secret(b"word")
    options = {"encrypt": {"format": "luks", "key-secret": secret, "iter-time": 10}}
    lamina.create(path, "qcow2", 2 * MIB, **options)
    spec = {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}, "encrypt": {"key-secret": secret}}
    with lamina.open(spec, read_only=False) as image:
        content = scattered(image, 2 * MIB, 64 * KIB, 1)
        compact(image)
        assert image.read(0, 2 * MIB) == content
    with lamina.open(spec) as image:
        assert image.read(0, 2 * MIB) == content


def test_compressed_data_stays(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    lamina.create(path, "qcow2", 4 * MIB)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(0, b"d" * 2 * MIB)
        image.write(2 * MIB, b"compressed" * 6553 + b"123456", compress=True)
        image.discard(0, MIB)
        content = image.read(0, 4 * MIB)
        compact(image)
        assert image.read(0, 4 * MIB) == content
    assert lamina.check(path, format="qcow2").corruptions == 0


def faulty(path: Path) -> dict[str, Any]:
    return {"driver": "qcow2", "file": {"driver": "faults", "image": {"driver": "file", "filename": str(path)}}}


def test_a_full_file_system_keeps_it_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "disk"
    lamina.create(path, "qcow2", 4 * MIB)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        content = scattered(image, 4 * MIB, 64 * KIB, 2)

        def full(*_: object) -> None:
            raise BlockIOError("no space", errno=errno.ENOSPC)

        monkeypatch.setattr(packing.Packing, "_copy", full)
        compact(image)
        assert "the file system is full" in caplog.text
        assert image.read(0, 4 * MIB) == content
    report = lamina.check(path, format="qcow2")
    assert (report.corruptions, report.leaks) == (0, 0)


@pytest.mark.parametrize("kind", ["write", "read", "flush"])
def test_after_each_failure_the_disk_is_as_before(tmp_path: Path, kind: str) -> None:
    """The N-th request of the file fails, for every N until none does."""
    start = tmp_path / "start"
    lamina.create(start, "qcow2", 256 * KIB, cluster_size=4096)
    with lamina.open(start, format="qcow2", read_only=False) as image:
        content = scattered(image, 256 * KIB, 4096, 3)
    for number in range(400):
        path = tmp_path / "disk"
        path.write_bytes(start.read_bytes())
        with lamina.open(faulty(path), read_only=False) as image:
            faults: Any = image.node.children["file"].node
            faults.add(kind=kind, after=number, times=1)
            try:
                list(image.node.pack())  # type: ignore[attr-defined]
            except LaminaError:
                failed = True
            else:
                failed = False
            faults.clear()
            assert image.read(0, image.size) == content
        report = lamina.check(path, format="qcow2")
        assert report.corruptions == 0
        if not failed:
            break
    assert not failed
    assert number > 3


def test_it_can_be_cancelled_between_two_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "STEP", 64 * KIB)
    path = tmp_path / "disk"
    lamina.create(path, "qcow2", 4 * MIB)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        content = scattered(image, 4 * MIB, 64 * KIB, 4)
        monitor, steps = Monitor(), 0
        real = packing.Packing.step

        def step(self: packing.Packing) -> int:
            nonlocal steps
            steps += 1
            monitor.cancel()
            return real(self)

        monkeypatch.setattr(packing.Packing, "step", step)
        with pytest.raises(lamina.Cancelled):
            compact(image, monitor=monitor)
        assert steps == 1
        assert image.read(0, 4 * MIB) == content
        monkeypatch.setattr(packing.Packing, "step", real)
        compact(image)
        assert image.read(0, 4 * MIB) == content
    assert lamina.check(path, format="qcow2").corruptions == 0
