"""The filter `truncate`: how long it is, and what the bytes that it adds are."""

from __future__ import annotations

import errno

import pytest

from lamina.errors import BlockIOError, NotSupported, OptionError
from lamina.filters.truncate import Truncate
from lamina.graph import open_graph
from lamina.image import Image
from lamina.request import Child
from lamina.storage.memory import MemoryStorage
from lamina.testing.model import check_status


def over(length: int, **options: int) -> Image:
    storage = MemoryStorage(length)
    Image(storage).write(0, b"\xaa" * length)
    return Image(Truncate(Child(storage, "image", grows=True), **options))


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"size": 10}, 10),
        ({"size": 0}, 0),
        ({"size": 5000}, 5000),
        ({"round_up": 512}, 1024),
        ({"round_up": 1000}, 1000),
        ({"round_up": 1}, 1000),
        ({"round_down": 512}, 512),
        ({"round_down": 3}, 999),
        ({"round_down": 4096}, 0),
    ],
)
def test_sizes(options: dict[str, int], size: int) -> None:
    image = over(1000, **options)
    assert image.size == size
    kept = min(size, 1000)
    assert image.read(0, size) == b"\xaa" * kept + bytes(size - kept)
    if size:
        check_status(image.extents(), 0, image.read(0, size))


@pytest.mark.parametrize("options", [{}, {"size": 1, "round_up": 2}, {"round_up": 2, "round_down": 2}])
def test_one_length_is_needed(options: dict[str, int]) -> None:
    with pytest.raises(OptionError, match="needs one size"):
        over(1000, **options)


def test_a_size_that_cannot_be_is_refused() -> None:
    with pytest.raises(OptionError, match="is too large"):
        over(1000, size=1 << 63)
    with pytest.raises(OptionError, match="round-up"):
        open_graph({"driver": "truncate", "round-up": 0, "image.driver": "memory"})


def test_what_it_adds_takes_zeros_and_nothing_else() -> None:
    image = over(1000, size=200_000)
    below = Image(image.node.children["image"].node)
    image.write(900, b"x" * 100 + bytes(150_000))
    image.write(1000, bytes(10), fua=True)
    image.zero(800, 10_000, unmap=True)
    image.zero(2000, 10_000, fast=True, fua=True)
    image.discard(0, 200_000)
    before = image.read(0, image.size)
    for offset, data in ((999, b"xy"), (1000, b"\0" * 70_000 + b"x"), (500, b"x" * 501)):
        with pytest.raises(BlockIOError, match="ends at offset 1000") as caught:
            image.write(offset, data)
        assert caught.value.errno == errno.ENOSPC
    assert image.read(0, image.size) == before
    assert below.size == 1000


def test_the_status_of_what_it_adds() -> None:
    image = over(1000, round_up=4096)
    rows = [(row.start, row.length, row.data, row.zero, row.present, row.depth, row.offset) for row in image.extents()]
    assert rows == [(0, 1000, True, False, True, 0, 0), (1000, 3096, False, True, True, 0, None)]
    assert len(image.extents(2000, 5)) == 1
    assert image.root.reads_zero(1000, 3096)
    assert not image.root.reads_zero(999, 2)
    assert image.node.host_base is None
    assert over(1000, size=999).node.host_base is not None


def test_its_size_is_fixed() -> None:
    image = over(1000, round_up=512)
    with pytest.raises(NotSupported):
        image.truncate(500)
