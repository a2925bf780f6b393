"""LUKS1 headers between cryptsetup, QEMU and Lamina: each opens what the others made."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

import lamina
from lamina.crypto.luks1 import Luks1, Settings
from lamina.crypto.sectors import CipherSpec
from lamina.formats.raw import Raw
from tests.conftest import Qemu, missing

SIZE = 4 << 20
CASES = [
    ("aes", "xts-plain64", 512, "sha256"),
    ("aes", "xts-plain64", 256, "sha512"),
    ("aes", "cbc-essiv:sha256", 256, "sha1"),
    ("aes", "cbc-plain64", 128, "sha256"),
]


@pytest.fixture
def cryptsetup() -> str:
    found = shutil.which("cryptsetup", path=os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin")))
    return found or missing("cryptsetup", "install cryptsetup-bin")


def words(folder: Path) -> tuple[Path, Path]:
    one, other = folder / "one", folder / "other"
    one.write_bytes(b"first \xff\0passphrase")
    other.write_bytes(b"second")
    return one, other


def image_options(path: Path) -> str:
    return f"driver=luks,key-secret=s,file.filename={path}"


@pytest.mark.peers
@pytest.mark.parametrize(("cipher", "mode", "bits", "hash"), CASES)
def test_what_cryptsetup_made(
    tmp_path: Path, qemu: Qemu, cryptsetup: str, cipher: str, mode: str, bits: int, hash: str
) -> None:
    path = tmp_path / "disk.luks"
    one, other = words(tmp_path)
    with path.open("wb") as file:
        file.truncate(SIZE)
    fast = ("--batch-mode", "--pbkdf-force-iterations", "1000")
    made = ("luksFormat", "--type", "luks1", "-c", f"{cipher}-{mode}", "-s", str(bits), "-h", hash, *fast)
    subprocess.run([cryptsetup, *made, path, one], check=True)
    subprocess.run([cryptsetup, "luksAddKey", *fast, "--key-file", one, path, other], check=True)
    secret = ("--object", f"secret,id=s,file={other}", "--image-opts")
    qemu.io(*secret, "-c", "write -P 7 0 64k", "-c", "write -P 9 64k 100k", image_options(path))
    told = json.loads(qemu.img("info", "--output=json", "-f", "luks", path).stdout)["format-specific"]["data"]
    with lamina.open(path, format="raw") as image:
        assert isinstance(image.node, Raw)
        header = Luks1.read(image.node.children["file"], 0, SIZE)
        key = header.unlock(one.read_bytes())
        assert header.unlock(other.read_bytes()) == key
        assert header.slots_of(other.read_bytes()) == [1]
        assert {name: value for name, value in told.items() if name != "detached-header"} == header.to_json()
        data = bytearray(image.read(header.payload_offset, 164 * 1024))
        header.cipher(key).decrypt(0, memoryview(data))
        assert data == b"\x07" * 65536 + b"\x09" * 102400


@pytest.mark.peers
@pytest.mark.parametrize(("cipher", "mode", "bits", "hash"), CASES)
def test_what_we_made(
    tmp_path: Path, qemu: Qemu, cryptsetup: str, cipher: str, mode: str, bits: int, hash: str
) -> None:
    path = tmp_path / "disk.luks"
    one, other = words(tmp_path)
    with path.open("wb") as file:
        file.truncate(SIZE)
    data = os.urandom(100 * 1024)
    with lamina.open(path, format="raw", read_only=False) as image:
        storage = image.node.children["file"]
        chosen = Settings(CipherSpec.parse(cipher, mode), bits // 8, hash, 0)
        header, key = Luks1.create(storage, 0, one.read_bytes(), chosen)
        header.add_key(key, other.read_bytes(), slot=6, iter_time=0)
        header.erase_slot(0)
        image.write(header.payload_offset, header.cipher(key).encrypt(0, memoryview(data)))
    opens = [cryptsetup, "open", "--test-passphrase", "--key-file"]
    subprocess.run([*opens, other, path], check=True)
    assert subprocess.run([*opens, one, path], check=False, capture_output=True).returncode == 2
    raw = tmp_path / "disk.raw"
    secret = ("--object", f"secret,id=s,file={other}", "--image-opts")
    qemu.img("convert", *secret, image_options(path), "-O", "raw", raw)
    assert raw.read_bytes()[: len(data)] == data
