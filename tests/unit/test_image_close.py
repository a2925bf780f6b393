"""Closing an image: beside requests, from several threads, twice; and what a closed image and its file-like view say.

`LAMINA_CLOSE_RACES=N` runs N rounds of the race (a few seconds for every hundred)."""

from __future__ import annotations

import errno
import io
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import lamina
from lamina.filters.cache import Cache
from lamina.filters.delay import Delay
from lamina.graph import open_graph
from lamina.image import Image
from lamina.limits import Limits
from lamina.node import FilterNode
from lamina.request import Child
from lamina.storage.memory import MemoryStorage

KIB = 1024
SIZE = 1024 * KIB
ROUNDS = int(os.environ.get("LAMINA_CLOSE_RACES", "60"))
PATIENCE = 20.0
MARK = b"foreign bytes!"


class Writer(threading.Thread):
    """Writes its own part of the disk until it is closed, and remembers what was acknowledged."""

    def __init__(self, image: Image, start: int, length: int, seed: str) -> None:
        super().__init__(daemon=True)
        self._image = image
        self._start, self._length = start, length
        self._rng = random.Random(seed)
        self.acknowledged: dict[int, bytes] = {}
        self.failed: set[int] = set()
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            for number in range(1 << 20):
                at = self._start + self._rng.randrange(self._length // 512) * 512
                data = number.to_bytes(4, "little") * 128
                try:
                    self._image.write(at, data)
                except lamina.Closed:
                    self.failed.add(at)
                    return
                self.acknowledged[at] = data
        except BaseException as error:  # noqa: BLE001 - told by the thread that waits for this one
            self.error = error


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_close_beside_writers(tmp_path: Path, form: str, seed: int) -> None:
    rng = random.Random(f"{seed}/{form}")
    path, foreign = tmp_path / "disk", tmp_path / "foreign"
    for number in range(ROUNDS):
        path.unlink(missing_ok=True)
        lamina.create(path, form, SIZE, **({"cluster_size": 4096} if form == "qcow2" else {}))
        image = lamina.open(path, format=form, read_only=False)
        part = SIZE // 3
        writers = [Writer(image, index * part, part, f"{seed}/{number}/{index}") for index in range(3)]
        for writer in writers:
            writer.start()
        time.sleep(rng.random() * 0.004)
        image.close()
        # The descriptor's number is free, and becomes this file's.
        fds = [os.open(foreign, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600) for _ in range(3)]
        try:
            os.pwrite(fds[0], MARK, 0)
            for writer in writers:
                writer.join(PATIENCE)
                assert not writer.is_alive(), "a writer waits for ever"
                assert writer.error is None, writer.error
            assert os.pread(fds[0], SIZE, 0) == MARK
        finally:
            for fd in fds:
                os.close(fd)
        with lamina.open(path, format=form) as again:
            for writer in writers:
                for at, data in writer.acknowledged.items():
                    assert again.read(at, 512) == data, f"round {number}: an acknowledged write at {at} is lost"
            if form == "qcow2":
                assert again.node.check().clean  # type: ignore[attr-defined]


@pytest.fixture
def slow() -> Iterator[Image]:
    """An image whose reads take a fifth of a second."""
    with Image(Delay(Child(MemoryStorage(SIZE), "image"), read_ms=200)) as image:
        yield image


def test_close_from_several_threads_at_once_and_again(slow: Image) -> None:
    done: list[bytes] = []
    reader = threading.Thread(target=lambda: done.append(slow.read(0, 4)))
    reader.start()
    while not slow.root.gate.inside:
        time.sleep(0.001)
    closers = [threading.Thread(target=slow.close) for _ in range(4)]
    for closer in closers:
        closer.start()
    for closer in closers:
        closer.join(PATIENCE)
        assert not closer.is_alive()
    reader.join(PATIENCE)
    assert done == [bytes(4)]  # it was inside, and came to its end
    slow.close()
    with pytest.raises(lamina.Closed):
        slow.read(0, 4)


def test_who_waits_behind_an_edit_is_told_that_the_image_was_closed(slow: Image) -> None:
    said: list[str] = []

    def ask() -> None:
        try:
            slow.flush()
        except lamina.Closed as error:
            said.append(error.message)

    root = slow.root
    with slow.edit():
        waiting = [threading.Thread(target=ask) for _ in range(3)]
        closer = threading.Thread(target=slow.close)
        for thread in (*waiting, closer):
            thread.start()
        deadline = time.monotonic() + PATIENCE
        while len(said) < 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert not root.closed  # not before the edit is done
    closer.join(PATIENCE)
    assert root.closed
    for thread in waiting:
        thread.join(PATIENCE)
    assert said == ["this image was closed"] * 3
    with pytest.raises(lamina.Closed):
        slow.edit()


def test_a_long_request_ends_early(tmp_path: Path) -> None:
    """Closing waits for one step of it, not for the whole."""

    class Slow(FilterNode):
        driver = "slow"
        steps = 0

        @property
        def limits(self) -> Limits:
            return Limits(max_zero=4096)

        def zero(self, offset: int, length: int, flags: int = 0) -> None:
            self.steps += 1
            time.sleep(0.001)

    node = Slow(Child(MemoryStorage(1 << 40), "image"))
    image = Image(node)
    said: list[BaseException] = []

    def zero() -> None:
        try:
            image.zero(0, 1 << 40)
        except lamina.Closed as error:
            said.append(error)

    thread = threading.Thread(target=zero, daemon=True)
    thread.start()
    while not node.steps:
        time.sleep(0.001)
    image.close()
    thread.join(PATIENCE)
    assert len(said) == 1


class Full(FilterNode):
    """Takes no write."""

    driver = "full"

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        raise lamina.BlockIOError("no room", errno=errno.ENOSPC)


def test_a_close_that_fails_gives_back_the_file(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(SIZE))
    storage = open_graph(str(path), format="raw", read_only=False)
    image = Image(Cache(Child(Full(Child(storage, "image")), "image")))
    image.write(0, b"held back")
    with pytest.raises(lamina.BlockIOError, match="no room"):
        image.close()
    image.close()
    assert not storage.held
    with lamina.open(path, format="raw", read_only=False):  # its lock was given back too
        pass


def test_a_closed_view_and_a_view_of_a_closed_image(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"0123456789" * 100)
    image = lamina.open(path, format="raw", read_only=False)
    view, left = image.as_file(), image.as_file()
    assert view.read(4) == b"0123"
    view.close()
    image_closed = [left]
    assert image.read(0, 2) == b"01"  # the view is closed, not the image

    def ask_all(file: io.RawIOBase) -> None:
        for ask in (
            lambda: file.read(4),
            lambda: file.read(),
            lambda: file.readall(),
            lambda: file.readinto(bytearray(4)),  # type: ignore[attr-defined]
            lambda: file.write(b"x"),  # type: ignore[attr-defined]
            lambda: file.seek(0),
            lambda: file.tell(),
            lambda: file.truncate(4),
            lambda: file.readable(),
            lambda: file.writable(),
            lambda: file.seekable(),
            lambda: next(iter(file)),
        ):
            with pytest.raises(ValueError, match="closed"):
                ask()

    ask_all(view)
    image.close()
    ask_all(image_closed[0])
    image_closed[0].close()
    assert path.read_bytes() == b"0123456789" * 100


class Reader(threading.Thread):
    """Reads through a view, at random places, until it is told that the image is closed."""

    def __init__(self, view: io.RawIOBase | io.BufferedReader, content: bytes, seed: str) -> None:
        super().__init__(daemon=True)
        self._view, self._content = view, content
        self._rng = random.Random(seed)
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            while True:
                at = self._rng.randrange(len(self._content) - 5000)
                self._view.seek(at)
                found = self._view.read(5000)
                assert found is not None
                assert self._content[at : at + len(found)] == found
        except BaseException as error:  # noqa: BLE001 - told by the thread that waits for this one
            self.error = error


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_close_beside_readers_of_views(tmp_path: Path, form: str, seed: int) -> None:
    """Threads read through `as_file`, raw and buffered, while another one closes the image: each reads right bytes until it
    is told, and no lock stays."""
    rng = random.Random(f"{seed}/{form}")
    content = rng.randbytes(4096) * (SIZE // 4096)
    path = tmp_path / "disk"
    lamina.create(path, form, SIZE)
    with lamina.open(path, format=form, read_only=False) as image:
        image.write(0, content)
    for number in range(ROUNDS // 3):
        image = lamina.open(path, format=form, read_only=False)
        raw = [image.as_file(), image.as_file()]
        buffered = [io.BufferedReader(image.as_file()), io.BufferedReader(image.as_file())]
        readers = [Reader(view, content, f"{seed}/{number}/{index}") for index, view in enumerate([*raw, *buffered])]
        for reader in readers:
            reader.start()
        time.sleep(rng.random() * 0.004)
        image.close()
        with lamina.open(path, format=form, read_only=False):
            pass
        for reader in readers:
            reader.join(PATIENCE)
            assert not reader.is_alive(), "a reader waits for ever"
            assert type(reader.error) is lamina.Closed, reader.error
        for view in [*raw, *buffered]:
            view.close()


@pytest.mark.parametrize(("offset", "length"), [(0, 2 << 30), (0, -5), (0, 1 << 40), (1 << 62, 1 << 62), (-1, 1 << 40)])
def test_a_read_outside_the_disk_asks_for_no_memory(offset: int, length: int) -> None:
    import tracemalloc

    with Image(MemoryStorage(SIZE)) as image:
        tracemalloc.start()
        try:
            with pytest.raises(lamina.OutOfRange):
                image.read(offset, length)
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()


def test_a_view_asks_for_no_more_memory_than_the_disk_has() -> None:
    import tracemalloc

    with Image(MemoryStorage(1000)) as image, image.as_file() as view:
        image.write(0, b"abc")
        tracemalloc.start()
        try:
            assert view.read(1 << 40) == b"abc" + bytes(997)
            assert view.read(1 << 40) == b""
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()
