"""What notebooks show of images and extents: a picture and a table, in a bounded time and size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from time import monotonic
from typing import TYPE_CHECKING

from ..options import format_size
from ..palette import content
from .cells import Cells, exact_size
from .status_svg import sized, svg
from .tables import heading, note, table

if TYPE_CHECKING:
    from ..extents import Extents
    from ..image import Image
    from ..node import Node

#: The most extents that a picture of an image asks for, and the seconds after which it asks for no more.
MOST_EXTENTS, PATIENCE = 1 << 17, 0.5
#: The bytes of the first query. The next ones are longer as long as they are fast, up to this, or this part of the disk.
_FIRST, _LONGEST, _LONGEST_PART = 1 << 26, 1 << 30, 1024


def of_image(image: Image, layers_of: Callable[[Node], Sequence[Node]]) -> str:
    """A picture of the disk and a table of its layers. `layers_of`: the layers of a graph, from the top."""
    size = image.size
    access = "read-only" if image.read_only else "writable"
    head = heading(image.filename, f"{image.format}, {format_size(size)} ({size} bytes), {access}")
    layers = layers_of(image.node)
    parts = [head]
    if size:
        cells = sized(0, size)
        known = add_bounded(cells, image)
        parts.append(svg(cells, f"Status of {image.filename}", [one.filename for one in layers]))
        if known < size:
            text = f"The picture ends at {exact_size(known)}, since the rest would take longer"
            parts.append(note(f"{text}; image.windows() has the status of the whole disk."))
    rows = ((str(depth), one.driver, one.filename, format_size(one.size)) for depth, one in enumerate(layers))
    parts.append(table(("layer", "format", "file", "size"), rows, len(layers)) if layers else "")
    return "".join(parts)


def add_bounded(cells: Cells, image: Image) -> int:
    """Add the status of an image to `cells`, from its beginning. Returns where it ends: at the end of the cells, or where
    MOST_EXTENTS or PATIENCE were reached."""
    begin = monotonic()
    deadline = begin + PATIENCE
    # One query of a whole disk could take long: an image without holes has few extents, and many tables.
    step, longest = _FIRST, max(_LONGEST, (cells.end - cells.begin) // _LONGEST_PART)
    at, count = cells.begin, 0
    while at < cells.end:
        for piece in image.windows(at, min(step, cells.end - at)):
            cells.add(piece)
            at = piece.end
            count += len(piece)
            now = monotonic()
            if count > MOST_EXTENTS or now > deadline:
                return at
        step = min(2 * step, longest) if now - begin < PATIENCE / 20 else max(step // 2, _FIRST)
        begin = now
    return at


def of_extents(found: Extents) -> str:
    """A picture of the extents, and a table of the first ones."""
    gaps = "" if found.contiguous else ", with gaps"
    parts = [note(f"{len(found)} extents from {found.begin} to {found.end}{gaps}")]
    if len(found):
        cells = sized(found.begin, found.end)
        cells.add(found)
        parts.append(svg(cells, f"Extents from {found.begin} to {found.end}"))
        parts.append(table(("start", "length", "content", "layer", "file", "offset"), _rows(found), len(found)))
    return "".join(parts)


def _rows(found: Extents) -> Iterator[Sequence[str]]:
    for one in found:
        yield (
            str(one.start),
            str(one.length),
            content(one.data, one.zero, one.present, one.compressed),
            str(one.depth) if one.present else "",
            one.file.filename if one.file is not None else "",
            str(one.offset) if one.offset is not None else "",
        )
