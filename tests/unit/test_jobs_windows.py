"""Walking over an image in windows, and joining what is worth one request."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lamina
from lamina.extents import Extents
from lamina.jobs.windows import stretches, windows


@pytest.mark.parametrize("grid", [1, 4096, 1 << 21])
def test_windows_cover_the_range_once_and_meet_on_the_grid(
    tmp_path: Path, few_rows: Callable[[int], None], grid: int
) -> None:
    few_rows(16)
    disk = tmp_path / "disk.raw"
    with disk.open("wb") as file:
        file.truncate((10 << 20) + 777)
        for at in range(0, 10 << 20, 64 << 10):
            file.seek(at)
            file.write(b"x" * 4096)
    with lamina.open(disk, format="raw") as image:
        begin, end = 3 * grid, image.size
        pieces = list(windows(image, begin, end, grid=grid))
        assert len(pieces) > 1
        assert pieces[0].begin == begin
        assert pieces[-1].end == end
        for left, right in itertools.pairwise(pieces):
            assert left.end == right.begin
            assert right.begin % grid == 0
        whole = image.extents(begin, end - begin).coalesce()
        assert list(Extents.concat(pieces).coalesce()) == list(whole)


def test_no_windows_in_an_empty_range(tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(b"abc")
    with lamina.open(disk, format="raw") as image:
        assert list(windows(image, 3, 3)) == []


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(1, 5), st.integers(0, 2)), max_size=30), st.randoms())
def test_stretches_keep_every_byte_and_leave_no_equal_neighbours(
    parts: list[tuple[int, int, int]], random: Any
) -> None:
    at, rows, expected = 0, [], {}
    for kind, length, gap in parts:
        at += gap
        rows.append((kind, at, length))
        expected |= dict.fromkeys(range(at, at + length), kind)
        at += length
    random.shuffle(rows)
    columns = [np.array([row[number] for row in rows], np.int64) for number in range(3)]
    found = list(stretches(*columns))
    assert {byte: kind for kind, start, length in found for byte in range(start, start + length)} == expected
    assert sum(length for _, _, length in found) == len(expected)
    for (kind, start, length), (next_kind, next_start, _) in itertools.pairwise(found):
        assert start + length <= next_start
        assert kind != next_kind or start + length < next_start
