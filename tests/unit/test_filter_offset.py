"""The filter `offset`: its window, its limits, and that status and host offsets are shifted with it."""

from __future__ import annotations

import pytest

from lamina.errors import NotSupported, OptionError
from lamina.filters.offset import Offset
from lamina.graph import open_graph
from lamina.image import Image
from lamina.limits import Limits
from lamina.request import Child
from lamina.storage.memory import PAGE, MemoryStorage


class Aligned(MemoryStorage):
    """Memory that declares alignments."""

    @property
    def limits(self) -> Limits:
        return Limits(request_alignment=4096, zero_alignment=12288, discard_alignment=8192, max_transfer=1 << 20)


def test_the_window_and_nothing_else_is_read_and_written() -> None:
    storage = MemoryStorage(5 * PAGE)
    whole, disk = Image(storage), Image(Offset(Child(storage, "image"), 1000, 2000))
    whole.write(0, b"\xaa" * whole.size)
    disk.write(0, b"x" * 2000)
    assert disk.size == 2000
    assert whole.read(999, 2002) == b"\xaa" + b"x" * 2000 + b"\xaa"
    disk.zero(0, 2000)
    disk.discard(0, 2000)
    assert whole.read(999, 2002) == b"\xaa" + bytes(2000) + b"\xaa"


def test_the_status_is_shifted_and_host_offsets_stay() -> None:
    storage = MemoryStorage(5 * PAGE)
    Image(storage).write(2 * PAGE, b"x")
    disk = Image(Offset(Child(storage, "image"), PAGE + 7))
    rows = [(row.start, row.length, row.data, row.offset, row.depth) for row in disk.extents()]
    assert rows == [
        (0, PAGE - 7, False, PAGE + 7, 0),
        (PAGE - 7, PAGE, True, 2 * PAGE, 0),
        (2 * PAGE - 7, 2 * PAGE, False, 3 * PAGE, 0),
    ]
    assert disk.node.host_base == (storage, PAGE + 7)
    assert disk.root.reads_zero(0, PAGE - 7)
    assert not disk.root.reads_zero(0, PAGE)


@pytest.mark.parametrize(
    ("offset", "aligned"),
    [
        (0, (4096, 12288, 8192)),
        (4096, (4096, 1, 1)),
        (24576, (4096, 12288, 8192)),
        (12288, (4096, 12288, 1)),
        (1, (1, 1, 1)),
    ],
)
def test_alignments_are_kept_where_the_window_keeps_them(offset: int, aligned: tuple[int, int, int]) -> None:
    limits = Offset(Child(Aligned(1 << 20), "image"), offset).limits
    assert (limits.request_alignment, limits.zero_alignment, limits.discard_alignment) == aligned
    assert limits.max_transfer == 1 << 20


@pytest.mark.parametrize(("offset", "size"), [(101, None), (0, 101), (60, 41), (1 << 62, 1 << 62), (101, 0)])
def test_a_window_outside_the_image_is_refused(offset: int, size: int | None) -> None:
    with pytest.raises(OptionError, match="exceed the end"):
        Offset(Child(MemoryStorage(100), "image"), offset, size)


def test_its_size_is_fixed() -> None:
    storage = MemoryStorage(100)
    disk = Image(Offset(Child(storage, "image"), 10))
    with pytest.raises(NotSupported):
        disk.truncate(50)
    Image(storage).truncate(200)
    assert disk.size == 90


def test_it_is_opened_by_its_name() -> None:
    spec = {"driver": "offset", "offset": "1k", "size": "2k", "image.driver": "memory", "image.size": "4k"}
    with Image(open_graph(spec, read_only=False)) as disk:
        assert disk.size == 2048
        disk.write(0, b"x" * 2048)
