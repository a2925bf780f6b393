"""The filter `noextents`: all is data, whatever lies below."""

from __future__ import annotations

from pathlib import Path

import lamina
from lamina.filters.noextents import NoExtents
from lamina.image import Image
from lamina.request import Child
from lamina.storage.memory import MemoryStorage


def test_an_empty_disk_is_one_extent_of_data() -> None:
    storage = MemoryStorage(1 << 30)
    node = NoExtents(Child(storage, "image"))
    (row,) = Image(node).extents(12_345, 1 << 20)
    assert (row.start, row.length, row.data, row.zero, row.present) == (12_345, 1 << 20, True, False, True)
    assert row.file is None
    assert Image(storage).root.reads_zero(0, 1 << 20)
    assert not Image(node).root.reads_zero(0, 1 << 20)
    assert len(Image(node).extents(5, 0)) == 0


def test_bytes_zeroes_and_discards_pass() -> None:
    storage = MemoryStorage(1 << 20)
    image = Image(NoExtents(Child(storage, "image")))
    image.write(1000, b"data")
    assert Image(storage).read(1000, 4) == b"data"
    image.zero(0, 65536)
    assert storage.allocated == 0
    image.write(0, b"data")
    image.discard(0, 65536)
    assert storage.allocated == 0


def test_over_a_chain_it_hides_the_layers(tmp_path: Path) -> None:
    lamina.create(tmp_path / "base.qcow2", "qcow2", 1 << 20)
    with lamina.open(tmp_path / "base.qcow2", format="qcow2", read_only=False) as base:
        base.write(0, b"base")
    lamina.create(tmp_path / "top.qcow2", "qcow2", backing_file="base.qcow2", backing_fmt="qcow2")
    image = {"driver": "qcow2", "file": {"filename": str(tmp_path / "top.qcow2")}}
    with lamina.open({"driver": "noextents", "image": image}) as top:
        assert top.read(0, 4) == b"base"
        assert [(row.data, row.depth) for row in top.extents()] == [(True, 0)]
