"""The filter `protect`: what touches a protected byte fails and changes nothing; all else passes."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.errors import OptionError, ReadOnly
from lamina.filters.protect import Protect
from lamina.image import Image
from lamina.limits import MAX_SIZE, Limits
from lamina.options import parse_range
from lamina.request import Child
from lamina.storage.memory import MemoryStorage

SIZE = 20_000


class Blocks(MemoryStorage):
    """Memory in blocks of 4096 bytes, which takes no more than 8192 at a time."""

    @property
    def limits(self) -> Limits:
        return Limits(request_alignment=4096, max_transfer=8192, zero_alignment=4096, discard_alignment=4096)


def disk(ranges: str, storage: MemoryStorage | None = None) -> Image:
    storage = storage or MemoryStorage(SIZE)
    return Image(Protect(Child(storage, "image", grows=True), ranges))


@pytest.mark.parametrize(
    ("text", "start", "end"),
    [("0-1M", 0, 1 << 20), ("8M-", 8 << 20, MAX_SIZE), ("512-1024", 512, 1024), (" 0x200-1k ", 512, 1024)],
)
def test_ranges(text: str, start: int, end: int) -> None:
    assert parse_range(text) == (start, end)


@pytest.mark.parametrize("text", ["", "1M", "-", "-1M", "5-5", "6-5", "a-b", "0-1M,", "0-1-2", "0-1M,,2M-"])
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(OptionError):
        disk(text)


@given(
    st.lists(st.tuples(st.integers(0, SIZE), st.integers(1, 3000)), min_size=1, max_size=4),
    st.lists(
        st.tuples(st.sampled_from(["write", "zero", "discard"]), st.integers(0, SIZE), st.integers(0, SIZE)), max_size=8
    ),
    st.booleans(),
)
def test_protected_bytes_never_change(
    ranges: list[tuple[int, int]], requests: list[tuple[str, int, int]], blocks: bool
) -> None:
    """Whatever the alignment below: a request is refused if, and only if, its own bytes touch a range."""
    storage = Blocks(SIZE) if blocks else MemoryStorage(SIZE)
    bare = Image(storage)
    bare.write(0, bytes(range(1, 251)) * 80)
    image = disk(",".join(f"{start}-{start + length}" for start, length in ranges), storage)
    protected = {at for start, length in ranges for at in range(start, min(start + length, SIZE))}
    for name, offset, other in requests:
        lo, hi = sorted((offset, other))
        before = bare.read(0, SIZE)
        arguments: tuple[Any, ...] = (lo, b"\xff" * (hi - lo)) if name == "write" else (lo, hi - lo)
        if protected.isdisjoint(range(lo, hi)):
            getattr(image, name)(*arguments)
            if name != "discard":
                assert bare.read(lo, hi - lo) == (b"\xff" if name == "write" else b"\0") * (hi - lo)
        else:
            # A discard of parts of blocks is no request that arrives below, and is none here.
            with pytest.raises(ReadOnly) as caught:
                getattr(image, name)(*arguments)
            assert caught.value.errno == errno.EPERM
            assert bare.read(0, SIZE) == before
        after = bare.read(0, SIZE)
        assert all(after[at] == before[at] for at in protected)


def test_a_large_write_fails_whole() -> None:
    """It is not split before it is judged, though the child takes little at a time."""
    storage = Blocks(1 << 22)
    image = disk("4190000-", storage)
    with pytest.raises(ReadOnly):
        image.write(100, b"x" * ((1 << 22) - 100))
    assert Image(storage).read(0, 1 << 22) == bytes(1 << 22)
    image.write(100, b"x" * 4_189_900)
    assert Image(storage).read(99, 4_189_902) == b"\0" + b"x" * 4_189_900 + b"\0"


def test_changes_of_size() -> None:
    storage = MemoryStorage(SIZE)
    image = disk("0-1000,30k-", storage)
    image.truncate(30 << 10)
    for size in ((30 << 10) + 1, 999, 0):
        with pytest.raises(ReadOnly):
            image.truncate(size)
    image.truncate(1000)
    assert image.size == 1000


def test_reads_and_the_status_pass() -> None:
    storage = MemoryStorage(SIZE)
    Image(storage).write(0, b"boot")
    image = disk("0-", storage)
    assert image.read(0, 4) == b"boot"
    assert image.extents() == Image(storage).extents()
    image.flush()
