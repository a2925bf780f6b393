"""What options ask of the request path: zeros that are found in writes, discards that are ignored; and how flushes fail."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.errors import BlockIOError
from lamina.request import is_zero


def open_with(path: Path, **options: Any) -> lamina.Image:
    return lamina.open({"driver": "qcow2", "file": {"filename": str(path)}, **options}, read_only=False)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    lamina.create(path, "qcow2", 1 << 20)
    return path


@pytest.mark.parametrize(("word", "stored"), [("off", 131072), ("on", 65536), ("unmap", 65536)])
def test_zeros_are_detected_where_asked(path: Path, word: str, stored: int) -> None:
    with open_with(path, **{"detect-zeroes": word}) as image:
        image.write(0, b"x" * 65536)
        image.write(65536, bytes(65536))
        assert image.extents().totals().data == stored
        assert image.read(65536, 65536) == bytes(65536)


def test_unmap_gives_the_place_back_and_on_keeps_it(path: Path) -> None:
    for word, kept in (("on", True), ("unmap", False)):
        with open_with(path, **{"detect-zeroes": word}) as image:
            image.write(0, b"x" * 65536)
            image.write(0, bytes(65536))
            assert (image.extents().at(0).offset is not None) is kept


def test_discards_are_ignored_where_asked(path: Path) -> None:
    with open_with(path, discard="ignore") as image:
        image.write(0, b"x" * 65536)
        image.discard(0, 65536)
        assert image.read(0, 3) == b"xxx"
        image.zero(0, 65536, unmap=True)
        assert image.extents().at(0).offset is not None
        image.write(0, b"x" * 65536)
    with open_with(path, discard="unmap") as image:
        image.discard(0, 65536)
        assert image.read(0, 3) == bytes(3)


def test_a_probed_image_is_asked_the_same(path: Path) -> None:
    spec = {"file": {"filename": str(path)}, "detect-zeroes": "on", "discard": "ignore"}
    with lamina.open(spec, format="probe", read_only=False) as image:
        image.write(0, b"x" * 65536 + bytes(65536))
        image.write(65536, bytes(65536))
        assert image.extents(65536, 65536).totals().data == 0
        image.discard(0, 65536)
        assert image.read(0, 3) == b"xxx"


@pytest.mark.parametrize("options", [{"detect-zeroes": "maybe"}, {"discard": "yes please"}])
def test_other_words_are_refused(path: Path, options: dict[str, str]) -> None:
    with pytest.raises(lamina.OptionError, match="it takes one of"):
        open_with(path, **options)


@pytest.mark.parametrize("length", [1, 511, 65536, 65537, 300000])
def test_is_zero_looks_at_every_byte(length: int) -> None:
    buffer = bytearray(length)
    assert is_zero(memoryview(buffer))
    for at in {0, length // 2, length - 1}:
        buffer[at] = 1
        assert not is_zero(memoryview(buffer))
        buffer[at] = 0


def test_a_failed_flush_reaches_every_waiter_and_is_not_healed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel forgets what it could not write: a later flush that succeeds says nothing about it."""
    failing = True

    def fdatasync(_: int) -> None:
        if failing:
            raise OSError(5, "Input/output error")

    image = open_with(path)
    image.write(0, b"x" * 65536)
    monkeypatch.setattr(os, "fdatasync", fdatasync)
    results: list[Any] = []

    def flush() -> None:
        try:
            image.flush()
            results.append(None)
        except BlockIOError as error:
            results.append(error.errno)

    threads = [threading.Thread(target=flush) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [5] * 4
    failing = False
    with pytest.raises(BlockIOError):
        image.flush()
    with pytest.raises(BlockIOError):
        image.close()
    with open_with(path) as again:
        again.flush()
