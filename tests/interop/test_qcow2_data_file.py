"""qcow2 images with an external data file between QEMU and Lamina, both ways."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

import lamina
from tests.conftest import Qemu

pytestmark = pytest.mark.usefixtures("granted")
SIZE = (3 << 20) + 1536


def write_randomly(image: lamina.Image, disk: bytearray, rng: random.Random) -> None:
    for _ in range(60):
        offset = rng.randrange(SIZE)
        length = min(rng.choice((1, 511, 512, 4096, 70_000)), SIZE - offset)
        kind = rng.randrange(6)
        data = bytes(length)
        if kind < 4:
            data = rng.randbytes(length)
            image.write(offset, data)
        elif kind == 4:
            image.zero(offset, length, unmap=bool(rng.randrange(2)))
        else:
            image.discard(offset, length)
            data = image.read(offset, length)
            before = disk[offset : offset + length]
            assert all(new in (0, old) for new, old in zip(data, before, strict=True))
        disk[offset : offset + length] = data


def settings(data: Path, raw: bool, cluster: int, extended: bool) -> dict[str, Any]:
    # QEMU takes a relative name for one in the current directory.
    return {"data_file": str(data), "data_file_raw": raw, "cluster_size": cluster, "extended_l2": extended}


def words(raw: bool, cluster: int, extended: bool) -> str:
    flags = f"data_file_raw={'on' if raw else 'off'},extended_l2={'on' if extended else 'off'}"
    return f"cluster_size={cluster},{flags}"


GEOMETRIES = [
    pytest.param(
        raw, cluster, extended, id=f"{'raw' if raw else 'mapped'}-{cluster}-{'extended' if extended else 'plain'}"
    )
    for raw in (False, True)
    for cluster, extended in ((512, False), (4096, False), (65_536, False), (65_536, True), (16_384, True))
]


@pytest.mark.peers
@pytest.mark.parametrize(("raw", "cluster", "extended"), GEOMETRIES)
def test_ours_is_read_written_and_checked_by_qemu(
    tmp_path: Path, qemu: Qemu, raw: bool, cluster: int, extended: bool
) -> None:
    path, data, out = tmp_path / "disk.qcow2", tmp_path / "data", tmp_path / "out"
    lamina.create(path, "qcow2", SIZE, **settings(data, raw, cluster, extended))
    disk, rng = bytearray(SIZE), random.Random(f"{raw}{cluster}{extended}")
    with lamina.open(path, format="qcow2", read_only=False) as image:
        write_randomly(image, disk, rng)
        assert image.read(0, SIZE) == disk
    assert_alike(qemu, path, disk, raw)
    qemu.io(
        "-f", "qcow2", "-c", "write -q -P 7 100k 200k", "-c", "discard -q 1M 300k", "-c", "write -q -z -u 2M 65k", path
    )
    disk[102_400 : 102_400 + 204_800] = b"\x07" * 204_800
    disk[2 << 20 : (2 << 20) + 66_560] = bytes(66_560)
    disk[1 << 20 : (1 << 20) + 307_200] = qemu_bytes(qemu, path, out)[1 << 20 : (1 << 20) + 307_200]
    with lamina.open(path, format="qcow2", read_only=False) as image:
        assert image.read(0, SIZE) == disk
        write_randomly(image, disk, rng)
    assert_alike(qemu, path, disk, raw)
    assert data.stat().st_size == SIZE


@pytest.mark.peers
@pytest.mark.parametrize(("raw", "cluster", "extended"), GEOMETRIES)
def test_theirs_is_read_written_checked_and_resized_by_ours(
    tmp_path: Path, qemu: Qemu, raw: bool, cluster: int, extended: bool
) -> None:
    path = tmp_path / "disk.qcow2"
    qemu.img(
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        f"data_file={tmp_path / 'data'},{words(raw, cluster, extended)}",
        path,
        str(SIZE),
    )
    qemu.io(
        "-f", "qcow2", "-c", "write -q -P 5 64k 100k", "-c", "write -q -z 1M 128k", "-c", "write -q -P 6 3M 1k", path
    )
    disk, rng = bytearray(SIZE), random.Random(f"{raw}{cluster}{extended} theirs")
    disk[65_536 : 65_536 + 102_400] = b"\x05" * 102_400
    disk[3 << 20 : (3 << 20) + 1024] = b"\x06" * 1024
    assert_alike(qemu, path, disk, raw)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        assert image.read(0, SIZE) == disk
        write_randomly(image, disk, rng)
    assert_alike(qemu, path, disk, raw)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.truncate(SIZE - 70_144)
        image.truncate(SIZE)
    disk[SIZE - 70_144 :] = bytes(70_144)
    assert_alike(qemu, path, disk, raw)


def qemu_bytes(qemu: Qemu, path: Path, out: Path) -> bytes:
    qemu.img("convert", "-f", "qcow2", "-O", "raw", path, out)
    return out.read_bytes()


def assert_alike(qemu: Qemu, path: Path, disk: bytes, raw: bool) -> None:
    """QEMU reads these bytes, and finds what Lamina finds."""
    assert qemu_bytes(qemu, path, path.with_name("out")) == disk
    if raw:  # QEMU makes the file as long as its clusters
        data = path.with_name("data").read_bytes()
        assert data[:SIZE] == disk
        assert not any(data[SIZE:])
    status, theirs = qemu.check(path)
    ours = lamina.check(path, format="qcow2")
    assert status == 0
    assert ours.clean, ours.findings
    found = ours.to_json()
    for key in ("total-clusters", "allocated-clusters", "fragmented-clusters", "image-end-offset"):
        assert found.get(key) == theirs.get(key), key
    told = json.loads(qemu.img("info", "--output=json", "-f", "qcow2", path).stdout)
    assert lamina.info(path, format="qcow2").to_json()["format-specific"] == told["format-specific"]


@pytest.mark.peers
def test_a_raw_file_that_is_kept_is_the_disk_for_qemu_too(tmp_path: Path, qemu: Qemu) -> None:
    path, data = tmp_path / "disk.qcow2", tmp_path / "data"
    disk = random.Random(8).randbytes(SIZE)
    data.write_bytes(disk)
    lamina.create(path, "qcow2", data_file=str(data), data_file_raw=True, data_file_keep=True)
    assert data.read_bytes() == disk
    assert_alike(qemu, path, disk, True)
    qemu.img("bitmap", "--add", path, "changes")
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(70_000, b"new")
        assert image.bitmaps["changes"]
    assert data.read_bytes() == disk[:70_000] + b"new" + disk[70_003:]
