"""The filter `copy_on_read`: what is read once is in the top layer, and nothing else changes."""

from __future__ import annotations

import errno
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.errors import BlockIOError
from lamina.filters.copy_on_read import CopyOnRead
from lamina.image import Image
from lamina.request import Child
from lamina.testing.disk import in_threads

SIZE = 10 << 16


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """An empty overlay of 64 KiB clusters; below it three clusters of ones, two of zeros, and nothing."""
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    lamina.create(base, "qcow2", SIZE)
    with lamina.open(base, format="qcow2", read_only=False) as image:
        image.write(0, b"\x01" * (3 << 16))
        image.zero(3 << 16, 2 << 16)
    lamina.create(top, "qcow2", SIZE, backing_file="base.qcow2", backing_fmt="qcow2")
    return top


def opened(top: Path, *, read_only: bool = False) -> Image:
    image = {"driver": "qcow2", "file.filename": str(top)}
    return lamina.open({"driver": "copy_on_read", "image": image}, read_only=read_only)


def owned(image: Image) -> str:
    """The clusters of the top layer: D for data, Z for zero, a dot for what is not there."""
    rows = image.extents()
    return "".join(("." if row.depth or not row.present else "DZ"[row.zero]) * (row.length >> 16) for row in rows)


def test_what_is_read_is_kept(top: Path) -> None:
    with opened(top) as image:
        assert owned(image) == ".........."
        assert image.read(1 << 16, 100) == b"\x01" * 100
        assert owned(image) == ".D........"
        assert image.read(0, SIZE) == b"\x01" * (3 << 16) + bytes(7 << 16)
        assert owned(image) == "DDDZZ.....", "what nobody owns is not copied"
    with lamina.open(top, format="qcow2") as image:
        assert owned(image) == "DDDZZ....."
        assert image.read(0, SIZE) == b"\x01" * (3 << 16) + bytes(7 << 16)


def test_it_is_kept_once(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(top) as image:
        format = image.node.children["image"].node
        written: list[int] = []
        write = format.write

        def slowly(offset: int, *rest: Any) -> None:
            written.append(offset)
            time.sleep(0.02)  # so that the others come to look
            write(offset, *rest)

        monkeypatch.setattr(format, "write", slowly)
        in_threads([lambda: image.read_into(0, bytearray(3 << 16))] * 4)
        assert written == [0]


def test_a_read_never_undoes_a_write(top: Path) -> None:
    with opened(top) as image:
        stop = threading.Event()

        def write() -> None:
            try:
                for at in range(0, 3 << 16, 512):
                    image.write(at, b"\x02" * 512)
            finally:
                stop.set()

        def read() -> None:
            while not stop.is_set():
                image.read(0, 3 << 16)

        in_threads([write, read, read])
        assert image.read(0, 3 << 16) == b"\x02" * (3 << 16)


def test_a_write_waits_for_the_copy(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(top) as image:
        format = image.node.children["image"].node
        read = format.read_into
        writer = threading.Thread(target=image.write, args=(100, b"\x02" * 100))

        def late(offset: int, view: memoryview) -> None:
            read(offset, view)
            writer.start()
            writer.join(0.05)

        with monkeypatch.context() as patched:
            patched.setattr(format, "read_into", late)
            image.read(0, 1 << 16)
            writer.join()
        assert image.read(0, 300) == b"\x01" * 100 + b"\x02" * 100 + b"\x01" * 100


def test_a_copy_that_fails_does_not_fail_the_read(
    top: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(top) as image:

        def full(*_: object) -> None:
            raise BlockIOError("no room", errno=errno.ENOSPC)

        monkeypatch.setattr(image.node.children["image"].node, "write", full)
        assert image.read(0, 3 << 16) == b"\x01" * (3 << 16)
        assert owned(image) == ".........."
        assert "no room" in caplog.text


def test_an_error_of_the_backing_image_is_told(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(top) as image:

        def broken(*_: object) -> None:
            raise BlockIOError("broken", errno=errno.EIO)

        backing = image.node.children["image"].node.children["backing"].node
        with monkeypatch.context() as patched:
            patched.setattr(backing, "read_into", broken)
            with pytest.raises(BlockIOError, match="broken"):
                image.read(0, 100)
        assert owned(image) == ".........."


def test_read_only_it_copies_nothing(top: Path) -> None:
    before = top.read_bytes()
    with opened(top, read_only=True) as image:
        assert image.read(0, 100) == b"\x01" * 100
    assert top.read_bytes() == before


def test_it_also_lies_over_other_filters(top: Path) -> None:
    with lamina.open(top, format="qcow2", read_only=False) as image:
        filters = CopyOnRead(Child(CopyOnRead(Child(image.node, "image")), "image"))
        with Image(filters) as twice:
            assert twice.read(0, 100) == b"\x01" * 100
            assert owned(twice) == "D........."
