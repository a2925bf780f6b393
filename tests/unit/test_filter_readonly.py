"""The filter `readonly`: nothing below it changes, and files below it are opened for reading."""

from __future__ import annotations

from pathlib import Path

import pytest

import lamina
from lamina.errors import ReadOnly
from lamina.filters.readonly import ReadOnlyFilter
from lamina.image import Image
from lamina.request import Child
from lamina.storage.memory import MemoryStorage


def test_every_change_is_refused_and_nothing_changes() -> None:
    storage = MemoryStorage(100_000)
    Image(storage).write(5000, b"kept")
    image = Image(ReadOnlyFilter(Child(storage, "image", grows=True), read_only=False))
    assert image.read_only
    for change in (
        lambda: image.write(0, b"x"),
        lambda: image.write(5000, b"x", fua=True),
        lambda: image.zero(5000, 4),
        lambda: image.zero(4096, 4096, unmap=True, fast=True),
        lambda: image.discard(0, 65536),
        lambda: image.truncate(200_000),
        lambda: image.truncate(0),
    ):
        with pytest.raises(ReadOnly, match="open it without the filter readonly"):
            change()
    image.flush()
    assert image.size == storage.size == 100_000
    assert image.read(5000, 4) == b"kept"
    assert image.extents() == Image(storage).extents()


def test_a_writable_graph_opens_what_is_below_for_reading(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    lamina.create(path, "qcow2", 1 << 20)
    path.chmod(0o444)
    before = path.read_bytes()
    spec = {"driver": "readonly", "image": {"driver": "qcow2", "file": {"filename": str(path)}}}
    with lamina.open(spec, read_only=False) as image:
        assert image.read_only
        node = image.node.children["image"].node
        assert node.read_only
        assert node.children["file"].node.read_only
        # No lock for writing is held: another reader may come.
        with lamina.open(path, format="qcow2") as other:
            assert other.read(0, 10) == image.read(0, 10)
    assert path.read_bytes() == before
