"""The filter `concat`: where its bytes lie, and what happens at the borders of its disks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import lamina
from lamina.errors import BlockIOError, NotSupported, OptionError
from lamina.filters.concat import Concat
from lamina.image import Image
from lamina.jobs.convert import convert_to_file
from lamina.limits import MAX_SIZE
from lamina.node import NO_FALLBACK
from lamina.pending import DONE
from lamina.request import Child
from lamina.storage.memory import MemoryStorage
from lamina.storage.null import NullStorage
from tests.unit.test_jobs_salvage import Damaged


def over(*disks: MemoryStorage | NullStorage) -> Image:
    return Image(Concat([Child(disk, "disk") for disk in disks]))


def of(*contents: bytes) -> Image:
    disks = []
    for content in contents:
        disks.append(MemoryStorage(len(content)))
        if content:
            disks[-1].write(0, memoryview(content))
    return over(*disks)


def test_each_extent_names_the_file_of_its_disk(tmp_path: Path) -> None:
    for name, size in (("a", 10_000), ("b", 20_001)):
        (tmp_path / name).write_bytes(os.urandom(size))
    files = [{"driver": "raw", "file": {"driver": "file", "filename": str(tmp_path / name)}} for name in "ab"]
    with lamina.open({"driver": "concat", "children": files}) as image:
        assert image.size == 30_001
        rows = [(row.start, row.length, os.path.basename(row.file.filename), row.offset) for row in image.extents()]
        assert rows == [(0, 10_000, "a", 0), (10_000, 20_001, "b", 0)]
        assert image.node.copyable
        done = convert_to_file(image, tmp_path / "c", "raw", {}, offload="copy")
    whole = (tmp_path / "a").read_bytes() + (tmp_path / "b").read_bytes()
    assert (tmp_path / "c").read_bytes() == whole
    assert done.read + done.copied == len(whole)


def test_requests_over_borders() -> None:
    with of(b"one", b"", b"twofold", b"3") as image:
        assert image.read(0, 11) == b"onetwofold3"
        image.write(2, b"-hyphen-x")
        assert image.read(0, 11) == b"on-hyphen-x"
        image.zero(2, 2)
        image.discard(0, 11)
        assert len(image.read(0, 11)) == 11


@pytest.mark.parametrize(("offset", "length"), [(0, 4), (2, 2), (2, 9), (9, 2), (3, 7)])
def test_started_requests(offset: int, length: int) -> None:
    content = b"onetwofold3"
    with of(b"one", b"twofold", b"3") as image:
        view = memoryview(bytearray(length))
        image.root.start_read(offset, view).wait()
        assert bytes(view) == content[offset : offset + length]
        image.root.start_write(offset, memoryview(b"X" * length)).wait()
        assert image.read(0, 11) == content[:offset] + b"X" * length + content[offset + length :]


def test_a_started_request_inside_one_disk_is_that_of_the_disk() -> None:
    """So several are in flight at once where the disk is far away."""
    with over(MemoryStorage(512), Damaged(bytes(4096), set(), later=True)) as image:
        assert image.node.pipelines
        inside = image.root.start_read(600, memoryview(bytearray(10)))
        assert inside is not DONE
        inside.wait()
        assert image.root.start_read(500, memoryview(bytearray(100))) is DONE


def test_a_fast_zero_of_several_disks_is_refused_before_any_change() -> None:
    with of(b"one", b"two") as image:
        with pytest.raises(NotSupported):
            image.root.zero(0, 6, NO_FALLBACK)
        assert image.read(0, 6) == b"onetwo"
        image.root.zero(0, 3, NO_FALLBACK)
        assert image.read(0, 6) == b"\0\0\0two"


def test_an_error_names_the_disk() -> None:
    with over(MemoryStorage(512), Damaged(bytes(4096), {1})) as image:
        assert image.read(0, 1024) == bytes(1024)
        with pytest.raises(BlockIOError, match="damaged"):
            image.read(1000, 100)


def test_what_cannot_be_joined() -> None:
    with pytest.raises(OptionError, match="no children"):
        Concat([])
    with pytest.raises(OptionError, match="together"):
        over(NullStorage(MAX_SIZE), NullStorage(1))


def test_the_size_is_fixed() -> None:
    with of(b"one") as image, pytest.raises(NotSupported):
        image.truncate(10)


def test_another_mode_in_use(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_bytes(bytes(512))
    files = [{"driver": "raw", "file": {"driver": "file", "filename": str(tmp_path / name)}} for name in "ab"]
    with lamina.open({"driver": "concat", "children": files}) as image:
        with pytest.raises(lamina.ReadOnly):
            image.write(0, b"x")
        image.reopen(read_only=False)
        image.write(511, b"xy")
    assert (tmp_path / "a").read_bytes()[511:] + (tmp_path / "b").read_bytes()[:1] == b"xy"
