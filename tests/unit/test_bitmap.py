"""Dirty bitmaps in memory: never too little, and what is told is in order, cut to what was asked, and joined."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.bitmap import DirtyBitmap, MemoryBitmap

SPAN = 4096
marks = st.lists(st.tuples(st.integers(0, SPAN - 1), st.integers(1, 300)), max_size=20)


@given(granularity=st.sampled_from([1, 2, 8, 64, 512]), writes=marks, a=st.integers(0, SPAN), b=st.integers(0, SPAN))
def test_against_a_set_of_bytes(granularity: int, writes: list[tuple[int, int]], a: int, b: int) -> None:
    bitmap = MemoryBitmap(granularity)
    expected: set[int] = set()
    for offset, length in writes:
        bitmap.mark(offset, length)
        first, last = offset // granularity, (offset + length - 1) // granularity
        expected.update(range(first * granularity, (last + 1) * granularity))
    begin, end = min(a, b), max(a, b)
    found = list(bitmap.dirty(begin, end))
    assert {byte for start, stop in found for byte in range(start, stop)} == expected & set(range(begin, end))
    edges = [edge for stretch in found for edge in stretch]
    assert edges == sorted(set(edges)), "in order, none empty, none touching the next"


@given(granularity=st.sampled_from([1, 8, 512]), writes=marks, cut=st.integers(0, SPAN))
def test_two_windows_tell_what_one_does(granularity: int, writes: list[tuple[int, int]], cut: int) -> None:
    bitmap = MemoryBitmap(granularity)
    for offset, length in writes:
        bitmap.mark(offset, length)

    def told(begin: int, end: int) -> set[int]:
        return {byte for start, stop in bitmap.dirty(begin, end) for byte in range(start, stop)}

    assert told(0, cut) | told(cut, SPAN) == told(0, SPAN)


def test_clear_and_mark_again() -> None:
    bitmap = MemoryBitmap(512)
    assert list(bitmap.dirty(0, 1 << 40)) == []
    bitmap.mark(511, 2)
    assert list(bitmap.dirty(0, 1 << 40)) == [(0, 1024)]
    assert list(bitmap.dirty(100, 600)) == [(100, 600)]
    bitmap.clear()
    assert list(bitmap.dirty(0, 1 << 40)) == []
    bitmap.mark((1 << 62) - 1, 1)
    assert list(bitmap.dirty(0, 1 << 62)) == [((1 << 62) - 512, 1 << 62)]


@pytest.mark.parametrize("offset", [0, 5, 512])
def test_no_bytes_are_not_dirty(offset: int) -> None:
    bitmap = MemoryBitmap(512)
    bitmap.mark(offset, 0)
    assert list(bitmap.dirty(0, 4096)) == []
    bitmap.mark(0, 4096)
    assert list(bitmap.dirty(offset, offset)) == []


@pytest.mark.parametrize("granularity", [0, -1, 3, 513])
def test_a_granularity_is_a_power_of_two(granularity: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        MemoryBitmap(granularity)


def test_it_is_a_dirty_bitmap() -> None:
    bitmap: DirtyBitmap = MemoryBitmap()
    assert bitmap.granularity == 1 << 16


def test_marks_of_many_threads_are_all_there() -> None:
    bitmap = MemoryBitmap(1)

    def mark(first: int) -> None:
        for offset in range(first, 4000, 4):
            bitmap.mark(offset, 1)

    threads = [threading.Thread(target=mark, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    told = [sum(stop - start for start, stop in bitmap.dirty(0, 4000)) for _ in range(20)]
    for thread in threads:
        thread.join()
    assert told == sorted(told), "what was dirty stays so"
    assert list(bitmap.dirty(0, 4000)) == [(0, 4000)]
