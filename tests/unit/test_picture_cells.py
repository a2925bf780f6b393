"""Cells: each tells exactly what the extents in it say, however the extents are divided into parts."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.extents import Extents
from lamina.palette import content
from lamina.picture.cells import KINDS, STORED, Cell, Cells, cell_size, exact_size

#: Rows of extents: the gap before the row, its length, flags and depth.
ROWS = st.lists(
    st.tuples(st.just(0) | st.integers(0, 9), st.integers(1, 40), st.integers(0, 15), st.integers(0, 3)), max_size=12
)


def extents_of(rows: list[tuple[int, int, int, int]], begin: int) -> Extents:
    starts, at = [], begin
    for gap, length, _, _ in rows:
        starts.append(at + gap)
        at += gap + length
    if not rows:
        return Extents.empty(begin)
    return Extents.from_columns(
        starts, [row[1] for row in rows], [row[2] for row in rows], depth=[row[3] for row in rows]
    )


def folded(extents: Extents, start: int, end: int) -> Cell:
    """The cell [start, end), byte by byte."""
    amounts: dict[str, int] = {}
    depths = []
    for byte in range(start, end):
        for one in extents:
            if one.start <= byte < one.end:
                kind = content(one.data, one.zero, one.present, one.compressed)
                amounts[kind] = amounts.get(kind, 0) + 1
                depths += [one.depth] if one.present else []
    ordered = {kind: amounts[kind] for kind in KINDS if kind in amounts}
    return Cell(start, end - start, ordered, (min(depths), max(depths)) if depths else None)


@given(ROWS, st.integers(0, 50), st.integers(1, 40), st.data())
def test_each_cell_is_the_fold_of_the_extents_in_it(
    rows: list[tuple[int, int, int, int]], begin: int, size: int, data: st.DataObject
) -> None:
    extents = extents_of(rows, begin)
    first = data.draw(st.integers(0, 60))
    last = data.draw(st.integers(first + 1, 300))
    cells = Cells(first, last, size)
    cuts = sorted(data.draw(st.lists(st.integers(first, last), max_size=3)))
    for low, high in zip([first, *cuts], [*cuts, last], strict=True):
        cells.add(extents.clip(low, high))
    found = cells.cells()
    assert len(found) == len(cells)
    assert [one.start for one in found] == [first, *range(first - first % size + size, last, size)]
    assert found == [folded(extents, one.start, one.end) for one in found]
    assert found[-1].end == last
    assert cells.totals() == folded(extents, first, last).amounts


def test_what_a_cell_says() -> None:
    mixed = Cell(0, 100, {"data": 30, "hole": 70}, (0, 2))
    assert (mixed.kind, mixed.unknown, mixed.stored, mixed.end) == (None, 0, 30, 100)
    assert Cell(0, 100, {"hole": 100}, None).kind == "hole"
    part = Cell(0, 100, {"hole": 99}, None)
    assert (part.kind, part.unknown) == (None, 1)
    empty = Cell(5, 7, {}, None)
    assert (empty.kind, empty.unknown) == (None, 7)
    assert set(STORED) < set(KINDS)


def test_the_end_of_the_largest_disk() -> None:
    end = (1 << 63) - 1
    cells = Cells(end - 5, end, 4)
    cells.add(Extents.single(end - 5, 5, data=True, present=True))
    assert [(one.start, one.length) for one in cells.cells()] == [(end - 5, 2), (end - 3, 3)]
    whole = Cells(0, end, 1 << 62)
    whole.add(Extents.single(0, end, zero=True))
    assert whole.totals() == {"hole": end}


@pytest.mark.parametrize(("begin", "end", "size"), [(0, 0, 1), (5, 4, 1), (-1, 3, 1), (0, 4, 0)])
def test_no_cells(begin: int, end: int, size: int) -> None:
    with pytest.raises(ValueError, match="no cells"):
        Cells(begin, end, size)


@given(st.integers(0, 1 << 62), st.integers(1, 1 << 62), st.integers(2, 5000), st.sampled_from([1, 512, 4096]))
def test_the_size_of_cells_is_the_smallest_that_fits(begin: int, length: int, most: int, least: int) -> None:
    size = cell_size(begin, begin + length, most, least)
    assert size >= least
    assert size & (size - 1) == 0
    assert -(-(begin + length) // size) - begin // size <= most
    if size > least:
        assert -(-(begin + length) // (size // 2)) - begin // (size // 2) > most


UNITS = {"B": 1, **{f"{letter}iB": 1 << 10 * power for power, letter in enumerate("KMGTPE", 1)}}


@given(st.integers(0, 1 << 63) | st.builds(lambda a, b: a << b, st.integers(0, 5000), st.integers(0, 50)))
def test_a_size_is_written_without_loss(size: int) -> None:
    told = re.fullmatch(r"(\d+(?:\.25|\.5|\.75)?) (\w+)", exact_size(size))
    assert told is not None
    whole, _, part = told[1].partition(".")
    unit = UNITS[told[2]]
    assert int(whole) * unit + {"": 0, "25": 1, "5": 2, "75": 3}[part] * unit // 4 == size


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (600, "600 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (1025, "1025 B"),
        (5 << 38, "1.25 TiB"),
        (1 << 63, "8 EiB"),
    ],
)
def test_sizes(size: int, text: str) -> None:
    assert exact_size(size) == text
