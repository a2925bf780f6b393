"""The filter `cache`: its bound, the order of write-back, failures, and a status that knows what is dirty."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lamina
from lamina.errors import BlockIOError, OptionError
from lamina.filters.blocksize import BlockSize
from lamina.filters.cache import Cache
from lamina.image import Image
from lamina.request import Child
from lamina.storage.memory import MemoryStorage

UNIT = 512


class Recording(MemoryStorage):
    """Notes what reaches it; writes, or flushes, can be made to fail."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.seen: list[tuple[str, int, int]] = []
        self.fails: set[str] = set()

    def _note(self, name: str, offset: int = 0, length: int = 0) -> None:
        self.seen.append((name, offset, length))
        if name in self.fails:
            raise BlockIOError(f"no {name} at {offset}", errno=errno.ENOSPC)

    def read_into(self, offset: int, view: memoryview) -> None:
        self._note("read", offset, len(view))
        super().read_into(offset, view)

    def write(self, offset: int, view: memoryview, flags: int = 0) -> None:
        self._note("write", offset, len(view))
        super().write(offset, view, flags)

    def flush(self) -> None:
        self._note("flush")

    def taken(self) -> list[tuple[str, int, int]]:
        seen, self.seen = self.seen, []
        return seen


def cached(blocks: int, mode: str = "writeback", size: int = 64 * UNIT) -> tuple[Image, Recording]:
    storage = Recording(size)
    return Image(Cache(Child(storage, "image", grows=True), blocks, UNIT, mode)), storage


def test_a_block_is_read_once_and_the_oldest_makes_room() -> None:
    image, storage = cached(2)
    image.read(10, 10)
    image.read(500, 20)
    image.read(0, 10)
    assert storage.taken() == [("read", 0, UNIT), ("read", UNIT, UNIT)]
    image.read(2 * UNIT, 1)  # block 1 was not used for longest
    image.read(0, 1)
    image.read(UNIT, 1)
    assert storage.taken() == [("read", 2 * UNIT, UNIT), ("read", UNIT, UNIT)]
    image.read(0, 64 * UNIT)
    assert len(image.node._blocks) == 2  # type: ignore[attr-defined]


def test_a_flush_writes_in_the_order_of_offsets_then_flushes() -> None:
    image, storage = cached(8)
    for number in (5, 1, 3):
        image.write(number * UNIT, b"x" * UNIT)
    image.write(5 * UNIT + 100, b"y" * 50)
    image.write(7 * UNIT + 10, b"z" * 5)
    assert storage.taken() == [("read", 7 * UNIT, UNIT)], "a whole block is not read before it is written"
    image.flush()
    wrote = [("write", number * UNIT, UNIT) for number in (1, 3, 5)]
    assert storage.taken() == [*wrote, ("write", 7 * UNIT + 10, 5), ("flush", 0, 0)]
    image.flush()
    assert storage.taken() == [("flush", 0, 0)]
    image.write(0, b"f" * UNIT, fua=True)
    assert storage.taken() == [("write", 0, UNIT), ("flush", 0, 0)]


def test_writethrough_hands_down_at_once() -> None:
    image, storage = cached(8, "writethrough")
    image.read(0, 1)
    image.write(100, b"x" * UNIT)
    assert storage.taken() == [("read", 0, UNIT), ("write", 100, UNIT)]
    assert image.read(99, 2) == b"\0x"
    assert storage.taken() == []
    storage.fails = {"write"}
    with pytest.raises(BlockIOError, match="no write"):
        image.write(0, b"y")
    storage.fails = set()
    assert image.read(0, 101) == bytes(100) + b"x", "what was not written is not read"


def test_what_cannot_be_written_stays_dirty_and_each_flush_tells() -> None:
    image, storage = cached(8)
    image.write(0, b"x" * UNIT)
    image.write(4 * UNIT, b"y" * UNIT)
    storage.fails = {"write"}
    for _ in range(2):
        with pytest.raises(BlockIOError, match="no write at 0") as caught:
            image.flush()
        assert caught.value.errno == errno.ENOSPC
        assert [row[0] for row in storage.taken()] == ["write", "write"], "all is tried, and nothing is called flushed"
    storage.fails = {"flush"}
    with pytest.raises(BlockIOError, match="no flush"):
        image.flush()
    storage.fails = set()
    image.flush()
    assert Image(storage).read(0, 5 * UNIT) == b"x" * UNIT + bytes(3 * UNIT) + b"y" * UNIT


def test_a_dirty_block_that_cannot_go_keeps_its_place() -> None:
    image, storage = cached(2)
    image.write(0, b"x" * UNIT)
    image.read(UNIT, 1)
    storage.fails = {"write"}
    image.read(2 * UNIT, 1)  # block 1 goes instead of block 0
    image.write(2 * UNIT, b"y" * UNIT)
    with pytest.raises(BlockIOError, match="no write"):
        image.read(3 * UNIT, 1)  # all are dirty
    storage.fails = set()
    assert image.read(0, 3 * UNIT) == b"x" * UNIT + bytes(UNIT) + b"y" * UNIT
    image.flush()
    assert Image(storage).read(0, 3 * UNIT) == b"x" * UNIT + bytes(UNIT) + b"y" * UNIT


