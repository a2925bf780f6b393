"""`lamina.extents` on concrete cases: the tables of the specification, what is refused, and how values behave."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

from lamina.errors import OutOfRange
from lamina.extents import COMPRESSED, DATA, PRESENT, ZERO, Extent, Extents, HostPath
from lamina.limits import MAX_SIZE

MIB = 1 << 20


class Disk:
    def __init__(self, filename: str) -> None:
        self.filename = filename


BACK, TOP = Disk("back"), Disk("top")


def stored(start: int, length: int, offset: int, file: Disk = BACK) -> Extents:
    return Extents.single(start, length, data=True, present=True, file=file, offset=offset)


def zeros(start: int, end: int, depth: int = 0, present: bool = True) -> Extents:
    return Extents.single(start, end - start, zero=True, present=present, depth=depth)


def back() -> Extents:
    """A base of 100 MiB in clusters of 512 bytes, where the first and the third cluster were written."""
    nothing = zeros(1536, 100 * MIB, present=False)
    return Extents.concat(
        [stored(0, 512, 27648), zeros(512, 1024, present=False), stored(1024, 512, 28160), nothing]
    )  # fmt: skip


class TestTheTranscript:
    """A 1 MiB-cluster overlay, never written, over `back`."""

    @pytest.fixture
    def chain(self) -> Extents:
        return Extents.single(0, 100 * MIB).over(back())

    def test_exact(self, chain: Extents) -> None:
        assert list(chain) == [
            Extent(0, 512, data=True, present=True, depth=1, file=BACK, offset=27648),
            Extent(512, 512, zero=True, depth=1),
            Extent(1024, 512, data=True, present=True, depth=1, file=BACK, offset=28160),
            Extent(1536, 104856064, zero=True, depth=1),
        ]

    def test_rounded_to_4096(self, chain: Extents) -> None:
        assert list(chain.align(4096)) == [
            Extent(0, 4096, data=True, present=True, depth=1),
            Extent(4096, 100 * MIB - 4096, zero=True, depth=1),
        ]

    def test_rounded_to_512_is_exact(self, chain: Extents) -> None:
        assert chain.align(512) == chain

    def test_a_single_layer_rounded_to_4096(self) -> None:
        assert list(back().align(4096)) == [
            Extent(0, 4096, data=True, present=True),
            Extent(4096, 100 * MIB - 4096, zero=True),
        ]

    def test_a_block_larger_than_the_disk(self, chain: Extents) -> None:
        assert list(chain.align(1 << 62)) == [Extent(0, 100 * MIB, data=True, present=True, depth=1)]


class TestAFileOf1000Bytes:
    raw = stored(0, 1000, 0)

    def test_in_its_own_view_nothing_changes(self) -> None:
        assert self.raw.align(512) == self.raw
        assert self.raw.align(512, end=1000) == self.raw
        assert self.raw.align(1) == self.raw

    def test_in_a_view_rounded_up_the_last_block_takes_the_padding_in(self) -> None:
        assert list(self.raw.align(512, end=1024)) == [
            Extent(0, 512, data=True, present=True, file=BACK, offset=0),
            Extent(512, 512, data=True, present=True),
        ]

    def test_blocks_of_padding_alone_are_zero_and_owned_by_nobody(self) -> None:
        assert self.raw.align(512, end=2048).at(1024) == Extent(1024, 1024, zero=True)
        assert list(Extents.empty(0).align(512, end=512)) == [Extent(0, 512, zero=True)]

    def test_padding_continues_zeros(self) -> None:
        assert list(zeros(0, 1000, depth=2, present=False).align(512, end=1024)) == [
            Extent(0, 1024, zero=True, depth=2)
        ]


def test_small_holes_below_a_large_cluster() -> None:
    """Data and holes that alternate in units finer than the overlay's cluster round to data, at every granularity."""
    starts = np.arange(0, 8192, 512)
    base = Extents.from_columns(starts, 512, np.where(starts % 1024 == 0, DATA | PRESENT, ZERO))
    chain = Extents.concat([stored(0, 4096, 65536, TOP), Extents.single(4096, 4096)]).over(base)
    assert len(chain) == 9
    assert list(chain.align(4096)) == [
        Extent(0, 4096, data=True, present=True, file=TOP, offset=65536),
        Extent(4096, 4096, data=True, present=True, depth=1),
    ]


def test_a_short_backing_file_answers_zeros_past_its_end() -> None:
    chain = Extents.single(0, 2000).over(stored(0, 700, 0).pad_zero(2000))
    assert list(chain) == [
        Extent(0, 700, data=True, present=True, depth=1, file=BACK, offset=0),
        Extent(700, 1300, zero=True, present=True, depth=1),
    ]


