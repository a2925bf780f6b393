"""Every operation of `lamina.extents` against a slow model that is obviously right, and the laws of rounding by name.

The model holds one cell per byte of a disk of at most 64 bytes: a dict from position to what is true of that byte. The
disk lies at 0, beyond 32 bits, or at the very top of what 63 bits count, where a sum that overflows would show.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.extents import Extent, Extents
from lamina.limits import MAX_SIZE

Span = tuple[int, int]

law = settings(deadline=None, max_examples=100)


class Disk:
    def __init__(self, filename: str) -> None:
        self.filename = filename

    def __repr__(self) -> str:
        return self.filename


FILES = (Disk("a"), Disk("b"), Disk("c"))


# ---- the model


class Cell(NamedTuple):
    data: bool
    zero: bool
    present: bool
    compressed: bool
    depth: int
    file: Disk | None
    offset: int | None


Cells = dict[int, Cell]


def cells(extents: Extents) -> Cells:
    """One cell per byte; fails if the rows break what `Extents` promises."""
    found: Cells = {}
    previous = extents.begin
    for row in extents:
        assert row.length > 0
        assert row.start >= previous
        assert (row.file is None) == (row.offset is None)
        for at in range(row.length):
            offset = None if row.offset is None else row.offset + at
            found[row.start + at] = Cell(
                row.data, row.zero, row.present, row.compressed, row.depth, row.file, offset
            )  # fmt: skip
        previous = row.end
    assert extents.end == previous
    assert not found or extents.begin == min(found)
    return found


def runs(model: Cells) -> list[Extent]:
    """The longest rows with one answer each."""
    rows: list[Extent] = []
    for position, cell in sorted(model.items()):
        data, zero, present, compressed, depth, file, offset = cell
        one = Extent(position, 1, data, zero, present, depth, compressed, file, offset)
        if rows and position - 1 in model:
            last = model[position - 1]
            follows = offset is None or (last.offset is not None and last.offset + 1 == offset)
            if last[:6] == cell[:6] and follows:
                rows[-1] = rows[-1]._replace(length=rows[-1].length + 1)
                continue
        rows.append(one)
    return rows


def blocks(begin: int, end: int, alignment: int) -> Iterator[range]:
    """The parts of [begin, end) that lie in each block of the absolute grid."""
    while begin < end:
        stop = min(begin // alignment * alignment + alignment, end)
        yield range(begin, stop)
        begin = stop


def rounded(model: Cells, begin: int, end: int, alignment: int) -> Cells:
    """The table of rounding, read aloud."""
    depth = model[max(model)].depth if model else 0
    padding = Cell(False, True, False, False, depth, None, None)
    result: Cells = {}
    for block in blocks(begin, end, alignment):
        parts = [model.get(position, padding) for position in block]
        present = [part for part in parts if part.present]
        first = parts[0]
        chained = all(
            part.file is first.file and part.offset is not None and part.offset == (first.offset or 0) + number
            for number, part in enumerate(parts)
        )
        for number, position in enumerate(block):
            result[position] = Cell(
                data=any(part.data for part in parts),
                zero=all(part.zero for part in parts),
                present=bool(present),
                compressed=any(part.compressed for part in parts),
                depth=min(part.depth for part in present or parts),
                file=first.file if chained else None,
                offset=(first.offset or 0) + number if chained else None,
            )
    return result


# ---- what is tried


@st.composite
def spans(draw: st.DrawFn) -> Span:
    length = draw(st.integers(0, 40))
    begin = draw(st.integers(0, 24)) + draw(st.sampled_from([0, 1 << 40, MAX_SIZE - 24 - length]))
    return begin, begin + length


@st.composite
def answers(draw: st.DrawFn, span: Span | None = None, gaps: bool = False) -> Extents:
    begin, end = span or draw(spans())
    inner = draw(st.sets(st.integers(begin + 1, end - 1), max_size=14)) if end - begin > 1 else ()
    some_flags = draw(st.lists(st.integers(0, 15), min_size=1, max_size=4))  # few, so that neighbours are often equal
    rows: list[Extent] = []
    file: Disk | None = None
    following = 0
    for start, stop in itertools.pairwise([begin, *sorted(inner), end]):
        flags = draw(st.sampled_from(some_flags))
        data, zero, present, compressed = (bool(flags >> bit & 1) for bit in range(4))
        host = draw(st.sampled_from(["none", "new", "next"]))
        if host == "new":
            file, following = draw(st.sampled_from(FILES)), draw(st.integers(0, 50))
        depth = draw(st.integers(0, 2))
        where = (None, None) if host == "none" or file is None else (file, following)
        if start < stop and not (gaps and draw(st.booleans())):
            rows.append(Extent(start, stop - start, data, zero, present, depth, compressed, *where))
        following += stop - start
    if not rows:
        return Extents.empty(begin)
    found = Extents.from_extents(rows)
    files = tuple(draw(st.permutations(FILES)))  # the same answer, whatever the order its files are numbered in
    return Extents.concat([Extents.empty(found.begin, files), found])


@st.composite
def pairs(draw: st.DrawFn, gaps: bool = False) -> tuple[Extents, Extents]:
    """Two answers for one range, or with gaps for ranges that may differ."""
    span = draw(spans())
    other = (
        (max(0, span[0] - draw(st.integers(0, 9))), min(span[1] + draw(st.integers(0, 9)), MAX_SIZE)) if gaps else span
    )
    return draw(answers(span, gaps)), draw(answers(other, gaps))


@st.composite
def views(draw: st.DrawFn) -> tuple[Extents, int]:
    """An answer, and where the consumer's view ends: there or a little further."""
    extents = draw(answers())
    return extents, min(extents.end + draw(st.integers(0, 24)), MAX_SIZE)


