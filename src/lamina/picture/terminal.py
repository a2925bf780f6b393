"""The status of a disk as rows of characters, for terminals; plain ASCII for terminals and files that have nothing else.

A row has the cells of one part of the disk, with its offset at the left. Where a layer below the top owns bytes, a second row
has the layer of each cell.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from ..errors import printable
from ..options import format_size
from ..palette import CONTENT, QUIET_TEXT, Colour, layer
from .cells import KINDS, Cell, Cells, cell_size, exact_size

#: The most rows of cells, so that a picture, with the rows of layers, fits a screen.
ROWS = 12
#: Numbers of cells in a row: small multiples of a power of two, so that rows begin at round offsets.
COLUMNS = (256, 192, 160, 128, 96, 80, 64, 48, 40, 32, 24, 16, 12, 8)
#: The least size of a cell, for small disks.
LEAST = 512

#: The marks of cells with one kind of content; of several kinds without storage, with storage for less than half of the
#: bytes, and for more; and of an unknown status. For terminals with block characters, and for others.
_MARKS = {"data": "█", "compressed": "▄", "reserved": "░", "zero": "▁", "hole": "·"}
_PLAIN_MARKS = {"data": "#", "compressed": "c", "reserved": "r", "zero": "0", "hole": "."}
_NONE, _LITTLE, _MUCH, _UNKNOWN = "none", "little", "much", "unknown"
_MIXED = {_NONE: ":", _LITTLE: "▒", _MUCH: "▓", _UNKNOWN: "?"}
_PLAIN_MIXED = {_NONE: ":", _LITTLE: "+", _MUCH: "%", _UNKNOWN: "?"}
_MEANINGS = {
    "data": "data",
    "compressed": "compressed",
    "reserved": "reserved, reads as zero",
    "zero": "zero",
    "hole": "hole",
    _NONE: "zero and hole",
    _LITTLE: "mixed, less than half stored",
    _MUCH: "mixed, half or more stored",
    _UNKNOWN: "unknown",
}
#: The marks of layers; of deeper ones; of several layers in one cell; of none.
_LAYERS = "0123456789abcdefghijklmnopqrstuvwxyz"
_DEEPER, _SEVERAL, _NOBODY = "+", "*", " "


class Look(NamedTuple):
    """What a terminal can show. `colours`: 0, 256, or more for any colour; `light`: whether its background is light."""

    blocks: bool = False
    colours: int = 0
    light: bool = False


class _Glyph(NamedTuple):
    mark: str
    colour: Colour | None = None


def grid(begin: int, end: int, width: int, least: int = LEAST) -> tuple[int, int]:
    """The size of a cell, at least `least`, and the number of cells in a row, for a picture of [begin, end) in `width`
    columns."""
    columns = next((count for count in COLUMNS if count <= width - 12), COLUMNS[-1])
    return cell_size(begin, end, ROWS * columns, least), columns


def plot(
    cells: Cells, columns: int, look: Look, width: int, *, notes: str = "", layers: Sequence[str] = ()
) -> Iterator[str]:
    """The lines of the picture, with `columns` cells in a row, and a legend that is wrapped to `width`. `notes`: what the
    legend says besides the size of a cell; `layers`: the names of the layers, from the top. Names are escaped."""
    found = cells.cells()
    shown = {key for key, _ in map(_key, found)}
    deep = any(one.layers is not None and one.layers[1] > 0 for one in found)
    rows = [found[first : first + columns] for first in range(0, len(found), columns)]
    labels = [exact_size(row[0].start) for row in rows]
    indent = max(map(len, labels)) + 1
    for label, row in zip(labels, rows, strict=True):
        yield f"{label:>{indent}} {_painted([_content_glyph(one, look) for one in row], look)}"
        owned = [number for number, one in enumerate(row) if one.layers is not None]
        if deep and owned:
            yield f"{'':{indent}} {_painted([_layer_glyph(one) for one in row[: owned[-1] + 1]], look)}"
    yield ""
    yield from _wrapped(
        [f"cell: {exact_size(cells.size)}", f"end: {exact_size(cells.end)}", *([notes] if notes else [])], width
    )
    totals = cells.totals()
    legend = [(key, f"{_MEANINGS[key]} {format_size(totals[key])}") for key in KINDS if key in totals]
    legend += [(key, _MEANINGS[key]) for key in _MIXED if key in shown]
    yield from _wrapped([f"{_painted([_glyph(key, look)], look)} {text}" for key, text in legend], width)
    if deep:
        yield from _wrapped(list(_layer_legend(found, layers, look)), width)


def _layer_legend(found: Iterable[Cell], names: Sequence[str], look: Look) -> Iterator[str]:
    depths = {depth for one in found if one.layers is not None for depth in one.layers}
    yield "layers:"
    for depth in sorted(depths):
        if depth >= len(_LAYERS):
            yield f"{_DEEPER} {len(_LAYERS)} and deeper"
            break
        name = printable(names[depth]) if depth < len(names) else f"layer {depth}"
        yield f"{_painted([_Glyph(_LAYERS[depth], layer(depth))], look)} {name}"
    if any(one.layers is not None and one.layers[0] != one.layers[1] for one in found):
        yield f"{_SEVERAL} several"


def _key(cell: Cell) -> tuple[str, str]:
    """What the mark of a cell says, and the kind that has its colour."""
    if cell.kind is not None:
        return cell.kind, cell.kind
    if cell.unknown:
        return _UNKNOWN, "hole"
    largest = max(cell.amounts, key=lambda kind: (kind in ("data", "compressed", "reserved"), cell.amounts[kind]))
    if not cell.stored:
        return _NONE, largest
    return (_LITTLE if 2 * cell.stored < cell.length else _MUCH), largest


def _content_glyph(cell: Cell, look: Look) -> _Glyph:
    key, kind = _key(cell)
    return _glyph(key, look, kind)


def _glyph(key: str, look: Look, kind: str | None = None) -> _Glyph:
    marks = (_MARKS | _MIXED) if look.blocks else (_PLAIN_MARKS | _PLAIN_MIXED)
    kind = kind or (key if key in CONTENT else "hole")
    # The colour of a hole is close to the background: a character in it could not be seen.
    return _Glyph(marks[key], QUIET_TEXT if kind == "hole" else CONTENT[kind])


def _layer_glyph(cell: Cell) -> _Glyph:
    if cell.layers is None:
        return _Glyph(_NOBODY)
    top, bottom = cell.layers
    if top != bottom:
        return _Glyph(_SEVERAL)
    return _Glyph(_LAYERS[top] if top < len(_LAYERS) else _DEEPER, layer(top))


def _painted(glyphs: Iterable[_Glyph], look: Look) -> str:
    """The marks with the escape sequences of their colours, one for each change of colour."""
    if not look.colours:
        return "".join(glyph.mark for glyph in glyphs)
    text, now = "", None
    for glyph in glyphs:
        if glyph.colour != now:
            now = glyph.colour
            text += "\x1b[39m" if now is None else _sequence(now.light if look.light else now.dark, look.colours)
        text += glyph.mark
    return f"{text}\x1b[39m"


def _sequence(colour: str, colours: int) -> str:
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    if colours > 256:
        return f"\x1b[38;2;{red};{green};{blue}m"
    # The nearest colour of the cube of 6 * 6 * 6 colours, or of the 24 greys.
    levels = (0, 95, 135, 175, 215, 255)
    cube = [min(range(6), key=lambda step: abs(levels[step] - part)) for part in (red, green, blue)]
    grey = min(range(24), key=lambda step: abs(8 + 10 * step - (red + green + blue) // 3))

    def far(parts: Iterable[int]) -> int:
        return sum((one - other) ** 2 for one, other in zip(parts, (red, green, blue), strict=True))

    if far([8 + 10 * grey] * 3) < far(levels[step] for step in cube):
        return f"\x1b[38;5;{232 + grey}m"
    return f"\x1b[38;5;{16 + 36 * cube[0] + 6 * cube[1] + cube[2]}m"


def _wrapped(parts: Sequence[str], width: int) -> Iterator[str]:
    """The parts, with three spaces between them, in lines of at most `width` columns; one that is longer has its own line."""
    line, used = "", 0
    for part in parts:
        size = _columns(part)
        if line and used + 3 + size > width:
            yield line
            line, used = "", 0
        line, used = (f"{line}   {part}", used + 3 + size) if line else (f" {part}", size + 1)
    if line:
        yield line


def _columns(text: str) -> int:
    """The number of characters that are no part of an escape sequence of `_painted`."""
    count, inside = 0, False
    for character in text:
        if character == "\x1b":
            inside = True
        elif inside:
            inside = character != "m"
        else:
            count += 1
    return count