def test_present_zeros_hide_the_data_below() -> None:
    chain = Extents.concat([zeros(0, 100), Extents.single(100, 100)]).over(stored(0, 200, 0))
    assert list(chain) == [
        Extent(0, 100, zero=True, present=True),
        Extent(100, 100, data=True, present=True, depth=1, file=BACK, offset=100),
    ]


def test_an_offset_survives_rounding_where_the_parts_follow_each_other() -> None:
    halves = Extents.concat([stored(0, 100, 1000), stored(100, 412, 1100)])
    assert list(halves.align(512)) == [Extent(0, 512, data=True, present=True, file=BACK, offset=1000)]
    for other in (stored(100, 412, 1101), stored(100, 412, 1100, TOP)):
        assert list(Extents.concat([stored(0, 100, 1000), other]).align(512)) == [
            Extent(0, 512, data=True, present=True)
        ]


def test_the_smallest_depth_counts_among_the_present() -> None:
    absent = Extents.single(0, 100, zero=True, depth=0)
    deep = Extents.single(100, 100, data=True, present=True, depth=2)
    assert Extents.concat([absent, deep]).align(512)[0].depth == 2
    assert Extents.concat([absent, zeros(100, 200, depth=2, present=False)]).align(512)[0].depth == 0


def test_compressed_bytes_are_sticky() -> None:
    row = Extents.concat([Extents.single(0, 100, data=True, present=True, compressed=True), stored(100, 412, 100)])
    assert list(row.align(512)) == [Extent(0, 512, data=True, present=True, compressed=True)]


class TestTheTopOfTheNumberLine:
    def test_the_last_block_does_not_overflow(self) -> None:
        begin = MAX_SIZE - 5000
        two = Extents.concat([zeros(begin, MAX_SIZE - 10), stored(MAX_SIZE - 10, 10, MAX_SIZE - 10)])
        edge = MAX_SIZE // 4096 * 4096
        assert list(two.align(4096)) == [
            Extent(begin, edge - begin, zero=True, present=True),
            Extent(edge, MAX_SIZE - edge, data=True, present=True),
        ]
        assert two.align(1 << 62).end == MAX_SIZE

    def test_the_whole_line_is_one_extent(self) -> None:
        line = Extents.single(0, MAX_SIZE, data=True, present=True, file=BACK, offset=0)
        assert line.align(4096) == line
        assert line.totals().data == MAX_SIZE
        assert line.clip(MAX_SIZE - 1, MAX_SIZE)[0].offset == MAX_SIZE - 1

    @pytest.mark.parametrize(
        "too_far",
        [
            lambda: Extents.single(MAX_SIZE, 1),
            lambda: Extents.single(1 << 63, 1),
            lambda: Extents.single(0, 1 << 63),
            lambda: Extents.single(1, MAX_SIZE),
            lambda: Extents.single(0, 2, file=BACK, offset=MAX_SIZE - 1),
            lambda: Extents.empty(1 << 63),
            lambda: Extents.empty(-1),
            lambda: Extents.single(-1, 2),
            lambda: Extents.single(0, 10).shift(MAX_SIZE - 9),
            lambda: Extents.single(5, 10).shift(-6),
            lambda: Extents.single(0, 10).align(16, end=1 << 63),
            lambda: Extents.single(0, 10).pad_zero(1 << 63),
        ],
    )
    def test_beyond_it_is_refused(self, too_far: object) -> None:
        with pytest.raises(OutOfRange):
            too_far()  # type: ignore[operator]