questions = st.fixed_dictionaries(
    {},
    optional={name: st.booleans() for name in ("data", "zero", "present", "compressed")} | {"depth": st.integers(0, 2)},
)
alignments = st.sampled_from([1, 2, 4, 8, 16])


# ---- each operation is the model's


@law
@given(answers(gaps=True), st.integers(-8, 60), st.integers(0, 60))
def test_clip(extents: Extents, before: int, length: int) -> None:
    begin = extents.begin + before
    part = extents.clip(begin, begin + length)
    assert cells(part) == {p: c for p, c in cells(extents).items() if begin <= p < begin + length}
    assert part or extents.begin <= part.begin <= extents.end


@law
@given(answers(gaps=True), st.integers(-24, 24))
def test_shift(extents: Extents, delta: int) -> None:
    if extents.begin + delta < 0 or extents.end + delta > MAX_SIZE:
        with pytest.raises(ValueError, match="between 0 and"):
            extents.shift(delta)
        return
    moved = extents.shift(delta)
    assert cells(moved) == {p + delta: c for p, c in cells(extents).items()}
    assert moved.begin == extents.begin + delta
    assert moved.shift(-delta) == extents


@law
@given(pairs())
def test_over(pair: tuple[Extents, Extents]) -> None:
    top, below = pair
    upper, lower = cells(top), cells(below)
    expected = {p: c if c.present else lower[p]._replace(depth=lower[p].depth + 1) for p, c in upper.items()}
    assert cells(top.over(below)) == expected


@law
@given(pairs())
def test_masking(pair: tuple[Extents, Extents]) -> None:
    top, below = pair
    lower = cells(below)
    assert cells(top.masking(below)) == {p: c if c.present else lower[p] for p, c in cells(top).items()}
    if below.end < MAX_SIZE:  # there is no further
        with pytest.raises(ValueError, match="are not the same range"):
            top.masking(below.shift(1))


@law
@given(answers(gaps=True))
def test_coalesce(extents: Extents) -> None:
    assert list(extents.coalesce()) == runs(cells(extents))
    assert extents.coalesce().coalesce() == extents.coalesce()


@settings(deadline=None, max_examples=400)
@given(views(), alignments)
def test_align(view: tuple[Extents, int], alignment: int) -> None:
    extents, end = view
    model = cells(extents)
    assert list(extents.align(alignment, end)) == runs(rounded(model, extents.begin, end, alignment))
    assert list(extents.align(alignment)) == runs(rounded(model, extents.begin, extents.end, alignment))


@law
@given(pairs(gaps=True))
def test_intersect(pair: tuple[Extents, Extents]) -> None:
    extents, ranges = pair
    result = extents.intersect(ranges)
    inside = cells(ranges)
    assert cells(result) == {p: c for p, c in cells(extents).items() if p in inside}
    edges = [(max(a.start, b.start), min(a.end, b.end)) for a in extents for b in ranges]
    assert [(row.start, row.end) for row in result] == [edge for edge in edges if edge[0] < edge[1]]


