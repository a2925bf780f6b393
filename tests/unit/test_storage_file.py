"""The driver `file` on real files: exact bytes and sizes, holes, zeroing, direct I/O, and what it refuses to open."""

from __future__ import annotations

import errno
import os
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from lamina.errors import BlockIOError, Closed, NotFound, NotSupported, OptionError
from lamina.graph import Opener
from lamina.node import FUA, MAY_UNMAP
from lamina.request import Child
from lamina.storage import file as module
from lamina.storage.file import DirectFileStorage, FileStorage

BLOCK = 64 << 10  # a multiple of the block size of every common file system


def opened(
    path: Path, *, fd: int | None = None, read_only: bool = False, force_share: bool = False, **options: Any
) -> FileStorage:
    values = FileStorage.schema.parse({"filename": path, **options})
    return FileStorage.open(values, Opener(read_only=read_only, force_share=force_share, fd=fd))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(b"")
    return path


def get(node: FileStorage, offset: int, length: int) -> bytes:
    buffer = bytearray(b"\xee" * length)
    Child(node, "test", grows=True).read_into(offset, memoryview(buffer))
    return bytes(buffer)


def test_bytes_and_size_are_exact(path: Path) -> None:
    path.write_bytes(b"abcdefg")
    node = opened(path)
    try:
        assert (node.size, node.growable, node.filename) == (7, True, str(path))
        assert node.identity == (path.stat().st_dev, path.stat().st_ino)
        assert get(node, 2, 3) == b"cde"
        node.write(5, memoryview(b"XYZ"))
        node.write(20, memoryview(b"end"), FUA)
        assert node.size == 23
        node.flush()
        assert node.allocated == path.stat().st_blocks * 512
    finally:
        node.close()
    assert path.read_bytes() == b"abcdeXYZ" + bytes(12) + b"end"


def test_paths_of_references_are_real_and_absolute(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path.parent / "link").symlink_to(path)
    monkeypatch.chdir(path.parent)
    node = opened(Path("link"), read_only=True)
    assert (node.filename, node.path) == ("link", os.path.realpath(path))
    node.close()


def test_what_was_cut_off_by_others_reads_as_zeros(path: Path) -> None:
    path.write_bytes(b"x" * 5000)
    node = opened(path, locking="off")
    os.truncate(path, 1000)
    assert get(node, 0, 5000) == b"x" * 1000 + bytes(4000)
    assert [(e.start, e.length, e.data) for e in node.extents(4500, 500)] == [(4500, 500, False)]
    node.close()


def test_short_transfers_are_carried_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "preadv", lambda fd, views, offset: os.preadv(fd, [views[0][:3]], offset))
    monkeypatch.setattr(module, "pwritev", lambda fd, views, offset, how: os.pwritev(fd, [views[0][:5]], offset, how))
    node = opened(path)
    node.write(1, memoryview(b"0123456789abcdef"))
    assert get(node, 0, 17) == b"\x000123456789abcdef"
    node.close()


def test_a_hole_is_made_and_seen(path: Path) -> None:
    path.write_bytes(b"x" * 4 * BLOCK)
    node = opened(path)
    assert not node.reads_zero(0, 4 * BLOCK)
    node.zero(BLOCK, BLOCK, MAY_UNMAP)
    found = node.extents(100, 4 * BLOCK - 100)
    assert [(e.start, e.end, e.data, e.zero, e.present, e.offset, e.file) for e in found] == [
        (100, BLOCK, True, False, True, 100, node),
        (BLOCK, 2 * BLOCK, False, True, True, BLOCK, node),
        (2 * BLOCK, 4 * BLOCK, True, False, True, 2 * BLOCK, node),
    ]
    assert node.reads_zero(BLOCK, BLOCK)
    assert not node.reads_zero(BLOCK, BLOCK + 1)
    assert [e.start for e in node.extents(BLOCK + 1, 10)] == [BLOCK + 1]
    node.discard(2 * BLOCK, 2 * BLOCK)  # to the very end: the size stays
    assert node.size == path.stat().st_size == 4 * BLOCK
    assert [(e.start, e.end, e.data) for e in node.extents(0, 4 * BLOCK)] == [
        (0, BLOCK, True),
        (BLOCK, 4 * BLOCK, False),
    ]
    node.close()
    assert path.read_bytes() == b"x" * BLOCK + bytes(3 * BLOCK)