class TestColumns:
    def test_are_taken_without_a_copy(self) -> None:
        start = np.arange(0, 1000, 10, dtype=np.int64)
        extents = Extents.from_columns(start, 10, DATA)
        assert np.shares_memory(extents.start, start)
        start[0] = 0  # the caller's own array stays writable

    def test_cannot_be_written(self) -> None:
        for extents in (back(), back().align(4096), back().clip(10, 600)):
            for name in ("start", "length", "flags", "depth", "file", "offset"):
                with pytest.raises(ValueError, match="read-only"):
                    getattr(extents, name)[0] = 0
        with pytest.raises(AttributeError):
            back().begin = 5  # type: ignore[misc]

    def test_have_their_types_whatever_was_given(self) -> None:
        extents = Extents.from_columns([0, 5], [5, 5], [DATA, ZERO], depth=[1, 2], offset=[7, -1], files=(BACK,))
        assert [
            column.dtype for column in (extents.start, extents.length, extents.flags, extents.depth, extents.file)
        ] == [np.int64, np.int64, np.uint8, np.int32, np.int32]
        assert extents.offset.dtype == np.int64
        assert list(extents) == [
            Extent(0, 5, data=True, depth=1, file=BACK, offset=7),
            Extent(5, 5, zero=True, depth=2),
        ]

    def test_big_endian_tables_are_understood(self) -> None:
        table = np.array([100, 200], ">u8")
        assert [row.offset for row in Extents.from_columns([0, 9], 9, DATA, offset=table, files=(BACK,))] == [100, 200]

    def test_as_booleans(self) -> None:
        extents = Extents.from_columns(np.arange(16), 1, np.arange(16))
        for number, name in enumerate(("data", "zero", "present", "compressed")):
            assert getattr(extents, name).tolist() == [bool(flags >> number & 1) for flags in range(16)]

    @pytest.mark.parametrize(
        ("columns", "more"),
        [
            (([0, 5], [6, 5], 0), {}),  # they overlap
            (([5, 0], 5, 0), {}),  # not in order
            (([0, 0], 5, 0), {}),
            (([0], 0, 0), {}),  # empty
            (([0], -1, 0), {}),
            (([0, 5], [5], 0), {}),  # not as many rows
            (([[0, 5]], 5, 0), {}),
            (([0], 5, 16), {}),  # no such flag
            (([0], 5, 0), {"depth": -1}),
            (([0], 5, 0), {"offset": 0}),  # no such file
            (([0], 5, 0), {"offset": 0, "file": 1, "files": (BACK,)}),
            (([0], 5, 0), {"offset": -2, "files": (BACK,)}),
            (([0], 5, 0), {"offset": [-1], "file": [0], "files": (BACK,)}),
            (([0], 5, 0), {"offset": [0], "file": [-1], "files": (BACK,)}),
            (([0], 5, 0), {"files": (BACK, BACK)}),
        ],
    )
    def test_that_contradict_themselves_are_refused(self, columns: tuple[object, ...], more: dict[str, object]) -> None:
        with pytest.raises(ValueError, match=r"\w"):
            Extents.from_columns(*columns, **more)  # type: ignore[arg-type]

    def test_a_file_without_an_offset_is_refused(self) -> None:
        with pytest.raises(ValueError, match="without an offset"):
            Extents.single(0, 5, file=BACK)
        with pytest.raises(ValueError, match=r"not in `files`|without a file"):
            Extents.single(0, 5, offset=0)


class TestGaps:
    holed = back().where(data=True)

    def test_are_seen(self) -> None:
        assert not self.holed.contiguous
        assert back().contiguous
        assert Extents.empty(7).contiguous
        assert (self.holed.begin, self.holed.end, len(self.holed)) == (0, 1536, 2)

    def test_cannot_be_rounded_or_laid_over_anything(self) -> None:
        with pytest.raises(ValueError, match="gaps"):
            self.holed.align(512)
        with pytest.raises(ValueError, match="gaps"):
            self.holed.over(zeros(0, 1536))
        with pytest.raises(ValueError, match="gaps"):
            zeros(0, 1536).over(self.holed)

    def test_are_not_joined(self) -> None:
        equal = Extents.from_columns([0, 10, 30], 10, ZERO)
        assert list(equal.coalesce()) == [Extent(0, 20, zero=True), Extent(30, 10, zero=True)]


class TestWrongUse:
    @pytest.mark.parametrize("alignment", [0, -1, 3, 4095, 1 << 63])
    def test_an_alignment_that_is_none(self, alignment: int) -> None:
        with pytest.raises(ValueError, match="power of two"):
            back().align(alignment)

    def test_a_view_that_ends_too_early(self) -> None:
        with pytest.raises(ValueError, match="clip them first"):
            stored(0, 1000, 0).align(512, end=999)
        with pytest.raises(ValueError, match="clip them first"):
            stored(0, 1000, 0).pad_zero(999)

    def test_layers_of_different_ranges(self) -> None:
        with pytest.raises(ValueError, match="are not the same range"):
            zeros(0, 10).over(zeros(0, 11))
        with pytest.raises(ValueError, match="are not the same range"):
            zeros(0, 10).over(zeros(1, 10))

    def test_pieces_that_do_not_touch(self) -> None:
        with pytest.raises(ValueError, match="does not begin at the end of"):
            Extents.concat([zeros(0, 10), zeros(11, 12)])
        with pytest.raises(ValueError, match="nothing"):
            Extents.concat([])

    def test_a_range_turned_round(self) -> None:
        with pytest.raises(ValueError, match="before it begins"):
            back().clip(10, 9)

    def test_a_row_that_is_not_there(self) -> None:
        assert back()[-1] == back()[3]
        for index in (4, -5):
            with pytest.raises(IndexError):
                back()[index]
        with pytest.raises(OutOfRange, match="offset 104857600"):
            back().at(100 * MIB)


