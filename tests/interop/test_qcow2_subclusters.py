"""Images with extended L2 entries: the status and the bytes of each subcluster, and the check, as both QEMUs have them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.errors import CorruptImage
from tests.conftest import Qemu

from .test_qcow2_check_peers import compare, ours, theirs
from .twins import _joined, _rows

KIB = 1024
SIZES = [16 * KIB, 64 * KIB, 2048 * KIB]


def commands(rng: random.Random, size: int, cluster: int, count: int) -> list[str]:
    """Random commands of qemu-io, at the granularity of subclusters and off it."""
    words: list[str] = []
    unit = cluster // 32
    for _ in range(count):
        kind = rng.choices(["write -P", "write -z", "write -z -u", "discard", "write -c -P"], [8, 3, 3, 2, 2])[0]
        step = cluster if "-c" in kind else rng.choice([512, unit, unit, cluster])
        offset = rng.randrange(size // step) * step
        length = min(rng.choice([1, 1, 2, 5, 40]) * step, size - offset)
        if "-c" in kind:
            offset, length = offset - offset % cluster, cluster
            if offset + length > size:
                continue
        pattern = f" {rng.randrange(1, 256)}" if "-P" in kind else ""
        words += ["-c", f"{kind}{pattern} {offset} {length}"]
    return words


@pytest.mark.peers
@pytest.mark.parametrize("backing", [0, 1, 3])
@pytest.mark.parametrize("cluster", SIZES)
def test_images_of_the_peers_are_read(tmp_path: Path, qemu: Qemu, seed: int, cluster: int, backing: int) -> None:
    path, base, raw = (tmp_path / name for name in ("image", "base", "raw"))
    rng = random.Random(f"{seed}/{cluster}/{backing}")
    size = cluster * 20 + 1024
    named: list[str] = []
    if backing:
        length = size * backing // 2 // 512 * 512
        qemu.img("create", "-q", "-f", "qcow2", "-o", "extended_l2=on,cluster_size=32k", base, str(length))
        qemu.io("-f", "qcow2", *commands(rng, length, 32 * KIB, 20), base, check=False)
        named = ["-b", str(base), "-F", "qcow2"]
    qemu.img("create", "-q", "-f", "qcow2", *named, "-o", f"extended_l2=on,cluster_size={cluster}", path, str(size))
    for _ in range(3):
        # Writes of compressed data over data fail.
        qemu.io("-f", "qcow2", *commands(rng, size, cluster, 15), path, check=False)
        qemu.img("convert", "-f", "qcow2", "-O", "raw", path, raw)
        with lamina.open(path, format="qcow2") as image:
            disk = raw.read_bytes()
            assert image.read(0, size) == disk
            for _ in range(40):
                offset = rng.randrange(size)
                length = min(rng.choice([1, 512, cluster // 32, cluster]), size - offset)
                assert image.read(offset, length) == disk[offset : offset + length]
            rows = qemu.map(path, "qcow2")
            assert _rows(image) == _joined(rows)
            offsets(image, rows)
        report = ours(path.read_bytes())
        compare(report, theirs(qemu, path, path.read_bytes()))  # their compressed writes do not always leave it clean


def offsets(image: lamina.Image, rows: list[dict[str, Any]]) -> None:
    """What QEMU says is stored, or has storage reserved for it, in this layer lies where we say."""
    for row in rows:
        if row["present"] and not row["depth"] and "offset" in row:
            found = image.extents(row["start"], row["length"])
            assert [(one.start - row["start"] + row["offset"]) for one in found] == [one.offset for one in found]


@pytest.mark.peers
@pytest.mark.parametrize(
    ("what", "bitmap", "readable"),
    [
        ("data", 1 | 1 << 32, False),
        ("data", 1 << 31 | 1 << 63, False),
        ("data", 0xFFFF_FFFF, True),
        ("data", 0, True),
        ("data", 0xFFFF_FFFF << 32, True),
        ("zero flag", 0xFFFF_FFFF, True),
        ("nothing", 1, False),
        ("nothing", 1 | 1 << 32, False),
        ("nothing", 1 << 32, True),
        ("compressed", 1, True),
        ("compressed", 1 << 63, True),
    ],
)
def test_invalid_entries(tmp_path: Path, qemu: Qemu, what: str, bitmap: int, readable: bool) -> None:
    path = tmp_path / "image"
    qemu.img("create", "-q", "-f", "qcow2", "-o", "extended_l2=on,cluster_size=16k", path, "1M")
    qemu.io("-f", "qcow2", "-c", f"write {'-c ' if what == 'compressed' else ''}-P 5 0 16k", path)
    raw = bytearray(path.read_bytes())
    with lamina.open(path, format="qcow2") as image:
        at: int = image.node.tables.mappings.l1.l2_offset(0)  # type: ignore[attr-defined]
    entry = {"nothing": 0, "zero flag": int.from_bytes(raw[at : at + 8]) | 1}.get(what)
    if entry is not None:
        raw[at : at + 8] = entry.to_bytes(8)
    raw[at + 8 : at + 16] = bitmap.to_bytes(8)
    peer = theirs(qemu, path, bytes(raw))
    mine = ours(bytes(raw))
    assert mine.corruptions == peer.get("corruptions", 0)
    if (
        what == "compressed"
    ):  # QEMU counts no references of such an entry, and would free them; we report the bitmap alone
        assert (mine.corruptions, mine.leaks, peer["leaks"]) == (1, 0, 1)
    else:
        compare(mine, peer)
    with lamina.open(path, format="qcow2") as image:
        if readable:
            there = qemu.io("-r", "-f", "qcow2", "-c", "read -P 5 0 16k", path, check=False).returncode == 0
            assert (image.read(0, 16 * KIB) == b"\5" * 16 * KIB) == there
            image.extents()
            return
        assert qemu.io("-r", "-f", "qcow2", "-c", "read 0 16k", path, check=False).returncode
        with pytest.raises(CorruptImage, match="subcluster"):
            image.read(0, 16 * KIB)
        with pytest.raises(CorruptImage, match="subcluster"):
            image.extents()
