"""The option round-size-up of raw: a disk of whole blocks over a file that ends inside one, for the personality of QEMU."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import lamina
from lamina.errors import OutOfRange


def opened(path: Path, *, read_only: bool = True) -> lamina.Image:
    spec = {"driver": "raw", "round-size-up": 512, "file": {"driver": "file", "filename": str(path)}}
    return lamina.open(spec, read_only=read_only)


@pytest.mark.parametrize("length", [0, 1, 511, 512, 1000, 1024, 70_001])
def test_the_disk_ends_in_zeros(tmp_path: Path, length: int) -> None:
    content = bytes(range(1, 256)) * (length // 255 + 1)
    path = tmp_path / "disk"
    path.write_bytes(content[:length])
    size = -(-length // 512) * 512
    with opened(path) as image:
        assert image.size == size
        assert image.read(0, size) == content[:length].ljust(size, b"\0")
        assert not image.node.faithful
        rows = list(image.extents()) if size else []
        assert sum(row.length for row in rows) == size
        assert all(row.zero for row in rows if row.start >= length)
        assert not any(row.zero and row.data for row in rows)
        with pytest.raises(OutOfRange):
            image.read(size, 1)
    assert path.stat().st_size == length


def test_a_write_after_the_end_extends_the_file(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"x" * 1000)
    with opened(path, read_only=False) as image:
        image.write(1010, b"yz")
        assert image.read(998, 26) == b"xx" + bytes(10) + b"yz" + bytes(12)
        image.discard(0, 1024)
        image.zero(1000, 24)
        assert image.read(1000, 24) == bytes(24)
        image.truncate(1500)
        assert image.size == 1536


def test_random_requests(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    path = tmp_path / "disk"
    path.write_bytes(b"a" * 3333)
    model = bytearray(b"a" * 3333).ljust(3584, b"\0")
    with opened(path, read_only=False) as image:
        for _ in range(300):
            offset = rng.randrange(len(model))
            length = rng.randrange(1, len(model) - offset + 1)
            if rng.random() < 0.4:
                data = rng.randbytes(length)
                image.write(offset, data)
                model[offset : offset + length] = data
            elif rng.random() < 0.5:
                image.zero(offset, length)
                model[offset : offset + length] = bytes(length)
            assert image.read(offset, length) == model[offset : offset + length]
            known = image.extents(offset, length)
            assert sum(row.length for row in known) == length
            for row in known:
                assert not row.zero or not any(model[row.start : row.start + row.length])
