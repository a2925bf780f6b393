"""Compressed clusters, ours and QEMU's: each reads what the other packed, and images stay clean under any work.

`LAMINA_SEED` repeats a run.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.format_node import FormatNode
from lamina.image import Image
from lamina.node import COMPRESS
from lamina.status import COMPRESSED

KIB, MIB = 1024, 1 << 20
GEOMETRIES = [
    {"cluster_size": "512"},
    {"cluster_size": "4k", "compat": "0.10"},
    {"cluster_size": "4k", "refcount_bits": "2"},
    {"cluster_size": "64k"},
    {"cluster_size": "64k", "compression_type": "zstd"},
    {"cluster_size": "2M"},
    {"cluster_size": "2M", "compression_type": "zstd"},
]


def words(options: dict[str, str]) -> str:
    return ",".join(f"{name}={value}" for name, value in options.items())


def content(rng: random.Random, size: int) -> bytearray:
    """Text that shrinks, zeros, and noise that does not, in stretches of any length."""
    phrases = [rng.randbytes(rng.randrange(1, 90)) for _ in range(40)]
    made = bytearray()
    while len(made) < size:
        length = rng.choice([700, 5000, 40_000, 300_000])
        kind = rng.randrange(5)
        if kind == 0:
            made += bytes(length)
        elif kind == 1:
            made += rng.randbytes(length)
        else:
            while length > 0:
                made += (phrase := rng.choice(phrases))
                length -= len(phrase)
    return made[:size]


def packed_clusters(image: Image) -> int:
    node: Any = image.node
    assert isinstance(node, FormatNode)
    size = node.limits.zero_alignment
    return sum(bool(node.map(at, 1).flags & COMPRESSED) for at in range(0, image.size, size))


@pytest.mark.parametrize("options", GEOMETRIES, ids=words)
def test_what_qemu_packs_reads_the_same(qemu: Any, options: dict[str, str], tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    disk = content(rng, 3 * MIB + 512 * rng.randrange(100))
    source, path = tmp_path / "source.raw", tmp_path / "packed.qcow2"
    source.write_bytes(disk)
    qemu.img("convert", "-c", "-O", "qcow2", "-o", words(options), source, path)
    with lamina.open(path, format="qcow2") as image:
        assert packed_clusters(image)
        assert image.read(0, image.size) == disk
        for _ in range(200):
            offset = rng.randrange(len(disk))
            length = min(rng.choice([1, 512, 4096, 70_000]), len(disk) - offset)
            assert image.read(offset, length) == disk[offset : offset + length]
        assert b"".join(image.read(at, min(4096, len(disk) - at)) for at in range(0, len(disk), 4096)) == disk


@pytest.mark.parametrize("options", GEOMETRIES, ids=words)
def test_what_we_pack_qemu_reads(qemu7: Any, qemu10: Any, options: dict[str, str], tmp_path: Path, seed: int) -> None:
    disk = content(random.Random(seed), 3 * MIB + 777 * 512)
    path = tmp_path / "packed.qcow2"
    lamina.create(path, "qcow2", size=len(disk), **options)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        for at in range(0, len(disk), 2 * MIB):
            image.root.write(at, memoryview(disk)[at : at + 2 * MIB], COMPRESS)
        assert packed_clusters(image)
        assert image.read(0, image.size) == disk
    whole(path, disk, [qemu7, qemu10])


def whole(path: Path, disk: bytes | bytearray, peers: list[Any]) -> None:
    """All agree that the image is clean and what it holds."""
    with lamina.open(path, format="qcow2") as image:
        node: Any = image.node
        report = node.check()
        assert not report.findings, report.findings
        assert image.read(0, image.size) == disk
    raw = path.with_suffix(".raw")
    for peer in peers:
        status, said = peer.check(path)
        assert status == 0, f"{peer}: {said}"
        assert said.get("compressed-clusters", 0) == report.compressed_clusters
        peer.img("convert", "-f", "qcow2", "-O", "raw", path, raw)
        assert raw.read_bytes() == disk


@pytest.mark.parametrize("packer", ["qemu", "lamina"])
@pytest.mark.parametrize("options", GEOMETRIES[:5], ids=words)
@pytest.mark.parametrize("round", range(4))
def test_any_work_over_packed_images(
    qemu7: Any, qemu10: Any, options: dict[str, str], packer: str, round: int, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(f"{seed}/{options}/{packer}/{round}")
    disk = content(rng, rng.choice([300 * KIB, 900 * KIB]) + 512 * rng.randrange(9))
    source, path = tmp_path / "source.raw", tmp_path / "packed.qcow2"
    source.write_bytes(disk)
    if packer == "qemu":
        qemu10.img("convert", "-c", "-O", "qcow2", "-o", words(options), source, path)
    else:
        lamina.create(path, "qcow2", size=len(disk), **options)
        with lamina.open(path, format="qcow2", read_only=False) as image:
            image.root.write(0, memoryview(disk), COMPRESS)
    for _ in range(3):
        with lamina.open(path, format="qcow2", read_only=False) as image:
            for _ in range(rng.randrange(25)):
                work(rng, image, disk)
            assert image.read(0, image.size) == disk
        whole(path, disk, [rng.choice([qemu7, qemu10])])


def work(rng: random.Random, image: Image, disk: bytearray) -> None:
    """One operation on the image and on the bytes that it should hold."""
    offset = rng.randrange(len(disk))
    if rng.random() < 0.5:
        offset -= offset % 65536
    length = min(rng.choice([100, 512, 4096, 65536, 140_000]), len(disk) - offset)
    name = rng.choice(["write", "pack", "pack", "zero", "unmap", "discard", "flush", "read"])
    if name == "write":
        disk[offset : offset + length] = data = rng.randbytes(length)
        image.write(offset, data)
    elif name == "pack":
        disk[offset : offset + length] = data = bytes(content(rng, length))
        image.root.write(offset, memoryview(data), COMPRESS)
    elif name in ("zero", "unmap"):
        disk[offset : offset + length] = bytes(length)
        image.zero(offset, length, unmap=name == "unmap")
    elif name == "discard":
        before = bytes(disk[offset : offset + length])
        image.discard(offset, length)
        now = image.read(offset, length)
        assert all(new in (old, 0) for old, new in zip(before, now, strict=True))
        disk[offset : offset + length] = now
    elif name == "flush":
        image.flush()
    else:
        assert image.read(offset, length) == disk[offset : offset + length]
