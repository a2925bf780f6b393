"""An L1 table that is not inside the file: it reads as zeros, as QEMU reads it, and takes no memory. Nothing is written."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

import lamina
from lamina.formats.qcow2 import layout as q
from tests.conftest import Qemu

CLUSTER = 65536


def moved(path: Path, offset: int, entries: int = 0) -> None:
    """Make the header of the image point to an L1 table at `offset`."""
    with path.open("r+b") as file:
        file.seek(q.HEADER_V2["l1_table_offset"].offset)
        file.write(offset.to_bytes(8, "big"))
        if entries:
            file.seek(q.HEADER_V2["l1_size"].offset)
            file.write(entries.to_bytes(4, "big"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "disk.qcow2"
    lamina.create(made, "qcow2", 1 << 20)
    with lamina.open(made, format="qcow2", read_only=False) as image:
        image.write(0, b"data")
    return made


@pytest.mark.peers
@pytest.mark.parametrize("beyond", [0, 1 << 20, 1 << 40])
def test_it_reads_as_zeros(path: Path, qemu: Qemu, beyond: int) -> None:
    end = -(-path.stat().st_size // CLUSTER) * CLUSTER
    moved(path, end + beyond)
    before = path.read_bytes()
    with lamina.open(path, format="qcow2") as image:
        assert image.read(0, image.size) == bytes(image.size)
        assert [(one.length, one.zero, one.present) for one in image.extents()] == [(1 << 20, True, False)]
    qemu.io("-r", "-f", "qcow2", "-c", "read -P 0 0 1M", path)
    for writable in (
        lambda: lamina.open(path, format="qcow2", read_only=False),
        lambda: lamina.check(path, repair="all"),
    ):
        with pytest.raises(lamina.CorruptImage, match="L1 table of 8 bytes is not inside the file"):
            writable()
    with lamina.open(path, format="qcow2") as image, pytest.raises(lamina.CorruptImage, match="not inside"):
        image.reopen(read_only=False)
    assert path.read_bytes() == before
    assert lamina.check(path, format="qcow2").corruptions


def test_the_part_inside_the_file_counts(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    lamina.create(path, "qcow2", 1 << 30, cluster_size=512)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(0, b"data")
    with path.open("r+b") as file:  # the table again, at the end, without its last clusters
        header = file.read(512)
        size = int.from_bytes(header[36:40], "big") * 8
        file.seek(int.from_bytes(header[40:48], "big"))
        table = file.read(size)
        file.seek(0, 2)
        end = -(-file.tell() // 512) * 512
        file.seek(end)
        file.write(table[:1024])
    moved(path, end)
    with lamina.open(path, format="qcow2") as image:
        assert image.read(0, 5) == b"data\0"
        assert image.read(image.size - 5, 5) == bytes(5)


def test_the_largest_table_takes_no_memory(path: Path) -> None:
    moved(path, 1 << 40, q.MAX_L1_BYTES // 8)
    tracemalloc.start()
    try:
        with lamina.open(path, format="qcow2", budget=lamina.Budget(memory=24 << 20)) as image:
            assert image.read(0, 512) == bytes(512)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
