"""Data in a hole is zero: the rule above every mapping, against a model that knows nothing of columns.

The model keeps, for each byte of a child, whether it is a hole, and answers byte by byte.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lamina
from lamina import format_node, holes, limits
from lamina.extents import Extents
from lamina.format_node import Columns, FormatNode, Mapping
from lamina.limits import KIB, MIB
from lamina.node import StorageNode, bounded
from lamina.request import Child
from lamina.status import COMPRESSED, DATA, PRESENT, ZERO

UNIT = 512
STORED, ZEROED, FLAT, PACKED = DATA | PRESENT, ZERO | PRESENT, PRESENT, DATA | PRESENT | COMPRESSED


class Sparse(StorageNode):
    """Storage of which each unit is data, a hole, or data that is known to be zero. It counts the questions."""

    driver = "memory"

    def __init__(self, units: list[int]) -> None:
        super().__init__()
        self.units = units
        self.questions = 0

    @property
    def size(self) -> int:
        return len(self.units) * UNIT

    def extents(self, offset: int, length: int) -> Extents:
        self.questions += 1
        at, end = offset, offset + length
        rows = []
        while at < end:
            stop = min(at - at % UNIT + UNIT, end)
            rows.append((at, stop - at, (DATA, ZERO, DATA | ZERO)[self.units[at // UNIT]] | PRESENT))
            at = stop
        start, lengths, flags = zip(*rows, strict=True)
        return bounded(Extents.from_columns(start, lengths, flags, file=0, offset=start, files=(self,)).coalesce())

    def reads_zero(self, offset: int, length: int) -> bool:
        return all(self.units[at // UNIT] for at in range(offset, offset + length))


class Rows(FormatNode):
    """A format whose mapping is a list: (length, flags, child, offset) of each row in turn."""

    driver = "raw"
    given_back = 0

    def __init__(self, rows: list[tuple[int, int, int, int]], *children: Child) -> None:
        super().__init__()
        self.children = {f"file{number}": child for number, child in enumerate(children)}
        self.file, self.edges = children[0], children
        self.rows = rows

    @property
    def size(self) -> int:
        return sum(row[0] for row in self.rows)

    def map(self, offset: int, length: int) -> Mapping:
        at = 0
        for size, flags, child, place in self.rows:
            if at <= offset < at + size:
                run = min(at + size - offset, length)
                edge = self.edges[child] if child >= 0 else None
                return Mapping(flags, run, place + offset - at if place >= 0 else -1, edge)
            at += size
        raise AssertionError

    def map_columns(self, offset: int, length: int) -> Columns:
        end = offset + length
        found = []
        while offset < end:
            flags, run, place, child, _ = self.map(offset, end - offset)
            found.append((offset, run, flags, place, self.edges.index(child) if child else -1))
            offset += run
        start, lengths, bits, places, which = zip(*found[: limits.MAX_ROWS], strict=True)
        int64, int32 = np.int64, np.int32
        told = np.array(start, int64), np.array(lengths, int64), np.array(bits, np.uint8), np.array(places, int64)
        return Columns(*told, self.edges, np.array(which, int32))


def wanted(node: Rows) -> list[tuple[bool, bool, bool, int]]:
    """(data, zero, present, offset) of each byte in turn."""
    found = []
    for size, flags, child, place in node.rows:
        for at in range(size):
            data, zero = bool(flags & DATA), bool(flags & ZERO)
            if place >= 0 and not zero:
                store: Any = node.edges[child].node
                told = store.units[(place + at) // UNIT] if place + at < store.size else 1
                zero, data = told != 0, told != 1 or flags != FLAT
            zero |= not flags
            found.append((data, zero, bool(flags & PRESENT), place + at if place >= 0 else -1))
    return found


def by_byte(pieces: list[Extents]) -> list[tuple[bool, bool, bool, int]]:
    return [
        (row.data, row.zero, row.present, -1 if row.offset is None else row.offset + at)
        for piece in pieces
        for row in piece
        for at in range(row.length)
    ]


def pieces_of(node: FormatNode, offset: int, end: int) -> list[Extents]:
    found = []
    while offset < end:
        piece = node.extents(offset, end - offset)
        assert piece.begin == offset < piece.end
        assert len(piece) <= limits.MAX_ROWS
        assert len(piece) == len(piece.coalesce())
        found.append(piece)
        offset = piece.end
    return found


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_columns_and_small_questions_are_what_the_children_say(data: st.DataObject) -> None:
    stores = [
        Sparse(data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=12)))
        for _ in range(data.draw(st.integers(1, 2)))
    ]
    span = 14 * UNIT
    row = st.tuples(
        st.integers(1, 5 * UNIT),
        st.sampled_from([0, ZEROED, STORED, STORED, STORED, FLAT, PACKED]),
        st.integers(0, len(stores) - 1),
        st.integers(0, span // 100).map(lambda n: n * 100),
    )
    rows = []
    for size, flags, child, place in data.draw(st.lists(row, min_size=1, max_size=8)):
        whole = flags in (STORED, FLAT)
        rows.append((size, flags, child if whole else -1, place if whole else -1))
    joined = [rows[0]]
    for size, *rest in rows[1:]:  # neighbours that are alike are one row, as map_columns must tell them
        if rest[0] == joined[-1][1] and rest[2] < 0:
            joined[-1] = (joined[-1][0] + size, *rest)  # type: ignore[assignment]
        elif rest[2] >= 0 and joined[-1][3] >= 0 and joined[-1][3] + joined[-1][0] == rest[2]:
            continue
        else:
            joined.append((size, *rest))  # type: ignore[arg-type]
    node = Rows(joined, *(Child(store, "file", grows=True) for store in stores))
    right = wanted(node)
    offset = data.draw(st.integers(0, node.size - 1))
    end = data.draw(st.integers(offset + 1, node.size))
    most, gap, apart, small = limits.MAX_ROWS, holes._GAP, holes._MOST_APART, format_node._SMALL
    try:
        format_node._SMALL = data.draw(st.sampled_from([0, small]))  # without columns, or with them
        limits.MAX_ROWS = data.draw(st.sampled_from([1, 2, 5, most]))
        holes._GAP = data.draw(st.sampled_from([0, UNIT, gap]))
        holes._MOST_APART = data.draw(st.sampled_from([1, 2, apart]))
        assert by_byte(pieces_of(node, offset, end)) == right[offset:end]
    finally:
        limits.MAX_ROWS, holes._GAP, holes._MOST_APART, format_node._SMALL = most, gap, apart, small
    few, at = [], offset
    while at < end:
        rows_of = node.first_extents(at, end - at, data.draw(st.integers(1, 4)))
        for flags, length, _, _, where in rows_of:
            few += [
                (bool(flags & DATA), bool(flags & ZERO), bool(flags & PRESENT), where + n if where >= 0 else -1)
                for n in range(length)
            ]
            at += length
    assert few == right[offset:end]
    known = all(zero and (not data or place < 0) for data, zero, _, place in right[offset:end])
    assert node.reads_zero(offset, end - offset) <= all(zero for _, zero, _, _ in right[offset:end])
    assert node.reads_zero(offset, end - offset) >= known


def mapped(rows: list[tuple[int, int, int, int]], units: list[int]) -> tuple[Rows, Sparse]:
    store = Sparse(units)
    return Rows(rows, Child(store, "file", grows=True)), store


def test_one_row_with_as_many_holes_as_two_answers_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_ROWS", 1)
    monkeypatch.setattr(format_node, "_SMALL", 0)
    node, _ = mapped([(3 * UNIT, STORED, 0, 0)], [1, 2])  # a hole, known zeros, and the end of the file
    assert by_byte(pieces_of(node, 0, 3 * UNIT)) == wanted(node)


def test_what_became_a_hole_meanwhile_is_not_taken_for_zero() -> None:
    """The cluster was moved, and its old place given back, between the look at the mapping and that at the file."""
    node, store = mapped([(4 * UNIT, STORED, 0, 0)], [0, 0, 0, 0])
    asked = store.extents

    def given_back(offset: int, length: int) -> Extents:
        node.given_back += 1
        store.units = [1] * 4
        return asked(offset, length)

    store.extents = given_back  # type: ignore[method-assign]
    for found in (node.extents(0, 4 * UNIT).flags.tolist(), [row[0] for row in node.first_extents(0, 4 * UNIT, 4)]):
        assert found == [STORED]
    store.extents = asked  # type: ignore[method-assign]
    assert node.extents(0, 4 * UNIT).zero.all()
    assert not node.reads_zero(0, 4 * UNIT), "by the mapping it is stored, and stays so"


@pytest.mark.parametrize("order", ["as they lie", "backwards", "at random", "all in one place"])
def test_the_file_is_asked_once_and_not_for_each_row(order: str) -> None:
    """Many rows, whatever their order, of a file with many holes: few questions, and no more rows than an answer has."""
    count = 4000
    places = list(range(0, 4 * count, 4))
    if order == "backwards":
        places.reverse()
    elif order == "at random":
        random.Random(1).shuffle(places)
    elif order == "all in one place":
        places = [0] * count
    store = Sparse([0, 1, 1, 0] * count)
    node = Rows([], Child(store, "file", grows=True))
    start = np.arange(count, dtype=np.int64) * 4 * UNIT
    told = start, np.full(count, 4 * UNIT), np.full(count, STORED, np.uint8), np.array(places, np.int64) * UNIT
    node.map_columns = lambda offset, length: Columns(*told, node.edges)  # type: ignore[method-assign]
    found = node.extents(0, count * 4 * UNIT)
    assert store.questions <= 4
    assert len(found) >= 2 * count
    zero = found.where(zero=True)
    assert (zero.start % (4 * UNIT) == UNIT).all()
    assert zero.length.sum() == count * 2 * UNIT


def test_places_far_apart_are_asked_about_one_by_one() -> None:
    """What lies between them may be much."""
    far = 3 * MIB // UNIT
    node, store = mapped([(UNIT, STORED, 0, 0), (UNIT, STORED, 0, far * UNIT)], [0] + [0, 1] * (far // 2) + [1])
    asked: list[tuple[int, int]] = []
    answer = store.extents
    store.extents = lambda offset, length: asked.append((offset, length)) or answer(offset, length)  # type: ignore
    assert node.extents(0, 2 * UNIT).zero.tolist() == [False, True]
    assert asked[-2:] == [(0, UNIT), (far * UNIT, UNIT)]


@pytest.mark.parametrize("grows", [True, False])
def test_past_the_end_of_a_file_is_zero_where_it_can_be_read(grows: bool) -> None:
    store = Sparse([0, 0])
    node = Rows([(4 * UNIT, STORED, 0, UNIT)], Child(store, "file", grows=grows))
    found = node.extents(0, 4 * UNIT)
    assert found.zero.tolist() == ([False, True] if grows else [False])
    assert [bool(row[0] & ZERO) for row in node.first_extents(0, 4 * UNIT, 9)] == [False, grows]


def test_without_holes_a_file_is_all_data(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(256 * KIB)
        file.seek(128 * KIB)
        file.write(b"x" * 4096)
    for known in (True, False):
        with lamina.open({"driver": "raw", "file": {"driver": "file", "filename": str(path), "holes": known}}) as image:
            found = image.extents()
            assert len(found) == (3 if known else 1)
            assert found.zero.any() == known
            assert image.root.reads_zero(0, 4096) == known
            assert image.root.first_extents(0, 4096, 1)[0].flags == (ZEROED if known else STORED)
            assert image.root.zero_runs(0, 4096) == [(4096, known)]


def test_a_cluster_that_is_written_in_place_is_still_stored(tmp_path: Path) -> None:
    """Zero and data is not "not allocated": a write to it goes to its place."""
    path = tmp_path / "disk"
    lamina.create(path, "qcow2", MIB)
    with lamina.open(path, format="qcow2", read_only=False) as image:
        image.write(0, b"x" * 100)
        before = image.extents(0, 64 * KIB)
        assert before.data.all()
        assert before.zero.any(), "the rest of the cluster was never written"
        place = before[0].offset
        image.write(60_000, b"y" * 100)
        after = image.extents(0, 64 * KIB)
        assert after[0].offset == place
        assert after.data.all()
        image.zero(0, 64 * KIB)
        assert image.extents(0, 64 * KIB)[0].offset == place
        image.write(0, b"z")
        assert image.extents(0, 1)[0].offset == place
        assert image.read(0, 64 * KIB) == b"z" + bytes(64 * KIB - 1)
