"""Changing the size of a disk beside requests: what was cut off stays so; and what a change that failed leaves.

`LAMINA_TRUNCATE_RACES=N` runs N rounds of each race (a few seconds for every thousand)."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina.filters.cache import Cache
from lamina.filters.preallocate import Preallocate
from lamina.image import Image
from lamina.node import FilterNode
from lamina.request import Child
from lamina.storage.memory import MemoryStorage

KIB = 1024
SIZE = 256 * KIB
ROUNDS = int(os.environ.get("LAMINA_TRUNCATE_RACES", "150"))
PATIENCE = 20.0

CHANGES: dict[str, Callable[[Image], object]] = {
    "write": lambda image: image.write(SIZE - 8 * KIB, b"x" * 4 * KIB),
    "zero": lambda image: image.zero(SIZE - 8 * KIB, 4 * KIB),
    "a write of zeros": lambda image: image.write(SIZE - 8 * KIB, bytes(4 * KIB)),
}
GRAPHS: dict[str, Callable[[str], dict[str, Any]]] = {
    "raw": lambda path: {"driver": "raw", "detect-zeroes": "on", "file": {"driver": "file", "filename": path}},
    "file": lambda path: {"driver": "file", "filename": path},
    "filter": lambda path: {"driver": "nodiscard", "image": {"driver": "raw", "file.filename": path}},
    "cache": lambda path: {"driver": "cache", "image": {"driver": "file", "filename": path}},
}


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_was_cut_stays_short(tmp_path: Path, graph: str, change: str) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    with lamina.open(GRAPHS[graph](str(path)), read_only=False) as image:
        stop, unexpected = threading.Event(), []

        def work() -> None:
            try:
                while not stop.is_set():
                    try:
                        CHANGES[change](image)
                    except lamina.OutOfRange:
                        continue
            except BaseException as error:  # noqa: BLE001 - told by the thread that waits for this one
                unexpected.append(error)

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(ROUNDS // 6):
                image.truncate(SIZE)
                image.truncate(SIZE // 2)
                for _ in range(3):
                    assert image.size == path.stat().st_size == SIZE // 2
        finally:
            stop.set()
            for thread in threads:
                thread.join(PATIENCE)
        assert not unexpected
        assert image.size == SIZE // 2
    assert path.stat().st_size == SIZE // 2


class Half(FilterNode):
    """Changes the size, and then says that it failed."""

    driver = "half"

    def truncate(self, size: int) -> None:
        super().truncate(size)
        raise lamina.BlockIOError("it broke", errno=errno.EIO)


@pytest.mark.parametrize("kind", [Cache, Preallocate])
def test_the_size_after_a_change_that_failed(kind: Any) -> None:
    storage = MemoryStorage(SIZE)
    with Image(kind(Child(Half(Child(storage, "image", grows=True)), "image", grows=True))) as image:
        image.write(0, b"first")
        image.write(SIZE - 5, b"last!")
        for size in (SIZE // 2, SIZE // 4):
            with pytest.raises(lamina.BlockIOError, match="it broke"):
                image.truncate(size)
            assert image.size == storage.size == size
            assert image.read(0, 5) == b"first"
            assert image.read(size - 5, 5) == bytes(5)
            with pytest.raises(lamina.OutOfRange):
                image.read(size, 1)
        image.flush()


def test_a_format_that_failed_half_way_under_a_cache(tmp_path: Path) -> None:
    """The size is announced first: the disk is short, though what was cut off is not freed."""
    path = tmp_path / "disk.qcow2"
    lamina.create(path, "qcow2", SIZE, cluster_size=512)
    with lamina.open(
        {"driver": "cache", "image": {"driver": "qcow2", "file.filename": str(path)}}, read_only=False
    ) as image:
        image.write(0, b"x" * SIZE)
        image.flush()
        node: Any = image.node.children["image"].node
        node.drop = lambda *_: (_ for _ in ()).throw(lamina.BlockIOError("it broke"))
        with pytest.raises(lamina.BlockIOError, match="it broke"):
            image.truncate(SIZE // 2)
        del node.drop
        assert image.size == SIZE // 2
        assert image.read(0, SIZE // 2) == b"x" * (SIZE // 2)
        image.truncate(SIZE)
        assert image.read(SIZE // 2, SIZE // 2) == bytes(SIZE // 2)
