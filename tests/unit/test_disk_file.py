"""`Image.as_file`: the disk as a file of the standard library, and what that library does with it."""

from __future__ import annotations

import array
import errno
import hashlib
import io
import mmap
import os
import shutil
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import lamina
from lamina.disk_file import DiskFile
from lamina.image import Image
from lamina.storage.memory import MemoryStorage

SIZE = 300_000
CONTENT = bytes(number * number % 251 for number in range(SIZE))


@pytest.fixture
def image(tmp_path: Path) -> Iterator[Image]:
    path = tmp_path / "disk.qcow2"
    lamina.create(path, "qcow2", size=SIZE // 512 * 512 + 512)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(0, CONTENT)
        yield image


def content(image: Image) -> bytes:
    return CONTENT + bytes(image.size - SIZE)


# The position


def test_seek_counts_from_start_position_and_end(image: Image) -> None:
    file = image.as_file()
    assert file.seek(100) == file.tell() == 100
    assert file.seek(-30, io.SEEK_CUR) == 70
    assert file.seek(-10, io.SEEK_END) == image.size - 10
    assert len(file.read(100)) == 10
    assert file.seek(np.int64(5)) == 5  # any integer
    assert file.seek(1 << 40) == 1 << 40  # past the end, as in any file
    assert file.read() == file.read(10) == b""
    assert file.readinto(bytearray(10)) == 0


def test_seek_refuses_what_is_no_position(image: Image) -> None:
    file = image.as_file()
    file.seek(7)
    with pytest.raises(lamina.OutOfRange, match="position -1 is before the start"):
        file.seek(-8, io.SEEK_CUR)
    with pytest.raises(ValueError, match="whence is 9"):
        file.seek(0, 9)
    with pytest.raises(TypeError):
        file.seek(1.5)  # type: ignore[arg-type]
    assert file.tell() == 7


def test_files_over_one_image_have_positions_of_their_own(image: Image) -> None:
    one, two = image.as_file(), image.as_file()
    assert one.read(1000) == two.read(1000)
    one.seek(0)
    one.write(b"seen by both")
    two.seek(0)
    assert two.read(12) == b"seen by both"


def holes(file: io.RawIOBase | io.FileIO) -> list[tuple[int, int]]:
    """The ranges of data, as a copying program finds them."""
    found = []
    end = 0
    while True:
        try:
            start = file.seek(end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return found
            raise
        end = file.seek(start, os.SEEK_HOLE)
        found.append((start, end))


def test_seek_finds_data_and_holes_as_for_a_sparse_file(tmp_path: Path) -> None:
    parts = [(65536, 65536), (196608, 131072), (983040, 65536)]
    path = tmp_path / "sparse"
    lamina.create(tmp_path / "disk.qcow2", "qcow2", size=1 << 20)
    with path.open("wb") as plain, lamina.open(tmp_path / "disk.qcow2", format="qcow2", read_only=False) as image:
        plain.truncate(1 << 20)
        for start, length in parts:
            plain.seek(start)
            plain.write(b"x" * length)
            image.write(start, b"x" * length)
        found = holes(image.as_file())
        assert found == [(start, start + length) for start, length in parts]
        plain.flush()
        with io.FileIO(path) as raw:
            if holes(raw) != [(0, 1 << 20)]:  # the file system knows holes
                assert found == holes(raw)


def test_the_end_of_the_disk_is_a_hole() -> None:
    with Image(MemoryStorage(1000)) as image:
        image.write(0, b"x" * 1000)
        file = image.as_file()
        assert file.seek(10, os.SEEK_HOLE) == 1000
        for whence in (os.SEEK_DATA, os.SEEK_HOLE):
            for offset in (1000, 2000, -1):
                with pytest.raises(lamina.BlockIOError) as caught:
                    file.seek(offset, whence)
                assert caught.value.errno == errno.ENXIO
        assert file.tell() == 1000


def test_a_search_goes_through_many_extents(tmp_path: Path) -> None:
    lamina.create(tmp_path / "disk.qcow2", "qcow2", size=1 << 20, cluster_size=512)
    with lamina.open(tmp_path / "disk.qcow2", format="qcow2", read_only=False) as image:
        for start in range(0, 1 << 19, 1024):
            image.write(start, bytes([1]) * 512)
            image.zero(start + 512, 512)
        image.write(900 * 1024, b"y" * 512)
        file = image.as_file()
        assert len(holes(file)) == 513
        assert file.seek(511 * 1024 + 512, os.SEEK_DATA) == 900 * 1024


# Reads


def test_read_and_readall(image: Image) -> None:
    file = image.as_file()
    assert file.read(10) == CONTENT[:10]
    assert file.read(0) == b""
    assert file.read(None) == content(image)[10:]
    file.seek(20)
    assert file.readall() == content(image)[20:]
    assert file.readall() == b""


@pytest.mark.parametrize(
    "buffer",
    [
        bytearray(4000),
        memoryview(bytearray(4000)),
        memoryview(bytearray(4004))[2:4002],
        array.array("I", bytes(4000)),
        np.zeros((10, 50), np.float64),
        mmap.mmap(-1, 4000),
    ],
    ids=lambda buffer: type(buffer).__name__,
)
def test_readinto_fills_any_writable_buffer(image: Image, buffer: bytearray) -> None:
    file = image.as_file()
    file.seek(5)
    assert file.readinto(buffer) == 4000
    assert bytes(memoryview(buffer).cast("B")) == CONTENT[5:4005]
    file.seek(-100, io.SEEK_END)
    assert file.readinto(buffer) == 100
    assert bytes(memoryview(buffer).cast("B")) == content(image)[-100:] + CONTENT[105:4005]


@pytest.mark.parametrize("buffer", [b"1234", np.zeros(100, np.uint8)[::2], "text", memoryview(b"1")])
def test_readinto_refuses_other_buffers(image: Image, buffer: bytes) -> None:
    file = image.as_file()
    with pytest.raises(TypeError):
        file.readinto(buffer)
    assert file.tell() == 0


def test_an_empty_buffer_is_filled_at_once(image: Image) -> None:
    file = image.as_file()
    file.seek(1 << 40)
    for buffer in (bytearray(), np.zeros((0, 3))):
        assert file.readinto(buffer) == 0
        assert file.write(buffer) == 0


# Writes


def test_a_write_past_the_end_changes_nothing(image: Image) -> None:
    file = image.as_file()
    file.seek(-10, io.SEEK_END)
    with pytest.raises(lamina.OutOfRange):
        file.write(b"x" * 11)
    assert file.tell() == image.size - 10
    assert image.read(0, image.size) == content(image)
    assert file.write(array.array("H", [1, 2, 3, 4, 5])) == 10
    assert image.read(image.size - 10, 10) == array.array("H", [1, 2, 3, 4, 5]).tobytes()


def test_truncate_leaves_the_position() -> None:
    with Image(MemoryStorage(1000)) as image:
        image.write(0, b"x" * 1000)
        file = image.as_file()
        file.seek(600)
        assert file.truncate() == image.size == 600
        assert file.truncate(2000) == image.size == 2000
        assert file.tell() == 600
        assert file.read() == bytes(1400)
        assert file.truncate(100) == 100
        assert file.tell() == 2000
        with pytest.raises(ValueError, match="-1"):
            file.truncate(-1)
        with pytest.raises(TypeError):
            file.truncate(1.5)  # type: ignore[arg-type]
        assert image.size == 100


def test_a_read_only_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(bytes(1024))
    with lamina.open(tmp_path / "disk.raw", format="raw") as image:
        file = image.as_file()
        assert file.readable()
        assert file.seekable()
        assert not file.writable()
        assert file.mode == "rb"
        for change in (lambda: file.write(b"x"), lambda: file.write(b""), lambda: file.truncate(5)):
            with pytest.raises(PermissionError):
                change()
        with pytest.raises(io.UnsupportedOperation):
            io.BufferedWriter(file)


def test_sync_flushes_the_image(image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = []
    monkeypatch.setattr(image, "flush", lambda: flushed.append(True))
    file = image.as_file()
    file.flush()
    assert not flushed
    file.sync()
    assert flushed
    file.close()
    assert len(flushed) == 1


# What files have


def test_name_mode_and_repr(image: Image) -> None:
    file = image.as_file()
    assert file.name == image.filename
    assert file.mode == "rb+"
    assert repr(file) == f"<DiskFile name={image.filename!r} mode='rb+'>"
    assert io.BufferedRandom(image.as_file()).mode == "rb+"
    with pytest.raises(io.UnsupportedOperation):
        file.fileno()
    assert not file.isatty()
    image.reopen(read_only=True)
    assert file.mode == "rb"


def test_it_is_closed_without_the_image(image: Image) -> None:
    with image.as_file() as file:
        assert not file.closed
        assert isinstance(file, io.RawIOBase)
        assert file.image is image
    assert file.closed
    file.close()
    assert file.mode == "rb+"
    assert file.name == image.filename
    assert repr(file).endswith("closed>")
    for ask in (file.read, file.tell, file.sync, file.isatty, file.flush, file.readline, file.__enter__):
        with pytest.raises(ValueError, match="closed file") as caught:
            ask()
        assert not isinstance(caught.value, lamina.LaminaError)
    assert image.read(0, 5) == CONTENT[:5]


def test_after_the_image_is_closed_it_raises_closed() -> None:
    image = Image(MemoryStorage(1000))
    file = image.as_file()
    assert not image.closed
    image.close()
    assert image.closed
    assert not file.closed  # so that a buffer above it tells that it cannot write
    for ask in (file.read, file.tell, file.sync, file.readline, file.readable, lambda: file.seek(0, os.SEEK_DATA)):
        with pytest.raises(lamina.Closed):
            ask()
    assert file.mode == "rb+"
    assert "rb+" in repr(file)
    file.close()
    assert file.closed


def test_a_buffer_that_cannot_write_to_a_closed_image_says_so() -> None:
    image = Image(MemoryStorage(1000))
    buffered = io.BufferedRandom(image.as_file())
    buffered.write(b"not yet written")
    image.close()
    with pytest.raises(lamina.Closed):
        buffered.close()


# The standard library


def test_buffered_reader(image: Image) -> None:
    with io.BufferedReader(image.as_file(), 1000) as reader:
        assert reader.peek(1)
        assert reader.read(3333) == CONTENT[:3333]
        reader.seek(-3000, io.SEEK_CUR)
        assert reader.read() == content(image)[333:]
        reader.seek(0)
        assert b"".join(reader) == content(image)


def test_buffered_random_against_a_plain_file(image: Image, tmp_path: Path) -> None:
    path = tmp_path / "same"
    path.write_bytes(content(image))
    random = np.random.default_rng(7)
    with io.BufferedRandom(image.as_file(), 512) as ours, path.open("r+b", 512) as plain:
        for _ in range(500):
            at, length = int(random.integers(image.size - 3000)), int(random.integers(3000))
            assert ours.seek(at) == plain.seek(at)
            if random.integers(2):
                data = random.bytes(length)
                assert ours.write(data) == plain.write(data)
            else:
                assert ours.read(length) == plain.read(length)
            assert ours.tell() == plain.tell()
    assert image.read(0, image.size) == path.read_bytes()


def test_shutil_copies_in_both_directions(image: Image, tmp_path: Path) -> None:
    with (tmp_path / "copy").open("w+b") as plain:
        shutil.copyfileobj(image.as_file(), plain, 10_007)
        assert plain.tell() == image.size
        image.zero(0, image.size)
        plain.seek(0)
        shutil.copyfileobj(plain, image.as_file())
    assert image.read(0, image.size) == content(image)


@pytest.mark.skipif(not hasattr(hashlib, "file_digest"), reason="Python 3.11 has it")
def test_hashlib(image: Image) -> None:
    digest = hashlib.file_digest(image.as_file(), "sha256").hexdigest()
    assert digest == hashlib.sha256(content(image)).hexdigest()


def test_tar_archive_on_a_disk(image: Image) -> None:
    with image.as_file() as file, tarfile.open(fileobj=file, mode="w") as archive:
        for name in ("one", "two"):
            member = tarfile.TarInfo(name)
            member.size = 70_000
            archive.addfile(member, io.BytesIO(name[:1].encode() * member.size))
    for mode in ("r:", "r|"):
        found = {}
        with image.as_file() as file, tarfile.open(fileobj=file, mode=mode) as archive:
            for member in archive:
                reader = archive.extractfile(member)
                assert reader is not None
                found[member.name] = reader.read()
        assert found == {"one": b"o" * 70_000, "two": b"t" * 70_000}


def test_zip_archive_on_a_disk(image: Image) -> None:
    with image.as_file() as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("one", CONTENT[:50_000])
            archive.writestr("two", b"two")
        file.truncate(-(-file.tell() // 512) * 512)
    with zipfile.ZipFile(io.BufferedReader(image.as_file())) as archive:
        assert archive.testzip() is None
        assert archive.read("one") == CONTENT[:50_000]


def test_text_on_a_disk() -> None:
    with Image(MemoryStorage(30)) as image:
        image.write(0, "Grüße\nzwei\n".encode())
        with io.TextIOWrapper(io.BufferedReader(image.as_file()), encoding="utf-8") as text:
            assert text.readline() == "Grüße\n"
            assert text.readline() == "zwei\n"
        assert image.as_file().readlines()[1] == b"zwei\n"


def test_threads_with_files_of_their_own(image: Image) -> None:
    wrong: list[int] = []

    def read(start: int) -> None:
        file: DiskFile = image.as_file()
        for at in range(start, SIZE - 1000, 9973):
            file.seek(at)
            if file.read(1000) != CONTENT[at : at + 1000]:
                wrong.append(at)

    threads = [threading.Thread(target=read, args=(number * 100,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
