"""`lamina map --plot`: the status of an image as a picture in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..format import layers_of
from ..picture.cells import Cells, exact_size
from ..picture.terminal import LEAST, grid, plot
from .screen import columns, look

if TYPE_CHECKING:
    from ..extents import Extents
    from ..image import Image


def show(image: Image, pieces: Iterable[Extents], begin: int, end: int, block: int) -> None:
    """Print the picture of the extents `pieces`, which cover [begin, end), to standard output. `block`: the size of the
    blocks to which they were rounded; 1 if they are exact."""
    if begin == end:
        sys.stdout.write("no bytes\n")
        return
    width = columns()
    size, count = grid(begin, end, width, max(block, LEAST))
    cells = Cells(begin, end, size)
    for piece in pieces:
        cells.add(piece)
    names = [layer.filename for layer in layers_of(image.node)]
    notes = f"rounded to blocks of {exact_size(block)}" if block > 1 else "exact"
    for line in plot(cells, count, look(), width, notes=notes, layers=names):
        sys.stdout.write(f"{line}\n")
