"""Images that QEMU preallocates: their clusters lie in holes, or in unwritten parts, of the file, and read as zero. We say so
at least wherever QEMU does, and copy none of it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.extents import Extents
from lamina.jobs.convert import convert_to_file
from lamina.limits import MIB
from lamina.status import DATA, ZERO
from lamina.testing.model import check_status


def zeros_of(rows: list[dict[str, Any]]) -> list[tuple[int, int]]:
    return [(row["start"], row["start"] + row["length"]) for row in rows if row["zero"]]


def says_zero_wherever(image: lamina.Image, rows: list[dict[str, Any]]) -> None:
    """QEMU's zeros are zeros for us, and what it calls stored is stored."""
    found = image.extents()
    for begin, end in zeros_of(rows):
        assert found.clip(begin, end).zero.all(), (
            f"QEMU knows that [{begin}, {end}) is zero: {found.clip(begin, end)!r}"
        )
    for row in rows:
        part = found.clip(row["start"], row["start"] + row["length"])
        assert (part.data == row["data"]).all()
        assert (part.depth == row["depth"]).all()


def found_stored(image: lamina.Image) -> int:
    return image.extents().where(zero=False).totals().length


def written(image: Path, rng: random.Random, size: int) -> bytearray:
    """The image with a few requests done, and what it reads as then."""
    disk = bytearray(size)
    with lamina.open(image, format="qcow2", read_only=False) as opened:
        for _ in range(12):
            offset = rng.randrange(size)
            length = min(rng.choice((1, 512, 4096, 70_000, 300_000)), size - offset)
            if rng.randrange(4):
                data = rng.randbytes(length)
                opened.write(offset, data)
                disk[offset : offset + length] = data
            else:
                opened.zero(offset, length, unmap=bool(rng.randrange(2)))
                disk[offset : offset + length] = bytes(length)
    return disk


@pytest.mark.peers
@pytest.mark.parametrize("how", ["metadata", "falloc"])
@pytest.mark.parametrize("cluster", ["512", "64k", "2M"])
def test_we_know_the_zeros_that_qemu_knows(qemu: Any, tmp_path: Path, seed: int, how: str, cluster: str) -> None:
    rng, path, size = random.Random(f"{seed}/{how}/{cluster}"), tmp_path / "image.qcow2", 3 * MIB + 5 * 512
    qemu.img("create", "-q", "-f", "qcow2", "-o", f"preallocation={how},cluster_size={cluster}", path, str(size))
    with lamina.open(path, format="qcow2") as image:
        found = image.extents()
        assert found.data.all()
        # Tables lie among the clusters, and what the system has read ahead of unwritten parts may count as data.
        assert found.where(zero=True).totals().length >= (size // 2 if how == "metadata" else 1)
        assert (found.offset >= 0).all()
        says_zero_wherever(image, qemu.map(path, "qcow2"))
    disk = written(path, rng, size)
    with lamina.open(path, format="qcow2") as image:
        check_status(image.extents(), 0, bytes(disk))
        says_zero_wherever(image, qemu.map(path, "qcow2"))
        assert convert_to_file(image, tmp_path / "copy", "raw", {}).written <= found_stored(image)
        assert (tmp_path / "copy").read_bytes() == disk
    with lamina.open({"driver": "qcow2", "file": {"driver": "file", "filename": str(path), "holes": False}}) as image:
        found = image.extents()
        past = found.offset >= path.stat().st_size  # that needs no file system
        assert not (found.zero & found.data & ~past).any(), "the file system is not asked"
        check_status(found, 0, bytes(disk))


@pytest.mark.peers
def test_a_large_image_is_copied_without_a_look_at_its_clusters(qemu: Any, tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    qemu.img("create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", path, "100G")
    with lamina.open(path, format="qcow2") as image:
        assert convert_to_file(image, tmp_path / "copy", "qcow2", {})[:3] == (0, 0, 0)
        rounded = image.extents().align(MIB)
        assert rounded.zero.all()
        assert rounded.data.all()


def test_what_a_cache_holds_back_is_in_no_hole(tmp_path: Path) -> None:
    """The filter has bytes that its file does not have yet: it says so, and nobody looks past it."""
    path = tmp_path / "image.qcow2"
    lamina.create(path, "qcow2", MIB)
    cached = {"driver": "cache", "image": {"driver": "file", "filename": str(path)}}
    with lamina.open({"driver": "qcow2", "file": cached}, read_only=False) as image:
        image.write(70_000, b"x" * 70_000)
        found = image.extents()
        assert not found.clip(70_000, 140_000).zero.any()
        assert found.clip(70_000, 140_000).data.all()
        content = image.read(0, image.size)
        assert_zeros(found, content)
        image.flush()
        found = image.extents()
        assert_zeros(found, content)
        assert (found.flags[found.start >= 140_000] & ZERO).all()
        stored = image.extents(70_000, 70_000)
        assert set((stored.flags & (DATA | ZERO)).tolist()) == {DATA}


def assert_zeros(found: Extents, content: bytes) -> None:
    for row in found:
        part = content[row.start : row.end]
        assert not row.zero or part.count(0) == len(part)