@law
@given(answers(gaps=True), questions)
def test_where(extents: Extents, asked: dict[str, Any]) -> None:
    wanted = [row for row in extents if all(getattr(row, name) == value for name, value in asked.items())]
    assert list(extents.where(**asked)) == wanted


@law
@given(pairs(gaps=True))
def test_diff(pair: tuple[Extents, Extents]) -> None:
    mine, theirs = cells(pair[0]), cells(pair[1])
    differ = {p: c for p, c in mine.items() if p in theirs and c[:2] != theirs[p][:2]}
    assert list(pair[0].diff(pair[1])) == runs(differ)


@law
@given(answers(gaps=True))
def test_totals(extents: Extents) -> None:
    model = list(cells(extents).values())
    sums = [sum(cell[number] for cell in model) for number in range(4)]
    assert extents.totals() == (len(model), *sums, len(list(extents)))


@law
@given(answers(gaps=True))
def test_at(extents: Extents) -> None:
    rows = {p: row for row in extents for p in range(row.start, row.end)}
    for position in range(extents.begin - 2, extents.end + 2):
        if position in rows:
            assert extents.at(position) == rows[position]
        else:
            with pytest.raises(ValueError, match="no extent contains"):
                extents.at(position)


@law
@given(answers(gaps=True), st.integers(0, 24), st.integers(0, 5))
def test_pad_zero(extents: Extents, more: int, depth: int) -> None:
    padding = Cell(False, True, True, False, depth, None, None)
    end = min(extents.end + more, MAX_SIZE)
    assert cells(extents.pad_zero(end, depth)) == cells(extents) | dict.fromkeys(range(extents.end, end), padding)


@law
@given(answers(gaps=True), st.integers(0, 5))
def test_deepen(extents: Extents, layers: int) -> None:
    assert [row._replace(depth=row.depth - layers) for row in extents.deepen(layers)] == list(extents)


@law
@given(pairs(gaps=True))
def test_equal_is_equal_row_by_row(pair: tuple[Extents, Extents]) -> None:
    one, other = pair
    assert (one == other) == (one.begin == other.begin and list(one) == list(other))
    again = Extents.from_extents(list(one)) if one else Extents.empty(one.begin)
    assert one == again
    assert [one[number] for number in range(len(one))] == list(one)


@law
@given(answers(), st.integers(0, 40))
def test_a_split_answer_put_together_is_the_answer(extents: Extents, at: int) -> None:
    middle = min(extents.begin + at, extents.end)
    pieces = [extents.clip(extents.begin, middle), extents.clip(middle, extents.end)]
    assert cells(Extents.concat(pieces)) == cells(extents)
    assert Extents.concat(pieces).coalesce() == extents.coalesce()


@law
@given(pairs(), st.integers(0, 40), st.integers(0, 40))
def test_over_may_be_asked_in_parts(pair: tuple[Extents, Extents], first: int, length: int) -> None:
    top, below = pair
    low = min(top.begin + first, top.end)
    high = min(low + length, top.end)
    part = top.clip(low, high).over(below.clip(low, high))
    assert part.coalesce() == top.over(below).clip(low, high).coalesce()


# ---- the laws of rounding (docs: "exact inside, rounded at the edge")


def each_block(test: Callable[[list[Cell], Extent], None]) -> Callable[[], None]:
    """Runs `test` on the exact parts and the one rounded answer of every block, padding included."""

    @law
    @given(views(), alignments)
    def run(view: tuple[Extents, int], alignment: int) -> None:
        extents, end = view
        result = extents.align(alignment, end)
        model = cells(extents)
        filler = Cell(False, True, False, False, extents[-1].depth if extents else 0, None, None)
        for block in blocks(extents.begin, end, alignment):
            [answer] = result.clip(block[0], block[-1] + 1)
            test([model.get(position, filler) for position in block], answer)

    run.__name__ = test.__name__
    run.__doc__ = test.__doc__
    return run


@each_block
def test_a_block_is_data_if_any_part_is(parts: list[Cell], answer: Extent) -> None:
    assert answer.data == any(part.data for part in parts)


@each_block
def test_a_block_is_zero_if_all_parts_are(parts: list[Cell], answer: Extent) -> None:
    assert answer.zero == all(part.zero for part in parts)


