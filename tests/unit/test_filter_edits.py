"""Filters whose child is exchanged below them: what they took from it is taken again, from the one that is there now."""

from __future__ import annotations

import pytest

import lamina
from lamina.errors import OptionError
from lamina.filters.blkverify import Blkverify
from lamina.filters.cache import Cache
from lamina.filters.cow import Cow
from lamina.filters.offset import Offset
from lamina.filters.preallocate import Preallocate
from lamina.filters.quorum import Quorum
from lamina.filters.truncate import Truncate
from lamina.image import Image
from lamina.node import Node
from lamina.request import Child
from lamina.storage.memory import MemoryStorage

SIZE = 256 * 1024


def storage(byte: bytes = b"\1") -> MemoryStorage:
    memory = MemoryStorage(SIZE)
    Image(memory).write(0, byte * SIZE)
    return memory


def edge(node: Node, role: str = "image") -> Child:
    return Child(node, role, grows=True)


def shorten(image: lamina.Image, *, role: str = "image") -> None:
    """Put a filter below the top node that cuts its child to 100,000 bytes."""
    with image.edit() as edit:
        edit.insert("truncate", {"size": 100_000}, above=image.node.children[role])


def test_truncate_knows_anew_what_lies_inside() -> None:
    image = Image(Truncate(edge(storage()), 200_000))
    assert image.read(99_999, 2) == b"\1\1"
    shorten(image)
    assert image.size == 200_000
    assert image.read(99_999, 2) == b"\1\0"
    assert image.extents().at(150_000).zero


@pytest.mark.parametrize("mode", ["writeback", "writethrough"])
def test_cache_forgets_what_was_below(mode: str) -> None:
    memory = storage()
    image = Image(Cache(edge(memory), mode=mode))
    assert image.read(0, 3) == b"\1\1\1"
    image.write(70_000, b"\2")
    with image.edit() as edit:
        edit.insert("offset", {"offset": 65536}, above=image.node.children["image"])
    assert image.size == SIZE - 65536
    # What was dirty belongs to the disk, and went down when the disk had changed.
    assert image.read(69_999, 3) == (b"\1\2\1" if mode == "writeback" else b"\1\1\1")
    assert Image(memory).read(70_000, 1) == (b"\1" if mode == "writeback" else b"\2")


def test_cache_keeps_what_cannot_go_down() -> None:
    memory = storage()
    image = Image(Cache(edge(memory)))
    image.write(5, b"\2")
    with pytest.raises(lamina.ReadOnly), image.edit() as edit:
        edit.insert("readonly", above=image.node.children["image"])
    assert image.read(4, 3) == b"\1\2\1"
    image.flush()
    assert Image(memory).read(4, 3) == b"\1\2\1"


def test_cow_reads_zeros_where_the_image_is_shorter_now() -> None:
    image = Image(Cow(edge(storage())))
    image.write(150_000, b"\2")
    shorten(image)
    assert image.size == SIZE
    assert image.read(99_999, 2) == b"\1\0"
    assert image.read(149_999, 3) == b"\0\2\0"
    assert image.extents().end == SIZE


def test_preallocate_counts_from_another_file() -> None:
    memory = storage()
    image = Image(Preallocate(edge(memory), prealloc_size=SIZE, prealloc_align=4096))
    Child(image.node, "root", grows=True).write(SIZE, memoryview(b"\2"))
    assert memory.size > image.size == SIZE + 1
    with image.edit() as edit:
        node = edit.insert("delay", above=image.node.children["image"])
    assert image.size == SIZE + 1, "it is the same file, with room ahead"
    with image.edit() as edit:
        edit.remove(node)
    shorten(image)
    assert image.size == 100_000
    assert image.node.size == 100_000


def test_a_window_that_does_not_fit_any_more_is_refused() -> None:
    image = Image(Offset(edge(storage()), 1000))
    with pytest.raises(OptionError, match="exceed the end"):
        shorten(image)
    assert image.size == SIZE - 1000
    assert image.read(SIZE - 1001, 1) == b"\1"
    narrow = Image(Offset(edge(storage()), 1000, 2000))
    shorten(narrow)
    assert narrow.read(1999, 1) == b"\1"


def test_copies_of_another_length_are_refused() -> None:
    quorum = Image(Quorum([edge(storage(), f"children.{number}") for number in range(2)], 2))
    with pytest.raises(OptionError, match="the sizes of the"):
        shorten(quorum, role="children.1")
    assert quorum.read(SIZE - 1, 1) == b"\1"
    verified = Image(Blkverify(edge(storage()), edge(storage(), "raw")))
    with pytest.raises(OptionError, match="the sizes of the"):
        shorten(verified, role="raw")
    assert verified.read(SIZE - 1, 1) == b"\1"


def test_copies_that_are_all_exchanged_have_another_length() -> None:
    quorum = Image(Quorum([edge(storage(), "children.0")], 1))
    shorten(quorum, role="children.0")
    assert quorum.size == 100_000
    assert quorum.extents().end == 100_000
