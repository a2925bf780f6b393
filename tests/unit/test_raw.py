"""The format `raw`: an exact pass-through, also of a window, by the library and side by side with QEMU."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.errors import NotSupported, OptionError
from lamina.formats.raw import Raw
from lamina.graph import Opener, open_graph
from lamina.limits import Limits
from lamina.node import FUA, MAY_UNMAP
from lamina.request import Child
from lamina.storage.memory import PAGE, MemoryStorage
from lamina.storage.null import NullStorage


def over(storage: MemoryStorage, **window: int) -> Child:
    options = Raw.schema.parse({"file": Child(storage, "file", grows=True), **window})
    return Child(Raw.open(options, Opener(read_only=False)), "root")


def filled(size: int) -> tuple[MemoryStorage, bytearray]:
    model = bytearray(random.Random(size).randbytes(size))
    storage = MemoryStorage(size)
    storage.write(0, memoryview(model))
    return storage, model


def get(edge: Child, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    edge.read_into(offset, memoryview(buffer))
    return bytes(buffer)


@pytest.mark.parametrize(
    ("window", "begin", "end"),
    [
        ({}, 0, 300_001),
        ({"offset": 77}, 77, 300_001),
        ({"size": 1000}, 0, 1000),
        ({"offset": PAGE, "size": PAGE}, PAGE, 2 * PAGE),
    ],
)
def test_every_operation_in_a_window(window: dict[str, int], begin: int, end: int) -> None:
    storage, model = filled(300_001)
    disk = over(storage, **window)
    size = end - begin
    assert (disk.size, disk.node.growable) == (size, False)
    assert disk.node.host_base == (storage, begin)
    assert get(disk, 0, size) == model[begin:end]
    disk.write(size - 5, memoryview(b"tail!"), FUA)
    model[end - 5 : end] = b"tail!"
    disk.zero(3, 100, MAY_UNMAP)
    model[begin + 3 : begin + 103] = bytes(100)
    disk.discard(200, 300)
    model[begin + 200 : begin + 500] = bytes(300)
    disk.flush()
    assert get(Child(storage, "all"), 0, len(model)) == model
    assert disk.reads_zero(0, size) is False


def test_extents_are_shifted_and_their_host_offsets_are_not() -> None:
    storage, _ = filled(4 * PAGE)
    storage.discard(PAGE, PAGE)
    disk = over(storage, offset=PAGE // 2, size=3 * PAGE)
    assert [(e.start, e.end, e.data, e.zero, e.present, e.offset, e.file) for e in disk.extents(0, disk.size)] == [
        (0, PAGE // 2, True, False, True, PAGE // 2, storage),
        (PAGE // 2, PAGE // 2 + PAGE, False, True, True, PAGE, storage),
        (PAGE // 2 + PAGE, 3 * PAGE, True, False, True, 2 * PAGE, storage),
    ]
    assert [(e.start, e.offset) for e in disk.extents(PAGE, 10)] == [(PAGE, PAGE + PAGE // 2)]
    assert disk.reads_zero(PAGE // 2, PAGE)


def test_limits_are_inherited_where_the_window_keeps_them_aligned() -> None:
    class Limited(MemoryStorage):
        @property
        def limits(self) -> Limits:
            return Limits(request_alignment=512, zero_alignment=4096, discard_alignment=1024, max_transfer=1 << 20)

    storage = Limited(1 << 20)
    assert over(storage).node.limits == storage.limits
    assert over(storage, offset=4096).node.limits == storage.limits
    assert over(storage, offset=1024).node.limits == Limits(
        request_alignment=512, zero_alignment=1, discard_alignment=1024, max_transfer=1 << 20
    )
    disk = over(storage, offset=100)
    assert disk.node.limits.request_alignment == 1
    disk.write(0, memoryview(b"abc"))
    assert get(Child(storage, "all"), 98, 7) == b"\0\0abc\0\0"


def test_a_window_must_be_inside() -> None:
    for window in ({"offset": 101}, {"size": 101}, {"offset": 50, "size": 51}, {"offset": 1, "size": (1 << 63) - 1}):
        with pytest.raises(OptionError) as caught:
            over(MemoryStorage(100), **window)
        assert caught.value.hint
    assert over(MemoryStorage(100), offset=100).size == 0
    assert over(MemoryStorage(100), offset=100, size=0).size == 0


def test_truncate() -> None:
    storage, _ = filled(1000)
    over(storage).truncate(1500)
    assert storage.size == 1500
    over(storage, offset=500).truncate(10)
    assert storage.size == 510
    with pytest.raises(NotSupported):
        over(storage, size=100).truncate(50)


def test_create() -> None:
    storage = MemoryStorage()
    options = Raw.create_schema.parse({"size": "10k"})
    Raw.create(Child(storage, "file", grows=True), options["size"], options)
    assert storage.size == 10240
    device = NullStorage(1000)  # like a device, it cannot change its length
    Raw.create(Child(device, "file"), 1000, {})
    with pytest.raises(OptionError):
        Raw.create(Child(device, "file"), 1001, {})


def test_files_through_the_graph(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"0123456789")
    node = open_graph(
        {"driver": "raw", "offset": "2", "size": 5, "file": {"driver": "file", "filename": str(path)}}, read_only=False
    )
    root = Child(node, "root")
    assert get(root, 0, 5) == b"23456"
    root.write(1, memoryview(b"x"))
    root.close()
    assert path.read_bytes() == b"012x456789"


@pytest.mark.peers
def test_map_agrees_with_qemu(qemu: Any, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    with path.open("wb") as file:
        for start in (0, 3 << 16, 9 << 16):
            file.seek(start)
            file.write(b"x" * (1 << 16))
        file.truncate((10 << 16) + 1024)
    node = open_graph(str(path), format="raw")
    ours = [(e.start, e.length, e.data, e.zero, e.depth, e.offset) for e in node.extents(0, node.size)]
    theirs = [
        (row["start"], row["length"], row["data"], row["zero"], row["depth"], row.get("offset"))
        for row in qemu.map(path, "raw")
    ]
    node.close()
    assert ours == theirs


@pytest.mark.parametrize("how", ["off", "falloc", "full"])
@pytest.mark.parametrize("size", [0, 1000, 3 << 20])
def test_storage_that_a_new_disk_has(tmp_path: Path, how: str, size: int) -> None:
    path = tmp_path / "disk"
    lamina.create(path, "raw", size, preallocation=how, nocow="on", extent_size_hint="1M")
    assert path.read_bytes() == bytes(size)
    stored = path.stat().st_blocks * 512
    assert stored == 0 if how == "off" else stored >= size


def test_a_new_disk_has_no_metadata(tmp_path: Path) -> None:
    for options in ({"preallocation": "metadata"}, {"nocow": "maybe"}, {"extent_size_hint": "x"}, {"nosuch": 1}):
        with pytest.raises(OptionError):
            lamina.create(tmp_path / "disk", "raw", 1000, **options)
    assert not (tmp_path / "disk").exists()
