"""Images with extended L2 entries: the status and the bytes of each subcluster, and the check, as both QEMUs have them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.errors import CorruptImage
from lamina.node import COMPRESS
from tests.conftest import Qemu

from .test_qcow2_check_peers import compare, ours, theirs
from .twins import Geometry, Twins, _rows, draw_operations, joined

KIB = 1024
SIZES = [16 * KIB, 64 * KIB, 2048 * KIB]


def commands(rng: random.Random, size: int, cluster: int, count: int) -> list[str]:
    """Random commands of qemu-io, at the granularity of subclusters and off it."""
    words: list[str] = []
    unit = cluster // 32
    for _ in range(count):
        kind = rng.choices(["write -P", "write -z", "write -z -u", "discard"], [8, 3, 3, 2])[0]
        step = rng.choice([512, unit, unit, cluster])
        offset = rng.randrange(size // step) * step
        length = min(rng.choice([1, 1, 2, 5, 40]) * step, size - offset)
        pattern = f" {rng.randrange(1, 256)}" if "-P" in kind else ""
        words += ["-c", f"{kind}{pattern} {offset} {length}"]
    return words


def compressed(rng: random.Random, size: int, cluster: int) -> list[str]:
    """Commands for a new image. (Where a cluster is not new, QEMU refuses to compress it, and sometimes breaks it.)"""
    chosen = rng.sample(range(size // cluster), size // cluster // 4)
    return [word for at in chosen for word in ("-c", f"write -c -P {rng.randrange(1, 256)} {at * cluster} {cluster}")]


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
        qemu.io("-f", "qcow2", *compressed(rng, length, 32 * KIB), *commands(rng, length, 32 * KIB, 20), base)
        named = ["-b", str(base), "-F", "qcow2"]
    qemu.img("create", "-q", "-f", "qcow2", *named, "-o", f"extended_l2=on,cluster_size={cluster}", path, str(size))
    for _ in range(2):
        qemu.io("-f", "qcow2", *commands(rng, size, cluster, 15), path)
        qemu.img("convert", "-f", "qcow2", "-O", "raw", path, raw)
        with lamina.open(path, format="qcow2") as image:
            disk = raw.read_bytes()
            assert image.read(0, size) == disk
            for _ in range(40):
                offset = rng.randrange(size)
                length = min(rng.choice([1, 512, cluster // 32, cluster]), size - offset)
                assert image.read(offset, length) == disk[offset : offset + length]
            rows = qemu.map(path, "qcow2")
            assert _rows(image) == joined(rows)
            offsets(image, rows)
        report = ours(path.read_bytes())
        assert report.clean, report.findings
        compare(report, theirs(qemu, path, path.read_bytes()))


def offsets(image: lamina.Image, rows: list[dict[str, Any]]) -> None:
    """What QEMU says is stored, or has storage reserved for it, in this layer lies where we say."""
    for row in rows:
        if row["present"] and not row["depth"] and "offset" in row:
            found = image.extents(row["start"], row["length"])
            assert [(one.start - row["start"] + row["offset"]) for one in found] == [one.offset for one in found]


@pytest.mark.peers
def test_ours_and_theirs_change_alike(tmp_path: Path, qemu: Qemu, seed: int) -> None:
    """The same requests make the same map, to the subcluster."""
    for number in range(6):
        rng = random.Random(f"{seed}/{number}")
        cluster = rng.choice([16 * KIB, 16 * KIB, 64 * KIB])
        size = cluster * rng.choice([1, 3, 17]) - 512 * rng.choice([0, 0, 1, 3])
        backing = None
        if number % 2:
            length = rng.choice([size, size // 2 // 512 * 512, size + 3 * cluster, 512])
            backing = (rng.choice(["raw", "qcow2"]), max(length, 512), rng.randrange(1 << 30))
        folder = tmp_path / str(number)
        folder.mkdir()
        geometry = Geometry(cluster, "1.1", rng.choice([1, 16, 64]), size, backing, extended_l2=True)
        twins = Twins(qemu, folder, geometry)
        for _ in range(2):
            twins.run(draw_operations(rng, geometry, 20))
            twins.compare()


@pytest.mark.peers
@pytest.mark.parametrize("cluster", SIZES[:2])
def test_both_write_in_turn(tmp_path: Path, qemu: Qemu, seed: int, cluster: int) -> None:
    """One image, over a backing file, with snapshots of either: clean for both checks, and the same bytes for both."""
    path, base, raw = (tmp_path / name for name in ("image", "base", "raw"))
    rng = random.Random(f"{seed}/{cluster}")
    size = 20 * cluster
    qemu.img("create", "-q", "-f", "qcow2", "-o", f"extended_l2=on,cluster_size={cluster}", base, str(15 * cluster))
    qemu.io("-f", "qcow2", *compressed(rng, 15 * cluster, cluster), *commands(rng, 15 * cluster, cluster, 10), base)
    lamina.create(
        path, "qcow2", size, cluster_size=cluster, extended_l2=True, backing_file=str(base), backing_fmt="qcow2"
    )
    kept: dict[str, bytes] = {}
    for number in range(4):
        with lamina.open(path, format="qcow2", read_only=False) as image:
            disk = bytearray(image.read(0, size))
            for _ in range(12):
                step = rng.choice([512, cluster // 32, cluster // 32, cluster])
                offset = rng.randrange(size // step) * step
                length = min(rng.choice([1, 2, 5, 40]) * step, size - offset)
                kind = rng.choice(["write", "write", "write", "compress", "zero", "unmap", "discard"])
                if kind in ("write", "compress"):
                    disk[offset : offset + length] = data = rng.randbytes(4) * (length // 4)
                    image.root.write(offset, memoryview(data), COMPRESS if kind == "compress" else 0)
                elif kind == "discard":
                    image.discard(offset, length)
                    disk[offset : offset + length] = image.read(offset, length)
                else:
                    image.zero(offset, length, unmap=kind == "unmap")
                    disk[offset : offset + length] = bytes(length)
            assert image.read(0, size) == disk
            if number == 1:
                image.node.create_snapshot("ours")  # type: ignore[attr-defined]
                kept["ours"] = bytes(disk)
        qemu.img("convert", "-f", "qcow2", "-O", "raw", path, raw)
        assert raw.read_bytes() == disk
        whole(qemu, path)
        qemu.io("-f", "qcow2", *commands(rng, size, cluster, 12), path)
        whole(qemu, path)
        if number == 2:
            qemu.img("snapshot", "-c", "theirs", path)
            qemu.img("convert", "-f", "qcow2", "-O", "raw", path, raw)
            kept["theirs"] = raw.read_bytes()
    for name, content in kept.items():
        with lamina.open({"driver": "qcow2", "file": str(path), "snapshot-name": name}) as image:
            assert image.read(0, size) == content
        qemu.img("convert", "-f", "qcow2", "-l", f"snapshot.name={name}", "-O", "raw", path, raw)
        assert raw.read_bytes() == content
    with lamina.open(path, format="qcow2", read_only=False) as image:
        node: Any = image.node
        ids = {one.name: one.id for one in node.snapshots()}
        node.apply_snapshot(ids["ours"])
        assert image.read(0, size) == kept["ours"]
        node.delete_snapshot(ids["theirs"])
        image.write(512, b"x" * 512)
    whole(qemu, path)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        node = image.node
        node.delete_snapshot(ids["ours"])
    whole(qemu, path)
    assert qemu.img("snapshot", "-l", path).stdout == ""


def whole(qemu: Qemu, path: Path) -> None:
    assert qemu.check(path)[0] == 0, qemu.check(path)
    report = ours(path.read_bytes())
    assert report.clean, report.findings


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