@pytest.mark.parametrize("flags", [0, MAY_UNMAP, FUA, FUA | MAY_UNMAP])
def test_zeroing_past_the_end_grows_the_file(path: Path, flags: int) -> None:
    path.write_bytes(b"x" * 1000)
    node = opened(path)
    Child(node, "test", grows=True).zero(500, 2000, flags)
    assert node.size == path.stat().st_size == 2500
    assert path.read_bytes() == b"x" * 500 + bytes(2000)
    Child(node, "test", grows=True).zero(5000, 10, flags)
    assert node.size == path.stat().st_size == 5010
    node.close()


def test_an_operation_that_is_missing_is_asked_for_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(b"x" * 1000)
    calls: list[int] = []
    monkeypatch.setattr(module, "_libc_fallocate", lambda fd, mode, *_: calls.append(mode) or errno.EOPNOTSUPP)
    node = opened(path)
    for _ in range(3):
        with pytest.raises(NotSupported):
            node.zero(0, 10)
        with pytest.raises(NotSupported):
            node.discard(0, 10)
    assert len(calls) == 2
    Child(node, "test").zero(10, 20, MAY_UNMAP)
    assert get(node, 0, 40) == b"x" * 10 + bytes(20) + b"x" * 10
    node.close()


def test_without_seek_data_all_is_data(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(bytes(1000))

    def seek(fd: int, offset: int, whence: int) -> int:
        raise OSError(errno.EINVAL, "no such whence")

    node = opened(path)
    monkeypatch.setattr(os, "lseek", seek)
    assert [(e.start, e.end, e.data) for e in node.extents(10, 100)] == [(10, 110, True)]
    assert not node.reads_zero(0, 10)
    monkeypatch.undo()
    node.close()


def test_a_flush_that_failed_fails_until_the_file_is_opened_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(fd: int) -> None:
        raise OSError(errno.EIO, "write-back")

    node = opened(path)
    monkeypatch.setattr(os, "fdatasync", broken)
    with pytest.raises(BlockIOError):
        node.flush()
    monkeypatch.undo()
    for _ in range(2):
        with pytest.raises(BlockIOError, match="lost") as caught:
            node.flush()
        assert caught.value.errno == errno.EIO
    node.close()
    again = opened(path)
    again.flush()
    again.close()


def test_truncate(path: Path) -> None:
    node = opened(path)
    node.truncate(1001)
    assert node.size == path.stat().st_size == 1001
    node.truncate(3)
    assert node.size == path.stat().st_size == 3
    with pytest.raises(BlockIOError) as caught:
        node.truncate((1 << 63) - 1)
    assert caught.value.errno in (errno.EFBIG, errno.EINVAL)
    assert node.size == 3
    node.close()


def test_writers_that_grow_the_file_lose_nothing(path: Path) -> None:
    node = opened(path)
    edge = Child(node, "test", grows=True)
    count = 64

    def work(first: int) -> None:
        for number in range(first, count, 4):
            if number % 2:
                edge.write(number * 100, memoryview(bytes([number]) * 100))
            else:
                edge.zero(number * 100, 100, MAY_UNMAP)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert node.size == count * 100
    node.close()
    assert path.read_bytes() == b"".join(bytes([n if n % 2 else 0]) * 100 for n in range(count))


def test_closing_twice_and_using_it_then(path: Path) -> None:
    path.write_bytes(b"x" * 10)
    node = opened(path)
    node.close()
    node.close()
    for operation in (
        lambda: node.read_into(0, memoryview(bytearray(1))),
        lambda: node.write(0, memoryview(b"x")),
        lambda: node.zero(0, 1),
        lambda: node.extents(0, 1),
        node.flush,
    ):
        with pytest.raises(Closed):
            operation()


def test_a_given_descriptor_is_copied(path: Path) -> None:
    path.write_bytes(b"abc")
    fd = os.open(path, os.O_RDONLY)
    node = opened(Path("/nowhere"), fd=fd, read_only=True)
    os.close(fd)
    assert get(node, 0, 3) == b"abc"
    node.close()


def test_what_does_not_open(tmp_path: Path, path: Path) -> None:
    with pytest.raises(NotFound) as caught:
        opened(tmp_path / "missing")
    assert caught.value.path == str(tmp_path / "missing")
    assert caught.value.hint
    with pytest.raises(BlockIOError, match="directory") as directory:
        opened(tmp_path, read_only=True)
    assert directory.value.errno == errno.EISDIR
    os.mkfifo(tmp_path / "fifo")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "s"))
    server.close()
    for name in ("fifo", "s", "/dev/null"):
        for read_only in (True, False):
            with pytest.raises(BlockIOError, match="it is a"):
                opened(tmp_path / name, read_only=read_only)
    with pytest.raises(OptionError):
        opened(path, force_share=True)
    with pytest.raises(OptionError):
        opened(Path("a\0b"))