@each_block
def test_a_block_is_present_if_any_part_is(parts: list[Cell], answer: Extent) -> None:
    assert answer.present == any(part.present for part in parts)


@each_block
def test_a_block_is_compressed_if_any_part_is(parts: list[Cell], answer: Extent) -> None:
    assert answer.compressed == any(part.compressed for part in parts)


@each_block
def test_a_block_has_an_offset_only_if_its_parts_follow_each_other_in_one_file(
    parts: list[Cell], answer: Extent
) -> None:
    first = parts[0]
    if first.offset is not None and all(
        (part.file, part.offset) == (first.file, first.offset + number) for number, part in enumerate(parts)
    ):
        assert (answer.file, answer.offset) == (first.file, first.offset)
    else:
        assert (answer.file, answer.offset) == (None, None)


@each_block
def test_a_block_has_the_smallest_depth_of_its_present_parts(parts: list[Cell], answer: Extent) -> None:
    assert answer.depth == min(part.depth for part in [part for part in parts if part.present] or parts)


@each_block
def test_a_block_inside_one_extent_keeps_its_answer(parts: list[Cell], answer: Extent) -> None:
    if len(runs(dict(enumerate(parts)))) == 1:
        data, zero, present, compressed, depth, file, offset = parts[0]
        assert answer[2:] == (data, zero, present, depth, compressed, file, offset)


@law
@given(views(), alignments)
def test_rounding_twice_is_rounding_once(view: tuple[Extents, int], alignment: int) -> None:
    extents, end = view
    for once in (extents.align(alignment), extents.align(alignment, end)):
        assert once.align(alignment) == once


@law
@given(views(), alignments, alignments)
def test_rounding_to_a_divisor_first_changes_nothing(view: tuple[Extents, int], one: int, other: int) -> None:
    extents, end = view
    small, large = min(one, other), max(one, other)
    assert extents.align(small).align(large) == extents.align(large)
    assert extents.align(small, end).align(large, end) == extents.align(large, end)


@law
@given(answers())
def test_rounding_to_one_is_the_identity(extents: Extents) -> None:
    assert extents.align(1) == extents.coalesce()


@law
@given(answers(), alignments)
def test_equal_neighbours_coalesce_after_rounding(extents: Extents, alignment: int) -> None:
    result = extents.align(alignment)
    assert list(result) == runs(cells(result))


@law
@given(views(), alignments)
def test_rounding_covers_the_view_exactly_once(view: tuple[Extents, int], alignment: int) -> None:
    extents, end = view
    result = extents.align(alignment, end)
    assert sorted(cells(result)) == list(range(extents.begin, end))
    assert all(row.start % alignment == 0 for row in result if row.start != extents.begin)
    assert (result.begin, result.end) == (extents.begin, end)


@law
@given(views(), alignments)
def test_rounding_never_invents_zeros_nor_loses_bytes(view: tuple[Extents, int], alignment: int) -> None:
    extents, end = view
    result = cells(extents.align(alignment, end))
    for position, exact in cells(extents).items():
        assert exact.zero or not result[position].zero
        assert result[position].data or not exact.data
        assert result[position].present or not exact.present
        assert result[position].offset in (None, exact.offset)


@law
@given(answers(), alignments, st.integers(0, 4))
def test_rounding_in_batches_cut_on_the_grid_is_rounding_at_once(extents: Extents, alignment: int, block: int) -> None:
    middle = (extents.begin // alignment + block) * alignment
    middle = min(max(middle, extents.begin), extents.end)
    if middle % alignment == 0 or middle in (extents.begin, extents.end):
        pieces = [
            extents.clip(extents.begin, middle).align(alignment),
            extents.clip(middle, extents.end).align(alignment),
        ]
        assert Extents.concat(pieces).coalesce() == extents.align(alignment)


@law
@given(answers(), alignments)
def test_rounding_does_not_depend_on_which_blocks_they_are(extents: Extents, alignment: int) -> None:
    delta = alignment if extents.begin < alignment else -alignment
    assert extents.shift(delta).align(alignment) == extents.align(alignment).shift(delta)


@law
@given(answers(), alignments)
def test_rounding_does_not_depend_on_how_the_answer_was_cut(extents: Extents, alignment: int) -> None:
    bytewise = [extents.clip(p, p + 1) for p in range(extents.begin, extents.end)] or [extents]
    assert Extents.concat(bytewise).align(alignment) == extents.align(alignment)