class TestValues:
    def test_an_empty_answer_knows_its_place(self) -> None:
        nothing = Extents.empty(512)
        assert not nothing
        assert (nothing.begin, nothing.end, list(nothing)) == (512, 512, [])
        assert nothing == Extents.empty(512, (BACK,))
        assert nothing != Extents.empty(0)
        for same in (nothing.align(4096), nothing.coalesce(), nothing.over(nothing), nothing.clip(0, 9999)):
            assert same == nothing
        assert nothing.shift(-500).begin == 12
        assert nothing.totals() == (0, 0, 0, 0, 0, 0)
        assert back().clip(512, 512) == nothing
        assert back().clip(512, 512).begin == 512

    def test_files_are_compared_and_not_their_numbers(self) -> None:
        one = Extents.from_columns([0, 5], 5, DATA, file=[0, 1], offset=[0, 0], files=(BACK, TOP))
        other = Extents.from_columns([0, 5], 5, DATA, file=[1, 0], offset=[0, 0], files=(TOP, BACK))
        assert one == other
        assert one != Extents.from_columns([0, 5], 5, DATA, file=[0, 1], offset=[0, 0], files=(TOP, BACK))
        assert one != Extents.from_columns([0, 5], 5, DATA, file=[0, 0], offset=[0, 0], files=(BACK,))
        assert (one == 5) is False

    def test_joined_pieces_keep_their_files(self) -> None:
        both = Extents.concat([stored(0, 5, 0), stored(5, 5, 5, TOP), zeros(10, 15), stored(15, 5, 15)])
        assert [row.file for row in both] == [BACK, TOP, None, BACK]
        assert both.files == (BACK, TOP)

    def test_totals(self) -> None:
        assert back().totals() == (100 * MIB, 1024, 100 * MIB - 1024, 1024, 0, 4)
        assert back().totals().extents == 4
        packed = Extents.from_columns([0, 10], 10, [DATA | PRESENT | COMPRESSED, ZERO])
        assert packed.totals() == (20, 10, 10, 10, 10, 2)

    def test_many_rows_come_out_one_by_one(self) -> None:
        count = 10_001
        rows = list(Extents.from_columns(np.arange(count) * 2, 2, DATA, offset=np.arange(count) * 4, files=(TOP,)))
        assert rows == [Extent(n * 2, 2, data=True, file=TOP, offset=n * 4) for n in range(count)]
        assert {type(row.start) for row in rows} == {int}
        assert {type(row.data) for row in rows} == {bool}
        assert rows[-1].end == count * 2

    def test_a_comparison_of_two_disks(self) -> None:
        mine = Extents.concat([stored(0, 100, 0), zeros(100, 200)])
        theirs = Extents.concat([zeros(0, 50), stored(50, 150, 0, TOP)])
        assert list(mine.diff(theirs)) == [
            Extent(0, 50, data=True, present=True, file=BACK, offset=0),
            Extent(100, 100, zero=True, present=True),
        ]
        assert not mine.diff(mine)

    def test_the_data_inside_dirty_ranges(self) -> None:
        dirty = Extents.from_columns([256, 1280], [512, 1024], DATA).where(data=True)
        assert [(row.start, row.end, row.offset) for row in back().where(data=True).intersect(dirty)] == [
            (256, 512, 27904),
            (1280, 1536, 28416),
        ]

    def test_print_shortly(self) -> None:
        many = Extents.from_columns(np.arange(1000), 1, DATA)
        assert "and 992 more" in repr(many)
        assert repr(Extents.empty(5)) == "<Extents [5, 5): >"
        assert "more" not in repr(back())

    def test_can_be_copied_and_sent(self) -> None:
        plain = zeros(0, 10)
        assert pickle.loads(pickle.dumps(plain)) == plain
        assert copy.deepcopy(plain) == plain
        whole = back()
        sent = pickle.loads(pickle.dumps(whole))
        assert [one.file for one in sent] == [one.file and HostPath(one.file.filename) for one in whole]
        assert [one._replace(file=None) for one in sent] == [one._replace(file=None) for one in whole]
        assert pickle.loads(pickle.dumps(sent)) == sent
        with pytest.raises(ValueError, match="read-only"):
            sent.start[0] = 1
        assert copy.copy(whole).files[0] is copy.deepcopy(whole).files[0] is whole.files[0]
        with pytest.raises(TypeError):
            hash(plain)