# -- direct I/O


@pytest.fixture
def direct(path: Path) -> Path:
    try:
        node = opened(path, cache={"direct": True})
    except BlockIOError as error:
        pytest.skip(f"the file system of {path} has no direct I/O: {error}")
    assert isinstance(node, DirectFileStorage)
    node.close()
    return path


@pytest.mark.parametrize("size", [1, 1000, 4096, 10_000, (3 << 20) + 77])
def test_direct_io_keeps_bytes_and_size(direct: Path, size: int) -> None:
    model = bytearray(os.urandom(size))
    direct.write_bytes(model)
    node = opened(direct, **{"cache.direct": "on"})
    assert node.limits.request_alignment >= 512
    edge = Child(node, "test", grows=False)
    for offset, length in [(0, size), (0, 1), (size - 1, 1), (size // 2, size // 3), (size // 3, size - size // 3)]:
        assert get(node, offset, length) == model[offset : offset + length]
        piece = os.urandom(length)
        edge.write(offset, memoryview(piece), FUA if offset else 0)
        model[offset : offset + length] = piece
    assert node.size == size
    assert get(node, 0, size) == model
    edge.zero(size // 2, size // 4, MAY_UNMAP)
    model[size // 2 : size // 2 + size // 4] = bytes(size // 4)
    node.truncate(size + 700)
    node.close()
    assert direct.read_bytes() == model + bytes(700)


def test_direct_io_grows_by_whole_blocks(direct: Path) -> None:
    node = opened(direct, cache={"direct": True})
    Child(node, "test", grows=True).write(10, memoryview(b"abc"))
    align = node.limits.request_alignment
    assert node.size == direct.stat().st_size == align
    assert get(node, 0, align) == bytes(10) + b"abc" + bytes(align - 13)
    node.close()


def test_direct_io_by_many_threads(direct: Path) -> None:
    direct.write_bytes(bytes(100_000 - 7))
    node = opened(direct, cache={"direct": True})
    edge = Child(node, "test")

    def work(first: int) -> None:
        for offset in range(first * 97, 100_000 - 104, 97 * 12):
            edge.write(offset, memoryview(bytes([first + 1]) * 97))

    threads = [threading.Thread(target=work, args=(first,)) for first in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    node.close()
    stored = direct.read_bytes()
    assert len(stored) == 100_000 - 7
    last = max(offset for first in range(12) for offset in range(first * 97, 100_000 - 104, 97 * 12)) + 97
    assert stored[:last] == b"".join(bytes([at // 97 % 12 + 1]) * 97 for at in range(0, last, 97))


def test_a_truncate_that_changes_nothing_asks_the_system_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cutting an empty file to nothing makes ext4 write it to the disk when it is closed."""
    path = tmp_path / "disk"
    path.touch()
    node = FileStorage.open(FileStorage.schema.parse({"filename": str(path)}), Opener(read_only=False))
    cut: list[int] = []
    ftruncate = os.ftruncate
    monkeypatch.setattr(os, "ftruncate", lambda fd, size: (cut.append(size), ftruncate(fd, size))[1])
    node.truncate(0)
    assert cut == []
    node.truncate(1000)
    node.truncate(1000)
    node.truncate(0)
    assert cut == [1000, 0]
    node.close()
