"""Images with internal snapshots made by QEMU: listed, each read, written beside them, and still whole for QEMU."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

import lamina
from tests.conftest import Qemu

SIZE = 3 << 20


class Disk:
    """An image with a model of the disk and of each snapshot."""

    def __init__(self, path: Path, rng: random.Random, cluster: int) -> None:
        self.path, self.rng, self.cluster = path, rng, cluster
        self.now = bytearray(SIZE)
        self.kept: dict[str, bytes] = {}

    def write(self, count: int) -> None:
        rng = self.rng
        with lamina.open(self.path, format="qcow2", read_only=False) as image:
            for _ in range(count):
                offset = rng.randrange(SIZE)
                length = min(rng.choice((1, 512, self.cluster, 100_000)), SIZE - offset)
                kind = rng.randrange(8)
                if kind == 0:
                    offset -= offset % self.cluster
                    length = min(4 * self.cluster, SIZE - offset)
                    image.discard(offset, length)
                    data = image.read(offset, length)
                elif kind < 3:
                    data = bytes(length)
                    image.zero(offset, length, unmap=kind == 1)
                else:
                    data = rng.randbytes(length)
                    image.write(offset, data)
                self.now[offset : offset + length] = data
            assert image.read(0, SIZE) == self.now

    def judge(self, qemu: Qemu, raw: Path) -> None:
        """Both checks find nothing wrong, and both programs read every snapshot as it was."""
        qemu.img("check", self.path)
        assert lamina.check(self.path, format="qcow2").clean
        for name, disk in self.kept.items():
            with lamina.open({"driver": "qcow2", "file": str(self.path), "snapshot-name": name}) as image:
                assert image.read(0, image.size) == disk
            qemu.img("convert", "-f", "qcow2", "-l", f"snapshot.name={name}", "-O", "raw", self.path, raw)
            assert raw.read_bytes() == disk
        with lamina.open(self.path, format="qcow2") as image:
            assert image.read(0, SIZE) == self.now


@pytest.mark.peers
@pytest.mark.parametrize(("compat", "cluster"), [("1.1", 512), ("1.1", 4096), ("0.10", 512), ("1.1", 65_536)])
def test_writes_beside_snapshots(tmp_path: Path, qemu: Qemu, compat: str, cluster: int) -> None:
    path, raw = tmp_path / "disk.qcow2", tmp_path / "disk.raw"
    qemu.img("create", "-f", "qcow2", "-o", f"compat={compat},cluster_size={cluster}", path, str(SIZE))
    disk = Disk(path, random.Random(f"{compat}{cluster}"), cluster)
    for number in range(3):
        disk.write(25)
        qemu.img("snapshot", "-c", f"s{number}", path)
        disk.kept[f"s{number}"] = bytes(disk.now)
    disk.write(50)
    disk.judge(qemu, raw)
    told = json.loads(qemu.img("info", "--output=json", "-f", "qcow2", path).stdout)["snapshots"]
    found = lamina.info(path, format="qcow2").to_json()["snapshots"]
    assert [one.pop("disk-size") for one in found] == [SIZE] * 3
    assert found == told
    with lamina.open(path, format="qcow2") as image:
        snapshots = image.node.snapshots()  # type: ignore[attr-defined]
        assert [(one.id, one.name) for one in snapshots] == [("1", "s0"), ("2", "s1"), ("3", "s2")]
    qemu.img("snapshot", "-d", "s1", path)
    del disk.kept["s1"]
    qemu.img("snapshot", "-a", "s0", path)
    disk.now[:] = disk.kept["s0"]
    disk.write(25)
    disk.judge(qemu, raw)


@pytest.mark.peers
def test_the_size_of_each_snapshot(tmp_path: Path, qemu: Qemu) -> None:
    path = tmp_path / "disk.qcow2"
    qemu.img("create", "-f", "qcow2", "-o", "cluster_size=512", path, "1M")
    qemu.io("-f", "qcow2", "-c", "write -P 1 0 1M", path)
    qemu.img("snapshot", "-c", "small", path)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.truncate(40 << 20)
        image.write(30 << 20, b"far")
    qemu.img("check", path)
    with lamina.open({"driver": "qcow2", "file": str(path), "snapshot-id": "1"}) as image:
        assert image.size == 1 << 20
        assert image.read(0, 1 << 20) == b"\x01" * (1 << 20)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.truncate(512)
    qemu.img("check", path)
    assert lamina.check(path, format="qcow2").clean
    with lamina.open({"driver": "qcow2", "file": str(path), "snapshot-id": "1"}) as image:
        assert image.read(0, 1 << 20) == b"\x01" * (1 << 20)
    old = tmp_path / "old.qcow2"
    qemu.img("create", "-f", "qcow2", "-o", "compat=0.10", old, "1M")
    qemu.img("snapshot", "-c", "one", old)
    raw = bytearray(old.read_bytes())
    with lamina.open(old, format="qcow2") as image:
        at: int = image.node.header.snapshots_offset  # type: ignore[attr-defined]
    extra = int.from_bytes(raw[at + 36 : at + 40])
    if extra:  # newer programs write extra data in version 2 as well: as an older one would have left it
        raw[at + 36 : at + 40] = bytes(4)
        raw[at + 40 : at + 48] = raw[at + 40 + extra : at + 48 + extra]
        old.write_bytes(raw)
    with lamina.open(old, format="qcow2", read_only=False) as image:
        with pytest.raises(lamina.OptionError, match="does not say its size"):
            image.truncate(2 << 20)
        image.write(0, b"x")
    qemu.img("check", old)


@pytest.mark.peers
@pytest.mark.parametrize(("compat", "cluster", "bits"), [("1.1", 512, 64), ("1.1", 4096, 16), ("0.10", 1024, 16)])
def test_snapshots_of_both(tmp_path: Path, qemu: Qemu, compat: str, cluster: int, bits: int) -> None:
    """Snapshots are made, applied and deleted by QEMU and by Lamina in turn."""
    path, raw = tmp_path / "disk.qcow2", tmp_path / "disk.raw"
    lamina.create(path, "qcow2", SIZE, compat=compat, cluster_size=cluster, refcount_bits=bits)
    rng = random.Random(f"{compat}{cluster}{bits}")
    disk = Disk(path, rng, cluster)
    ids: dict[str, str] = {}
    for number in range(16):
        disk.write(8)
        kind, ours = rng.choice(["create", "create", "apply", "delete"]), rng.randrange(2) == 0
        name = f"s{number}" if kind == "create" or not ids else rng.choice(sorted(ids))
        if name not in ids:
            kind = "create"
        if ours:
            with lamina.open(path, format="qcow2", read_only=False) as image:
                if kind == "create":
                    assert image.create_snapshot(name).name == name
                elif kind == "apply":
                    image.apply_snapshot(ids[name])
                else:
                    image.delete_snapshot(ids[name])
        else:
            qemu.img("snapshot", {"create": "-c", "apply": "-a", "delete": "-d"}[kind], name, path)
        if kind == "create":
            disk.kept[name] = bytes(disk.now)
            with lamina.open(path, format="qcow2") as image:
                ids[name] = image.snapshots()[-1].id
        elif kind == "apply":
            disk.now[:] = disk.kept[name]
        else:
            del disk.kept[name], ids[name]
        if ours:
            qemu.img("check", path)
            assert lamina.check(path, format="qcow2").clean
    disk.judge(qemu, raw)
    with lamina.open(path, format="qcow2") as image:
        assert {one.name: one.id for one in image.snapshots()} == ids
