"""The filter `blkverify`: both images get every change, and the first byte that differs is named."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

import lamina
from lamina.errors import BlockIOError, NotSupported, OptionError
from lamina.filters.blkverify import Blkverify
from lamina.image import Image
from lamina.request import Child
from lamina.storage.memory import MemoryStorage


def pair(size: int = 100_000) -> tuple[Image, Image, Image]:
    test, raw = MemoryStorage(size), MemoryStorage(size)
    return Image(Blkverify(Child(test, "image"), Child(raw, "raw"))), Image(test), Image(raw)


def test_changes_go_to_both() -> None:
    image, test, raw = pair()
    image.write(10, b"x" * 70_000, fua=True)
    image.zero(100, 1000, unmap=True)
    image.truncate(80_000)
    image.discard(0, 50_000)
    image.flush()
    expected = bytes(10) + b"x" * 90 + bytes(1000) + b"x" * 68_910 + bytes(9990)
    assert image.read(0, image.size) == test.read(0, test.size) == raw.read(0, raw.size) == expected
    with pytest.raises(NotSupported):
        image.zero(0, 10, fast=True)


@pytest.mark.parametrize("at", [0, 1, 4999, 65_536, 99_999])
def test_the_first_byte_that_differs_is_named(at: int) -> None:
    image, test, _ = pair()
    test.write(at, b"\x05" * min(3, 100_000 - at))
    with pytest.raises(BlockIOError, match=f"the byte at offset {at} is 0x05, but 0x00 in memory") as caught:
        image.read(0, 100_000)
    assert caught.value.errno == errno.EIO
    assert image.read(0, at) == bytes(at)


def test_images_of_different_lengths_are_refused() -> None:
    with pytest.raises(OptionError, match="sizes of the images differ: 100 and 101"):
        Blkverify(Child(MemoryStorage(100), "image"), Child(MemoryStorage(101), "raw"))


def test_by_its_name(tmp_path: Path) -> None:
    raw, test = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    raw.write_bytes(bytes(1 << 20))
    lamina.create(test, "qcow2", 1 << 20)
    spec = {"driver": "blkverify", "raw": str(raw), "test": {"driver": "qcow2", "file.filename": str(test)}}
    name = f"blkverify:{raw}:json:" + '{"driver":"qcow2","file.filename":"' + str(test) + '"}'
    for source in (spec, name):
        with lamina.open(source, read_only=False, format=None if source is spec else "raw") as image:
            image.write(5000, b"x" * 5000)
            assert image.read(0, 20_000) == bytes(5000) + b"x" * 5000 + bytes(10_000)
    assert raw.read_bytes()[5000:10_000] == b"x" * 5000
    with raw.open("r+b") as file:
        file.seek(7000)
        file.write(b"y")
    with (
        lamina.open(spec) as image,
        pytest.raises(BlockIOError, match=r"the byte at offset 7000 is 0x78, but 0x79 in .*disk\.raw"),
    ):
        image.read(0, 20_000)
