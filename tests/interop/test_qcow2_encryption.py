"""Encrypted qcow2 images between QEMU and Lamina, both ways: LUKS, and the legacy AES that is only read."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.crypto.secret import Secret
from lamina.jobs.convert import convert_to_file
from tests.conftest import Qemu

SIZE = 3 << 20
SECRET = Secret(b"hunter2")


def options(path: Path) -> str:
    return f"driver=qcow2,encrypt.key-secret=s,file.filename={path}"


def spec(path: Path) -> dict[str, Any]:
    return {"driver": "qcow2", "file": {"filename": str(path)}, "encrypt": {"key-secret": SECRET}}


def word(folder: Path) -> tuple[str, str]:
    (folder / "word").write_bytes(SECRET.reveal())
    return "--object", f"secret,id=s,file={folder / 'word'}"


def write_randomly(image: lamina.Image, disk: bytearray, rng: random.Random) -> None:
    for _ in range(80):
        offset = rng.randrange(SIZE)
        length = min(rng.choice((1, 511, 512, 4096, 70_000)), SIZE - offset)
        if rng.randrange(4):
            data = rng.randbytes(length)
            image.write(offset, data)
        else:
            data = bytes(length)
            image.zero(offset, length, unmap=bool(rng.randrange(2)))
        disk[offset : offset + length] = data


@pytest.mark.peers
@pytest.mark.parametrize("cluster", [512, 4096, 65_536])
@pytest.mark.parametrize("mode", ["xts", "cbc"])
def test_ours_is_read_written_and_checked_by_qemu(tmp_path: Path, qemu: Qemu, cluster: int, mode: str) -> None:
    path, raw = tmp_path / "disk.qcow2", tmp_path / "disk.raw"
    secret = word(tmp_path)
    encrypt = {"format": "luks", "key-secret": SECRET, "iter-time": 1, "cipher-mode": mode}
    if mode == "cbc":
        encrypt |= {"ivgen-alg": "essiv", "cipher-alg": "aes-256", "hash-alg": "sha1"}
    lamina.create(path, "qcow2", SIZE, cluster_size=cluster, encrypt=encrypt)
    disk, rng = bytearray(SIZE), random.Random(f"{cluster}{mode}")
    with lamina.open(spec(path), read_only=False) as image:
        write_randomly(image, disk, rng)
    qemu.img("check", *secret, "--image-opts", options(path))
    qemu.io(*secret, "--image-opts", "-c", "write -P 7 100k 200k", options(path))
    disk[100 * 1024 : 300 * 1024] = b"\x07" * 204_800
    qemu.img("convert", *secret, "--image-opts", options(path), "-O", "raw", raw)
    assert raw.read_bytes() == disk
    with lamina.open(spec(path), read_only=False) as image:
        assert image.read(0, SIZE) == disk
        write_randomly(image, disk, rng)
        assert image.read(0, SIZE) == disk
    assert lamina.check(path, format="qcow2").clean
    told = json.loads(qemu.img("info", "--output=json", "-f", "qcow2", path).stdout)
    found = lamina.info(path, format="qcow2").to_json()
    told["format-specific"]["data"]["encrypt"].pop("detached-header", None)
    assert found["format-specific"] == told["format-specific"]
    assert found["encrypted"] is told["encrypted"] is True


def create(qemu: Qemu, path: Path, kind: str, secret: tuple[str, str]) -> None:
    """A new image by QEMU, which often cannot measure the speed of its key derivation, and gives up."""
    fast = ",encrypt.iter-time=100" if kind == "luks" else ""
    for _ in range(60):
        given = ("-f", "qcow2", "-o", f"encrypt.format={kind},encrypt.key-secret=s{fast}", path, str(SIZE))
        made = qemu.img("create", *secret, *given, check=False)
        if not made.returncode:
            return
        assert "CPU usage" in made.stderr, made.stderr
    pytest.fail("QEMU could not measure its key derivation")


@pytest.mark.peers
@pytest.mark.parametrize("kind", ["luks", "aes"])
def test_theirs_is_read_and_written(tmp_path: Path, qemu: Qemu, kind: str) -> None:
    path, raw = tmp_path / "disk.qcow2", tmp_path / "disk.raw"
    secret = word(tmp_path)
    create(qemu, path, kind, secret)
    qemu.io(*secret, "--image-opts", "-c", "write -P 7 100k 200k", "-c", "write -P 9 1M 4k", options(path))
    disk = bytearray(SIZE)
    disk[100 * 1024 : 300 * 1024] = b"\x07" * 204_800
    disk[1 << 20 : (1 << 20) + 4096] = b"\x09" * 4096
    with lamina.open(spec(path), read_only=False) as image:
        assert image.read(0, SIZE) == disk
        write_randomly(image, disk, random.Random(kind))
    qemu.img("check", *secret, "--image-opts", options(path))
    qemu.img("convert", *secret, "--image-opts", options(path), "-O", "raw", raw)
    assert raw.read_bytes() == disk
    target = tmp_path / "copy.qcow2"
    with lamina.open(spec(path)) as image:
        convert_to_file(image, target, "qcow2", {"encrypt": {"format": "luks", "key-secret": SECRET, "iter-time": 1}})
    qemu.img("compare", *secret, "--image-opts", options(target), f"driver=raw,file.filename={raw}")
