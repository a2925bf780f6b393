"""The status of a disk as a small static SVG inside a page: rows of cells by content, with the owning layers beneath.

A cell of several kinds is divided by their shares; a kind that occurs is never too small to be seen. The picture has its own
background, so that it can be read on a page of any colour scheme; it has no script and refers to nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..options import format_size
from ..palette import BACKGROUND, CONTENT, LAYERS, QUIET_TEXT, TEXT, Colour, layer
from .cells import KINDS, Cell, Cells, cell_size, exact_size
from .markup import escaped, shortened

#: The most cells of a picture, and the cells of a row.
COLUMNS, ROWS = 64, 8
#: The least size of a cell, except for ranges of fewer than eight such cells.
_LEAST_SIZE = 512
#: Pixels: of a cell; the least height of a kind in a mixed cell; of the row of layers; between rows.
_WIDTH, _HEIGHT, _LEAST, _STRIP, _GAP = 10, 18, 2.0, 4, 6
#: Pixels: of the offsets at the left; of a line of the legend; of a character there; around all.
_LEFT, _LINE, _CHARACTER, _MARGIN = 76, 20, 6.9, 10
#: The most layers in the legend, and the most characters of a name there.
_MOST_LAYERS, _LONGEST = 8, 40
_MEANINGS = {"reserved": "reserved, reads as zero"}


def sized(begin: int, end: int) -> Cells:
    """The cells for a picture of [begin, end), which is not empty."""
    least = _LEAST_SIZE if end - begin >= 8 * _LEAST_SIZE else 1
    return Cells(begin, end, cell_size(begin, end, COLUMNS * ROWS, least))


def svg(cells: Cells, title: str, layers: Sequence[str] = ()) -> str:
    """The picture of these cells. `layers`: names of the layers, from the top. All texts are escaped."""
    found = cells.cells()
    deep = any(one.layers is not None and one.layers[1] > 0 for one in found)
    rows = [found[first : first + COLUMNS] for first in range(0, len(found), COLUMNS)]
    pitch = _HEIGHT + _GAP + (_STRIP if deep else 0)
    width = _LEFT + COLUMNS * _WIDTH + 2 * _MARGIN
    shapes: dict[str, list[str]] = {}
    tips: list[str] = []
    labels: list[str] = []
    for number, row in enumerate(rows):
        top = _MARGIN + number * pitch
        label = escaped(exact_size(row[0].start))
        labels.append(f'<text class="q" x="{_MARGIN + _LEFT - 8}" y="{top + 13}" text-anchor="end">{label}</text>')
        for column, cell in enumerate(row):
            left = _MARGIN + _LEFT + column * _WIDTH
            for name, height, at in _parts(cell):
                shapes.setdefault(name, []).append(f"M{left} {top + at:g}h{_WIDTH}v{height:g}h-{_WIDTH}z")
            if deep and cell.layers is not None:
                name = f"layer{cell.layers[0] % len(LAYERS)}" if cell.layers[0] == cell.layers[1] else "several"
                shapes.setdefault(name, []).append(f"M{left} {top + _HEIGHT + 1}h{_WIDTH}v{_STRIP}h-{_WIDTH}z")
        tips += _tips(row, top)
    colours = _colours()
    top = _MARGIN + len(rows) * pitch + 8
    drawn = [f'<path class="{name}" fill="{colours[name].light}" d="{"".join(d)}"/>' for name, d in shapes.items()]
    legend, bottom = _legend(cells, found, layers if deep else None, top, width)
    size = f'width="{width}" height="{bottom + _MARGIN}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="lamina-status" viewBox="0 0 {width} {bottom + _MARGIN}" {size} '
        f'role="img" aria-label="{escaped(title)}" style="max-width:100%;height:auto" font-size="12" '
        f'font-family="system-ui, sans-serif" fill="{TEXT.light}">'
        f"<title>{escaped(title)}</title><style>{_style(colours)}</style>"
        f'<rect class="background" width="{width}" height="{bottom + _MARGIN}" rx="6" fill="{BACKGROUND.light}"/>'
        + "".join([*labels, *drawn, *legend, *tips]).replace('class="q"', f'class="q" fill="{QUIET_TEXT.light}"')
        + "</svg>"
    )


def _colours() -> dict[str, Colour]:
    found = {**CONTENT, "several": QUIET_TEXT, "unknown": QUIET_TEXT}
    return found | {f"layer{depth}": layer(depth) for depth in range(len(LAYERS))}


def _style(colours: dict[str, Colour]) -> str:
    """The colours for dark schemes. Style sheets inside a page apply to the whole page, so all rules name the class of the
    picture."""
    rules = {name: colour.dark for name, colour in colours.items()}
    rules |= {"background": BACKGROUND.dark, "q": QUIET_TEXT.dark}
    told = "".join(f".lamina-status .{name}{{fill:{colour}}}" for name, colour in rules.items())
    return f"@media (prefers-color-scheme:dark){{.lamina-status text{{fill:{TEXT.dark}}}{told}}}"


def _parts(cell: Cell) -> Iterator[tuple[str, float, float]]:
    """(name, height, offset from the top) of each part of a cell: its kinds from the bottom, and what is unknown."""
    amounts = {kind: cell.amounts[kind] for kind in KINDS if kind in cell.amounts}
    if not amounts:
        yield "unknown", 1, _HEIGHT - 1
        return
    free = _HEIGHT - _LEAST * len(amounts)
    bottom: float = _HEIGHT
    for kind, amount in amounts.items():
        height = _LEAST + free * amount / cell.length
        bottom -= height
        yield kind, round(height, 2), round(bottom, 2)


def _tips(row: Sequence[Cell], top: float) -> Iterator[str]:
    """Invisible boxes over cells, with what they hold as a tool tip; one for adjacent cells of one kind and layer."""

    def alike(one: Cell) -> tuple[str | None, tuple[int, int] | None, bool]:
        return one.kind, one.layers, not one.amounts

    first = 0
    for number in range(1, len(row) + 1):
        uniform = number < len(row) and (row[number].kind is not None or not row[number].amounts)
        if uniform and alike(row[number - 1]) == alike(row[number]):
            continue
        left = _MARGIN + _LEFT + first * _WIDTH
        box = f'x="{left}" y="{top}" width="{(number - first) * _WIDTH}" height="{_HEIGHT + _STRIP + 1}"'
        yield f'<rect {box} fill="none" pointer-events="all"><title>{escaped(_tip(row[first:number]))}</title></rect>'
        first = number


def _tip(cells: Sequence[Cell]) -> str:
    amounts: dict[str, int] = {}
    for cell in cells:
        for kind, amount in cell.amounts.items():
            amounts[kind] = amounts.get(kind, 0) + amount
    told = (
        ", ".join(f"{_MEANINGS.get(kind, kind)} {exact_size(amount)}" for kind, amount in amounts.items()) or "unknown"
    )
    where = ""
    if cells[0].layers is not None:
        top, bottom = cells[0].layers
        where = f"; layer {top}" if top == bottom else f"; layers {top} to {bottom}"
    return f"{exact_size(cells[0].start)} to {exact_size(cells[-1].end)}: {told}{where}"


def _legend(
    cells: Cells, found: Sequence[Cell], layers: Sequence[str] | None, top: float, width: float
) -> tuple[list[str], float]:
    """The elements of the legend below `top`, and its end."""
    colours = _colours()
    items: list[tuple[str, str]] = [
        (kind, f"{_MEANINGS.get(kind, kind)} {format_size(amount)}") for kind, amount in cells.totals().items()
    ]
    if any(one.unknown for one in found):
        items.append(("unknown", f"unknown {format_size(sum(one.unknown for one in found))}"))
    lines = [items]
    if layers is not None:
        owned = [one.layers for one in found if one.layers is not None]
        depths = sorted({depth for pair in owned for depth in pair})
        named = [(f"layer{depth % len(LAYERS)}", _layer_name(depth, layers)) for depth in depths[:_MOST_LAYERS]]
        if len(depths) > _MOST_LAYERS:
            named.append(("several", "deeper layers"))
        if any(top != bottom for top, bottom in owned):
            named.append(("several", "several layers"))
        lines.append(named)
    drawn: list[str] = []
    base = top
    for line in lines:
        left: float = _MARGIN
        for name, text in line:
            needed = 22 + len(text) * _CHARACTER + 14
            if left > _MARGIN and left + needed > width:
                left, base = _MARGIN, base + _LINE
            high = 4 if name.startswith(("layer", "several")) else 1 if name == "unknown" else 11
            drawn.append(
                f'<rect class="{name}" x="{left:g}" y="{base + 11 - high:g}" width="14" height="{high}" '
                f'fill="{colours[name].light}"/><text x="{left + 20:g}" y="{base + 10:g}">{escaped(text)}</text>'
            )
            left += needed
        base += _LINE
    about = f"one cell is {exact_size(cells.size)}; the end is at {exact_size(cells.end)}"
    if any(len(one.amounts) > 1 for one in found):
        about += "; a cell of several kinds is divided by their shares"
    drawn.append(f'<text class="q" x="{_MARGIN}" y="{base + 10:g}">{about}</text>')
    return drawn, base + 14


def _layer_name(depth: int, names: Sequence[str]) -> str:
    return f"{depth} {shortened(names[depth], _LONGEST)}" if depth < len(names) else f"layer {depth}"
