"""The filter `preallocate`: how far ahead the file is, and that it is cut back."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

import lamina
from lamina.errors import BlockIOError, NotSupported
from lamina.filters.preallocate import Preallocate
from lamina.image import Image
from lamina.request import Child
from lamina.testing.disk import in_threads
from lamina.testing.formats import KeptMemory
from lamina.testing.model import check_status


class Storage(KeptMemory):
    """Memory that is still there when it is closed; zeroes and growth can be made to fail."""

    fails: tuple[str, ...] = ()

    def zero(self, offset: int, length: int, flags: int = 0) -> None:
        if "zero" in self.fails:
            raise NotSupported("no zeroes here")
        super().zero(offset, length, flags)

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        super().write(offset, view, flags)
        if "write" in self.fails:
            raise BlockIOError("torn", errno=errno.EIO)

    def truncate(self, size: int) -> None:
        if "truncate" in self.fails and size > self.size:
            raise BlockIOError("no room", errno=errno.ENOSPC)
        super().truncate(size)

    def close(self) -> None:
        pass


def over(storage: Storage, step: int = 10_000, align: int = 4096) -> Child:
    return Child(Preallocate(Child(storage, "image", grows=True), step, align), "file", grows=True)


def put(child: Child, offset: int, data: bytes) -> None:
    child.write(offset, memoryview(data))


@pytest.mark.parametrize("fails", [(), ("zero",)])
def test_it_grows_in_steps_and_is_cut_at_the_close(fails: tuple[str, ...]) -> None:
    storage = Storage(100)
    storage.fails = fails
    file = over(storage)
    assert (file.size, storage.size) == (100, 100)
    put(file, 100, b"x" * 50)
    assert (file.size, storage.size) == (150, 12288)
    put(file, 150, b"y" * 12_000)
    assert (file.size, storage.size) == (12_150, 12_288)
    put(file, 12_150, b"z" * 139)
    assert (file.size, storage.size) == (12_289, 24_576)
    assert len(Image(file.node).extents()) == 1
    file.close()
    assert storage.size == 12_289
    assert Image(storage).read(100, 12_189) == b"x" * 50 + b"y" * 12_000 + b"z" * 139


def test_zeroes_grow_it_too_and_gaps_read_as_zero() -> None:
    storage = Storage()
    file = over(storage)
    file.zero(500, 500)
    put(file, 3000, b"x")
    assert Image(file.node).read(0, 3001) == bytes(3000) + b"x"
    check_status(Image(file.node).extents(), 0, bytes(3000) + b"x")


def test_truncate_cuts_what_is_ahead() -> None:
    storage = Storage()
    file = over(storage)
    put(file, 0, b"x" * 5000)
    file.truncate(4000)
    assert (file.size, storage.size) == (4000, 4000)
    file.truncate(6000)
    assert (file.size, storage.size) == (6000, 6000)
    assert Image(file.node).read(0, 6000) == b"x" * 4000 + bytes(2000)


def test_no_room_ahead_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    storage = Storage()
    storage.fails = ("zero", "truncate")
    file = over(storage)
    put(file, 0, b"x" * 100)
    assert (file.size, storage.size) == (100, 100)
    assert "no room" in caplog.text


def test_a_torn_write_leaves_nothing_past_the_size() -> None:
    storage = Storage()
    file = over(storage)
    put(file, 0, b"x" * 100)
    storage.fails = ("write",)
    with pytest.raises(BlockIOError, match="torn"):
        put(file, 200, b"garbage")
    storage.fails = ()
    assert (file.size, storage.size) == (100, 100)
    put(file, 300, b"y")
    assert Image(file.node).read(0, 301) == b"x" * 100 + bytes(200) + b"y"


def test_taken_out_of_the_graph_it_leaves_the_exact_length() -> None:
    storage = Storage()
    file = over(storage)
    put(file, 0, b"x" * 5000)
    image = Image(file.node)
    with image.edit() as edit:
        edit.remove(file.node)
    assert (image.node, image.size, storage.size) == (storage, 5000, 5000)


def test_many_threads_append() -> None:
    storage = Storage()
    file = over(storage, 1, 1)

    def append(thread: int) -> None:
        for turn in range(50):
            put(file, (turn * 4 + thread) * 100, bytes([thread + 1]) * 100)

    in_threads([lambda thread=thread: append(thread) for thread in range(4)])  # type: ignore[misc]
    assert Image(file.node).read(0, file.size) == b"".join(bytes([n + 1]) * 100 for n in range(4)) * 50
    file.close()
    assert storage.size == 20_000


def test_below_a_format_on_a_file(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    lamina.create(path, "qcow2", 8 << 20)
    file = {"driver": "preallocate", "prealloc-size": "4M", "image": {"driver": "file", "filename": str(path)}}
    with lamina.open({"driver": "qcow2", "file": file}, read_only=False) as image:
        image.write(0, b"x" * 100_000)
        assert path.stat().st_size >= 4 << 20
    assert path.stat().st_size < 1 << 20
    with lamina.open(path, format="qcow2") as image:
        assert image.read(0, 100_001) == b"x" * 100_000 + b"\0"
