"""What becomes zero or is discarded in an external data file: it is recorded in bitmaps, and zero under encryption too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.crypto.secret import Secret
from lamina.formats.qcow2 import layout as q

pytestmark = pytest.mark.usefixtures("granted")
SIZE = 1 << 20


@pytest.mark.parametrize("raw", [False, True])
def test_a_bitmap_records_what_becomes_zero_or_is_discarded(tmp_path: Path, raw: bool) -> None:
    """A backup that copies what the bitmap says must not keep the old bytes."""
    path = tmp_path / "disk.qcow2"
    lamina.create(path, "qcow2", SIZE, data_file="data", data_file_raw=raw)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(0, b"a" * SIZE)
        image.add_bitmap("backup", 65_536)
        image.zero(0, 65_536, unmap=True)
        image.zero(131_072, 65_536)
        image.discard(262_144, 65_536)
        dirty = list(image.bitmaps["backup"].dirty(0, SIZE))
    assert dirty == [(0, 65_536), (131_072, 196_608), (262_144, 327_680)]


def encrypted(folder: Path) -> dict[str, Any]:
    """The options to open a new encrypted image in this folder."""
    secret = Secret("hunter2")
    options = {"format": "luks", "key-secret": secret, "iter-time": 1}
    lamina.create(folder / "disk.qcow2", "qcow2", SIZE, cluster_size=4096, data_file="data", encrypt=options)
    return {
        "driver": "qcow2",
        "file": {"filename": str(folder / "disk.qcow2")},
        "encrypt": {"key-secret": secret},
    }


def call_raw(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(q.HEADER_V3["autoclear_features"].offset)
        file.write(q.AUTOCLEAR["raw external data"].to_bytes(8, "big"))


def test_the_data_file_of_an_encrypted_image_is_not_raw_whatever_its_header_says(tmp_path: Path) -> None:
    """QEMU creates such images. Zeros in their data file are anything on the disk."""
    spec = encrypted(tmp_path)
    call_raw(tmp_path / "disk.qcow2")
    with lamina.open(spec, read_only=False) as image:
        image.write(0, b"a" * 65_536)
        image.zero(0, 16_384, unmap=True)
        image.zero(16_384, 16_384)
        assert image.read(0, 65_536) == bytes(32_768) + b"a" * 32_768
        image.truncate(2 * SIZE)
        assert not any(image.read(SIZE, SIZE))


def test_a_hole_in_the_data_file_of_an_encrypted_image_is_zero_after_a_power_cut_too(tmp_path: Path) -> None:
    """No table that was written before calls it data, which would decrypt to garbage."""
    spec = encrypted(tmp_path)
    with lamina.open(spec, read_only=False) as image:
        image.write(0, b"a" * 65_536)
        image.flush()
        image.zero(0, 8192, unmap=True)
        image.discard(8192, 8192)
        files = {name: (tmp_path / name).read_bytes() for name in ("disk.qcow2", "data")}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with lamina.open(spec) as image:
        disk = image.read(0, 65_536)
    assert {disk[at : at + 512] for at in range(0, 16_384, 512)} <= {bytes(512), b"a" * 512}
    assert disk[16_384:] == b"a" * 49_152


def test_the_data_file_of_an_image_with_a_backing_file_is_not_raw_whatever_its_header_says(tmp_path: Path) -> None:
    """Zeros in the data file do not hide the backing file."""
    path = tmp_path / "disk.qcow2"
    (tmp_path / "base").write_bytes(b"b" * SIZE)
    lamina.create(path, "qcow2", SIZE, data_file="data", backing_file="base", backing_fmt="raw")
    call_raw(path)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.zero(0, 131_072)
        assert image.read(0, SIZE) == bytes(131_072) + b"b" * (SIZE - 131_072)