def test_the_status_of_what_is_dirty() -> None:
    image, storage = cached(8)
    image.write(100, b"x" * 5)
    rows = [(row.start, row.length, row.data, row.zero, row.present, row.depth, row.offset) for row in image.extents()]
    assert rows == [
        (0, 100, False, True, True, 0, 0),
        (100, 5, True, False, True, 0, None),
        (105, 64 * UNIT - 105, False, True, True, 0, 105),
    ]
    assert not image.root.reads_zero(104, 1)
    assert image.root.reads_zero(105, 1)
    image.flush()
    assert image.extents() == Image(storage).extents()
    assert image.node.host_base is None


def test_zeroes_and_discards_keep_what_is_dirty_beside_them() -> None:
    for name in ("zero", "discard"):
        image, storage = cached(8)
        image.write(0, b"x" * 100)
        image.write(300, b"y" * 100)
        getattr(image, name)(110, 100)
        assert image.read(0, UNIT) == b"x" * 100 + bytes(200) + b"y" * 100 + bytes(112)
        image.flush()
        assert Image(storage).read(0, UNIT) == b"x" * 100 + bytes(200) + b"y" * 100 + bytes(112)


def test_a_write_waits_for_the_block_that_is_being_read(monkeypatch: pytest.MonkeyPatch) -> None:
    image, storage = cached(8)
    read = storage.read_into
    writer = threading.Thread(target=image.write, args=(0, b"x" * 100))

    def late(offset: int, view: memoryview) -> None:
        read(offset, view)
        monkeypatch.undo()
        writer.start()
        writer.join(0.05)

    monkeypatch.setattr(storage, "read_into", late)
    assert image.read(0, 100) == bytes(100)
    writer.join()
    assert image.read(0, 100) == b"x" * 100


def test_it_grows_and_the_close_writes_back() -> None:
    storage = Recording(100)
    storage.close = lambda: None  # type: ignore[method-assign]
    file = Child(Cache(Child(storage, "image", grows=True), 2, UNIT), "file", grows=True)
    file.write(5000, memoryview(b"x" * 100))
    assert (file.size, storage.size) == (5100, 100)
    assert Image(file.node).read(0, 5100) == bytes(5000) + b"x" * 100
    file.close()
    assert storage.size == 5100
    assert Image(storage).read(4999, 101) == b"\0" + b"x" * 100


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_bound_holds_and_so_do_the_bytes(data: st.DataObject) -> None:
    image, storage = cached(
        data.draw(st.integers(1, 4)), data.draw(st.sampled_from(["writeback", "writethrough"])), 5000
    )
    flat = bytearray(5000)
    for value in range(1, data.draw(st.integers(2, 12))):
        offset = data.draw(st.integers(0, 4999))
        length = data.draw(st.integers(1, 5000 - offset))
        name = data.draw(st.sampled_from(["write", "zero", "read", "flush", "fail"]))
        storage.fails = {"write"} if name == "fail" else set()
        if name == "write":
            image.write(offset, bytes([value]) * length)
            flat[offset : offset + length] = bytes([value]) * length
        elif name == "zero":
            image.zero(offset, length)
            flat[offset : offset + length] = bytes(length)
        elif name == "read":
            assert image.read(offset, length) == flat[offset : offset + length]
        else:
            try:
                image.flush()
            except BlockIOError:
                assert name == "fail"
        assert len(image.node._blocks) <= image.node._capacity  # type: ignore[attr-defined]
    storage.fails = set()
    image.flush()
    assert Image(storage).read(0, 5000) == image.read(0, 5000) == flat


def test_options(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(4096))
    spec = {"driver": "cache", "blocks": 4, "block-size": "1k", "image": {"driver": "raw", "file.filename": str(path)}}
    with lamina.open(spec, read_only=False) as image:
        image.write(10, b"x")
        assert path.read_bytes() == bytes(4096)
    assert path.read_bytes()[:12] == bytes(10) + b"x\0"
    for changed in ({"block-size": 1000}, {"block-size": 0}, {"blocks": 0}, {"mode": "never"}):
        with pytest.raises(OptionError, match=next(iter(changed))):
            lamina.open({**spec, **changed})


def test_a_block_is_not_smaller_than_the_units_of_the_image() -> None:
    """The edge below would read a whole unit for each block of it: 64 GiB for a read of 512 bytes with units of 64 MiB."""
    unit = 64 * UNIT
    storage = Recording(8 * unit)
    node = BlockSize(Child(storage, "image", grows=True), minimum=unit)
    image = Image(Cache(Child(node, "image", grows=True), 128, UNIT))
    image.write(3 * unit + 5, b"written")
    assert image.read(3 * unit, 20) == bytes(5) + b"written" + bytes(8)
    image.flush()
    assert sum(length for name, _, length in storage.taken() if name == "read") == unit
    image.read(0, 8 * unit)  # two blocks fit into its bytes
    reads = [offset for name, offset, _ in storage.taken() if name == "read"]
    assert reads == [offset * unit for offset in range(8)]
    assert len(image.node._blocks) == 2  # type: ignore[attr-defined]
