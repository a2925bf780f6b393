"""The map of `qemu-img map`: whom bytes past the end of a shorter backing file belong to, and which stored bytes are zero."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ...extents import DATA, PRESENT, ZERO, Extents
from ...node import StorageNode
from ...numeric import np

if TYPE_CHECKING:
    from ...image import Image
    from ...node import Node


def as_theirs(image: Image, piece: Extents) -> Extents:
    """The map `piece` of `image` as qemu-img shows it.

    Past the end of a shorter backing file the tool says that nobody owns the bytes, and names the layer above. It looks for
    holes under clusters that a format keeps only where much less of a file is stored than the format counts."""
    layers = _layers(image.node)
    flags, depth = piece.flags.copy(), piece.depth.copy()
    for number in range(1, len(layers)):
        past = (depth == number) & (piece.start >= layers[number].size) & (flags & (DATA | ZERO) == ZERO)
        flags[past] &= ~np.uint8(PRESENT)
        depth[past] = number - 1
    for number, layer in enumerate(layers):
        if layer.driver != "raw" and not _is_sparse(layer):
            stored = (piece.depth == number) & (flags & (DATA | ZERO) == DATA | ZERO)
            flags[stored] &= ~np.uint8(ZERO)
    return replace(piece, flags=flags, depth=depth)


def _layers(top: Node) -> list[Node]:
    """The images of the chain, from the top."""
    found = []
    node: Node | None = top
    while node is not None:
        below = node.children.get("backing")
        inside = node.children.get("image")
        if below is None and inside is not None:
            node = inside.node  # a filter
            continue
        found.append(node)
        node = below.node if below is not None else None
    return found


def _is_sparse(layer: Node) -> bool:
    """Whether much less of the file of `layer` is stored than the file is long."""
    base = layer.children["file"].node.host_base if "file" in layer.children else None
    file = base[0] if base else None
    if not isinstance(file, StorageNode) or file.allocated is None:
        return False
    return file.allocated < file.size // 2
