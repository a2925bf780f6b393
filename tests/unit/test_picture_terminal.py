"""Pictures in the terminal: exact drawings of small disks, in each look."""

from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.extents import Extent, Extents
from lamina.palette import CONTENT, layer
from lamina.picture.cells import Cells
from lamina.picture.terminal import COLUMNS, ROWS, Look, grid, plot

PLAIN, BLOCKS, COLOURS = Look(), Look(blocks=True), Look(blocks=True, colours=1 << 24)
SEQUENCE = re.compile(r"\x1b\[[\d;]*m")


def drawn(extents: Extents, size: int, columns: int, look: Look = PLAIN, width: int = 80, **more: object) -> list[str]:
    cells = Cells(extents.begin, extents.end, size)
    cells.add(extents)
    return list(plot(cells, columns, look, width, **more))  # type: ignore[arg-type]


#: Each kind in a cell of its own, then cells of several kinds.
EVERY = Extents.from_extents(
    [
        Extent(0, 1024, data=True, present=True),
        Extent(1024, 1024, data=True, present=True, compressed=True),
        Extent(2048, 1024, data=True, zero=True, present=True),
        Extent(3072, 1024, zero=True, present=True),
        Extent(4096, 1024 + 512, zero=True),
        Extent(5632, 512, zero=True, present=True),
        Extent(6144, 511, data=True, present=True),
        Extent(6655, 513 + 512, zero=True),
        Extent(7680, 512, data=True, present=True),
    ]
)


@pytest.mark.parametrize(
    ("look", "first", "second", "legend"),
    [
        (
            PLAIN,
            "   0 B #cr0",
            " 4 KiB .:+%",
            [
                " # data 2 KiB   c compressed 1 KiB   r reserved, reads as zero 1 KiB",
                " 0 zero 1.5 KiB   . hole 2.5 KiB   : zero and hole",
                " + mixed, less than half stored   % mixed, half or more stored",
            ],
        ),
        (
            BLOCKS,
            "   0 B █▄░▁",
            " 4 KiB ·:▒▓",
            [
                " █ data 2 KiB   ▄ compressed 1 KiB   ░ reserved, reads as zero 1 KiB",
                " ▁ zero 1.5 KiB   · hole 2.5 KiB   : zero and hole",
                " ▒ mixed, less than half stored   ▓ mixed, half or more stored",
            ],
        ),
    ],
)
def test_every_kind(look: Look, first: str, second: str, legend: list[str]) -> None:
    assert drawn(EVERY, 1024, 4, look) == [first, second, "", " cell: 1 KiB   end: 8 KiB", *legend]


def test_layers_have_a_second_row_where_they_own_bytes() -> None:
    chain = Extents.from_extents(
        [
            Extent(0, 512, data=True, present=True, depth=1),
            Extent(512, 512, zero=True, depth=1),
            Extent(1024, 512, data=True, present=True, depth=1),
            Extent(1536, 2048, zero=True, depth=1),
            Extent(3584, 512, data=True, present=True, depth=40),
            Extent(4096, 4096, zero=True, depth=40),
            Extent(8192, 100, data=True, present=True),
            Extent(8292, 412, zero=True, present=True, depth=11),
        ]
    )
    names = ["top", "a\x1b[0mb"]
    assert drawn(chain, 512, 8, layers=names, notes="exact") == [
        "   0 B #.#....#",
        "       1 1    +",
        " 4 KiB ........",
        " 8 KiB +",
        "       *",
        "",
        " cell: 512 B   end: 8.5 KiB   exact",
        " # data 1.6 KiB   0 zero 412 B   . hole 6.5 KiB   + mixed, less than half stored",
        " layers:   0 top   1 a\\x1b[0mb   b layer 11   + 36 and deeper   * several",
    ]


def test_an_image_of_one_layer_has_no_second_row() -> None:
    assert drawn(Extents.single(0, 1024, data=True, present=True), 512, 8) == [
        " 0 B ##",
        "",
        " cell: 512 B   end: 1 KiB",
        " # data 1 KiB",
    ]


def test_a_range_begins_and_ends_anywhere() -> None:
    lines = drawn(Extents.single(600, 9000, data=True, present=True), 1024, 4)
    assert lines[:3] == [" 600 B ####", " 4 KiB ####", " 8 KiB ##"]
    assert lines[4] == " cell: 1 KiB   end: 9600 B"


def test_what_nobody_asked_for_is_unknown() -> None:
    cells = Cells(0, 4096, 1024)
    cells.add(Extents.single(0, 1500, zero=True))
    assert next(plot(cells, 4, PLAIN, 80)) == " 0 B .???"


def test_colours_change_no_character() -> None:
    for look in (COLOURS, COLOURS._replace(colours=256), COLOURS._replace(light=True)):
        told = drawn(EVERY, 1024, 4, look)
        assert [SEQUENCE.sub("", line) for line in told] == drawn(EVERY, 1024, 4, BLOCKS)
        assert all(line.endswith("\x1b[39m") for line in told[:2])
    red, green, blue = (int(CONTENT["data"].dark[at : at + 2], 16) for at in (1, 3, 5))
    assert drawn(EVERY, 1024, 4, COLOURS)[0].startswith(f"   0 B \x1b[38;2;{red};{green};{blue}m█\x1b[38;2;")


def test_the_nearest_of_256_colours() -> None:
    chain = Extents.single(0, 512, data=True, present=True, depth=1)
    second = drawn(chain, 512, 8, Look(blocks=True, colours=256))[1]
    code = int(re.findall(r"\x1b\[38;5;(\d+)m", second)[0])
    levels = (0, 95, 135, 175, 215, 255)
    table = {16 + number: (levels[number // 36], levels[number // 6 % 6], levels[number % 6]) for number in range(216)}
    table |= {232 + number: (8 + 10 * number,) * 3 for number in range(24)}
    wanted = tuple(int(layer(1).dark[at : at + 2], 16) for at in (1, 3, 5))
    far = {key: sum((a - b) ** 2 for a, b in zip(colour, wanted, strict=True)) for key, colour in table.items()}
    assert far[code] == min(far.values())


@pytest.mark.parametrize("width", [1, 20, 40, 60, 80, 100, 132, 200, 500])
def test_the_grid_fits_the_width(width: int) -> None:
    size, columns = grid(0, 10 << 40, width)
    assert columns in COLUMNS
    assert columns + 12 <= max(width, 20)
    assert size * columns * ROWS >= 10 << 40


@given(st.integers(0, 1 << 60), st.integers(1, 1 << 60), st.integers(10, 300))
def test_a_picture_has_a_bounded_number_of_rows(begin: int, length: int, width: int) -> None:
    size, columns = grid(begin, begin + length, width)
    cells = Cells(begin, begin + length, size)
    cells.add(Extents.single(begin, length, data=True, present=True, depth=1))
    lines = list(plot(cells, columns, BLOCKS, width, layers=["x" * 20, "y" * 20]))
    rows = lines[: lines.index("")]
    assert len(rows) <= 2 * ROWS
    assert len(cells) == sum(row.count("█") for row in rows)
    longest = max(map(len, lines))
    assert longest <= max(width, 8 + 24, 26) + 12
    assert all(unicodedata.category(character)[0] != "C" for line in lines for character in line)
