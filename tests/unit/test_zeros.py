"""The search for zeros: every byte that is not zero is found, on the grid of the disk, whatever blocks look alike."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.zeros import between, fill_zero, is_zero, stored_parts


@given(
    st.lists(st.tuples(st.sampled_from([0, 0, 1]), st.sampled_from([1, 7, 8, 100, 512, 513])), max_size=20),
    st.integers(0, 2000),
    st.sampled_from([8, 64, 512]),
    st.sampled_from([1, 512, 1024]),
)
def test_parts_hold_every_byte_that_is_not_zero(
    parts: list[tuple[int, int]], at: int, granule: int, smallest: int
) -> None:
    content = b"".join(bytes([value]) * length for value, length in parts)
    runs = stored_parts(memoryview(content), at, granule, smallest)
    rebuilt = bytearray(len(content))
    end = 0
    for lo, hi in runs:
        assert end <= lo < hi
        # Between two runs lies a hole worth having, of whole blocks of the disk's grid.
        if end > 0:
            assert lo - end >= max(smallest, granule)
            assert (at + end) % granule == 0 == (at + lo) % granule
        rebuilt[lo:hi] = content[lo:hi]
        end = hi
    assert rebuilt == content
    # A whole block of zeros inside is never stored if its run is long enough.
    for lo, hi in runs:
        assert max((len(run) for run in content[lo:hi].split(b"\1")), default=0) < smallest + 2 * granule


def test_without_a_granule_everything_is_stored() -> None:
    assert stored_parts(memoryview(bytes(100)), 5, 0, 0) == [(0, 100)]


@given(
    st.lists(st.tuples(st.integers(1, 30), st.booleans()), max_size=10),
    st.integers(0, 40),
    st.sampled_from([8, 16]),
    st.sampled_from([1, 8, 16, 24, 64]),
)
def test_stored_parts(runs: list[tuple[int, bool]], at: int, granule: int, smallest: int) -> None:
    data = b"".join((b"\0" if zero else b"x") * length for length, zero in runs)
    parts = stored_parts(memoryview(data), at, granule, smallest)
    kept = bytearray(len(data))
    last = -1
    for lo, hi in parts:
        assert last < lo < hi <= len(data)
        last = hi
        kept[lo:hi] = data[lo:hi]
        # What is left out between two parts is long enough, and on the grid.
        assert lo == 0 or (lo + at) % granule == 0
        assert hi == len(data) or (hi + at) % granule == 0
    gaps = [b - a for (_, a), (b, _) in itertools.pairwise(parts)]
    assert all(gap >= smallest for gap in gaps)
    assert bytes(kept) == data
    if not any(data) and data:
        assert parts == []


def test_zeros_behind_a_first_byte_that_is_zero() -> None:
    """Blocks are told apart by their first byte first: one that begins with zeros need not be all zero."""
    data = bytearray(1 << 16)
    data[4096 + 4095] = 1
    data[1 << 15] = 1
    assert stored_parts(memoryview(data), 0, 4096, 4096) == [(4096, 8192), (1 << 15, (1 << 15) + 4096)]


@pytest.mark.parametrize("granule", [8, 512, 4096, 1 << 19])
def test_blocks_that_look_alike(granule: int, seed: int) -> None:
    """A single byte, anywhere in a block, makes it no block of zeros."""
    dice = random.Random(seed)
    count, rounds = (100, 50) if granule <= 4096 else (8, 5)
    for _ in range(rounds):
        data = bytearray(count * granule)
        kept = sorted(dice.sample(range(count), dice.randrange(count)))
        for number in kept:
            data[number * granule + dice.randrange(granule)] = dice.randrange(1, 256)
        parts = stored_parts(memoryview(data), 0, granule, 1)
        assert [number for lo, hi in parts for number in range(lo // granule, hi // granule)] == kept
        assert between(between(parts, len(data)), len(data)) == parts


@pytest.mark.parametrize("length", [0, 1, 1 << 18, (1 << 18) + 1, 1 << 20])
def test_all_zero_or_not(length: int) -> None:
    data = bytearray(length)
    assert is_zero(memoryview(data))
    for place in {0, length // 2, length - 1} if length else ():
        data[place] = 1
        assert not is_zero(memoryview(data))
        fill_zero(memoryview(data)[place:])
        assert is_zero(memoryview(data))
