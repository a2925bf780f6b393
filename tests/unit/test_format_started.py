"""A format starts reads in the child that holds the bytes, and keeps the rules of started requests (`pending.py`)."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lamina
from lamina.image import Image
from lamina.jobs.convert import convert
from lamina.pending import DONE, Pending
from lamina.request import Child
from lamina.storage.memory import MemoryStorage

UNIT, COUNT = 65536, 16


class Later:
    """A read that is carried out when somebody waits for it."""

    def __init__(self, storage: Far, offset: int, view: memoryview) -> None:
        self._read = lambda: MemoryStorage.read_into(storage, offset, view)
        self._storage, self._finished = storage, False

    def wait(self) -> None:
        if not self._finished:
            self._finished = True
            self._storage.in_flight -= 1
            self._read()

    def leave(self) -> None:
        self.wait()


class Far(MemoryStorage):
    """Storage that has reads in flight."""

    far = True
    in_flight = most = 0

    @property
    def pipelines(self) -> bool:
        return True

    def start_read(self, offset: int, view: memoryview) -> Pending:
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        return Later(self, offset, view)


def over(storage: Far, path: Path, **options: object) -> Image:
    """A qcow2 over `storage`, a copy of the file at `path`."""
    data = path.read_bytes()
    storage.truncate(len(data))
    storage.write(0, memoryview(data))
    spec = {"driver": "qcow2", "file": Child(storage, "file", grows=True), **options}
    return lamina.open(spec, read_only=False)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    lamina.create(path, "qcow2", UNIT * COUNT)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(0, bytes(range(256)) * (UNIT // 256 * 4))
        image.zero(4 * UNIT, UNIT)
    return path


def test_a_read_of_one_mapping_is_started_in_the_file(made: Path) -> None:
    storage = Far(0)
    with over(storage, made) as image:
        assert image.node.pipelines
        views = [memoryview(bytearray(2 * UNIT)) for _ in range(2)]
        requests = [image.root.start_read(at * UNIT, view) for at, view in enumerate(views)]
        assert storage.in_flight == 2
        for request in requests:
            request.wait()
        assert all(bytes(view) == bytes(range(256)) * (UNIT // 128) for view in views)


def test_other_reads_are_done_at_once(made: Path) -> None:
    storage = Far(0)
    with over(storage, made) as image:
        for at, length in ((3 * UNIT, 2 * UNIT), (4 * UNIT, UNIT), (8 * UNIT, UNIT)):
            view = memoryview(bytearray(b"?" * length))
            assert image.root.start_read(at, view) is DONE
            assert bytes(view) == image.read(at, length)
        assert storage.most == 0


def test_a_write_of_the_range_finishes_the_read_first(made: Path) -> None:
    storage = Far(0)
    with over(storage, made) as image:
        view = memoryview(bytearray(UNIT))
        request = image.root.start_read(0, view)
        assert storage.in_flight == 1
        image.write(0, b"x" * UNIT)
        assert storage.in_flight == 0
        assert bytes(view) == bytes(range(256)) * (UNIT // 256)
        request.wait()
        assert image.read(0, 1) == b"x"


def test_closing_finishes_what_was_started(made: Path) -> None:
    storage = Far(0)
    image = over(storage, made)
    view = memoryview(bytearray(UNIT))
    request = image.root.start_read(0, view)
    image.close()
    assert bytes(view) == bytes(range(256)) * (UNIT // 256)
    request.wait()


def test_convert_has_several_reads_in_flight_without_threads(made: Path, tmp_path: Path) -> None:
    lamina.create(tmp_path / "large.qcow2", "qcow2", 64 << 20)
    content = bytes(range(1, 256)) * (64 << 20 >> 8)
    with lamina.open(tmp_path / "large.qcow2", format="qcow2", read_only=False) as image:
        image.write(0, content)
    storage = Far(0)
    threads = threading.active_count()
    with over(storage, tmp_path / "large.qcow2") as image, Image(MemoryStorage(64 << 20)) as target:
        convert(image, target)
        assert target.read(0, len(content)) == content
    assert storage.most > 2
    assert threading.active_count() == threads


def test_started_reads_read_the_same(tmp_path: Path) -> None:
    """Of compressed clusters, of zeros, of nothing, and of a backing file, through any range."""

    @settings(max_examples=15)
    @given(st.text("cdz.", min_size=8, max_size=8), st.data())
    def law(kinds: str, data: st.DataObject) -> None:
        base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
        for path in (base, top):
            path.unlink(missing_ok=True)
        lamina.create(base, "qcow2", 4096 * 6, cluster_size=4096)
        lamina.create(top, "qcow2", 4096 * 8, cluster_size=4096)
        with lamina.open(base, format="qcow2", read_only=False) as image:
            image.write(0, b"b" * (4096 * 6))
        driver = {"driver": "compress", "image": {"driver": "qcow2", "file": {"driver": "file", "filename": str(top)}}}
        with lamina.open(top, format="qcow2", read_only=False) as image:
            for number, kind in enumerate(kinds):
                if kind == "d":
                    image.write(4096 * number, bytes([number + 1]) * 4096)
                elif kind == "z":
                    image.zero(4096 * number, 4096)
        with lamina.open(driver, read_only=False) as image:
            for number, kind in enumerate(kinds):
                if kind == "c":
                    image.write(4096 * number, bytes([number + 101]) * 4096)
        below, above = Far(0), Far(0)
        lower = over(below, base)
        with over(above, top, backing=Child(lower.node, "backing", read_only=True)) as image:
            lower.close()
            for _ in range(6):
                begin = data.draw(st.integers(0, image.size - 1))
                length = data.draw(st.integers(1, image.size - begin))
                view = memoryview(bytearray(b"?" * length))
                image.root.start_read(begin, view).wait()
                assert bytes(view) == image.read(begin, length)

    law()


def test_an_event_is_told_of_a_read_as_ever(made: Path) -> None:
    """`blkdebug` under the format hears of each read: nothing is started past it."""
    spec = {"driver": "qcow2", "file": {"driver": "blkdebug", "image": {"driver": "file", "filename": str(made)}}}
    with lamina.open(spec) as image:
        assert isinstance(image.node.children["file"], Child)
        view = memoryview(bytearray(UNIT))
        assert image.root.start_read(0, view) is DONE
        assert bytes(view) == image.read(0, UNIT)
